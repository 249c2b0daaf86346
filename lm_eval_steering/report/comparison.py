"""Two runs, or two interventions of one run: what the second does beside the first, over the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval_steering.errors import did_you_mean
from lm_eval_steering.report.read import Facts, ReportError, Samples, Sweep

if TYPE_CHECKING:
    import pandas as pd

_FIRST = "first: "
_PLACE = ["task", "steered", "kind", "factor", "items"]


def compare_runs(first: Sweep, second: Sweep) -> Sweep:
    """Cells of the second run, each with the same cell of the first in the place of its baseline.

    The same cell has the same task, steered language, intervention and factor. Where the first run is not steered at
    all (a plain lm-eval run), its tasks stand against every steered cell of the second.

    Raises:
        ReportError: if no cell is in both.
    """
    unsteered = bool(first.cells["is_baseline"].all())
    place = ["task"] if unsteered else _PLACE
    base = first.cells if unsteered else first.steered_cells()
    after = second.steered_cells()
    found = _paired(base, after, place)
    if found.empty:
        raise ReportError(
            f"{first.facts.title} and {second.facts.title} have no cell in common (same {', '.join(place)}); the first "
            f"has {_some(base)}, the second {_some(after)}"
        )
    return _comparison(first, second, found, base, first.facts.title)


def compare_interventions(sweep: Sweep, kinds: Sequence[str]) -> Sweep:
    """Cells of the second kind of intervention, each with the first kind's at the same factor as its baseline.

    Raises:
        ReportError: if a kind is not in the sweep, or they share no factor.
    """
    steered = sweep.steered_cells()
    known = list(dict.fromkeys(steered["kind"]))
    if len(kinds) != 2:
        raise ReportError(f"expected two runs, or --intervention twice with two of: {', '.join(map(repr, known))}")
    for kind in kinds:
        if kind not in known:
            raise ReportError(f"--intervention {kind!r} is not in {sweep.facts.title}{did_you_mean(kind, known)}")
    base, after = (steered[steered["kind"] == kind] for kind in kinds)
    found = _paired(base, after, [name for name in _PLACE if name != "kind"])
    if found.empty:
        factors = [sorted(own["factor"].dropna().unique()) for own in (base, after)]
        raise ReportError(f"{kinds[0]!r} and {kinds[1]!r} share no factor: {factors[0]} and {factors[1]}")
    return _comparison(sweep, sweep, found, base, kinds[0])


def _paired(base: pd.DataFrame, after: pd.DataFrame, place: list[str]) -> pd.DataFrame:
    """Rows of `after` with their baseline in `base`; a factor that is absent equals an absent one."""

    def keys(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
        filled = frame[place].astype(object).where(frame[place].notna(), None)
        return list(filled.itertuples(index=False, name=None))

    of = dict(zip(keys(base), base["cell"], strict=True))
    baselines = [of.get(key) for key in keys(after)]
    return after.assign(baseline_cell=baselines)[[found is not None for found in baselines]]


def _comparison(first: Sweep, second: Sweep, found: pd.DataFrame, base: pd.DataFrame, against: str) -> Sweep:
    import pandas as pd

    used = base[base["cell"].isin(found["baseline_cell"])]
    old = used.assign(cell=_FIRST + used["cell"], is_baseline=True, baseline_cell="", steered="", relation="several")
    cells = pd.concat([old, found.assign(baseline_cell=_FIRST + found["baseline_cell"])], ignore_index=True)
    before = first.scores[first.scores["cell"].isin(used["cell"])]
    after = second.scores[second.scores["cell"].isin(found["cell"])]
    scores = pd.concat([before.assign(cell=_FIRST + before["cell"]), after], ignore_index=True)
    items = {_FIRST + cell: first.items[cell] for cell in used["cell"] if cell in first.items}
    items |= {cell: second.items[cell] for cell in found["cell"] if cell in second.items}
    outputs = {_FIRST + cell: own for cell, own in first.samples.outputs.items()} | second.samples.outputs
    left_out = len(second.steered_cells()) - len(found)
    notes = list(dict.fromkeys([*first.facts.notes, *second.facts.notes]))
    if left_out:
        notes.append(f"{left_out} steered cells of {second.facts.title} have no counterpart and are left out.")
    title = (
        f"{second.facts.title} against {against}"
        if first is not second
        else f"{found['kind'].iloc[0]} against {against}"
    )
    facts = Facts(
        title, list(dict.fromkeys([*first.facts.sources, *second.facts.sources])), "", second.facts.plan,
        second.facts.versions, second.facts.neurons, [], notes,
    )  # fmt: skip
    samples = Samples(second.samples.prompts | first.samples.prompts, outputs)
    return Sweep(cells, scores, items, second.timings, second.missing.iloc[:0], samples, facts, against)


def _some(cells: pd.DataFrame) -> str:
    found = [f"{row.task} {row.steered} {row.kind} ×{row.factor:g}" for row in cells.head(2).itertuples()]
    return "; ".join(found) or "none"
