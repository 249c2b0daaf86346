"""Generation of a steered model against lm-eval's `--model hf`, unsteered, on prompts of unequal length.

    python -m benchmarks.generation          # the demo model, and a random Llama of 8 layers
    python -m benchmarks.generation --quick --json generation.json

Interleaved rounds, batch size 16, greedy, float32. `full` makes the same number of tokens for every prompt, so that
little is to be saved; `clauses` ends a text at a comma or a full stop, whichever is first. `unsteered` is
ours with the intervention suspended, whose texts have to be those of `hf`, byte for byte; `steered` makes other texts,
longer or shorter ones in `clauses`. Ours also identifies the language of each output. `again` is `hf` once more.
Medians of the ratios in each round, with their 95 % intervals.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.items import demo_model, rivals, texts
from benchmarks.measure import interleaved, interval, options_of, ratio, report
from benchmarks.models import SMALL

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"until": [], "do_sample": False, "max_gen_toks": 16, "min_new_tokens": 16},
    "clauses": {"until": [",", "."], "do_sample": False, "max_gen_toks": 48},
}
LIMIT = 1.0


def random_model() -> Any:
    """A random Llama of 8 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, vocab_size=8192, max_position_embeddings=1024, initializer_range=0.1)
    return LlamaForCausalLM(config).eval()


def measured(build: Callable[[], Any], number: int, rounds: int) -> dict[str, Any]:
    """Seconds, ratios, and whether the texts are equal, by setting."""
    plain, ours = rivals(build)
    prompts = [text[: 40 + 9 * index] for index, text in enumerate(texts(number))]
    results: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        requests = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]
        results[name] = compare(plain, ours, requests, rounds)
    return results


def compare(plain: Any, ours: Any, requests: list[Instance], rounds: int) -> dict[str, Any]:
    """Both on the same requests."""

    def unsteered() -> list[str]:
        with ours.steering.suspended():
            return ours.generate_until(requests, disable_tqdm=True)

    works = {
        "hf": lambda: plain.generate_until(requests, disable_tqdm=True),
        "steered": lambda: ours.generate_until(requests, disable_tqdm=True),
        "unsteered": unsteered,
        "again": lambda: plain.generate_until(requests, disable_tqdm=True),
    }
    seconds = interleaved(works, rounds)
    return {
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "ratios": {name: round(ratio(seconds, name, "hf"), 3) for name in works if name != "hf"},
        "intervals": {
            name: [round(bound, 3) for bound in interval(seconds, name, "hf")] for name in works if name != "hf"
        },
        "byte-equal": list(map(str, unsteered())) == plain.generate_until(requests, disable_tqdm=True),
    }


def main() -> None:
    options = options_of(__doc__).parse_args()
    number, rounds = (16, 5) if options.quick else (48, 9)
    result: dict[str, Any] = {"demo": measured(demo_model, number, rounds), "limit": LIMIT}
    if not options.quick:
        result["random Llama"] = measured(random_model, 16, 9)
    report(result, options.json)


if __name__ == "__main__":
    main()
