"""From the entries of a plan to single interventions: one for each language, factor and random control."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.intervention import Intervention, Step, from_arguments
from lm_eval_steering.steering.plan import compile_plan
from lm_eval_steering.sweep.schema import Entry, Plan, PlanError

BASELINE = "baseline"


@dataclass(frozen=True)
class Variant:
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


def variants_of(plan: Plan, neuron_set: NeuronSet) -> tuple[list[Variant], list[str]]:
    """The baseline, then every intervention of the plan, its random controls behind it; and notes on what collapsed.

    Raises:
        SteeringError: if an intervention is not defined for this neuron set; nothing was loaded.
    """
    found: dict[str, Variant] = {}
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
    return [Variant(BASELINE), *own, *controls], notes


def _told_apart(found: Mapping[str, Variant]) -> list[Variant]:
    """Interventions by signature; where short names leave out how two of them differ, a hash is appended."""
    often = Counter(variant.name for variant in found.values())
    return [
        variant if often[variant.name] == 1 else replace(variant, name=f"{variant.name}-{_short_hash(signature)}")
        for signature, variant in found.items()
    ]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _of_entry(plan: Plan, number: int, entry: Entry, neuron_set: NeuronSet) -> Iterator[tuple[Variant, Intervention]]:
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
                compiled = compile_plan(from_arguments(arguments), neuron_set, plan.allow_empty)
            except SteeringError as error:
                raise PlanError(f"interventions.{number}: {error}") from None
            intervention = compiled.intervention
            variant = Variant(
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


def _refuse_unmeasured(variant: Variant) -> None:
    """A neuron set holds statistics of its own neurons alone."""
    for step in variant.intervention["steps"]:
        value = step["value"]
        if isinstance(value, str) and not value.startswith("live_") and value != "normal":
            raise PlanError(
                f"controls.random: {variant.name} needs the statistic {value!r} of random neurons, and a neuron set "
                "has those of its own neurons alone; name a text to measure them, controls: {random: "
                "..., calibration: CORPUS}, or use numbers as values"
            )


def _control(variant: Variant, seed: int) -> Variant:
    return replace(variant, name=f"{variant.name}-random{seed}", control=seed)


def _name(intervention: Intervention, entry: Entry, factor: float | None) -> str:
    """Such as `fra_Latn-add-mean-x4-product`; for people, and never read back."""
    parts = ["+".join(intervention.steered) or "none"]
    parts += [entry.preset] if entry.preset else [entry.op] if entry.op else []
    parts += [f"{entry.value}"] if entry.value is not None else []
    parts += [f"x{factor:g}"] if factor is not None else []
    parts += [f"without-{entry.deactivate}"] if entry.deactivate else []
    parts += [str(part) for part in (entry.site, entry.layers, entry.positions) if part is not None]
    text = "-".join(str(part) for part in parts).replace("=", "set_").replace("*", "times_")
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)[:80]
