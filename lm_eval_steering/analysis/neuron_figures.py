"""The figures of a neuron set: neurons by layer, overlap of the languages, and entropy with its threshold.

A figure is at most as wide as the text of a printed page (7.2 inches), so that it goes into a paper without being
scaled. Lengths here are inches, sizes of letters are points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy
from numpy.typing import NDArray

from lm_eval_steering.analysis.inspect import (
    EntropyDistribution,
    distinct_by_layer,
    entropy_distribution,
    jaccard,
    layer_counts,
)
from lm_eval_steering.analysis.style import LIGHT, PAGE, Theme, ink_on, new_figure, write_figure
from lm_eval_steering.languages import family_of, family_order
from lm_eval_steering.neurons.neuron_set import NeuronSet

_LEFT, _BOTTOM, _TOP = 0.64, 0.64, 0.36  # room for codes, for codes that stand upright, and for a title
_LETTERS = 6.5  # codes and families; 5 where the rows are lower than that
_SMALLEST = 3.9  # digits smaller than this are not drawn; a colour bar stands for them
_SIDE_BY_SIDE = 16  # languages; more than these and the two matrices stand one above the other


def draw(neuron_set: NeuronSet, folder: str | Path) -> list[Path]:
    """Write each figure as PNG and as SVG; the same set gives the same SVG bytes.

    Returns:
        The files: `neurons-by-layer`, `overlap` and, where the set holds entropies, `entropy`.

    Raises:
        NeuronSetError: if the histogram of the set is not one.
    """
    folder = Path(folder)
    distribution = entropy_distribution(neuron_set)
    written = write_figure(folder, "neurons-by-layer", lambda: by_layer(neuron_set))
    written += write_figure(folder, "overlap", lambda: overlap(neuron_set))
    if distribution is not None:
        written += write_figure(folder, "entropy", lambda: entropy(distribution, len(neuron_set.languages)))
    return written


def by_layer(neuron_set: NeuronSet, languages: Sequence[str] | None = None, theme: Theme = LIGHT) -> Figure:
    """Heat map of the neurons of each language in each layer, under bars of the distinct neurons of each layer.

    Args:
        neuron_set: any.
        languages: of the set, all by default.
        theme: colours.
    """
    codes = family_order(neuron_set.languages if languages is None else languages)
    counts = layer_counts(neuron_set)[_indices(neuron_set, codes)]
    rows, layers = counts.shape
    row = 0.2 if rows <= 16 else 0.14
    relatives = _Relatives.of(codes, _letters(row))
    width, right = (PAGE if layers > 16 else 4.8), max(1.2, relatives.width)
    inner, height, bars_height = width - _LEFT - right, row * rows, 0.6
    figure = new_figure(width, height + bars_height + 0.82, None)
    heat = _axes(figure, _LEFT, 0.45, inner, height)
    bars = _axes(figure, _LEFT, 0.45 + height + 0.1, inner, bars_height)
    bars.bar(range(layers), distinct_by_layer(neuron_set, codes), width=0.8, color=theme.ink)
    bars.set_ylabel("distinct")
    bars.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title("Neurons of each language by layer", loc="left")
    bars.tick_params(labelbottom=False)
    # The square root, because the last layers hold most and would hide all others.
    highest = max(1, counts.max())
    image = heat.imshow(
        counts, cmap=theme.sequential, norm=PowerNorm(0.5, vmin=0, vmax=highest), aspect="auto", interpolation="nearest"
    )  # fmt: skip
    heat.set_xlabel("layer")
    for axes in (heat, bars):
        axes.set_xlim(-0.5, layers - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    heat.set_yticks(range(rows), codes, fontsize=relatives.size)
    if layers <= 16:
        _numbers(heat, image.to_rgba(counts), counts.astype(float), 72 * inner / layers)
    relatives.separate(heat, columns=False)
    relatives.bracket(figure, heat)
    _colour_bar(figure, image, (width - 1.05, 0.45 + height + 0.35, 0.9), [0, highest], "neurons (square root)")
    return figure


def overlap(neuron_set: NeuronSet) -> Figure:
    """Shared neurons of each pair of languages as counts and as Jaccard index, relatives side by side."""
    codes = family_order(neuron_set.languages)
    indices = _indices(neuron_set, codes)
    shared = neuron_set.overlap()[np.ix_(indices, indices)]
    columns = 2 if len(codes) <= _SIDE_BY_SIDE else 1
    relatives = _Relatives.of(codes, _LETTERS if len(codes) <= 40 else 5)
    side = (PAGE - relatives.width) / columns - _LEFT
    side = min(side, 4.4, max(1.9, 0.4 * len(codes)))
    figure = new_figure(columns * (_LEFT + side) + relatives.width, (_BOTTOM + side + _TOP) * 2 / columns, None)
    panels = ((shared.astype(float), "Shared neurons (diagonal: total)"), (jaccard(shared), "Jaccard index"))
    for number, (values, title) in enumerate(panels):
        left, up = (number, 0) if columns == 2 else (0, 1 - number)
        corner = _LEFT + left * (side + _LEFT), _BOTTOM + up * (side + _BOTTOM + _TOP)
        axes = _axes(figure, *corner, side, side)
        _matrix(figure, axes, values, relatives, side)
        axes.set_title(title, loc="left")
        if left == columns - 1:
            relatives.bracket(figure, axes)
    return figure


def entropy(distribution: EntropyDistribution, languages: int) -> Figure:
    """Histogram of the entropies of the eligible neurons, with the threshold below which they were selected."""
    figure = new_figure(5.0, 2.9)
    axes = figure.subplots()
    edges, counts = distribution.edges, distribution.counts
    axes.stairs(counts, edges, fill=True, color="0.75", label=f"eligible: {counts.sum():,}")
    if distribution.threshold is not None:
        inside = np.minimum(edges, distribution.threshold)
        axes.stairs(counts, inside, fill=True, color=LIGHT.better, label=f"selected: {distribution.selected:,}")
        label = f"threshold: {distribution.threshold:.3f} nats"
        axes.axvline(distribution.threshold, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_yscale("symlog", linthresh=1)  # a logarithm on which an empty bin still has a place
    axes.set_ylim(0, max(10, 2 * counts.max()))
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel("entropy of the activation probability over languages (nats)")
    axes.set_ylabel("neurons")
    axes.spines["right"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)  # where it can cover nothing
    above = axes.secondary_xaxis("top")
    ticks = sorted({1, 2, 3, 4, 6, *(8 * 2**power for power in range(6)), languages})
    ticks = [tick for tick in ticks if tick == languages or tick <= 0.8 * languages]
    above.set_xticks(np.log(ticks), ticks)
    above.set_xlabel("effective number of languages, exp(entropy)")
    return figure


# --- parts ----------------------------------------------------------------------------------------------------------


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> mpl.axes.Axes:
    """Axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _indices(neuron_set: NeuronSet, codes: Sequence[str]) -> list[int]:
    return [neuron_set.languages.index(code) for code in codes]


