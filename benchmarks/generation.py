"""Generation of a steered model against lm-eval's `--model hf`, unsteered, on prompts of unequal length.

    python -m benchmarks.generation          # the demo model
    python -m benchmarks.generation --quick --json generation.json

Interleaved rounds, batch size 16, greedy, float32. `unsteered` is ours with the intervention suspended, whose texts
have to be those of `hf`, byte for byte; `steered` makes other texts, which may be longer or shorter, so every text has
the full number of tokens. Ours also identifies the language of each output.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from lm_eval.api.instance import Instance

from benchmarks.items import demo_model, rivals, texts
from benchmarks.measure import interleaved, ratio, report

TOKENS = 16
LIMIT = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    plain, ours = rivals(demo_model)
    settings = {"until": [], "do_sample": False, "max_gen_toks": TOKENS, "min_new_tokens": TOKENS}
    prompts = [text[: 40 + 9 * place] for place, text in enumerate(texts(16 if options.quick else 48))]
    requests = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]

    def unsteered() -> list[str]:
        with ours.steering.suspended():
            return ours.generate_until(requests, disable_tqdm=True)

    works = {
        "hf": lambda: plain.generate_until(requests, disable_tqdm=True),
        "steered": lambda: ours.generate_until(requests, disable_tqdm=True),
        "unsteered": unsteered,
        "again": lambda: plain.generate_until(requests, disable_tqdm=True),
    }
    seconds = interleaved(works, 3 if options.quick else 9)
    result = {
        "seconds": {name: round(statistics.median(own), 4) for name, own in seconds.items()},
        "ratios": {name: round(ratio(seconds, name, "hf"), 3) for name in works if name != "hf"},
        "limit": LIMIT,
        "byte-equal": list(map(str, unsteered())) == plain.generate_until(requests, disable_tqdm=True),
    }
    report(result, options.json)


if __name__ == "__main__":
    main()
