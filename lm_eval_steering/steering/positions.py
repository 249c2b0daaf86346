"""Which input positions of a row a step acts on, counted over the row's real tokens.

Forms: `all`, `prompt`, `generated`, `last`, a half-open window `3:10`, and a window of a part, `prompt[-5:]`.
Position 0 is the row's first real token. A window of `generated` counts from the first continuation token; in every
other window a negative bound counts back from the end of the prompt: where a text in the making ends is not known.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from lm_eval_steering.errors import InterventionError

ALL = "all"
FORMS = "all, prompt, generated, last, a window such as 3:10, or a window of a part such as prompt[-5:]"
_PARTS = ("all", "prompt", "generated")
_FORM = re.compile(r"(?:(prompt|generated|all)\[)?(-?\d*):(-?\d*)(\])?")


@dataclass(frozen=True)
class Positions:
    """A parsed form.

    Attributes:
        part: `all`, `prompt` or `generated`.
        start: first position, None for the part's first one.
        stop: one past the last position, None for the part's end.
    """

    part: str
    start: int | None = None
    stop: int | None = None

    def mask(self, index: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Which positions are chosen, (row, position) bool; pads are the caller's to mask.

        Args:
            index: (row, position) number of each token among the row's real ones, from 0.
            prompt: (row, 1) number of prompt tokens of each row.
        """
        chosen = torch.ones_like(index, dtype=torch.bool)
        if self.part != "all":
            chosen = index < prompt if self.part == "prompt" else index >= prompt
        if self.start is not None:
            chosen = chosen & (index >= self._bound(self.start, prompt))
        if self.stop is not None:
            chosen = chosen & (index < self._bound(self.stop, prompt))
        return chosen

    def _bound(self, bound: int, prompt: torch.Tensor) -> torch.Tensor:
        """(row, 1) a bound as a number of real tokens."""
        if self.part == "generated" or bound < 0:
            return prompt + bound
        return torch.full_like(prompt, bound)


@cache
def parse_positions(text: str) -> Positions:
    """Read a form.

    Raises:
        ValueError: one line that says what was expected.
    """
    if text in _PARTS:
        return Positions(text)
    if text == "last":
        return Positions("prompt", -1)
    form = _FORM.fullmatch(text)
    if not form or bool(form[1]) != bool(form[4]) or "-" in (form[2], form[3]):
        raise ValueError(f"positions={text!r}: expected {FORMS}")
    start, stop = (int(bound) if bound else None for bound in form.group(2, 3))
    part = form[1] or "all"
    if part == "generated" and min(start or 0, stop or 0) < 0:
        raise ValueError(f"positions={text!r}: the end of what is generated is not known, so its bounds count from 0")
    if start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop:
        raise ValueError(
            f"positions={text!r}: an empty window; it goes from its first position up to, not with, the second"
        )
    return Positions(part, start, stop)


# --- The rows of a forward pass: real tokens, their index in the row, and how many of them are prompt

_UNREADABLE = (
    "real tokens cannot be told from padding, because the attention mask has not the form (row, position); pass such a "
    "mask, or give the rows with Steering.rows()"
)
_NO_PROMPT = (
    "a forward pass with a cache whose prompt is not known; generate with the model's generate(), or give the prompt's "
    "length with Steering.rows()"
)


