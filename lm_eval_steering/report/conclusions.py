"""What was run in one paragraph, and the answer: a verdict from the decision table of docs/report.md, with its numbers.

The verdict follows from three things together: whether the interval of the difference excludes 0, whether matched
random neurons do as much, and how far degenerate outputs and nats per token rose. Averages over different sets of
languages are never compared; what is missing is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_steering.report.effects import ALPHA, Effects, effects_of, scores_by_cell
from lm_eval_steering.report.method_comparison import BEST, MEAN_OVER, MethodComparison
from lm_eval_steering.report.naming import (
    CROSS,
    NATS,
    SELF,
    SUCCESSES,
    counted,
    is_prompt,
    language_name,
    listed,
    number,
    readable_metric,
    with_interval,
)  # fmt: skip
from lm_eval_steering.report.read import BASELINE, CLEAN, DEGENERATE, FORCED, LANG_UNKNOWN, REPEATED
from lm_eval_steering.report.tables import (
    Results,
    control_scores,
    controls_by_place,
    deciding,
    intervals,
    means_of_sets,
)
from lm_eval_steering.sweep.choice import REPORT

if TYPE_CHECKING:
    import pandas as pd

# --- The decision table ---------------------------------------------------------------------------------------------

NO_EVIDENCE, HELPS, HURTS, DESTROYS = "No evidence", "Helps at this price", "Hurts", "Destroys the text"
SETS_FOR_A_CLAIM = 20  # matched random sets
DEGENERATE_LIMIT = 0.5  # rise of the share of degenerate outputs from which the text is called destroyed
NATS_LIMIT = 3.0  # rise of nats per token of the steered language's own text; a perplexity 20 times as high
_HIGH_LSS, _LOW_SUCCESS = 0.8, 0.5
_EXAMPLES = 3  # settings in one sentence
_FEWEST_ITEMS = 10  # on fewer no method is called the winner
# Shares of the same outputs as the score, by metric; and what was measured on texts.
_OF_OUTPUTS = {"degenerate": DEGENERATE, "repeated": REPEATED, "unknown": LANG_UNKNOWN}
_PRICE = (*_OF_OUTPUTS, "nats_self", "nats_cross")


@dataclass(frozen=True)
class Evidence:
    """What a verdict follows from; nan where it is not known.

    Attributes:
        low: end of the 95 % interval of the mean difference, turned so that positive is better.
        high: other end.
        sets: matched random sets that were run for every language.
        reached: how many of them score as well as the language's own neurons, on the mean over the languages.
        degenerate: rise of the share of degenerate outputs, -1 to 1.
        nats: rise of nats per token on text of the steered language.
        random_is_null: whether 0 is no null (LSS), so that only random sets can tell an effect from none.
    """

    low: float = np.nan
    high: float = np.nan
    sets: int = 0
    reached: int = 0
    degenerate: float = np.nan
    nats: float = np.nan
    random_is_null: bool = False

    @property
    def verdict(self) -> str:
        """The cell of the decision table in docs/report.md; a rise that is nan is within its limit."""
        if self.degenerate >= DEGENERATE_LIMIT or self.nats >= NATS_LIMIT:
            return DESTROYS
        if not self.random_is_null and self.high < 0:
            return HURTS
        if not self.low > 0 or self.reached or (self.random_is_null and self.sets < SETS_FOR_A_CLAIM):
            return NO_EVIDENCE
        return HELPS


@dataclass(frozen=True)
class Conclusions:
    """The heart of a report.

    Attributes:
        run: what was run, one paragraph.
        sentences: the verdict with effect and price, what happens to other languages, and whether random neurons do
            the same; then what contradicts it, and the answer for deactivations, where there are any.
        tiles: (number, what it is) to be read at a glance.
    """

    run: str
    sentences: tuple[str, ...]
    tiles: tuple[tuple[str, str], ...]


def answer(results: Results) -> Conclusions:
    """The words of a report."""
    sentences: list[str] = []
    tiles: list[tuple[str, str]] = []
    headline = _headline(results)
    if headline is not None:
        evidence, null = evidence_of(results, headline)
        sentences += [
            _verdict(results, headline, evidence),
            _others(results, headline),
            *([_chance(headline, evidence, null)] if null or results.sweep.against == BASELINE else []),
        ]
        sentences += _contradictions(results, headline)
        tiles += _tiles(headline, evidence, null)
    sentences += _equal_damage(results)
    sentences += _each_at_its_best(results.methods)
    sentences += _deactivations(results)
    if not sentences:
        sentences = ["No score of a steered run is here yet, so there is nothing to answer."]
    return Conclusions(_run(results), tuple(sentences), (*tiles, _size(results)))


def _run(results: Results) -> str:
    sweep = results.sweep
    steered = sweep.steered_cells()
    languages = [code for code in sorted(steered["steered"].unique()) if code]
    kinds = [kind for kind in dict.fromkeys(steered["kind"]) if kind]
    factors = sorted(steered["factor"].dropna().unique())
    prompted = sweep.cells["kind"].map(is_prompt)
    controls, naming = (int(sweep.cells.loc[chosen, "control"].nunique()) for chosen in (~prompted, prompted))
    tasks = sweep.cells["task"].nunique()
    text = f"{', '.join(sweep.cells['model'].unique())} was evaluated on {counted(tasks, 'task')}"
    if languages:
        named = listed([language_name(code) for code in languages])
        what = counted(len(languages), "language")
        steered_to = (
            f"{what} ({named}) were steered to" if prompted.any() else f"the neurons of {what} ({named}) were steered"
        )
        text += f" while {steered_to}, one language at a time, by {listed(kinds)}"
    if factors:
        text += f" at {counted(len(factors), 'factor')} ({listed([f'{factor:g}' for factor in factors])})"
    text += f": {counted(len(steered), 'steered cell' if languages else 'cell')}"
    text += f", {counted(int(sweep.cells['is_baseline'].sum()), 'baseline')}"
    if naming:
        text += f", {counted(naming, 'other language')} that each instruction names instead as control"
    text += (
        f" and {counted(controls, 'matched random neuron set')} as control." if controls else
        "." if naming else ", no random controls."
    )  # fmt: skip
    missing = len(sweep.missing)
    return text + (f" {counted(missing, 'planned cell')} {'is' if missing == 1 else 'are'} missing." if missing else "")


# --- Which cells the answer is about --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """Cells that the answer is about: each language at its chosen intervention and factor.

    Attributes:
        rows: of the effects, with `degenerate`, `nats_self`, `nats_cross` and `unknown` (rises) of the language.
        effects: that hold their replicates.
        metric: the success that is measured.
        family: of tasks.
        how: in which way the factors were chosen.
        half: whether the rows are over the half of the items that nothing was chosen on.
    """

    rows: pd.DataFrame
    effects: Effects
    metric: str
    family: str
    how: str
    half: bool

    @property
    def prompts(self) -> bool:
        """Whether all of its settings are instructions, whose controls name other languages."""
        return bool(self.rows["kind"].map(is_prompt).all())

    @property
    def sign(self) -> int:
        """1 where more is better."""
        return 1 if bool(self.rows["higher_is_better"].iloc[0]) else -1

    @property
    def relation(self) -> str:
        """Whether the items are in the steered language, in others, or in several."""
        return str(self.rows["relation"].iloc[0])

    @property
    def languages(self) -> pd.DataFrame:
        """The price for each steered language, over its cells."""
        return self.rows.groupby("steered", sort=False, as_index=False)[list(_PRICE)].mean()

    @property
    def settings(self) -> set[tuple[str, str, float]]:
        """(steered language, intervention, factor)."""
        return set(_settings(self.rows))


def _settings(frame: pd.DataFrame) -> list[tuple[str, str, float]]:
    factors = frame["factor"].fillna(0.0)  # nan is not equal to itself
    return list(zip(frame["steered"], frame["kind"], factors, strict=True))


def _metrics(frame: pd.DataFrame) -> np.ndarray:
    """(rows,) metrics without lm-eval's filter."""
    return np.array([str(metric).partition("@")[0] for metric in frame["metric"]], dtype=object)


