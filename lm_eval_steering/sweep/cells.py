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
from lm_eval_steering.steering.intervention import RESIDUAL, Intervention, Step, from_arguments
from lm_eval_steering.steering.prompt import NATIVE
from lm_eval_steering.sweep import damage_text
from lm_eval_steering.sweep.damage_search import LONGEST, Line
from lm_eval_steering.sweep.halves import ALL, CHOOSE, REPORT, can_be_split, positions_of
from lm_eval_steering.sweep.plan import STEERED_VLLM, InterventionEntry, PlanError, SweepPlan
from lm_eval_steering.sweep.plan_tasks import TaskBook
from lm_eval_steering.vllm.arguments import (
    CAPACITY,
    HIDDEN_STATES,
    capacity_of,
    edits_hidden_states,
    refuse_what_hooks_do,
)
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
        factor: as written in the plan or searched for, None where there is none.
        control: seed of the matched random set that is used instead of the language's neurons; of an instruction the
            number of the other language that it names instead, from 0.
        damage: rises in nats per token that its factor was searched for; empty where it was written in the plan.
        reached: the damage that was measured at that factor.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=lambda: Intervention().model_dump(mode="json"))
    languages: tuple[str, ...] = ()
    entry: int = -1
    factor: float | None = None
    control: int | None = None
    damage: tuple[float, ...] = ()
    reached: float | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is done to the model."""
        return not self.arguments

    @property
    def is_prompt(self) -> bool:
        """Whether it is an instruction, which needs no neurons."""
        return "instruction" in self.arguments

    @property
    def target(self) -> str | None:
        """Languages that it steers to, joined by `+`."""
        return "+".join(self.languages) or None


@dataclass(frozen=True)
class Search:
    """A search for the factors of one entry on one language, or on a random control of it.

    An instruction has no factor: its damage is measured at its one point, which counts as factor 1, beside the damages
    that other entries' factors are searched for.

    Attributes:
        entry: position in the plan's `interventions`.
        language: steered one.
        control: seed of the random set; None for the language's own neurons.
        line: the factors.
        targets: damages in nats per token; none for an instruction.
        name: readable, and unique within the plan.
    """

    entry: int
    language: str
    control: int | None
    line: Line
    targets: tuple[float, ...]
    name: str

    @property
    def key(self) -> tuple[int, str, int | None]:
        """Entry, language, control."""
        return self.entry, self.language, self.control

    @property
    def is_single(self) -> bool:
        """Whether there is one point to measure, and nothing to search for."""
        return not self.targets


SINGLE = 1.0  # the factor of an intervention that has none, where its damage is measured


@dataclass(frozen=True)
class FoundFactor:
    """A factor that was searched for, or the one point of an instruction.

    Attributes:
        factor: of three digits.
        targets: damages that it was searched for, in nats per token.
        damage: that was measured at it; None while the factor is a stand-in for one that is not known yet.
    """

    factor: float
    targets: tuple[float, ...]
    damage: float | None = None


Found = Mapping[tuple[int, str, int | None], Sequence[FoundFactor]]  # by `Search.key`
_Single = tuple[str, PlannedIntervention]  # with its signature


def searches_of(plan: SweepPlan, neuron_set: NeuronSet) -> list[Search]:
    """Every search that a plan asks for, in its order.

    Raises:
        PlanError: for an intervention that does something at every factor.
    """
    searches: list[Search] = []
    seeds = [None, *(range(plan.controls.random) if "damage" in plan.controls.at else ())]
    for number, entry in enumerate(plan.interventions):
        if entry.prompt is not None and entry.prompt.instruction and plan.searches:
            for language in entry.languages or plan.languages:
                searches.append(Search(number, language, None, Line(0.0, SINGLE), (), f"{number}-{language}-prompt"))
        if entry.damage is None:
            continue
        for language in entry.languages or plan.languages:
            line = _line(plan, number, entry, language, neuron_set)
            name = "-".join(
                part for part in (language, entry.preset or entry.op, str(entry.value or ""), entry.site) if part
            )
            for seed in seeds:
                ending = "" if seed is None else f"-random{seed}"
                name_ = re.sub(r"[^A-Za-z0-9_.+-]", "_", f"{number}-{name}{ending}")
                searches.append(Search(number, language, seed, line, tuple(map(float, entry.damage.damage)), name_))
    return searches


def _line(plan: SweepPlan, number: int, entry: InterventionEntry, language: str, neuron_set: NeuronSet) -> Line:
    """The factors of an entry, from the one that changes nothing."""
    assert entry.damage is not None
    _, intervention = _planned(plan, number, entry, language, 2.0, neuron_set)
    step = intervention.steps[-1]
    identity = {"scale": 1.0, "add": 0.0}.get(step.op)
    if identity is None or len(intervention.steps) != 1 or (step.op == "scale" and step.value is not None):
        raise PlanError(
            f"interventions.{number}.factors: {entry.preset or entry.op} changes something at every factor, so there "
            "is none to search from; damage needs scale or add, and other operations a list of factors"
        )
    last = entry.damage.max_factor
    line = Line(identity, identity + LONGEST if last is None else float(last))
    if line.length == 0:
        raise PlanError(f"interventions.{number}.factors.max_factor: {last} changes nothing; expected another factor")
    return line


def planned_at(plan: SweepPlan, neuron_set: NeuronSet, search: Search, factor: float) -> PlannedIntervention:
    """The intervention of a search at one factor."""
    entry = plan.interventions[search.entry]
    planned, _ = _planned(plan, search.entry, entry, search.language, None if search.is_single else factor, neuron_set)
    return planned if search.control is None else _control(planned, search.control)


def _stand_ins(search: Search) -> list[FoundFactor]:
    """Factors of which only the number is right, for a plan whose factors are not searched for yet."""
    if search.is_single:
        return [FoundFactor(SINGLE, ())]
    line, number = search.line, len(search.targets)
    shrunk = line.length * (1.0 if search.control is None else 1 - (search.control + 1) / 1000)
    sign = 1 if line.last > line.identity else -1
    return [
        FoundFactor(line.identity + sign * shrunk * (place + 1) / (number + 1), (target,))
        for place, target in enumerate(search.targets)
    ]


def interventions_of(
    plan: SweepPlan, neuron_set: NeuronSet, searches: Sequence[Search] = (), found: Found | None = None
) -> tuple[list[PlannedIntervention], list[str]]:
    """The baseline, then every intervention of the plan, then their controls; and notes on what collapsed.

    The controls of an intervention on neurons are random sets; those of an instruction name other languages.

    Args:
        plan: as the user wrote it.
        neuron_set: of the plan.
        searches: of the plan.
        found: what they found; None where they were not made yet.

    Raises:
        SteeringError: if an intervention is not defined for this neuron set; nothing was loaded.
    """
    notes: list[str] = []
    factors = {search.key: _stand_ins(search) if found is None else found.get(search.key, ()) for search in searches}
    own: dict[str, PlannedIntervention] = {}
    for number, entry in enumerate(plan.interventions):
        for planned, intervention in _from_entry(plan, number, entry, neuron_set, factors):
            if _changes_nothing(intervention):
                notes.append(f"{planned.name} changes nothing: it is the baseline")
            else:  # two entries that mean the same are one intervention
                _merge(own, intervention.signature(), planned)
    at_damage = [
        (seed, *_at(plan, number, language, each, neuron_set))
        for (number, language, seed), of_search in factors.items() if seed is not None for each in of_search
    ]  # fmt: skip
    named = _with_unique_names([*own.items(), *((signature, planned) for _, signature, planned in at_damage)])
    interventions = [replace(planned, name=named[signature, planned.name]) for signature, planned in own.items()]
    if plan.controls.random and plan.controls.calibration is None:
        for planned in interventions:
            _refuse_unmeasured(planned)
    controls: dict[tuple[str, int], PlannedIntervention] = {}
    for signature, planned in zip(own, interventions, strict=True):
        if planned.is_prompt:
            named_instead = _naming_others(plan, planned, neuron_set)
            controls |= {(signature, number): control for number, control in enumerate(named_instead)}
            if len(named_instead) < plan.controls.random:
                notes.append(
                    f"{planned.name}: {len(named_instead)} of {plan.controls.random} controls: its instruction can "
                    "name no more other languages of the plan or the neuron set"
                )
            continue
        searched = plan.interventions[planned.entry].damage is not None
        for seed in range(plan.controls.random if "factor" in plan.controls.at or not searched else 0):
            controls[signature, seed] = _control(planned, seed)
    for seed, signature, planned in at_damage:
        _merge(
            controls, (signature, seed), _control(replace(planned, name=named[signature, planned.name]), seed, planned)
        )
    return [PlannedIntervention(BASELINE), *interventions, *controls.values()], notes


def _merge(known: dict[Any, PlannedIntervention], key: Any, planned: PlannedIntervention) -> None:
    """Add an intervention; one that is known already serves the new one's damages too."""
    before = known.setdefault(key, planned)
    if before is not planned and planned.damage:
        damages = tuple(sorted({*before.damage, *planned.damage}))
        known[key] = replace(before, damage=damages, reached=planned.reached)


