"""The figures of a report and their captions; each is drawn once for papers and for both themes of the page."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from lm_eval_steering.analysis.neuron_figures import by_layer
from lm_eval_steering.analysis.style import (
    BLUE,
    COLUMN,
    CYCLE,
    DARK,
    GREEN,
    LIGHT,
    MARKERS,
    PAGE,
    VERMILION,
    Theme,
    ink_on,
    laid_out,
    new_figure,
    save,
    signed,
    svg_of,
    themed,
)  # fmt: skip
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.languages import english_name, family_of, same_language
from lm_eval_steering.metrics.language_id import UNKNOWN
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.report.effects import ALPHA, Effects
from lm_eval_steering.report.method_comparison import BEST, MEAN_OVER, MethodComparison
from lm_eval_steering.report.naming import (
    CROSS,
    DAMAGES,
    SELF,
    SEVERAL,
    SUCCESSES,
    counted,
    is_lss,
    is_share_of_items,
    listed,
    readable_metric,
    sign_of,
)
from lm_eval_steering.report.read import LABELS, Sweep
from lm_eval_steering.report.tables import Results, deciding, ordered, single

if TYPE_CHECKING:
    import pandas as pd

_WIDE = 9  # columns; more need the whole page
_LONG_NAME = 22  # letters; of longer ones a column holds no two
_CROWDED = 24  # columns; in more no number can be read
_LABELS = {SELF: "self", CROSS: "cross", SEVERAL: "items in several languages"}
_COLOURS = {SELF: BLUE, CROSS: VERMILION, SEVERAL: GREEN}


def short(code: str) -> str:
    """A language on an axis."""
    return "+".join(part.split("_")[0] for part in code.split("+")) if code else "several"


def heat_map(effects: Effects, family: str, metric: str, kind: str, factor: float | None, theme: Theme) -> Figure:
    """Differences from the baseline: steered x evaluated language at one factor, or steered language x factor.

    Better is blue and worse orange; a dot marks p < 0.05 after Holm's correction; grey is a missing cell.

    Args:
        effects: of all cells.
        family: of tasks.
        metric: of theirs.
        kind: of intervention.
        factor: to show; None shows all factors, for items in one language or in several.
        theme: colours.
    """
    frame = single(effects)
    shown = frame[(frame["family"] == family) & (frame["metric"] == metric) & (frame["kind"] == kind)]
    if factor is not None:
        shown = shown[shown["factor"] == factor]
    across = "factor" if factor is None else "evaluated"
    rows = ordered(shown["steered"].unique())
    columns: list[Any] = sorted(shown["factor"].unique()) if factor is None else ordered(shown["evaluated"].unique())
    grid = {
        name: shown.pivot(index="steered", columns=across, values=name)
        .reindex(index=rows, columns=columns)
        .to_numpy(float)
        for name in ("difference", "p_holm")
    }
    wide = len(columns) > _WIDE
    width = PAGE if wide else COLUMN
    cell = min(0.36, (width - 1.0) / max(1, len(columns)))
    figure = new_figure(width, 1.0 + max(2, len(rows)) * max(cell, 0.2))
    axes = figure.subplots()
    sign = sign_of(shown["higher_is_better"].iloc[0]) or 1
    centre = 0.5 if is_share_of_items(metric) else 0.0
    _draw_grid(figure, axes, grid["difference"], grid["p_holm"], sign, theme, 72 * cell, centre)
    names = [f"×{column:g}" if factor is None else short(column) for column in columns]
    axes.set_xticks(range(len(columns)), names, rotation=90 if factor is not None and len(columns) > 6 else 0)
    axes.set_yticks(range(len(rows)), [short(code) for code in rows])
    axes.set_xlabel("factor" if factor is None else "evaluated language")
    axes.set_ylabel("steered language")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _separate(axes, rows, axes.axhline, theme)
    if factor is not None:
        _separate(axes, columns, axes.axvline, theme)
    at = "" if factor is None else f", ×{factor:g}"
    axes.set_title(f"{readable_metric(metric)}{'' if is_lss(metric) else ': difference'}{at}")
    return figure


def _draw_grid(
    figure: Figure, axes: Any, differences: np.ndarray, p_holm: np.ndarray, sign: int, theme: Theme, points: float,
    centre: float,
) -> None:  # fmt: skip
    """Differences around 0, or shares of items around one half, which is white."""
    written = signed if centre == 0 else "{:.2f}".format
    offsets = differences - centre
    limit = centre or float(np.nanmax(np.abs(offsets), initial=0.0)) or 1.0
    if np.isnan(differences).all():
        limit = 1.0
    # The square root, because one ruined cell would leave all others pale.
    shades = np.sign(offsets) * np.sqrt(np.abs(offsets) / limit) * sign
    axes.patch.set(facecolor=theme.absent, edgecolor=theme.faint, hatch="////", linewidth=0)
    image = axes.imshow(
        shades, cmap=theme.diverging, norm=TwoSlopeNorm(0, -1, 1), aspect="auto", interpolation="nearest"
    )
    size = min(6.5, points / 3.1)
    dots: list[tuple[float, float, str]] = []
    for (row, column), value in np.ndenumerate(differences):
        if np.isnan(value):
            continue
        colour = ink_on(image.to_rgba(shades[row, column]))
        sure = p_holm[row, column] < ALPHA
        if differences.shape[1] <= _CROWDED and size >= 4:
            axes.text(
                column, row, written(value), ha="center", va="center", fontsize=size, color=colour,
                fontweight="bold" if sure else "normal",
            ).set_in_layout(False)  # fmt: skip
        if sure:
            dots.append((column + 0.36, row - 0.32, colour))
    if dots:
        across, down, colours = zip(*dots, strict=True)
        axes.scatter(across, down, s=1.8**2, c=colours, linewidths=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=18)
    ticks = (-1.0, -0.5, 0.0, 0.5, 1.0)
    bar.set_ticks(ticks, labels=[written(centre + sign * tick * abs(tick) * limit) for tick in ticks])
    bar.ax.tick_params(labelsize=6, length=0)
    bar.outline.set_visible(False)


def _separate(axes: Any, codes: list[str], line: Any, theme: Theme) -> None:
    """Thin lines between families of languages."""
    for index in range(1, len(codes)):
        if codes[index - 1] and codes[index] and family_of(codes[index - 1])[0] != family_of(codes[index])[0]:
            line(index - 0.5, color=theme.ink, linewidth=0.5)


def factor_curve(summary: pd.DataFrame, theme: Theme) -> Figure:
    """Mean difference from the baseline over factors, for self and cross, with the band over languages and items.

    Args:
        summary: rows of one family, metric and intervention.
        theme: colours.
    """
    curve = summary.sort_values("factor")
    figure = new_figure(COLUMN, 2.35)
    axes = figure.subplots()
    axes.axhline(0, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    for relation, marker in zip((SELF, CROSS, SEVERAL), MARKERS, strict=False):
        values = curve[f"{relation}_difference"].to_numpy(float)
        if np.isnan(values).all():
            continue
        factors, cells = curve["factor"].to_numpy(float), int(curve[f"{relation}_cells"].max())
        low, high = curve[f"{relation}_low"].to_numpy(float), curve[f"{relation}_high"].to_numpy(float)
        axes.fill_between(factors, low, high, color=_COLOURS[relation], alpha=0.22, linewidth=0)
        axes.plot(
            factors, values, color=_COLOURS[relation], marker=marker, markersize=3.5, linewidth=1.4,
            label=f"{_LABELS[relation]} ({cells} cell{'s' if cells != 1 else ''})",
        )  # fmt: skip
    baselines = (curve[f"{relation}_baseline"] for relation in (SELF, SEVERAL, CROSS))
    baseline = next((values.mean() for values in baselines if values.notna().any()), np.nan)
    axes.set_title(readable_metric(str(curve["metric"].iloc[0])))
    axes.set_xlabel("factor")
    metric = str(curve["metric"].iloc[0])
    difference = "difference" if np.isnan(baseline) else f"difference (baseline {baseline:.3g})"
    axes.set_ylabel(readable_metric(metric) if is_lss(metric) else difference)
    axes.set_xticks(sorted(curve["factor"].unique()))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def trade_off(damage: pd.DataFrame, theme: Theme) -> Figure:
    """Language success against damage (or the rise of degenerate outputs): one line per language, over factors."""
    price = price_of(damage)
    figure = new_figure(COLUMN, 2.6)
    axes = figure.subplots()
    measured = damage[damage["success"].notna() & damage[price].notna()]
    for number, (code, rows) in enumerate(measured.sort_values("factor").groupby("steered", sort=False)):
        colour, marker = CYCLE[number % len(CYCLE)], MARKERS[number // len(CYCLE) % len(MARKERS)]
        axes.plot(
            rows[price], rows["success"], color=colour, marker=marker, markersize=4, linewidth=1.1,
            label=english_name(str(code).split("+", maxsplit=1)[0]),
        )  # fmt: skip
        for place, (x, y, factor) in enumerate(zip(rows[price], rows["success"], rows["factor"], strict=True)):
            above = (4, -7) if place % 2 else (-4, 5)  # in turn, where points are close to each other
            axes.annotate(f"×{factor:g}", (x, y), xytext=above, textcoords="offset points", fontsize=5.5)
    axes.axvline(0, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(-0.09, 1.08)
    axes.set_title("Success against damage")
    axes.set_xlabel(price_label(price, damage))
    axes.set_ylabel(readable_metric(str(measured["success_metric"].iloc[0])))
    axes.grid()
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def at_equal_damage(table: pd.DataFrame, theme: Theme) -> Figure:
    """A score against the damage that factors were searched for: one line an intervention, random neurons beside it.

    Bars are 95 % intervals of the difference over languages and items, put at the score. Random neurons at the same
    damage are a dotted line between the lowest and the highest set. Only points over the same languages are joined.

    Args:
        table: rows of one family, metric and relation of `tables.equal_damage`.
        theme: colours.
    """
    kinds = list(dict.fromkeys(table["kind"]))
    columns = 1 if max(map(len, kinds)) > _LONG_NAME else 2  # of the legend
    figure = new_figure(COLUMN, 2.4 + 0.15 * -(-len(kinds) // columns))
    axes = figure.subplots()
    damages = sorted(table["damage"].dropna().unique())
    # An instruction has one point, at its own damage; one that does none stands at the left end.
    its_own = (table["reached_low"] + table["reached_high"]) / 2
    table = table.assign(damage=table["damage"].fillna(its_own.clip(lower=min(damages, default=0.1) / 3)))
    most = table.groupby("kind")["languages"].max().max()
    for place, kind in enumerate(kinds):
        own = table[table["kind"] == kind].sort_values("damage")
        colour, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
        shift = 1.03 ** (place - (len(kinds) - 1) / 2)  # side by side, where intervals would cover each other
        whole = own[own["languages"] == most]
        axes.plot(whole["damage"] * shift, whole["score"], color=colour, linewidth=1.2)
        below, above = own["difference"] - own["low"], own["high"] - own["difference"]
        axes.errorbar(
            own["damage"] * shift, own["score"], yerr=np.maximum([below.fillna(0), above.fillna(0)], 0), color=colour,
            marker=marker, markersize=4, linestyle="none", elinewidth=0.9, capsize=1.5, label=kind,
        )  # fmt: skip
        for row in own[own["languages"] < most].itertuples():
            axes.annotate(
                f"{row.languages} of {most}", (row.damage * shift, row.score), xytext=(3, 3),
                textcoords="offset points", fontsize=5.5, color=colour,
            )  # fmt: skip
        random = own[own["sets"] > 0]
        axes.fill_between(
            random["damage"] * shift, random["random_lowest"], random["random_highest"], color=colour, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
        axes.plot(random["damage"] * shift, random["random_mean"], color=colour, linewidth=0.9, linestyle=(0, (1, 2)))
    baseline = table["baseline"].mean()
    metric = str(table["metric"].iloc[0])
    if not np.isnan(baseline) and not is_lss(metric):
        axes.axhline(baseline, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_xticks(damages, [f"{damage:g}" for damage in damages])
    axes.minorticks_off()
    axes.set_title(f"{readable_metric(metric)} at equal damage")
    axes.set_xlabel("damage, nats per token")
    axes.set_ylabel(readable_metric(metric))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=columns)
    return figure


def success_against_damage(comparison: MethodComparison, theme: Theme) -> Figure:
    """Success against damage: a panel for each language and one for their mean, one line a method.

    A method with one point, such as an instruction, is one marker. The mean is over all languages, at damages that were
    asked for and that a method does in all of them.
    """
    points, rows = comparison.points, comparison.rows
    points = points[points["damage"].notna()]
    codes = ordered(points["steered"].unique())[: _PANELS - 1]
    means = rows[(rows["steered"] == MEAN_OVER) & (rows["at"] != BEST) & (rows["missing"] == "")]
    means = means[means["languages"] == rows.loc[rows["steered"] != MEAN_OVER, "steered"].nunique()]
    panels = [(english_name(code.split("+", maxsplit=1)[0]), points[points["steered"] == code]) for code in codes]
    if len(means):
        panels.append((f"mean of {int(means['languages'].max())} languages", means))
    kinds = list(dict.fromkeys(points["kind"]))
    columns = min(_PER_ROW, len(panels))
    height = -(-len(panels) // columns)
    figure = new_figure(PAGE if columns > 2 else COLUMN, 0.75 + 1.7 * height + 0.16 * -(-len(kinds) // 2))
    grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (title, shown) in zip(grid, panels, strict=False):
        axes.axhline(shown["baseline"].mean(), color=theme.ink, linewidth=0.7, linestyle=(0, (4, 3)))
        for place, kind in enumerate(kinds):
            own = shown[shown["kind"] == kind].sort_values("damage")
            colour, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
            axes.plot(
                own["damage"], own["success"], color=colour, marker=marker, markersize=4, linewidth=1.1, label=kind
            )
        axes.set_title(title, fontsize=8)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_xscale("symlog", linthresh=0.1, linscale=0.6)
    ticks = [tick for tick in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0) if tick <= max(1.2 * points["damage"].max(), 0.3)]
    grid[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    grid[0].minorticks_off()
    grid[0].set_ylim(-0.04, 1.04)
    for place, axes in enumerate(grid[: len(panels)]):
        if place % columns == 0:
            axes.set_ylabel(readable_metric(comparison.metric))
        if place + columns >= len(panels):
            axes.set_xlabel("damage, nats per token")
            axes.tick_params(labelbottom=True)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _of_methods(results: Results) -> list[Picture]:
    comparison = results.methods
    if comparison is None or comparison.points["damage"].notna().sum() < 2:
        return []
    points = comparison.points
    languages = points["steered"].nunique()
    some = f" (the first {_PANELS - 1} of {languages} languages)" if languages >= _PANELS else ""
    measured = points[points["damage"].notna()]
    absent = [kind for kind in dict.fromkeys(points["kind"]) if kind not in set(measured["kind"])]
    fewest, most = int(measured["n"].min()), int(measured["n"].max())
    caption = (
        f"{readable_metric(comparison.metric)} on {comparison.family} against damage, the rise in nats per token of "
        "the steered language's own text: one line a method, one marker where it has one setting; dashed: the "
        f"{results.sweep.against}{some}. The mean is over all languages, at damages that a method does in all of "
        f"them; n = {fewest:,}{f' to {most:,}' if most > fewest else ''} items a point and language."
        f"{f' Not drawn, because their damage was not measured: {listed(absent)}.' if absent else ''}"
    )
    return [Picture(_file("methods", comparison.family, comparison.metric), caption,
                    _bind(success_against_damage, comparison))]  # fmt: skip


def _of_equal_damage(results: Results) -> list[Picture]:
    table, pictures = results.equal, []
    drawn = drawn_metrics(results.effects.frame)
    for (family, metric), rows in table.groupby(["family", "metric"], sort=False):
        if not any((family, metric) == (name, of) for name, of, _ in drawn):
            continue
        own = deciding(rows, "items_in")
        sets = int(own["sets"].max())
        beside = f"dotted: {counted(sets, 'random set')} at the same damage" if sets else "no random sets"
        others = "; an instruction stands at the damage that it does" if own["damage"].isna().any() else ""
        caption = (
            f"{readable_metric(metric)} on {family} against the damage to the steered language's own text at which "
            f"factors were searched for{others}; means over {counted(int(own['languages'].max()), 'language')}, 95 % "
            f"intervals over languages and items; {beside}; n = {int(own['n'].max()):,} items a point at most."
        )
        pictures.append(Picture(_file("equal-damage", family, metric), caption, _bind(at_equal_damage, own)))
    return pictures


def price_of(damage: pd.DataFrame) -> str:
    """The column of damage that goes with success: the first that has most points beside it; empty where none has."""
    names = ("perplexity_self", "perplexity_all", "degenerate", "unknown")
    if "success" not in damage:
        return ""
    points = {name: int((damage["success"].notna() & damage[name].notna()).sum()) for name in names if name in damage}
    best = max(points, key=lambda name: (points[name], -names.index(name)), default="")
    return best if best and points[best] else ""


def price_label(price: str, damage: pd.DataFrame) -> str:
    """What a column of damage is, for an axis."""
    unit = readable_metric(str(damage["perplexity"].iloc[0])) if "perplexity" in damage else ""
    return {
        "perplexity_self": f"rise in {unit}, text of the steered language",
        "perplexity_all": f"rise in {unit}, all texts",
        "degenerate": "rise in degenerate outputs",
        "unknown": "rise in outputs of no known language",
    }[price]


# --- Figures of outputs: languages over factors, LSS and LFS against random neurons

_NAMED, _PANELS = 4, 12  # languages with their own colour; panels on one page
_PER_ROW = 4
Shares = dict[str, dict[float, Counter[str]]]


def language_counts(sweep: Sweep, kind: str) -> Shares:
    """Steered language -> factor (0 is the baseline) -> how many outputs are in each language."""
    cells = sweep.steered_cells()
    cells = cells[(cells["kind"] == kind) & cells["factor"].notna()]
    counts: Shares = {}
    for row in cells.itertuples():
        for factor, cell in ((row.factor, row.cell), (0.0, row.baseline_cell)):
            items = sweep.items.get(cell)
            if items is not None and LABELS in items.values:
                labels = [str(label) for label in items.values[LABELS] if label is not None]
                counts.setdefault(row.steered, {}).setdefault(factor, Counter()).update(labels)
    return counts


def output_languages(counts: Shares, theme: Theme) -> Figure:
    """Stacked shares of output languages at each factor, one panel per steered language."""
    codes = list(counts)[:_PANELS]
    others: Counter[str] = Counter()
    for code in codes:
        for outputs in counts[code].values():
            others.update({one: n for one, n in outputs.items() if one != UNKNOWN and not same_language(one, code)})
    named = [label for label, _ in others.most_common(_NAMED)]
    columns = min(_PER_ROW, len(codes))
    rows = -(-len(codes) // columns)
    figure = new_figure(COLUMN if columns <= 2 else PAGE, 0.7 + 1.55 * rows)
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True, squeeze=False)).ravel()
    for axes, code in zip(panels, codes, strict=False):
        _stack(axes, code, counts[code], named, theme)
    for axes in panels[len(codes) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("share of outputs")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if columns <= 2 else 7)
    return figure


def _stack(axes: Any, code: str, counts: dict[float, Counter[str]], named: list[str], theme: Theme) -> None:
    factors = sorted(counts)
    bottom = np.zeros(len(factors))
    parts = [("steered language", BLUE, ""), *((label, CYCLE[1 + i], "") for i, label in enumerate(named))]
    for label, colour, hatch in [*parts, ("others", theme.faint, ""), ("unknown", theme.paper, "////")]:
        shares = np.array([_share(counts[factor], label, code, named) for factor in factors])
        name = english_name(label) if label in named else label
        axes.bar(
            range(len(factors)), shares, bottom=bottom, color=colour, width=0.86, label=name, hatch=hatch,
            edgecolor=theme.ink if hatch else "none", linewidth=0.3,
        )  # fmt: skip
        bottom += shares
    axes.set_xticks(range(len(factors)), ["base" if factor == 0 else f"×{factor:g}" for factor in factors])
    if len(factors) > 6:
        axes.tick_params(axis="x", rotation=90)
    axes.set_ylim(0, 1)
    axes.set_title(english_name(code.split("+", maxsplit=1)[0]), fontsize=8)
    axes.tick_params(axis="x", length=0)


def _share(counted: Counter[str], label: str, code: str, named: list[str]) -> float:
    total = sum(counted.values())
    of_steered = sum(n for other, n in counted.items() if other != UNKNOWN and same_language(other, code))
    if label == "steered language":
        return of_steered / total
    if label == "unknown":
        return counted[UNKNOWN] / total
    of_named = {other: counted[other] for other in named if not same_language(other, code)}
    if label in named:
        return of_named.get(label, 0) / total
    return (total - of_steered - counted[UNKNOWN] - sum(of_named.values())) / total


def against_random(controls: pd.DataFrame, theme: Theme) -> Figure:
    """LSS or LFS against the factor, with the range of the matched random sets as a band.

    Args:
        controls: rows of one task family, metric and intervention, as `side_tables.controls` gives them.
        theme: colours.
    """
    by_factor = controls.sort_values("factor").groupby("factor")
    means = by_factor[["score", "mean", "lowest", "highest"]].mean()
    sets, n = int(controls["sets"].max()), int(by_factor["n"].sum().max())
    figure = new_figure(COLUMN, 2.35)
    axes = figure.subplots()
    if sets:
        axes.fill_between(means.index, means["lowest"], means["highest"], color=VERMILION, alpha=0.2, linewidth=0)
        axes.plot(
            means.index, means["mean"], color=VERMILION, linestyle="--", marker="s", markersize=3, linewidth=1.2,
            label=f"random neurons ({sets} set{'s' if sets != 1 else ''})",
        )  # fmt: skip
    axes.plot(means.index, means["score"], color=BLUE, marker="o", markersize=3.5, linewidth=1.6, label="own neurons")
    axes.set_ylim(-0.03, 1.05)
    axes.set_xticks(sorted(controls["factor"].unique()))
    axes.set_xlabel("factor")
    axes.set_ylabel(f"{readable_metric(str(controls['metric'].iloc[0]))} (n = {n})")
    axes.set_title(f"{readable_metric(str(controls['metric'].iloc[0]))} beside random neurons")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


# --- Which figures a report has, with their captions: one list for the files and for the page -----------------------

MOST = 40  # figures on a page


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn in any theme.

    Attributes:
        name: of the file.
        caption: what it shows, with n.
        draw: theme -> figure.
    """

    name: str
    caption: str
    draw: Callable[[Theme], Figure]


