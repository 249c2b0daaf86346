"""How the report's figures look: one style in two themes, colours that survive colour blindness and print."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
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
MARKERS = "osD^vPX"


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
    def diverging(self) -> Colormap:
        """From worse through no difference to better."""
        return LinearSegmentedColormap.from_list("steering", [self.worse, self.middle, self.better])


LIGHT = Theme("#1b1f24", "#d4d8de", "#eceef1", "white", "#c2410c", "#fbfbfa", "#0b63a5")
DARK = Theme("#e4e7ec", "#444b57", "#2a2f38", "#171b21", "#e8713a", "#20252d", "#4ba3e3")
THEMES = {"light": LIGHT, "dark": DARK}


_FONT = "DejaVu Sans"  # travels with matplotlib: the same letters on every machine
SLIM = "DejaVu Sans Figures"  # alone where there are only numbers: a list of fonts is searched for each text
_LETTERS = (*range(0x20, 0x7F), *range(0xA0, 0x180), *range(0x2010, 0x2027), 0x2212)  # Latin, dashes, quotes, minus


@cache
def _slim_fonts() -> TemporaryDirectory[str]:
    """Copies of the font with the letters that figures use, known to matplotlib; the folder lives as the process does.

    A PDF embeds the letters that it uses. To find them in the whole font takes half a second a figure, in these
    copies nothing that one would notice.
    """
    from fontTools import subset  # type: ignore[import-untyped]
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    folder = TemporaryDirectory(prefix="lm-eval-steering-fonts-")
    for weight in ("normal", "bold"):
        found = font_manager.findfont(font_manager.FontProperties(family=_FONT, weight=weight))
        font = TTFont(found, recalcTimestamp=False)
        for table in {"GDEF", "GPOS", "GSUB", "FFTM", "MATH"} & set(font.keys()):
            del font[table]  # for layout of scripts that are not here; kerning has a table of its own
        cutter = subset.Subsetter(subset.Options(glyph_names=True, legacy_kern=True, name_IDs=["*"]))
        cutter.populate(unicodes=_LETTERS)
        cutter.subset(font)
        for record in font["name"].names:
            record.string = record.toUnicode().replace(_FONT, SLIM).replace("DejaVuSans", "DejaVuSansFigures")
        path = Path(folder.name) / f"{weight}.ttf"
        font.save(path)
        font_manager.fontManager.addfont(path)
    return folder


def _font_families() -> list[str]:
    """The small copy, and the whole font for letters that are not in it."""
    _slim_fonts()
    return [SLIM, _FONT]


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """matplotlib in our style, whatever the user's own configuration is."""
    style = {
        "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "axes.linewidth": 0.6, "legend.fontsize": 7,
        "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
        "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "font.family": _font_families(),
        "svg.hashsalt": "lm-eval-steering",  # with no date in the file, the same sweep gives the same bytes
        "pdf.fonttype": 42,  # letters stay letters: publishers refuse type 3
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.ink, "xtick.color": theme.ink,
        "ytick.color": theme.ink, "axes.facecolor": "none", "figure.facecolor": theme.paper, "grid.color": theme.faint,
        "grid.linewidth": 0.5, "hatch.linewidth": 0.5,
    }  # fmt: skip
    with mpl.rc_context({**mpl.rcParamsDefault, **style}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, laid out by constraints."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def laid_out(figure: Figure, like: Figure | None = None) -> Figure:
    """The figure with its layout solved, once for all formats; `like` is the same figure in another theme, laid out."""
    engine = figure.get_layout_engine()
    if like is None and engine is not None:
        engine.execute(figure)
    elif like is not None:
        for axes, place in zip(figure.axes, like.axes, strict=True):
            axes.set_position(place.get_position())
    figure.set_layout_engine("none")
    return figure


def svg_of(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes each time."""
    out = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def save(figure: Figure, folder: Path, name: str, svg: bytes) -> list[Path]:
    """Write SVG (as `svg_of` gave it), PDF and PNG; no file holds a date.

    By the canvases and not by `savefig`, which draws everything twice to solve a layout that is solved already.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in SUFFIXES]
    paths[0].write_bytes(svg)
    FigureCanvasPdf(figure).print_pdf(paths[1], metadata={"CreationDate": None})
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(paths[2], metadata={"Software": None})
    return paths


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