@dataclass
class ForwardRows:
    """The positions of one forward pass, on the device of its input.

    Attributes:
        shape: (rows, positions).
        real: (row, position) bool, False for pads; None where every position is real.
        index: (row, position) int64 number of each token among the row's real ones; None where it is not known.
        prompt: (row, 1) int64 number of prompt tokens; None where it is not known.
        tokens: (row, position) token ids; None where the model was given embeddings.
    """

    shape: tuple[int, int]
    real: torch.Tensor | None = None
    index: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    _masks: dict[tuple[str, torch.device], torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def all_prompt(cls, units: torch.Tensor) -> ForwardRows:
        """Rows of a layer that runs by itself, from its units (row, position, unit) or (position, unit)."""
        rows, length = (1, units.shape[0]) if units.dim() == 2 else units.shape[:2]
        index = torch.arange(length, device=units.device).expand(rows, length)
        return cls((rows, length), None, index, torch.full((rows, 1), length, device=units.device))

    def mask(self, positions: str, device: torch.device) -> torch.Tensor | None:
        """(row, position) bool where `positions` chooses a real token; None where it chooses every position."""
        key = (positions, device)
        if key not in self._masks:
            mask = self._mask(positions)
            self._masks[key] = None if mask is None else mask.to(device)
        return self._masks[key]

    def _mask(self, positions: str) -> torch.Tensor | None:
        if positions == ALL:
            return self.real
        if self.index is None or self.prompt is None:
            raise InterventionError(f"positions={positions}: {_UNREADABLE if self.index is None else _NO_PROMPT}")
        chosen = parse_positions(positions).mask(self.index, self.prompt)
        return chosen if self.real is None else chosen & self.real

    def count(self, kinds: tuple[str, ...]) -> int | torch.Tensor:
        """Number of positions that any of these forms chooses."""
        union: torch.Tensor | None = None
        for kind in kinds:
            mask = self._mask(kind)
            if mask is None:
                return self.shape[0] * self.shape[1]
            union = mask if union is None else union | mask
        return 0 if union is None else union.sum()


@dataclass(frozen=True)
class Declared:
    """What a caller says of its batch.

    Attributes:
        real: (row, position) bool of the first forward pass, False for pads; every later position is real.
        prompt: (row, 1) int64 number of prompt tokens; None where all real tokens of `real` are prompt.
    """

    real: torch.Tensor
    prompt: torch.Tensor | None


@dataclass(frozen=True)
class GenerationPrompt:
    """The prompt of a call of `generate`, whatever its forward passes read at once: a chunk of it, or more.

    Attributes:
        columns: positions of the prompt, pads included.
        real: (row, column) bool, False for pads; None where the call had no mask.
    """

    columns: int
    real: torch.Tensor | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GenerationPrompt:
        """From the arguments of `generate` of transformers.

        Raises:
            InterventionError: if the arguments do not tell where the prompt begins.
        """
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return cls(mask.shape[1], mask != 0)
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        source = kwargs.get("inputs_embeds") if inputs is None else inputs
        columns = 1 if source is None else int(source.shape[1])  # without inputs a text begins with BOS
        if columns <= _past(kwargs):
            raise InterventionError("generate() with a cache: pass the attention_mask of the whole prompt too")
        return cls(columns, None)

    def tokens(self, whole: torch.Tensor | None, rows: int, length: int, device: torch.device) -> torch.Tensor:
        """(row, 1) number of prompt tokens.

        Args:
            whole: (row, past and present position) bool, False for pads; None where every position is real.
            rows: of the forward pass.
            length: past and present positions.
            device: of the result.
        """
        if self.real is not None:
            return _for_beams(self.real.to(device), rows).sum(1, keepdim=True)
        seen = min(self.columns, length)
        pads = 0 if whole is None else (~whole[:, :seen]).sum(1, keepdim=True)  # pads of a prompt stand on the left
        return torch.full((rows, 1), self.columns, device=device) - pads


class RowReader:
    """Reads the rows of each forward pass from the decoder's arguments and from what a caller declared."""

    def __init__(self, decoder: nn.Module) -> None:
        names = list(inspect.signature(decoder.forward).parameters.values())
        self._names = [each.name for each in names if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self._declared: Declared | None = None
        self._generating: GenerationPrompt | None = None

    @contextmanager
    def declaring(self, declared: Declared) -> Iterator[None]:
        """Forward passes inside belong to this batch."""
        before, self._declared = self._declared, declared
        try:
            yield
        finally:
            self._declared = before

    @contextmanager
    def generating(self, prompt: GenerationPrompt) -> Iterator[None]:
        """Forward passes inside generate after this prompt."""
        before, self._generating = self._generating, prompt
        try:
            yield
        finally:
            self._generating = before

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], needs_index: bool, needs_pads: bool) -> ForwardRows:
        """The rows of the forward pass that begins.

        Args:
            args: positional ones of the decoder.
            kwargs: of the decoder.
            needs_index: whether it matters where each token stands and what is prompt.
            needs_pads: whether a pad that goes unseen would change a score.

        Raises:
            InterventionError: if the batch is not the one declared, or its pads matter and cannot be told.
        """
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tokens, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        source = tokens if tokens is not None else embeddings
        if source is None:
            raise InterventionError("the decoder was given neither input_ids nor inputs_embeds")
        rows, length = source.shape[:2]
        past = _past(given)
        whole = self._whole(given.get("attention_mask"), rows, past + length, source.device)
        real = None if whole is None or bool(whole[:, past:].all()) else whole[:, past:]
        read = ForwardRows((rows, length), real, tokens=tokens)
        readable = whole is not None or given.get("attention_mask") is None
        if needs_pads and not readable:
            raise InterventionError(f"scope=sequence: {_UNREADABLE}")
        if needs_index and readable:
            read.index, read.prompt = self._index(whole, rows, past, past + length, source.device)
        return read

    def _whole(self, mask: Any, rows: int, length: int, device: torch.device) -> torch.Tensor | None:
        """(row, past and present position) bool; None where no mask tells, or none is needed."""
        if self._declared is not None:
            real = self._declared.real.to(device)
            if rows % real.shape[0] or real.shape[1] > length:
                raise InterventionError(
                    f"a forward pass of {rows} rows and {length} positions in a batch declared as "
                    f"{real.shape[0]} by {real.shape[1]}"
                )
            return _with_later_positions(_for_beams(real, rows), length)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= length:
            return mask[:, :length] != 0
        if self._generating is not None and self._generating.real is not None:
            return _with_later_positions(_for_beams(self._generating.real.to(device), rows), length)
        return None

    def _index(
        self, whole: torch.Tensor | None, rows: int, past: int, length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(row, position) index among the row's real tokens, and (row, 1) number of prompt tokens, None if not known.

        A forward pass without a cache is all prompt, unless the caller or `generate` says otherwise: it scores a text.
        One with a cache may go on with a prompt as well as with an answer.
        """
        if whole is None:
            index = torch.arange(past, length, device=device).expand(rows, length - past)
        else:
            index = whole.long().cumsum(1)[:, past:] - 1
        if self._declared is not None:
            prompt = self._declared.prompt
            prompt = self._declared.real.long().sum(1, keepdim=True) if prompt is None else prompt
            return index, _for_beams(prompt.to(device), rows)
        if self._generating is not None:
            return index, self._generating.tokens(whole, rows, length, device)
        return index, index[:, -1:] + 1 if past == 0 else None


def _for_beams(per_row: torch.Tensor, rows: int) -> torch.Tensor:
    """(row, ...) repeated where generation gives each beam a row."""
    if rows % per_row.shape[0]:
        raise InterventionError(f"a forward pass of {rows} rows for a prompt of {per_row.shape[0]}")
    return per_row.repeat_interleave(rows // per_row.shape[0], 0)


def _with_later_positions(real: torch.Tensor, length: int) -> torch.Tensor:
    """(row, position) bool cut or filled up to a length; every later position is real."""
    return torch.cat([real[:, :length], real.new_ones(len(real), max(0, length - real.shape[1]))], 1)


def _past(arguments: Mapping[str, Any]) -> int:
    """Number of positions in the cache that is among some arguments; 0 without one.

    Recognised by its method: the argument is `past_key_values` before transformers 5.24 and `cache` from then on.
    """
    return next((int(each.get_seq_length()) for each in arguments.values() if hasattr(each, "get_seq_length")), 0)
