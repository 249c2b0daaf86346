"""Write a report: figures, tables, and a page that is one HTML file, safe to open although it holds model output.

Nothing is fetched, and no data become HTML: tables and samples are embedded as compressed JSON and inserted as
text. The content security policy names the one script and the one style sheet by their hashes and forbids
everything else, so that even a mistake here could run nothing and send nothing.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from lm_eval_steering.files import write_bytes
from lm_eval_steering.languages import english_name, family_order, same_language
from lm_eval_steering.metrics.language_id import UNKNOWN
from lm_eval_steering.report.conclusions import answer
from lm_eval_steering.report.figures import Figured, draw, gallery, neuron_set_of
from lm_eval_steering.report.methods import methods
from lm_eval_steering.report.read import ItemOutput, Sweep
from lm_eval_steering.report.table_files import write_tables
from lm_eval_steering.report.tables import Results, by_relation, compute

if TYPE_CHECKING:
    import pandas as pd

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        results: the data frames.
        page: the HTML file.
        files: everything, the page first.
        sentences: the answer.
    """

    results: Results
    page: Path
    files: tuple[Path, ...]
    sentences: tuple[str, ...]


def write_report(sweep: Sweep, out: Path, command: Sequence[str] = ()) -> Report:
    """Write the page, `figures/` (SVG, PDF, PNG), `tables/` (CSV, parquet, Markdown, LaTeX) and `methods/`.

    Args:
        sweep: as `read_results` or `comparison` gave it.
        out: folder; files of an earlier report of that name are replaced.
        command: that made the report, to be printed.
    """
    out = Path(out)
    sweep.facts.command = shlex.join(command)
    results = compute(sweep)
    results.neurons = neuron_set_of(sweep.facts.neurons)
    figured, files = draw(gallery(results), out / "figures")
    files += write_tables(results, out / "tables")
    files += methods(results).write(out / "methods")
    page = out / PAGE
    write_bytes(page, render(results, figured).encode("utf-8", "replace"))
    return Report(results, page, (page, *files), answer(results).sentences)


# --- The page -------------------------------------------------------------------------------------------------------

_PARTS = Path(__file__).parent / "page_parts"
_CHUNK = 2000  # samples that are unpacked at once
MOST_ROWS = 20_000  # of a table on the page; its file has all rows
TABLES = {
    "summary": (
        "Self and cross",
        "Means over languages at each factor, of items in the steered language (self), in another one (cross) or in "
        "several; the interval is over languages and items.",
    ),
    "effects": ("Every cell", "Each steered cell beside its baseline, with interval, test and Holm's correction."),
    "best-factors": (
        "Best factors",
        "Chosen on one half of the items, reported on the other half; only scores of which it is known what is better.",
    ),
    "controls": (
        "Random controls",
        "Language steering beside matched random neurons; an instruction beside the same one naming other languages.",
    ),
    "damage": ("Damage", "Success beside its price: perplexity, degenerate outputs, outputs in no known language."),
    "equal-damage": (
        "Equal damage",
        "Interventions at factors that were searched for to raise the nats per token of the steered language's text by "
        "the same amount: means over languages, beside random neurons at the same damage and at the same factors. An "
        "instruction stands at the damage that it does, beside the same one naming other languages.",
    ),
    "methods": (
        "Methods",
        "Success of every intervention on each language, at equal damage and at its best: a factor that was chosen on "
        "one half of the items, over the other half. Blank in steered: the mean over languages. Ahead of: methods that "
        "it exceeds by the whole paired interval; it wins where these are all others. Missing: why there is no number.",
    ),
    "methods-paired": (
        "Methods, paired",
        "Success of one intervention minus another's over the same items, with the 95 % interval; p is of one language "
        "and not corrected.",
    ),
    "cost": ("Cost", "Seconds and tokens of each cell."),
    "missing": ("Missing", "Planned cells that are not done, and why."),
}
_HIDDEN = {"cell", "items", "higher_is_better", "stage", "comparisons", "task"}


