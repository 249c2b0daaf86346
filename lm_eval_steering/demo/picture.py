"""The demo's picture: who is hurt by deactivation, who is preferred after amplification, and how often it answers."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lm_eval_steering.demo.figures import Figures

_DPI = 160


def draw(figures: Figures, path: Path) -> None:
    """Write a PNG of three panels."""
    names = [code.split("_")[0] for code in figures.languages]
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    deactivation, lss, forcing = figure.subplots(1, 3)
    codes = figures.languages
    rises = np.array([[figures.deactivated_nats[r][c] - figures.baseline_nats[c] for c in codes] for r in codes])
    limit = float(np.abs(rises).max())
    _matrix(deactivation, rises, names, "RdBu_r", -limit, limit, "{:+.2f}")
    deactivation.set_title("Deactivating a language's neurons\nrise of perplexity (nats a token)")
    deactivation.set_xlabel("evaluated language")
    deactivation.set_ylabel("deactivated language")
    shift = np.array([[np.nan if r == c else figures.lss[r][c] for c in codes] for r in codes])
    _matrix(lss, shift, names, "cividis", 0.0, 1.0, "{:.2f}")
    null = fmean(value for row in figures.lss_control.values() for values in row.values() for value in values)
    lss.set_title(f"Amplifying them: LSS\n(matched random neurons: {null:.2f} on average)")
    lss.set_xlabel("base language")
    lss.set_ylabel("steered language")
    _curves(forcing, figures)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def _matrix(
    axes: mpl.axes.Axes, values: np.ndarray, names: list[str], colours: str, low: float, high: float, form: str
) -> None:
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high)
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0)
    axes.set_yticks(range(len(names)), names)
    size = 10 if len(names) <= 6 else 5.5
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                column, row, form.format(value), ha="center", va="center", fontsize=size,
                color="white" if dark else "black",
            )  # fmt: skip


def _curves(axes: mpl.axes.Axes, figures: Figures) -> None:
    factors = [0.0, *figures.factors]
    curves = np.array(
        [[figures.lfs[c]["baseline"], *(figures.lfs_choose[c][f] for f in figures.factors)] for c in figures.languages]
    )
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for code, curve, colour in zip(figures.languages, curves, colours, strict=True):
        axes.plot(factors, curve, marker="o", markersize=3, linewidth=1.2, color=colour, label=code.split("_")[0])
    axes.plot(factors, curves.mean(axis=0), color="black", linewidth=2.5, label="mean")
    null = fmean(value for values in figures.lfs_control.values() for value in values)
    axes.axhline(null, color="grey", linestyle="--", linewidth=1.2, label="random neurons")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("factor (add factor x mean activation)")
    axes.set_ylabel("share of outputs in the steered language")
    axes.set_title("The answer changes language\n(prompts in other languages)")
    # Below the axes, where it can cover no curve.
    axes.legend(fontsize=7, ncols=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), handlelength=1.4, columnspacing=1)
