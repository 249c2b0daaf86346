"""The task families: one module each, with the rows' source, the prompts, the scores and the files under `tasks/`.

A module offers `generated_files() -> dict[Path, str]` (paths below `tasks/`), which scripts/generate_tasks.py writes,
and `NEEDS`, one line that `lm-eval-steering tasks` prints. Every task file says in its metadata the `evaluated`
language (a pair where prompt and answer differ in language), and its `variant` where the wording is not lm-eval's.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import UnknownLanguageError
from lm_eval_steering.lmeval.sources import DataError, RowsSource

# Metrics that not every document has.
OF_SOME_ITEMS = {"clas_relevance", "clas_score", "lpr", "wpr", "lcpr"}

# Templates whose scores changed since version 1.0: the language of the output (marks that fastText cannot read, guesses
# of another script, `degenerate`, `lfs_clean`), and the interval of the shift of LSS.
_SECOND_VERSION = {
    "_forcing.yaml", "_plain.yaml", "_open_generation.yaml", "_clas_bench.yaml", "_mlqa.yaml", "_mlqa_gurgurov.yaml",
    "_xquad.yaml", "_xquad_gurgurov.yaml", "_belebele_gurgurov.yaml", "_xnli_gurgurov.yaml", "_gurgurov.yaml",
    "_lm_eval.yaml", "_rahmanisa.yaml", "_rahmanisa_targeted.yaml", "_parallel.yaml", "_mlama.yaml",
}  # fmt: skip


def modules() -> dict[str, ModuleType]:
    """Every family's module by its name, which is also its folder under `tasks/`."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    imported = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in imported.items() if hasattr(module, "generated_files")}


def generated_files() -> dict[Path, str]:
    """What all families put under `tasks/`."""
    return {path: text for module in modules().values() for path, text in module.generated_files().items()}


def task_name(family: str, evaluated: str, *rest: str) -> str:
    """`steering_<family>_<code(s)>[_<more>]`."""
    return "_".join(["steering", family, evaluated.replace("-", "_"), *rest])


def task_file(folder: str, template: str, name: str, tag: str | None = None, **metadata: str) -> tuple[Path, str]:
    """One thin file: which template, which name, which language."""
    lines = [f"include: {template}", f"task: {name}"]
    if tag:
        lines.append(f"tag: {tag}")
    version = "2.0" if template in _SECOND_VERSION else "1.0"
    values = ", ".join(f"{key}: {value}" for key, value in {"version": version, **metadata}.items())
    lines.append(f"metadata: {{{values}}}")
    return Path(folder) / f"{name.removeprefix('steering_')}.yaml", "\n".join(lines) + "\n"


def group_file(folder: str, group: str, tasks: list[str], metrics: tuple[str, ...]) -> tuple[Path, str]:
    """A group that averages over its tasks, each item counting the same, as lm-eval's own groups do.

    lm-eval weights by a task's documents. Where a metric is not of every document, each task counts the same instead.
    """
    lines = [f"group: {group}", "task:", *(f"  - {task}" for task in tasks), "aggregate_metric_list:"]
    for metric in metrics:
        weighted = str(metric not in OF_SOME_ITEMS).lower()
        lines.append(f"  - {{metric: {metric}, aggregation: mean, weight_by_size: {weighted}}}")
    lines.append("metadata: {version: 1.0}")
    return Path(folder) / f"_group_{group.removeprefix('steering_')}.yaml", "\n".join(lines) + "\n"


def files_of_two_wordings(
    family: str, evaluated: Iterable[str], metrics: tuple[str, ...], other: str, other_metrics: tuple[str, ...]
) -> dict[Path, str]:
    """A file for each language in the default wording and in another one, and a group for each wording.

    Args:
        family: whose templates are `_FAMILY.yaml` and `_FAMILY_OTHER.yaml`.
        evaluated: codes of the languages.
        metrics: that the group in the default wording averages.
        other: name of the other wording, the tasks' `variant`.
        other_metrics: that its group averages.
    """
    codes = list(evaluated)
    plain, variant = ([task_name(family, code, *rest) for code in codes] for rest in ((), (other,)))
    files = [group_file(family, f"steering_{family}", plain, metrics)]
    files.append(group_file(family, f"steering_{family}_{other}", variant, other_metrics))
    for code, name, other_name in zip(codes, plain, variant, strict=True):
        files.append(task_file(family, f"_{family}.yaml", name, language_tag(code), evaluated=code))
        files.append(task_file(family, f"_{family}_{other}.yaml", other_name, evaluated=code, variant=other))
    return dict(files)


def language_tag(evaluated: str) -> str:
    """The tag that runs everything of ours in one language, each family in its default wording."""
    return f"steering_{evaluated}"


def expect(row: Mapping[str, Any], column: str, allowed: tuple[Any, ...], source: RowsSource) -> Any:
    """The value of a column, which must be one of a few."""
    if row[column] not in allowed:
        raise DataError(
            f"{source}: column {column!r} holds {row[column]!r}, expected one of {', '.join(map(repr, allowed))}"
        )
    return row[column]


def code_of(evaluated: str, codes: Mapping[str, str], family: str) -> str:
    """The family's name of a language."""
    if evaluated not in codes:
        near = nearest(evaluated, codes)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; its languages: {', '.join(codes)}"
        raise DataError(f"{family} is not in {evaluated}{hint}")
    return codes[evaluated]


def nearest(text: str, codes: Iterable[str]) -> list[str]:
    """The codes of the same language, or where the text names none, the code that is spelled almost like it.

    Raises:
        UnknownLanguageError: if there is neither; the message proposes a code where the text is a language's name.
    """
    known = list(codes)
    near = difflib.get_close_matches(text, known, n=1, cutoff=0.75)
    try:
        meant = languages.normalise(text)
    except UnknownLanguageError:
        if near:
            return near
        raise
    return [code for code in known if languages.same_language(code, meant)]
