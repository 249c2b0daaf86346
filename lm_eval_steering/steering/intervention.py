"""The intervention: steps as a frozen schema, how a user writes them, and the signature that reads back.

A user writes flat arguments, a preset with a paper's name, or a YAML file of steps; `from_arguments` turns each into an
`Intervention`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from lm_eval_steering import languages
from lm_eval_steering.errors import InterventionError, SteeringError, did_you_mean
from lm_eval_steering.files import read_yaml
from lm_eval_steering.steering.positions import ALL, FORMS, parse_positions
from lm_eval_steering.steering.prompt import Prompt, fields_of_signature

# --- Fields of a step: each error names the key and the nearest valid word

OPERATIONS = ("scale", "add", "set")
RESIDUAL = "residual"
SITES = ("activation", "product", RESIDUAL)  # in the order in which a forward pass reaches them in one layer
SCOPES = ("token", "sequence")
CLAS_DIFFMEAN = "clas_diffmean"
STATISTICS = ("mean", "median", "max", "token_max", "diffmean", "sentence_mean", CLAS_DIFFMEAN)
LIVE = ("live_max", "live_mean", "live_median", "live_min", "live_std", "live_iqr", "live_mad")
NORMAL = "normal"
OTHERS = "others"
VALUES = (*STATISTICS, "pNN", *LIVE, "live_pNN", NORMAL)
_PERCENTILE = re.compile(r"(live_)?p\d\d")
_RANGES = re.compile(r"\d+(-\d+)?(\+\d+(-\d+)?)*")
_LARGEST_SEED = 2**32 - 1


def is_live(value: float | str | None) -> bool:
    """Whether a value is a statistic of the current activations."""
    return isinstance(value, str) and value.startswith("live_")


def is_named_value(given: object) -> TypeGuard[str]:
    """Whether a text names a statistic, calibrated or live, or the normal distribution."""
    known = (*STATISTICS, *LIVE, NORMAL)
    return isinstance(given, str) and (given in known or bool(_PERCENTILE.fullmatch(given)))


def one_of(name: str, known: tuple[str, ...]) -> BeforeValidator:
    """One of a few words."""

    def check(given: Any) -> Any:
        if given not in known:
            raise ValueError(f"{name}={given!r}: expected one of {', '.join(known)}{did_you_mean(str(given), known)}")
        return given

    return BeforeValidator(check)


def read_factor(given: Any) -> float:
    """Any finite number, negative ones and zero too."""
    number = _number(given)
    if number is None or not math.isfinite(number):
        raise ValueError(f"factor={given!r}: expected a finite number")
    return number


def read_value(given: Any, key: str = "value", more: tuple[str, ...] = ()) -> float | str | None:
    """A finite number, the name of a statistic, or nothing; `key` and `more` names are for the message."""
    if given is None:
        return None
    if is_named_value(given):
        return str(given)
    number = _number(given)
    if number is None:
        names = (*VALUES, *more)
        raise ValueError(
            f"{key}={given!r}: expected a number or one of {', '.join(names)}{did_you_mean(str(given), names)}"
        )
    if not math.isfinite(number):
        raise ValueError(f"{key}={given!r}: expected a finite number")
    return number


def read_layers(given: Any) -> str | None:
    """Ranges of layers, kept as text."""
    text = None if given is None else str(given)
    if text is not None and (isinstance(given, bool) or not _RANGES.fullmatch(text)):
        raise ValueError(f"layers={text!r}: expected ranges such as 0-3+28-31")
    return text


def read_positions(given: Any) -> str:
    """A form of `positions`, kept as text."""
    if not isinstance(given, str):
        # YAML reads 3:10 as a number to the base of 60.
        raise ValueError(f"positions={given!r}: expected {FORMS}; in a YAML file write it in quotes")
    parse_positions(given)
    return given


def read_flag(name: str) -> BeforeValidator:
    """True or False."""

    def check(given: Any) -> bool:
        word = str(given).lower()
        if word not in {"true", "false"}:
            raise ValueError(f"{name}={given!r}: expected True or False")
        return word == "true"

    return BeforeValidator(check)


def read_seed(given: Any) -> int:
    """A whole number that fits 32 bits."""
    number = _number(given)
    if number is None or not math.isfinite(number) or number != int(number) or not 0 <= number <= _LARGEST_SEED:
        raise ValueError(f"seed={given!r}: expected a whole number from 0 to {_LARGEST_SEED}")
    return int(number)


def read_languages(given: Any) -> tuple[str, ...]:
    """Codes joined by `+`, or a list of them, in FLORES style; `others` stays as it is.

    Raises:
        UnknownLanguageError: if a code names no language.
    """
    parts = list(given) if isinstance(given, list | tuple) else str(given).split("+")
    if isinstance(given, bool) or any(isinstance(part, bool) for part in parts):
        # YAML reads the code of Norwegian as a truth value.
        raise ValueError(
            f"language={given!r}: expected codes such as fra_Latn+ind_Latn; in a YAML file write no in quotes"
        )
    if not parts or any(not str(part).strip() for part in parts):
        raise ValueError(f"language={given!r}: expected languages joined by +, such as fra_Latn+ind_Latn")
    texts = [str(part).strip() for part in parts]
    return tuple(dict.fromkeys(text if text == OTHERS else languages.normalise(text) for text in texts))


def read_source(given: Any) -> str | None:
    """The code of one language, in FLORES style.

    Raises:
        UnknownLanguageError: if it names no language.
    """
    if given is None:
        return None
    codes = read_languages(given)
    if len(codes) != 1 or codes == (OTHERS,):
        raise ValueError(f"source={given!r}: expected one language, such as eng_Latn")
    return codes[0]


def read_dimensions(given: Any) -> int | None:
    """A whole number from 1, or nothing."""
    if given is None:
        return None
    number = _number(given)
    if number is None or not math.isfinite(number) or number != int(number) or number < 1:
        raise ValueError(f"dimensions={given!r}: expected a whole number from 1, of dimensions in each layer")
    return int(number)


def _number(given: Any) -> float | None:
    if isinstance(given, bool):
        return None
    try:
        return float(given)
    except (TypeError, ValueError):
        return None


# --- An intervention is a list of steps, each one operation on the neurons of some languages


class Step(BaseModel):
    """One operation on the union of the neurons of some languages; `docs/interventions.md` defines each field.

    Attributes:
        op: `scale` (a' = factor * a), `add` (a' = a + factor * value) or `set` (a' = factor * value).
        languages: whose neurons; `others` alone means all languages that no steering step names.
        value: a number, a calibrated statistic of the language, a `live_` statistic of the current activations, or
            `normal`, seeded random numbers; 1 by default. `scale` takes a live one only: a' = factor * value * a.
        factor: any finite number.
        source: of `clas_diffmean`: the language that is steered away from.
        site: `activation` (after the activation function), `product` (input of the last linear layer) or `residual`
            (the hidden states that a decoder layer returns, whose dimensions take the place of neurons).
        dimensions: of `residual`: how many of each layer's dimensions, those with the largest |diffmean|; all by
            default.
        layers: ranges such as `0-3+28-31`; all by default, but for `residual`, which needs them.
        positions: `all`, `prompt`, `generated`, `last`, a window (`positions.parse_positions`).
        scope: of a live statistic: `token` (that position alone) or `sequence` (the row's whole forward pass).
        seed: of `normal`.
        deactivation: whether the step silences languages rather than steering to them. By default such a step leaves
            out the neurons that a later steering step of the same intervention uses.
        keep_shared: False composes a deactivation literally, shared neurons included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Annotated[Literal["scale", "add", "set"], one_of("op", OPERATIONS)]
    languages: Annotated[tuple[str, ...], BeforeValidator(read_languages)]
    value: Annotated[float | str | None, BeforeValidator(read_value)] = None
    factor: Annotated[float, BeforeValidator(read_factor)] = 1.0
    source: Annotated[str | None, BeforeValidator(read_source)] = None
    site: Annotated[Literal["activation", "product", "residual"], one_of("site", SITES)] = "activation"
    dimensions: Annotated[int | None, BeforeValidator(read_dimensions)] = None
    layers: Annotated[str | None, BeforeValidator(read_layers)] = None
    positions: Annotated[str, BeforeValidator(read_positions)] = ALL
    scope: Annotated[Literal["token", "sequence"], one_of("scope", SCOPES)] = "token"
    seed: Annotated[int, BeforeValidator(read_seed)] = 0
    deactivation: Annotated[bool, read_flag("deactivation")] = False
    keep_shared: Annotated[bool, read_flag("keep_shared")] = True

    @model_validator(mode="before")
    @classmethod
    def _value_by_default(cls, given: Any) -> Any:
        # Written out, so that a step and the step read back from its signature are equal.
        if isinstance(given, Mapping) and given.get("op") in {"add", "set"} and given.get("value") is None:
            return {**given, "value": 1.0}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Step:
        if OTHERS in self.languages and (not self.deactivation or len(self.languages) > 1):
            raise ValueError("others: stands alone, in deactivate= only; name the languages to steer")
        if self.op == "scale" and self.value is not None and not is_live(self.value):
            raise ValueError(f"value={self.value!r}: op=scale takes none but a live_ statistic; use factor=")
        if self.scope != "token" and not is_live(self.value):
            raise ValueError(f"scope={self.scope}: only a live statistic has a scope, value={self.value!r} has none")
        if self.seed and self.value != NORMAL:
            raise ValueError(f"seed={self.seed}: only value=normal is random, value={self.value!r} is not")
        self._check_residual()
        return self

    def _check_residual(self) -> None:
        """What belongs to hidden states alone, and what they have not."""
        if self.site != RESIDUAL:
            if self.dimensions is not None:
                raise ValueError(f"dimensions={self.dimensions}: only site=residual has dimensions; leave it out")
            if self.value == CLAS_DIFFMEAN:
                raise ValueError(f"value={CLAS_DIFFMEAN}: only site=residual has it; give site=residual and layers=")
        elif self.deactivation:
            raise ValueError(
                "deactivate= at site=residual: a dimension of the hidden states belongs to no language alone; steer "
                "away with op=add,value=diffmean,factor=-1, or write the steps in a file (intervention=) to silence "
                "neurons at another site"
            )
        elif self.layers is None:
            raise ValueError(
                "site=residual without layers=: say after which decoder layers the hidden states are edited, such as "
                "layers=14 or layers=12-16 (what is added at several layers adds up)"
            )
        if self.value != CLAS_DIFFMEAN:
            if self.source is not None:
                raise ValueError(
                    f"source={self.source}: only value={CLAS_DIFFMEAN} has a source language; leave it out"
                )
        elif self.source is None:
            raise ValueError(f"value={CLAS_DIFFMEAN} without source=: say which language to steer away from")
        elif self.op != "add" or self.dimensions is not None:
            wrong = f"op={self.op}" if self.op != "add" else f"dimensions={self.dimensions}"
            raise ValueError(
                f"{wrong} conflicts with value={CLAS_DIFFMEAN}, a vector of unit norm over all dimensions that is added"
            )

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Other interventions keep the fingerprints that they had before there was site=residual.
        given: dict[str, Any] = handler(self)
        return {key: value for key, value in given.items() if key not in {"source", "dimensions"} or value is not None}

    @property
    def amount(self) -> float | str:
        """The value; of a `scale` without one, 1."""
        return 1.0 if self.value is None else self.value

    def chosen_layers(self, total: int) -> frozenset[int]:
        """Numbers of the layers that the step acts on.

        Raises:
            InterventionError: if a range is empty or beyond the model's last layer.
        """
        if self.layers is None:
            return frozenset(range(total))
        chosen: set[int] = set()
        for part in self.layers.split("+"):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not span or span[-1] >= total:
                raise InterventionError(f"layers={self.layers!r}: {part} is not a range within 0-{total - 1}")
            chosen.update(span)
        return frozenset(chosen)

    def signature(self) -> str:
        """`op:add|value:mean|factor:4|lang:fra_Latn|site:product|layers:all`, then what is not the default."""
        parts = {
            "op": self.op,
            "value": None if self.value is None else _short(self.value),
            "factor": _short(self.factor),
            "deactivate" if self.deactivation else "lang": "+".join(self.languages),
            "source": self.source,
            "site": self.site,
            "dims": None if self.dimensions is None else str(self.dimensions),
            "layers": self.layers or "all",
            "positions": None if self.positions == ALL else self.positions,
            "scope": None if self.scope == "token" else self.scope,
            "seed": str(self.seed) if self.value == NORMAL else None,
            "keep_shared": None if self.keep_shared else "false",
        }
        return "|".join(f"{key}:{text}" for key, text in parts.items() if text is not None)


class Intervention(BaseModel):
    """Steps that compose in the order written, or an instruction in the prompts; neither is the unsteered model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[Step, ...] = ()
    prompt: Prompt | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Intervention:
        if self.prompt is not None and self.steps:
            raise ValueError("an instruction conflicts with steps: it stands alone, and changes no neurons")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Steps keep the fingerprints that they had before there were prompts.
        given: dict[str, Any] = handler(self)
        return {key: value for key, value in given.items() if key != "prompt" or value is not None}

    @property
    def steered(self) -> tuple[str, ...]:
        """Languages that the intervention steers to, deactivated ones left out, in the order written."""
        if self.prompt is not None:
            return (self.prompt.language,)
        return tuple(dict.fromkeys(code for step in self.steps if not step.deactivation for code in step.languages))

    @property
    def lookahead(self) -> bool:
        """Whether a position's edit depends on later tokens of the row, as the original scripts' statistics do."""
        return any(step.scope == "sequence" for step in self.steps)

    def resolve(self, available: tuple[str, ...]) -> Intervention:
        """The same with the codes as a neuron set spells them, and `others` spelled out.

        Raises:
            UnknownLanguageError: if a language is not available; the message names the closest.
            InterventionError: if `others` leaves no language, or neurons have no part in it.
        """
        if self.prompt is not None:
            raise InterventionError(f"{self.signature()}: an instruction changes no neurons; leave the neuron set out")
        where = "the neuron set"
        steered = {languages.choose(code, available, where) for code in self.steered}

        def codes(step: Step) -> tuple[str, ...]:
            if step.languages != (OTHERS,):
                return tuple(dict.fromkeys(languages.choose(code, available, where) for code in step.languages))
            if not (rest := tuple(code for code in available if code not in steered)):
                raise InterventionError("deactivate=others: every language of the neuron set is steered to")
            return rest

        def source(step: Step) -> str | None:
            return None if step.source is None else languages.choose(step.source, available, where)

        return Intervention(
            steps=tuple(
                step.model_copy(update={"languages": codes(step), "source": source(step)}) for step in self.steps
            )
        )

    def signature(self) -> str:
        """Readable form, meant for a paper; `none` for the unsteered model. `parse` reads it back."""
        if self.prompt is not None:
            return self.prompt.signature()
        return " ; ".join(step.signature() for step in self.steps) or "none"


def build(description: Mapping[str, Any]) -> Intervention:
    """An intervention from plain data (`{"steps": [...]}`), with errors of one line.

    Raises:
        SteeringError: for the first thing that is wrong; it names the key.
    """
    try:
        return Intervention.model_validate(description)
    except ValidationError as failure:
        error = failure.errors(include_url=False)[0]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, SteeringError):  # it says which kind of mistake it is
        raise cause
    if cause:
        raise InterventionError(str(cause))
    key = str(error["loc"][-1])
    if error["type"] == "extra_forbidden":
        raise InterventionError(f"unknown key {key!r} in an intervention step{did_you_mean(key, Step.model_fields)}")
    raise InterventionError(f"{'.'.join(map(str, error['loc']))}: {error['msg']}")


def _short(number: float | str) -> str:
    """The shortest text that reads back as the same number."""
    return number if isinstance(number, str) else repr(float(number)).removesuffix(".0")


# --- An intervention read back from its printed signature

_KEYS = (
    "op", "value", "factor", "lang", "deactivate", "source", "site", "dims", "layers", "positions", "scope", "seed",
    "keep_shared", "prompt", "names", "system",
)  # fmt: skip
_OF_A_SCORE = {"neurons", "lid", "fp", "v"}  # parts of a score's signature that follow the intervention


def parse(text: str) -> Intervention:
    """The intervention that a signature describes; other parts of a score's signature are left out.

    Raises:
        SteeringError: naming the part that cannot be read.
    """
    steps = [_fields(part.strip()) for part in text.split(";")]
    if "prompt" in steps[0] and len(steps) == 1:
        return build({"prompt": fields_of_signature(steps[0])})
    return build({"steps": [step for step in steps if step]})


def _fields(part: str) -> dict[str, Any]:
    """Fields of a step; none for the unsteered model."""
    fields: dict[str, Any] = {}
    for item in part.split("|"):
        key, colon, text = item.partition(":")
        if item == "none" or (colon and key in _OF_A_SCORE):
            continue
        if not colon or key not in _KEYS:
            raise InterventionError(f"signature: cannot read {item!r}{did_you_mean(key, _KEYS)}")
        fields[key] = text
    if not fields or "prompt" in fields:
        return fields
    if "deactivate" in fields:
        fields |= {"languages": fields.pop("deactivate"), "deactivation": True}
    elif "lang" in fields:
        fields["languages"] = fields.pop("lang")
    if "dims" in fields:
        fields["dimensions"] = fields.pop("dims")
    if fields.get("layers") == "all":
        del fields["layers"]
    return fields


# --- How a user writes it


__all__ = ["ARGUMENTS", "DEACTIVATIONS", "PRESETS", "Intervention", "Prompt", "Step", "build", "from_arguments"]

STEP_ARGUMENTS = (
    "language", "op", "value", "factor", "preset", "source", "deactivate", "deactivate_to", "keep_shared", "site",
    "dimensions", "layers", "positions", "scope", "seed",
)  # fmt: skip
PROMPT_ARGUMENTS = ("instruction", "instruction_names", "instruction_system")
ARGUMENTS = (*STEP_ARGUMENTS, *PROMPT_ARGUMENTS, "intervention")

# Deactivations by the name that Gurgurov et al. 2025 give them (fallbacks.py), as an operation on the activation.
DEACTIVATIONS: dict[str, dict[str, Any]] = {
    "negate": {"op": "scale", "factor": -1.0},
    "mask": {"op": "scale", "factor": -0.1},
    "random": {"op": "set", "value": NORMAL, "factor": 0.1},
    "noise": {"op": "add", "value": NORMAL, "factor": 5.0},
}
# Rahmanisa et al. 2025 (p_max, p_median, =max, +max, =0, =P10), CLaS-Bench (clas_diffmean; Gurgurov et al. 2026) and
# Gurgurov et al. 2025 (the others).
PRESETS: dict[str, dict[str, Any]] = {
    "p_max": {"op": "set", "value": "max"},
    "p_median": {"op": "set", "value": "median"},
    "=max": {"op": "set", "value": "live_max", "scope": "sequence"},
    "+max": {"op": "add", "value": "live_max", "scope": "sequence"},
    "=0": {"op": "set", "value": 0.0},
    "=P10": {"op": "set", "value": "live_p10", "scope": "sequence"},
    "additive": {"op": "add", "value": "mean"},
    "replacement": {"op": "set", "value": "mean"},
    "diffmean": {"op": "add", "value": "diffmean"},
    "clas_diffmean": {"op": "add", "value": CLAS_DIFFMEAN, "site": RESIDUAL},
    "deactivate": {"op": "set", "value": 0.0, "deactivation": True},
}
# For shells and files in which a sign would have to be quoted.
_ALIASES = {"set_max": "=max", "add_max": "+max", "set_0": "=0", "set_p10": "=P10"}
# The scripts' grammar, with numbers that need not be whole: an operation, then a number or a live statistic.
_OPERAND = re.compile(r"([=+*])(?:(max|mean|median|min|std|iqr|mad|P\d\d)|(-?\d+(?:\.\d+)?))")
_OPERATIONS = {"=": "set", "+": "add", "*": "scale"}
_FIXED_BY_DEACTIVATE = ("op", "value", "factor", "deactivate")  # by the preset of that name
_COMMON = ("site", "dimensions", "layers", "positions")


def from_arguments(arguments: Mapping[str, Any]) -> Intervention:
    """The intervention that model arguments describe; arguments that are None count as absent.

    Args:
        arguments: of the names in ARGUMENTS; lists are written `a+b`. `intervention` is the path of a YAML file with
            a list of steps, each a mapping of STEP_ARGUMENTS, or that list itself; it stands alone. So does an
            instruction, which the list may hold instead of steps.

    Raises:
        SteeringError: one line that names the argument, what was given and what was expected.
    """
    given: dict[str, Any] = {key: value for key, value in arguments.items() if value is not None}
    if unknown := sorted(given.keys() - set(ARGUMENTS)):
        raise InterventionError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], ARGUMENTS)}")
    if "intervention" not in given:
        return build({"prompt": _prompt(given)} if "instruction" in given else {"steps": _steps(given)})
    if len(given) > 1:
        other = next(key for key in given if key != "intervention")
        raise InterventionError(f"{other}= conflicts with intervention=, which holds every step: write it there")
    return _from_list(given["intervention"])


def _from_list(given: Any) -> Intervention:
    """Steps of a file, or of a list that stands for one; errors say in which step."""
    where = "intervention"
    if isinstance(given, str | Path):
        where = f"intervention={given}"
        given = read_yaml(Path(given), lambda message: InterventionError(f"intervention={message}"))
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise InterventionError(f"{where}: expected a list of steps, each a mapping such as language: fra_Latn")
    steps: list[dict[str, Any]] = []
    for number, item in enumerate(given, start=1):
        here = f"{where}, step {number}"
        if not isinstance(item, Mapping):
            raise InterventionError(f"{here}: expected a mapping such as language: fra_Latn, found {item!r}")
        if "instruction" in item:
            if len(given) > 1:
                raise InterventionError(f"{here}: instruction stands alone; it cannot be combined with steps")
            try:
                return from_arguments(item)
            except InterventionError as error:
                raise InterventionError(f"{here}: {error}") from None
        if unknown := [str(key) for key in item if key not in STEP_ARGUMENTS]:
            raise InterventionError(f"{here}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], STEP_ARGUMENTS)}")
        try:
            written = _steps({key: value for key, value in item.items() if value is not None})
            build({"steps": written})  # each by itself, so that the message can say where
        except InterventionError as error:
            raise InterventionError(f"{here}: {error}") from None
        if not written:
            raise InterventionError(f"{here}: neither language nor deactivate: it would do nothing")
        steps += written
    return build({"steps": steps})


def _prompt(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the instruction that flat arguments describe."""
    if other := [key for key in given if key not in (*PROMPT_ARGUMENTS, "language")]:
        raise InterventionError(
            f"{other[0]}= conflicts with instruction=, which changes no neurons: leave one of the two out"
        )
    if "language" not in given:
        raise InterventionError("instruction= without language=: say which language it names, such as fra_Latn")
    names = {"instruction": "instruction", "language": "language", "names": "instruction_names",
             "system": "instruction_system"}  # fmt: skip
    return {field: given[name] for field, name in names.items() if name in given}


def _steps(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Fields of the steps that flat arguments describe: the deactivation first, then the steering step."""
    if idle := [key for key in PROMPT_ARGUMENTS if key in given]:
        raise InterventionError(f"{idle[0]}= without instruction=: expected one such as 'Answer in {{language}}.'")
    given = _with_preset(dict(given))
    _refuse_idle(given)
    common = {key: given[key] for key in _COMMON if key in given}
    steps: list[dict[str, Any]] = []
    if "deactivate" in given:
        operation = _deactivation(given.get("deactivate_to", 0.0))
        kept = {"keep_shared": given["keep_shared"]} if "keep_shared" in given else {}
        steps.append({**operation, "languages": given["deactivate"], "deactivation": True, **kept, **common})
    if "language" in given:
        operation = {key: given[key] for key in ("op", "value", "factor") if key in given}
        steps.append({"languages": given["language"], **operation, **common})
    _give(steps, given, "scope", is_live, "a live_ statistic as value= or deactivate_to=")
    _give(steps, given, "source", lambda value: value == CLAS_DIFFMEAN, f"preset={CLAS_DIFFMEAN}")
    _give(steps, given, "seed", lambda value: value == NORMAL, "value=normal, or deactivate_to=random or noise")
    return steps


def _refuse_idle(given: Mapping[str, Any]) -> None:
    """Arguments that nothing would read."""
    if "keep_shared" in given and "deactivate" not in given:
        raise InterventionError("keep_shared= without deactivate=: it says what a deactivation leaves out")
    if "deactivate_to" in given and "deactivate" not in given:
        raise InterventionError("deactivate_to= without deactivate=: say whose neurons, such as deactivate=eng_Latn")
    if "language" in given:
        if "op" not in given:
            raise InterventionError("language= without op=: expected op=scale, op=add or op=set, or a preset=")
        return
    if wrong := [key for key in ("op", "value", "factor") if key in given]:
        raise InterventionError(f"{wrong[0]}= without language=: say whose neurons, such as language=fra_Latn")
    if "deactivate" not in given and (idle := [key for key in (*_COMMON, "source", "scope", "seed") if key in given]):
        raise InterventionError(f"{idle[0]}= without language= or deactivate=: nothing to intervene on")


def _give(steps: list[dict[str, Any]], given: Mapping[str, Any], key: str, takes: Any, wanted: str) -> None:
    """Set an argument in the steps whose value it applies to."""
    if key not in given or not steps:
        return
    fitting = [step for step in steps if takes(step.get("value"))]
    if not fitting:
        raise InterventionError(f"{key}={given[key]!r}: it applies to {wanted}, and there is none")
    for step in fitting:
        step[key] = given[key]


def _deactivation(to: Any) -> dict[str, Any]:
    if isinstance(to, str) and to in DEACTIVATIONS:
        return DEACTIVATIONS[to]
    try:
        return {"op": "set", "value": read_value(to, "deactivate_to", tuple(DEACTIVATIONS))}
    except ValueError as error:
        raise InterventionError(str(error)) from None


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a preset's name replaced by what it stands for."""
    if "preset" not in given:
        return given
    name = given.pop("preset")
    preset = dict(_preset(name))
    if "language" not in given:
        raise InterventionError(f"preset={name} without language=: say whose neurons, such as language=fra_Latn")
    if preset.pop("deactivation", False):
        if wrong := [key for key in _FIXED_BY_DEACTIVATE if key in given]:
            raise InterventionError(f"{wrong[0]}= conflicts with preset={name}, which sets the language's neurons to 0")
        given["deactivate"] = given.pop("language")
        return given
    if wrong := [key for key in map(str, preset) if key in given]:
        raise InterventionError(f"{wrong[0]}= conflicts with preset={name}, which sets it: leave one of the two out")
    if preset["op"] == "scale" and not is_live(preset.get("value")) and "value" in given:
        raise InterventionError(f"value= conflicts with preset={name}, which takes none: leave one of the two out")
    return given | preset


def _preset(given: Any) -> dict[str, Any]:
    name = _ALIASES.get(str(given), str(given))
    if name in PRESETS:
        return PRESETS[name]
    operand = _OPERAND.fullmatch(name) if isinstance(given, str) else None
    if operand is None:
        known = (*PRESETS, *_ALIASES)
        hint = did_you_mean(given, known) if isinstance(given, str) else "; a sign before a number needs quotes: '+2'"
        raise InterventionError(
            f"preset={given!r}: expected one of {', '.join(known)}, or =, + or * with a number or a live statistic "
            f"such as +std{hint}"
        )
    op, statistic, number = _OPERATIONS[operand[1]], operand[2], operand[3]
    if statistic:
        return {"op": op, "value": f"live_{statistic.lower()}", "scope": "sequence"}
    return {"op": op, "factor": float(number)} if op == "scale" else {"op": op, "value": float(number)}