def _at(frame: pd.DataFrame, settings: set[tuple[str, str, float]]) -> pd.DataFrame:
    return frame[[setting in settings for setting in _settings(frame)]] if len(frame) else frame


def _headline(results: Results) -> Headline | None:
    """The first success that was measured, at the sweep's own choice where it made one, else at ours."""
    frame = results.effects.frame
    frame = frame[~frame["deactivation"] & frame["score"].notna() & frame["higher_is_better"].notna()]
    chosen = set(_settings(frame[frame["stage"] == 2]))
    for metric in [*SUCCESSES, *dict.fromkeys(frame["metric"])]:
        rows = frame[_metrics(frame) == metric]
        if chosen:
            rows = _at(rows, chosen)
            rows = rows[rows["stage"] == 2] if (rows["stage"] == 2).any() else rows
        if rows.empty:
            continue
        family = str(rows.groupby("family")["n"].sum().idxmax())
        rows = rows[rows["family"] == family]
        rows = deciding(rows[rows["metric"] == rows["metric"].iloc[0]])
        if chosen:
            tried = set(frame.loc[frame["stage"] == 1, "task"])
            apart = (rows["items"] == REPORT).all() or not (set(rows["task"]) & tried)
            how = "chosen by the sweep on " + ("other items" if apart else "these very items, so optimistic")
            return _with_damage(results, rows, results.effects, how, False)
        return _at_best(results, rows[rows["kind"] == _kind_of_answer(results, rows)])
    return None


