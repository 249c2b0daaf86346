"""Figures of what was put out: languages over factors, LSS and LFS beside random neurons, neurons by layer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from lm_eval_steering.languages import english_name, same_language
from lm_eval_steering.metrics.language_id import UNKNOWN
from lm_eval_steering.report.data import Sweep
from lm_eval_steering.report.naming import readable_metric
from lm_eval_steering.report.style import BLUE, COLUMN, CYCLE, PAGE, VERMILION, Theme, ink_on, new_figure

if TYPE_CHECKING:
    import pandas as pd

_LABELS = "output_language"
_NAMED, _PANELS = 4, 12  # languages with a colour of their own; panels on one page
_PER_ROW = 4
Shares = dict[str, dict[float, Counter[str]]]


def language_counts(sweep: Sweep, kind: str) -> Shares:
    """Steered language -> factor (0 is the baseline) -> how many outputs are in each language."""
    cells = sweep.steered_cells()
    cells = cells[(cells["kind"] == kind) & cells["factor"].notna()]
    found: Shares = {}
    for row in cells.itertuples():
        for factor, cell in ((row.factor, row.cell), (0.0, row.baseline_cell)):
            items = sweep.items.get(cell)
            if items is not None and _LABELS in items.values:
                labels = [str(label) for label in items.values[_LABELS] if label is not None]
                found.setdefault(row.steered, {}).setdefault(factor, Counter()).update(labels)
    return found


def output_languages(counts: Shares, theme: Theme) -> Figure:
    """Stacked shares of output languages at each factor, one panel a steered language."""
    codes = list(counts)[:_PANELS]
    others: Counter[str] = Counter()
    for code in codes:
        for own in counts[code].values():
            others.update({label: n for label, n in own.items() if label != UNKNOWN and not same_language(label, code)})
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


def _stack(axes: Any, code: str, own: dict[float, Counter[str]], named: list[str], theme: Theme) -> None:
    factors = sorted(own)
    bottom = np.zeros(len(factors))
    parts = [("steered language", BLUE, ""), *((label, CYCLE[1 + i], "") for i, label in enumerate(named))]
    for label, colour, hatch in [*parts, ("others", theme.faint, ""), ("unknown", theme.paper, "////")]:
        shares = np.array([_share(own[factor], label, code, named) for factor in factors])
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
    of_steered = sum(n for own, n in counted.items() if own != UNKNOWN and same_language(own, code))
    if label == "steered language":
        return of_steered / total
    if label == "unknown":
        return counted[UNKNOWN] / total
    of_named = {own: counted[own] for own in named if not same_language(own, code)}
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


def neurons_by_layer(counts: dict[str, list[int]], theme: Theme) -> Figure:
    """Neurons of each steered language in each layer.

    Args:
        counts: language -> (layers,).
        theme: colours.
    """
    grid = np.array(list(counts.values()), dtype=float)
    figure = new_figure(COLUMN if grid.shape[1] <= 32 else PAGE, 0.9 + 0.2 * len(counts))
    axes = figure.subplots()
    image = axes.imshow(np.sqrt(grid), cmap="cividis", aspect="auto", interpolation="nearest")
    if grid.shape[1] <= 16:
        shades = image.to_rgba(np.sqrt(grid))
        for (row, column), value in np.ndenumerate(grid):
            colour = ink_on(tuple(shades[row, column]))
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_yticks(range(len(counts)), [code.split("_")[0] for code in counts])
    axes.set_xlabel("layer")
    axes.set_title("Neurons by layer")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure
