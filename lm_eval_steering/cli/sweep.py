"""Commands of sweeps: sweep, plans, status, merge."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_steering.errors import SteeringError

if TYPE_CHECKING:
    from lm_eval_steering.sweep.cells import Grid
    from lm_eval_steering.sweep.runner import Outcome

_INTERRUPTED = "interrupted; run the same command again to go on"
Folder = Annotated[Path, typer.Argument(help="Folder of a sweep.")]


class Launcher(StrEnum):
    """Where the parts of a plan run."""

    NONE = "none"
    LOCAL = "local"
    SUBMITIT = "submitit"


def sweep(
    plan: Annotated[str, typer.Argument(help="YAML file of the plan (docs/sweep.md), or the name of one that ships.")],
    out: Annotated[Path, typer.Option(help="Folder for the cells; run again, it goes on where it was.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override of the plan, such as controls.random=5; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The same as --set limit=N.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the cells, what is done, and an estimate.")] = False,
    shard: Annotated[str | None, typer.Option(help="Run a part of the plan, such as 2/8.")] = None,
    launcher: Annotated[Launcher, typer.Option(help="Divide the plan among jobs.")] = Launcher.NONE,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of those jobs.")] = None,
    retry_failed: Annotated[bool, typer.Option(help="Try failed cells again.")] = False,
) -> None:
    """Run every factor x language x task of a plan: what is missing of it. Exit code 1 where a cell failed."""
    os.environ["TQDM_DISABLE"] = "1"  # read by tqdm once, when it is imported
    from lm_eval_steering.lmeval.compat import be_quiet
    from lm_eval_steering.neurons.running import launched
    from lm_eval_steering.plans.shipped import find_plan
    from lm_eval_steering.sweep.cells import spell_out
    from lm_eval_steering.sweep.plan import read_plan
    from lm_eval_steering.sweep.run import run_sweep
    from lm_eval_steering.sweep.runner import Shard

    overrides = [*(set_ or ()), *([f"limit={limit}"] if limit else ())]
    spec = read_plan(find_plan(plan), overrides)
    part = Shard.parse(shard) if shard else None
    if launcher is not Launcher.NONE and part is not None:
        raise SteeringError(
            "--shard conflicts with --launcher, which makes the shards itself: leave one of the two out"
        )
    be_quiet()
    ranks = launched()[0]
    grid = spell_out(spec)
    if launcher is not Launcher.NONE and not dry_run:
        _stop_on_sigterm()
        _launch(grid, out, launcher, workers, retry_failed)
        return
    if dry_run:
        if ranks.first:
            from lm_eval_steering.sweep.status import describe

            typer.echo(describe(grid, out))
        return
    _stop_on_sigterm()
    outcome = run_sweep(grid, out, part, retry_failed)
    if ranks.first:
        _report(outcome, out)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def plans(
    name: Annotated[str | None, typer.Argument(help="Print this plan's file, to read or to change.")] = None,
    needs: Annotated[
        bool, typer.Option("--needs", help="With the model, neuron set, languages and data of each.")
    ] = False,
) -> None:
    """List the plans of the papers' experiments that `sweep` takes by name."""
    from lm_eval_steering.plans.shipped import describe, find_plan, titles

    if name is not None:
        typer.echo(find_plan(name).read_text(encoding="utf-8"), nl=False)
    elif needs:
        typer.echo(describe())
    else:
        typer.echo(
            f"{titles()}\n\n`lm-eval-steering plans NAME` prints a plan's file, `plans --needs` what all of them need."
        )


def status(out: Folder) -> None:
    """Print what is done, running, failed and missing; write missing.csv."""
    from lm_eval_steering.sweep.status import status as read_status

    typer.echo(read_status(out))


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of sweeps.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables.")],
    items: Annotated[bool, typer.Option(help="One row per item too.")] = False,
) -> None:
    """Make one table, parquet and CSV, of any number of sweeps: one row per cell and metric."""
    from lm_eval_steering.sweep.merge import merge as make

    paths, notes = make(folders, out, items)
    for line in [*notes, *(f"wrote {path}" for path in paths)]:
        typer.echo(line)


def _launch(grid: Grid, out: Path, launcher: Launcher, workers: int | None, retry_failed: bool) -> None:
    from lm_eval_steering.sweep.launch import launch_local, launch_slurm
    from lm_eval_steering.sweep.status import describe

    typer.echo(describe(grid, out))  # and refuses here what every job would refuse
    plan = grid.plan
    if launcher is Launcher.SUBMITIT:
        launched_jobs = launch_slurm(plan, out, workers, retry_failed)
        typer.echo(f"submitted {', '.join(launched_jobs.jobs)}; scripts and logs are in {launched_jobs.folder}")
        return
    if not workers:
        raise SteeringError("--launcher local: say how many, --workers 2")
    try:
        jobs = launch_local(plan, out, workers, retry_failed)
    except KeyboardInterrupt:
        typer.echo(_INTERRUPTED)
        raise typer.Exit(130) from None
    typer.echo(f"{workers} workers ended; logs are in {jobs.folder}")
    if jobs.exit_code:
        raise typer.Exit(jobs.exit_code)


def _report(outcome: Outcome, out: Path) -> None:
    typer.echo(f"{outcome.done} cells done, {outcome.ran} of them now; results are in {out}/cells")
    for line in outcome.waiting:
        typer.echo(f"waiting for {line}; run again when they are done")
    if outcome.failed:
        typer.echo(
            f"{len(outcome.failed)} cells failed; `lm-eval-steering status {out}` says why, --retry-failed retries"
        )
    if outcome.interrupted:
        typer.echo(_INTERRUPTED)


def _stop_on_sigterm() -> None:
    """A scheduler's signal ends a run as Ctrl-C does: the cell in hand is dropped, all others are whole."""
    import signal

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
