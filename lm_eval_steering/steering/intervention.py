"""What the user asks for: an intervention is a list of steps, each one operation on the neurons of some languages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from lm_eval_steering import languages
from lm_eval_steering.errors import InterventionError, did_you_mean

OPERATIONS = ("scale", "add", "set")
STATISTICS = ("mean", "median", "max", "diffmean", "sentence_mean")
OTHERS = "others"
ARGUMENTS = ("language", "op", "value", "factor", "site", "deactivate", "layers", "keep_shared")
_PERCENTILE = re.compile(r"p\d\d")
_RANGES = re.compile(r"\d+(-\d+)?(\+\d+(-\d+)?)*")


def _one_of(name: str, known: tuple[str, ...]) -> BeforeValidator:
    def check(found: Any) -> Any:
        if found not in known:
            raise ValueError(f"{name}={found!r}: expected one of {', '.join(known)}{did_you_mean(str(found), known)}")
        return found

    return BeforeValidator(check)


def _finite(found: Any) -> float:
    try:
        number = float(found)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(found, bool):
        raise ValueError(f"factor={found!r}: expected a finite number")
    return number


def _value(found: Any) -> float | str | None:
    """A finite number, the name of a calibrated statistic, or nothing."""
    if found is None or (isinstance(found, str) and (found in STATISTICS or _PERCENTILE.fullmatch(found))):
        return found
    try:
        number = float(found)
    except (TypeError, ValueError):
        names = (*STATISTICS, "pNN")
        raise ValueError(
            f"value={found!r}: expected a number or one of {', '.join(names)}{did_you_mean(str(found), names)}"
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"value={found!r}: expected a finite number")
    return number


def _layers(found: Any) -> str | None:
    text = None if found is None else str(found)
    if text is not None and not _RANGES.fullmatch(text):
        raise ValueError(f"layers={text!r}: expected ranges such as 0-3+28-31")
    return text


class Step(BaseModel):
    """One operation on the union of the neurons of some languages.

    Attributes:
        op: `scale` (a' = factor * a), `add` (a' = a + factor * value) or `set` (a' = factor * value).
        languages: whose neurons; `others` alone means all languages that no steering step names.
        value: a number, or a calibrated statistic of the language; 1 by default, none for `scale`.
        factor: any finite number.
        site: `activation` (after the activation function) or `product` (input of the last linear layer).
        layers: ranges such as `0-3+28-31`; all by default.
        deactivation: whether the step silences languages rather than steering to them. By default such a step leaves
            out the neurons that a later steering step of the same intervention uses.
        keep_shared: False composes a deactivation literally, shared neurons included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Annotated[Literal["scale", "add", "set"], _one_of("op", OPERATIONS)]
    languages: tuple[str, ...]
    value: Annotated[float | str | None, BeforeValidator(_value)] = None
    factor: Annotated[float, BeforeValidator(_finite)] = 1.0
    site: Annotated[Literal["activation", "product"], _one_of("site", ("activation", "product"))] = "activation"
    layers: Annotated[str | None, BeforeValidator(_layers)] = None
    deactivation: bool = False
    keep_shared: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Step:
        if not self.languages:
            raise ValueError("a step needs at least one language")
        if OTHERS in self.languages and (not self.deactivation or len(self.languages) > 1):
            raise ValueError("others: stands alone, in deactivate= only; name the languages to steer")
        if self.op == "scale" and self.value is not None:
            raise ValueError(f"value={self.value!r}: op=scale takes none; use factor=")
        return self

    @property
    def amount(self) -> float | str:
        """The value with its default."""
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
        """`op:add|value:mean|factor:4|lang:fra_Latn|site:product|layers:all`."""
        parts = {
            "op": self.op,
            "value": _short(self.amount) if self.op != "scale" else None,
            "factor": _short(self.factor),
            "deactivate" if self.deactivation else "lang": "+".join(self.languages),
            "site": self.site,
            "layers": self.layers or "all",
            "keep_shared": None if self.keep_shared else "false",
        }
        return "|".join(f"{key}:{text}" for key, text in parts.items() if text is not None)


class Intervention(BaseModel):
    """Steps that compose in the order written; no steps is the unsteered model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[Step, ...] = ()

    @property
    def steered(self) -> tuple[str, ...]:
        """Languages that the intervention steers to, deactivated ones left out, in the order written."""
        return tuple(dict.fromkeys(code for step in self.steps if not step.deactivation for code in step.languages))

    def resolve(self, available: tuple[str, ...]) -> Intervention:
        """The same with the codes as a neuron set spells them, and `others` spelled out.

        Raises:
            UnknownLanguageError: if a language is not available; the message names the closest.
        """
        where = "the neuron set"
        steered = {languages.choose(code, available, where) for code in self.steered if code != OTHERS}

        def codes(step: Step) -> tuple[str, ...]:
            if step.languages == (OTHERS,):
                return tuple(code for code in available if code not in steered)
            return tuple(dict.fromkeys(languages.choose(code, available, where) for code in step.languages))

        return Intervention(steps=tuple(step.model_copy(update={"languages": codes(step)}) for step in self.steps))

    def signature(self) -> str:
        """Readable form, meant for a paper; `none` for the unsteered model."""
        return " ; ".join(step.signature() for step in self.steps) or "none"


def from_arguments(arguments: Mapping[str, Any]) -> Intervention:
    """The intervention that flat model arguments describe.

    Args:
        arguments: of the names in ARGUMENTS; lists are written `a+b`. `keep_shared=False` lets a deactivation silence
            neurons that the steering step uses too.

    Raises:
        InterventionError: one line that names the argument, what was found and what was expected.
    """
    given: dict[str, Any] = {key: value for key, value in arguments.items() if value is not None}
    if unknown := sorted(given.keys() - set(ARGUMENTS)):
        raise InterventionError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], ARGUMENTS)}")
    if "keep_shared" in given and "deactivate" not in given:
        raise InterventionError("keep_shared= without deactivate=: it says what a deactivation leaves out")
    common: dict[str, Any] = {key: given[key] for key in ("site", "layers") if key in given}
    steps: list[dict[str, Any]] = []
    if "deactivate" in given:
        codes = _list(given.pop("deactivate"))
        kept = {"keep_shared": given.pop("keep_shared")} if "keep_shared" in given else {}
        steps.append({"op": "set", "value": 0, "languages": codes, "deactivation": True, **kept, **common})
    if "language" in given:
        if "op" not in given:
            raise InterventionError("language= without op=: expected op=scale, op=add or op=set")
        own: dict[str, Any] = {key: given[key] for key in ("op", "value", "factor") if key in given}
        steps.append({"languages": _list(given["language"]), **own, **common})
    elif wrong := [key for key in ("op", "value", "factor") if key in given]:
        raise InterventionError(f"{wrong[0]}= without language=: say whose neurons, such as language=fra_Latn")
    elif common and not steps:
        raise InterventionError(f"{next(iter(common))}= without language= or deactivate=: nothing to intervene on")
    return build({"steps": steps})


def build(description: Mapping[str, Any]) -> Intervention:
    """An intervention from plain data, with errors of one line.

    Raises:
        InterventionError: for the first thing that is wrong.
    """
    try:
        return Intervention.model_validate(description)
    except ValidationError as failure:
        raise InterventionError(_one_line(failure)) from None


def _one_line(failure: ValidationError) -> str:
    error = failure.errors(include_url=False)[0]
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        return f"unknown key {key!r} in an intervention step{did_you_mean(key, Step.model_fields)}"
    cause = error.get("ctx", {}).get("error")
    return str(cause) if cause else f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def _list(found: Any) -> tuple[str, ...]:
    parts = [str(part) for part in found] if isinstance(found, list | tuple) else str(found).split("+")
    if any(not part.strip() for part in parts):
        raise InterventionError(f"{found!r}: expected languages joined by +, such as fra_Latn+ind_Latn")
    return tuple(part if part == OTHERS else languages.normalise(part) for part in parts)


def _short(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.10g}"
