"""The identity of a score: a hash over everything that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

SAMPLES = 64  # values read from each tensor


def model_digest(model: nn.Module) -> str:
    """SHA-256 over the loaded weights: every tensor's name, shape and dtype, and 64 evenly spaced values of each.

    It is taken from memory, so a revision, an adapter or a delta is part of it whatever its name, and a model of 70
    billion parameters costs a fraction of a second. Tensors on the meta device (offloaded) count by name and shape.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
            sample = flat[places.to(flat.device)]
            values = sample.double() if sample.is_floating_point() else sample.long()
            digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 over canonical JSON of the given parts."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
