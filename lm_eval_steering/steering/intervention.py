"""How a user writes an intervention: flat arguments, a preset with a paper's name, or a YAML file of steps.

The schema that all of them are held to is in `schema`; it is exported here too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lm_eval_steering.errors import InterventionError, did_you_mean
from lm_eval_steering.steering.fields import NORMAL, is_live, read_value
from lm_eval_steering.steering.schema import Intervention, Step, build

__all__ = ["ARGUMENTS", "DEACTIVATIONS", "PRESETS", "Intervention", "Step", "build", "from_arguments"]

STEP_ARGUMENTS = (
    "language", "op", "value", "factor", "preset", "deactivate", "deactivate_to", "keep_shared", "site", "layers",
    "positions", "scope", "seed",
)  # fmt: skip
ARGUMENTS = (*STEP_ARGUMENTS, "intervention")

# Deactivations by the name that Gurgurov et al. 2025 give them (fallbacks.py), as an operation on the activation.
DEACTIVATIONS: dict[str, dict[str, Any]] = {
    "negate": {"op": "scale", "factor": -1.0},
    "mask": {"op": "scale", "factor": -0.1},
    "random": {"op": "set", "value": NORMAL, "factor": 0.1},
    "noise": {"op": "add", "value": NORMAL, "factor": 5.0},
}
# Rahmanisa et al. 2025 (p_max, p_median, =max, +max, =0, =P10) and Gurgurov et al. 2025 (the others).
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
    "deactivate": {"op": "set", "value": 0.0, "deactivation": True},
}
# For shells and files in which a sign would have to be quoted.
_ALIASES = {"set_max": "=max", "add_max": "+max", "set_0": "=0", "set_p10": "=P10"}
# The scripts' grammar, with numbers that need not be whole: an operation, then a number or a live statistic.
_OPERAND = re.compile(r"([=+*])(?:(max|mean|median|min|std|iqr|mad|P\d\d)|(-?\d+(?:\.\d+)?))")
_OPERATIONS = {"=": "set", "+": "add", "*": "scale"}
_SAID: tuple[str, ...] = ("op", "value", "factor", "deactivate")
_COMMON = ("site", "layers", "positions")


def from_arguments(arguments: Mapping[str, Any]) -> Intervention:
    """The intervention that model arguments describe; arguments that are None count as absent.

    Args:
        arguments: of the names in ARGUMENTS; lists are written `a+b`. `intervention` is the path of a YAML file with
            a list of steps, each a mapping of STEP_ARGUMENTS, or that list itself; it stands alone.

    Raises:
        SteeringError: one line that names the argument, what was found and what was expected.
    """
    given: dict[str, Any] = {key: value for key, value in arguments.items() if value is not None}
    if unknown := sorted(given.keys() - set(ARGUMENTS)):
        raise InterventionError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], ARGUMENTS)}")
    if "intervention" not in given:
        return build({"steps": _steps(given)})
    if len(given) > 1:
        other = next(key for key in given if key != "intervention")
        raise InterventionError(f"{other}= beside intervention=: the file holds every step; write it there")
    return _from_list(given["intervention"])


def _from_list(found: Any) -> Intervention:
    """Steps of a file, or of a list that stands for one; errors say in which step."""
    where = "intervention"
    if isinstance(found, str | Path):
        where, found = f"intervention={found}", _read(Path(found))
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise InterventionError(f"{where}: expected a list of steps, each a mapping such as language: fra_Latn")
    steps: list[dict[str, Any]] = []
    for number, item in enumerate(found, start=1):
        here = f"{where}, step {number}"
        if not isinstance(item, Mapping):
            raise InterventionError(f"{here}: expected a mapping such as language: fra_Latn, found {item!r}")
        if unknown := [str(key) for key in item if key not in STEP_ARGUMENTS]:
            raise InterventionError(f"{here}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], STEP_ARGUMENTS)}")
        try:
            own = _steps({key: value for key, value in item.items() if value is not None})
            build({"steps": own})  # each by itself, so that the message can say where
        except InterventionError as error:
            raise InterventionError(f"{here}: {error}") from None
        if not own:
            raise InterventionError(f"{here}: neither language nor deactivate: it would do nothing")
        steps += own
    return build({"steps": steps})


class _Strict(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML keeps the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.YAMLError(f"the key {key!r} is written twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Strict)
    except OSError as error:
        raise InterventionError(f"intervention={path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InterventionError(f"intervention={path}: not a YAML file: {' '.join(str(error).split())}") from None


def _steps(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Fields of the steps that flat arguments describe: the deactivation first, then the steering step."""
    given = _with_preset(dict(given))
    _refuse_idle(given)
    common = {key: given[key] for key in _COMMON if key in given}
    steps: list[dict[str, Any]] = []
    if "deactivate" in given:
        own = _deactivation(given.get("deactivate_to", 0.0))
        kept = {"keep_shared": given["keep_shared"]} if "keep_shared" in given else {}
        steps.append({**own, "languages": given["deactivate"], "deactivation": True, **kept, **common})
    if "language" in given:
        own = {key: given[key] for key in ("op", "value", "factor") if key in given}
        steps.append({"languages": given["language"], **own, **common})
    _give(steps, given, "scope", is_live, "a live_ statistic as value= or deactivate_to=")
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
    if "deactivate" not in given and (idle := [key for key in (*_COMMON, "scope", "seed") if key in given]):
        raise InterventionError(f"{idle[0]}= without language= or deactivate=: nothing to intervene on")


def _give(steps: list[dict[str, Any]], given: Mapping[str, Any], key: str, takes: Any, wanted: str) -> None:
    """Hand an argument to the steps whose value it speaks of."""
    if key not in given or not steps:
        return
    fitting = [step for step in steps if takes(step.get("value"))]
    if not fitting:
        raise InterventionError(f"{key}={given[key]!r}: it speaks of {wanted}, and there is none")
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
    own = dict(_preset(name))
    if "language" not in given:
        raise InterventionError(f"preset={name} without language=: say whose neurons, such as language=fra_Latn")
    if own.pop("deactivation", False):
        if wrong := [key for key in _SAID if key in given]:
            raise InterventionError(f"{wrong[0]}= beside preset={name}: it sets the language's neurons to 0")
        given["deactivate"] = given.pop("language")
        return given
    if wrong := [key for key in map(str, own) if key in given]:
        raise InterventionError(f"{wrong[0]}= beside preset={name}, which says it: leave one of the two out")
    if own["op"] == "scale" and not is_live(own.get("value")) and "value" in given:
        raise InterventionError(f"value= beside preset={name}, which says it: leave one of the two out")
    return given | own


def _preset(found: Any) -> dict[str, Any]:
    name = _ALIASES.get(str(found), str(found))
    if name in PRESETS:
        return PRESETS[name]
    operand = _OPERAND.fullmatch(name) if isinstance(found, str) else None
    if operand is None:
        known = (*PRESETS, *_ALIASES)
        hint = did_you_mean(found, known) if isinstance(found, str) else "; a sign before a number needs quotes: '+2'"
        raise InterventionError(
            f"preset={found!r}: expected one of {', '.join(known)}, or =, + or * with a number or a live statistic "
            f"such as +std{hint}"
        )
    op, statistic, number = _OPERATIONS[operand[1]], operand[2], operand[3]
    if statistic:
        return {"op": op, "value": f"live_{statistic.lower()}", "scope": "sequence"}
    return {"op": op, "factor": float(number)} if op == "scale" else {"op": op, "value": float(number)}
