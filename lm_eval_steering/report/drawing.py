"""Draw each figure once a theme: files for papers, and SVG for the page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from lm_eval_steering.report import style
from lm_eval_steering.report.gallery import Picture


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
