"""From rows of tokens to activations: batches, hooks, counts, and the processes that share the work."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.architectures import ModelSites, check_width, hidden_states
from lm_eval_steering.architectures.loading import Bos, LazyModel
from lm_eval_steering.errors import CorpusError, DidNotHappenError, SteeringError
from lm_eval_steering.neurons.rows import TokenRow, TokenRows
from lm_eval_steering.progress import Log

CONTEXT = 2048  # tokens per row at most, by default

# --- The processes of one job: whole batches are dealt to them in turn, and their counts are added up

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them; one process alone needs no communication.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def deal(self, batches: Sequence[T]) -> list[T]:
        """This process's share, in turn with the others."""
        return list(batches[self.rank :: self.size])

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, on all of them."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def after_first(self, work: Callable[[], None]) -> None:
        """Let the first process do something that the others wait for; if it fails there, all of them fail alike."""
        failure: Exception | None = None
        if self.first:
            try:
                work()
            except SteeringError as error:
                failure = error
        failure = self.gather(failure)[0]
        if failure is not None:
            raise failure


def launched() -> tuple[Ranks, torch.device | None]:
    """This process among those that `accelerate launch` (or torchrun) started, and its device.

    Without a launcher: one process, and no device prescribed.

    Raises:
        SteeringError: if fewer processes joined than were launched.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), None
    from accelerate import PartialState

    # gloo on CPU. The first process may read text for hours while the others wait.
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    state = PartialState(cpu=cpu, timeout=timedelta(days=2))
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise SteeringError(
            f"{os.environ['WORLD_SIZE']} processes were launched, and {state.num_processes} joined each other: all of "
            "them would do the whole work"
        )
    return Ranks(state.process_index, state.num_processes), state.device


# --- Batches of rows, and hooks that observe the units while the decoder runs over them

# Called with (layer, units): units is (row * position, unit), whatever the family's own shape.
Observer = Callable[[int, torch.Tensor], None]
Side = Literal["right", "left"]


@dataclass(frozen=True)
class Batch:
    """Rows padded to one width, on the device.

    Attributes:
        rows: (row,) their numbers in the order of the text.
        inputs: of the decoder's forward.
        counted: (row, position) bool: real tokens, neither padding nor the prefix.
        tokens: number of counted positions, known without asking the device.
    """

    rows: NDArray[np.intp]
    inputs: dict[str, torch.Tensor]
    counted: torch.Tensor
    tokens: int


class Batches:
    """Rows of similar length together, padded, each beginning with the prefix.

    The plan (which rows, in which batch, padded to which width) depends on the rows and the batch size alone; several
    processes are dealt whole batches of it, so that what they compute does not depend on their number.
    """

    def __init__(
        self,
        rows: TokenRows,
        prefix: Sequence[int],
        sites: ModelSites,
        batch_size: int,
        ranks: Ranks | None = None,
        side: Side = "right",
    ) -> None:
        """Plan the batches.

        Args:
            rows: of one language.
            prefix: token ids that the model sees before each row, and that are not counted.
            sites: of the model.
            batch_size: rows per forward pass.
            ranks: the processes that the batches are dealt to.
            side: where rows are padded.
        """
        self.rows: list[TokenRow] = list(rows)
        self.prefix = np.asarray(prefix, dtype=np.int32)
        self.device = next(sites.decoder.parameters()).device
        self.side = side
        order = np.argsort(-rows.lengths, kind="stable")
        self.plan = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.ranks = ranks or Ranks()
        self.share = self.ranks.deal(self.plan)
        self.takes_positions = "position_ids" in inspect.signature(sites.decoder.forward).parameters

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[Batch]:
        return (self.build(numbers) for numbers in self.share)

    def stretches(self, batches: int) -> list[Batches]:
        """The plan cut into parts of so many batches per process, the same parts in every process."""
        length = batches * self.ranks.size
        parts = []
        for start in range(0, len(self.plan), length):
            part = copy(self)
            part.plan = self.plan[start : start + length]
            part.share = self.ranks.deal(part.plan)
            parts.append(part)
        return parts

    @property
    def tokens(self) -> int:
        """Counted tokens of the plan, of all processes."""
        return sum(len(self.rows[number]) for numbers in self.plan for number in numbers)

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
            if self.takes_positions:
                inputs["position_ids"] = torch.from_numpy(np.maximum(real.cumsum(axis=1) - 1, 0))
        return Batch(
            numbers,
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()},
            torch.from_numpy(counted).to(self.device, non_blocking=True),
            int(counted.sum()),
        )


@contextmanager
def observing(
    sites: ModelSites,
    at_activation: Observer | None = None,
    at_product: Observer | None = None,
    at_residual: Observer | None = None,
) -> Iterator[Callable[[Batch], torch.Tensor]]:
    """A function that runs the decoder on a batch and returns its last hidden state, (row, position, hidden).

    During each run every layer's units are shown to the observers, and at `residual` the hidden states that the layer
    returns; hooks are removed in any case. The function raises DidNotHappenError where a run showed those of a layer
    never or more than once.
    """
    handles = []
    calls = np.zeros((3, sites.shape.layers), dtype=np.int64)
    observers = (at_activation, at_product, at_residual)

    def show(site: int, layer: int, units: torch.Tensor) -> None:
        if site < 2:
            check_width(units, sites.shape.width(layer), layer)
        calls[site, layer] += 1
        observer = observers[site]
        if observer is not None:
            observer(layer, units.reshape(-1, units.shape[-1]))

    def run(batch: Batch) -> torch.Tensor:
        calls[:] = 0
        hidden: torch.Tensor = sites.decoder(**batch.inputs, use_cache=False)[0]
        for site, observer in enumerate(observers):
            wrong = [] if observer is None else np.flatnonzero(calls[site] != 1).tolist()
            if wrong:
                raise DidNotHappenError(
                    f"layers {wrong}: activations seen {calls[site, wrong[0]]} times in one forward pass, expected "
                    "once; something bypasses the activation module"
                )
        return hidden

    def output_hook(layer: int) -> Any:
        return lambda _module, _inputs, output: show(0, layer, output)

    def input_hook(layer: int) -> Any:
        return lambda _module, inputs: show(1, layer, inputs[0])

    def layer_hook(layer: int) -> Any:
        return lambda _module, _inputs, output: show(2, layer, hidden_states(output))

    try:
        for site in sites.layers:
            if at_activation is not None:
                handles.append(site.activation.register_forward_hook(output_hook(site.layer)))
            if at_product is not None:
                handles.append(site.down.register_forward_pre_hook(input_hook(site.layer)))
            if at_residual is not None:
                handles.append(site.block.register_forward_hook(layer_hook(site.layer)))
        yield run
    finally:
        for handle in handles:
            handle.remove()


# --- Counting active units

ProgressCallback = Callable[[int], None]  # called with the number of tokens that were counted

# Elements compared at a time: what stays in a CPU's cache, or keeps an accelerator busy.
_BLOCK = {"cpu": 1 << 19}
_LARGE_BLOCK = 1 << 26
_LONG_WARM_UP = 2.0  # seconds
_TOKENS_ON_CPU = 2048  # per forward pass


class _Counter:
    """Counts on the device, without synchronisation and without a loop over units.

    A comparison written as 0 and 1 into float32, multiplied with the mask of counted positions: exact, because a block
    has far fewer positions than float32 has integers, and several times faster than summing booleans.
    """

    def __init__(self, sites: ModelSites) -> None:
        self.sites = sites
        self.totals: list[torch.Tensor | None] = [None] * sites.shape.layers
        self.buffers: dict[torch.device, torch.Tensor] = {}
        self.batch_counted = torch.zeros(0, 0, dtype=torch.bool)
        self.counted = torch.zeros(0)
        self.finite: torch.Tensor | None = None

    def begin(self, batch: Batch) -> None:
        self.batch_counted = batch.counted
        self.counted = batch.counted.reshape(-1).float()

    def count(self, layer: int, units: torch.Tensor) -> None:
        block = self._block(units)
        counted = self.counted.to(units.device)
        total = self.totals[layer]
        if total is None:
            total = self.totals[layer] = torch.zeros(units.shape[-1], dtype=torch.int64, device=units.device)
        for start in range(0, len(units), len(block)):
            part = units[start : start + len(block)]
            active = torch.gt(part, 0, out=block[: len(part)])
            total += (counted[start : start + len(part)] @ active).long()

    def end(self, hidden: torch.Tensor) -> None:
        # Some families leave NaN in padding, which nothing real looks at.
        finite = (hidden.isfinite().all(-1) | ~self.batch_counted.to(hidden.device)).all()
        self.finite = finite if self.finite is None else self.finite & finite

    def _block(self, units: torch.Tensor) -> torch.Tensor:
        if units.device not in self.buffers:
            positions = max(1, _BLOCK.get(units.device.type, _LARGE_BLOCK) // units.shape[-1])
            self.buffers[units.device] = torch.empty(positions, units.shape[-1], device=units.device)
        return self.buffers[units.device]

    def result(self) -> torch.Tensor:
        """(layer, unit) int64 on CPU; zeros where this process had no batch, and after the last unit of a layer."""
        counts = torch.zeros(self.sites.shape.layers, self.sites.shape.units, dtype=torch.int64)
        for layer, total in enumerate(self.totals):
            if total is not None:
                counts[layer, : len(total)] = total.cpu()
        return counts


@torch.inference_mode()
def count_active(
    sites: ModelSites, batches: Batches, ranks: Ranks | None = None, progress: ProgressCallback | None = None
) -> NDArray[np.int64]:
    """(layer, unit) number of counted tokens on which each unit's activation is above 0.

    The model runs without its language-model head and without a KV cache.

    Args:
        sites: of the model.
        batches: rows of one language; several processes are dealt different ones.
        ranks: those processes; the counts are of all of them, in each.
        progress: called with the number of tokens after each batch.

    Raises:
        CorpusError: if there is nothing to count.
        DidNotHappenError: if a layer was not seen exactly once per forward pass, or the model's states overflow.
    """
    if not sum(map(len, batches.rows)):
        raise CorpusError("no tokens to record")
    ranks = ranks or Ranks()
    counter = _Counter(sites)
    with observing(sites, at_activation=counter.count) as run:
        for batch in batches:
            counter.begin(batch)
            counter.end(run(batch))
            if progress is not None:
                progress(batch.tokens)
    if not all(ranks.gather(counter.finite is None or bool(counter.finite))):
        raise DidNotHappenError(
            "the model's hidden states hold infinities or NaN, so its activations cannot be counted; load it in "
            "bfloat16 or float32"
        )
    # Added up on the device that the processes communicate over.
    counts: NDArray[np.int64] = ranks.add_up(counter.result().to(batches.device)).cpu().numpy()
    return counts


@torch.inference_mode()
def sentence_means(sites: ModelSites, batches: Batches, ranks: Ranks | None = None) -> NDArray[np.float32]:
    """(sentence, layer, unit) float32 mean activation over each row's tokens, in the order of the rows.

    Where layers differ in width, zeros follow the last unit of the narrower ones.
    """
    means_by_row: dict[int, NDArray[np.float32]] = {}
    layers: dict[int, torch.Tensor] = {}
    counted = torch.zeros(0, 0, dtype=torch.bool)

    def average(layer: int, units: torch.Tensor) -> None:
        mask = counted.to(units.device).unsqueeze(-1)
        by_row = torch.where(mask, units.reshape(*counted.shape, -1).float(), 0)
        means = (by_row.sum(1) / mask.sum(1)).cpu()
        layers[layer] = torch.nn.functional.pad(means, (0, sites.shape.units - means.shape[-1]))

    with observing(sites, at_activation=average) as run:
        for batch in batches:
            counted = batch.counted
            run(batch)
            means = torch.stack([layers[layer] for layer in range(sites.shape.layers)], dim=1).numpy()
            means_by_row |= dict(zip(batch.rows.tolist(), means, strict=True))
    return in_order((ranks or Ranks()).gather(means_by_row))


def in_order(parts: Sequence[dict[int, NDArray[Any]]]) -> NDArray[Any]:
    """(row, ...) from what each process has of it."""
    rows = {number: row for part in parts for number, row in part.items()}
    return np.stack([rows[number] for number in range(len(rows))])


@torch.inference_mode()
def tokens_per_second(sites: ModelSites, batches: Batches) -> float:
    """Speed of the recording, from a short warm-up: one batch, a second time where the first took under 2 seconds.

    On CPU one row of it, where a whole batch may take a minute.
    """
    counter = _Counter(sites)
    batch = batches.build(batches.plan[0][:1] if batches.device.type == "cpu" else batches.plan[0])
    seconds = 0.0
    with observing(sites, at_activation=counter.count) as run:
        for _ in range(2):
            start = time.perf_counter()
            counter.begin(batch)
            counter.end(run(batch))
            counter.result()  # waits for the device
            seconds = time.perf_counter() - start
            if seconds > _LONG_WARM_UP:
                break
    return batch.tokens / seconds


def batch_size_that_fits(sites: ModelSites, build: Callable[[int], Batches]) -> int:
    """Rows per forward pass: on an accelerator the largest power of two up to 256 that fits.

    On CPU as many rows as hold 2,048 tokens together: more do not speed it up, once a pass takes longer than its
    overhead, and each pass is a step of the progress that is shown.

    Args:
        sites: of the model.
        build: batches of the longest rows, for a batch size.
    """
    if next(sites.decoder.parameters()).device.type == "cpu":
        longest = max(map(len, build(1).rows))
        return max(1, _TOKENS_ON_CPU // longest)
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    for batch_size in (256, 128, 64, 32, 16, 8, 4, 2):
        try:
            tokens_per_second(sites, build(batch_size))
            return batch_size
        except Exception as error:  # the library knows the texts of every backend's out-of-memory error
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
    return 1


# --- A model and how it is run


class ModelRunner:
    """A model and how it is run over rows.

    Attributes:
        model: loaded when its weights are first needed.
        batch_size: rows per forward pass; None measures one that fits.
        ranks: the processes that share the work.
        log: shown progress, and the times that are kept.
        longest: tokens of the longest row, for a batch size that fits.
        bos: which prefix the model sees before each row (`LazyModel.prefix`).
    """

    def __init__(
        self,
        model: LazyModel,
        batch_size: int | None = 16,
        ranks: Ranks | None = None,
        log: Log | None = None,
        longest: int = CONTEXT,
        bos: Bos = "auto",
    ) -> None:
        self.model, self.batch_size, self.longest, self.bos = model, batch_size, longest, bos
        self.ranks = ranks or Ranks()
        self.log = log or Log(show=False)

    def load(self) -> None:
        """Load the model, and note how long that took."""
        if "model" not in self.model.__dict__:
            with self.log.timed("load model", model=self.model.name) as facts:
                facts["device"] = str(next(self.model.model.parameters()).device)

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Token ids that the model sees before each row, and that are not counted: those that evaluation shows."""
        return self.model.prefix(self.bos)

    @property
    def prefix_texts(self) -> list[str]:
        """The prefix as tokens, for a provenance."""
        return [str(token) for token in self.model.tokenizer.convert_ids_to_tokens(list(self.prefix))]

    def batches(self, rows: TokenRows) -> Batches:
        """This process's part of the plan for some rows."""
        return Batches(rows, self.prefix, self.model.sites, self.fitting_batch_size, self.ranks)

    @cached_property
    def fitting_batch_size(self) -> int:
        """The batch size that was asked for, or one that fits the device of every process."""
        if self.batch_size is not None:
            return self.batch_size
        longest = min(self.longest, self.model.context or self.longest)

        def build(size: int) -> Batches:
            return Batches(TokenRows.of([[0] * longest] * size), self.prefix, self.model.sites, size)

        return min(self.ranks.gather(batch_size_that_fits(self.model.sites, build)))
