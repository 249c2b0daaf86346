"""A batch of rows as tensors, and the attention mask under which the branches of a row do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from lm_eval_steering.harness.batches import Rows
from lm_eval_steering.harness.scoring.tree import Row


class Masks(Enum):
    """Which attention masks a family's layers take."""

    FULL = "full"  # one mask; every layer sees all that precedes
    WINDOW = "window"  # one mask; every layer sees the config's sliding window, if it has one
    LAYERS = "layers"  # a mask for each kind of layer in the config


@dataclass(frozen=True)
class Packed:
    """One forward pass.

    Attributes:
        tokens: (row, position) token ids, padded on the right.
        rows: what the intervention is told of them.
        inputs: attention masks and position ids, if any row branches.
        nodes: (2, node) row and position of each distinct place at which logits are needed.
        place: (target,) index into `nodes`.
        targets: (target,) token ids.
        requests: (number, number of targets), in the order of `targets`.
    """

    tokens: torch.Tensor
    rows: Rows
    inputs: dict[str, Any]
    nodes: torch.Tensor
    place: torch.Tensor
    targets: torch.Tensor
    requests: tuple[tuple[int, int], ...]


def pack(rows: Sequence[Row], masks: Masks, config: Any, dtype: torch.dtype, device: torch.device) -> Packed:
    """Tensors of a batch.

    Args:
        rows: of `batches.batches`.
        masks: of the model's family.
        config: of the model, for its sliding window.
        dtype: of the masks, which are added to attention scores; bool where they choose.
        device: of the model.
    """
    width = max(len(row.tokens) for row in rows)
    tokens = _padded([row.tokens for row in rows], width)
    real = torch.arange(width) < torch.tensor([[len(row.tokens)] for row in rows])
    inputs: dict[str, Any] = {}
    if any(row.branches for row in rows):
        depths = _padded([row.depths for row in rows], width).to(device)
        ends = _padded([row.ends for row in rows], width).to(device)
        inputs = {"position_ids": depths, "attention_mask": attention(depths, ends, masks, config, dtype)}
    places: dict[tuple[int, int], int] = {}
    place: list[int] = []
    targets: list[int] = []
    requests: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        for request, nodes, wanted in row.scored:
            place += [places.setdefault((number, node), len(places)) for node in nodes]
            targets += wanted
            requests.append((request, len(wanted)))
    return Packed(
        tokens.to(device),
        Rows(real, torch.tensor([row.prompt for row in rows])),
        inputs,
        torch.tensor(list(places), device=device).T,
        torch.tensor(place, device=device),
        torch.tensor(targets, device=device),
        tuple(requests),
    )


def attention(
    depths: torch.Tensor, ends: torch.Tensor, masks: Masks, config: Any, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """(row, 1, query, key) masks of a family.

    Args:
        depths: (row, node) place of each token in its request.
        ends: (row, node) one past the last node below each; 0 for pads.
        masks: the kind.
        config: of the model.
        dtype: see `pack`.
    """
    node = torch.arange(depths.shape[1], device=depths.device)
    query, key = node[:, None], node[None, :]
    # A pad sees itself, so that its softmax is of something.
    full = ((key <= query) & (query < ends[:, None, :])) | (key == query)
    window = getattr(config, "sliding_window", None)
    if masks is Masks.FULL or (masks is Masks.WINDOW and window is None):
        return _as(full, dtype)
    near = full if window is None else full & (depths[:, :, None] - depths[:, None, :] < window)
    if masks is Masks.WINDOW:
        return _as(near, dtype)
    return {"full_attention": _as(full, dtype), "sliding_attention": _as(near, dtype)}


def _as(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    seen = seen[:, None]
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _padded(lists: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    return torch.tensor([[*each, *[0] * (width - len(each))] for each in lists])
