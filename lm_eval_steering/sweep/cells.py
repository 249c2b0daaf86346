"""Cells: one intervention on one task. A plan is spelled out into cells before any model is loaded."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval_steering import resources
from lm_eval_steering.architectures.loading import commit_of
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.arguments import read_config
from lm_eval_steering.neurons.corpus import Corpus
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import Intervention, Step, from_arguments
from lm_eval_steering.sweep.plan import InterventionEntry, PlanError, SweepPlan
from lm_eval_steering.sweep.plan_tasks import TaskBook

# --- From the entries of a plan to single interventions: one for each language, factor and random control

BASELINE = "baseline"


@dataclass(frozen=True)
class PlannedIntervention:
    """One intervention, ready to be given to `SteeredHFLM.intervene`.

    Attributes:
        name: short and readable, part of a folder's name.
        arguments: flat arguments; empty for the baseline.
        intervention: with the neuron set's codes, as plain data.
        languages: steered ones.
        entry: place in the plan's `interventions`, -1 for the baseline.
        factor: as written in the plan, None where none was.
        control: seed of the matched random set that is used in place of the language's own neurons.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    intervention: dict[str, Any] = field(default_factory=lambda: Intervention().model_dump(mode="json"))
    languages: tuple[str, ...] = ()
    entry: int = -1
    factor: float | None = None
    control: int | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is done to the model."""
        return not self.arguments

    @property
    def target(self) -> str | None:
        """Languages that it steers to, joined by `+`."""
        return "+".join(self.languages) or None


def variants_of(plan: SweepPlan, neuron_set: NeuronSet) -> tuple[list[PlannedIntervention], list[str]]:
    """The baseline, then every intervention of the plan, its random controls behind it; and notes on what collapsed.

    Raises:
        SteeringError: if an intervention is not defined for this neuron set; nothing was loaded.
    """
    found: dict[str, PlannedIntervention] = {}
    notes: list[str] = []
    for number, entry in enumerate(plan.interventions):
        for variant, intervention in _of_entry(plan, number, entry, neuron_set):
            if _changes_nothing(intervention):
                notes.append(f"{variant.name} changes nothing: it is the baseline")
                continue
            # Two entries that mean the same are one intervention.
            found.setdefault(intervention.signature(), variant)
    own = _told_apart(found)
    if plan.controls.random and plan.controls.calibration is None:
        for variant in own:
            _refuse_unmeasured(variant)
    controls = [_control(variant, seed) for variant in own for seed in range(plan.controls.random)]
    return [PlannedIntervention(BASELINE), *own, *controls], notes


def _told_apart(found: Mapping[str, PlannedIntervention]) -> list[PlannedIntervention]:
    """Interventions by signature; where short names leave out how two of them differ, a hash is appended."""
    often = Counter(variant.name for variant in found.values())
    return [
        variant if often[variant.name] == 1 else replace(variant, name=f"{variant.name}-{_short_hash(signature)}")
        for signature, variant in found.items()
    ]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _of_entry(
    plan: SweepPlan, number: int, entry: InterventionEntry, neuron_set: NeuronSet
) -> Iterator[tuple[PlannedIntervention, Intervention]]:
    given = entry.model_dump(exclude={"factors", "factor", "languages"}, exclude_none=True)
    steers = entry.op is not None or entry.preset is not None
    targets = (entry.languages or plan.languages) if steers else (None,)
    factors = entry.factors if entry.factors is not None else (entry.factor,)
    for language in targets:
        for factor in factors:
            arguments = dict(given)
            if language is not None:
                arguments["language"] = language
            if factor is not None:
                arguments["factor"] = float(factor)
            try:
                compiled = compile_intervention(from_arguments(arguments), neuron_set, plan.allow_empty)
            except SteeringError as error:
                raise PlanError(f"interventions.{number}: {error}") from None
            intervention = compiled.intervention
            variant = PlannedIntervention(
                _name(intervention, entry, factor), arguments, intervention.model_dump(mode="json"),
                intervention.steered, number, None if factor is None else float(factor),
            )  # fmt: skip
            yield variant, intervention


def _changes_nothing(intervention: Intervention) -> bool:
    return all(_is_identity(step) for step in intervention.steps)


def _is_identity(step: Step) -> bool:
    if step.op == "scale":
        return step.value is None and step.factor == 1
    return step.op == "add" and (step.factor == 0 or step.value == 0)


def _refuse_unmeasured(variant: PlannedIntervention) -> None:
    """A neuron set holds statistics of its own neurons alone."""
    for step in variant.intervention["steps"]:
        value = step["value"]
        if isinstance(value, str) and not value.startswith("live_") and value != "normal":
            raise PlanError(
                f"controls.random: {variant.name} needs the statistic {value!r} of random neurons, and a neuron set "
                "has those of its own neurons alone; name a text to measure them, controls: {random: "
                "..., calibration: CORPUS}, or use numbers as values"
            )


def _control(variant: PlannedIntervention, seed: int) -> PlannedIntervention:
    return replace(variant, name=f"{variant.name}-random{seed}", control=seed)


def _name(intervention: Intervention, entry: InterventionEntry, factor: float | None) -> str:
    """Such as `fra_Latn-add-mean-x4-product`; for people, and never read back."""
    parts = ["+".join(intervention.steered) or "none"]
    parts += [entry.preset] if entry.preset else [entry.op] if entry.op else []
    parts += [f"{entry.value}"] if entry.value is not None else []
    parts += [f"x{factor:g}"] if factor is not None else []
    parts += [f"without-{entry.deactivate}"] if entry.deactivate else []
    parts += [str(part) for part in (entry.site, entry.layers, entry.positions) if part is not None]
    text = "-".join(str(part) for part in parts).replace("=", "set_").replace("*", "times_")
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)[:80]


ALL, CHOOSE, REPORT = "all", "choose", "report"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_BESIDE = (".json", ".jinja", ".txt", ".model", ".py")  # config, tokenizer, chat template, the model's own code
_NO_PART = {"batch_size", "max_batch_size", "device", "parallelize", "max_memory_per_gpu", "max_cpu_memory"}
_ENDS = 1 << 20  # bytes read at either end of a weight file
_LONGEST = 200  # characters of a readable name: file systems end at 255 bytes


@dataclass(frozen=True)
class Cell:
    """One intervention on one task.

    Attributes:
        key: hash over everything that decides its scores, known before the model is loaded.
        variant: the intervention.
        task: one task of lm-eval.
        target: the steered languages that the documents or `lfs` are for; None where none is.
        items: `all`, or `report` for the half that nothing was chosen on.
        stage: 1, or 2 for cells of `then`.
    """

    key: str
    variant: PlannedIntervention
    task: str
    target: str | None
    items: str = ALL
    stage: int = 1

    @property
    def name(self) -> str:
        """Readable name, with enough of the key to be one of a kind; the cell's folder."""
        target = f"-for-{self.target}" if self.variant.is_baseline and self.target else ""
        return f"{f'{self.variant.name}{target}--{self.task}'[:_LONGEST]}--{self.key[:10]}"

    def describe(self) -> dict[str, Any]:
        """Plain data, for files."""
        return asdict(self) | {"name": self.name}

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Cell:
        """A cell from what `describe` gave."""
        own = dict(found["variant"])
        variant = PlannedIntervention(**own | {"languages": tuple(own["languages"])})
        return cls(variant=variant, **{key: found[key] for key in ("key", "task", "target", "items", "stage")})


