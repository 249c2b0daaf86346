"""`lm-eval-steering rescore`: the output-language metrics from a run's samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_steering.errors import SteeringError

if TYPE_CHECKING:
    from lm_eval_steering.lmeval.rescore import Rescored


def rescore(
    path: Annotated[
        Path,
        typer.Argument(
            help="Output folder of lm_eval, run with --log_samples or --predict_only; or a table of texts "
            "(.csv, .tsv, .jsonl, .parquet)."
        ),
    ],
    target_language: Annotated[
        str | None, typer.Option(help="What lfs counts, such as fra_Latn or fra_Latn+deu_Latn; the steered by default.")
    ] = None,
    expected_language: Annotated[
        str | None, typer.Option(help="Language that all items expect; that of item or task by default.")
    ] = None,
    about: Annotated[
        str | None, typer.Option(help="What lpr, wpr, lcpr and script_share are about: expected (default), or target.")
    ] = None,
    lid: Annotated[
        str | None, typer.Option(help="lid.176, glotlid, openlid-v2, lid218e or a path; that of the run by default.")
    ] = None,
    lid_threshold: Annotated[float, typer.Option(help="With --lid: smallest probability that counts.")] = 0.5,
    lid_letters: Annotated[int, typer.Option(help="With --lid: smallest number of letters that counts.")] = 3,
    text_column: Annotated[str, typer.Option(help="Of a table: what the model wrote.")] = "text",
    target_column: Annotated[str, typer.Option(help="Of a table, if it has one: the target language.")] = "target",
    expected_column: Annotated[
        str, typer.Option(help="Of a table, if it has one: the language that the row expects.")
    ] = "expected",
) -> None:
    """Compute the output-language metrics of a finished run, or of a table of texts; its files stay as they are."""
    from lm_eval_steering.languages import normalise
    from lm_eval_steering.lmeval.rescore import Columns, RescoreOptions, codes, rescore_table
    from lm_eval_steering.lmeval.rescore import rescore as score
    from lm_eval_steering.metrics.language_id import LanguageIdentifier

    asked = RescoreOptions(
        codes(target_language),
        normalise(expected_language) if expected_language else None,
        about,
        LanguageIdentifier.named(lid, lid_threshold, lid_letters) if lid else None,
    )
    if not path.exists():
        raise SteeringError(f"{path}: no such file or folder")
    if path.is_file():
        rescored = [rescore_table(path, asked, Columns(text_column, target_column, expected_column))]
    else:
        rescored = score(path, asked)
    for done in rescored:
        typer.echo(table(done))
        typer.echo(f"wrote {done.path}\n")


def table(done: Rescored) -> str:
    """Task, filter, metric, value, standard error and number of outputs, a line each, and the settings below."""
    rows = [("task", "filter", "metric", "value", "stderr", "outputs")]
    for task, scores in done.scores.items():
        for key, count in done.counts[task].items():
            metric, of = key.split(",", maxsplit=1)
            rows.append((task, of, metric, _cell(scores[key]), _cell(scores[f"{metric}_stderr,{of}"]), str(count)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    targets = "+".join(done.settings["target_languages"]) or "none"
    return "\n".join([*lines, f"target {targets}, identifier {done.settings['language_identifier']}"])


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