def _kind_of_answer(results: Results, rows: pd.DataFrame) -> str:
    """Of the kinds with most cells the one that does best on the items that factors are chosen on, else the first."""
    cells = rows["kind"].value_counts(sort=True)
    kinds = [str(kind) for kind in cells.index if cells[kind] == cells.iloc[0]]
    best = results.best
    if len(kinds) > 1 and len(best):
        first = rows.iloc[0]
        own = best[(best["family"] == first["family"]) & (best["metric"] == first["metric"]) & best["kind"].isin(kinds)]
        sign = 1 if bool(first["higher_is_better"]) else -1
        means = sign * own.groupby("kind", sort=False)["score_choose"].mean()
        if len(means) == len(kinds) and own.groupby("kind")["steered"].nunique().nunique() == 1:
            return str(means.idxmax())
    return kinds[0]


def _at_best(results: Results, rows: pd.DataFrame) -> Headline:
    """Rows at the factor that was chosen for each language on one half of the items, over the other half."""
    sweep, first = results.sweep, rows.iloc[0]
    if rows.groupby("steered")["factor"].nunique().max() < 2:
        how = "the one factor that was run" if rows["factor"].notna().any() else ""
        return _with_damage(results, rows, results.effects, how, False)
    best = results.best
    if len(best):
        best = best[(best["family"] == first["family"]) & (best["metric"] == first["metric"])]
    chosen = set(_settings(best[best["kind"] == first["kind"]])) if len(best) else set()
    if {setting[0] for setting in chosen} == set(rows["steered"]):
        at = _at(rows, chosen)
        half = effects_of(sweep, True, sweep.cells[sweep.cells["cell"].isin(set(at["cell"]))])
        of_metric = half.frame[half.frame["metric"] == first["metric"]]
        if set(of_metric["cell"]) == set(at["cell"]):
            how = "the best factor of each language, chosen on one half of the items; the numbers are of the other half"
            return _with_damage(results, of_metric, half, how, True)
    sign = 1 if bool(first["higher_is_better"]) else -1
    means = (sign * rows.set_index(["steered", "factor"])["score"]).groupby(level=[0, 1]).mean()
    chosen = {(code, first["kind"], means[code].idxmax()) for code in rows["steered"].unique()}
    how = "the best factor of each language, chosen on these very items, so optimistic"
    return _with_damage(results, _at(rows, chosen), results.effects, how, False)


def _with_damage(results: Results, rows: pd.DataFrame, effects: Effects, how: str, half: bool) -> Headline:
    """The rows beside the damage at the very same language, intervention and factor."""
    frame, damage = effects.frame, results.damage
    beside = dict(zip(_settings(damage), damage.to_dict("records"), strict=True)) if len(damage) else {}
    records: list[dict[str, Any]] = [beside.get(setting, {}) for setting in _settings(rows)]
    nats = [record if record.get("perplexity") == NATS else {} for record in records]
    rows = rows.assign(
        nats_self=[record.get("perplexity_self", np.nan) for record in nats],
        nats_cross=[record.get("perplexity_cross", np.nan) for record in nats],
    )
    for name, metric in _OF_OUTPUTS.items():
        by_cell = frame[_metrics(frame) == metric].set_index("cell")["difference"].to_dict()
        rows[name] = [
            by_cell.get(cell, record.get(name, np.nan)) for cell, record in zip(rows["cell"], records, strict=True)
        ]
    return Headline(rows, effects, str(rows["metric"].iloc[0]), str(rows["family"].iloc[0]), how, half)


# --- Evidence and sentences -----------------------------------------------------------------------------------------


def evidence_of(results: Results, headline: Headline) -> tuple[Evidence, dict[int, float]]:
    """What the verdict follows from, and the mean score over all languages of each random set (by its seed)."""
    rows, sign = headline.rows, headline.sign
    low, high = sorted(sign * end for end in _interval(headline))
    null = _random_means(results, headline)
    score = rows["score"].mean()
    reached = sum(sign * value >= sign * score for value in null.values())
    worst = {}
    for name in ("degenerate", "nats_self"):
        known = headline.languages[name].dropna()
        worst[name] = known.mean() if len(known) == len(headline.languages) else known.max()
    lss = results.sweep.is_shift(headline.metric)
    return Evidence(low, high, len(null), reached, worst["degenerate"], worst["nats_self"], lss), null


