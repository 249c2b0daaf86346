"""Verbs that turn sweeps into answers: report, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lm_eval_steering.cli.options import check_folder
from lm_eval_steering.errors import SteeringError

Input = Annotated[Path, typer.Argument(help="Folder of a sweep, or of merged tables (merge --items).")]
Out = Annotated[Path, typer.Option(help="Folder for the page, figures/ and tables/.")]
MaxSamples = Annotated[int, typer.Option(min=0, help="Outputs on the page.")]


def report(
    sweep: Input,
    out: Out,
    baseline: Annotated[
        Path | None, typer.Option(help="results_*.json of a plain lm-eval run, for tasks that have no baseline here.")
    ] = None,
    max_samples: MaxSamples = 100_000,
) -> None:
    """Make a page, figures and tables of a sweep: self against cross, with intervals and tests."""
    from lm_eval_steering.report.page import make_report
    from lm_eval_steering.report.read import add_baseline, read_results

    check_folder(out)
    found = read_results(sweep, max_samples)
    if baseline is not None:
        add_baseline(found, baseline)
    _say(make_report(found, out, _command()))


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a sweep or of merged tables, or results_*.json of lm-eval.")],
    second: Annotated[Path | None, typer.Argument(help="Another one; leave it out to compare interventions.")] = None,
    out: Out = Path("comparison"),
    intervention: Annotated[
        list[str] | None, typer.Option(help="A kind of intervention, as the report names it; give two.")
    ] = None,
    max_samples: MaxSamples = 100_000,
) -> None:
    """The same report of two runs or two interventions: what the second does beside the first."""
    from lm_eval_steering.report.comparison import compare_interventions, compare_runs
    from lm_eval_steering.report.page import make_report
    from lm_eval_steering.report.read import read_results

    check_folder(out)
    if second is None:
        found = compare_interventions(read_results(first, max_samples), intervention or ())
    elif intervention:
        raise SteeringError("--intervention beside two runs: leave one of the two out")
    else:
        found = compare_runs(read_results(first, max_samples), read_results(second, max_samples))
    _say(make_report(found, out, _command()))


def _command() -> list[str]:
    return ["lm-eval-steering", *sys.argv[1:]]


def _say(made: Any) -> None:
    for sentence in made.sentences:
        typer.echo(sentence)
    typer.echo(f"wrote {made.page} and {len(made.files) - 1} figures and tables beside it")


VERBS: dict[str, Any] = {"report": report, "compare": compare}