@dataclass
class Grid:
    """A plan that is spelled out.

    Attributes:
        plan: as the user wrote it.
        book: its tasks.
        neuron_set: as loaded.
        variants: baseline, interventions, controls.
        cells: of the first stage, in the order in which they are run.
        notes: what a user should know: factors that collapsed, cells that are not defined.
    """

    plan: SweepPlan
    book: TaskBook
    neuron_set: NeuronSet
    variants: list[PlannedIntervention]
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def plan_hash(self) -> str:
        """Over what decides which cells there are."""
        plan = self.plan.model_dump(mode="json", exclude={"slurm"})
        return fingerprint({"plan": plan, "model": self.model, "cells": [cell.key for cell in self.cells]})

    @cached_property
    def model(self) -> dict[str, Any]:
        """What is known of the model before it is loaded."""
        return declared_model(self.plan)

    @cached_property
    def calibration(self) -> dict[str, Any] | None:
        """What tells the text that measures the controls from another; None where none does.

        Raises:
            CorpusError: if a language has none.
        """
        wanted = self.plan.controls
        if wanted.calibration is None:
            return None
        corpus = Corpus.parse(calibration_place(self.plan))
        texts = {code: corpus.identity(code) for code in self.neuron_set.languages}
        return {"texts": texts, "sentences": wanted.sentences}

    def then_cells(self, chosen: Iterable[PlannedIntervention]) -> list[Cell]:
        """Cells of `then` for some chosen interventions: those, their random controls, and the baseline."""
        if self.plan.then is None:
            return []
        names = {variant.name for variant in chosen}
        wanted = [v for v in self.variants if v.is_baseline or _own_name(v) in names]
        languages = {code for v in wanted for code in v.languages}
        return self._product(wanted, self.plan.then.tasks, 2, languages)

    def then_bound(self) -> int:
        """Largest number of cells that `then` can have."""
        if self.plan.then is None or self.plan.choose is None:
            return 0
        groups: dict[str, list[PlannedIntervention]] = {}
        for variant in self.candidates():
            groups.setdefault(group_of(variant, self.plan), []).append(variant)
        return len({cell.key for own in groups.values() for cell in self.then_cells(own[:1])})

    def candidates(self) -> list[PlannedIntervention]:
        """Interventions that can be chosen: those that steer, on the language's own neurons."""
        return [variant for variant in self.variants if variant.languages and variant.control is None]

    def _product(
        self, variants: Sequence[PlannedIntervention], tasks: Sequence[str], stage: int, codes: set[str]
    ) -> list[Cell]:
        """Task by task, so that its requests are tokenised once; within it the baseline first."""
        found: dict[str, Cell] = {}
        for task in self.book.spelled_out(tasks):
            own: list[Cell] = []
            for variant in variants:
                for target in self._targets(variant, task, codes):
                    reason = self.book.why_undefined(task, target)
                    if reason is None:
                        own.append(self._cell(variant, task, target, stage))
                    elif variant.is_baseline:
                        self._note(f"left out: {task} steered to {target}: {reason}")
            # `then` asks for one language after the other: a task may be undefined for each of them but not for all.
            if not own and (stage == 1 or codes >= set(self.plan.languages)):
                raise PlanError(f"tasks: {task} is not defined for any of the plan's languages")
            if self.book.is_targeted(task):  # one set of documents after the other
                own.sort(key=lambda cell: cell.target or "")
            found |= {cell.key: cell for cell in own if cell.key not in found}
        return list(found.values())

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _targets(self, variant: PlannedIntervention, task: str, codes: set[str]) -> list[str | None]:
        if not variant.is_baseline:
            return [variant.target]
        return list(sorted(codes)) if self.book.is_targeted(task) else [None]

    def _cell(self, variant: PlannedIntervention, task: str, target: str | None, stage: int) -> Cell:
        plan = self.plan
        items = REPORT if stage == 2 and plan.choose is not None and plan.choose.split == "half" else ALL
        split = {"seed": plan.choose.seed, "item": plan.choose.item} if items == REPORT and plan.choose else None
        control = None
        if variant.control is not None:
            control = {"seed": variant.control, "calibration": self.calibration}
        key = fingerprint(
            {
                "model": self.model,
                "neurons": None if variant.is_baseline else self.neuron_set.content_hash(),
                "intervention": variant.intervention,
                "control": control,
                "target": target,
                "task": task,
                "task_is": self.book.digest(task, target),
                "items": items,
                "split": split,
                "options": options_of(plan),
            }
        )
        return Cell(key, variant, task, target, items, stage)


