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

from lm_eval_steering import languages, resources
from lm_eval_steering.architectures import model_type_of
from lm_eval_steering.architectures.loading import commit_of
from lm_eval_steering.errors import SteeringError, did_you_mean
from lm_eval_steering.lmeval.arguments import read_config
from lm_eval_steering.lmeval.evaluated_language import evaluated_language
from lm_eval_steering.lmeval.expected_language import EVALUATED_LANGUAGE
from lm_eval_steering.lmeval.fewshot import fewshot_source
from lm_eval_steering.neurons.corpus import Corpus
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import Intervention, Step, from_arguments
from lm_eval_steering.sweep.halves import ALL, CHOOSE, REPORT, can_be_split, positions_of
from lm_eval_steering.sweep.plan import STEERED_VLLM, InterventionEntry, PlanError, SweepPlan
from lm_eval_steering.sweep.plan_tasks import TaskBook
from lm_eval_steering.vllm.arguments import CAPACITY, capacity_of, refuse_what_hooks_do
from lm_eval_steering.vllm.layers import refuse_unknown

# --- From the entries of a plan to single interventions: one for each language, factor and random control

BASELINE = "baseline"
LSS = "lss"  # the metric that is a shift from the unsteered model


@dataclass(frozen=True)
class PlannedIntervention:
    """One intervention, ready to be given to `SteeredHFLM.intervene`.

    Attributes:
        name: short and readable, part of a folder's name.
        arguments: flat arguments; empty for the baseline.
        resolved: the `Intervention` with the neuron set's language codes, as plain data.
        languages: steered ones.
        entry: position in the plan's `interventions`, -1 for the baseline.
        factor: as written in the plan, None where none was.
        control: seed of the matched random set that is used instead of the language's neurons.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=lambda: Intervention().model_dump(mode="json"))
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


def interventions_of(plan: SweepPlan, neuron_set: NeuronSet) -> tuple[list[PlannedIntervention], list[str]]:
    """The baseline, then every intervention of the plan, then their random controls; and notes on what collapsed.

    Raises:
        SteeringError: if an intervention is not defined for this neuron set; nothing was loaded.
    """
    by_signature: dict[str, PlannedIntervention] = {}
    notes: list[str] = []
    for number, entry in enumerate(plan.interventions):
        for planned, intervention in _from_entry(plan, number, entry, neuron_set):
            if _changes_nothing(intervention):
                notes.append(f"{planned.name} changes nothing: it is the baseline")
                continue
            # Two entries that mean the same are one intervention.
            by_signature.setdefault(intervention.signature(), planned)
    interventions = _with_unique_names(by_signature)
    if plan.controls.random and plan.controls.calibration is None:
        for planned in interventions:
            _refuse_unmeasured(planned)
    controls = [_control(planned, seed) for planned in interventions for seed in range(plan.controls.random)]
    return [PlannedIntervention(BASELINE), *interventions, *controls], notes


def _with_unique_names(by_signature: Mapping[str, PlannedIntervention]) -> list[PlannedIntervention]:
    """Interventions by signature; where short names leave out how two of them differ, a hash is appended."""
    count = Counter(planned.name for planned in by_signature.values())
    return [
        planned if count[planned.name] == 1 else replace(planned, name=f"{planned.name}-{_short_hash(signature)}")
        for signature, planned in by_signature.items()
    ]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _from_entry(
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
                if plan.engine.name == STEERED_VLLM:
                    refuse_what_hooks_do(compiled)
            except SteeringError as error:
                raise PlanError(f"interventions.{number}: {error}") from None
            intervention = compiled.intervention
            planned = PlannedIntervention(
                _name(intervention, entry, factor), arguments, intervention.model_dump(mode="json"),
                intervention.steered, number, None if factor is None else float(factor),
            )  # fmt: skip
            yield planned, intervention


def _changes_nothing(intervention: Intervention) -> bool:
    return all(_is_identity(step) for step in intervention.steps)


def _is_identity(step: Step) -> bool:
    if step.op == "scale":
        return step.value is None and step.factor == 1
    return step.op == "add" and (step.factor == 0 or step.value == 0)


def _refuse_unmeasured(planned: PlannedIntervention) -> None:
    """A neuron set holds statistics of its neurons alone."""
    for step in planned.resolved["steps"]:
        value = step["value"]
        if isinstance(value, str) and not value.startswith("live_") and value != "normal":
            raise PlanError(
                f"controls.random: {planned.name} needs the statistic {value!r} of random neurons, and a neuron set "
                "has statistics of its neurons alone; name a text to measure them, controls: {random: "
                "..., calibration: CORPUS}, or use numbers as values"
            )


def _control(planned: PlannedIntervention, seed: int) -> PlannedIntervention:
    return replace(planned, name=f"{planned.name}-random{seed}", control=seed)


def _deactivated(intervention: Intervention, entry: InterventionEntry) -> str:
    """Of an intervention that steers to no language: the languages that it deactivates."""
    silenced = dict.fromkeys(code for step in intervention.steps for code in step.languages)
    languages = entry.deactivate if entry.deactivate == "others" else "+".join(silenced)
    return languages if entry.preset else f"{languages}-deactivate"


def _name(intervention: Intervention, entry: InterventionEntry, factor: float | None) -> str:
    """Such as `fra_Latn-add-mean-x4-product` or `fra_Latn-deactivate`; for people, and never read back."""
    parts = ["+".join(intervention.steered) or _deactivated(intervention, entry)]
    parts += [entry.preset] if entry.preset else [entry.op] if entry.op else []
    parts += [f"{entry.value}"] if entry.value is not None else []
    parts += [f"x{factor:g}"] if factor is not None else []
    parts += [f"without-{entry.deactivate}"] if entry.deactivate and intervention.steered else []
    parts += [f"to-{entry.deactivate_to}"] if entry.deactivate_to is not None else []
    parts += [str(part) for part in (entry.site, entry.layers, entry.positions) if part is not None]
    text = "-".join(str(part) for part in parts).replace("=", "set_").replace("*", "times_")
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)[:80]


_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".py")  # config, tokenizer, chat template, the model's own code
_IRRELEVANT = {"batch_size", "max_batch_size", "device", "parallelize", "max_memory_per_gpu", "max_cpu_memory"}
# Arguments of an engine that say where and how fast it runs, and not what it answers.
_PLACE = {
    "tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "gpu_memory_utilization",
    "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching", "disable_log_stats", CAPACITY,
}  # fmt: skip
_ENDS = 1 << 20  # bytes read at either end of a weight file
_LONGEST = 200  # characters of a readable name: file systems end at 255 bytes


@dataclass(frozen=True)
class Cell:
    """One intervention on one task.

    Attributes:
        key: hash over everything that decides its scores, known before the model is loaded.
        intervention: which one, or the baseline.
        task: one task of lm-eval.
        target: the steered languages that the documents or `lfs` are for; None where none is.
        items: `all`, or `report` for the half that nothing was chosen on.
        stage: 1, or 2 for cells of `then`.
        evaluated: language of the task's items; None where neither the task nor the plan says it.
    """

    key: str
    intervention: PlannedIntervention
    task: str
    target: str | None
    items: str = ALL
    stage: int = 1
    evaluated: str | None = None

    @property
    def name(self) -> str:
        """Readable name, with enough of the key to be unique; the cell's folder."""
        target = f"-for-{self.target}" if self.intervention.is_baseline and self.target else ""
        return f"{f'{self.intervention.name}{target}--{self.task}'[:_LONGEST]}--{self.key[:10]}"

    def describe(self) -> dict[str, Any]:
        """Plain data, for files."""
        return asdict(self) | {"name": self.name}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Cell:
        """A cell from what `describe` gave."""
        fields = dict(described["intervention"])
        planned = PlannedIntervention(**fields | {"languages": tuple(fields["languages"])})
        return cls(
            intervention=planned,
            **{key: described[key] for key in ("key", "task", "target", "items", "stage", "evaluated")},
        )


