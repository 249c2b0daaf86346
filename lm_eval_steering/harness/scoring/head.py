"""Logits only where they are needed, and log-probabilities of the targets without a softmax over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lm_eval_steering.errors import DidNotHappenError

# Logits of a block in which log-sum-exp is taken: 2 MB of them stay in a processor's cache.
BLOCK = {"cpu": 2**19}
BLOCK_ELSEWHERE = 2**24


@contextmanager
def head_at(head: nn.Module, nodes: torch.Tensor) -> Iterator[None]:
    """Inside, the head sees the hidden states of some places alone, as one row.

    The model's own forward pass goes on from there, with whatever it does to logits (scaling, soft caps).

    Args:
        head: the module that makes logits of hidden states (row, position, feature).
        nodes: (2, node) row and position of each.

    Raises:
        DidNotHappenError: if the head did not run exactly once, so that logits are not of those places.
    """
    calls = 0

    def gather(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        row, position = nodes.to(args[0].device)
        return (args[0][row, position].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(torch.compiler.disable(gather))
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise DidNotHappenError(f"the head ran {calls} times in a forward pass, expected once")


@contextmanager
def with_inputs(model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Inside, the model's forward passes get these arguments too."""

    def add(_module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, given | inputs

    handle = model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def log_probabilities(
    logits: torch.Tensor, place: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and whether it is the most likely token.

    Args:
        logits: (node, vocabulary).
        place: (target,) the node that predicts it.
        targets: (target,) token ids.

    Returns:
        (target,) float32 (float64 for logits in float64), by gather and log-sum-exp in that precision; and (target,)
        bool: of equally likely tokens the first counts, as in argmax.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, BLOCK.get(logits.device.type, BLOCK_ELSEWHERE) // logits.shape[1])
    total = torch.empty(len(logits), dtype=wide, device=logits.device)
    peak = torch.empty_like(total)
    for start in range(0, len(logits), size):
        block = logits[start : start + size].to(wide)
        top = block.amax(-1)
        peak[start : start + size] = top
        # PyTorch's log-softmax is one pass, its log-sum-exp is several. At the peak no logit is -inf.
        total[start : start + size] = top - torch.log_softmax(block, -1).amax(-1)
    own = logits[place, targets].to(wide)
    greedy = own == peak[place]
    # Ties are rare, and argmax is slow: it is asked only where the target is a maximum.
    first = logits[place[greedy]].argmax(-1)
    greedy[greedy.clone()] = first == targets[greedy]
    return own - total[place], greedy
