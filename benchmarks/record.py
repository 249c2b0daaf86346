"""Recording against the bare forward pass of the same decoder, without its head, on the same rows.

    python -m benchmarks.record              # a Llama of 8 layers on a CPU, of 8B shape on a GPU
    python -m benchmarks.record --quick --json record.json

Interleaved rounds; prints the medians, their ratio (the bare pass against itself shows the noise) and
tokens per second.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import interleaved, options_of, ratio, report
from benchmarks.models import LARGE, SMALL
from lm_eval_steering.architectures import sites_of
from lm_eval_steering.neurons.rows import TokenRows
from lm_eval_steering.neurons.running import Batches, count_active


def build(quick: bool) -> tuple[Any, Batches]:
    """A random Llama and full rows for it."""
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    shape = LARGE if gpu else SMALL
    config = LlamaConfig(**shape, num_key_value_heads=8, vocab_size=8192, max_position_embeddings=4096)
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if gpu else torch.float32).eval()
    length, rows_per_batch, batches = (2048, 8, 4) if gpu else (128, 16, 1 if quick else 2)
    tokens = np.random.default_rng(0).integers(0, 8192, size=(rows_per_batch * batches, length))
    return model, Batches(TokenRows.of(tokens), (), sites_of(model), rows_per_batch)


def main() -> None:
    options = options_of(__doc__).parse_args()
    model, batches = build(options.quick)
    sites = sites_of(model)

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            sites.decoder(**batch.inputs, use_cache=False)

    works = {"bare": bare, "record": lambda: count_active(sites, batches), "bare again": bare}
    seconds = interleaved(works, 5 if options.quick else 15)
    tokens = sum(map(len, batches.rows))
    result = {
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "tokens_per_second": round(tokens / statistics.median(seconds["record"])),
        "ratios": {
            "record": round(ratio(seconds, "record", "bare"), 4),
            "bare again": round(ratio(seconds, "bare again", "bare"), 4),
        },
    }
    report(result, options.json)


if __name__ == "__main__":
    main()
