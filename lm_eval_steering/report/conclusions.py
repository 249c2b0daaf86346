"""What was run in one paragraph, and the answer in three sentences, each with its numbers and their n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_steering.metrics.statistics import interval_of, over_languages
from lm_eval_steering.report.effects import ALPHA, Effects
from lm_eval_steering.report.figures import SUCCESSES
from lm_eval_steering.report.naming import CROSS, SELF, SEVERAL, language_name, number, readable_metric, with_interval
from lm_eval_steering.report.tables import CONTROLS_FOR_SD, Results

if TYPE_CHECKING:
    import pandas as pd

_FOR_A_CLAIM = 20  # random sets that a claim about LSS needs (docs/lss.md)


@dataclass(frozen=True)
class Conclusions:
    """The heart of a report.

    Attributes:
        run: what was run, one paragraph.
        sentences: whether it helps the language, whether it hurts, and whether it is more than chance.
        tiles: (number, what it is) to be read at a glance.
    """

    run: str
    sentences: tuple[str, ...]
    tiles: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Headline:
    """Cells that the answer is about: each language at its chosen factor.

    Attributes:
        rows: of the effects.
        effects: that hold their replicates.
        metric: the success that is measured.
        family: of tasks.
        kind: of intervention.
        how: in which way the factors were chosen.
    """

    rows: pd.DataFrame
    effects: Effects
    metric: str
    family: str
    kind: str
    how: str


def answer(results: Results) -> Conclusions:
    """The words of a report."""
    headline = _headline(results)
    if headline is None:
        said = ("No score of a steered run is here yet, so there is nothing to answer.",)
        return Conclusions(_run(results), said, ())
    helps, tile = _helps(results, headline)
    hurts, price_tile = _hurts(results, headline)
    chance, chance_tile = _chance(results, headline)
    tiles = tuple(found for found in (tile, price_tile, chance_tile, _size(results)) if found)
    return Conclusions(_run(results), (helps, hurts, chance), tiles)


def _run(results: Results) -> str:
    sweep = results.sweep
    steered = sweep.steered_cells()
    languages = [code for code in sorted(steered["steered"].unique()) if code]
    kinds = [kind for kind in dict.fromkeys(steered["kind"]) if kind]
    factors = sorted(steered["factor"].dropna().unique())
    controls = int(sweep.cells["control"].nunique())
    tasks = sweep.cells["task"].nunique()
    named = _listed([language_name(code) for code in languages])
    text = (
        f"{', '.join(sweep.cells['model'].unique())} was evaluated on {_count(tasks, 'task')} while the neurons of "
        f"{_count(len(languages), 'language')} ({named}) were steered, one language at a time, by {_listed(kinds)}"
    )
    if factors:
        text += f" at {_count(len(factors), 'factor')} ({_listed([f'{factor:g}' for factor in factors])})"
    text += f": {len(steered):,} steered cells, {int(sweep.cells['is_baseline'].sum()):,} baselines"
    text += f" and {_count(controls, 'matched random neuron set')} as control." if controls else ", no random controls."
    missing = len(sweep.missing)
    return text + (f" {_count(missing, 'planned cell')} {'is' if missing == 1 else 'are'} missing." if missing else "")


def _headline(results: Results) -> _Headline | None:
    """The first success that was measured; at the sweep's own choice where it made one, else at ours."""
    frame = results.effects.frame
    if frame.empty:
        return None
    for metric in [*SUCCESSES, *dict.fromkeys(frame["metric"])]:
        own = frame[(frame["metric"].str.partition("@")[0] == metric) & frame["score"].notna()]
        if own.empty:
            continue
        kind = own["kind"].value_counts(sort=True).index[0]
        own = own[own["kind"] == kind]
        then = own[own["stage"] == 2]
        if len(then):
            family = str(then["family"].iloc[0])
            rows = then[then["family"] == family]
            how = "at the factor that the sweep chose for each language on other items"
            return _Headline(_deciding(rows), results.effects, str(rows["metric"].iloc[0]), family, kind, how)
        family = str(own.groupby("family")["n"].sum().idxmax())
        rows, how = _at_best(results, own[own["family"] == family])
        return _Headline(_deciding(rows), results.effects, str(rows["metric"].iloc[0]), family, kind, how)
    return None