def _at(
    plan: SweepPlan, number: int, language: str, found: FoundFactor, neuron_set: NeuronSet
) -> tuple[str, PlannedIntervention]:
    planned, intervention = _planned(plan, number, plan.interventions[number], language, found.factor, neuron_set)
    return intervention.signature(), replace(planned, damage=found.targets, reached=found.damage)


def _with_unique_names(planned: Sequence[_Single]) -> dict[tuple[str, str], str]:
    """(signature, short name) -> name; where short names leave out how two of them differ, a hash is appended."""
    pairs = {(signature, each.name) for signature, each in planned}
    count = Counter(name for _, name in pairs)
    return {
        (signature, name): name if count[name] == 1 else f"{name}-{_short_hash(signature)}" for signature, name in pairs
    }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _from_entry(
    plan: SweepPlan, number: int, entry: InterventionEntry, neuron_set: NeuronSet, searched: Found
) -> Iterator[tuple[PlannedIntervention, Intervention]]:
    targets = (entry.languages or plan.languages) if entry.steers else (None,)
    for language in targets:
        if entry.damage is not None:
            for found in searched.get((number, str(language), None), ()):
                planned, intervention = _planned(plan, number, entry, language, found.factor, neuron_set)
                yield replace(planned, damage=found.targets, reached=found.damage), intervention
            continue
        if entry.prompt is not None:
            planned, intervention = _planned(plan, number, entry, language, None, neuron_set)
            measured = searched.get((number, str(language), None), ())
            yield replace(planned, reached=measured[0].damage if measured else None), intervention
            continue
        for factor in entry.factors if isinstance(entry.factors, tuple) else (entry.factor,):
            yield _planned(plan, number, entry, language, factor, neuron_set)