def _own_name(variant: PlannedIntervention) -> str:
    """Of a control: the name of the intervention that it is the control of."""
    return variant.name if variant.control is None else variant.name.removesuffix(f"-random{variant.control}")


def group_of(variant: PlannedIntervention, plan: SweepPlan) -> str:
    """What one intervention is chosen for."""
    assert plan.choose is not None
    language = "+".join(variant.languages)
    return language if plan.choose.by == "language" else f"{language}, intervention {variant.entry}"


def spell_out(plan: SweepPlan) -> Grid:
    """All cells of a plan's first stage. Neither the model nor anything of its weights is loaded.

    Raises:
        SteeringError: for anything that would make a cell fail later and can be known now.
    """
    neuron_set = NeuronSet.load(resources.find_neuron_set(plan.neurons))
    variants, notes = variants_of(plan, neuron_set)
    grid = Grid(plan, TaskBook(plan), neuron_set, variants, notes=notes)
    codes = {code for variant in variants for code in variant.languages}
    grid.cells = grid._product(variants, plan.tasks, 1, codes)
    return grid


def options_of(plan: SweepPlan) -> dict[str, Any]:
    """How lm-eval is asked to evaluate."""
    names = {"limit", "num_fewshot", "apply_chat_template", "system_instruction", "gen_kwargs", "bootstrap_iters"}
    return plan.model_dump(mode="json", include=names | {"metadata"})


def calibration_place(plan: SweepPlan) -> str:
    """Where the text is that measures the controls, with `demo` spelled out."""
    named = str(plan.controls.calibration)
    return str(resources.demo_calibration()) if named == "demo" else named


def model_arguments(plan: SweepPlan) -> dict[str, Any]:
    """Arguments of the model class, with `demo` spelled out."""
    found = plan.model.model_dump(exclude_none=True)
    if found["pretrained"] == "demo":
        found["pretrained"] = str(resources.demo_model())
    return found


def declared_model(plan: SweepPlan) -> dict[str, Any]:
    """What names a model before it is loaded: the hub's commit, or its files' names, sizes and ends.

    Raises:
        SteeringError: if there is no such model.
    """
    arguments = model_arguments(plan)
    read_config(arguments["pretrained"], arguments)
    folder = Path(arguments.pop("pretrained"))
    deciding = {key: value for key, value in arguments.items() if key not in _NO_PART}
    if folder.is_dir():
        return {"name": folder.name, "files": _files_digest(folder), **deciding}
    commit = commit_of(plan.model.pretrained, str(arguments.get("revision") or "main"), arguments.get("cache_dir"))
    return {"name": plan.model.pretrained, "commit": commit or None, **deciding}


def _files_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _BESIDE or path.name.startswith("tokenizer"):
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
        elif path.suffix in _WEIGHTS:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_ENDS))
                file.seek(max(size - _ENDS, 0))
                digest.update(file.read(_ENDS))
    return digest.hexdigest()
