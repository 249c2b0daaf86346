"""Which input positions of a row a step acts on, counted over the row's real tokens.

Forms: `all`, `prompt`, `generated`, `last`, a half-open window `3:10`, and a window of a part, `prompt[-5:]`.
Position 0 is the row's first real token. A window of `generated` counts from the first continuation token; in every
other window a negative bound counts back from the end of the prompt: where a text in the making ends is not known.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
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
        """Which positions are chosen, (row, position) bool; what pads are given as is the caller's to mask.

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


# --- Which positions of a forward pass are real tokens, which of them are prompt, and where each stands in its row

_UNREADABLE = (
    "real tokens cannot be told from padding, because the attention mask has not the form (row, position); pass such a "
    "one, or say it with Steering.rows()"
)


@dataclass
class ForwardRows:
    """The positions of one forward pass, on the device of its input.

    Attributes:
        shape: (rows, positions).
        real: (row, position) bool, False for pads; None where every position is real.
        index: (row, position) int64 place among the row's real tokens; None where it is not known.
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
            found = self._mask(positions)
            self._masks[key] = None if found is None else found.to(device)
        return self._masks[key]

    def _mask(self, positions: str) -> torch.Tensor | None:
        if positions == ALL:
            return self.real
        if self.index is None or self.prompt is None:
            raise InterventionError(f"positions={positions}: {_UNREADABLE}")
        chosen = parse_positions(positions).mask(self.index, self.prompt)
        return chosen if self.real is None else chosen & self.real

    def count(self, kinds: tuple[str, ...]) -> int | torch.Tensor:
        """Number of positions that any of these forms chooses."""
        union: torch.Tensor | None = None
        for kind in kinds:
            found = self._mask(kind)
            if found is None:
                return self.shape[0] * self.shape[1]
            union = found if union is None else union | found
        return 0 if union is None else union.sum()


@dataclass(frozen=True)
class Declared:
    """What a caller knows of its batch.

    Attributes:
        real: (row, position) bool of the first forward pass, False for pads; every later position is real.
        prompt: (row, 1) int64 number of prompt tokens; None where all real tokens of the first pass are prompt.
    """

    real: torch.Tensor
    prompt: torch.Tensor | None


class RowReader:
    """Reads the rows of each forward pass from the decoder's arguments and from what a caller declared."""

    def __init__(self, decoder: nn.Module) -> None:
        names = list(inspect.signature(decoder.forward).parameters.values())
        self._names = [each.name for each in names if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self._declared: Declared | None = None
        self._prompt: torch.Tensor | None = None  # of the last pass without a past

    @contextmanager
    def declaring(self, declared: Declared) -> Iterator[None]:
        """Forward passes inside belong to this batch."""
        before, self._declared = self._declared, declared
        try:
            yield
        finally:
            self._declared, self._prompt = before, None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], places: bool, pads: bool) -> ForwardRows:
        """The rows of the forward pass that begins.

        Args:
            args: positional ones of the decoder.
            kwargs: of the decoder.
            places: whether it matters where each token stands and what is prompt.
            pads: whether a pad that goes unseen would change a score.

        Raises:
            InterventionError: if the batch is not the one declared, or its pads matter and cannot be told.
        """
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tokens, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        source = tokens if tokens is not None else embeddings
        if source is None:
            raise InterventionError("the decoder was given neither input_ids nor inputs_embeds")
        rows, length = source.shape[:2]
        past = _past(given.get("past_key_values"))
        whole = self._whole(given.get("attention_mask"), rows, past + length, source.device)
        real = None
        if whole is not None:
            real = whole[:, past:]
            real = None if bool(real.all()) else real
        found = ForwardRows((rows, length), real, tokens=tokens)
        known = whole is not None or given.get("attention_mask") is None
        if pads and not known:
            raise InterventionError(f"scope=sequence: {_UNREADABLE}")
        if places and known:
            self._place(found, whole, past, source.device)
        return found

    def _whole(self, mask: Any, rows: int, length: int, device: torch.device) -> torch.Tensor | None:
        """(row, past and present position) bool; None where no mask tells, or none is needed."""
        if self._declared is not None:
            real = self._declared.real.to(device)
            if rows % real.shape[0] or real.shape[1] > length:
                raise InterventionError(
                    f"a forward pass of {rows} rows and {length} positions in a batch declared as "
                    f"{real.shape[0]} by {real.shape[1]}"
                )
            real = real.repeat_interleave(rows // real.shape[0], 0)  # generation gives each beam a row
            return torch.cat([real, real.new_ones(rows, length - real.shape[1])], 1)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= length:
            return mask[:, :length] != 0
        return None

    def _place(self, found: ForwardRows, whole: torch.Tensor | None, past: int, device: torch.device) -> None:
        rows, length = found.shape
        if whole is None:
            index = torch.arange(past, past + length, device=device).expand(rows, length)
        else:
            index = whole.long().cumsum(1)[:, past:] - 1
        declared = self._declared.prompt if self._declared is not None else None
        if declared is not None:
            prompt = declared.to(device).repeat_interleave(rows // declared.shape[0], 0)
        elif past == 0:
            prompt = index[:, -1:] + 1  # the cumulative sum ends at the number of real tokens
        elif self._prompt is not None and self._prompt.shape[0] == rows:
            prompt = self._prompt.to(device)
        else:
            raise InterventionError(
                "a forward pass with a cache whose prompt was not seen: attach the intervention before the prompt is "
                "read, or say the prompt's length with Steering.rows()"
            )
        self._prompt = prompt
        found.index, found.prompt = index, prompt


def _past(cache: Any) -> int:
    """Number of positions that the cache holds."""
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else 0
