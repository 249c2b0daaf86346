"""Commands that turn results into answers: report, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_steering.cli.options import check_folder
from lm_eval_steering.errors import SteeringError

if TYPE_CHECKING:
    from lm_eval_steering.report.page import Report

Input = Annotated[
    Path,
    typer.Argument(help="A sweep's folder, merged tables (merge --items), or lm-eval's results (file or folder)."),
]
Out = Annotated[Path, typer.Option(help="Folder for the page, figures/ and tables/.")]
Evaluated = Annotated[
    list[str] | None,
    typer.Option(help="TASK=CODE: the language of a task's items where its name does not say it. Repeat it."),
]
AllowDifferentPrompts = Annotated[
    bool, typer.Option("--allow-different-prompts", help="Pair other prompts or models too; every table says so.")
]
MaxSamples = Annotated[int, typer.Option(min=0, help="Outputs on the page.")]


def report(
    sweep: Input,
    out: Out,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Unsteered results of lm-eval (file or folder), for tasks that have no baseline here."),
    ] = None,
    evaluated: Evaluated = None,
    allow_different_prompts: AllowDifferentPrompts = False,
    max_samples: MaxSamples = 100_000,
) -> None:
    """Make a page, figures and tables of a sweep: self against cross, with intervals and tests."""
    from lm_eval_steering.report.page import write_report
    from lm_eval_steering.report.read import add_baseline, read_results

    check_folder(out)
    results = read_results(sweep, max_samples, _codes(evaluated))
    results.allow_different_prompts = allow_different_prompts
    if baseline is not None:
        add_baseline(results, baseline, max_samples)
    _print(write_report(results, out, _command()))


def compare(
    first: Input,
    second: Annotated[Path | None, typer.Argument(help="Another one; leave it out to compare interventions.")] = None,
    out: Out = Path("comparison"),
    intervention: Annotated[
        list[str] | None, typer.Option(help="A kind of intervention, as the report names it; give two.")
    ] = None,
    evaluated: Evaluated = None,
    allow_different_prompts: AllowDifferentPrompts = False,
    max_samples: MaxSamples = 100_000,
) -> None:
    """The same report of two runs or two interventions: what the second does beside the first."""
    from lm_eval_steering.report.comparison import compare_interventions, compare_runs
    from lm_eval_steering.report.page import write_report
    from lm_eval_steering.report.read import read_results

    check_folder(out)
    codes = _codes(evaluated)
    if second is None:
        results = compare_interventions(read_results(first, max_samples, codes), intervention or ())
    elif intervention:
        raise SteeringError("--intervention conflicts with a second run: leave one of the two out")
    else:
        runs = [read_results(path, max_samples, codes) for path in (first, second)]
        results = compare_runs(runs[0], runs[1], allow_different_prompts)
    _print(write_report(results, out, _command()))


def _codes(given: list[str] | None) -> dict[str, str]:
    """Task -> code from `task=code`.

    Raises:
        SteeringError: for what is not of this form.
    """
    pairs = [text.split("=", 1) for text in given or ()]
    if wrong := ["=".join(pair) for pair in pairs if len(pair) != 2 or not all(pair)]:
        raise SteeringError(f"--evaluated {wrong[0]}: expected TASK=CODE, such as arc_easy=eng_Latn")
    return {task: code for task, code in pairs}


def _command() -> list[str]:
    return ["lm-eval-steering", *sys.argv[1:]]


def _print(made: Report) -> None:
    for sentence in made.sentences:
        typer.echo(sentence)
    typer.echo(f"wrote {made.page} and {len(made.files) - 1} figures and tables beside it")
