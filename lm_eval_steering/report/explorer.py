"""Samples for the page: every prompt once, and under it the baseline's output and the steered ones by factor."""

from __future__ import annotations

import math
from typing import Any

from lm_eval_steering.language_families import family_order
from lm_eval_steering.languages import english_name, same_language
from lm_eval_steering.metrics.language_id import UNKNOWN
from lm_eval_steering.report.data import Output, Sweep

STEERED, OTHER, NONE = "s", "o", "u"


def explorer_data(sweep: Sweep) -> list[dict[str, Any]]:
    """One group a task, steered language and intervention.

    Each has `task`, `steered`, `kind`, `factors` (the columns, the baseline first) and `items`: [document, prompt,
    [output or null for each column]], an output being [text, language, verdict]; the verdict is `s` for the steered
    language, `u` for none that is known, `o` for any other.
    """
    outputs = {cell: {output.doc: output for output in own} for cell, own in sweep.samples.outputs.items()}
    cells = sweep.steered_cells()
    cells = cells[cells["cell"].isin(outputs)]
    order = {code: place for place, code in enumerate(family_order(sorted(cells["steered"].unique())))}
    groups = []
    for (task, steered, kind), own in cells.sort_values("factor").groupby(["task", "steered", "kind"]):
        base = own["baseline_cell"].iloc[0]
        columns = [outputs.get(base, {}), *(outputs[cell] for cell in own["cell"])]
        prompts = _prompts(sweep, task, own["target"].iloc[0])
        docs = sorted({doc for column in columns for doc in column})
        groups.append(
            {
                "task": task,
                "steered": steered,
                "kind": kind,
                "factors": [sweep.against, *(_factor(factor) for factor in own["factor"])],
                "items": [
                    [doc, prompts.get(doc, ""), [_output(column.get(doc), steered) for column in columns]]
                    for doc in docs
                ],
            }
        )
    return sorted(groups, key=lambda group: (group["task"], order[group["steered"]], group["kind"]))


def language_names(groups: list[dict[str, Any]]) -> dict[str, str]:
    """Code -> English name, of every language that an output or a choice has."""
    codes = {part for group in groups for part in group["steered"].split("+")}
    codes |= {output[1] for group in groups for item in group["items"] for output in item[2] if output and output[1]}
    return {code: english_name(code) if code != UNKNOWN else "unknown" for code in sorted(codes)}


def _prompts(sweep: Sweep, task: str, target: str) -> dict[int, str]:
    found = sweep.samples.prompts.get((task, target))
    return found if found else sweep.samples.prompts.get((task, ""), {})


def _factor(factor: float) -> str:
    return f"×{factor:g}" if not math.isnan(factor) else "steered"


def _output(output: Output | None, steered: str) -> list[str] | None:
    if output is None:
        return None
    return [output.text, output.language, verdict(output.language, steered)]


def verdict(language: str, steered: str) -> str:
    """Whether an output is in a steered language, in none that is known, or in another."""
    if language in ("", UNKNOWN):
        return NONE
    return STEERED if any(same_language(language, code) for code in steered.split("+")) else OTHER
