"""The proof that an intervention took place: what was counted on the device, read when it is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lm_eval_steering.steering.rows import ForwardRows

_SMALL, _MANY = 2**15, 32  # values of a tensor that waits, and how many such may wait


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


class _Sum:
    """A running sum of numbers of the host and of the device."""

    def __init__(self) -> None:
        self._host = 0
        self._device: dict[torch.device, torch.Tensor] = {}

    def add(self, count: int | torch.Tensor) -> None:
        if isinstance(count, int):
            self._host += count
        else:
            before = self._device.get(count.device)
            self._device[count.device] = count if before is None else before + count

    def total(self) -> int:
        """Reads the device."""
        return self._host + sum(int(part) for part in self._device.values())


class LargestChange:
    """The largest |a' - a| so far, on the device. Small tensors wait for each other, so that decoding costs little."""

    def __init__(self) -> None:
        self._largest: dict[torch.device, torch.Tensor] = {}
        self._waiting: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._size = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count one edit: the chosen units before it, in the precision that it is computed in, and after."""
        size = before.numel()
        if size > _SMALL:
            self._count(before.device, before, after)
            return
        self._waiting.setdefault(before.device, []).append((before, after))
        self._size += size
        if self._size > _SMALL * _MANY:
            self.settle()

    def settle(self) -> None:
        """Count what waits, and let go of it."""
        for device, pairs in self._waiting.items():
            self._count(
                device, *(torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*pairs, strict=True))
            )
        self._waiting.clear()
        self._size = 0

    def _count(self, device: torch.device, before: torch.Tensor, after: torch.Tensor) -> None:
        # In the wide type, where a difference of two halves cannot overflow. What was infinite before is no change of
        # ours: there before - before is not a number, which the maximum leaves out.
        change = after.to(before.dtype).sub(before).add_(before - before).abs_()
        largest = change.nan_to_num_(0.0, math.inf).amax()
        previous = self._largest.get(device)
        self._largest[device] = largest if previous is None else torch.maximum(previous, largest)

    def value(self) -> float:
        """Reads the device."""
        self.settle()
        return max((float(change) for change in self._largest.values()), default=0.0)


class Counters:
    """Running sums over forward passes; sums that the device knows stay there until they are asked for."""

    def __init__(self) -> None:
        self.forwards = 0
        self.largest = LargestChange()
        self._edited: dict[tuple[str, ...], _Sum] = {}
        self._broken, self._seen = _Sum(), _Sum()

    def add(self, rows: ForwardRows, kinds: set[tuple[str, ...]], hidden: torch.Tensor) -> None:
        """Count one forward pass.

        Args:
            rows: its positions.
            kinds: forms of `positions`, of each edit.
            hidden: (row, position, feature) last hidden state.
        """
        self.forwards += 1
        self.largest.settle()
        for kind in kinds:
            self._edited.setdefault(kind, _Sum()).add(rows.count(kind))
        # A sum is finite only where every feature is; in float32, where it cannot overflow in halves.
        broken = ~hidden.detach().sum(-1, dtype=torch.promote_types(hidden.dtype, torch.float32)).isfinite()
        if rows.real is not None and broken.shape == rows.real.shape:
            real = rows.real.to(broken.device)
            self._broken.add((broken & real).sum())
            self._seen.add(real.sum())
        else:
            self._broken.add(broken.sum())
            self._seen.add(broken.numel())

    @property
    def positions(self) -> int:
        """Positions edited; reads the device."""
        return max((edited.total() for edited in self._edited.values()), default=0)

    @property
    def nonfinite(self) -> float:
        """Share of real positions with a hidden state that is not finite; reads the device."""
        seen = self._seen.total()
        return self._broken.total() / seen if seen else 0.0
