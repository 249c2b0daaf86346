"""An intervention read back from its printed signature: what a paper prints is enough to do it again."""

from __future__ import annotations

from typing import Any

from lm_eval_steering.errors import InterventionError, did_you_mean
from lm_eval_steering.steering.schema import Intervention, build

_KEYS = (
    "op", "value", "factor", "lang", "deactivate", "site", "layers", "positions", "scope", "seed", "keep_shared",
)  # fmt: skip
_OF_A_SCORE = {"neurons", "lid", "fp", "v"}  # what the harness prints after the intervention


def parse(text: str) -> Intervention:
    """The intervention that a signature describes; what a score's signature says beside it is left out.

    Raises:
        SteeringError: naming the part that cannot be read.
    """
    steps = [_fields(part.strip()) for part in text.split(";")]
    return build({"steps": [step for step in steps if step]})


def _fields(part: str) -> dict[str, Any]:
    """Fields of a step; none where the part says that nothing is done."""
    found: dict[str, Any] = {}
    for item in part.split("|"):
        key, colon, text = item.partition(":")
        if item == "none" or (colon and key in _OF_A_SCORE):
            continue
        if not colon or key not in _KEYS:
            raise InterventionError(f"signature: cannot read {item!r}{did_you_mean(key, _KEYS)}")
        found[key] = text
    if not found:
        return {}
    if "deactivate" in found:
        found |= {"languages": found.pop("deactivate"), "deactivation": True}
    elif "lang" in found:
        found["languages"] = found.pop("lang")
    if found.get("layers") == "all":
        del found["layers"]
    return found