def _interval(headline: Headline) -> tuple[float, float]:
    return intervals(headline.rows, headline.effects).get(headline.relation, (np.nan, np.nan))


def _random_means(results: Results, headline: Headline) -> dict[int, float]:
    """Seed -> mean score of that random set over the very cells of the headline; only seeds that all of them have."""
    sweep = results.sweep
    cells = sweep.cells[sweep.cells["cell"].isin(headline.rows["cell"])]
    scores, places = scores_by_cell(sweep), controls_by_place(sweep)
    return means_of_sets([
        control_scores(sweep, cell, headline.metric, scores, places, headline.half) for cell in cells.to_dict("records")
    ])  # fmt: skip


def _verdict(results: Results, headline: Headline, evidence: Evidence) -> str:
    rows, sweep = headline.rows, results.sweep
    low, high = _interval(headline)
    name = readable_metric(headline.metric)
    if headline.metric.partition("@")[0] == CLEAN:
        name += " (share of outputs in the target language that are not degenerate)"
    if sweep.is_shift(headline.metric):
        moved = f"{name} is {number(rows['score'].mean())}"
        difference = "" if np.isnan(low) else f"[{number(low)}, {number(high)}], 95 % interval"
    elif rows["baseline"].isna().all():
        moved, difference = f"{name} is {number(rows['score'].mean())}", "no baseline to compare it with"
    else:
        there = rows["baseline"].notna()
        before, after = rows.loc[there, "baseline"].mean(), rows.loc[there, "score"].mean()
        moved = f"{name} went from {number(before)} to {number(after)}"
        if sweep.against != BASELINE:
            moved += f" against {sweep.against}"
        if not there.all():
            moved += f" where there is a baseline ({int(there.sum())} of {len(rows)} cells)"
        difference = f"difference {with_interval(rows['difference'].mean(), low, high)}"
        difference += ", without an interval, for no items were logged" if np.isnan(low) else ", 95 % interval"
    better = headline.sign * rows["difference"] > 0
    # Any intervention moves the preference of some items, so that an LSS above 0 is no improvement.
    shift = sweep.is_shift(headline.metric)
    facts = [difference, "" if shift else f"{int(better.sum())} of {len(rows)} cells improved"]
    if rows["p_holm"].notna().any():
        facts[-1] += f", {int((better & (rows['p_holm'] < ALPHA)).sum())} significantly after Holm's correction"
    facts += [_why_no_evidence(evidence, headline.prompts), f"n = {int(rows['n'].sum()):,} items on {headline.family}"]
    text = (
        f"{evidence.verdict}: with {_settings_text(headline)}{f' ({headline.how})' if headline.how else ''}, {moved} "
        f"({'; '.join(fact for fact in facts if fact)}); the price: {_price(headline)}"
    )
    return f"{text}{_past_limits(evidence)}."


def _past_limits(evidence: Evidence) -> str:
    passed = []
    if evidence.degenerate >= DEGENERATE_LIMIT:
        passed.append(f"{100 * DEGENERATE_LIMIT:.0f} points of degenerate outputs")
    if evidence.nats >= NATS_LIMIT:
        passed.append(f"{NATS_LIMIT:g} nats per token")
    return f"; past the limit of {listed(passed)}" if passed else ""


def _why_no_evidence(evidence: Evidence, prompts: bool) -> str:
    if evidence.verdict != NO_EVIDENCE or np.isnan(evidence.low):
        return ""
    if evidence.reached:
        return "the instruction naming another language does as much" if prompts else "random neurons do as much"
    return "LSS needs controls to compare with" if evidence.low > 0 else "the interval includes 0"


def _settings_text(headline: Headline) -> str:
    """`add mean at product at ×8 (German) and ×4 (Turkish), and scale at ×2 (French)`."""
    kinds: dict[str, dict[float, list[str]]] = {}
    for code, kind, factor in sorted(headline.settings, key=lambda setting: (setting[1], -setting[2], setting[0])):
        kinds.setdefault(kind, {}).setdefault(factor, []).append(language_name(code) if code else "")
    parts = []
    for kind, factors in kinds.items():
        named = []
        for factor, languages in factors.items():
            names = listed([language for language in languages if language])
            named.append(" ".join([f"×{factor:g}" if factor else "", f"({names})" if names else ""]).strip())
        at = " at " if any(factors) else " "
        parts.append(f"{kind}{at if any(named) else ''}{listed(named)}")
    return "; ".join(parts)


def _price(headline: Headline) -> str:
    degenerate = _measured(headline, "degenerate", "points", 100)
    repeated = _measured(headline, "repeated", "points", 100)
    nats = _measured(headline, "nats_self", "")
    return (
        f"degenerate outputs {degenerate or 'not measured'}, "
        f"{f'outputs equal to that of another prompt {repeated}, ' if repeated else ''}"
        f"nats per token of the steered language's own text {nats or 'not measured'}"
    )


