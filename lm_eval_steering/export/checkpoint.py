"""A plain checkpoint with an intervention folded in, written shard by shard: memory holds one shard at most."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.export.fold import Fold
from lm_eval_steering.export.layer_maps import LayerMap
from lm_eval_steering.export.layouts import Target, exported_family, tensor_location
from lm_eval_steering.export.source import CheckpointSource, Tensors, skeleton_of
from lm_eval_steering.files import write_json
from lm_eval_steering.progress import Log


class Checkpoint:
    """The tensors to write: their shapes, and how each is made from those of the model.

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
            maps: layer -> the map of its units.
            dtype: of the export: the one that the model is loaded in, whatever its files hold, since a bias rounded to
                the half precision of a file would be another bias.
        """
        self._source, self._target, self._dtype = source, target, dtype
        self._family = exported_family(source.lazy.config)
        units = source.lazy.shape.units  # `target_of` refuses layers of different widths
        self._folds = _folds(maps, source.lazy.shape.layers, units, target)
        with source.reading() as tensors:
            self._model_names, self._shapes = self._tensors(tensors)
        self.bytes = sum(shape.numel() * shape.element_size() for shape in self._shapes.values())

    def write(self, folder: Path, shard_bytes: int, log: Log) -> None:
        """Write the shards, and their index where there are several.

        Raises:
            SteeringError: if the disk has too little free space.
        """
        if (free := shutil.disk_usage(folder).free) < self.bytes:
            raise SteeringError(f"{folder.parent}: {self.bytes / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")
        split = split_torch_state_dict_into_shards(self._shapes, max_shard_size=shard_bytes)
        with log.bar("write", total=len(self._shapes), unit="tensors") as bar:
            for filename, names in split.filename_to_tensors.items():
                made: dict[str, torch.Tensor] = {}
                for name in names:  # files are opened anew for each, so that the pages of its sources are freed
                    with self._source.reading() as tensors:
                        made[name] = self._made(self._model_names[name], tensors).contiguous()
                    bar.update()
                save_file(made, folder / filename, metadata={"format": "pt"})
                del made
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index, indent=2)

    def _tensors(self, tensors: Tensors) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        """Name in the export -> the model's name, and -> an empty tensor of its shape; the files' names are kept."""
        names, shapes = {}, {}
        for model_name, wanted in skeleton_of(self._target.config).state_dict().items():
            name = self._source.names.get(model_name)
            if name is None and model_name.endswith(".bias"):
                weight = self._source.names.get(_weight_of(model_name))
                name = None if weight is None else f"{weight.removesuffix('.weight')}.bias"
            if name is None:  # tied to another one
                continue
            names[name] = model_name
            shapes[name] = torch.empty(wanted.shape, dtype=self._dtype_of(model_name, tensors), device="meta")
        return names, shapes

    def _dtype_of(self, model_name: str, tensors: Tensors) -> torch.dtype:
        name = self._source.names.get(model_name)
        stored = self._dtype if name is None else tensors[name].dtype
        return self._dtype if stored.is_floating_point else stored

    def _read(self, model_name: str, tensors: Tensors) -> torch.Tensor:
        """A tensor of the model in the dtype of the export; a bias that the model has not is 0."""
        name = self._source.names.get(model_name)
        if name is None:
            weight = self._read(_weight_of(model_name), tensors)
            return weight.new_zeros(weight.shape[0])
        tensor = tensors[name]
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _made(self, model_name: str, tensors: Tensors) -> torch.Tensor:
        """A tensor of the export."""
        tensor, family = self._read(model_name, tensors), self._family
        location = tensor_location(model_name, family)
        fold = None if location is None else self._folds.get(location.layer)
        if location is None or fold is None or location.path not in {*family.before, family.down}:
            return tensor
        weight = location.kind == "weight"
        if location.path == family.down:
            axis = 0 if family.transposed else 1
            if weight:
                return fold.down(tensor, axis)
            return fold.down_bias(tensor, self._read(_weight_of(model_name), tensors), axis)
        axis = 1 if family.transposed and weight else 0
        if not family.gated or len(family.before) == 1:
            return fold.silenced(tensor, axis, copies=2 if family.gated else 1)
        if location.path == family.before[0]:
            return fold.gate(tensor, axis) if weight else fold.gate_bias(tensor)
        return fold.up(tensor, axis)


def _weight_of(bias: str) -> str:
    return f"{bias.removesuffix('.bias')}.weight"


def _folds(maps: Mapping[int, LayerMap], layers: int, units: int, target: Target) -> dict[int, Fold]:
    """Layer -> its fold; without the layers that are copied unchanged."""
    none = np.zeros(0)
    unedited = LayerMap(-1, none.astype(np.int64), none, none, none)
    chosen = range(layers) if target.width != units else sorted(maps)
    return {layer: Fold(maps.get(layer, unedited), units, target.width, target.gate_value) for layer in chosen}
