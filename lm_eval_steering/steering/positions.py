"""Which input positions of a row a step acts on, counted over the row's real tokens.

Forms: `all`, `prompt`, `generated`, `last`, a half-open window `3:10`, and a window of a part, `prompt[-5:]`.
Position 0 is the row's first real token. A window of `generated` counts from the first continuation token; in every
other window a negative bound counts back from the end of the prompt: where a text in the making ends is not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

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