def _measured(headline: Headline, column: str, unit: str, scale: float = 1) -> str:
    """The mean over all languages of the headline; where one lacks it, each value by itself and what is missing."""
    languages = headline.languages
    known = languages[languages[column].notna()]
    unit = f" {unit}" if unit else ""
    if known.empty:
        return ""
    if len(known) == len(languages):
        return f"{number(scale * known[column].mean(), True)}{unit}"
    values = [
        f"{number(scale * value, True)}{unit} ({language_name(code)})"
        for code, value in zip(known["steered"], known[column], strict=True)
    ]
    missing = [language_name(code) for code in languages.loc[languages[column].isna(), "steered"]]
    return f"{listed(values)}; not measured for {listed(missing)}"


def _others(results: Results, headline: Headline) -> str:
    """What happens to other languages at the very same settings: the same score, nats per token, unknown outputs."""
    frame = results.effects.frame
    cross = frame[(frame["family"] == headline.family) & (frame["metric"] == headline.metric)]
    cross = _at(cross[(cross["relation"] == CROSS) & cross["difference"].notna()], headline.settings)
    parts = []
    if len(cross) and headline.relation == SELF and not results.sweep.is_shift(headline.metric):
        worse = headline.sign * cross["difference"] < 0
        significant = int((worse & (cross["p_holm"] < ALPHA)).sum())
        interval = intervals(cross, results.effects).get(CROSS, (np.nan, np.nan))
        missing = sorted(set(headline.rows["steered"]) - set(cross["steered"]))
        parts.append(
            f"{readable_metric(headline.metric)} of other languages moved by "
            f"{with_interval(cross['difference'].mean(), *interval)} over {counted(len(cross), 'pair')} (n = "
            f"{int(cross['n'].sum()):,} items; {int(worse.sum())} got worse, {significant} significantly"
            + (f"; not measured for {listed([language_name(code) for code in missing])}" if missing else "")
            + ")"
        )
    if nats := _measured(headline, "nats_cross", ""):
        parts.append(f"nats per token of their text moved by {nats}")
    if unknown := _measured(headline, "unknown", "points", 100):
        parts.append(f"outputs in no known language moved by {unknown}")
    if not parts:
        return "What it does to the scores, text and outputs of other languages was not measured."
    return f"Other languages, at the same settings: {'; '.join(parts)}."


def _chance(headline: Headline, evidence: Evidence, null: dict[int, float]) -> str:
    if headline.prompts:
        return _named_instead(headline, evidence, null)
    if not null:
        return (
            "Whether any neurons would have done the same is open: no matched random sets were run with this score for "
            "all of these languages (controls: {random: 20} in the plan)."
        )
    values, name = list(null.values()), readable_metric(headline.metric)
    text = (
        f"With {counted(evidence.sets, 'matched random set')} {name} is {number(float(np.mean(values)))} on average "
        f"over the same languages and items (lowest {number(min(values))}, highest {number(max(values))}): "
    )
    if evidence.reached:
        return text + f"{evidence.reached} of them reached the languages' own neurons."
    if evidence.sets < SETS_FOR_A_CLAIM:
        few = "1 random set" if evidence.sets == 1 else f"{evidence.sets} random sets"
        need = f"a claim needs {SETS_FOR_A_CLAIM}"
        return text + f"none reached the languages' own neurons; {few}, too few to exclude chance ({need})."
    return text + "the languages' own neurons are above every one of them."


def _named_instead(headline: Headline, evidence: Evidence, null: dict[int, float]) -> str:
    """What the same instruction does that names other languages."""
    if not null:
        return (
            "Whether an instruction that names another language would have done the same is open: none was run with "
            "this score for all of these languages (controls: {random: 1} in the plan)."
        )
    values, name = list(null.values()), readable_metric(headline.metric)
    others = "it reached" if len(values) == 1 else f"{evidence.reached} of them reached"
    return (
        f"With the instruction naming {counted(evidence.sets, 'other language')} instead, {name} is "
        f"{number(float(np.mean(values)))} on average over the same languages and items (lowest {number(min(values))}, "
        f"highest {number(max(values))}): {others if evidence.reached else 'none reached'} the one that names the "
        "language."
    )


