"""How cells are named and grouped (kinds of intervention, families of tasks, self and cross), and numbers as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from lm_eval_steering.languages import english_name, same_language
from lm_eval_steering.lmeval.evaluated_language import evaluated_language, family_prefixes
from lm_eval_steering.steering.intervention import parse
from lm_eval_steering.steering.prompt import KIND

SELF, CROSS, SEVERAL = "self", "cross", "several"
NATS = "nats_per_token"
# Of the many numbers of a task the first success and the first damage that it has are drawn and talked about.
SUCCESSES = (
    "lfs_clean", "lfs", "lss", "clas_language", "acc", "exact_match", "f1", "bleu", "chrf++", "acc_norm",
    "lang_expected",
)  # fmt: skip
DAMAGES = (NATS, "token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")  # one thing, several names

_OUR_CODE = re.compile(r"_[a-z]{3}_[A-Z][a-z]{3}(?=_|$)")
_OTHERS = "others"
_ROUNDING = 1e-12
METRIC_NAMES = {
    "lfs": "LFS", "lpr": "LPR", "wpr": "WPR", "lfs_clean": "clean LFS", "lss": "LSS", "acc": "accuracy",
    "acc_norm": "accuracy (normalised)", "bleu": "BLEU",
    "chrf++": "chrF++", "nats_per_token": "nats per token", "token_perplexity": "perplexity per token",
    "bits_per_byte": "bits per byte", "exact_match": "exact match", "f1": "F1", "lang_unknown": "language unknown",
    "degenerate": "degenerate outputs", "repeated": "repeated outputs", "lang_expected": "in the expected language",
    "unfinished": "unfinished thoughts",
}  # fmt: skip


def metric_label(metric: str, filter_: str) -> str:
    """One name for a metric and lm-eval's filter: `acc`, `exact_match@strict-match`."""
    return metric if filter_ in ("", "none") else f"{metric}@{filter_}"


def readable_metric(metric: str) -> str:
    """For figures and sentences."""
    name, at, filter_ = metric.partition("@")
    return f"{METRIC_NAMES.get(name, name.replace('_', ' '))}{f' ({filter_})' if at else ''}"


def is_lss(metric: str) -> bool:
    """Whether a metric is LSS: a share of items, compared with the unsteered model in itself."""
    return metric.startswith("lss")


def is_share_of_items(metric: str) -> bool:
    """Whether a metric is a share of items that moved, of which no half is a gain: LSS and its variants, not shifts."""
    return metric.partition("@")[0] in {"lss", "lss_distinct"}


def sign_of(higher_is_better: Any) -> int:
    """1 if higher is better, -1 if lower is, 0 if unknown."""
    if higher_is_better is None or higher_is_better != higher_is_better:  # noqa: PLR0124  (nan)
        return 0
    return 1 if higher_is_better else -1


def family_of_task(task: str) -> str:
    """The task without its language: `xcopa` for `steering_xcopa_ita_Latn` and for `xcopa_it`."""
    if task.startswith("steering_"):
        return _OUR_CODE.sub("", task).removeprefix("steering_")
    if evaluated_language(task) is None:
        return task
    prefixes = [prefix for prefix in family_prefixes() if task.startswith(prefix)]
    return max(prefixes, key=len, default=task).strip("_")


def families(tasks: list[str]) -> dict[str, str]:
    """Task -> family; tasks of one family that have one language between them keep their own names."""
    family_of = {task: family_of_task(task) for task in tasks}
    seen: dict[tuple[str, str | None], list[str]] = {}
    for task, family in family_of.items():
        seen.setdefault((family, evaluated_language(task)), []).append(task)
    return family_of | {task: task for same in seen.values() if len(same) > 1 for task in same}


def relation_of(steered: str, evaluated: str) -> str:
    """`self`, `cross`, or `several` where the items are in several languages."""
    if not evaluated or not steered:
        return SEVERAL
    return SELF if any(same_language(code, evaluated) for code in steered.split("+")) else CROSS


def kind_of(signature: str, preset: str | None, off: str) -> str:
    """An intervention without its language and factor: `add mean at product`, `p_max`, `scale, others silenced`.

    Args:
        signature: of the score.
        preset: its name in the plan.
        off: languages deactivated as well, from `silenced`.
    """
    intervention = parse(signature)
    if intervention.prompt is not None:
        return intervention.prompt.kind
    steps = intervention.steps
    if not steps:
        return ""
    step = next((step for step in reversed(steps) if not step.deactivation), steps[-1])
    value = "" if step.value is None else f"{step.value:g}" if isinstance(step.value, float | int) else step.value
    what = preset or f"{step.op} {value}".strip()
    name = f"deactivate ({what})" if step.deactivation and not preset else what
    if step.site != "activation":
        name += f" at {step.site}"
    parts = [name]
    if step.source is not None:
        parts.append(f"from {step.source}")
    if step.dimensions is not None:
        parts.append(f"{step.dimensions} dimensions")
    if step.layers is not None:
        layers = "+".join(map(str, step.layers)) if isinstance(step.layers, tuple) else str(step.layers)
        parts.append(f"{'layer' if layers.isdecimal() else 'layers'} {layers}")
    if step.positions != "all":
        parts.append(f"{step.positions} positions")
    if step.scope == "sequence" and not preset:
        parts.append("scope sequence")
    if off:
        parts.append(f"{off} silenced")
    return ", ".join(parts)


def is_prompt(kind: str) -> bool:
    """Whether an intervention, by its name of `kind_of`, is an instruction in the prompts, which changes no neurons."""
    return kind.startswith(KIND)


def silenced(languages: list[str], off: list[str]) -> list[str]:
    """Languages that each amplification also deactivates: `others` if it is always every other language, else codes.

    Args:
        languages: steered ones of each row, joined by `+`; empty for a pure deactivation.
        off: deactivated ones of each row.
    """
    both = {(on, out) for on, out in zip(languages, off, strict=True) if on and out}
    whole = {frozenset({*on.split("+"), *out.split("+")}) for on, out in both}
    others = len(both) > 1 and len(whole) == 1
    return ["" if not on else _OTHERS if out and others else out for on, out in zip(languages, off, strict=True)]


def language_name(code: str) -> str:
    """English name; of several languages their names, of none a word for it."""
    return " + ".join(english_name(part) for part in code.split("+")) if code else "several languages"


def number(value: Any, signed: bool = False) -> str:
    """Three significant digits; empty for nan. What a difference of equal means leaves is 0."""
    if value is None or math.isnan(value):
        return ""
    value = 0.0 if abs(value) < _ROUNDING else value
    text = f"{value:+.3g}" if signed else f"{value:.3g}"
    return f"{value:+,.0f}" if signed and "e" in text and abs(value) >= 1 else text


def with_interval(value: float, low: float, high: float) -> str:
    """`+0.12 [+0.03, +0.21]`; empty for nan."""
    if math.isnan(value):
        return ""
    ends = "" if math.isnan(low) else f" [{number(low, True)}, {number(high, True)}]"
    return f"{number(value, True)}{ends}"


def counted(count: int, noun: str) -> str:
    """`1 task`, `1,200 tasks`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(parts: Sequence[str], most: int = 12) -> str:
    """`a, b and c`; of very many the first ones and how many more."""
    if len(parts) > most:
        return f"{', '.join(parts[: most - 1])} and {len(parts) - most + 1} more"
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
