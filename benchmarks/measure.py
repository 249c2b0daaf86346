"""What all benchmarks share: interleaved rounds, medians and ratios, and a description of the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap


def interleaved(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round; in every other round in the other order, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works) if number % 2 else list(reversed(works)):
            synchronize()
            start = time.perf_counter()
            works[name]()
            synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: Mapping[str, list[float]], name: str, other: str) -> float:
    """Median over the rounds of one work's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def interval(seconds: Mapping[str, list[float]], name: str, other: str) -> tuple[float, float]:
    """95 % of the bootstrapped medians of the same ratios."""
    ratios = np.array(seconds[name]) / np.array(seconds[other])
    low, high = bootstrap((ratios,), np.median, method="percentile", rng=0).confidence_interval
    return float(low), float(high)


def machine() -> dict[str, Any]:
    """Processor or accelerator, threads, versions."""
    names = ("lm-eval-steering", "lm-eval", "torch", "transformers")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(result: Mapping[str, Any], file: Path | None) -> None:
    """Print a result with its machine as JSON, and write it where a file is given."""
    text = json.dumps({**result, "machine": machine()}, indent=1)
    print(text)
    if file is not None:
        file.write_text(text + "\n")


def options_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few items and rounds, or a small model")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser
