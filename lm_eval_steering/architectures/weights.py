"""Identity of loaded weights: a hash for fingerprints, and a sketch that can be compared across dtypes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from lm_eval_steering.errors import ArchitectureError

SAMPLES = 64  # values of each tensor in the digest
SKETCH = 256  # values in a sketch


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the loaded weights: every tensor's name, shape and dtype, and 64 evenly spaced values of each.

    It is computed from memory, so it covers a revision, an adapter's matrices or a delta, and takes a fraction of a
    second for 70 billion parameters. Of tensors on the meta device (offloaded) only name, shape and dtype count.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = _sample(tensor, SAMPLES)
        digest.update((sample.double() if sample.is_floating_point() else sample).numpy().tobytes())
    return digest.hexdigest()


def weights_sketch(model: nn.Module) -> tuple[float, ...]:
    """256 values from evenly spaced floating-point tensors, which distinguish models of one shape in any dtype.

    Empty if some weights are on the meta device (offloaded): their values are unknown.
    """
    tensors = [tensor for _, tensor in _tensors(model) if tensor.is_floating_point()]
    if any(tensor.device.type == "meta" for tensor in tensors):
        return ()
    indices = np.linspace(0, len(tensors) - 1, SKETCH).round().astype(int)
    # A tensor that is chosen several times gives as many of its values.
    drawn = [_sample(tensors[i], int(count)) for i, count in zip(*np.unique(indices, return_counts=True), strict=True)]
    return tuple(float(f"{value:.4g}") for value in torch.cat([part.float() for part in drawn]).tolist())


def same_weights(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two sketches are of one checkpoint: at most 2 % of the values differ by more than rounding can do."""
    return len(first) == len(second) and difference(first, second)[0] <= 0.02


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """How far two sketches of one length are apart.

    Returns:
        Share of the values that differ by more than rounding to 16 bits can do, and the median relative difference of
        those. A checkpoint and its copy of 4 to 8 bits differ in about half of their values, by a few per cent.
    """
    one, other = np.asarray(first), np.asarray(second)
    size = np.maximum(np.abs(one), np.abs(other))
    # Half a bfloat16 step is 0.4 %; float16 has no numbers below 6e-8, and coarse ones below 6e-5.
    differs = np.abs(one - other) > 0.01 * size + 1e-6
    apart = np.abs(one - other)[differs] / size[differs]
    return float(differs.mean()), float(np.median(apart)) if len(apart) else 0.0


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            yield name, _dequantized(name, value)


def _dequantized(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor; of a subclass with quantised values (torchao's) the dequantised values.

    Raises:
        ArchitectureError: if a subclass cannot be dequantised.
    """
    if type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer):
        return tensor
    try:
        plain = tensor.dequantize()
        if type(plain) is not torch.Tensor:
            raise TypeError(f"dequantize() gave a {type(plain).__name__}")
    except (NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
        raise ArchitectureError(
            f"weights {name!r}: a {type(tensor).__name__}, whose values cannot be read "
            f"({str(error).strip().splitlines()[0]}); load the model without this quantisation"
        ) from error
    return plain


def _sample(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """(value,) evenly spaced values, on CPU; none of a tensor that is empty or on the meta device."""
    if tensor.device.type == "meta" or not tensor.numel():
        return torch.zeros(0)
    flat = tensor.detach().reshape(-1)
    drawn = min(count, flat.numel())
    # The middles of equal stretches, so that a single value is not always the first.
    indices = ((torch.arange(drawn, dtype=torch.float64) + 0.5) * flat.numel() / drawn).long()
    return flat[indices.to(flat.device)].cpu()