def _planned(
    plan: SweepPlan,
    number: int,
    entry: InterventionEntry,
    language: str | None,
    factor: float | None,
    neuron_set: NeuronSet,
) -> tuple[PlannedIntervention, Intervention]:
    """One intervention of an entry."""
    arguments = entry.arguments
    if language is not None:
        arguments["language"] = language
    if factor is not None:
        arguments["factor"] = float(factor)
    try:
        intervention = from_arguments(arguments)
        if intervention.prompt is None:
            compiled = compile_intervention(intervention, neuron_set, plan.allow_empty)
            if plan.engine.name == STEERED_VLLM:
                refuse_what_hooks_do(compiled)
            intervention = compiled.intervention
    except SteeringError as error:
        raise PlanError(f"interventions.{number}: {error}") from None
    planned = PlannedIntervention(
        _name(intervention, entry, factor), arguments, intervention.model_dump(mode="json"),
        intervention.steered, number, None if factor is None else float(factor),
    )  # fmt: skip
    return planned, intervention


def _naming_others(plan: SweepPlan, planned: PlannedIntervention, neuron_set: NeuronSet) -> list[PlannedIntervention]:
    """Controls of an instruction: the same one naming other languages, the next ones of the plan first."""
    entry, (target,) = plan.interventions[planned.entry], planned.languages
    known = plan.languages
    after = known.index(target) + 1 if target in known else 0
    controls: dict[str, PlannedIntervention] = {}
    for language in dict.fromkeys([*known[after:], *known[:after], *neuron_set.languages]):
        if len(controls) == plan.controls.random or languages.same_language(language, target):
            continue
        try:
            other, intervention = _planned(plan, planned.entry, entry, language, None, neuron_set)
        except PlanError:  # its name is not known
            continue
        assert intervention.prompt is not None
        text = intervention.prompt.instruction
        if text != planned.resolved["prompt"]["instruction"] and text not in controls:
            controls[text] = replace(
                other, name=f"{planned.name}{_naming(language)}", languages=planned.languages, control=len(controls)
            )
    return list(controls.values())


def _naming(language: str) -> str:
    """End of the name of a control that names another language."""
    return f"-naming-{language}"


def _changes_nothing(intervention: Intervention) -> bool:
    if intervention.prompt is not None:
        return not intervention.prompt.instruction
    return all(_is_identity(step) for step in intervention.steps)


def _is_identity(step: Step) -> bool:
    if step.op == "scale":
        return step.value is None and step.factor == 1
    return step.op == "add" and (step.factor == 0 or step.value == 0)


