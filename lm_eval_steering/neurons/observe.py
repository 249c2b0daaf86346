"""Running text through a model's decoder and looking at its units: the part that recording and calibration share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.architectures import ModelSites, check_width
from lm_eval_steering.errors import DidNotHappenError
from lm_eval_steering.neurons.ranks import Ranks
from lm_eval_steering.neurons.rows import Row, Rows

# Called with (layer, units): units is (row * position, unit), whatever the family's own shape.
Observer = Callable[[int, torch.Tensor], None]
Side = Literal["right", "left"]


@dataclass(frozen=True)
class Batch:
    """Rows padded to one width, on the device.

    Attributes:
        rows: (row,) their numbers in the order of the text.
        inputs: of the decoder's forward.
        counted: (row, position) bool: real tokens, neither padding nor BOS.
        tokens: number of counted positions, known without asking the device.
    """

    rows: NDArray[np.intp]
    inputs: dict[str, torch.Tensor]
    counted: torch.Tensor
    tokens: int


class Batches:
    """Rows of similar length together, padded, each beginning with BOS where the tokenizer has one.

    The plan (which rows, in which batch, padded to which width) depends on the rows and the batch size alone; several
    processes are dealt whole batches of it, so that what they compute does not depend on their number.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        sites: ModelSites,
        batch_size: int,
        ranks: Ranks | None = None,
        side: Side = "right",
    ) -> None:
        self.rows: list[Row] = list(rows)
        self.prefix = bos_of(tokenizer)
        self.device = next(sites.decoder.parameters()).device
        self.side = side
        order = np.argsort(-rows.lengths, kind="stable")
        self.plan = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.own = (ranks or Ranks()).deal(self.plan)
        self.positioned = "position_ids" in inspect.signature(sites.decoder.forward).parameters

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[Batch]:
        return (self.build(numbers) for numbers in self.own)

    def build(self, numbers: NDArray[np.intp]) -> Batch:
        """One batch, moved to the device."""
        rows = [np.concatenate([self.prefix, self.rows[number]]) for number in numbers]
        width = max(len(row) for row in rows)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        real = np.zeros((len(rows), width), dtype=bool)
        counted = np.zeros((len(rows), width), dtype=bool)
        for number, row in enumerate(rows):
            start = width - len(row) if self.side == "left" else 0
            ids[number, start : start + len(row)] = row
            real[number, start : start + len(row)] = True
            counted[number, start + len(self.prefix) : start + len(row)] = True
        inputs = {"input_ids": torch.from_numpy(ids)}
        if not real.all():  # without padding no mask is needed, and attention has a faster path
            inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64))
            if self.positioned:
                inputs["position_ids"] = torch.from_numpy(np.maximum(real.cumsum(axis=1) - 1, 0))
        return Batch(
            numbers,
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()},
            torch.from_numpy(counted).to(self.device, non_blocking=True),
            int(counted.sum()),
        )


def bos_of(tokenizer: Any) -> Row:
    """(0 or 1,) the token that a row begins with: BOS where the tokenizer has one, whether or not it adds it itself."""
    own = tokenizer.bos_token_id
    return np.array([] if own is None else [own], dtype=np.int32)


@contextmanager
def observing(
    sites: ModelSites, at_activation: Observer | None = None, at_product: Observer | None = None
) -> Iterator[Callable[[Batch], torch.Tensor]]:
    """A function that runs the decoder on a batch and returns its last hidden state, (row, position, hidden).

    During each run every layer's units are shown to the observers; hooks are removed in any case. The function raises
    DidNotHappenError where a run showed a layer's units never or more than once.
    """
    handles = []
    calls = np.zeros((2, sites.shape.layers), dtype=np.int64)
    observers = (at_activation, at_product)

    def watch(kind: int, layer: int, units: torch.Tensor) -> None:
        check_width(units, sites.shape.units, layer)
        calls[kind, layer] += 1
        observer = observers[kind]
        if observer is not None:
            observer(layer, units.reshape(-1, units.shape[-1]))

    def run(batch: Batch) -> torch.Tensor:
        calls[:] = 0
        hidden = sites.decoder(**batch.inputs, use_cache=False)[0]
        for kind, observer in enumerate(observers):
            wrong = [] if observer is None else np.flatnonzero(calls[kind] != 1).tolist()
            if wrong:
                raise DidNotHappenError(
                    f"layers {wrong}: activations seen {calls[kind, wrong[0]]} times in one forward pass, expected "
                    "once; something bypasses the activation module"
                )
        return hidden

    def at_output(layer: int) -> Any:
        return lambda _module, _inputs, output: watch(0, layer, output)

    def at_input(layer: int) -> Any:
        return lambda _module, inputs: watch(1, layer, inputs[0])

    try:
        for site in sites.layers:
            if at_activation is not None:
                handles.append(site.activation.register_forward_hook(at_output(site.layer)))
            if at_product is not None:
                handles.append(site.down.register_forward_pre_hook(at_input(site.layer)))
        yield run
    finally:
        for handle in handles:
            handle.remove()
