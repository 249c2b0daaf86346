"""Statistics of the current activations, and seeded random numbers: one pure function each.

Statistics of scope `token` have one value per position, of scope `sequence` one per row. Both are computed in float32
(float64 models: in float64) from the activations as the hook receives them, before any step of the intervention.
"""

from __future__ import annotations

import math

import torch

_MASK = 0xFFFFFFFF


def statistic(
    name: str, units: torch.Tensor, real: torch.Tensor | None, sequence: bool, chosen: torch.Tensor | None = None
) -> torch.Tensor:
    """A live statistic over all units of a layer.

    Args:
        name: without `live_`: max, mean, median (lower), min, std (unbiased), iqr and pNN (linear), or mad = median
            over the chosen units of |x - median of all units| (Rahmanisa et al. 2025, intervention_dod.py).
        units: (row, position, unit) float32 or float64, unmodified.
        real: (row, position) bool, False for pads; None where every position is real.
        sequence: over all real positions of each row, rather than each position by itself.
        chosen: (unit,) indices, for mad.

    Returns:
        (row, position, 1), or (row, 1, 1) for a sequence. Of a row without real positions it means nothing.
    """
    if not sequence:
        values, count = units, torch.full_like(units[..., :1], units.shape[-1], dtype=torch.float64)
        return _reduced(name, values, None, count, chosen)
    rows, length, width = units.shape
    present = None if real is None else real.repeat_interleave(width, 1).reshape(rows, 1, length * width)
    flat = units.reshape(rows, 1, length * width)
    lengths = torch.full((rows, 1, 1), length, device=units.device) if real is None else real.sum(1).reshape(-1, 1, 1)
    if name == "mad" and chosen is not None:
        # The chosen units of every position, counted from the start of the flattened row.
        offsets = torch.arange(length, device=units.device).unsqueeze(1) * width
        chosen = (offsets + chosen).reshape(-1)
    return _reduced(name, flat, present, lengths.double() * width, chosen)


def _reduced(
    name: str, values: torch.Tensor, present: torch.Tensor | None, count: torch.Tensor, chosen: torch.Tensor | None
) -> torch.Tensor:
    """(..., 1) of (..., value); absent values count for nothing; count is (..., 1) float64."""
    if name == "max":
        return _filled(values, present, -math.inf).amax(-1, keepdim=True)
    if name == "min":
        return _filled(values, present, math.inf).amin(-1, keepdim=True)
    if name in {"mean", "std"}:
        number = count.to(values.dtype)
        mean = _filled(values, present, 0).sum(-1, keepdim=True) / number
        if name == "mean":
            return mean
        squares = _filled((values - mean).square(), present, 0).sum(-1, keepdim=True)
        return (squares / (number - 1)).sqrt()
    # Sorted, because torch.quantile takes at most 16 million values, and none in half precision.
    ordered = _filled(values, present, math.inf).sort(-1).values
    if name == "median":
        return _lower_median(ordered, count)
    if name == "mad" and chosen is not None:
        centre = _lower_median(ordered, count)
        present = None if present is None else present.index_select(-1, chosen)
        distances = _filled((values.index_select(-1, chosen) - centre).abs(), present, math.inf).sort(-1).values
        return _lower_median(distances, count * (chosen.numel() / values.shape[-1]))
    if name == "iqr":
        return _quantile(ordered, count, 0.75) - _quantile(ordered, count, 0.25)
    return _quantile(ordered, count, int(name[1:]) / 100)


def _filled(values: torch.Tensor, present: torch.Tensor | None, absent: float) -> torch.Tensor:
    return values if present is None else values.masked_fill(~present, absent)


def _lower_median(ordered: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return _at(ordered, ((count.round() - 1) / 2).floor())


def _quantile(ordered: torch.Tensor, count: torch.Tensor, share: float) -> torch.Tensor:
    """Linear interpolation between order statistics, as in torch.quantile and numpy."""
    rank = share * (count - 1)
    below, weight = rank.floor(), rank - rank.floor()
    low, high = _at(ordered, below), _at(ordered, rank.ceil())
    return torch.lerp(low, high, weight.to(ordered.dtype))


def _at(ordered: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    return ordered.gather(-1, rank.clamp(min=0).long())


def normal(
    seed: int, stream: tuple[int, ...], units: torch.Tensor, index: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Standard normal numbers that depend on nothing but what is given here: no state, no batch, no order of calls.

    A counter-based generator: the arguments are mixed by the finaliser of MurmurHash3 into two 32-bit numbers, which
    the Box-Muller transform makes one normal number.

    Args:
        seed: of the step.
        stream: numbers of step, site and layer, so that each has numbers of its own.
        units: (unit,) indices of the units.
        index: (row, position) number of each token among the row's real ones.
        tokens: (row, position) token ids, so that different texts get different numbers.

    Returns:
        (row, position, unit) float32.
    """
    key = torch.full_like(index, _mix_number(seed))
    for number in stream:
        key = _mix(key ^ _mix_number(number + 0x9E3779B9))
    key = _mix(_mix(key ^ (index & _MASK)) ^ ((tokens * 2 + 1) & _MASK))
    cell = _mix(key.unsqueeze(-1) ^ _mix(units + 0x85EBCA6B))
    radius = (-2 * torch.log(_open_unit(_mix(cell ^ 0x27220A95)))).sqrt()
    return radius * torch.cos(2 * math.pi * _open_unit(_mix(cell ^ 0x165667B1)))


def _mix(number: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser of MurmurHash3, on int64 that hold 32 bits; products wrap, and their low bits are right."""
    number = number & _MASK
    number = (number ^ (number >> 16)) * 0x85EBCA6B & _MASK
    number = (number ^ (number >> 13)) * 0xC2B2AE35 & _MASK
    return number ^ (number >> 16)


def _mix_number(number: int) -> int:
    number &= _MASK
    number = (number ^ (number >> 16)) * 0x85EBCA6B & _MASK
    number = (number ^ (number >> 13)) * 0xC2B2AE35 & _MASK
    return number ^ (number >> 16)


def _open_unit(bits: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1] of 24 bits, which float32 holds exactly on every device."""
    return ((bits >> 8) + 1).to(torch.float32) / 2**24
