"""A plain checkpoint with a plan folded in, written shard by shard: memory holds the tensors of one shard at most."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from lm_eval_steering.architectures import FAMILIES, model_type_of
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.export.fold import Fold
from lm_eval_steering.export.layer_maps import LayerMap
from lm_eval_steering.export.layouts import Target, layout_of, place_of
from lm_eval_steering.export.source import CheckpointSource, Tensors, skeleton_of
from lm_eval_steering.progress import Log


class Checkpoint:
    """What is to be written: the shape of each tensor, and how it is made from those of the model.

    Attributes:
        bytes: of all tensors.
    """

    def __init__(
        self, source: CheckpointSource, target: Target, maps: Mapping[int, LayerMap], dtype: torch.dtype
    ) -> None:
        """Look at every tensor's shape and read none.

        Args:
            source: the model's checkpoint.
            target: what the export is to be.
            maps: layer -> what is made of its units.
            dtype: of the export. It is the one that the model is loaded in, whatever its files hold: a bias in the
                half precision of a file would be another one.
        """
        self._source, self._target, self._dtype = source, target, dtype
        config = source.lazy.config
        self._family, self._layout = FAMILIES[model_type_of(config)], layout_of(config)
        before = source.lazy.shape.units  # `target_of` refuses layers of different widths
        self._folds = _folds(maps, source.lazy.shape.layers, before, target)
        with source.reading() as tensors:
            self._own, self._shapes = self._tensors(tensors)
        self.bytes = sum(shape.numel() * shape.element_size() for shape in self._shapes.values())

    def write(self, folder: Path, shard_bytes: int, log: Log) -> None:
        """Write the shards, and their index where there are several.

        Raises:
            SteeringError: if the disk has not the room.
        """
        if (free := shutil.disk_usage(folder).free) < self.bytes:
            raise SteeringError(f"{folder.parent}: {self.bytes / 1e9:.1f} GB to write, {free / 1e9:.1f} GB are free")
        split = split_torch_state_dict_into_shards(self._shapes, max_shard_size=shard_bytes)
        with log.bar("write", total=len(self._shapes), unit="tensors") as bar:
            for filename, names in split.filename_to_tensors.items():
                made: dict[str, torch.Tensor] = {}
                for name in names:  # each with files of its own, so that what it was made from is given back
                    with self._source.reading() as tensors:
                        made[name] = self._made(self._own[name], tensors).contiguous()
                    bar.update()
                save_file(made, folder / filename, metadata={"format": "pt"})
                del made
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    # --- names and shapes ---------------------------------------------------------------------------------------

    def _tensors(self, tensors: Tensors) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        """Name in the export -> the model's name, and -> the tensor on the meta device; names are the file's own."""
        names, shapes = {}, {}
        for own, wanted in skeleton_of(self._target.config).state_dict().items():
            name = self._source.names.get(own)
            if name is None and own.endswith(".bias") and (beside := self._source.names.get(_weight_of(own))):
                name = f"{beside.removesuffix('.weight')}.bias"
            if name is None:  # tied to another one
                continue
            names[name] = own
            shapes[name] = torch.empty(wanted.shape, dtype=self._dtype_of(own, tensors), device="meta")
        return names, shapes

    def _dtype_of(self, own: str, tensors: Tensors) -> torch.dtype:
        name = self._source.names.get(own)
        kept = self._dtype if name is None else tensors[name].dtype
        return self._dtype if kept.is_floating_point else kept

    def _role(self, own: str) -> tuple[Fold, str, str] | None:
        """The layer's fold, the module's path in the layer and `weight` or `bias`, of a tensor of an edited MLP."""
        place = place_of(own, self._family)
        if place is None or place.path not in {*self._layout.before, self._family.down}:
            return None
        fold = self._folds.get(place.layer)
        return None if fold is None else (fold, place.path, place.kind)

    # --- values -------------------------------------------------------------------------------------------------

    def _read(self, own: str, tensors: Tensors) -> torch.Tensor:
        """A tensor of the model in the dtype of the export; a bias that the model has not is 0."""
        name = self._source.names.get(own)
        if name is None:
            weight = self._read(_weight_of(own), tensors)
            return weight.new_zeros(weight.shape[0])
        tensor = tensors[name]
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _made(self, own: str, tensors: Tensors) -> torch.Tensor:
        """A tensor of the export."""
        tensor, role = self._read(own, tensors), self._role(own)
        if role is None:
            return tensor
        fold, path, kind = role
        weight = kind == "weight"
        if path == self._family.down:
            axis = 0 if self._layout.transposed else 1
            return fold.down(tensor, axis) if weight else self._down_bias(fold, own, tensor, tensors, axis)
        axis = 1 if self._layout.transposed and weight else 0
        if not self._family.gated or len(self._layout.before) == 1:
            return fold.silenced(tensor, axis, copies=2 if self._family.gated else 1)
        if path == self._layout.before[0]:
            return fold.gate(tensor, axis) if weight else fold.gate_bias(tensor)
        return fold.up(tensor, axis)

    def _down_bias(self, fold: Fold, own: str, tensor: torch.Tensor, tensors: Tensors, axis: int) -> torch.Tensor:
        return fold.down_bias(tensor, self._read(_weight_of(own), tensors), axis)


def _weight_of(bias: str) -> str:
    return f"{bias.removesuffix('.bias')}.weight"


def _folds(maps: Mapping[int, LayerMap], layers: int, before: int, target: Target) -> dict[int, Fold]:
    """Of the layers that are not copied as they are."""
    none = np.zeros(0)
    empty = LayerMap(-1, none.astype(np.int64), none, none, none)
    chosen = range(layers) if target.width != before else sorted(maps)
    return {layer: Fold(maps.get(layer, empty), before, target.width, target.pulse) for layer in chosen}
