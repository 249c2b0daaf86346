"""What the demo prints: self against cross, the two matrices, and three generations before and after."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from lm_eval_steering.demo.figures import Figures
from lm_eval_steering.languages import english_name


def show(figures: Figures, console: Console) -> None:
    """Print all tables."""
    for table in (_deactivation(figures), _lss(figures), _factors(figures), _forcing(figures), _self_cross(figures)):
        console.print()
        console.print(table)
    _generations(figures, console)
    console.print()
    for line in summary(figures):
        console.print(line, soft_wrap=True, highlight=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))


def _short(code: str) -> str:
    return code.split("_", maxsplit=1)[0]


def _deactivation(figures: Figures) -> Table:
    table = _table(
        "rise of perplexity in nats a token: row deactivated, column evaluated; |change| of its own by random"
    )
    for name in ("", *map(_short, figures.languages), "random"):
        table.add_column(name, justify="right")
    for row in figures.languages:
        rises = [figures.deactivated_nats[row][col] - figures.baseline_nats[col] for col in figures.languages]
        own = figures.languages.index(row)
        cells = [f"[bold]{rise:+.3f}[/bold]" if i == own else f"{rise:+.3f}" for i, rise in enumerate(rises)]
        table.add_row(_short(row), *cells, f"{control_change(figures, row):.4f}")
    return table


def control_change(figures: Figures, code: str) -> float:
    """Mean |change| of a language's own nats when matched random neurons are deactivated."""
    return fmean(abs(nats[code] - figures.baseline_nats[code]) for nats in figures.deactivated_control_nats[code])


def _lss(figures: Figures) -> Table:
    table = _table("LSS at the chosen factor (highest matched random set): row steered, column base")
    for name in ("", *map(_short, figures.languages), "mean"):
        table.add_column(name, justify="right")
    for row in figures.languages:
        cells = [
            "" if col == row else f"{figures.lss[row][col]:.2f} ({max(figures.lss_control[row][col]):.2f})"
            for col in figures.languages
        ]
        table.add_row(_short(row), *cells, f"{fmean(figures.lss[row].values()):.2f}")
    return table


def _factors(figures: Figures) -> Table:
    table = _table("share of outputs in the steered language by factor, on the prompts that choose it")
    for name in ("", *(f"x{factor:g}" for factor in figures.factors), "chosen"):
        table.add_column(name, justify="right")
    for code in figures.languages:
        shares = (f"{figures.lfs_choose[code][factor]:.2f}" for factor in figures.factors)
        table.add_row(_short(code), *shares, f"x{figures.chosen[code]:g}")
    return table


def _forcing(figures: Figures) -> Table:
    table = _table("the same at the chosen factor, on other prompts and from an open start")
    for name in ("", "prompts", "unsteered", "random", "open start", "unsteered", "random"):
        table.add_column(name, justify="right")
    for code in figures.languages:
        cells = [_short(code)]
        for shares, controls in ((figures.lfs, figures.lfs_control), (figures.lfs_open, figures.lfs_open_control)):
            cells += [
                f"[bold]{shares[code]['steered']:.2f}[/bold]",
                f"{shares[code]['baseline']:.2f}",
                f"{fmean(controls[code]):.2f}",
            ]
        table.add_row(*cells)
    return table


def _self_cross(figures: Figures) -> Table:
    table = _table("self against cross: change of nats a token under amplification")
    for name in ("factor", "self mean", "cross mean", "self improved", "cross improved"):
        table.add_column(name, justify="right")
    for factor in figures.factors:
        own, cross = changes(figures, factor)
        table.add_row(f"x{factor:g}", f"{fmean(own):+.3f}", f"{fmean(cross):+.3f}", _improved(own), _improved(cross))
    return table


def changes(figures: Figures, factor: float) -> tuple[list[float], list[float]]:
    """(self, cross) changes of nats a token at one factor, over all steered languages."""
    own: list[float] = []
    cross: list[float] = []
    for steered in figures.languages:
        for evaluated, nats in figures.amplified_nats[steered][factor].items():
            (own if steered == evaluated else cross).append(nats - figures.baseline_nats[evaluated])
    return own, cross


def _improved(values: Iterable[float]) -> str:
    values = list(values)
    return f"{sum(value < 0 for value in values)} of {len(values)}"


def _generations(figures: Figures, console: Console) -> None:
    for code in figures.languages[:3]:
        prompt, before, after = figures.outputs[code]
        console.print(f"\n[bold]{english_name(code)}[/bold] x{figures.chosen[code]:g}", highlight=False)
        for label, text in (("prompt", prompt), ("unsteered", before), ("steered", after)):
            console.print(f"  {label:<10}", text, markup=False, highlight=False, soft_wrap=True)


def summary(figures: Figures) -> list[str]:
    """The figures that the demo is judged by, one a line."""
    codes = figures.languages
    rises = {
        row: {col: figures.deactivated_nats[row][col] - figures.baseline_nats[col] for col in codes} for row in codes
    }
    own = fmean(rises[code][code] for code in codes)
    others = fmean(rises[row][col] for row in codes for col in codes if row != col)
    random = fmean(control_change(figures, code) for code in codes)
    largest = sum(max(rises[code], key=lambda col: rises[code][col]) == code for code in codes)
    pairs = [(row, col) for row in codes for col in codes if row != col]
    above = sum(figures.lss[row][col] > max(figures.lss_control[row][col]) for row, col in pairs)
    steered = fmean(figures.lfs[code]["steered"] for code in codes)
    opened = fmean(figures.lfs_open[code]["steered"] for code in codes)
    return [
        f"deactivation: own rise {own:.3f} nats, others {others:.3f} ({_ratio(own, others)} times), random |change| "
        f"{random:.4f} ({_ratio(own, random)} times); own is the largest in {largest} of {len(codes)} rows",
        f"LSS: mean {fmean(figures.lss[row][col] for row, col in pairs):.3f}, matched random "
        f"{fmean(fmean(figures.lss_control[row][col]) for row, col in pairs):.3f}; above every one of "
        f"{len(next(iter(figures.lfs_control.values())))} random sets in {above} of {len(pairs)} pairs",
        f"outputs in the steered language: {steered:.2f} from prompts in other languages "
        f"(unsteered {fmean(figures.lfs[code]['baseline'] for code in codes):.2f}, random "
        f"{fmean(fmean(figures.lfs_control[code]) for code in codes):.2f}), {opened:.2f} from an open start "
        f"(unsteered {fmean(figures.lfs_open[code]['baseline'] for code in codes):.2f}, random "
        f"{fmean(fmean(figures.lfs_open_control[code]) for code in codes):.2f})",
    ]


def _ratio(numerator: float, denominator: float) -> str:
    return f"{numerator / denominator:.1f}" if denominator > 0 else "infinitely many"
