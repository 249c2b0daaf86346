"""A scaling as a LoRA on the last linear layer of each MLP: A picks the chosen units, B holds their columns.

The layer adds `lora_alpha / r * B A p`. With one factor for all units B holds the columns W[:, i] themselves and the
factor is in lora_alpha = r * (factor - 1) alone, so that adapters of several factors share their weights. Every layer
has the same rank r, padded with zeros, since vLLM has one rank for all layers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file

from lm_eval_steering.architectures import model_type_of
from lm_eval_steering.errors import InterventionError
from lm_eval_steering.export.layer_maps import LayerMap, uniform_scale
from lm_eval_steering.export.layouts import exported_family, tensor_location
from lm_eval_steering.export.source import CheckpointSource

LARGEST_RANK = 512  # the largest max_lora_rank in vllm/config/lora.py
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Of these peft 0.21 converts an adapter's target modules to those of fused experts, dense checkpoints included.
PEFT_CONVERTS = {"deepseek_v2", "deepseek_v3", "qwen3_next"}


@dataclass(frozen=True)
class Adapter:
    """An adapter to write.

    Attributes:
        source: the model's checkpoint.
        maps: layer -> the map of its units, scalings only.
        rank: of every layer.
        scale: the factor of all units; None where factors differ.
    """

    source: CheckpointSource
    maps: Mapping[int, LayerMap]
    rank: int
    scale: float | None

    @property
    def alpha(self) -> float:
        """`lora_alpha` of this adapter."""
        return self.rank * (self.scale - 1) if self.scale is not None else float(self.rank)


def plan_adapter(source: CheckpointSource, maps: dict[int, LayerMap], largest_rank: int) -> Adapter:
    """The adapter of some maps; weights are not read.

    Raises:
        InterventionError: if a step adds to a unit, there is nothing to scale, a layer needs too high a rank, or
            peft cannot load an adapter of the family.
    """
    family = model_type_of(source.lazy.config)
    if family in PEFT_CONVERTS:
        raise InterventionError(
            f"peft renames the modules of {family} as it does for its models with experts, and then finds none of this "
            "adapter's; export it --as checkpoint"
        )
    if not maps:
        raise InterventionError("no neuron is edited, so there is nothing to write into an adapter")
    if any(not each.scales_only for each in maps.values()):
        raise InterventionError(
            "a LoRA can scale units and not add to them: add, and set to a value other than 0, need a bias; export it "
            "--as checkpoint"
        )
    above = {layer: len(each.units) for layer, each in maps.items() if len(each.units) > largest_rank}
    if above:
        listed = ", ".join(f"layer {layer} needs {count}" for layer, count in sorted(above.items()))
        raise InterventionError(
            f"a LoRA's rank is the number of a layer's units, at most {largest_rank} (vLLM's limit is "
            f"{LARGEST_RANK}): {listed}; export it --as checkpoint, or raise --max-rank for peft alone"
        )
    rank = max(len(each.units) for each in maps.values())
    return Adapter(source, maps, rank, uniform_scale(maps))


def write_weights(adapter: Adapter, path: Path, dtype: torch.dtype) -> None:
    """Write A (rank, unit) and B (hidden, rank) of each layer."""
    axis = 0 if exported_family(adapter.source.lazy.config).transposed else 1
    written: dict[str, torch.Tensor] = {}
    with adapter.source.reading() as tensors:
        for layer, module in _modules(adapter).items():
            weight = tensors[adapter.source.names[f"{module}.weight"]]
            written |= _matrices(adapter, adapter.maps[layer], module, weight, axis, dtype)
        save_file(written, path, metadata={"format": "pt"})


def _matrices(
    adapter: Adapter, layer_map: LayerMap, module: str, weight: torch.Tensor, axis: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    units = torch.from_numpy(layer_map.units)
    columns = weight.index_select(axis, units).to(dtype)
    columns = columns.T if axis == 0 else columns  # (hidden, unit)
    if adapter.scale is None:
        columns = (columns.double() * torch.from_numpy(layer_map.product - 1)).to(dtype)
    picks = torch.zeros(adapter.rank, weight.shape[axis], dtype=dtype)
    picks[torch.arange(len(units)), units] = 1
    filled = torch.zeros(columns.shape[0], adapter.rank, dtype=dtype)
    filled[:, : len(units)] = columns
    return {
        f"base_model.model.{module}.lora_A.weight": picks,
        f"base_model.model.{module}.lora_B.weight": filled,
    }


def _modules(adapter: Adapter) -> dict[int, str]:
    """Layer -> name of its last linear layer, of the layers that are edited."""
    family = exported_family(adapter.source.lazy.config)
    locations = {name: tensor_location(name, family) for name in adapter.source.names}
    return {
        at.layer: name.removesuffix(".weight")
        for name, at in locations.items()
        if at is not None and (at.path, at.kind) == (family.down, "weight") and at.layer in adapter.maps
    }


def write_config(adapter: Adapter, folder: Path) -> None:
    """Write adapter_config.json, in which alone adapters that share their weights differ."""
    config = LoraConfig(
        base_model_name_or_path=adapter.source.pretrained,
        revision=adapter.source.lazy.revision or None,
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # peft divides it by r, whole or not
        target_modules=list(_modules(adapter).values()),
        fan_in_fan_out=exported_family(adapter.source.lazy.config).transposed,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    path = folder / CONFIG
    written = json.loads(path.read_text(encoding="utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # peft keeps a set
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def share_weights(first: Path, others: Sequence[Path]) -> None:
    """Give other folders the first one's weights: by a hard link, or by a copy where the file system has none."""
    for folder in others:
        try:
            os.link(first / WEIGHTS, folder / WEIGHTS)
        except OSError:
            shutil.copy2(first / WEIGHTS, folder / WEIGHTS)
