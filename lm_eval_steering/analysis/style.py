"""How figures look: one style in two themes, colours that survive colour blindness and print, sizes of a paper."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 7.2  # inches: a column and the text of a printed page
DPI = 200
SUFFIXES = ("svg", "pdf", "png")
# Okabe and Ito (2008), which all kinds of colour vision tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, VERMILION = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#D55E00",
)  # fmt: skip
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, YELLOW)
MARKERS = "osD^vPX*"  # one more than colours, so that the first 56 of both differ


@dataclass(frozen=True)
class Theme:
    """Colours of letters and lines.

    Attributes:
        ink: letters and axes.
        faint: grids and what stands back.
        absent: cells that are not there.
        paper: behind everything.
        worse: end of the scale of differences.
        middle: no difference.
        better: other end.
    """

    ink: str
    faint: str
    absent: str
    paper: str
    worse: str
    middle: str
    better: str

    @property
    def sequential(self) -> Colormap:
        """From none to most."""
        return LinearSegmentedColormap.from_list("counts", [self.middle, self.better])

    @property
    def diverging(self) -> Colormap:
        """From worse through no difference to better."""
        return LinearSegmentedColormap.from_list("steering", [self.worse, self.middle, self.better])


LIGHT = Theme("#1b1f24", "#d4d8de", "#eceef1", "white", "#c2410c", "#fbfbfa", "#0b63a5")
DARK = Theme("#e4e7ec", "#444b57", "#2a2f38", "#171b21", "#e8713a", "#20252d", "#4ba3e3")


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """matplotlib in our style, whatever the user's own configuration is."""
    style = {
        "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "axes.linewidth": 0.6, "legend.fontsize": 7,
        "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
        "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
        "svg.hashsalt": "lm-eval-steering",  # with no date in the file, the same sweep gives the same bytes
        "pdf.fonttype": 42,  # letters stay letters: publishers refuse type 3
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.ink, "xtick.color": theme.ink,
        "ytick.color": theme.ink, "axes.facecolor": "none", "figure.facecolor": theme.paper, "grid.color": theme.faint,
        "grid.linewidth": 0.5, "hatch.linewidth": 0.5,
    }  # fmt: skip
    with mpl.rc_context({**mpl.rcParamsDefault, **style}):
        yield


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of so many inches; without a layout its axes are placed by hand."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def laid_out(figure: Figure, like: Figure | None = None) -> Figure:
    """The figure with its layout solved, once for all formats; `like` is the same figure in another theme, laid out."""
    engine = figure.get_layout_engine()
    if like is None and engine is not None:
        engine.execute(figure)
    elif like is not None:
        for axes, other in zip(figure.axes, like.axes, strict=True):
            axes.set_position(other.get_position())
    figure.set_layout_engine("none")
    return figure


def svg_of(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes each time."""
    out = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def save(figure: Figure, folder: Path, name: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Write a figure that `laid_out` gave, once for each suffix (svg, pdf, png); no file holds a date.

    By the canvases and not by `savefig`, which draws everything twice to solve a layout that is solved already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in suffixes]
    for suffix, path in zip(suffixes, paths, strict=True):
        if suffix == "svg":
            path.write_bytes(svg_of(figure))
        elif suffix == "pdf":
            FigureCanvasPdf(figure).print_pdf(path, metadata={"CreationDate": None})
        else:
            figure.set_dpi(DPI)
            FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return paths


def write_figure(folder: Path, name: str, draw: Callable[[], Figure]) -> list[Path]:
    """Draw in the light theme and write NAME.png and NAME.svg; the same numbers give the same SVG bytes."""
    with themed(LIGHT):
        return save(laid_out(draw()), folder, name, ("png", "svg"))


def ink_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = np.asarray(colour)[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#111111"


def signed(value: float) -> str:
    """A difference, with as many digits as say something: `+.25`, `-1.3`, `+1,170`."""
    size = abs(value)
    if size >= 1000:
        return f"{value:+,.0f}"
    text = f"{value:+.1f}" if size >= 10 else f"{value:+.2f}"
    return "0" if float(text) == 0 else text.replace("+0.", "+.").replace("-0.", "-.")