def _letters(row: float) -> float:
    return min(_LETTERS, 60 * row)


def _fitting(cell: float, text: str) -> float:
    """Size of digits, in points, at which a number of three of them or more fits in a cell of so many points."""
    return min(6.5, 0.92 * cell / (0.64 * max(3, len(text))))


def _matrix(
    figure: Figure, axes: mpl.axes.Axes, values: NDArray[np.float64], relatives: _Relatives, side: float
) -> None:
    """A heat map with this side; the diagonal is grey, for beside it no difference between languages would be seen."""
    codes = relatives.codes
    others = np.where(np.eye(len(codes), dtype=bool), np.nan, values)
    highest = float(np.nanmax(others, initial=0.0)) or 1.0
    axes.set_facecolor(LIGHT.absent)
    image = axes.imshow(others, cmap=LIGHT.sequential, vmin=0, vmax=highest, interpolation="nearest")
    cell = 72 * side / len(codes)
    axes.set_xticks(range(len(codes)), codes, rotation=90, fontsize=relatives.size)
    axes.set_yticks(range(len(codes)), codes, fontsize=relatives.size)
    relatives.separate(axes, columns=True)
    if _fitting(cell, f"{max(100, highest):.0f}") >= _SMALLEST:  # `.25` is as wide as 100
        _numbers(axes, image.to_rgba(others), values, cell)
        return
    right, top = axes.get_position().max * figure.get_size_inches()
    _colour_bar(figure, image, (right - 1.2, top + 0.06, 1.2), [0, highest], "")


