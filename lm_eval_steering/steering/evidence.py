"""The proof that an intervention took place: what was counted on the device, read when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lm_eval_steering.steering.rows import ForwardRows


@dataclass(frozen=True)
class Evidence:
    """What happened since the counters were last reset.

    Attributes:
        forwards: forward passes of the decoder while the intervention was on.
        modules: modules with a hook.
        fired: calls of those hooks.
        positions: positions that were edited, summed over forwards; pads that the caller marked are not among them.
        neurons: neurons edited at each position.
        largest_change: largest |a' - a| over finite a, in units of the activation; infinite where a' overflowed.
        nonfinite: share of real positions whose last hidden state, which the logits are made of, was not finite.
        finite: whether there was none.
    """

    forwards: int
    modules: int
    fired: int
    positions: int
    neurons: int
    largest_change: float
    nonfinite: float
    finite: bool


class Counters:
    """Running sums over forward passes; sums that the device knows stay there."""

    def __init__(self) -> None:
        self.forwards = 0
        self._edited: dict[tuple[str, ...], list[int | torch.Tensor]] = {}
        self._broken: dict[torch.device, torch.Tensor] = {}
        self._seen: list[int | torch.Tensor] = [0]

    def add(self, rows: ForwardRows, kinds: set[tuple[str, ...]], hidden: torch.Tensor) -> None:
        """Count one forward pass.

        Args:
            rows: its positions.
            kinds: forms of `positions`, of each edit.
            hidden: (row, position, feature) last hidden state.
        """
        self.forwards += 1
        for kind in kinds:
            _accumulate(self._edited.setdefault(kind, [0]), rows.count(kind))
        # A sum is finite only where every feature is; in float32, where halves cannot overflow it.
        broken = ~hidden.detach().sum(-1, dtype=torch.promote_types(hidden.dtype, torch.float32)).isfinite()
        if rows.real is not None and broken.shape == rows.real.shape:
            real = rows.real.to(broken.device)
            broken, seen = broken & real, real.sum()
            _accumulate(self._seen, seen)
        else:
            _accumulate(self._seen, broken.numel())
        total = broken.sum()
        before = self._broken.get(total.device)
        self._broken[total.device] = total if before is None else before + total

    @property
    def positions(self) -> int:
        """Positions edited; reads the device."""
        return max((_total(parts) for parts in self._edited.values()), default=0)

    @property
    def nonfinite(self) -> float:
        """Share of real positions with a hidden state that is not finite; reads the device."""
        seen = _total(self._seen)
        return sum(int(count) for count in self._broken.values()) / seen if seen else 0.0


def _accumulate(parts: list[int | torch.Tensor], count: int | torch.Tensor) -> None:
    """Add to a sum of numbers of the host (the first part) and of the device (the second)."""
    if isinstance(count, int):
        parts[0] += count
    elif len(parts) == 1:
        parts.append(count)
    else:
        parts[1] = parts[1] + count.to(parts[1].device) if isinstance(parts[1], torch.Tensor) else count


def _total(parts: list[int | torch.Tensor]) -> int:
    return sum(int(part) for part in parts)