def render(results: Results, figures: list[Figured]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PARTS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    css, script = (_PARTS.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    groups = explorer_data(results.sweep)
    sweep = results.sweep
    return environment.get_template("page.html").render(
        facts=sweep.facts,
        against=sweep.against,
        answer=answer(results),
        methods=methods(results),
        figures=figures,
        css=css,
        script=script,
        policy=policy(css, script),
        tables=packed(_tables(results)),
        names=packed(language_names(groups)),
        index=packed([{key: value for key, value in group.items() if key != "items"} | {"count": len(group["items"])}
                      for group in groups]),
        chunks=[[packed(group["items"][start : start + _CHUNK]) for start in range(0, len(group["items"]), _CHUNK)]
                for group in groups],
        samples=sum(len(item[2]) - item[2].count(None) for group in groups for item in group["items"]),
        left_out=sweep.samples.left_out,
        signatures=sorted(sweep.cells.loc[sweep.cells["is_baseline"], "signature"].astype(str).unique())
        + sorted(sweep.steered_cells()["signature"].astype(str).unique()),
        alpha=0.05,
    )  # fmt: skip


def policy(css: str, script: str) -> str:
    """The content security policy: this script, this style sheet, images inside the page, and nothing else."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(css)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def packed(data: Any) -> str:
    """JSON, gzip, base64: characters without meaning in HTML, the same for the same data."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=6, mtime=0)).decode()


def _tables(results: Results) -> list[dict[str, Any]]:
    listed = []
    for name, table in results.frames().items():
        title, about = TABLES[name]
        frame = by_relation(table) if name == "summary" else table
        shown = frame.head(MOST_ROWS)
        columns = [column for column in shown.columns if _is_shown(name, column, shown)]
        listed.append(
            {
                "name": name,
                "title": title,
                "about": " ".join([about, *(f"Note: {warning}." for warning in results.sweep.facts.warnings)]),
                "columns": [column.replace("_", " ") for column in columns],
                "rows": [[plain(value) for value in row] for row in shown[columns].itertuples(index=False, name=None)],
                "total": len(frame),
            }
        )
    return listed


def _is_shown(name: str, column: str, frame: pd.DataFrame) -> bool:
    """Whether a column says something to a person; the files hold all of them."""
    if name in ("cost", "missing"):
        return True
    if column in _HIDDEN:
        return False
    return bool(frame[column].notna().any())


def plain(value: Any) -> Any:
    """A value for JSON: None for nan, numbers as Python's, everything else as text."""
    import pandas as pd

    if pd.isna(value):
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | bool) else str(value)


# --- Samples for the page: every prompt once, and under it the baseline's output and the steered ones by factor

STEERED, OTHER, NONE = "s", "o", "u"


def explorer_data(sweep: Sweep) -> list[dict[str, Any]]:
    """One group a task, steered language and intervention.

    Groups whose outputs were identified come first.
    Each has `task`, `steered`, `kind`, `factors` (the columns, the baseline first) and `items`: [document, prompt,
    [output or null for each column]], an output being [text, language, verdict]; the verdict is `s` for the steered
    language, `u` for none that is known, `o` for any other.
    """
    outputs = {cell: {output.doc: output for output in rows} for cell, rows in sweep.samples.outputs.items()}
    cells = sweep.steered_cells()
    cells = cells[cells["cell"].isin(outputs)]
    order = {code: number for number, code in enumerate(family_order(sorted(cells["steered"].unique())))}
    groups = []
    for (task, steered, kind), rows in cells.sort_values("factor").groupby(["task", "steered", "kind"]):
        base = rows["baseline_cell"].iloc[0]
        columns = [outputs.get(base, {}), *(outputs[cell] for cell in rows["cell"])]
        prompts = _prompts(sweep, task, rows["target"].iloc[0])
        docs = sorted({doc for column in columns for doc in column})
        groups.append(
            {
                "task": task,
                "steered": steered,
                "kind": kind,
                "factors": [sweep.against, *(_factor(factor) for factor in rows["factor"])],
                "items": [
                    [doc, prompts.get(doc, ""), [_output(column.get(doc), steered) for column in columns]]
                    for doc in docs
                ],
            }
        )

    def rank(group: dict[str, Any]) -> tuple[Any, ...]:
        identified = any(output and output[1] for item in group["items"] for output in item[2])
        return (not identified, group["task"], order[group["steered"]], group["kind"])

    return sorted(groups, key=rank)


def language_names(groups: list[dict[str, Any]]) -> dict[str, str]:
    """Code -> English name, of every language that an output or a choice has."""
    codes = {part for group in groups for part in group["steered"].split("+")}
    codes |= {output[1] for group in groups for item in group["items"] for output in item[2] if output and output[1]}
    return {code: english_name(code) if code != UNKNOWN else "unknown" for code in sorted(codes)}


def _prompts(sweep: Sweep, task: str, target: str) -> dict[int, str]:
    of_target = sweep.samples.prompts.get((task, target))
    return of_target if of_target else sweep.samples.prompts.get((task, ""), {})


def _factor(factor: float) -> str:
    return f"×{factor:g}" if not math.isnan(factor) else "steered"


def _output(output: ItemOutput | None, steered: str) -> list[str] | None:
    if output is None:
        return None
    return [output.text, output.language, verdict(output.language, steered)]


def verdict(language: str, steered: str) -> str:
    """Whether an output is in a steered language, in none that is known, or in another."""
    if language in ("", UNKNOWN):
        return NONE
    return STEERED if any(same_language(language, code) for code in steered.split("+")) else OTHER