def _refuse_unmeasured(planned: PlannedIntervention) -> None:
    """A neuron set holds statistics of its neurons alone."""
    for step in planned.resolved["steps"]:
        value = step["value"]
        if step["site"] == RESIDUAL:  # whose random directions are made of the set's own means
            continue
        if isinstance(value, str) and not value.startswith("live_") and value != "normal":
            raise PlanError(
                f"controls.random: {planned.name} needs the statistic {value!r} of random neurons, and a neuron set "
                "has statistics of its neurons alone; name a text to measure them, controls: {random: "
                "..., calibration: CORPUS}, or use numbers as values"
            )


def _control(
    planned: PlannedIntervention, seed: int, searched: PlannedIntervention | None = None
) -> PlannedIntervention:
    """The same with random neurons, whose damage is not known unless its factor was searched for."""
    damage, reached = (searched.damage, searched.reached) if searched else ((), None)
    return replace(planned, name=f"{planned.name}-random{seed}", control=seed, damage=damage, reached=reached)


def _deactivated(intervention: Intervention, entry: InterventionEntry) -> str:
    """Of an intervention that steers to no language: the languages that it deactivates."""
    silenced = dict.fromkeys(code for step in intervention.steps for code in step.languages)
    languages = entry.deactivate if entry.deactivate == "others" else "+".join(silenced)
    return languages if entry.preset else f"{languages}-deactivate"


def _name(intervention: Intervention, entry: InterventionEntry, factor: float | None) -> str:
    """Such as `fra_Latn-add-mean-x4-product` or `fra_Latn-deactivate`; for people, and never read back."""
    if intervention.prompt is not None:
        prompt = intervention.prompt
        return "-".join([prompt.language, "prompt", *(["native"] if prompt.names == NATIVE else []),
                         *(["system"] if prompt.system else [])])  # fmt: skip
    parts = ["+".join(intervention.steered) or _deactivated(intervention, entry)]
    parts += [entry.preset] if entry.preset else [entry.op] if entry.op else []
    parts += [f"{entry.value}"] if entry.value is not None else []
    parts += [f"x{factor:g}"] if factor is not None else []
    parts += [f"without-{entry.deactivate}"] if entry.deactivate and intervention.steered else []
    parts += [f"to-{entry.deactivate_to}"] if entry.deactivate_to is not None else []
    parts += [f"from-{entry.source}"] if entry.source is not None else []
    parts += [entry.site] if entry.site is not None else []
    parts += [f"dims{entry.dimensions}"] if entry.dimensions is not None else []
    parts += [str(part) for part in (entry.layers, entry.positions) if part is not None]
    text = "-".join(str(part) for part in parts).replace("=", "set_").replace("*", "times_")
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)[:80]