def _contradictions(results: Results, headline: Headline) -> list[str]:
    """A high LSS beside outputs that are not in the language, or are garbage, at the same settings."""
    frame = results.effects.frame
    names = _metrics(frame)
    means = {
        metric: frame[names == metric].groupby(["steered", "kind", frame["factor"].fillna(0.0)])["score"].mean()
        for metric in ("lss", CLEAN, FORCED, DEGENERATE)
    }
    success = means[CLEAN] if len(means[CLEAN]) else means[FORCED]
    and_clean = " and not degenerate" if len(means[CLEAN]) else ""
    shown: list[str] = []
    more = 0
    # The headline's own settings first.
    for setting, lss in sorted(means["lss"].items(), key=lambda item: item[0] not in headline.settings):
        if not lss >= _HIGH_LSS:
            continue
        clean, garbage = success.get(setting, np.nan), means[DEGENERATE].get(setting, np.nan)
        if not (clean < _LOW_SUCCESS or garbage >= _LOW_SUCCESS):
            continue
        if len(shown) >= _EXAMPLES:
            more += 1
            continue
        code, kind, factor = setting
        facts = [f"LSS {number(lss)}"]
        if not np.isnan(clean):
            facts.append(f"{number(100 * clean)} % of the outputs in the language{and_clean}")
        if not np.isnan(garbage):
            facts.append(f"{number(100 * garbage)} % degenerate")
        shown.append(f"{language_name(code)}, {kind}{f' ×{factor:g}' if factor else ''}: {', '.join(facts)}")
    if not shown:
        return []
    rest = f"; and {more} settings more" if more else ""
    return [f"LSS is high where the outputs are not in the language or are degenerate ({'; '.join(shown)}{rest}): it "
            "tells which of two continuations is preferred, not what the model writes."]  # fmt: skip


def _tiles(headline: Headline, evidence: Evidence, null: dict[int, float]) -> list[tuple[str, str]]:
    name = readable_metric(headline.metric)
    where = {SELF: "in the steered language", CROSS: "in other languages"}.get(headline.relation, "steered")
    tiles = [(number(headline.rows["difference"].mean(), not evidence.random_is_null), f"{name}, {where}")]
    languages = headline.languages
    for column, what, scale in (
        ("degenerate", "degenerate outputs, points", 100.0),
        ("nats_self", "nats per token, own text", 1.0),
    ):
        known = languages[column].dropna()
        if len(known) == len(languages):
            tiles.append((number(scale * known.mean(), True), what))
        elif len(known):
            tiles.append((number(scale * known.max(), True), f"{what} (highest; {len(known)} of {len(languages)})"))
    if null:
        of_neurons = f"random neurons ({counted(evidence.sets, 'set')})"
        label = f"{name}, {'other languages named' if headline.prompts else of_neurons}"
        tiles.append((number(float(np.mean(list(null.values())))), label))
    return tiles


def _size(results: Results) -> tuple[str, str]:
    frame = results.effects.frame
    items = int(frame.drop_duplicates("cell")["n"].sum())
    return f"{items:,}", f"scored items in {counted(frame['cell'].nunique(), 'steered cell')}"


# --- Deactivations --------------------------------------------------------------------------------------------------


def _deactivations(results: Results) -> list[str]:
    """For each kind of deactivation: damage to the language's own text against the others', and random sets."""
    frame = results.effects.frame
    frame = frame[frame["deactivation"] & (frame["metric"] == NATS) & frame["difference"].notna()]
    return [_deactivation(results, str(kind), rows) for kind, rows in frame.groupby("kind", sort=False)]


def _deactivation(results: Results, kind: str, rows: pd.DataFrame) -> str:
    own = rows[rows["relation"] == SELF].groupby("steered")["difference"].mean()
    others = rows[rows["relation"] == CROSS].groupby("steered")["difference"]
    both = [code for code in own.index if code in others.groups]
    if not both:
        have = "its own text" if len(own) else "other languages' text"
        return f"{kind}: nats per token were measured on {have} alone, so whether a deactivation is specific is open."
    highest, mean = others.max(), others.mean()
    diagonal = [code for code in both if own[code] > highest[code]]
    whole = rows[rows["steered"].isin(both)]
    ends = intervals(whole, results.effects).get("gap", (np.nan, np.nan))
    gap = own[both].mean() - whole[whole["relation"] == CROSS]["difference"].mean()
    missing = sorted(set(rows["steered"]) - set(both))
    null = _random_rise(results, whole[whole["relation"] == SELF])
    reached = sum(value >= own[both].mean() for value in null.values())
    specific = ends[0] > 0 and not reached
    verdict = "Damages its own language most" if specific else "No evidence of damage to its own language alone"
    text = (
        f"{verdict}: {kind} of {listed([language_name(code) for code in both])} raised nats per token of the "
        f"language's own text by {number(own[both].mean(), True)} on average (from {number(own[both].min(), True)} to "
        f"{number(own[both].max(), True)}) and of the others' by {number(mean[both].mean(), True)} (own minus others "
        f"{with_interval(gap, *ends)}); the diagonal is highest in {len(diagonal)} of {counted(len(both), 'row')} (n = "
        f"{int(whole['n'].sum()):,} texts)"
    )
    if missing:
        text += f"; not measured for {listed([language_name(code) for code in missing])}"
    if not null:
        return f"{text}; no matched random sets were deactivated."
    text += (
        f"; {counted(len(null), 'matched random set')} raised the same texts by "
        f"{number(float(np.mean(list(null.values()))), True)} on average, at most {number(max(null.values()), True)}"
    )
    few = len(null) < SETS_FOR_A_CLAIM
    return f"{text}{f', too few to exclude chance ({SETS_FOR_A_CLAIM})' if few else ''}."


