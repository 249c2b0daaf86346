"""Scoring a steered model against lm-eval's `--model hf`, unsteered, on the same requests.

    python -m benchmarks.scoring             # the demo model, and a random Llama with a vocabulary of 128k
    python -m benchmarks.scoring --quick --json scoring.json
    python -m benchmarks.scoring --model MODEL --dtype bfloat16      # a checkpoint, on five shapes

Interleaved rounds, batch size 16; prints the medians, the median of the ratios in each round, and `again`, `hf` once
more, which shows the noise. `lss both` is steered and unsteered together against one
unsteered pass. `unsteered difference` is the largest between lm-eval's scores and ours, in nats. With `--model` there
is peak memory too (`benchmarks.memory`). `OMP_NUM_THREADS` says how many threads.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from benchmarks.items import DEMO, SHAPES, checkpoint, demo_model, large_vocabulary_model, requests_of, rivals
from benchmarks.measure import interleaved, options_of, ratio, report
from benchmarks.memory import peaks

ITEMS = {"xcopa": 100, "xwinograd": 100, "belebele": 16, "include": 40, "options": 16, "lss": 150}
QUICK = {"xcopa": 20, "xwinograd": 12, "belebele": 3, "include": 5, "options": 2, "lss": 30}
LARGE = {"xcopa": 20, "xwinograd": 16, "belebele": 4, "include": 8, "options": 3, "lss": 40}
CHECKPOINT = {"xcopa": 16, "xnli": 8, "belebele": 4, "lss": 24, "perplexity": 24}
CHECKPOINT_QUICK = {"xcopa": 4, "xnli": 2, "belebele": 1, "lss": 6, "perplexity": 6}
LIMITS = {
    "xcopa": 0.65,
    "xwinograd": 0.95,
    "belebele": 0.9,
    "include": 0.9,
    "options": 0.45,
    "lss": 0.65,
    "lss both": 1.25,
}


def compare(plain: Any, ours: Any, requests: list[Instance], twice: bool, rounds: int) -> dict[str, Any]:
    """Seconds, ratios, and the difference of unsteered scores."""

    def score(lm: Any) -> Callable[[], Any]:
        return lambda: lm.loglikelihood(requests, disable_tqdm=True)

    works = {"hf": score(plain), "ours": score(ours), "again": score(plain)}
    if twice:
        pairs = [Instance(r.request_type, {"needs_unsteered_score": True}, r.args, r.idx) for r in requests]

        def both() -> None:
            ours.scorer.forget_baseline()
            ours.loglikelihood(pairs, disable_tqdm=True)

        works["ours both"] = both
    seconds = interleaved(works, rounds)
    with ours.steering.suspended():
        unsteered = ours.loglikelihood(requests, disable_tqdm=True)
    expected = plain.loglikelihood(requests, disable_tqdm=True)
    results: dict[str, Any] = {
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "ratio": ratio(seconds, "ours", "hf"),
        "again": ratio(seconds, "again", "hf"),
        "unsteered difference": max(abs(a[0] - b[0]) for a, b in zip(unsteered, expected, strict=True)),
        "matches differ": sum(a[1] != b[1] for a, b in zip(unsteered, expected, strict=True)),
    }
    return results | ({"both": ratio(seconds, "ours both", "hf")} if twice else {})


def measured(
    build: Callable[[], Any], items: Mapping[str, int], rounds: int, folder: Path = DEMO, batch_size: int = 16
) -> dict[str, Any]:
    """Every shape on one model, with the tokenizer in a folder."""
    plain, ours = rivals(build, batch_size, folder=folder)
    results: dict[str, Any] = {}
    for name, number in items.items():
        requests = requests_of(SHAPES[name](number))
        results[name] = compare(plain, ours, requests, name == "lss", rounds)
    return results | {"scoring": ours.scoring_report()}


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Ours over unsteered `hf`, by shape."""
    made = {name: round(each["ratio"], 3) for name, each in results.items() if "ratio" in each}
    return made | {f"{name} both": round(each["both"], 3) for name, each in results.items() if "both" in each}


def of_checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint of the user's, with the peak memory of each side in a process of its own."""
    items, rounds = (CHECKPOINT_QUICK, 3) if options.quick else (CHECKPOINT, options.rounds)
    build = checkpoint(options.model, options.dtype)
    found = measured(build, items, rounds, options.model, options.batch_size)
    of_both = ["--model", str(options.model), "--dtype", options.dtype, "--batch-size", str(options.batch_size)]
    memory = {} if options.no_memory else peaks(items, of_both)
    facts = {"model": options.model.name, "dtype": options.dtype, "batch size": options.batch_size, "rounds": rounds}
    return facts | {"items": items, "ratios": ratios(found), "MB above the loaded model": memory, "shapes": found}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint, instead of the two models")
    parser.add_argument("--dtype", default="float32", help="of its weights")
    parser.add_argument("--batch-size", type=int, default=16, help="of both sides")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    options = parser.parse_args()
    if options.model is not None:
        report(of_checkpoint(options), options.json)
        return
    demo = measured(demo_model, QUICK if options.quick else ITEMS, 5 if options.quick else 9)
    result = {"ratios": ratios(demo), "limits": LIMITS, "demo": demo}
    report(result, options.json)
    if not options.quick:
        large = measured(large_vocabulary_model, LARGE, 5)
        report(result | {"ratios with 128k": ratios(large), "vocabulary of 128k": large}, options.json)


if __name__ == "__main__":
    main()
