"""How a model is run over rows: its batch size, the processes that share the work, and the log of it."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.architectures import ModelSites, check_width
from lm_eval_steering.errors import DidNotHappenError, SteeringError

# --- The processes of one job: whole batches are dealt to them in turn, and what they count is added up

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
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), None
    from accelerate import PartialState

    # gloo on processors. The first process may read text for hours while the others wait.
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    state = PartialState(cpu=cpu, timeout=timedelta(days=2))
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise SteeringError(
            f"{os.environ['WORLD_SIZE']} processes were launched, and {state.num_processes} found each other: all of "
            "them would do the whole work"
        )
    return Ranks(state.process_index, state.num_processes), state.device


# --- Rows of tokens: documents cut to what a model reads

TokenRow = NDArray[np.int32]  # (token,) ids, special tokens left out

_DOCUMENTS = 256  # tokenised at a time: a fast tokenizer spreads them over the cores


@dataclass(frozen=True)
class TokenRows:
    """Rows of one language.

    Attributes:
        ids: (token,) int32, all rows one after another, special tokens left out.
        lengths: (row,) int32, tokens of each row.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | TokenRow]) -> TokenRows:
        """From lists of token ids."""
        parts = [np.asarray(row, dtype=np.int32) for row in rows]
        lengths = np.array([len(part) for part in parts], dtype=np.int32)
        return cls(np.concatenate([np.zeros(0, dtype=np.int32), *parts]), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[TokenRow]:
        return iter(np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self) else ())

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return len(self.ids)

    def sha256(self) -> str:
        """Hash over the ids and where rows end: the text that the model really sees."""
        digest = hashlib.sha256(self.lengths.astype("<i4").tobytes())
        digest.update(self.ids.astype("<i4").tobytes())
        return digest.hexdigest()


def packed_rows(documents: Iterable[str], tokenizer: Any, length: int, budget: int | None = None) -> TokenRows:
    """Documents tokenised without special tokens, concatenated, and cut into rows of `length` tokens.

    Args:
        documents: text of one language.
        tokenizer: of transformers.
        length: tokens a row; the last row may be shorter.
        budget: stop after this many tokens.
    """
    parts: list[TokenRow] = [np.zeros(0, dtype=np.int32)]
    total = 0
    for tokens in tokenised(documents, tokenizer):
        parts.append(tokens)
        total += len(tokens)
        if budget is not None and total >= budget:
            break
    ids = np.concatenate(parts)[:budget]
    starts = np.arange(0, len(ids), length)
    return TokenRows(ids, np.minimum(length, len(ids) - starts).astype(np.int32))


def sentence_rows(
    sentences: Iterable[str],
    tokenizer: Any,
    length: int,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    budget: int | None = None,
) -> TokenRows:
    """One row a sentence, cut at `length` tokens; sentences under `at_least` tokens are left out.

    Args:
        sentences: text of one language.
        tokenizer: of transformers.
        length: tokens a row at most.
        at_least: tokens that a sentence must have.
        at_most: number of rows at which to stop.
        budget: number of tokens at which to stop; the last row is cut to it.
    """
    rows: list[TokenRow] = []
    left = budget
    for tokens in tokenised(sentences, tokenizer):
        if (at_most is not None and len(rows) >= at_most) or (left is not None and left <= 0):
            break
        row = tokens[:length][:left]
        if len(row) >= at_least:
            rows.append(row)
            left = None if left is None else left - len(row)
    return TokenRows.of(rows)


def tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[TokenRow]:
    """Token ids of each text, without special tokens: those that a text spells out are text, and are not counted."""
    stream = iter(texts)
    special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int32)
    while chunk := list(islice(stream, _DOCUMENTS)):
        # Not `verbose`: a document longer than the model reads is cut into rows by us.
        for ids in tokenizer(chunk, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]:
            row = np.asarray(ids, dtype=np.int32)
            yield row[~np.isin(row, special)]


def sentences_of(documents: Iterable[str]) -> Iterator[str]:
    """Documents split into their lines, without empty ones."""
    for document in documents:
        yield from (line.strip() for line in document.split("\n") if line.strip())


# --- Running text through a model's decoder and looking at its units: the part that recording and calibration share

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
        rows: TokenRows,
        tokenizer: Any,
        sites: ModelSites,
        batch_size: int,
        ranks: Ranks | None = None,
        side: Side = "right",
    ) -> None:
        self.rows: list[TokenRow] = list(rows)
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


def bos_of(tokenizer: Any) -> TokenRow:
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
