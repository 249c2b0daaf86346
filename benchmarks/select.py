"""Seconds and memory of selecting neurons in a model of a given size, from random activations.

    python -m benchmarks.select      # LAPE at five rates, 80 layers of 28,672 units, 21 languages
    python -m benchmarks.select --method average_precision --layers 32 --units 14336

Prints one JSON object. `peak_gb` is of the whole process and holds the input, `input_gb`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.neurons.select import Selection, activated, average_precision, lape_rates

RATES = (0.01, 0.02, 0.03, 0.04, 0.05)
TOKENS = 1_000_000  # per language


def made_up_counts(layers: int, units: int, languages: int) -> NDArray[np.int64]:
    """(layer, unit, language) counts of beta-distributed shares of the tokens."""
    generator = np.random.default_rng(0)
    counts = np.empty((layers, units, languages), dtype=np.int64)
    for layer in counts:
        layer[:] = generator.beta(0.3, 1.0, size=layer.shape) * TOKENS
    return counts


def made_up_means(layers: int, units: int, languages: int, sentences: int) -> list[NDArray[np.float16]]:
    """For each language (sentence, layer, unit) means, with a level for each neuron and language."""
    generator = np.random.default_rng(0)
    means = [np.empty((sentences, layers, units), dtype=np.float16) for _ in range(languages)]
    for table in means:
        level = generator.standard_normal((layers, units), dtype=np.float32)
        for sentence in table:
            sentence[:] = generator.standard_normal((layers, units), dtype=np.float32) + level
    return means


def task(options: argparse.Namespace) -> tuple[Callable[[], list[Selection]], int]:
    """What to time, and the bytes of its input."""
    size = (options.layers, options.units, options.languages)
    if options.method == "lape":
        counts = made_up_counts(*size)
        return lambda: lape_rates(counts, [TOKENS] * options.languages, RATES), counts.nbytes
    means = made_up_means(*size, options.sentences)
    work: Callable[[], list[Selection]] = {
        "activated": lambda: [activated(means)],
        "average_precision": lambda: [average_precision(means, threshold=0.5)],
    }[options.method]
    return work, sum(table.nbytes for table in means)


def peak_bytes() -> int:
    """Largest resident memory of this process so far; kilobytes on Linux, bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=("lape", "activated", "average_precision"), default="lape")
    for name, number in (("layers", 80), ("units", 28_672), ("languages", 21), ("sentences", 100)):
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    work, input_bytes = task(options)
    start = time.perf_counter()
    selections = work()
    seconds = time.perf_counter() - start
    figures: dict[str, Any] = vars(options) | {
        "seconds": round(seconds, 1),
        "peak_gb": round(peak_bytes() / 1e9, 2),
        "input_gb": round(input_bytes / 1e9, 2),
        "selected": [selection.numbers["selected"] for selection in selections],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
