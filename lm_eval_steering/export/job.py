"""An export from beginning to end; what can be refused is refused before a folder is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lm_eval_steering.architectures.compat import forget_path
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.architectures.weights import weights_digest, weights_sketch
from lm_eval_steering.errors import InterventionError, SteeringError
from lm_eval_steering.export import lora
from lm_eval_steering.export.checkpoint import Checkpoint
from lm_eval_steering.export.layer_maps import LayerMap, layer_maps, refuse_dynamic
from lm_eval_steering.export.layouts import exported_family, target_of
from lm_eval_steering.export.source import CheckpointSource
from lm_eval_steering.export.verify import Loader, VerificationError, refuse_unless_llama, verify
from lm_eval_steering.files import write_json
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.progress import Log
from lm_eval_steering.provenance import fingerprint, versions
from lm_eval_steering.steering.compiled import CompiledIntervention, compile_intervention
from lm_eval_steering.steering.intervention import Intervention, from_arguments

# --- A folder that is written whole or not at all


def check_free(out: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder.

    Raises:
        SteeringError: naming it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SteeringError(f"--out {out}: exists already; name another folder, or remove this one")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write in, OUT.partial, which is renamed to OUT when everything inside is on the disk.

    OUT.partial of an interrupted run is replaced; after an error it stays.

    Raises:
        SteeringError: if OUT exists already.
    """
    check_free(out)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    readable = partial.stat().st_mode & 0o666  # safetensors makes files that only their owner may read
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(readable)
        _to_disk(path)
    _to_disk(partial)
    partial.replace(out)
    _to_disk(out.parent)


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- The model card, README.md, and the same as JSON

RECORD = "steering.json"