_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".py")  # config, tokenizer, chat template, the model's own code
_IRRELEVANT = {"batch_size", "max_batch_size", "device", "parallelize", "max_memory_per_gpu", "max_cpu_memory"}
# Arguments of an engine that say where and how fast it runs, and not what it answers.
_PLACE = {
    "tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "gpu_memory_utilization",
    "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching", "disable_log_stats", CAPACITY,
    HIDDEN_STATES,
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
        stage: 1, 2 for cells of `then`, or 0 for those that measure damage while factors are searched for.
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
        lists = {name: tuple(fields.get(name, ())) for name in ("languages", "damage")}
        planned = PlannedIntervention(**fields | lists)
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
        searches: for factors of equal damage, before the first stage.
        found: what they found; None before, when `interventions` and `cells` hold stand-ins for what they will find.
        searched: cells of the searches that found it.
        cells: of the first stage, in the order in which they are run.
        notes: what a user should know: factors that collapsed, cells that are not defined.
    """

    plan: SweepPlan
    book: TaskBook
    neuron_set: NeuronSet
    interventions: list[PlannedIntervention]
    searches: list[Search] = field(default_factory=list)
    found: Found | None = None
    searched: list[Cell] = field(default_factory=list)
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

    @property
    def is_open(self) -> bool:
        """Whether factors are still to be searched for."""
        return bool(self.searches) and self.found is None

    def with_factors(self, found: Found, searched: Iterable[Cell], notes: Iterable[str]) -> Grid:
        """The grid at the factors that were searched for."""
        interventions, collapsed = interventions_of(self.plan, self.neuron_set, self.searches, found)
        grid = replace(
            self,
            interventions=interventions,
            found=found,
            searched=list(searched),
            cells=[],
            notes=[*collapsed, *notes],
        )
        grid.cells = grid._product(interventions, self.plan.tasks, 1, grid._codes())
        return grid

    def damage_cell(self, search: Search, factor: float | None) -> Cell:
        """The cell that measures a search's damage at one factor; of the unsteered model where that is None."""
        planned = PlannedIntervention(BASELINE)
        if factor is not None:
            planned = planned_at(self.plan, self.neuron_set, search, factor)
        return self._cell(planned, damage_text.TASK, search.language, 0)

    def _codes(self) -> set[str]:
        steered = {code for planned in self.interventions for code in planned.languages}
        return steered | {search.language for search in self.searches}

    def then_cells(self, chosen: Iterable[PlannedIntervention], languages: Iterable[str] = ()) -> list[Cell]:
        """Cells of `then` for some chosen interventions: those, their random controls, and the baseline.

        Args:
            chosen: interventions; none where the baseline was chosen.
            languages: for which the baseline of tasks made for a language is evaluated too.
        """
        if self.plan.then is None:
            return []
        chosen = list(chosen)
        names = {planned.name for planned in chosen}
        evaluated = [
            planned
            for planned in self.interventions
            if planned.is_baseline
            or _name_without_control(planned) in names
            or any(_is_control_at_damage_of(planned, other) for other in chosen)
        ]
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
        if task == damage_text.TASK:
            return None
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
        if planned.control is not None and not planned.is_prompt:
            control = {"seed": planned.control, "calibration": self.calibration}
        key = fingerprint(
            {
                "model": self.model,
                "neurons": None if planned.is_baseline or planned.is_prompt else self.neuron_set.content_hash(),
                "intervention": planned.resolved,
                "control": control,
                "target": target,
                "task": task,
                "task_is": self.book.digest(task, target),
                "items": items,
                "options": options_of(plan, stage),
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
            examples = fewshot_source(built, 0 if task == damage_text.TASK else plan.num_fewshot)
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
    if planned.control is None:
        return planned.name
    if planned.is_prompt:
        return planned.name.removesuffix(_naming(planned.arguments["language"]))
    return planned.name.removesuffix(f"-random{planned.control}")


def _is_control_at_damage_of(control: PlannedIntervention, planned: PlannedIntervention) -> bool:
    """Whether a control's factor was searched for to do the damage that an intervention's was."""
    same = (control.entry, control.languages) == (planned.entry, planned.languages)
    return control.control is not None and same and not set(control.damage).isdisjoint(planned.damage)


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
    neuron_set = NeuronSet.load(plan.neurons)
    searches = searches_of(plan, neuron_set)
    interventions, notes = interventions_of(plan, neuron_set, searches)
    grid = Grid(plan, TaskBook(plan), neuron_set, interventions, searches, notes=notes)
    _check_evaluated(grid)
    grid.cells = grid._product(interventions, plan.tasks, 1, grid._codes())
    if searches:
        _add_damage_tasks(grid)
    return grid


def _add_damage_tasks(grid: Grid) -> None:
    """The text that damage is measured on, as a task of lm-eval for each language whose factors are searched for."""
    plan, model = grid.plan, model_arguments(grid.plan)
    cells = [*grid.cells, *grid.then_cells(grid.candidates(), grid._codes())]
    tasks = dict.fromkeys((cell.task, cell.target if grid.book.is_targeted(cell.task) else None) for cell in cells)
    items = {text for name in tasks for text in damage_text.texts_of(grid.book.task(*name).eval_docs)}
    text = damage_text.DamageText(
        plan.damage, grid.neuron_set, plan.controls.calibration, plan.controls.sentences, model
    )
    for language in dict.fromkeys(search.language for search in grid.searches):
        task = damage_text.task_of(text.lines(language, items), language, model)
        grid.book.add(damage_text.TASK, language, task)


def _check_evaluated(grid: Grid) -> None:
    """Refuse `evaluated` of tasks that the plan does not have."""
    plan = grid.plan
    names = grid.book.spelled_out(plan.tasks + (plan.then.tasks if plan.then else ()))
    if unknown := [task for task in plan.evaluated if task not in names]:
        raise PlanError(f"evaluated: {unknown[0]} is not among the plan's tasks{did_you_mean(unknown[0], names)}")


def options_of(plan: SweepPlan, stage: int = 1) -> dict[str, Any]:
    """How lm-eval is asked to evaluate; damage is measured on bare text, whatever the plan's prompts are."""
    names = {"limit", "num_fewshot", "apply_chat_template", "system_instruction", "gen_kwargs", "bootstrap_iters"}
    options = plan.model_dump(mode="json", include=names | {"metadata"})
    if stage == 0:
        bare = {"limit": None, "num_fewshot": None, "apply_chat_template": False, "system_instruction": None}
        options |= bare | {"gen_kwargs": None, "metadata": {}}
    return options


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
    room |= {HIDDEN_STATES: edits_hidden_states(None, neuron_set)}
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
