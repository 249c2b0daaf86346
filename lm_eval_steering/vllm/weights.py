"""What a checkpoint's weights are, read from its files before an engine starts: vLLM holds them fused and sliced."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.architectures.weights import weights_digest, weights_sketch
from lm_eval_steering.errors import NeuronSetError, SteeringError
from lm_eval_steering.export.source import CheckpointSource
from lm_eval_steering.neurons.neuron_set import NeuronSet


@dataclass(frozen=True)
class CheckpointWeights:
    """Of the files that an engine reads.

    Attributes:
        digest: as of a loaded model in the checkpoint's own dtype; empty where the files cannot be read so.
        sketch: as of a loaded model; empty where the files cannot be read so.
        why: what stood against reading them.
    """

    digest: str
    sketch: tuple[float, ...]
    why: str = ""


def checkpoint_weights(pretrained: str, arguments: dict[str, Any]) -> CheckpointWeights:
    """Digest and sketch of a checkpoint: a few values of each tensor are read.

    Args:
        pretrained: hub id or folder.
        arguments: of the engine.
    """
    if arguments.get("quantization") or arguments.get("load_format", "auto") not in ("auto", "safetensors", "hf"):
        return CheckpointWeights("", (), "quantised while they are loaded, or of another format")
    try:
        revision = arguments.get("revision") or "main"
        lazy = LazyModel(pretrained, revision, trust_remote_code=bool(arguments.get("trust_remote_code")))
        with CheckpointSource(pretrained, revision, lazy).model() as model:
            return CheckpointWeights(weights_digest(model), weights_sketch(model))
    except (SteeringError, ValueError, RuntimeError) as error:
        return CheckpointWeights("", (), str(error).splitlines()[0])


def refuse_other_weights(neuron_set: NeuronSet, weights: CheckpointWeights, name: str, adapter: str | None) -> None:
    """Refuse a set that was found in other weights, or that cannot be compared with these.

    Raises:
        NeuronSetError: naming both.
    """
    if adapter:
        raise NeuronSetError(
            f"lora_local_path={adapter}: a model with an adapter is not the one that the neurons of "
            f"{neuron_set.provenance.model} were found in; force=true to use them all the same"
        )
    if neuron_set.provenance.weights and not weights.sketch:
        raise NeuronSetError(
            f"the weights of {name} cannot be compared with those that the neuron set was found in ({weights.why}); "
            "force=true to use it all the same"
        )
    neuron_set.check_weights(weights.sketch, name)


def files_digest(folder: str | None) -> str | None:
    """SHA-256 over the names and contents of a folder's files, for an adapter; None where there is none."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.suffix in {".json", ".safetensors", ".bin"}):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