def _at_best(results: Results, own: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rows at the factor that was chosen for each language on one half; their numbers are over all items."""
    best = results.best
    first = own.iloc[0]
    if len(best):
        chosen = best[
            (best["family"] == first["family"]) & (best["metric"] == first["metric"]) & (best["kind"] == first["kind"])
        ]
        factors = dict(zip(chosen["steered"], chosen["factor"], strict=True))
        if factors:
            at = own[[factors.get(code) == factor for code, factor in zip(own["steered"], own["factor"], strict=True)]]
            return at, "at the best factor of each language (chosen on half of the same items, so a little optimistic)"
    return own, "at the one factor that was run"


def _deciding(rows: pd.DataFrame) -> pd.DataFrame:
    for relation in (SELF, SEVERAL, CROSS):
        if (rows["relation"] == relation).any():
            return rows[rows["relation"] == relation]
    return rows


def _helps(results: Results, headline: _Headline) -> tuple[str, tuple[str, str]]:
    rows, metric = headline.rows, headline.metric
    sign = 1 if bool(rows["higher_is_better"].iloc[0]) else -1
    better = sign * rows["difference"] > 0
    sure = better & (rows["p_holm"] < ALPHA)
    languages = rows["steered"].nunique()
    difference = rows["difference"].mean()
    low, high = _interval(rows, headline.effects)
    verb = "helps" if sign * difference > 0 else "does not help"
    name = readable_metric(metric)
    moved = (
        f"{name} is {number(rows['score'].mean())}"
        if results.sweep.is_shift(metric)
        else f"{name} went from {number(rows['baseline'].mean())} to {number(rows['score'].mean())}"
    )
    text = (
        f"Steering {verb} the language: {headline.how}, {moved} on average ({_interval_text(difference, low, high)}; "
        f"{_count(languages, 'language')}, n = {int(rows['n'].sum()):,} items on {headline.family}); "
        f"{int(better.sum())} of {len(rows)} cells improved"
    )
    tested = rows["p_holm"].notna().any()
    text += f", {int(sure.sum())} of them significantly after Holm's correction." if tested else " (not tested)."
    return text, (number(difference, True), f"{name}, {_where(rows)}")


def _where(rows: pd.DataFrame) -> str:
    return {SELF: "in the steered language", SEVERAL: "steered, prompts in several languages",
            CROSS: "in other languages"}[str(rows["relation"].iloc[0])]  # fmt: skip


def _hurts(results: Results, headline: _Headline) -> tuple[str, tuple[str, str] | None]:
    """Cross cells of the same score, else perplexity, else broken outputs, at the same factors."""
    factors = dict(zip(headline.rows["steered"], headline.rows["factor"], strict=True))
    frame = results.effects.frame
    cross = frame[(frame["family"] == headline.family) & (frame["metric"] == headline.metric)]
    cross = cross[(cross["kind"] == headline.kind) & (cross["relation"] == CROSS) & cross["difference"].notna()]
    cross = cross[[factors.get(code) == f for code, f in zip(cross["steered"], cross["factor"], strict=True)]]
    if len(cross) and (headline.rows["relation"] == SELF).any():
        sign = 1 if bool(cross["higher_is_better"].iloc[0]) else -1
        mean, worse = cross["difference"].mean(), sign * cross["difference"] < 0
        sure = int((worse & (cross["p_holm"] < ALPHA)).sum())
        verb = "hurts" if sign * mean < 0 else "does not hurt"
        text = (
            f"It {verb} the other languages on average: {readable_metric(headline.metric)} moved by "
            f"{_interval_text(mean, *_interval(cross, headline.effects))} over {len(cross):,} pairs (n = "
            f"{int(cross['n'].sum()):,} items), {int(worse.sum())} got worse, {sure} significantly."
        )
        return text, (number(mean, True), f"{readable_metric(headline.metric)}, other languages")
    return _price(results, headline, factors)


def _price(results: Results, headline: _Headline, factors: dict[str, float]) -> tuple[str, tuple[str, str] | None]:
    damage = results.damage
    if len(damage):
        own = damage[damage["kind"] == headline.kind]
        own = own[[factors.get(code) == factor for code, factor in zip(own["steered"], own["factor"], strict=True)]]
        parts = []
        for column, what in (
            ("perplexity_self", "of the steered language"),
            ("perplexity_cross", "of other languages"),
        ):
            if own[column].notna().any():
                unit = readable_metric(str(own["perplexity"].iloc[0]))
                parts.append(f"{unit} {what} moved by {number(own[column].mean(), True)}")
        tile = (number(own["perplexity_all"].mean(), True), f"{readable_metric(str(own['perplexity'].iloc[0]))}")
        n = f"n = {int(own['n_texts'].sum()):,} texts" if parts else ""
        for column, what in (("degenerate", "degenerate outputs"), ("unknown", "outputs in no known language")):
            if own[column].notna().any():
                parts.append(f"{what} by {number(100 * own[column].mean(), True)} points")
        if parts:
            outputs = f"n = {int(own['n_outputs'].sum()):,} outputs"
            said = "; ".join(part for part in (n, outputs) if part)
            return f"The price at the same factors: {_listed(parts)} ({said}).", tile if n else None
    return "What it does to other languages was not measured: no cross cells, no perplexity, no outputs.", None


def _chance(results: Results, headline: _Headline) -> tuple[str, tuple[str, str] | None]:
    controls = results.controls
    own = controls[controls["sets"] > 0] if len(controls) else controls
    if len(own):
        factors = dict(zip(headline.rows["steered"], headline.rows["factor"], strict=True))
        own = own[(own["metric"] == headline.metric) & (own["kind"] == headline.kind)]
        own = own[own["family"] == headline.family]
        own = own[[factors.get(code) == factor for code, factor in zip(own["steered"], own["factor"], strict=True)]]
    if not len(own):
        return (
            "Whether any neurons would have done the same is open: no matched random neurons were run with this score "
            "(controls: {random: 20} in the plan)."
        ), None
    sets = int(own["sets"].min())
    above = int((own["at_or_above"] > 0).sum())
    name = readable_metric(headline.metric)
    text = (
        f"Matched random neurons do {'less' if own['difference'].mean() > 0 else 'as much or more'}: with "
        f"{_count(sets, 'random set')} a cell {name} is {number(own['mean'].mean())} on average "
        f"(lowest {number(own['lowest'].min())}, highest {number(own['highest'].max())}), and in {above} of {len(own)} "
        f"cells a random set reached the language's own neurons"
    )
    if sets < _FOR_A_CLAIM:
        text += f"; {'one set is' if sets == 1 else f'{sets} sets are'} too few for a claim, take {_FOR_A_CLAIM}"
    deviations = own["deviations"].mean()
    label = f"{name}, random neurons ({_count(sets, 'set')})"
    if sets >= CONTROLS_FOR_SD and not np.isnan(deviations):
        text += f"; the distance is {number(deviations)} standard deviations of them on average"
    return f"{text}.", (number(own["mean"].mean()), label)


def _size(results: Results) -> tuple[str, str]:
    frame = results.effects.frame
    return (
        f"{int(frame.drop_duplicates('cell')['n'].sum()):,}",
        f"scored items in {frame['cell'].nunique():,} steered cells",
    )


def _interval(rows: pd.DataFrame, effects: Effects) -> tuple[float, float]:
    """95 % interval of the mean difference over languages and items; nan where a cell has no items."""
    keys = list(zip(rows["cell"], rows["metric"], strict=True))
    if not keys or any(key not in effects.replicates for key in keys):
        return np.nan, np.nan
    replicates = np.column_stack([effects.replicates[key] for key in keys])
    evaluated = [
        code if relation == CROSS else steered
        for steered, code, relation in zip(rows["steered"], rows["evaluated"], rows["relation"], strict=True)
    ]
    everything = {"all": np.ones(len(keys), dtype=bool)}
    low, high = interval_of(over_languages(replicates, list(rows["steered"]), evaluated, everything)["all"])
    return float(low), float(high)


def _interval_text(value: float, low: float, high: float) -> str:
    return f"difference {with_interval(value, low, high)}" + ("" if np.isnan(low) else ", 95 % interval")


def _count(number_: int, what: str) -> str:
    return f"{number_:,} {what}{'' if number_ == 1 else 's'}"


def _listed(parts: Sequence[str], most: int = 12) -> str:
    """`a, b and c`; of very many the first ones and how many more."""
    if len(parts) > most:
        return f"{', '.join(parts[: most - 1])} and {len(parts) - most + 1} more"
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
