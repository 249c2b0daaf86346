"""How the single fields of a step are read, whoever wrote them: each error names the key and the nearest valid word."""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import BeforeValidator

from lm_eval_steering import languages
from lm_eval_steering.errors import did_you_mean
from lm_eval_steering.steering.positions import FORMS, parse_positions

OPERATIONS = ("scale", "add", "set")
SITES = ("activation", "product")
SCOPES = ("token", "sequence")
STATISTICS = ("mean", "median", "max", "diffmean", "sentence_mean")
LIVE = ("live_max", "live_mean", "live_median", "live_min", "live_std", "live_iqr", "live_mad")
NORMAL = "normal"
OTHERS = "others"
VALUES = (*STATISTICS, "pNN", *LIVE, "live_pNN", NORMAL)
_PERCENTILE = re.compile(r"(live_)?p\d\d")
_RANGES = re.compile(r"\d+(-\d+)?(\+\d+(-\d+)?)*")
_LARGEST_SEED = 2**32 - 1


def is_live(value: float | str | None) -> bool:
    """Whether a value is a statistic of the activations in hand."""
    return isinstance(value, str) and value.startswith("live_")


def is_named_value(found: object) -> bool:
    """Whether a text names a statistic, calibrated or live, or the normal distribution."""
    known = (*STATISTICS, *LIVE, NORMAL)
    return isinstance(found, str) and (found in known or bool(_PERCENTILE.fullmatch(found)))


def one_of(name: str, known: tuple[str, ...]) -> BeforeValidator:
    """One of a few words."""

    def check(found: Any) -> Any:
        if found not in known:
            raise ValueError(f"{name}={found!r}: expected one of {', '.join(known)}{did_you_mean(str(found), known)}")
        return found

    return BeforeValidator(check)


def read_factor(found: Any) -> float:
    """Any finite number, negative ones and zero too."""
    number = _number(found)
    if number is None or not math.isfinite(number):
        raise ValueError(f"factor={found!r}: expected a finite number")
    return number


def read_value(found: Any, key: str = "value", more: tuple[str, ...] = ()) -> float | str | None:
    """A finite number, the name of a statistic, or nothing; `key` and `more` names are for the message."""
    if found is None or is_named_value(found):
        return found
    number = _number(found)
    if number is None:
        names = (*VALUES, *more)
        raise ValueError(
            f"{key}={found!r}: expected a number or one of {', '.join(names)}{did_you_mean(str(found), names)}"
        )
    if not math.isfinite(number):
        raise ValueError(f"{key}={found!r}: expected a finite number")
    return number


def read_layers(found: Any) -> str | None:
    """Ranges of layers, kept as text."""
    text = None if found is None else str(found)
    if text is not None and (isinstance(found, bool) or not _RANGES.fullmatch(text)):
        raise ValueError(f"layers={text!r}: expected ranges such as 0-3+28-31")
    return text


def read_positions(found: Any) -> str:
    """A form of `positions`, kept as text."""
    if not isinstance(found, str):
        # YAML reads 3:10 as a number to the base of 60.
        raise ValueError(f"positions={found!r}: expected {FORMS}; in a YAML file write it in quotes")
    parse_positions(found)
    return found


def read_flag(name: str) -> BeforeValidator:
    """True or False."""

    def check(found: Any) -> bool:
        word = str(found).lower()
        if word not in {"true", "false"}:
            raise ValueError(f"{name}={found!r}: expected True or False")
        return word == "true"

    return BeforeValidator(check)


def read_seed(found: Any) -> int:
    """A whole number that fits 32 bits."""
    number = _number(found)
    if number is None or not math.isfinite(number) or number != int(number) or not 0 <= number <= _LARGEST_SEED:
        raise ValueError(f"seed={found!r}: expected a whole number from 0 to {_LARGEST_SEED}")
    return int(number)


def read_languages(found: Any) -> tuple[str, ...]:
    """Codes joined by `+`, or a list of them, in FLORES style; `others` stays as it is.

    Raises:
        UnknownLanguageError: if a code names no language.
    """
    parts = list(found) if isinstance(found, list | tuple) else str(found).split("+")
    if isinstance(found, bool) or any(isinstance(part, bool) for part in parts):
        # YAML reads the code of Norwegian as a truth value.
        raise ValueError(
            f"language={found!r}: expected codes such as fra_Latn+ind_Latn; in a YAML file write no in quotes"
        )
    if not parts or any(not str(part).strip() for part in parts):
        raise ValueError(f"language={found!r}: expected languages joined by +, such as fra_Latn+ind_Latn")
    texts = [str(part).strip() for part in parts]
    return tuple(dict.fromkeys(text if text == OTHERS else languages.normalise(text) for text in texts))


def _number(found: Any) -> float | None:
    if isinstance(found, bool):
        return None
    try:
        return float(found)
    except (TypeError, ValueError):
        return None
