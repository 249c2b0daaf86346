"""Which figures a report has, with their captions: one list for the files and for the page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from lm_eval_steering.analysis import style
from lm_eval_steering.analysis.style import Theme
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.report import figures, tables
from lm_eval_steering.report.naming import SELF, SEVERAL, readable_metric
from lm_eval_steering.report.results import Results

if TYPE_CHECKING:
    import pandas as pd

# Of the many numbers of a task these are drawn: the first success and the first damage that it has.
SUCCESSES = (
    "lfs", "lss", "clas_language", "acc", "exact_match", "f1", "bleu", "chrf++", "acc_norm", "lang_expected",
)  # fmt: skip
DAMAGES = ("nats_per_token", "token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
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
    """(family, metric, kind) of what is drawn, successes first."""
    found: list[tuple[str, str, str]] = []
    for wanted in (SUCCESSES, DAMAGES):
        for (family, kind), own in effects.groupby(["family", "kind"], sort=False):
            names = {name.partition("@")[0]: name for name in own["metric"].unique()}
            first = next((names[name] for name in wanted if name in names), None)
            if first is not None:
                found.append((family, first, kind))
    return found


def gallery(results: Results) -> list[Picture]:
    """All figures, in the order of the page."""
    effects, sweep = results.effects, results.sweep
    pictures: list[Picture] = []
    for family, metric, kind in drawn_metrics(effects.frame):
        pictures += _of_setting(results, family, metric, kind)
    kinds = list(dict.fromkeys(effects.frame["kind"]))
    for kind in kinds:
        counts = figures.language_counts(sweep, kind)
        if counts:
            n = sum(sum(own.values()) for factors in counts.values() for own in factors.values())
            caption = f"Languages of the outputs against the factor, {kind}; n = {n:,} outputs."
            pictures.append(Picture(_file("languages", kind), caption, _bind(figures.output_languages, counts)))
        damage = results.damage[results.damage["kind"] == kind] if len(results.damage) else results.damage
        if len(damage) and figures.price_of(damage):
            caption = f"Success of the steered language against damage, {kind}; each point is a factor."
            pictures.append(Picture(_file("trade-off", kind), caption, _bind(figures.trade_off, damage)))
    if results.neurons:
        total = sum(map(sum, results.neurons.values()))
        caption = f"Neurons of the steered languages by layer (square-root shades); n = {total:,} in all."
        pictures.append(Picture("neurons-by-layer", caption, _bind(figures.neurons_by_layer, results.neurons)))
    return pictures[:MOST]


def _of_setting(results: Results, family: str, metric: str, kind: str) -> list[Picture]:
    frame = tables.single(results.effects)
    own = frame[(frame["family"] == family) & (frame["metric"] == metric) & (frame["kind"] == kind)]
    summary = results.summary
    rows = summary[(summary["family"] == family) & (summary["metric"] == metric) & (summary["kind"] == kind)]
    name, what = (family, metric, kind), f"{readable_metric(metric)} on {family}, {kind}"
    against = results.sweep.against
    pictures = []
    # Where each language has one chosen factor, factors differ in their languages and are no curve.
    factors = int(own.groupby("steered")["factor"].nunique().max())
    if factors > 1:
        caption = (
            f"{what}: mean difference from the {against}, with 95 % bands over languages and items "
            f"({own['steered'].nunique()} languages; n = {int(own['n'].sum()):,} items in all)."
        )
        pictures.append(Picture(_file("curve", *name), caption, _bind(figures.factor_curve, rows)))
    one_column = own["evaluated"].nunique() < 2
    if own["difference"].notna().any() and (factors > 1 or not one_column):
        factor = None if one_column else best_overall(rows)
        at = "each factor" if factor is None else f"factor {factor:g}, the best on average"
        n = own if factor is None else own[own["factor"] == factor]
        caption = (
            f"{what}: difference from the {against} at {at}. Blue is better; a dot and bold mark p < 0.05 after Holm's "
            f"correction over {int(own['comparisons'].max())} comparisons; n = {int(n['n'].sum()):,} items."
        )
        if factor is None or not np.isnan(factor):
            draw = _bind(figures.heat_map, results.effects, family, metric, kind, factor)
            pictures.append(Picture(_file("matrix", *name), caption, draw))
    controls = results.controls
    if len(controls):
        own_controls = controls[
            (controls["family"] == family) & (controls["metric"] == metric) & (controls["kind"] == kind)
        ]
        if factors > 1 and len(own_controls):
            caption = f"{what}: mean over languages, beside matched random neurons (band: their lowest and highest)."
            draw = _bind(figures.against_random, own_controls)
            pictures.append(Picture(_file("random", *name), caption, draw))
    return pictures


def best_overall(rows: pd.DataFrame) -> float:
    """The factor at which self (or several, or cross) is best on average, for a figure; nan where there is none."""
    sign = 1 if bool(rows["higher_is_better"].iloc[0]) else -1
    for relation in (SELF, SEVERAL, "cross"):
        values = sign * rows[f"{relation}_difference"]
        if values.notna().any():
            return float(rows.loc[values.idxmax(), "factor"])
    return float("nan")


def layers_of(neurons: str, codes: list[str]) -> dict[str, list[int]]:
    """Steered language -> neurons in each layer; empty where the set is not at hand."""
    from lm_eval_steering import resources
    from lm_eval_steering.analysis.inspect import layer_counts
    from lm_eval_steering.languages import family_order
    from lm_eval_steering.neurons.neuron_set import NeuronSet

    try:
        found = NeuronSet.load(resources.find_neuron_set(neurons)) if neurons else None
    except (SteeringError, OSError):
        return {}
    if found is None:
        return {}
    counts = layer_counts(found)
    own = [code for code in family_order(codes) if code in found.languages]
    return {code: counts[found.languages.index(code)].tolist() for code in own}


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
    found, paths = [], []
    for picture in pictures:
        with style.themed(style.LIGHT):
            figure = style.laid_out(picture.draw(style.LIGHT))
            light = style.svg_of(figure)
            paths += style.save(figure, folder, picture.name, light)
        with style.themed(style.DARK):
            dark = style.svg_of(style.laid_out(picture.draw(style.DARK), like=figure))
        width, height = (round(96 * float(side)) for side in figure.get_size_inches())
        wide = figure.get_size_inches()[0] > style.COLUMN
        light_text, dark_text = (base64.b64encode(svg).decode() for svg in (light, dark))
        found.append(Figured(picture.caption, light_text, dark_text, width, height, wide))
    return found, paths
