"""The pictures of the analyses: stacked shares of output languages by step, and the logit lens by layer.

Drawn like those of `report.neuron_pictures`: at most as wide as the text of a printed page, in letters of 6.5 to 8.5
points. Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart; every share that has room for it
carries its language's code, and every line its own dashes and marks, so that colour is never the only sign.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lm_eval_steering.analysis.stepwise import DeactivationStep
from lm_eval_steering.metrics.language_id import in_language

_DPI = 200
_WIDTH = 7.2  # inches
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")  # Okabe and Ito
_OTHER, _UNKNOWN = "0.62", "0.88"  # greys
_STYLE = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "font.family": "DejaVu Sans",  # travels with matplotlib: the same letters on every machine
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "lm-eval-steering",  # with no date in the file, the same numbers give the same bytes
}  # fmt: skip


def write_figure(folder: Path, name: str, make: Callable[[], Figure]) -> list[Path]:
    """Write NAME.png and NAME.svg; the same numbers give the same SVG bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
        figure = make()
        for path, metadata in zip(paths, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
            figure.savefig(path, dpi=_DPI, metadata=metadata)
    return paths


# --- stepwise -------------------------------------------------------------------------------------------------------


def stacked_steps(steps: Sequence[DeactivationStep]) -> Figure:
    """One bar a step: shares of the outputs' languages, stacked in the order in which they are deactivated.

    Up to fourteen languages have a look of their own, seven colours plain and seven hatched; the rest are `other`, and
    `unknown` and `empty` are on top. A black line in a bar parts the languages that are off, below it, from the others.
    """
    looks = _looks(steps)
    width = min(_WIDTH, 2.4 + 0.5 * len(steps))
    figure = _figure(width, 3.5)
    axes = figure.subplots()
    bottoms, off = np.zeros(len(steps)), np.zeros(len(steps))
    letters = min(6.5, 72 * (width - 1.8) / len(steps) / 2.3)  # three of them fit in a bar
    for look in looks:
        axes.bar(
            range(len(steps)), look.shares, bottom=bottoms, width=0.86, color=look.colour, hatch=look.hatch,
            label=look.name, edgecolor="white" if look.colour != "white" else "0.75", linewidth=0.4,
        )  # fmt: skip
        for place, (share, bottom) in enumerate(zip(look.shares, bottoms, strict=True)):
            if share >= 0.055:
                _code(axes, place, bottom + share / 2, look, letters)
        bottoms += look.shares
        off += [share * _is_off(look.name, step) for share, step in zip(look.shares, steps, strict=True)]
    places = np.arange(len(steps))[1:]
    axes.hlines(off[1:], places - 0.47, places + 0.47, color="black", linewidth=1.6, label="off below the line")
    axes.set_xticks(range(len(steps)), [_step_name(step) for step in steps], rotation=60, ha="right", fontsize=6.5)
    for tick in axes.get_xticklabels():
        tick.set_rotation_mode("anchor")
    axes.set_xlabel("deactivated, one language more at each step")
    axes.set_ylabel("share of the outputs")
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.5, len(steps) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Language of the outputs after each step", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    # In the order in which they are stacked.
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=6.5, handlelength=1.4)
    return figure


@dataclass(frozen=True)
class _Look:
    """One language's part of the bars: (step,) shares."""

    name: str
    shares: NDArray[np.float64]
    colour: str
    hatch: str = ""


def _looks(steps: Sequence[DeactivationStep]) -> list[_Look]:
    """Bottom to top: languages that are deactivated, in their order, languages that are not, other, unknown, empty."""
    totals: dict[str, float] = {}
    for step in steps:
        for code, share in step.shares.items():
            totals[code] = totals.get(code, 0.0) + share
    frequent = sorted(totals.keys() - {"unknown", "empty"}, key=lambda code: (-totals[code], code))[: 2 * len(_COLOURS)]
    order = steps[-1].deactivated
    own = [code for code in order if code in frequent] + [code for code in frequent if code not in order]
    looks = [
        _Look(code, _shares(steps, [code]), _COLOURS[n % len(_COLOURS)], "" if n < len(_COLOURS) else "//////")
        for n, code in enumerate(own)
    ]
    looks.append(_Look("other", _shares(steps, totals.keys() - {"unknown", "empty", *own}), _OTHER))
    looks.append(_Look("unknown", _shares(steps, ["unknown"]), _UNKNOWN))
    looks.append(_Look("empty", _shares(steps, ["empty"]), "white"))
    return [look for look in looks if look.shares.any()]


def _shares(steps: Sequence[DeactivationStep], codes: Collection[str]) -> NDArray[np.float64]:
    return np.array([sum(step.shares.get(code, 0.0) for code in codes) for step in steps], dtype=np.float64)


def _code(axes: mpl.axes.Axes, place: float, height: float, look: _Look, size: float) -> None:
    red, green, blue = mpl.colors.to_rgb(look.colour)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    text = {"unknown": "?", "empty": "–"}.get(look.name, look.name.split("_", maxsplit=1)[0])
    # A patch of the colour behind it, so that it can be read on hatching.
    patch = {"facecolor": look.colour, "edgecolor": "none", "pad": 0.6} if look.hatch else None
    colour = "white" if dark else "black"
    axes.text(place, height, text, ha="center", va="center", fontsize=size, color=colour, bbox=patch)


def _is_off(name: str, step: DeactivationStep) -> bool:
    return "_" in name and any(in_language(name, code) for code in step.deactivated)


def _step_name(step: DeactivationStep) -> str:
    return f"+ {step.deactivated[-1]}" if step.deactivated else "nothing"


# --- logit lens -----------------------------------------------------------------------------------------------------

_LINES = {  # of each line: dashes, mark
    "target": ("-", "o"), "English": ("--", "s"), "other": ("-.", "^"), "unknown": (":", "x"),
}  # fmt: skip
_LINE_COLOURS = {"target": "#D55E00", "English": "#0072B2", "other": "#009E73", "unknown": "0.45"}


def lens_lines(
    panels: Mapping[str, Mapping[str, Sequence[float]]], names: Mapping[str, str], what: str, signed: str = ""
) -> Figure:
    """One panel a run, one line a class of languages over the layers, on one scale.

    Args:
        panels: title -> class -> mass after each layer.
        names: class -> what the legend calls it.
        what: the axis' label: which mass.
        signed: the intervention, above the panels.
    """
    layers = max(len(line) for lines in panels.values() for line in lines.values())
    figure = _figure(_WIDTH if len(panels) > 1 else 4.4, 3.0)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for kind, line in lines.items():
            dashes, mark = _LINES[kind]
            axes.plot(
                range(len(line)), line, dashes, marker=mark, markersize=3.2, markevery=max(1, layers // 16),
                color=_LINE_COLOURS[kind], linewidth=1.5, label=names[kind], clip_on=False,
            )  # fmt: skip
        axes.set_title(title, loc="left")
        axes.set_xlabel("after layer")
        axes.set_xlim(-0.02 * layers, layers - 1 + 0.02 * layers)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.grid(axis="y", color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if signed:
        figure.suptitle("\n".join(wrap(signed, 115)), fontsize=6.5, x=0.01, ha="left", color="0.3")
    highest = max(max(line) for lines in panels.values() for line in lines.values())
    all_axes[0].set_ylim(0, min(1.0, 1.08 * highest) or 1.0)
    all_axes[0].set_ylabel(what)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
