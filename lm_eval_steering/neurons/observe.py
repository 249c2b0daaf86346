"""Running text through a model's decoder and looking at its units: the part that recording and calibration share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lm_eval_steering.architectures import ModelSites, check_width
from lm_eval_steering.neurons.corpus import Row

# Called with (layer, units): units is (row, position, unit), or (row * position, unit) where a family flattens it.
Observer = Callable[[int, torch.Tensor], None]


class Batches:
    """Rows as right-padded batches that begin with BOS where the tokenizer adds one.

    Attributes:
        counted: (row, position) bool of the batch in hand: real tokens, neither padding nor BOS.
        tokens: their number, known without asking the device.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, batch_size: int, device: torch.device) -> None:
        self.rows = rows
        self.prefix = added_bos(tokenizer)
        self.batch_size = batch_size
        self.device = device
        self.counted = torch.zeros(0, 0, dtype=torch.bool)
        self.tokens = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            width = max(len(row) for row in rows) + len(self.prefix)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            real = torch.zeros(len(rows), width, dtype=torch.long)
            for number, row in enumerate(rows):
                tokens = torch.tensor(self.prefix + row)
                ids[number, : len(tokens)] = tokens
                real[number, : len(tokens)] = 1
            counted = real.bool()
            counted[:, : len(self.prefix)] = False
            self.tokens = sum(len(row) for row in rows)
            self.counted = counted.to(self.device)
            yield {"input_ids": ids.to(self.device), "attention_mask": real.to(self.device)}


def added_bos(tokenizer: Any) -> list[int]:
    """The BOS that the tokenizer puts before a text, as evaluation sees it; empty where it puts none."""
    begins = tokenizer("a")["input_ids"][:1]
    return begins if tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id] else []


@contextmanager
def observing(
    sites: ModelSites, at_activation: Observer | None = None, at_product: Observer | None = None
) -> Iterator[None]:
    """Show every layer's units to the observers during forward passes; hooks are removed in any case."""
    handles = []

    def output_hook(layer: int, observer: Observer) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            check_width(output, sites.shape.units, layer)
            observer(layer, output)

        return hook

    def input_hook(layer: int, observer: Observer) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            check_width(inputs[0], sites.shape.units, layer)
            observer(layer, inputs[0])

        return hook

    try:
        for site in sites.layers:
            if at_activation is not None:
                handles.append(site.activation.register_forward_hook(output_hook(site.layer, at_activation)))
            if at_product is not None:
                handles.append(site.down.register_forward_pre_hook(input_hook(site.layer, at_product)))
        yield
    finally:
        for handle in handles:
            handle.remove()
