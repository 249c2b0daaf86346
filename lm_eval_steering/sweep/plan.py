"""The plan file: what a user writes down to have a grid of interventions and tasks evaluated.

Every key is a field of one of these classes, and its description is the documentation (`docs/sweep.md`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from lm_eval_steering import languages as codes
from lm_eval_steering.errors import SteeringError, did_you_mean
from lm_eval_steering.files import expand_home, read_yaml
from lm_eval_steering.lmeval.aggregation import BOOTSTRAPS
from lm_eval_steering.steering.intervention import ARGUMENTS
from lm_eval_steering.steering.prompt import ENGLISH, PLACEHOLDER, check_instruction

Number = float | int
STEERED_HF: Literal["steered-hf"] = "steered-hf"
STEERED_VLLM: Literal["steered-vllm"] = "steered-vllm"
DEFAULT_METRIC = "lfs_clean"  # what `choose` compares where the plan has a generation task that measures it


class PlanError(SteeringError):
    """A plan file that cannot be read, or asks for something that is not defined."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(BaseModel):
    """The model, in lm-eval's words. Other keys are arguments of `--model hf`; they are checked before it is loaded."""

    model_config = ConfigDict(extra="allow", frozen=True)

    pretrained: str = Field(description="Hub id or folder; `demo` is the model that ships (`./demo` a folder).")
    dtype: str | None = Field(None, description="Of the weights; the checkpoint's by default.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    batch_size: int | str = Field(8, description="Rows per forward pass, or auto; halved where memory runs out.")
    enable_thinking: bool | None = Field(None, description="Whether the chat template lets the model think first.")
    think_end_token: str | int | None = Field(
        None, description="What ends a thought, such as `</think>`; needed with `enable_thinking`."
    )

    @model_validator(mode="after")
    def _thoughts_end(self) -> ModelPart:
        if self.enable_thinking and self.think_end_token is None:
            raise ValueError("enable_thinking without think_end_token: say what ends a thought, such as </think>")
        return self

    @field_validator("pretrained")
    @classmethod
    def _expand(cls, path: str) -> str:
        return expand_home(path)


class DamageFactors(_Part):
    """Factors that are searched for: those that do a certain damage to the steered language's own text."""

    damage: tuple[Number, ...] = Field(
        min_length=1, description="Instead of factors: the rises in nats per token that they are searched for."
    )
    max_factor: Number | None = Field(
        None,
        description="End of the search, which goes towards it from the factor that changes nothing; by default 64 "
        "above that.",
    )

    @field_validator("damage")
    @classmethod
    def _rises(cls, damage: tuple[Number, ...]) -> tuple[Number, ...]:
        for rise in damage:
            if not (math.isfinite(rise) and rise > 0):
                raise ValueError(f"{rise}: expected a finite rise in nats per token, above 0")
        return tuple(sorted(set(damage)))

    @field_validator("max_factor")
    @classmethod
    def _finite(cls, factor: Number | None) -> Number | None:
        if factor is not None and not math.isfinite(factor):
            raise ValueError(f"{factor}: expected a finite factor")
        return factor


_LISTED, _SEARCHED = "<listed>", "<searched>"  # kinds of `factors`; error messages leave them out
Factors = Annotated[
    Annotated[tuple[Number, ...], Tag(_LISTED)] | Annotated[DamageFactors, Tag(_SEARCHED)],
    Discriminator(lambda factors: _SEARCHED if isinstance(factors, Mapping | DamageFactors) else _LISTED),
]


class PromptEntry(_Part):
    """An instruction in front of every prompt, instead of steered neurons."""

    instruction: str = Field(
        description="Such as `Answer in {language}.`, with the language's name in place of `{language}`."
    )
    names: Literal["english", "native"] = Field(
        "english", description="Language names in English, or in the language itself."
    )
    system: bool = Field(False, description="As system instruction of the chat template; needs `apply_chat_template`.")

    @field_validator("instruction")
    @classmethod
    def _known_names(cls, instruction: str) -> str:
        return check_instruction(instruction)


class InterventionEntry(_Part):
    """One kind of intervention, for every language of the plan and every factor."""

    prompt: PromptEntry | None = Field(None, description="An instruction instead of op (docs/prompting.md).")

    op: str | None = Field(None, description="`scale`, `add` or `set`.")
    value: Number | str | None = Field(None, description="A number or a statistic, for `add` and `set`.")
    preset: str | None = Field(None, description="A paper's name for op, value and scope, such as p_max.")
    factors: Factors | None = Field(
        None, description="Factors to sweep over; or `{damage: [0.1, 0.3, 1.0]}`, which searches for them."
    )
    factor: Number | None = Field(None, description="One factor; 1 by default.")
    languages: tuple[str, ...] | None = Field(None, min_length=1, description="Instead of the plan's.")
    deactivate: str | None = Field(None, description="Languages to silence, joined by +, or others.")
    deactivate_to: Number | str | None = Field(None, description="What they are set to; 0 by default.")
    keep_shared: bool | None = Field(None, description="False silences neurons that are steered too.")
    source: str | None = Field(None, description="Of clas_diffmean: the language to steer away from.")
    site: str | None = Field(None, description="`activation`, `product` or `residual`.")
    dimensions: int | None = Field(None, description="Of residual: the top dimensions of each layer; all by default.")
    layers: str | int | None = Field(None, description="Ranges such as 0-3+28-31.")
    positions: str | None = Field(None, description="`all`, `prompt`, `generated`, `last`, or a window.")
    scope: str | None = Field(None, description="Of a live statistic: `token` or `sequence`.")
    seed: int | None = Field(None, description="Of random values.")

    @model_validator(mode="after")
    def _prompt_alone(self) -> InterventionEntry:
        if self.prompt is None:
            return self
        if other := list(self.model_dump(exclude={"prompt", "languages"}, exclude_none=True)):
            raise ValueError(
                f"{other[0]} conflicts with prompt, which changes no neurons and has no factor: give it an entry of "
                "its own"
            )
        text = self.prompt.instruction
        if text and PLACEHOLDER not in text and len(self.languages or ()) != 1:
            raise ValueError(
                f"prompt.instruction: {text!r} is the same for every language: write {PLACEHOLDER} where the name of "
                "the language belongs, or name one language in languages"
            )
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """Model arguments, but for the language and the factor."""
        if self.prompt is None:
            return self.model_dump(exclude={"factors", "factor", "languages"}, exclude_none=True)
        prompt = self.prompt
        named = {"instruction_names": prompt.names} if prompt.names != ENGLISH else {}
        return {"instruction": prompt.instruction, **named, **({"instruction_system": True} if prompt.system else {})}

    @property
    def steers(self) -> bool:
        """Whether it steers to a language, and does not only silence some."""
        return self.op is not None or self.preset is not None or self.prompt is not None

    @model_validator(mode="after")
    def _consistent(self) -> InterventionEntry:
        if self.factor is not None and self.factors is not None:
            raise ValueError("factor conflicts with factors: write one of the two")
        if self.factors == ():
            raise ValueError("factors: expected one at least, got none")
        if self.damage is not None and self.deactivate is not None:
            raise ValueError(
                "factors: {damage: ...} conflicts with deactivate, which does damage at every factor; "
                "write the factors, or leave deactivate out"
            )
        if not self.steers and self.deactivate is None:
            raise ValueError("expected op, preset, deactivate or prompt: it would do nothing")
        return self

    @property
    def damage(self) -> DamageFactors | None:
        """The damage that its factors are searched for; None where they are written in the plan."""
        return self.factors if isinstance(self.factors, DamageFactors) else None

    @field_validator("languages")
    @classmethod
    def _normalise(cls, languages: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _normalised(languages) if languages else None

    @field_validator("languages", "deactivate", mode="before")
    @classmethod
    def _no_booleans(cls, languages: Any) -> Any:
        return _refuse_false(languages)


class ControlsPart(_Part):
    """Matched random neuron sets; every intervention of the plan is repeated with each of them."""

    random: int = Field(
        0,
        ge=0,
        description="Number of sets; their seeds are 0, 1, ... Of a prompt: number of other languages that its "
        "instruction names instead.",
    )
    calibration: str | None = Field(
        None,
        description="Text that measures the random neurons (docs/corpora.md; `demo` is the text that ships); needed "
        "where an intervention's value is a calibrated statistic.",
    )
    sentences: int = Field(100, gt=0, description="Calibration sentences per language.")
    at: tuple[Literal["factor", "damage"], ...] = Field(
        ("factor",),
        min_length=1,
        description="Where an intervention's factors are searched for: `factor` repeats them, `damage` searches for "
        "factors at which the random neurons do the same damage; or both.",
    )

    @field_validator("calibration")
    @classmethod
    def _expand(cls, path: str | None) -> str | None:
        return expand_home(path)


class DamagePart(_Part):
    """The text on which `factors: {damage: ...}` is measured: of the steered language, and in no task of the plan."""

    text: str | None = Field(
        None,
        description="Where it is (docs/corpora.md; `demo` is the text that ships); by default the text that the neuron "
        "set was calibrated on, beyond its calibration sentences, where `controls.calibration` or `demo` is that text.",
    )
    sentences: int = Field(100, gt=0, description="Number of its lines per language.")

    @field_validator("text")
    @classmethod
    def _expand(cls, path: str | None) -> str | None:
        return expand_home(path)


class Choose(_Part):
    """How to choose one intervention for each language, before `then`."""

    metric: str | None = Field(
        None,
        description="Name of the metric; its mean over the tasks that have it is compared. By default `lfs_clean`, "
        "where a task to choose on has it.",
    )
    at_most: Mapping[str, Number] = Field(
        default_factory=dict,
        description="Largest allowed rise over the baseline on the items to choose on, by metric, such as "
        "`{degenerate: 0.1, nats_per_token: 0.5}`; if no candidate is within them, the baseline is chosen.",
    )
    by: Literal["language", "intervention"] = Field(
        "language", description="`language`: one for each language; `intervention`: one factor for each entry too."
    )
    split: Literal["half", "whole"] = Field(
        "half", description="`half`: chosen on one half of the source items, reported on the other; or `whole`."
    )
    tasks: tuple[str, ...] | None = Field(
        None, description="Tasks whose scores decide; by default all that have the metric."
    )
    goal: Literal["max", "min"] | None = Field(
        None, description="`max` or `min`; by default the direction that the task declares as better."
    )
    seed: int = Field(0, ge=0, description="Of the split.")
    item: str | None = Field(
        None,
        description="Field of a document that names its source item in all languages; by default the first of id, "
        "idx, question_id, item_id. `doc_id` takes its position.",
    )

    @field_validator("at_most")
    @classmethod
    def _rises(cls, at_most: Mapping[str, Number]) -> Mapping[str, Number]:
        for metric, rise in at_most.items():
            if not (math.isfinite(rise) and rise >= 0):
                raise ValueError(f"{metric}: {rise}: expected a finite rise over the baseline, 0 or more")
        return at_most


class Then(_Part):
    """The second stage: what only the chosen interventions are evaluated on."""

    tasks: tuple[str, ...] = Field(min_length=1, description="Tasks, groups or tags of lm-eval.")


class Slurm(_Part):
    """What `--launcher submitit` asks the scheduler for."""

    partition: str | None = Field(None, description="Name of the partition.")
    gpus: int = Field(
        1,
        ge=0,
        description="GPUs per job, one process each; with `steered-vllm` the tensor-parallel size, unless its "
        "arguments give another.",
    )
    cpus: int = Field(8, ge=1, description="CPU cores per GPU.")
    memory_gb: int | None = Field(None, gt=0, description="Memory per job.")
    minutes: int = Field(240, gt=0, description="Time limit per job.")
    shards: int = Field(1, gt=0, description="Jobs that the plan is divided among; `--workers` overrides it.")
    parallel: int = Field(16, gt=0, description="Jobs that run at the same time.")
    account: str | None = Field(None, description="Account to charge.")
    setup: tuple[str, ...] = Field((), description="Shell lines before the job, such as `module load cuda`.")
    more: Mapping[str, Any] = Field(default_factory=dict, description="Other options of sbatch.")


class Engine(_Part):
    """What runs the cells."""

    name: Literal["steered-hf", "steered-vllm"] = Field(STEERED_HF, description="`steered-hf` or `steered-vllm`.")
    arguments: Mapping[str, Any] = Field(
        default_factory=dict, description="Of `steered-vllm`, such as `tensor_parallel_size` (docs/vllm.md)."
    )


class SweepPlan(_Part):
    """A whole plan."""

    model: ModelPart = Field(description="Which model.")
    neurons: str = Field(description="Its neuron set, a path or the name of one that ships.")
    languages: tuple[str, ...] = Field(min_length=1, description="Languages to steer to.")
    interventions: tuple[InterventionEntry, ...] = Field(min_length=1, description="What is done to their neurons.")
    tasks: tuple[str, ...] = Field(min_length=1, description="Tasks, groups or tags of lm-eval.")
    controls: ControlsPart = Field(
        default_factory=lambda: ControlsPart.model_validate({}), description="Random controls."
    )
    damage: DamagePart = Field(
        default_factory=lambda: DamagePart.model_validate({}), description="What damage is measured on."
    )
    choose: Choose | None = Field(None, description="Choose a factor.")
    then: Then | None = Field(None, description="Evaluate the chosen ones elsewhere.")
    engine: Engine = Field(
        default_factory=lambda: Engine.model_validate({}), description="What runs the cells; a name is enough."
    )
    evaluated: Mapping[str, str] = Field(
        default_factory=dict,
        description="Task -> language of its items, for tasks whose metadata and name do not say it (docs/tasks.md).",
    )
    limit: int | None = Field(
        None, gt=0, description="First items of each task, with `split: half` of each half; all by default."
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples in the prompt; the task's own by default.")
    apply_chat_template: bool = Field(False, description="Put prompts into the tokenizer's chat template.")
    system_instruction: str | None = Field(None, description="For the chat template.")
    gen_kwargs: Mapping[str, Any] | None = Field(None, description="Arguments of generation that override the task's.")
    bootstrap_iters: int = Field(BOOTSTRAPS, ge=0, description="Of standard errors that are not analytic; lm-eval's.")
    include_path: tuple[str, ...] = Field((), description="Folders with more task files.")
    metadata: Mapping[str, Any] = Field(default_factory=dict, description="For the tasks, such as data_dir.")
    allow_empty: bool = Field(False, description="Accept a language without neurons.")
    force: bool = Field(False, description="Use a neuron set that was found in other weights.")
    slurm: Slurm = Field(default_factory=lambda: Slurm.model_validate({}), description="Resources of the SLURM jobs.")

    @field_validator("languages")
    @classmethod
    def _normalise(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        return _normalised(languages)

    @field_validator("languages", mode="before")
    @classmethod
    def _no_booleans(cls, languages: Any) -> Any:
        return _refuse_false(languages)

    @field_validator("evaluated", mode="before")
    @classmethod
    def _evaluated_codes(cls, evaluated: Any) -> Any:
        if not isinstance(evaluated, Mapping):
            return evaluated
        return {task: codes.normalise(str(_refuse_false(code))) for task, code in evaluated.items()}

    @field_validator("include_path", mode="before")
    @classmethod
    def _one_or_more(cls, folders: Any) -> Any:
        return (folders,) if isinstance(folders, str) else folders

    @field_validator("include_path")
    @classmethod
    def _expand_folders(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(expand_home, folders))

    @field_validator("neurons")
    @classmethod
    def _expand_neurons(cls, path: str) -> str:
        return expand_home(path)

    @field_validator("metadata")
    @classmethod
    def _expand_metadata(cls, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: expand_home(value) for key, value in metadata.items()}

    @field_validator("engine", mode="before")
    @classmethod
    def _name_alone(cls, engine: Any) -> Any:
        return {"name": engine} if isinstance(engine, str) else engine

    @model_validator(mode="after")
    def _one_engine(self) -> SweepPlan:
        if reason := _why_no_engine(self):
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> SweepPlan:
        if self.then is not None and self.choose is None:
            raise ValueError("then without choose: say how the interventions for it are chosen")
        for number, entry in enumerate(self.interventions):
            if entry.prompt is not None and entry.prompt.system and not self.apply_chat_template:
                raise ValueError(
                    f"interventions.{number}.prompt.system: a system instruction needs a chat template; add "
                    "apply_chat_template: true, or leave system out"
                )
        if "damage" in self.controls.at and not self.searches:
            raise ValueError("controls.at: damage needs an intervention with factors: {damage: [...]}")
        return self

    @property
    def searches(self) -> bool:
        """Whether factors of any intervention are searched for."""
        return any(entry.damage is not None for entry in self.interventions)


def _refuse_false(languages: Any) -> Any:
    """YAML reads an unquoted `no` (Norwegian) as false."""
    if any(value is False for value in (languages if isinstance(languages, list | tuple) else [languages])):
        raise ValueError('YAML reads an unquoted no as false: write "no" with quotes, or nob_Latn')
    return languages


def _why_no_engine(plan: SweepPlan) -> str | None:
    """Why the engine cannot be given what the plan says; None where it can."""
    engine, model = plan.engine, plan.model
    if engine.name == STEERED_HF:
        return "engine.arguments: steered-hf takes its arguments from model" if engine.arguments else None
    in_model = {"pretrained", *(model.model_dump(exclude_none=True).keys() - {"batch_size"})}
    if repeated := sorted(in_model & engine.arguments.keys()):
        return f"engine.arguments.{repeated[0]} conflicts with model.{repeated[0]}: write it in one place"
    if steering := sorted(set(ARGUMENTS) & engine.arguments.keys()):
        return f"engine.arguments.{steering[0]}: what is done to the neurons stands in neurons and interventions"
    return None


def _normalised(languages: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(codes.normalise(code) for code in languages))


def read_plan(path: Path, overrides: Sequence[str] = ()) -> SweepPlan:
    """The plan of a YAML file, with `key=value` overrides such as `controls.random=5`.

    Raises:
        PlanError: one line that names the key, what was given and the nearest key, or both lines of a repeated key.
    """
    data = read_yaml(path, PlanError)
    if not isinstance(data, dict):
        raise PlanError(f"{path}: expected keys such as model, neurons, languages, interventions, tasks")
    for override in overrides:
        _set(data, override)
    return build_plan(data, str(path))


def build_plan(data: Mapping[str, Any], where: str = "plan") -> SweepPlan:
    """A plan from plain data.

    Raises:
        PlanError: for the first thing that is wrong.
    """
    try:
        return SweepPlan.model_validate(data)
    except ValidationError as failure:
        error = failure.errors(include_url=False)[0]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, SteeringError):
        raise PlanError(f"{where}: {cause}")
    location = tuple(part for part in error["loc"] if part not in (_LISTED, _SEARCHED))
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(str(location[-1]), _keys_at(location[:-1]))
        raise PlanError(f"{where}: unknown key {key!r}{hint}")
    if error["type"] == "missing":
        raise PlanError(f"{where}: {key} is missing")
    reason = str(cause) if cause else f"{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
    raise PlanError(f"{where}: {key + ': ' if key else ''}{reason}")


def _keys_at(location: Sequence[Any]) -> list[str]:
    """Keys that the part of a plan at this location knows."""
    parts: dict[str, type[BaseModel]] = {
        "model": ModelPart,
        "interventions": PromptEntry if location[-1:] == ("prompt",) else InterventionEntry,
        "controls": ControlsPart,
        "damage": DamagePart,
        "choose": Choose,
        "then": Then,
        "engine": Engine,
        "slurm": Slurm,
    }
    part = parts[str(location[0])] if location else SweepPlan
    return list((DamageFactors if location[-1:] == ("factors",) else part).model_fields)


def _set(plan: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into the plan; the value is YAML, and a number in the key counts list entries from 0."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PlanError(f"--set {override}: expected key=value, such as controls.random=5")
    value = read_yaml(text, lambda message: PlanError(f"--set {override}: {message}"))
    *path, last = key.split(".")
    part: Any = plan
    for name in path:
        part = _child(part, name, override)
    if isinstance(part, list):
        part[_index(part, last, override)] = value
    else:
        part[last] = value


def _child(part: Any, name: str, override: str) -> Any:
    if isinstance(part, list):
        return part[_index(part, name, override)]
    child = part.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise PlanError(f"--set {override}: {name} is {child!r}, which has no keys")
    return child


def _index(entries: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(entries):
        raise PlanError(f"--set {override}: expected a number below {len(entries)} instead of {name!r}")
    return int(name)
