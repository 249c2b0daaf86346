"""Commands about tasks: what there is, and fetching its data where there is a network."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_steering.errors import SteeringError, UnknownLanguageError, did_you_mean

if TYPE_CHECKING:
    from lm_eval_steering.lmeval.listing import TaskEntry


def tasks(
    family: Annotated[str | None, typer.Argument(help="One family, to see its tasks and groups one a line.")] = None,
    language: Annotated[str | None, typer.Option(help="Only what is evaluated in this language.")] = None,
    needs: Annotated[
        bool, typer.Option("--needs", help="With the languages, wordings, metrics and data of each family.")
    ] = False,
) -> None:
    """List the task families."""
    from lm_eval_steering.lmeval.listing import task_entries

    entries = task_entries() if language is None else _in_language(task_entries(), language)
    families = sorted({entry.family for entry in entries})
    if family is not None:
        if family not in families:
            where = f" in {language}" if language else ""
            raise SteeringError(f"no task family {family!r}{where}{did_you_mean(family, families)}")
        for entry in entries:
            if entry.family == family:
                typer.echo(f"{entry.name}  ({'group' if entry.group else entry.output_type})")
        return
    for name in families:
        of_family = [entry for entry in entries if entry.family == name]
        typer.echo(_summary(name, of_family) if needs else f"{name}: {_line(of_family)}")
    typer.echo(
        "\n`lm-eval-steering tasks FAMILY` lists its tasks, `tasks --needs` the languages, wordings, metrics and data "
        "of all families; docs/tasks.md has the sources."
    )


def _in_language(entries: list[TaskEntry], language: str) -> list[TaskEntry]:
    from lm_eval_steering import languages
    from lm_eval_steering.lmeval.task_families import nearest

    known = sorted({code for entry in entries for code in entry.languages})
    near = nearest(language, known)
    with suppress(UnknownLanguageError):  # then it was near enough to one to propose that
        code = languages.normalise(language)
        if code in known:
            return [entry for entry in entries if code in entry.languages]
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval-steering tasks` lists what there is"
    raise SteeringError(f"no task of ours is in {language}{hint}")


def _line(entries: list[TaskEntry]) -> str:
    """`12 tasks, 11 languages`."""
    singles = [entry for entry in entries if not entry.group]
    codes = {code for entry in singles for code in entry.languages}
    return f"{counted(len(singles), 'task')}, {counted(len(codes), 'language')}"


def _summary(family: str, entries: list[TaskEntry]) -> str:
    from lm_eval_steering.lmeval.listing import needs

    singles = [entry for entry in entries if not entry.group]
    codes = sorted({code for entry in singles for code in entry.languages})
    wordings = sorted({entry.variant for entry in singles if entry.variant})
    metrics = list(dict.fromkeys(metric for entry in singles for metric in entry.metrics))
    groups = ", ".join(entry.name for entry in entries if entry.group)
    lines = [
        f"{family}: {_line(entries)}",
        *([f"  groups     {groups}"] if groups else []),
        f"  languages  {' '.join(codes)}",
        f"  wordings   default{''.join(f', {wording}' for wording in wordings)}",
        f"  metrics    {', '.join(metrics)}",
        f"  needs      {needs(family)}",
    ]
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def fetch_data(
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags joined by commas; * matches any text.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, for STEERING_DATA; without it the hub's own cache is filled.")
    ] = None,
    metadata: Annotated[str, typer.Option(help="JSON, as for lm_eval: what some tasks must know.")] = "{}",
) -> None:
    """Load the data of tasks where there is a network, for machines that have none."""
    from lm_eval_steering.files import parse_json_line
    from lm_eval_steering.lmeval.compat import be_quiet
    from lm_eval_steering.lmeval.listing import fetch

    settings = parse_json_line(metadata, f"--metadata {metadata!r}")
    be_quiet()
    written = 0
    for path, rows in fetch([name.strip() for name in tasks.split(",") if name.strip()], out, settings):
        typer.echo(f"{path}  {rows} rows")
        written += 1
    if out is None:
        typer.echo(f"{counted(written, 'set')} of rows at hand; set HF_DATASETS_OFFLINE=1 where there is no network")
    else:
        typer.echo(f"wrote {counted(written, 'file')}; export STEERING_DATA={out.resolve()} where there is no network")
