"""Everything that is worth a GPU's time, in one run of under 8 minutes: a random Llama of 8B shape in bfloat16.

    python -m benchmarks.accelerator --json accelerator.json    # about 40 GB of GPU memory; the weights are made here
    python -m benchmarks.accelerator --quick                    # a small model in float32, on any device

Scoring (shapes of XCOPA, Belebele, long options and LSS) and generation, ours steered against unsteered `--model hf`;
recording against the bare decoder; steered against unsteered forward passes (prefill, and generation, which is decode).
Interleaved rounds, as many as fit the time of each part, 3 at least. `again` is the rival against itself. `share` is
the matrix products' floating-point operations a second (attention's own left out, pads counted), over those of one
large product in the same precision. After each part the result so far is written, so that a run that is cut short has
what it measured. What half precision does to scores is `benchmarks.half_precision`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.generation import SETTINGS
from benchmarks.items import SHAPES, requests_of, rivals, texts
from benchmarks.measure import interleaved, options_of, ratio, report, synchronize
from benchmarks.overhead import neurons_of, tasks, with_each_intervention
from lm_eval_steering.architectures import sites_of
from lm_eval_steering.lmeval.packing import DeviceLimits
from lm_eval_steering.neurons.rows import TokenRows
from lm_eval_steering.neurons.running import Batches, count_active

LARGE = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128_256, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
SMALL = LlamaConfig(
    hidden_size=256, intermediate_size=896, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=8192, max_position_embeddings=2048,
)  # fmt: skip
ITEMS = {"xcopa": 200, "belebele": 40, "options": 40, "lss": 300}
SIDE = 8192  # of the matrices whose product is the ceiling
# Seconds of the interleaved rounds of each part; the whole is under 8 minutes with the two models and the warm-ups.
SECONDS = {"scoring": 160.0, "recording": 40.0, "hooks": 60.0, "generation": 60.0}
FEWEST, MOST = 3, 15  # rounds
RECORDED = {"rows": 16, "length": 2048, "batch": 8}
Works = Mapping[str, Callable[[], Any]]


def build(quick: bool) -> Callable[[], Any]:
    """Makes the model: in bfloat16 on a GPU, in float32 elsewhere."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32

    def make() -> Any:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda" if gpu else "cpu"):
                return LlamaForCausalLM(SMALL if quick else LARGE).eval()
        finally:
            torch.set_default_dtype(before)

    return make


def ceiling(model: nn.Module, side: int) -> float:
    """Floating-point operations a second of one product of two square matrices, the median of nine."""
    weight = next(model.parameters())
    one = torch.randn(side, side, dtype=weight.dtype, device=weight.device)
    seconds = interleaved({"product": lambda: one @ one}, 9)["product"]
    return 2 * side**3 / statistics.median(seconds)


def operations(model: nn.Module, work: Callable[[], Any]) -> float:
    """Floating-point operations of the linear layers while `work` runs."""
    total = 0

    def count(module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Linear)
        total += 2 * module.in_features * output.numel()

    handles = [each.register_forward_hook(count) for each in model.modules() if isinstance(each, nn.Linear)]
    work()
    for handle in handles:
        handle.remove()
    return total


def rounds_for(works: Works, seconds: float) -> int:
    """How many rounds fit a time, by one round that is not counted; `interleaved` warms up once more."""
    start = time.perf_counter()
    for work in works.values():
        work()
    synchronize()
    return max(FEWEST, min(MOST, int(seconds / max(time.perf_counter() - start, 1e-6)) - 2))


def compare(works: Works, models: Mapping[str, nn.Module], rival: str, most: float, seconds: float) -> dict[str, Any]:
    """Medians, ratios to the rival, and each model's share of the ceiling."""
    rounds = rounds_for(works, seconds)
    times = interleaved(works, rounds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "rounds": rounds,
        "seconds": {name: round(median, 5) for name, median in medians.items()},
        "ratios": {name: round(ratio(times, name, rival), 4) for name in works if name != rival},
        "share": {
            name: round(operations(model, works[name]) / medians[name] / most, 4) for name, model in models.items()
        },
    }


def of_requests(plain: Any, ours: Any, call: str, requests: list[Instance], most: float, seconds: float) -> Any:
    """Ours steered against unsteered `hf`, on lm-eval's requests."""
    works = {
        name: lambda lm=lm: getattr(lm, call)(requests, disable_tqdm=True)
        for name, lm in {"hf": plain, "ours": ours, "again": plain}.items()
    }
    return compare(works, {"hf": plain.model, "ours": ours.model}, "hf", most, seconds)


def recording(model: Any, quick: bool, most: float, seconds: float) -> dict[str, Any]:
    """Recording against the bare decoder, on full rows."""
    size = {"rows": 4, "length": 128, "batch": 2} if quick else RECORDED
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, size=(size["rows"], size["length"]))
    sites = sites_of(model)
    batches = Batches(TokenRows.of(tokens), (), sites, size["batch"])

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            sites.decoder(**batch.inputs, use_cache=False)

    works = {"bare": bare, "record": lambda: count_active(sites, batches), "again": bare}
    compared = compare(works, {"bare": model, "record": model}, "bare", most, seconds)
    return compared | {"tokens a second": round(tokens.size / compared["seconds"]["record"])}


def hooks(model: Any, most: float, seconds: float) -> dict[str, Any]:
    """Steered against unsteered: one forward pass of 8 x 128 tokens, and 32 tokens generated for 8 rows."""
    neurons = neurons_of(model)
    compared: dict[str, Any] = {}
    for name, task in zip(("prefill", "decode"), tasks(model).values(), strict=True):
        works = with_each_intervention(model, neurons, task)
        compared[name] = compare(works, {"none": model}, "none", most, seconds / 2)
    return compared


def memory() -> dict[str, Any]:
    """Peak of the device so far, in GiB; empty where it has none of its own."""
    if not torch.cuda.is_available():
        return {}
    return {"peak, GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def main() -> None:
    options = options_of(__doc__).parse_args()
    start, part = time.perf_counter(), 0.05 if options.quick else 1.0
    seconds = {name: share * part for name, share in SECONDS.items()}
    plain, ours = rivals(build(options.quick))
    most = ceiling(ours.model, SIDE // 8 if options.quick else SIDE)
    limits = DeviceLimits.of(ours.device, ours.model.dtype, ours.model.config)
    result: dict[str, Any] = {"ceiling, TFLOP/s": round(most / 1e12, 3), "limits of a batch": asdict(limits)}

    def done(name: str, measured: Any) -> None:
        result[name] = measured
        result["seconds so far"] = round(time.perf_counter() - start, 1)
        report(result | memory(), options.json)

    for name, number in ITEMS.items():
        requests = requests_of(SHAPES[name](max(2, int(number * part))))
        done(name, of_requests(plain, ours, "loglikelihood", requests, most, seconds["scoring"] / len(ITEMS)))
    requests = [
        Instance("generate_until", {}, (text, SETTINGS["full"]), 0) for text in texts(4 if options.quick else 32)
    ]
    done("generation", of_requests(plain, ours, "generate_until", requests, most, seconds["generation"]))
    ours.intervene(None)
    done("recording", recording(ours.model, options.quick, most, seconds["recording"]))
    done("hooks", hooks(ours.model, most, seconds["hooks"]))


if __name__ == "__main__":
    main()