@dataclass(frozen=True)
class Card:
    """What was exported.

    Attributes:
        model: hub id or folder's name of the model.
        revision: commit on the hub, empty for a folder.
        weights: digest of the model's weights.
        neurons: the set.
        intervention: with the set's language codes.
        form: `checkpoint` or `lora`.
        dtype: of the export.
        notes: what else was changed.
        numbers: further fields, such as the rank.
    """

    model: str
    revision: str
    weights: str
    neurons: NeuronSet
    intervention: Intervention
    form: str
    dtype: str
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the export's weights."""
        return fingerprint(
            {
                "weights": self.weights,
                "neurons": self.neurons.content_hash(),
                "intervention": self.intervention.model_dump(mode="json"),
                "form": self.form,
                "dtype": self.dtype,
                "numbers": self.numbers,
            }
        )

    @cached_property
    def signature(self) -> str:
        """Readable form of the fingerprint; `intervention.parse` reads the intervention back."""
        parts = (
            self.intervention.signature(),
            f"neurons:{self.neurons.content_hash()[:8]}",
            f"fp:{self.fingerprint[:8]}",
            f"v:{versions()['lm-eval-steering']}",
        )
        return "|".join(parts)

    def record(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "signature": self.signature,
            "fingerprint": self.fingerprint,
            "intervention": self.intervention.model_dump(mode="json"),
            "steered_languages": list(self.intervention.steered),
            "form": self.form,
            "model": self.model,
            "revision": self.revision,
            "weights": self.weights,
            "dtype": self.dtype,
            "neuron_set": {"sha256": self.neurons.content_hash(), "model": self.neurons.provenance.model},
            "notes": list(self.notes),
            **self.numbers,
            "versions": versions(evaluation=False),
        }

    def write(self, folder: Path) -> None:
        """Write README.md and steering.json."""
        write_json(folder / RECORD, self.record())
        (folder / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The model card."""
        lora = self.form == "lora"
        front = {
            "base_model": self.model,
            "library_name": "peft" if lora else "transformers",
            "tags": ["lm-eval-steering", "language-neurons", *(["lora"] if lora else [])],
        }
        what = "A LoRA that scales" if lora else "The model with an intervention on"
        source = f"{self.model} at {self.revision}" if self.revision else self.model
        arguments = f"pretrained={self.model},peft=THIS_FOLDER" if lora else "pretrained=THIS_FOLDER"
        facts = [
            f"intervention: `{self.intervention.signature()}`",
            f"signature: `{self.signature}`",
            f"fingerprint: `{self.fingerprint}`",
            f"neuron set: `{self.neurons.content_hash()}`",
            f"dtype: {self.dtype}",
            *(f"{name.replace('_', ' ')}: {value}" for name, value in self.numbers.items()),
            *self.notes,
        ]
        lines = [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {self.model}, steered",
            f"{what} the language neurons of {source}, written into weights by lm-eval-steering. The intervention is "
            "the same for every token of every text; no code of lm-eval-steering is needed to run it.",
            "\n".join(f"- {fact}" for fact in facts),
            f"```bash\nlm_eval --model hf --model_args {arguments} --tasks ...\n```",
            "The model's licence holds for this one too.",
        ]
        return "\n\n".join(lines) + "\n"


CHECKPOINT, LORA = "checkpoint", "lora"
MULTIPLE = 128  # so that eight devices share the units in multiples of 16
SHARD_BYTES = 10**9


@dataclass(frozen=True)
class Job:
    """What is exported, and the folder to write.

    Attributes:
        loader: of the model.
        neurons: its neuron set.
        arguments: of the intervention (`intervention.ARGUMENTS`), as in a run.
        out: folder to write, absent or empty.
        allow_empty: accept a language without neurons.
        force: use a set that was found in other weights.
        prompts: on which hooks and export are compared; without prompts nothing is compared.
        log: of progress.
    """

    loader: Loader
    neurons: NeuronSet
    arguments: Mapping[str, Any]
    out: Path
    allow_empty: bool = False
    force: bool = False
    prompts: Sequence[str] = ()
    log: Log = field(default_factory=Log)

    def plan(self, **changed: Any) -> CompiledIntervention:
        """The intervention on this model's neurons, with some arguments changed."""
        intervention = from_arguments({**self.arguments, **changed})
        refuse_dynamic(intervention)
        return compile_intervention(intervention, self.neurons, self.allow_empty)


class Exported:
    """The model of a job, read from its config and its files; its weights stay on disk."""

    def __init__(self, job: Job) -> None:
        """Read the config and compare it with the neuron set.

        Raises:
            SteeringError: if the set is of another model, or the family cannot be exported.
        """
        self.job, self.lazy = job, job.loader.model()
        self.gated = exported_family(self.lazy.config).gated
        shape = self.lazy.shape
        job.neurons.check_model(shape.layers, shape.units, self.lazy.architecture, job.force)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the export: the one that the model is loaded in."""
        return getattr(torch, self.lazy.dtype)

    def maps(self, plan: CompiledIntervention) -> dict[int, LayerMap]:
        """Layer -> the map of its units.

        Raises:
            InterventionError: if the plan is not static.
        """
        return layer_maps(plan, self.gated)

    @cached_property
    def source(self) -> CheckpointSource:
        """Its files on disk."""
        return CheckpointSource(self.job.loader.pretrained, self.job.loader.revision, self.lazy)

    @cached_property
    def weights(self) -> str:
        """Digest of its weights.

        Raises:
            NeuronSetError: if the neuron set was found in other weights.
        """
        with self.source.model() as model:
            if not self.job.force:
                self.job.neurons.check_weights(weights_sketch(model), self.lazy.name)
            return weights_digest(model)

    def card(self, plan: CompiledIntervention, form: str, notes: tuple[str, ...] = (), **numbers: Any) -> Card:
        """The model card of an export of this model."""
        lazy = self.lazy
        return Card(
            lazy.name, lazy.revision, self.weights, self.job.neurons, plan.intervention, form, lazy.dtype, notes,
            numbers,
        )  # fmt: skip


def export_checkpoint(job: Job, multiple: int = MULTIPLE, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write a plain checkpoint with the intervention folded in.

    Args:
        job: what to export, and where to.
        multiple: a grown number of units is a multiple of this.
        shard_bytes: of one file at most.

    Returns:
        Lines that say what was done.

    Raises:
        SteeringError: if it cannot be written.
        VerificationError: if the written export is not the steered model.
    """
    check_free(job.out)
    plan, model = job.plan(), Exported(job)
    config, maps = model.lazy.config, model.maps(plan)
    target = target_of(config, maps, multiple)
    if target.as_llama:
        refuse_unless_llama(config)
    card = model.card(plan, CHECKPOINT, target.notes, units=model.lazy.shape.units, units_exported=target.width)
    checkpoint = Checkpoint(model.source, target, maps, model.dtype)
    with written_whole(job.out) as folder:
        checkpoint.write(folder, shard_bytes, job.log)
        card.write(folder)
        write_companions(model.lazy, job.loader, target.config, folder)
        verified = _verified(job, plan, folder, CHECKPOINT)
    size = f"{target.config.model_type}, {checkpoint.bytes / 1e9:.2f} GB"
    return [f"wrote {job.out}: {size}", *target.notes, card.signature, *verified]


def export_lora(job: Job, factors: Sequence[float] = (), largest_rank: int = lora.LARGEST_RANK) -> list[str]:
    """Write a LoRA, or one for each factor in folders that share their weights.

    Args:
        job: what to export, and where to; with factors the intervention is one scale step without a factor.
        factors: of the adapters; without them the factor of the job's arguments.
        largest_rank: the largest rank that is accepted.

    Returns:
        Lines that say what was done.

    Raises:
        SteeringError: if it cannot be written.
        VerificationError: if the written export is not the steered model.
    """
    check_free(job.out)
    plans = _plans(job, factors)
    model = Exported(job)
    adapters = {name: lora.plan_adapter(model.source, model.maps(plan), largest_rank) for name, plan in plans.items()}
    cards = {
        name: model.card(plans[name], LORA, rank=adapter.rank, lora_alpha=adapter.alpha)
        for name, adapter in adapters.items()
    }
    lines: list[str] = []
    with written_whole(job.out) as folder:
        first, *others = [folder / name for name in plans]
        for adapter_folder in (first, *others):
            adapter_folder.mkdir(exist_ok=True)
        lora.write_weights(adapters[next(iter(plans))], first / lora.WEIGHTS, model.dtype)
        lora.share_weights(first, others)
        for name, adapter in adapters.items():
            cards[name].write(folder / name)
            lora.write_config(adapter, folder / name)
            verified = _verified(job, plans[name], folder / name, LORA)
            lines += [f"wrote {job.out / name}: LoRA of rank {adapter.rank}", cards[name].signature, *verified]
    return lines


def _plans(job: Job, factors: Sequence[float]) -> dict[str, CompiledIntervention]:
    """Folder within the export -> its plan.

    Raises:
        InterventionError: if factors are given for what is not one scaling.
    """
    if not factors:
        return {"": job.plan()}
    if job.arguments.get("factor") is not None:
        raise InterventionError("--factor conflicts with --factors: leave one of them out")
    plans = {f"factor-{factor:g}": job.plan(factor=factor) for factor in factors}
    steps = next(iter(plans.values())).intervention.steps
    if len(steps) != 1 or steps[0].op != "scale":
        raise InterventionError(
            "--factors: adapters of several factors share their weights only for a single step op=scale; export each "
            "factor by itself, with --factor"
        )
    return plans


def write_companions(lazy: LazyModel, loader: Loader, config: Any, folder: Path) -> None:
    """Write tokenizer, chat template, generation config, and the config last: without it nothing loads.

    Raises:
        SteeringError: if transformers loads another tokenizer from the export than from the model.
    """
    lazy.tokenizer.save_pretrained(folder)
    with suppress(OSError):  # not every model has one
        GenerationConfig.from_pretrained(loader.pretrained, revision=loader.revision).save_pretrained(folder)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = lazy.dtype
    config.__dict__.pop("auto_map", None)  # code of the repository is not needed
    forget_path(config)  # a path of this machine means nothing elsewhere
    config.save_pretrained(folder)
    if LazyModel(str(folder)).tokenizer_sha256 != lazy.tokenizer_sha256:
        raise SteeringError(
            f"{folder}: transformers loads another tokenizer from the export than from the model, so that their scores "
            "could not be compared"
        )


def _verified(job: Job, plan: CompiledIntervention, folder: Path, form: str) -> list[str]:
    """Compare hooks and export on the job's prompts, and return the result as a line; no line without prompts.

    Raises:
        VerificationError: if hooks and export differ.
    """
    if not job.prompts:
        return []
    verdict = verify(job.loader, plan, folder, form, job.prompts)
    if not verdict.good:
        raise VerificationError(f"the export is NOT the steered model, it stays at {folder}: {verdict.sentence()}")
    return [f"verified: {verdict.sentence()}"]
