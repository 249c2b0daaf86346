"""Our way of scoring against the model's plain forward pass, on a few requests of the run itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lm_eval_steering.harness.scoring.tree import Entry, Row

# Requests that are scored twice for it, and tokens after which no further one is.
SAMPLE, TOKENS = 4, 512
# By how much a token's log-probability may differ, in nats, where the softmax rounds more than the logits.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# In units of the last place of the largest logit, for the sum over tokens: what rounding the logits alone can do. In
# bfloat16 a right way of scoring the demo model stays below 1 % of it, and wrong position ids exceed it.
_ROUNDINGS = 4


def sample_of(rows: Iterable[Row]) -> list[int]:
    """Numbers of a few requests: short ones, on different branches where there are such."""
    numbers: list[int] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (not row.branches, len(row.tokens))):
        if numbers and (len(numbers) >= SAMPLE or tokens + len(row.tokens) > TOKENS):
            break
        numbers += _spread(row, SAMPLE - len(numbers))
        tokens += len(row.tokens)
    return numbers


def _spread(row: Row, number: int) -> list[int]:
    """Requests of a row: those from which most of it is hidden, and those that are its first branch."""

    def hidden_and_depth(scored: tuple[int, list[int], tuple[int, ...]]) -> tuple[int, int]:
        last = scored[1][-1]
        return row.depths[last] - last, row.depths[last]

    ordered = [each[0] for each in sorted(row.scored, key=hidden_and_depth)]
    half = number // 2
    return ordered if len(ordered) <= number else ordered[: number - half] + ordered[len(ordered) - half :]


def difference(lm: Any, entries: Sequence[Entry], found: Mapping[int, tuple[float, bool]]) -> str:
    """What differs from plain forward passes over single rows, in a sentence; empty where nothing does.

    Args:
        lm: the `SteeredHFLM`.
        entries: the requests.
        found: request number -> our (summed log-probability, greedy match).
    """
    dtype = lm.mixed_precision_dtype or lm.model.dtype
    for entry in entries:
        logits = lm._model_call(torch.tensor([entry.tokens], device=lm.device))[0, -len(entry.targets) :]
        rounding = _ROUNDINGS * torch.finfo(dtype).eps * float(logits.abs().max()) * len(entry.targets) ** 0.5
        logits = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        own = logits.gather(1, torch.tensor(entry.targets, device=logits.device).unsqueeze(1))
        expected, ours = float(own.sum()), found[entry.number][0]
        allowed = max(rounding, _TOLERANCE.get(dtype, 0.0) * max(len(entry.targets), abs(expected)))
        same = math.isnan(expected) and math.isnan(ours)
        if not same and not abs(expected - ours) <= allowed:
            return f"it gave {ours:.6g} where the plain forward pass gives {expected:.6g}"
    return ""
