"""Rolling likelihood of a steered model against lm-eval's `--model hf`, unsteered, on sentences and on paragraphs.

    python -m benchmarks.rolling             # the demo model
    python -m benchmarks.rolling --quick --json rolling.json

Interleaved rounds, batch size 16; prints the medians, the median of the ratios in each round, the noise (`again`), and
the largest relative difference of unsteered values.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.items import demo_model, rivals, rolling_of, sentences, texts
from benchmarks.measure import interleaved, options_of, ratio, report

LIMIT = 0.95


def main() -> None:
    options = options_of(__doc__).parse_args()
    plain, ours = rivals(demo_model)
    rounds = 5 if options.quick else 9
    shapes = {"sentences": sentences(60 if options.quick else 200), "paragraphs": texts(12 if options.quick else 40)}
    results = {name: measured(plain, ours, each, rounds) for name, each in shapes.items()}
    report({**results, "limit": LIMIT, "scoring": ours.scoring_report()}, options.json)


def measured(plain: Any, ours: Any, text: list[str], rounds: int) -> dict[str, Any]:
    """Seconds and ratios, and the largest relative difference."""
    requests = rolling_of(text)
    works = {
        "hf": lambda: plain.loglikelihood_rolling(requests, disable_tqdm=True),
        "ours": lambda: ours.loglikelihood_rolling(requests, disable_tqdm=True),
        "again": lambda: plain.loglikelihood_rolling(requests, disable_tqdm=True),
    }
    seconds = interleaved(works, rounds)
    with ours.steering.suspended():
        scores = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = plain.loglikelihood_rolling(requests, disable_tqdm=True)
    return {
        "seconds": {name: round(statistics.median(each), 4) for name, each in seconds.items()},
        "ratios": {name: round(ratio(seconds, name, "hf"), 3) for name in ("ours", "again")},
        "relative difference": max(abs(a / b - 1) for a, b in zip(scores, expected, strict=True)),
    }


if __name__ == "__main__":
    main()