def _numbers(axes: mpl.axes.Axes, shades: NDArray[np.float64], values: NDArray[np.float64], cell: float) -> None:
    """A number in each cell of so many points, blank for nan; fractions as `.25`.

    Args:
        axes: of the heat map.
        shades: (row, column, RGBA) colours of the cells; transparent where the grey behind them is seen.
        values: (row, column).
        cell: width of a cell.
    """
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        text = f"{value:.2f}".removeprefix("0") if 0 < value < 1 else f"{value:.0f}"
        colour = "0.5" if value == 0 else ink_on(tuple(shades[row, column])) if shades[row, column][3] else LIGHT.ink
        axes.text(column, row, text, ha="center", va="center", fontsize=_fitting(cell, text), color=colour)


def _colour_bar(
    figure: Figure, image: mpl.image.AxesImage, position: tuple[float, float, float], ticks: list[float], label: str
) -> None:
    """A small one that lies at (left, bottom) and is so long, in inches."""
    bar = figure.colorbar(image, cax=_axes(figure, *position, 0.08), orientation="horizontal", location="top")
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" if tick < 1 else f"{tick:.0f}" for tick in ticks])
    bar.ax.tick_params(labelsize=6, length=0, pad=1)
    bar.outline.set_linewidth(0.4)
    if label:
        bar.ax.text(0.5, -0.5, label, transform=bar.ax.transAxes, ha="center", va="top", fontsize=6)


@dataclass(frozen=True)
class _Relatives:
    """Families and branches of ordered codes: runs of rows (first, last, text).

    Attributes:
        branches: each branch; the family's name where it has no other branch here.
        families: those with more than one branch here.
        size: of the letters.
        start: points from the axes to the brackets of the families, past the names of the branches.
        width: inches that all of it takes.
    """

    codes: Sequence[str]
    branches: list[tuple[int, int, str]]
    families: list[tuple[int, int, str]]
    size: float
    start: float
    width: float

    @classmethod
    def of(cls, codes: Sequence[str], size: float) -> _Relatives:
        runs, families = _runs(codes, 2), _runs(codes, 1)
        split = [run for run in families if len({family_of(code)[1] for code in codes[run[0] : run[1] + 1]}) > 1]
        inside = {row for first, last, _ in split for row in range(first, last + 1)}
        branches = [run if run[0] in inside else (*run[:2], family_of(codes[run[0]])[0]) for run in runs]
        start = 14 + _longest(branches, size)
        width = start + 8 + _longest(split, size) if split else start
        return cls(codes, branches, split, size, start, width / 72 + 0.05)

    def separate(self, axes: mpl.axes.Axes, columns: bool) -> None:
        """Lines between families, thinner ones between branches."""
        for depth, width in ((2, 0.3), (1, 0.8)):
            for first, _, _ in _runs(self.codes, depth)[1:]:
                for line in (axes.axhline, axes.axvline)[: 1 + columns]:
                    line(first - 0.5, color=mpl.rcParams["axes.edgecolor"], linewidth=width)

    def bracket(self, figure: Figure, axes: mpl.axes.Axes) -> None:
        """On the right of the axes: the branches, and farther out the families."""
        for runs, points in ((self.branches, 5.0), (self.families, self.start)):
            beside = offset_copy(axes.get_yaxis_transform(), fig=figure, x=points, units="points")
            after = offset_copy(beside, fig=figure, x=3, units="points")
            for first, last, text in runs:
                rows = [first - 0.35, last + 0.35]
                axes.plot(
                    [1, 1], rows, transform=beside, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8, clip_on=False
                )
                axes.text(1, (first + last) / 2, text, transform=after, va="center", fontsize=self.size)


def _runs(codes: Sequence[str], depth: int) -> list[tuple[int, int, str]]:
    """Runs of one family (depth 1) or of one branch (depth 2)."""
    runs = []
    for key, run in groupby(enumerate(codes), key=lambda item: family_of(item[1])[:depth]):
        rows = [row for row, _ in run]
        runs.append((rows[0], rows[-1], key[-1]))
    return runs


def _longest(runs: Sequence[tuple[int, int, str]], size: float) -> float:
    """Points that the longest text takes."""
    return max((TextPath((0, 0), text, size=size).get_extents().width for _, _, text in runs), default=0.0)