def drawn_metrics(effects: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(family, metric, kind) of each drawn metric, successes first."""
    drawn: list[tuple[str, str, str]] = []
    for names_in_order in (SUCCESSES, DAMAGES):
        for (family, kind), rows in effects.groupby(["family", "kind"], sort=False):
            names = {name.partition("@")[0]: name for name in rows["metric"].unique()}
            first = next((names[name] for name in names_in_order if name in names), None)
            if first is not None:
                drawn.append((family, first, kind))
    return drawn


def searched_kinds(effects: pd.DataFrame) -> set[str]:
    """Interventions whose factors were searched for: each language has its own, so that no curve is over factors."""
    return set(effects.loc[effects["damage_asked"] != "", "kind"]) - set(
        effects.loc[effects["damage_asked"] == "", "kind"]
    )


def gallery(results: Results) -> list[Picture]:
    """All figures, in the order of the page."""
    effects, sweep = results.effects, results.sweep
    searched = searched_kinds(effects.frame)
    pictures = [*_of_methods(results), *_of_equal_damage(results)]
    for family, metric, kind in drawn_metrics(effects.frame):
        if kind not in searched:
            pictures += _of_setting(results, family, metric, kind)
    kinds = list(dict.fromkeys(effects.frame["kind"]))
    for kind in kinds:
        counts = {} if kind in searched else language_counts(sweep, kind)
        if counts:
            n = sum(outputs.total() for factors in counts.values() for outputs in factors.values())
            caption = f"Languages of the outputs against the factor, {kind}; n = {n:,} outputs."
            pictures.append(Picture(_file("languages", kind), caption, _bind(output_languages, counts)))
        damage = results.damage[results.damage["kind"] == kind] if len(results.damage) else results.damage
        if kind not in searched and len(damage) and damage["factor"].notna().any() and price_of(damage):
            caption = f"Success of the steered language against damage, {kind}; each point is a factor."
            pictures.append(Picture(_file("trade-off", kind), caption, _bind(trade_off, damage)))
    neurons = results.neurons
    steered = {part for code in sweep.cells["steered"] for part in code.split("+")}
    codes = [code for code in neurons.languages if code in steered] if neurons else []
    if neurons and codes:
        caption = (
            f"Neurons of the steered languages by layer (square-root shades), and distinct ones; "
            f"n = {len(neurons.union(codes)):,} distinct neurons."
        )
        pictures.append(Picture("neurons-by-layer", caption, _bind(by_layer, neurons, codes)))
    return pictures[:MOST]


def _of_setting(results: Results, family: str, metric: str, kind: str) -> list[Picture]:
    frame = single(results.effects)
    setting = frame[(frame["family"] == family) & (frame["metric"] == metric) & (frame["kind"] == kind)]
    summary = results.summary
    rows = summary[(summary["family"] == family) & (summary["metric"] == metric) & (summary["kind"] == kind)]
    name, what = (family, metric, kind), f"{readable_metric(metric)} on {family}, {kind}"
    against, lss = results.sweep.against, results.sweep.is_shift(metric)
    pictures = []
    # Where each language has one chosen factor, factors differ in their languages and are no curve.
    factors = int(setting.groupby("steered")["factor"].nunique().max())
    if factors > 1:
        moved = "mean over languages" if lss else f"mean difference from the {against}"
        caption = (
            f"{what}: {moved}, with 95 % bands over languages and items "
            f"({counted(setting['steered'].nunique(), 'language')}; n = {int(setting['n'].sum()):,} items, all cells)."
        )
        pictures.append(Picture(_file("curve", *name), caption, _bind(factor_curve, rows)))
    one_column = setting["evaluated"].nunique() < 2
    if setting["difference"].notna().any() and (factors > 1 or not one_column):
        factor = None if one_column else best_overall(rows)
        at = "each factor" if factor is None else f"factor {factor:g}, the best on average"
        n = setting if factor is None else setting[setting["factor"] == factor]
        comparisons = int(setting["comparisons"].max())
        if lss:
            caption = (
                f"{what} at {at}: share of items whose preference moved towards the steered language; white is one "
                "half, and neither that nor 0 is what chance gives: random neurons are beside it, or were not run"
            )
        else:
            caption = f"{what}: difference from the {against} at {at}."
            caption += " Blue is better" if setting["higher_is_better"].notna().all() else " Blue is more"
            if comparisons:
                caption += f"; a dot and bold mark p < 0.05 after Holm's correction over {comparisons} comparisons"
        caption += f"; n = {int(n['n'].sum()):,} items."
        if factor is None or not np.isnan(factor):
            draw = _bind(heat_map, results.effects, family, metric, kind, factor)
            pictures.append(Picture(_file("matrix", *name), caption, draw))
    controls = results.controls
    if len(controls):
        own_controls = controls[
            (controls["family"] == family) & (controls["metric"] == metric) & (controls["kind"] == kind)
        ]
        if factors > 1 and len(own_controls):
            sets = int(own_controls["sets"].max())
            null = (
                f"beside {counted(sets, 'matched random set')} (band: lowest and highest)" if sets else "no random sets"
            )
            caption = f"{what}: mean over languages, {null}."
            draw = _bind(against_random, own_controls)
            pictures.append(Picture(_file("random", *name), caption, draw))
    return pictures


def best_overall(rows: pd.DataFrame) -> float:
    """The factor at which self (or several, or cross) is best on average, for a figure; nan where there is none."""
    sign = sign_of(rows["higher_is_better"].iloc[0]) or 1
    for relation in (SELF, SEVERAL, "cross"):
        values = sign * rows[f"{relation}_difference"]
        if values.notna().any():
            return float(rows.loc[values.idxmax(), "factor"])
    return float("nan")


def neuron_set_of(neurons: str) -> NeuronSet | None:
    """The neuron set that a plan names, None if it cannot be read."""
    try:
        return NeuronSet.load(neurons) if neurons else None
    except (SteeringError, OSError):
        return None


def _bind(draw: Callable[..., Figure], *arguments: object) -> Callable[[Theme], Figure]:
    return lambda theme: draw(*arguments, theme)


def _file(*parts: str) -> str:
    text = "-".join(part for part in parts if part)
    kept = "".join(letter if letter.isalnum() or letter in "-_+." else "-" for letter in text)
    return kept.replace("--", "-")[:110]


# --- drawing: each figure once a theme, as files for papers and as SVG for the page


@dataclass(frozen=True)
class Figured:
    """A figure of the page.

    Attributes:
        caption: under it.
        light: SVG in base64.
        dark: SVG in base64.
        width: CSS pixels at which its letters have the size that they have in print.
        height: CSS pixels.
        wide: whether it takes the width of a page.
    """

    caption: str
    light: str
    dark: str
    width: int
    height: int
    wide: bool


def draw(pictures: list[Picture], folder: Path) -> tuple[list[Figured], list[Path]]:
    """Figures for the page, and the files that were written for papers (in the light theme)."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, paths = [], []
    for picture in pictures:
        with themed(LIGHT):
            figure = laid_out(picture.draw(LIGHT))
            light = svg_of(figure)
            paths += save(figure, folder, picture.name)
        with themed(DARK):
            dark = svg_of(laid_out(picture.draw(DARK), like=figure))
        width, height = (round(96 * float(side)) for side in figure.get_size_inches())
        wide = figure.get_size_inches()[0] > COLUMN
        light_text, dark_text = (base64.b64encode(svg).decode() for svg in (light, dark))
        drawn.append(Figured(picture.caption, light_text, dark_text, width, height, wide))
    return drawn, paths
