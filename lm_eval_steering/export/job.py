"""An export from beginning to end: everything that can be refused is refused before a folder is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lm_eval_steering.architectures import FAMILIES
from lm_eval_steering.errors import InterventionError, SteeringError
from lm_eval_steering.export import lora
from lm_eval_steering.export.algebra import LayerMap, layer_maps
from lm_eval_steering.export.card import Card
from lm_eval_steering.export.checkpoint import Checkpoint
from lm_eval_steering.export.families import layout_of, target_of
from lm_eval_steering.export.folder import check_free, written_whole
from lm_eval_steering.export.reproduce import refuse_unless_reproduced
from lm_eval_steering.export.source import Source
from lm_eval_steering.export.verify import Loader, VerificationError, verify
from lm_eval_steering.fingerprint import weights_digest, weights_sketch
from lm_eval_steering.neurons.loading import LazyModel
from lm_eval_steering.neurons.log import Log
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.intervention import from_arguments
from lm_eval_steering.steering.plan import Plan, compile_plan

CHECKPOINT, LORA = "checkpoint", "lora"
MULTIPLE = 128  # so that eight devices share the units in multiples of 16
SHARD_BYTES = 10**9


@dataclass(frozen=True)
class Job:
    """What is exported, and where to.

    Attributes:
        loader: of the model.
        neurons: its neuron set.
        arguments: of the intervention (`intervention.ARGUMENTS`), as in a run.
        out: folder to write; there must be nothing yet.
        allow_empty: accept a language without neurons.
        force: use a set that was found in other weights.
        prompts: to compare hooks and export on; none are compared without them.
        log: for progress.
    """

    loader: Loader
    neurons: NeuronSet
    arguments: Mapping[str, Any]
    out: Path
    allow_empty: bool = False
    force: bool = False
    prompts: Sequence[str] = ()
    log: Log = field(default_factory=Log)

    def plan(self, **changed: Any) -> Plan:
        """The intervention on this model's neurons, with some arguments changed."""
        intervention = from_arguments({**self.arguments, **changed})
        return compile_plan(intervention, self.neurons, self.allow_empty)


class Exported:
    """The model of a job, known by its config and its files; its weights stay on disk."""

    def __init__(self, job: Job) -> None:
        """Read the config and compare it with the neuron set.

        Raises:
            SteeringError: if the set is of another model, or export does not know the family.
        """
        self.job, self.lazy = job, job.loader.model()
        layout_of(self.lazy.config)
        shape = self.lazy.shape
        job.neurons.check_model(shape.layers, shape.units, self.lazy.architecture, job.force)
        self.gated = FAMILIES[self.lazy.architecture].gated

    @property
    def dtype(self) -> torch.dtype:
        """Of the export: the one that the model is loaded in."""
        return getattr(torch, self.lazy.dtype)

    def maps(self, plan: Plan) -> dict[int, LayerMap]:
        """Layer -> what a plan makes of its units.

        Raises:
            InterventionError: if the plan is not static.
        """
        return layer_maps(plan, self.gated)

    @cached_property
    def source(self) -> Source:
        """Its files."""
        return Source(self.job.loader.pretrained, self.job.loader.revision, self.lazy)

    @cached_property
    def weights(self) -> str:
        """Digest of its weights.

        Raises:
            NeuronSetError: if the neuron set was found in other ones.
        """
        with self.source.model() as model:
            if not self.job.force:
                self.job.neurons.check_weights(weights_sketch(model), self.lazy.name)
            return weights_digest(model)

    def card(self, plan: Plan, form: str, notes: tuple[str, ...] = (), **numbers: Any) -> Card:
        """The card of an export of it."""
        own = self.lazy
        return Card(
            own.name, own.revision, self.weights, self.job.neurons, plan.intervention, form, own.dtype, notes, numbers
        )


def export_checkpoint(job: Job, multiple: int = MULTIPLE, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write a plain checkpoint with the intervention folded in.

    Args:
        job: what and where to.
        multiple: what the number of units is a multiple of, if it grows.
        shard_bytes: of one file at most.

    Returns:
        Lines that say what was done.

    Raises:
        SteeringError: if it cannot be written.
        VerificationError: if it was written and is not the steered model.
    """
    check_free(job.out)
    plan, model = job.plan(), Exported(job)
    config, maps = model.lazy.config, model.maps(plan)
    target = target_of(config, maps, multiple)
    if target.re_expressed:
        refuse_unless_reproduced(config, layout_of(config))
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
        job: what and where to; with factors the intervention is one scale step without a factor of its own.
        factors: of the adapters; without them the one that the arguments say.
        largest_rank: that is accepted.

    Returns:
        Lines that say what was done.

    Raises:
        SteeringError: if it cannot be written.
        VerificationError: if it was written and is not the steered model.
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
        for place in (first, *others):
            place.mkdir(exist_ok=True)
        lora.write_weights(adapters[next(iter(plans))], first / lora.WEIGHTS, model.dtype)
        lora.share_weights(first, others)
        for name, adapter in adapters.items():
            cards[name].write(folder / name)
            lora.write_config(adapter, folder / name)
            verified = _verified(job, plans[name], folder / name, LORA)
            lines += [f"wrote {job.out / name}: LoRA of rank {adapter.rank}", cards[name].signature, *verified]
    return lines


def _plans(job: Job, factors: Sequence[float]) -> dict[str, Plan]:
    """Folder within the export -> its plan.

    Raises:
        InterventionError: if factors are given for what is not one scaling.
    """
    if not factors:
        return {"": job.plan()}
    if job.arguments.get("factor") is not None:
        raise InterventionError("--factor beside --factors: leave one of the two out")
    plans = {f"factor-{factor:g}": job.plan(factor=factor) for factor in factors}
    steps = next(iter(plans.values())).intervention.steps
    if len(steps) != 1 or steps[0].op != "scale":
        raise InterventionError(
            "--factors: adapters share their weights where the factor is one number beside them, which it is for a "
            "single step op=scale; export each factor by itself"
        )
    return plans


def write_companions(lazy: LazyModel, loader: Loader, config: Any, folder: Path) -> None:
    """Write tokenizer, chat template, generation config, and the config last: without it nothing loads.

    Raises:
        SteeringError: if the tokenizer that the export would load is another one.
    """
    lazy.tokenizer.save_pretrained(folder)
    with suppress(OSError):  # not every model has one
        GenerationConfig.from_pretrained(loader.pretrained, revision=loader.revision).save_pretrained(folder)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = lazy.dtype
    for name in ("auto_map", "_name_or_path"):  # code of the repository is not needed, and a path says nothing there
        config.__dict__.pop(name, None)
    config.save_pretrained(folder)
    if LazyModel(str(folder)).tokenizer_sha256 != lazy.tokenizer_sha256:
        raise SteeringError(
            f"{folder}: transformers loads another tokenizer from the export than from the model, so that their scores "
            "could not be compared"
        )


def _verified(job: Job, plan: Plan, folder: Path, form: str) -> list[str]:
    """The line that says so.

    Raises:
        VerificationError: if hooks and export differ.
    """
    if not job.prompts:
        return []
    verdict = verify(job.loader, plan, folder, form, job.prompts)
    if not verdict.good:
        raise VerificationError(f"the export is NOT the steered model, it stays at {folder}: {verdict.sentence()}")
    return [f"verified: {verdict.sentence()}"]
