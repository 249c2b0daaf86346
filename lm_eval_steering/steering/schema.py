"""What the user asks for: an intervention is a list of steps, each one operation on the neurons of some languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from lm_eval_steering import languages
from lm_eval_steering.errors import InterventionError, SteeringError, did_you_mean
from lm_eval_steering.steering import fields
from lm_eval_steering.steering.fields import NORMAL, OTHERS, is_live
from lm_eval_steering.steering.positions import ALL


class Step(BaseModel):
    """One operation on the union of the neurons of some languages; `docs/interventions.md` defines each field.

    Attributes:
        op: `scale` (a' = factor * a), `add` (a' = a + factor * value) or `set` (a' = factor * value).
        languages: whose neurons; `others` alone means all languages that no steering step names.
        value: a number, a calibrated statistic of the language, a `live_` statistic of the activations in hand, or
            `normal`, seeded random numbers; 1 by default. `scale` takes a live one only: a' = factor * value * a.
        factor: any finite number.
        site: `activation` (after the activation function) or `product` (input of the last linear layer).
        layers: ranges such as `0-3+28-31`; all by default.
        positions: `all`, `prompt`, `generated`, `last`, a window (`positions.parse_positions`).
        scope: of a live statistic: `token` (that position alone) or `sequence` (the row's whole forward pass).
        seed: of `normal`.
        deactivation: whether the step silences languages rather than steering to them. By default such a step leaves
            out the neurons that a later steering step of the same intervention uses.
        keep_shared: False composes a deactivation literally, shared neurons included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Annotated[Literal["scale", "add", "set"], fields.one_of("op", fields.OPERATIONS)]
    languages: Annotated[tuple[str, ...], BeforeValidator(fields.read_languages)]
    value: Annotated[float | str | None, BeforeValidator(fields.read_value)] = None
    factor: Annotated[float, BeforeValidator(fields.read_factor)] = 1.0
    site: Annotated[Literal["activation", "product"], fields.one_of("site", fields.SITES)] = "activation"
    layers: Annotated[str | None, BeforeValidator(fields.read_layers)] = None
    positions: Annotated[str, BeforeValidator(fields.read_positions)] = ALL
    scope: Annotated[Literal["token", "sequence"], fields.one_of("scope", fields.SCOPES)] = "token"
    seed: Annotated[int, BeforeValidator(fields.read_seed)] = 0
    deactivation: Annotated[bool, fields.read_flag("deactivation")] = False
    keep_shared: Annotated[bool, fields.read_flag("keep_shared")] = True

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
        return self

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
            "site": self.site,
            "layers": self.layers or "all",
            "positions": None if self.positions == ALL else self.positions,
            "scope": None if self.scope == "token" else self.scope,
            "seed": str(self.seed) if self.value == NORMAL else None,
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

    @property
    def lookahead(self) -> bool:
        """Whether a position's edit depends on later tokens of the row, as the original scripts' statistics do."""
        return any(step.scope == "sequence" for step in self.steps)

    def resolve(self, available: tuple[str, ...]) -> Intervention:
        """The same with the codes as a neuron set spells them, and `others` spelled out.

        Raises:
            UnknownLanguageError: if a language is not available; the message names the closest.
            InterventionError: if `others` leaves no language.
        """
        where = "the neuron set"
        steered = {languages.choose(code, available, where) for code in self.steered}

        def codes(step: Step) -> tuple[str, ...]:
            if step.languages != (OTHERS,):
                return tuple(dict.fromkeys(languages.choose(code, available, where) for code in step.languages))
            if not (rest := tuple(code for code in available if code not in steered)):
                raise InterventionError("deactivate=others: every language of the neuron set is steered to")
            return rest

        return Intervention(steps=tuple(step.model_copy(update={"languages": codes(step)}) for step in self.steps))

    def signature(self) -> str:
        """Readable form, meant for a paper; `none` for the unsteered model. `signature.parse` reads it back."""
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
