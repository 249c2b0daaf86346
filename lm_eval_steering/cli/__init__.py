"""`lm-eval-steering`: one thin function per command. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any

import typer

from lm_eval_steering import __version__, extras
from lm_eval_steering.cli import analysis, environment, export, finding, report, rescore, sets, sweep, tasks
from lm_eval_steering.errors import DidNotHappenError, SteeringError

# Command -> the extra that it needs from its first line on. What only an option needs is refused where it is read.
NEEDS = {
    "compare": "report", "inspect": "report", "logit-lens": "report", "merge": "report",
    "report": "report", "stepwise": "report",
}  # fmt: skip

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Evaluate language models while their language-specific neurons are steered.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lm-eval-steering {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Evaluate language models while their language-specific neurons are steered."""


# Commands that keep what they finished, and do only what is missing when they are run again. `sweep` says so itself.
RESUMED = {"find", "record"}


def _interruptible(name: str, command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which says on Ctrl-C how it goes on; typer alone would end it without a word."""

    @wraps(command)
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo(f"interrupted{'; run the same command again to go on' if name in RESUMED else ''}", err=True)
            raise typer.Exit(130) from None

    return interrupted


def _with_extra(name: str, command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, refused in one line where the extra that it needs is not installed."""
    if name not in NEEDS:
        return command

    @wraps(command)
    def checked(*args: Any, **kwargs: Any) -> Any:
        extras.require(NEEDS[name], f"lm-eval-steering {name}")
        return command(*args, **kwargs)

    return checked


class WhereName(StrEnum):
    """What `where` can name."""

    DEMO_MODEL = "demo-model"
    DEMO_NEURONS = "demo-neurons"
    DEMO_LANGUAGES = "demo-languages"
    DEMO_TASK = "demo-task"
    DEMO_PLAN = "demo-plan"
    DEMO_PLAN_ALL = "demo-plan-all"
    REAL_PLAN = "real-plan"
    TASKS = "tasks"
    NEURON_SETS = "neuron-sets"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def run(context: typer.Context) -> None:
    """Evaluate: the same as `lm_eval ...`, with our model, metrics and tasks registered without a start-up file."""
    from lm_eval_steering.lmeval.registration import keep_answers, register_all

    register_all()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *context.args]
    try:
        cli_evaluate()
    except (SteeringError, DidNotHappenError) as error:
        keep_answers(error)  # any other error comes to Python's hook, which does the same
        raise


@app.command()
def where(
    name: Annotated[str, typer.Argument(help=f"What to look up: {', '.join(WhereName)}.", show_default=False)],
) -> None:
    """Print a path or names, for people and scripts."""
    from lm_eval_steering import resources

    if name not in list(WhereName):
        raise SteeringError(f"where {name!r}: expected one of {', '.join(WhereName)}")

    if name == WhereName.DEMO_LANGUAGES:
        from lm_eval_steering.lmeval.task_families.demo import demo_languages

        typer.echo("\n".join(demo_languages()))
        return
    answers = {
        WhereName.DEMO_MODEL: resources.demo_model,
        WhereName.DEMO_NEURONS: lambda: resources.find_neuron_set("demo"),
        WhereName.DEMO_TASK: lambda: "steering_demo_continuation_fra_Latn",
        WhereName.DEMO_PLAN: resources.demo_plan,
        WhereName.DEMO_PLAN_ALL: resources.demo_plan_all,
        WhereName.REAL_PLAN: resources.real_plan,
        WhereName.TASKS: resources.tasks_folder,
        WhereName.NEURON_SETS: resources.neuron_sets_folder,
    }
    typer.echo(answers[WhereName(name)]())


# In the order in which the help shows them.
COMMANDS: dict[str, Callable[..., None]] = {
    "find": finding.find, "record": finding.record, "select": finding.select, "calibrate": finding.calibrate,
    "inspect": sets.inspect, "rescore": rescore.rescore, "env": environment.env, "import": sets.import_,
    "doctor": analysis.doctor, "stepwise": analysis.stepwise, "logit-lens": analysis.logit_lens,
    "sweep": sweep.sweep, "plans": sweep.plans, "status": sweep.status, "merge": sweep.merge,
    "tasks": tasks.tasks, "fetch-data": tasks.fetch_data, "export": export.export,
    "report": report.report, "compare": report.compare,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name)(_interruptible(name, _with_extra(name, command)))
app.add_typer(sets.neurons, name="neurons")


def main() -> None:
    """Entry point: what a user can mend is one line and exit code 2."""
    try:
        app()
        return
    except ModuleNotFoundError as error:
        extra = extras.extra_of(error.name or "")
        if extra is None:
            raise
        message = (
            f"lm-eval-steering: error: {error.name} is not installed; the extra {extra!r} installs it: "
            f'pip install "lm-eval-steering[{extra}]"'
        )
    except (SteeringError, DidNotHappenError, OSError) as error:  # OSError names the file: a full disk, a missing right
        from lm_eval_steering.lmeval.registration import debugging, one_line

        if debugging():
            raise
        message = one_line(error)
    typer.echo(message, err=True)
    sys.exit(2)