def _random_rise(results: Results, rows: pd.DataFrame) -> dict[int, float]:
    """Seed -> mean rise of nats per token on these texts; only seeds that all of the cells have."""
    sweep = results.sweep
    cells = sweep.cells[sweep.cells["cell"].isin(rows["cell"])].to_dict("records")
    scores, places = scores_by_cell(sweep), controls_by_place(sweep)
    by_cell = []
    for cell in cells:
        baseline = scores.get(cell["baseline_cell"], {}).get(NATS, (np.nan,))[0]
        found = control_scores(sweep, cell, NATS, scores, places)
        by_cell.append({seed: score - baseline for seed, score in found.items()})
    seeds = set.intersection(*(set(found) for found in by_cell)) if by_cell else set()
    return {seed: float(np.mean([found[seed] for found in by_cell])) for seed in sorted(seeds)}


# --- Interventions at equal damage ----------------------------------------------------------------------------------


def _equal_damage(results: Results) -> list[str]:
    """Which intervention does most at each damage that factors were searched for, over the same languages."""
    table = results.equal
    for metric in [*SUCCESSES, *dict.fromkeys(table["metric"])] if len(table) else []:
        rows = table[(table["metric"].map(lambda name: str(name).partition("@")[0]) == metric.partition("@")[0])]
        rows = rows[rows["higher_is_better"].notna()]
        if len(rows):
            family = rows.groupby("family")["n"].sum().idxmax()
            return _at_equal_damage(deciding(rows[rows["family"] == family], "items_in"), results.methods)
    return []


def _at_equal_damage(rows: pd.DataFrame, comparison: MethodComparison | None) -> list[str]:
    sign = 1 if bool(rows["higher_is_better"].iloc[0]) else -1
    metric = readable_metric(str(rows["metric"].iloc[0]))
    sentences = []
    for damage, at in rows.groupby("damage", sort=True):
        most = at["languages"].max()
        whole = at[at["languages"] == most]
        whole = whole[whole["steered"] == whole["steered"].iloc[0]]
        ranked = whole.assign(_rank=-sign * whole["score"]).sort_values("_rank", kind="stable")
        parts = [_equal_part(row) for row in ranked.to_dict("records")]
        text = (
            f"At a damage of {damage:g} nats per token to the steered language's own text, {metric} over "
            f"{counted(int(most), 'language')} is {'; '.join(parts)}"
        )
        fewer = at[~at["kind"].isin(whole["kind"])]
        if len(fewer):
            short = [f"{row['kind']} ({counted(row['languages'], 'language')})" for row in fewer.to_dict("records")]
            text += f"; not compared, because it is of other languages: {listed(short)}"
        sentences.append(f"{text}. {_winner(comparison, f'{damage:g}')}".rstrip())
    for row in rows[rows["damage"].isna()].to_dict("records"):
        sentences.append(
            f"At its own damage, {number(row['reached_low'])} to {number(row['reached_high'])} nats per token, "
            f"{metric} is {_equal_part(row)}."
        )
    return sentences


def _equal_part(row: dict[str, Any]) -> str:
    text = f"{number(row['score'])} under {row['kind']}"
    if not np.isnan(row["low"]):
        against = not np.isnan(row["baseline"])
        ends = f"[{number(row['low'], against)}, {number(row['high'], against)}]"
        text += f" ({ends} against {number(row['baseline'])})" if against else f" ({ends})"
    if row["sets"]:
        text += (
            f", random neurons {number(row['random_lowest'])} to {number(row['random_highest'])} "
            f"({counted(row['sets'], 'set')} at the same damage)"
        )
    if is_prompt(row["kind"]) and row["sets_at_factor"]:
        text += f", {number(row['random_at_factor'])} naming other languages"
    if row["off_target"]:
        text += f", damage reached {number(row['reached_low'])} to {number(row['reached_high'])}"
    return text