@dataclass
class Grid:
    """A plan and all cells that follow from it.

    Attributes:
        plan: as the user wrote it.
        book: its tasks.
        neuron_set: as loaded.
        interventions: baseline, interventions, controls.
        cells: of the first stage, in the order in which they are run.
        notes: what a user should know: factors that collapsed, cells that are not defined.
    """

    plan: SweepPlan
    book: TaskBook
    neuron_set: NeuronSet
    interventions: list[PlannedIntervention]
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _documents_of: dict[tuple[str, str | None, str], dict[str, Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def plan_hash(self) -> str:
        """Over what decides which cells there are."""
        plan = self.plan.model_dump(mode="json", exclude={"slurm"})
        return fingerprint({"plan": plan, "model": self.model, "cells": [cell.key for cell in self.cells]})

    @cached_property
    def model(self) -> dict[str, Any]:
        """What is known of the model before it is loaded, and what runs it where that is not `steered-hf`."""
        return declared_model(self.plan) | _declared_engine(self.plan)

    @cached_property
    def calibration(self) -> dict[str, Any] | None:
        """What tells the text that measures the controls from another; None where none does.

        Raises:
            CorpusError: if a language has none.
        """
        controls = self.plan.controls
        if controls.calibration is None:
            return None
        corpus = Corpus.parse(calibration_source(self.plan))
        texts = {code: corpus.identity(code) for code in self.neuron_set.languages}
        return {"texts": texts, "sentences": controls.sentences}

    def then_cells(self, chosen: Iterable[PlannedIntervention], languages: Iterable[str] = ()) -> list[Cell]:
        """Cells of `then` for some chosen interventions: those, their random controls, and the baseline.

        Args:
            chosen: interventions; none where the baseline was chosen.
            languages: for which the baseline of tasks made for a language is evaluated too.
        """
        if self.plan.then is None:
            return []
        names = {planned.name for planned in chosen}
        evaluated = [v for v in self.interventions if v.is_baseline or _name_without_control(v) in names]
        steered = {code for planned in evaluated for code in planned.languages} | set(languages)
        return self._product(evaluated, self.plan.then.tasks, 2, steered)

    def then_bound(self) -> int:
        """Largest number of cells that `then` can have."""
        if self.plan.then is None or self.plan.choose is None:
            return 0
        groups: dict[str, list[PlannedIntervention]] = {}
        for planned in self.candidates():
            groups.setdefault(group_of(planned, self.plan), []).append(planned)
        return len({cell.key for candidates in groups.values() for cell in self.then_cells(candidates[:1])})

    def candidates(self) -> list[PlannedIntervention]:
        """Interventions that can be chosen: those that steer, on the language's own neurons."""
        return [planned for planned in self.interventions if planned.languages and planned.control is None]

    def positions(self, task: str, target: str | None, items: str) -> list[int] | None:
        """Positions of the documents that a cell evaluates; None where it evaluates the first `limit`, or all.

        With `limit` and `split: half`, the first `limit` documents of each half.
        """
        choose, limit = self.plan.choose, self.plan.limit
        if choose is None or choose.split != "half" or (items == ALL and limit is None):
            return None
        built = self.book.task(task, target)
        if items == REPORT:
            return positions_of(built, task, REPORT, choose.seed, choose.item, limit)
        if not can_be_split(built, choose.item):
            return None
        halves = (positions_of(built, task, half, choose.seed, choose.item, limit) for half in (CHOOSE, REPORT))
        return sorted(position for half in halves for position in half)

    def _product(
        self, interventions: Sequence[PlannedIntervention], tasks: Sequence[str], stage: int, codes: set[str]
    ) -> list[Cell]:
        """Task by task, so that its requests are tokenised once; within it the baseline first."""
        cells: dict[str, Cell] = {}
        for task in self.book.spelled_out(tasks):
            of_task: list[Cell] = []
            defined = False
            for planned in interventions:
                for target in self._targets(planned, task, codes):
                    reason = self.book.why_undefined(task, target)
                    if reason is not None:
                        if planned.is_baseline:
                            self._note(f"left out: {task} steered to {target}: {reason}")
                        continue
                    defined = True
                    if planned.is_baseline and self._is_zero_unsteered(task, target):
                        self._note(f"left out: the unsteered {task}, whose LSS is 0 by definition")
                    else:
                        of_task.append(self._cell(planned, task, target, stage))
            # `then` asks for one language after the other: a task may be undefined for each of them but not for all.
            if not defined and (stage == 1 or codes >= set(self.plan.languages)):
                raise PlanError(f"tasks: {task} is not defined for any of the plan's languages")
            if self.book.is_targeted(task):  # one set of documents after the other
                of_task.sort(key=lambda cell: cell.target or "")
            for cell in of_task:
                cells.setdefault(cell.key, cell)
        return list(cells.values())

    def _is_zero_unsteered(self, task: str, target: str | None) -> bool:
        """Whether the task measures a shift from the unsteered model, which that model cannot have."""
        return self.book.is_targeted(task) and LSS in self.book.task(task, target).aggregation()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _targets(self, planned: PlannedIntervention, task: str, codes: set[str]) -> list[str | None]:
        if not planned.is_baseline:
            return [planned.target]
        return list(sorted(codes)) if self.book.is_targeted(task) else [None]

    def _cell(self, planned: PlannedIntervention, task: str, target: str | None, stage: int) -> Cell:
        plan = self.plan
        items = REPORT if stage == 2 and plan.choose is not None and plan.choose.split == "half" else ALL
        documents = self._documents(task, target, items)
        control = None
        if planned.control is not None:
            control = {"seed": planned.control, "calibration": self.calibration}
        key = fingerprint(
            {
                "model": self.model,
                "neurons": None if planned.is_baseline else self.neuron_set.content_hash(),
                "intervention": planned.resolved,
                "control": control,
                "target": target,
                "task": task,
                "task_is": self.book.digest(task, target),
                "items": items,
                "options": options_of(plan),
                **documents,
            }
        )
        return Cell(key, planned, task, target, items, stage, self.evaluated(task, target))

    def _documents(self, task: str, target: str | None, items: str) -> dict[str, Any]:
        """Which documents of a task are evaluated, and what their few-shot examples are drawn from; for keys."""
        documents = (task, target if self.book.is_targeted(task) else None, items)
        if documents not in self._documents_of:
            plan, built = self.plan, self.book.task(task, target)
            positions = self.positions(task, target, items)
            split = None
            if positions is not None and plan.choose is not None:
                split = {"seed": plan.choose.seed, "item": plan.choose.item}
            chosen = None
            if positions is not None and plan.limit is not None:
                chosen = fingerprint({"documents": [built.eval_docs[position] for position in positions]})
            examples = fewshot_source(built, plan.num_fewshot)
            self._documents_of[documents] = {
                "split": split,
                "documents": chosen,
                "fewshot": None if examples is None else fingerprint(examples),
            }
        return self._documents_of[documents]

    def evaluated(self, task: str, target: str | None = None) -> str | None:
        """Language of a task's items: its metadata first, then its name, then the plan's `evaluated`.

        Raises:
            SteeringError: if the plan says another language than the task.
        """
        metadata = self.book.task(task, target).config.metadata or {}
        stated = metadata.get(EVALUATED_LANGUAGE)
        if not isinstance(stated, str) or "+" in stated:
            return evaluated_language(task, self.plan.evaluated)
        code = languages.normalise(stated)
        planned = self.plan.evaluated.get(task, code)
        if not languages.same_language(planned, code):
            raise PlanError(f"evaluated: {{{task}: {planned}}}: the task's metadata say {code}; leave it out")
        return code


def _name_without_control(planned: PlannedIntervention) -> str:
    """Of a control: the name of the intervention that it is the control of."""
    return planned.name if planned.control is None else planned.name.removesuffix(f"-random{planned.control}")


def group_of(planned: PlannedIntervention, plan: SweepPlan) -> str:
    """What one intervention is chosen for."""
    assert plan.choose is not None
    language = "+".join(planned.languages)
    return language if plan.choose.by == "language" else f"{language}, intervention {planned.entry}"


def spell_out(plan: SweepPlan) -> Grid:
    """All cells of a plan's first stage. Neither the model nor any of its weights is loaded.

    Raises:
        SteeringError: for anything that would make a cell fail later and can be known now.
    """
    neuron_set = NeuronSet.load(resources.find_neuron_set(plan.neurons))
    interventions, notes = interventions_of(plan, neuron_set)
    grid = Grid(plan, TaskBook(plan), neuron_set, interventions, notes=notes)
    codes = {code for planned in interventions for code in planned.languages}
    _check_evaluated(grid)
    grid.cells = grid._product(interventions, plan.tasks, 1, codes)
    return grid


def _check_evaluated(grid: Grid) -> None:
    """Refuse `evaluated` of tasks that the plan does not have."""
    plan = grid.plan
    names = grid.book.spelled_out(plan.tasks + (plan.then.tasks if plan.then else ()))
    if unknown := [task for task in plan.evaluated if task not in names]:
        raise PlanError(f"evaluated: {unknown[0]} is not among the plan's tasks{did_you_mean(unknown[0], names)}")


def options_of(plan: SweepPlan) -> dict[str, Any]:
    """How lm-eval is asked to evaluate."""
    names = {"limit", "num_fewshot", "apply_chat_template", "system_instruction", "gen_kwargs", "bootstrap_iters"}
    return plan.model_dump(mode="json", include=names | {"metadata"})


def calibration_source(plan: SweepPlan) -> str:
    """Where the text is that measures the controls, with `demo` spelled out."""
    named = str(plan.controls.calibration)
    return str(resources.demo_calibration()) if named == "demo" else named


def model_arguments(plan: SweepPlan) -> dict[str, Any]:
    """Arguments of the model class, with `demo` spelled out."""
    arguments = plan.model.model_dump(exclude_none=True)
    if arguments["pretrained"] == "demo":
        arguments["pretrained"] = str(resources.demo_model())
    return arguments


def declared_model(plan: SweepPlan) -> dict[str, Any]:
    """What names a model before it is loaded: the hub's commit, or its files' names, sizes and ends.

    Raises:
        SteeringError: if there is no such model.
    """
    arguments = model_arguments(plan)
    read_config(arguments["pretrained"], arguments)
    folder = Path(arguments.pop("pretrained"))
    deciding = {key: value for key, value in arguments.items() if key not in _IRRELEVANT}
    if folder.is_dir():
        return {"name": folder.name, "files": _files_digest(folder), **deciding}
    commit = commit_of(plan.model.pretrained, str(arguments.get("revision") or "main"), arguments.get("cache_dir"))
    return {"name": plan.model.pretrained, "commit": commit or None, **deciding}


def _declared_engine(plan: SweepPlan) -> dict[str, Any]:
    """Name and deciding arguments of an engine other than `steered-hf`."""
    if plan.engine.name != STEERED_VLLM:
        return {}
    arguments = model_arguments(plan)
    refuse_unknown(model_type_of(read_config(arguments["pretrained"], arguments)))
    deciding = {key: value for key, value in plan.engine.arguments.items() if key not in _PLACE | _IRRELEVANT}
    return {"engine": {"name": plan.engine.name, **deciding}}


def engine_arguments(grid: Grid) -> dict[str, Any]:
    """Arguments of the class that runs the cells."""
    arguments, engine = model_arguments(grid.plan), grid.plan.engine
    if engine.name != STEERED_VLLM:
        return arguments
    neuron_set = grid.neuron_set
    room = {CAPACITY: capacity_of(None, neuron_set, neuron_set.provenance.units)}
    return arguments | {"batch_size": "auto"} | room | dict(engine.arguments)


def _files_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_FILES or path.name.startswith("tokenizer"):
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
        elif path.suffix in _WEIGHTS:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_ENDS))
                file.seek(max(size - _ENDS, 0))
                digest.update(file.read(_ENDS))
    return digest.hexdigest()
