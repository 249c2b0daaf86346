"""The model arguments of `steered-hf`: ours told apart from those of `hf`, and checked before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lm_eval_steering import languages
from lm_eval_steering.architectures import model_type_of, parse_sites, shape_of
from lm_eval_steering.architectures.loading import (
    is_quantization,
    missing_folder,
    quantization_config,
    refuse_missing_folder,
)
from lm_eval_steering.errors import (
    ArchitectureError,
    InterventionError,
    NeuronSetError,
    SteeringError,
    UnknownLanguageError,
    did_you_mean,
)
from lm_eval_steering.lmeval.compat import from_pretrained_arguments
from lm_eval_steering.metrics.language_id import DEFAULT, LETTERS, THRESHOLD, LanguageIdentifier
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.compiled import CompiledIntervention, compile_intervention
from lm_eval_steering.steering.intervention import ARGUMENTS, PROMPT_ARGUMENTS, Prompt, from_arguments

SCORING = ("auto", "shared", "plain")
GENERATION = ("auto", "static", "compiled", "plain")


@dataclass(frozen=True)
class SteeringArguments:
    """Arguments of ours, as the user wrote them.

    Attributes:
        neurons: path of a neuron set, or the name of one that ships.
        language: whose neurons to steer; several are joined by `+`.
        op: `scale`, `add` or `set`.
        value: number, calibrated or live statistic for `add` and `set`.
        factor: any finite number.
        preset: a paper's name for op, value and scope.
        source: of `clas_diffmean`: the language that is steered away from.
        deactivate: languages whose neurons are silenced, or `others`.
        deactivate_to: what they are set to, 0 by default; or `negate`, `mask`, `random`, `noise`.
        keep_shared: False lets a deactivation silence neurons that are steered too.
        site: `activation`, `product` or `residual`.
        dimensions: of `residual`: how many in each layer, those with the largest |diffmean|.
        layers: ranges such as `0-3+28-31`.
        positions: `all`, `prompt`, `generated`, `last`, or a window.
        scope: of a live statistic, `token` or `sequence`.
        seed: of random numbers.
        instruction: put in front of every prompt instead of steering neurons; `{language}` is the language's name.
        instruction_names: whether that name is in `english` or in the language itself, `native`.
        instruction_system: True sends it as system instruction of the chat template.
        intervention: path of a YAML file with a list of steps, instead of the arguments above.
        target_language: what `lfs` counts in a run that steers to no language.
        lid: what identifies the language of outputs: a name (`lid.176`, `glotlid`, ...) or the path of a model file.
        lid_threshold: confidence below which an output's language is `unknown`.
        lid_letters: number of letters below which it is.
        allow_empty: accept a language without neurons.
        force: use a neuron set of another model.
        sites: where the units are in a family that is not known (`architectures.sites_of`).
        scoring: `auto`, `shared` or `plain`: how log-likelihoods are computed (`lmeval.scoring`).
        generation: `auto`, `static`, `compiled` or `plain`: how texts are generated (`lmeval.generation`).
    """

    neurons: str | None = None
    language: str | None = None
    op: str | None = None
    value: float | str | None = None
    factor: float | str | None = None
    preset: str | None = None
    source: str | None = None
    deactivate: str | None = None
    deactivate_to: float | str | None = None
    keep_shared: bool | None = None
    site: str | None = None
    dimensions: int | None = None
    layers: str | int | None = None
    positions: str | None = None
    scope: str | None = None
    seed: int | None = None
    instruction: str | None = None
    instruction_names: str | None = None
    instruction_system: bool | None = None
    intervention: Any = None
    target_language: str | None = None
    lid: str = DEFAULT
    lid_threshold: float = THRESHOLD
    lid_letters: int = LETTERS
    allow_empty: bool = False
    force: bool = False
    sites: str | None = None
    scoring: str = "auto"
    generation: str = "auto"

    def __post_init__(self) -> None:
        for name in ("allow_empty", "force"):
            if not isinstance(getattr(self, name), bool):
                raise InterventionError(f"{name}={getattr(self, name)!r}: expected True or False")
        _check_setting("scoring", self.scoring, SCORING)
        _check_setting("generation", self.generation, GENERATION)
        if self.sites is not None:
            parse_sites(self.sites)
        given = [name for name in ARGUMENTS if getattr(self, name) is not None]
        if self.prompt is not None:
            if self.neurons is not None:
                raise InterventionError("neurons= conflicts with an instruction, which changes none: leave it out")
        elif given and self.neurons is None:
            raise InterventionError(
                f"{given[0]}= without neurons=: say which neuron set, a path or a name such as demo"
            )
        if self.neurons is not None and not given:
            raise InterventionError(
                "neurons= without language=, deactivate= or intervention=: nothing to intervene on; leave "
                "neurons= out for an unsteered run"
            )

    def targets(self) -> tuple[str, ...]:
        """Languages whose share of outputs `lfs` counts: the argument, else the steered ones."""
        if self.target_language is not None:
            return tuple(languages.normalise(code) for code in str(self.target_language).split("+"))
        return from_arguments(self.steps()).steered

    def identifier(self) -> LanguageIdentifier:
        """What identifies the language of outputs.

        Raises:
            SteeringError: if the model file is not there, or is another one than its name says.
        """
        identifier = LanguageIdentifier.named(self.lid, self.lid_threshold, self.lid_letters)
        identifier.signature()  # reads the file
        return identifier

    @property
    def prompt(self) -> Prompt | None:
        """The instruction that is put in front of every prompt, if any."""
        if all(getattr(self, name) is None for name in (*PROMPT_ARGUMENTS, "intervention")):
            return None  # the rest is checked with the neuron set
        return from_arguments(self.steps()).prompt

    def steps(self) -> dict[str, Any]:
        """The arguments that describe the intervention."""
        return {name: getattr(self, name) for name in ARGUMENTS}


def _check_setting(name: str, given: Any, expected: Sequence[str]) -> None:
    if given not in expected:
        hint = did_you_mean(str(given), expected)
        raise InterventionError(f"{name}={given!r}: expected {', '.join(expected)}{hint}")


def split(given: Mapping[str, Any], parent: type, config: Any) -> tuple[SteeringArguments, dict[str, Any]]:
    """Ours, and what belongs to `hf`, to transformers' from_pretrained, or to the model's config.

    Raises:
        InterventionError: for an argument that none of them knows; the message names the nearest one.
    """
    ours = {field.name for field in fields(SteeringArguments)}
    parents = set(inspect.signature(parent).parameters) - {"kwargs"}
    rest = {key: value for key, value in given.items() if key not in ours}
    for key in rest:
        if key not in parents | from_pretrained_arguments() and not hasattr(config, key):
            hint = did_you_mean(key, sorted(ours | parents))
            raise InterventionError(f"unknown model argument {key!r}{hint}")
    arguments = SteeringArguments(**{key: value for key, value in given.items() if key in ours})
    if rest.get("enable_thinking") and rest.get("think_end_token") is None:
        raise InterventionError(
            "enable_thinking=True without think_end_token=: say what ends a thought, such as "
            "think_end_token=</think>; else the whole thought would be taken for the answer"
        )
    for key in ("tp_plan", "tp_size"):
        if arguments.neurons is not None and rest.get(key):
            raise ArchitectureError(
                f"{key}={rest[key]!r}: tensor parallelism splits every layer's units over devices, which steering "
                "cannot follow; use parallelize=True, which keeps layers whole, or one process a device"
            )
    return arguments, rest


def take_quantization(rest: dict[str, Any], config: Any) -> Any:
    """The quantisation that the arguments ask for, as transformers takes it, and taken out of them; None for none.

    lm-eval 0.4.13 hands `quantization_config` on twice, which Python refuses, and `load_in_8bit` and its like to the
    constructor of the model's class, which does not know them in transformers 5.

    Args:
        rest: arguments of `hf`.
        config: of the model, whose dtype 4-bit weights are computed in where no other is named.

    Raises:
        SteeringError: if two are given, the library is missing or refuses them, or there is no such dtype.
    """
    given = {name: rest.pop(name) for name in list(rest) if is_quantization(name)}
    dtype = str(rest.get("dtype") or "auto").removeprefix("torch.")
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise SteeringError(f"dtype={rest['dtype']!r}: expected auto, bfloat16, float16, float32 or float64")
    return quantization_config(given, dtype)


def refuse_other_name(neuron_set: NeuronSet, pretrained: str) -> None:
    """Refuse a neuron set whose hub id is not the one asked for; folders are compared by weights after loading.

    Raises:
        NeuronSetError: naming both.
    """
    made_for = neuron_set.provenance.model
    if "/" in made_for and made_for != pretrained and not Path(pretrained).exists():
        raise NeuronSetError(
            f"the neuron set is for {made_for}, the model is {pretrained}; force=true to use it all the same"
        )


def plan_before_loading(
    arguments: SteeringArguments, config: Any
) -> tuple[NeuronSet | None, CompiledIntervention | None]:
    """Read and check the neuron set against the model's config, and compile the intervention: no weights are read.

    Raises:
        SteeringError: for anything that would make the score wrong.
    """
    neuron_set = None if arguments.neurons is None else NeuronSet.load(arguments.neurons)
    try:
        intervention = from_arguments(arguments.steps())
    except UnknownLanguageError as error:
        known = f"; the neuron set has {', '.join(neuron_set.languages)}" if neuron_set else ""
        raise UnknownLanguageError(f"{error}{known}") from None
    arguments.targets()
    if neuron_set is None:
        return None, None
    shape = shape_of(config)
    neuron_set.check_model(shape.layers, shape.units, model_type_of(config), arguments.force, shape.widths)
    return neuron_set, compile_intervention(intervention, neuron_set, arguments.allow_empty)


def read_config(pretrained: Any, arguments: dict[str, Any]) -> Any:
    """The config of a loaded model, or of one still on disk or on the hub: a few kilobytes."""
    if not isinstance(pretrained, str):
        return pretrained.config
    names = ("revision", "subfolder", "trust_remote_code", "token", "cache_dir", "gguf_file")
    chosen = {name: arguments[name] for name in names if arguments.get(name)}
    from transformers import AutoConfig

    read: Callable[..., Any] = AutoConfig.from_pretrained
    refuse_missing_folder(pretrained)
    try:
        return read(pretrained, **chosen)
    except (OSError, ValueError, ImportError) as error:
        raise SteeringError(
            f"pretrained={pretrained!r}: {str(error).splitlines()[0]}{missing_folder(pretrained)}"
        ) from error
