"""Rolling likelihood of a steered model against lm-eval's `--model hf`, unsteered, on paragraphs of unequal length.

    python -m benchmarks.rolling             # the demo model
    python -m benchmarks.rolling --quick --json rolling.json

Interleaved rounds, batch size 16; prints the medians, the median of the ratios in each round, the noise (`again`), and
the largest relative difference of unsteered values.
"""

from __future__ import annotations

import statistics

from benchmarks.items import demo_model, rivals, rolling_of, texts
from benchmarks.measure import interleaved, options_of, ratio, report

LIMIT = 0.95


def main() -> None:
    options = options_of(__doc__).parse_args()
    plain, ours = rivals(demo_model)
    requests = rolling_of(texts(12 if options.quick else 40))
    works = {
        "hf": lambda: plain.loglikelihood_rolling(requests, disable_tqdm=True),
        "ours": lambda: ours.loglikelihood_rolling(requests, disable_tqdm=True),
        "again": lambda: plain.loglikelihood_rolling(requests, disable_tqdm=True),
    }
    seconds = interleaved(works, 5 if options.quick else 9)
    with ours.steering.suspended():
        found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = plain.loglikelihood_rolling(requests, disable_tqdm=True)
    result = {
        "seconds": {name: round(statistics.median(own), 4) for name, own in seconds.items()},
        "ratios": {name: round(ratio(seconds, name, "hf"), 3) for name in ("ours", "again")},
        "limit": LIMIT,
        "relative difference": max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)),
        "scoring": ours.scorer.report(),
    }
    report(result, options.json)


if __name__ == "__main__":
    main()
