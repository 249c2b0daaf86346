"""Scoring and generation on an accelerator: a random Llama of 8B shape in bfloat16, ours steered, `--model hf` not.

    python -m benchmarks.accelerator             # about 40 GB of GPU memory; the weights are made, not downloaded
    python -m benchmarks.accelerator --quick --json accelerator.json     # a small model, on any device

Interleaved rounds, batch size 16. `share` is the matrix products' floating-point operations per second (attention's own
left out, pads counted), over those of one large product in the same precision.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.generation import SETTINGS
from benchmarks.items import SHAPES, requests_of, rivals, texts
from benchmarks.measure import interleaved, options_of, ratio, report

LARGE = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128_256, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
SMALL = LlamaConfig(
    hidden_size=256, intermediate_size=896, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=8192, max_position_embeddings=2048,
)  # fmt: skip
ITEMS = {"xcopa": 200, "xwinograd": 200, "belebele": 40, "options": 40, "lss": 300}
SIDE = 8192  # of the matrices whose product is the ceiling


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
    """Floating-point operations per second of one product of two square matrices, the median of nine."""
    weight = next(model.parameters())
    one = torch.randn(side, side, dtype=weight.dtype, device=weight.device)
    seconds = interleaved({"product": lambda: one @ one}, 9)["product"]
    return 2 * side**3 / statistics.median(seconds)


def operations(lm: Any, work: Callable[[], Any]) -> float:
    """Floating-point operations of the linear layers while `work` runs."""
    operations = 0

    def count(module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        nonlocal operations
        assert isinstance(module, nn.Linear)
        operations += 2 * module.in_features * output.numel()

    handles = [each.register_forward_hook(count) for each in lm.model.modules() if isinstance(each, nn.Linear)]
    work()
    for handle in handles:
        handle.remove()
    return operations


def compare(plain: Any, ours: Any, call: str, requests: list[Instance], most: float, rounds: int) -> dict[str, Any]:
    """Seconds, their ratio, and each one's share of the ceiling."""
    works = {name: lambda lm=lm: getattr(lm, call)(requests, disable_tqdm=True) for name, lm in
             {"hf": plain, "ours": ours, "again": plain}.items()}  # fmt: skip
    seconds = interleaved(works, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds": {name: round(median, 4) for name, median in medians.items()},
        "ratios": {name: round(ratio(seconds, name, "hf"), 3) for name in ("ours", "again")},
        "share": {
            name: round(operations(lm, works[name]) / medians[name] / most, 3)
            for name, lm in {"hf": plain, "ours": ours}.items()
        },
    }


def main() -> None:
    options = options_of(__doc__).parse_args()
    rounds, part = (3, 0.05) if options.quick else (5, 1.0)
    plain, ours = rivals(build(options.quick))
    most = ceiling(ours.model, SIDE // 8 if options.quick else SIDE)
    result: dict[str, Any] = {"ceiling, TFLOP/s": round(most / 1e12, 3)}
    for name, number in ITEMS.items():
        requests = requests_of(SHAPES[name](max(2, int(number * part))))
        result[name] = compare(plain, ours, "loglikelihood", requests, most, rounds)
    requests = [
        Instance("generate_until", {}, (text, SETTINGS["full"]), 0) for text in texts(4 if options.quick else 32)
    ]
    result["generation"] = compare(plain, ours, "generate_until", requests, most, rounds)
    report(result, options.json)


if __name__ == "__main__":
    main()
