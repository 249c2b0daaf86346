"""Tables as files: CSV, parquet, Markdown and LaTeX (booktabs)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_steering.report import tables
from lm_eval_steering.report.figures import best_overall, drawn_metrics, searched_kinds
from lm_eval_steering.report.method_comparison import BEST
from lm_eval_steering.report.naming import is_prompt, number, readable_metric, with_interval
from lm_eval_steering.report.tables import Results

if TYPE_CHECKING:
    import pandas as pd

PRINTED_ROWS = 200  # a longer table is for machines: it stays CSV and parquet


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Every table as CSV and parquet; the printed ones (summary, best factors, matrices) as Markdown and LaTeX too."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, frame in results.frames().items():
        paths += [folder / f"{name}.csv", folder / f"{name}.parquet"]
        frame.to_csv(paths[-2], index=False, lineterminator="\n")
        frame.to_parquet(paths[-1], index=False)
    warnings = results.sweep.facts.warnings
    if warnings:
        paths.append(folder / "WARNINGS.txt")
        paths[-1].write_text("".join(f"{warning}.\n" for warning in warnings), encoding="utf-8")
    for name, (frame, about) in printed(results).items():
        caption = " ".join([about, *(f"Note: {warning}." for warning in warnings)])
        paths += [folder / f"{name}.md", folder / f"{name}.tex"]
        paths[-2].write_text(markdown(frame, caption), encoding="utf-8")
        paths[-1].write_text(latex(frame, caption, name), encoding="utf-8")
    return paths


def printed(results: Results) -> dict[str, tuple[pd.DataFrame, str]]:
    """Name -> (table of texts, caption) of the tables for a paper."""
    against = results.sweep.against
    texts = {}
    searched = searched_kinds(results.effects.frame)
    for family, metric, kind in drawn_metrics(results.effects.frame):
        if kind in searched:
            continue
        rows = results.summary
        rows = rows[(rows["family"] == family) & (rows["metric"] == metric) & (rows["kind"] == kind)]
        suffix = "".join(c if c.isalnum() else "-" for c in f"{family}-{metric}-{kind}")
        what = f"{readable_metric(metric)} on {family}, {kind}"
        caption = (
            f"{what}: mean over languages, difference from the {against} with its 95 % interval (bootstrap of "
            "languages and items), and languages or pairs that improved, in brackets those significant after Holm's "
            "correction."
        )
        texts[f"summary-{suffix}"] = (summary_text(rows), caption)
        factor = best_overall(rows)
        values = tables.matrix(results.effects, family, metric, kind, factor, "difference")
        n = tables.matrix(results.effects, family, metric, kind, factor, "n").to_numpy(float)
        caption = f"{what}, factor {factor:g}: difference from the {against}, steered language by evaluated language"
        texts[f"matrix-{suffix}"] = (matrix_text(values), f"{caption} (n = {_whole(np.nanmax(n))} items a cell).")
    drawn = {(family, metric) for family, metric, _ in drawn_metrics(results.effects.frame)}
    for (family, metric, relation), rows in results.equal.groupby(["family", "metric", "items_in"], sort=False):
        if (family, metric) in drawn:
            suffix = "".join(c if c.isalnum() else "-" for c in f"{family}-{metric}-{relation}")
            caption = (
                f"{readable_metric(metric)} on {family} (items: {relation}) at equal damage, the rise in nats per "
                f"token of the steered language's own text: mean over languages, difference from the {against}, its 95 "
                "% interval (bootstrap of languages and items), random neurons at the same damage (lowest and highest "
                "of the sets) and at the same factors. An asterisk: damage that is not within 10 % of what was asked."
            )
            texts[f"equal-damage-{suffix}"] = (equal_text(rows), caption)
    texts |= _printed_methods(results)
    if len(results.best) and len(results.best) <= PRINTED_ROWS:
        caption = "The best factor of each language: chosen on one half of the items, reported on the other one."
        texts["best-factors"] = (best_text(results.best), caption)
    return texts


def summary_text(rows: pd.DataFrame) -> pd.DataFrame:
    """The summary as texts: one row per factor, blank where there is no value."""
    import pandas as pd

    lines = []
    for row in rows.sort_values("factor").to_dict("records"):
        texts = {"factor": number(row["factor"])}
        for relation in tables.RELATIONS:
            if rows[f"{relation}_cells"].sum() == 0:
                continue
            improved = f"{row[f'{relation}_improved']} of {row[f'{relation}_cells']} ({row[f'{relation}_significant']})"
            texts |= {
                f"{relation} baseline": number(row[f"{relation}_baseline"]),
                f"{relation}": number(row[f"{relation}_score"]),
                f"{relation} difference": with_interval(
                    row[f"{relation}_difference"], row[f"{relation}_low"], row[f"{relation}_high"]
                ),
                f"{relation} improved": improved if row[f"{relation}_cells"] else "",
                f"{relation} n": _whole(row[f"{relation}_n"]),
            }
            if rows[f"{relation}_missing"].sum():
                texts[f"{relation} missing"] = _whole(row[f"{relation}_missing"])
        if rows["gap"].notna().any():
            texts["self - cross"] = with_interval(row["gap"], row["gap_low"], row["gap_high"])
        lines.append(texts)
    return pd.DataFrame(lines).fillna("")


def equal_text(rows: pd.DataFrame) -> pd.DataFrame:
    """Interventions at equal damage as texts; languages that are missing are named."""
    import pandas as pd

    found = []
    for row in rows.to_dict("records"):
        reached = f"{number(row['reached_low'])} to {number(row['reached_high'])}{'*' if row['off_target'] else ''}"
        random = ""
        if row["sets"]:
            ends = f"{number(row['random_lowest'])} to {number(row['random_highest'])}, {row['sets']} sets"
            random = f"{number(row['random_mean'])} ({ends})"
        prompt = is_prompt(row["kind"])
        sets = f"{row['sets_at_factor']} {'other languages named' if prompt else 'sets'}"
        at_factor = f"{number(row['random_at_factor'])} ({sets})" if row["sets_at_factor"] else ""
        found.append({
            "damage": number(row["damage"]), "intervention": row["kind"], "reached": reached,
            "factors": "" if prompt else f"{number(row['factor_low'])} to {number(row['factor_high'])}",
            "languages": str(row["languages"]), "missing": row["missing"], "baseline": number(row["baseline"]),
            "score": number(row["score"]),
            "difference": with_interval(row["difference"], row["low"], row["high"]),
            "random, same damage": random, "random, same factors": at_factor, "n": _whole(row["n"]),
        })  # fmt: skip
    table = pd.DataFrame(found).fillna("")
    return table.drop(columns=[name for name in table if (table[name] == "").all()])


def _printed_methods(results: Results) -> dict[str, tuple[pd.DataFrame, str]]:
    """One table for each damage that was asked for, and one for methods at their best."""
    comparison, texts = results.methods, {}
    if comparison is None:
        return {}
    for at, rows in comparison.rows.groupby("at", sort=False):
        where = "each at its best: the factor that was chosen on one half of the items, over the other half" if (
            at == BEST) else f"at a damage of {at} nats per token to the steered language's own text"  # fmt: skip
        caption = (
            f"{readable_metric(comparison.metric)} on {comparison.family} of every method on each language, {where}: "
            f"difference from the {results.sweep.against} with its 95 % interval, LSS, the damage that was measured, "
            "and how many controls (random neurons or directions, the instruction naming other languages) reach it. An "
            "asterisk: the method exceeds every other one by the whole paired interval (same items; means over "
            "languages: of languages and items)."
        )
        if len(rows) <= PRINTED_ROWS and (rows["missing"] == "").any():
            name = "".join(c if c.isalnum() or c == "." else "-" for c in f"methods-{at}")
            texts[name] = (methods_text(rows), caption)
    return texts


def methods_text(rows: pd.DataFrame) -> pd.DataFrame:
    """Methods on each language as texts; an asterisk marks a winner, and what is missing says why."""
    import pandas as pd

    found = []
    for row in rows.to_dict("records"):
        reached = f"{_whole(row['random_reached'])} of {_whole(row['sets'])}" if row["sets"] > 0 else ""
        whole = f"mean of {row['languages']}"
        found.append({
            "language": row["steered"] or whole, "method": row["kind"], "factor": number(row["factor"]),
            "success": f"{number(row['success'])}{'*' if row['wins'] else ''}",
            "difference": with_interval(row["difference"], row["low"], row["high"]), "LSS": number(row["lss"]),
            "damage": number(row["damage"]), "degenerate": number(row["degenerate"]), "controls": reached,
            "n": _whole(row["n"]), "missing": row["missing"],
        })  # fmt: skip
    table = pd.DataFrame(found).fillna("")
    return table.drop(columns=[name for name in table if (table[name] == "").all()])


def matrix_text(values: pd.DataFrame) -> pd.DataFrame:
    """Codes and differences as texts."""
    texts = values.map(lambda value: number(value, signed=True))
    texts.columns = [code or "several" for code in texts.columns]
    return texts.rename_axis("steered").reset_index()


def best_text(best: pd.DataFrame) -> pd.DataFrame:
    """The best factors as texts."""
    texts = best[[*("family", "metric", "kind", "steered", "factor", "n_choose", "n", "baseline", "score")]].copy()
    for name in ("factor", "baseline", "score"):
        texts[name] = [number(value) for value in texts[name]]
    texts["difference"] = [
        with_interval(*ends) for ends in zip(best["difference"], best["low"], best["high"], strict=True)
    ]
    return texts.rename(columns={"n_choose": "n chosen on"}).astype(str)


def _whole(value: Any) -> str:
    return "" if math.isnan(value) else f"{int(value):,}"


def markdown(frame: pd.DataFrame, caption: str) -> str:
    """A Markdown table under its caption."""
    escaped = frame.astype(str).replace({r"\|": r"\|", "\n": " "}, regex=True)
    escaped.columns = [str(name).replace("|", r"\|") for name in frame.columns]
    return f"{caption}\n\n{escaped.to_markdown(index=False, disable_numparse=True)}\n"


def latex(frame: pd.DataFrame, caption: str, label: str) -> str:
    """A `table*` with booktabs, shrunk to the page where it is wider (packages booktabs and graphicx)."""
    columns = "l" + "r" * (len(frame.columns) - 1)
    styler = frame.astype(str).style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    table = styler.to_latex(hrules=True, column_format=columns)
    for letter, command in (("×", r"$\times$"), ("−", "$-$")):
        table, caption = table.replace(letter, command), caption.replace(letter, command)
    lines = [
        r"\begin{table*}", r"\centering", rf"\caption{{{escaped_for_latex(caption)}}}", rf"\label{{tab:{label}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%", f"{table.strip()}}}", r"\end{table*}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def escaped_for_latex(text: str) -> str:
    """A text for LaTeX, by the function that pandas escapes cells with."""
    from pandas.io.formats.style_render import _escape_latex

    return str(_escape_latex(text))
