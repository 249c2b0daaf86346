"""What steering costs: steered against unsteered forward passes (8 x 128 tokens) and generation (8 rows, 32 tokens).

    python -m benchmarks.overhead            # a Llama of 8 layers on a CPU, of 8B shape on a GPU
    python -m benchmarks.overhead --quick --json overhead.json

Interleaved rounds; prints the medians, the median of the ratios in each round, and peak memory. `again` is the
unsteered model once more: its ratio shows the noise.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import interleaved, options_of, ratio, report
from benchmarks.models import LARGE, SMALL, STEERED, random_set
from lm_eval_steering import steer
from lm_eval_steering.neurons.neuron_set import NeuronSet, Statistics

INTERVENTIONS: dict[str, dict[str, Any]] = {
    "scale": {"op": "scale", "factor": 3.0},
    "add": {"op": "add", "value": "mean", "factor": 3.0},
    "set": {"op": "set", "value": "mean"},
    "live_max": {"op": "add", "value": "live_max"},
    "product": {"op": "scale", "factor": 3.0, "site": "product"},
}
LIMITS = {"forward": 1.03, "generate": 1.05}


def build(quick: bool) -> tuple[Any, NeuronSet]:
    """A random Llama, and a random neuron set of it."""
    gpu = torch.cuda.is_available()
    shape = LARGE if gpu and not quick else SMALL
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=512, **shape)
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM(config).eval()
    model = model.bfloat16() if gpu else model
    return model, neurons_of(model)


def neurons_of(model: Any) -> NeuronSet:
    """A random neuron set of a Llama, with statistics."""
    neurons = random_set(model)
    means = np.random.default_rng(0).normal(size=(len(neurons.union()), 1)).astype(np.float32)
    calibrated = Statistics(neurons.union(), ("fra_Latn",), {"activation": {"mean": means}})
    return replace(neurons, calibrated=calibrated)


def tasks(model: Any) -> dict[str, Callable[[], Any]]:
    """The two things that are timed."""
    ids = torch.randint(0, 8192, (8, 128), device=model.device)
    prompt = ids[:, :32]
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def forward() -> None:
        model(ids)

    @torch.no_grad()
    def generate() -> None:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)

    return {"forward": forward, "generate": generate}


def with_each_intervention(model: Any, neurons: NeuronSet, task: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The task unsteered, twice, and under each intervention."""

    def under(arguments: dict[str, Any]) -> Callable[[], Any]:
        steering = steer(model, neurons, "fra_Latn", **arguments)

        def work() -> None:
            with steering:
                task()

        return work

    return {"none": task, "again": task} | {kind: under(each) for kind, each in INTERVENTIONS.items()}


def timed(model: Any, neurons: NeuronSet, rounds: int) -> dict[str, Any]:
    """Milliseconds and ratios of both tasks, unsteered and under each intervention."""
    results: dict[str, Any] = {}
    for name, task in tasks(model).items():
        works = with_each_intervention(model, neurons, task)
        seconds = interleaved(works, rounds)
        results[name] = {
            "milliseconds": {kind: round(1000 * statistics.median(times), 2) for kind, times in seconds.items()},
            "ratio": {kind: round(ratio(seconds, kind, "none"), 4) for kind in works if kind != "none"},
            "limit": LIMITS[name],
        }
    return results


def peak(kind: str) -> int:
    """Peak memory in bytes of this process (on a GPU: of its tensors) for three forward passes of one kind."""
    model, neurons = build(quick=True)
    task = tasks(model)["forward"]
    task()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    steering = steer(model, neurons, "fra_Latn", **INTERVENTIONS["scale"])
    for _ in range(3):
        if kind == "none":
            task()
        else:
            with steering:
                task()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory() -> dict[str, Any]:
    """Peak megabytes with and without steering, each in its own process."""
    bytes_of = {
        kind: int(subprocess.check_output([sys.executable, "-m", "benchmarks.overhead", "--peak", kind]).split()[-1])
        for kind in ("none", "scale")
    }
    megabytes = {kind: round(peak / 2**20, 1) for kind, peak in bytes_of.items()}
    return {"peak_megabytes": megabytes, "ratio": round(bytes_of["scale"] / bytes_of["none"], 4)}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--rounds", type=int, help="timed rounds; 9 by default, 5 with --quick")
    parser.add_argument("--peak", choices=("none", "scale"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak))
        return
    model, neurons = build(options.quick)
    rounds = options.rounds or (5 if options.quick else 9)
    result = {"rounds": rounds, "steered_share": STEERED, **timed(model, neurons, rounds), "memory": memory()}
    report(result, options.json)


if __name__ == "__main__":
    main()