# --- Which method does most: the second decision table, in docs/comparison.md ----------------------------------------


def _each_at_its_best(comparison: MethodComparison | None) -> list[str]:
    """The successes of methods at their best, and who wins."""
    compared = _compared(comparison, BEST)
    if comparison is None or len(compared) < 2:
        return []
    ranked = compared.sort_values("success", ascending=False, kind="stable").to_dict("records")
    parts = [
        f"{number(row['success'])} under {row['kind']} (damage {number(row['damage']) or 'not measured'})"
        for row in ranked
    ]
    return [
        f"Each at its best (a factor that was chosen on one half of the items, over the other half), "
        f"{readable_metric(comparison.metric)} {_over(ranked[0])} is {'; '.join(parts)}. {_winner(comparison, BEST)}"
    ]


def _compared(comparison: MethodComparison | None, at: str) -> pd.DataFrame:
    """Rows of the mean over languages, or of the only language, that have a success."""
    import pandas as pd

    if comparison is None:
        return pd.DataFrame()
    rows = comparison.rows[comparison.rows["at"] == at]
    means = rows[rows["steered"] == MEAN_OVER]
    whole = means if len(means) else rows if rows["steered"].nunique() == 1 else rows.iloc[:0]
    return whole[whole["missing"] == ""]


def _over(row: dict[str, Any]) -> str:
    return (
        f"over {counted(row['languages'], 'language')}"
        if row["languages"] > 1
        else f"on {language_name(row['steered'])}"
    )


def _winner(comparison: MethodComparison | None, at: str) -> str:
    """Who wins at one setting; empty where fewer than two methods are compared."""
    compared = _compared(comparison, at)
    if comparison is None or len(compared) < 2:
        return ""
    first = compared.loc[compared["success"].idxmax()].to_dict()
    pairs = comparison.pairs
    pairs = pairs[(pairs["at"] == at) & (pairs["steered"] == first["steered"])]
    margins = {other: _margin(pairs, first["kind"], other) for other in compared["kind"] if other != first["kind"]}
    even = {other: margin for other, margin in margins.items() if not margin[1] > 0}
    named = listed([f"{other} by {with_interval(*margin)}" for other, margin in (even or margins).items()])
    highest = f"{first['kind']} ({number(first['success'])}, n = {int(first['n']):,})"
    reached = int(first["random_reached"]) if first["sets"] > 0 else 0
    left_out = comparison.rows[(comparison.rows["at"] == BEST) & (comparison.rows["missing"] != "")]
    if even:
        text = f"No winner: the highest, {highest}, exceeds {named}, which includes 0"
    elif int(first["n"]) < _FEWEST_ITEMS:
        text = f"No winner: the highest, {highest}, exceeds {named}, but on fewer than {_FEWEST_ITEMS} items"
    elif at == BEST and len(left_out):
        others = [
            f"{kind} ({why})" for kind, why in dict(zip(left_out["kind"], left_out["missing"], strict=True)).items()
        ]
        text = f"No winner: the highest, {highest}, exceeds {named}, but {listed(others)} could not be compared"
    elif reached:
        of_sets = counted(int(first["sets"]), "control")
        text = f"No evidence for the highest, {highest}: {reached} of {of_sets} reach it, although it exceeds {named}"
    else:
        text = f"The winner is {highest}, exceeding {named}; {_controls_of_winner(first)}"
    if first["languages"] > 1:
        rows = comparison.rows
        won = rows[(rows["at"] == at) & (rows["steered"] != MEAN_OVER) & rows["wins"]].groupby("kind", sort=False)
        wins = [f"{kind} on {listed([language_name(code) for code in of['steered']])}" for kind, of in won]
        text += f"; winners by language: {'; '.join(wins) or 'none'}"
    return f"{text}."


def _margin(pairs: pd.DataFrame, kind: str, other: str) -> tuple[float, float, float]:
    """Success of one method minus another's, with its interval, whichever of the two the row names first."""
    same = pairs[(pairs["kind"] == kind) & (pairs["other"] == other)]
    if len(same):
        row = same.iloc[0]
        return row["difference"], row["low"], row["high"]
    row = pairs[(pairs["kind"] == other) & (pairs["other"] == kind)].iloc[0]
    return -row["difference"], -row["high"], -row["low"]


def _controls_of_winner(row: dict[str, Any]) -> str:
    if not row["sets"] > 0:
        return "no controls were run beside it, so whether any neurons or instruction would do is open"
    none = f"none of {counted(int(row['sets']), 'control')} reaches it"
    return f"{none}, too few to exclude chance ({SETS_FOR_A_CLAIM})" if row["sets"] < SETS_FOR_A_CLAIM else none
