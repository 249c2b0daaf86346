"""Two runs, or two interventions of one run, compared over the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval_steering.errors import did_you_mean
from lm_eval_steering.report.read import Facts, ReportError, Samples, Sweep

if TYPE_CHECKING:
    import pandas as pd

_FIRST, _UNSTEERED = "first: ", "unsteered"
_PLACE = ["task", "steered", "kind", "factor", "items"]


def compare_runs(first: Sweep, second: Sweep, allow_different_prompts: bool = False) -> Sweep:
    """Cells of the second run, each with the same cell of the first as its baseline.

    The same cell has the same task, steered language, intervention and factor. Where the two have no such cell in
    common, runs are paired by task alone: an unsteered run with every cell of the other one, and two runs that have one
    cell of each task with one another, whatever was done to the model. Whether a pair was asked the same is checked
    when the results are computed (`read.check_pairs`).

    Args:
        first: the baseline.
        second: what is compared with it.
        allow_different_prompts: compare different prompts and models too, with a warning on every table.

    Raises:
        ReportError: if no cell is in both.
    """
    base, after = _compared(first), _compared(second)
    pairs = _paired(base, after, _PLACE)
    unsteered = bool(first.cells["is_baseline"].all())
    if pairs.empty and not base["task"].duplicated().any() and (unsteered or not after["task"].duplicated().any()):
        pairs = _paired(base, after, ["task"])
    if pairs.empty:
        raise ReportError(
            f"{first.facts.title} and {second.facts.title} have no cell in common (same {', '.join(_PLACE)}); the "
            f"first has {_some(base)}, the second {_some(after)}"
        )
    comparison = _comparison(first, second, pairs, base, first.facts.title)
    comparison.allow_different_prompts = allow_different_prompts
    return comparison


def _compared(run: Sweep) -> pd.DataFrame:
    """The steered cells of a run; all of them where none is steered."""
    steered = run.steered_cells()
    return steered if len(steered) else run.cells


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
    pairs = _paired(base, after, [name for name in _PLACE if name != "kind"])
    if pairs.empty:
        factors = [sorted(cells["factor"].dropna().unique()) for cells in (base, after)]
        raise ReportError(f"{kinds[0]!r} and {kinds[1]!r} share no factor: {factors[0]} and {factors[1]}")
    return _comparison(sweep, sweep, pairs, base, kinds[0])


def _paired(base: pd.DataFrame, after: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Rows of `after` with their baseline in `base`; a factor that is absent equals an absent one."""

    def keys(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
        filled = frame[columns].astype(object).where(frame[columns].notna(), None)
        return list(filled.itertuples(index=False, name=None))

    cell_of = dict(zip(keys(base), base["cell"], strict=True))
    baselines = [cell_of.get(key) for key in keys(after)]
    return after.assign(baseline_cell=baselines)[[cell is not None for cell in baselines]]


def _comparison(first: Sweep, second: Sweep, paired: pd.DataFrame, base: pd.DataFrame, against: str) -> Sweep:
    import pandas as pd

    used = base[base["cell"].isin(paired["baseline_cell"])]
    old = used.assign(cell=_FIRST + used["cell"], is_baseline=True, baseline_cell="", steered="", relation="several")
    new = paired.assign(baseline_cell=_FIRST + paired["baseline_cell"], is_baseline=False, control=pd.NA)
    new["kind"] = new["kind"].where(new["kind"] != "", _UNSTEERED)
    cells = pd.concat([old, new], ignore_index=True).astype({"control": "Int64"})
    before = first.scores[first.scores["cell"].isin(used["cell"])]
    after = second.scores[second.scores["cell"].isin(paired["cell"])]
    scores = pd.concat([before.assign(cell=_FIRST + before["cell"]), after], ignore_index=True)
    items = {_FIRST + cell: first.items[cell] for cell in used["cell"] if cell in first.items}
    items |= {cell: second.items[cell] for cell in paired["cell"] if cell in second.items}
    outputs = {_FIRST + cell: kept for cell, kept in first.samples.outputs.items()} | second.samples.outputs
    left_out = len(_compared(second)) - len(paired)
    notes = [note for note in [*first.facts.notes, *second.facts.notes] if "no finished baseline" not in note]
    notes = list(dict.fromkeys(notes))
    if left_out:
        notes.append(f"{left_out} cells of {second.facts.title} have no counterpart and are left out.")
    title = (
        f"{second.facts.title} against {against}"
        if first is not second
        else f"{paired['kind'].iloc[0]} against {against}"
    )
    facts = Facts(
        title, list(dict.fromkeys([*first.facts.sources, *second.facts.sources])), "", second.facts.plan,
        second.facts.versions, second.facts.neurons, second.facts.config, [], notes,
    )  # fmt: skip
    samples = Samples(second.samples.prompts | first.samples.prompts, outputs)
    facts.warnings = list(dict.fromkeys([*first.facts.warnings, *second.facts.warnings]))
    return Sweep(cells, scores, items, second.timings, second.missing.iloc[:0], samples, facts, against)


def _some(cells: pd.DataFrame) -> str:
    shown = [f"{row.task} {row.steered} {row.kind or _UNSTEERED} ×{row.factor:g}" for row in cells.head(2).itertuples()]
    return "; ".join(shown).replace(" ×nan", "") or "none"
