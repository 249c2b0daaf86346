"""The output-language metrics from the samples of a finished run, as the run itself would have computed them.

lm-eval's `--predict_only` computes no metrics, and a run with plain `hf` knows no target language; both store what the
model wrote. Nothing of theirs is changed: scores go to new files, named after the run and the settings, so that another
target language makes another file. A plain table of texts (.csv, .tsv, .jsonl, .parquet) is scored likewise.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError, UnknownLanguageError
from lm_eval_steering.files import write_json, write_json_lines
from lm_eval_steering.languages import normalise
from lm_eval_steering.lmeval.aggregation import aggregated
from lm_eval_steering.lmeval.expected_language import expected_language, options_of
from lm_eval_steering.lmeval.registration import register_all
from lm_eval_steering.lmeval.sources import LocatedRow, read_located, refuse_invalid_text
from lm_eval_steering.metrics import pass_rates
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.metrics.output_language import EXPECTED, IdentifiedText, Value
from lm_eval_steering.metrics.registered import METRICS, check_options, value_of
from lm_eval_steering.provenance import fingerprint, versions

_DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?"
_SAMPLES = re.compile(rf"samples_(?P<task>.+)_(?P<date>{_DATE})\.jsonl")


@dataclass(frozen=True)
class RescoreOptions:
    """What the user asks for beyond what the run has stored.

    Attributes:
        targets: codes of the target languages; empty takes those that the run was steered to.
        expected: code of the language that all items expect; None takes that of each item or task.
        about: `expected` or `target`, as for `output_metrics`; None takes what the task's metric list says.
        identifier: None takes that of the run.
    """

    targets: tuple[str, ...] = ()
    expected: str | None = None
    about: str | None = None
    identifier: LanguageIdentifier | None = None

    def __post_init__(self) -> None:
        check_options("rescore", {"about": self.about or EXPECTED})


@dataclass(frozen=True)
class RunFiles:
    """Files of one run: its samples by task, and its results where they are there."""

    folder: Path
    date: str
    samples: dict[str, Path] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """The run's results file; empty where there is none.

        Raises:
            SteeringError: if it cannot be read.
        """
        paths = [path for path in self.folder.glob(f"*_{self.date}.json") if not path.name.startswith("rescored_")]
        return _read(paths[0]) if paths else {}


@dataclass(frozen=True)
class Rescored:
    """What was written.

    Attributes:
        path: of the results.
        scores: task -> lm-eval's keys (`lfs,none`, `lfs_stderr,none`) -> value.
        counts: task -> metric and filter -> number of outputs that have a value.
        settings: what the values depend on beside the outputs.
    """

    path: Path
    scores: dict[str, dict[str, Any]]
    counts: dict[str, dict[str, int]]
    settings: dict[str, Any]


def rescore(folder: Path, asked: RescoreOptions) -> list[Rescored]:
    """Score every run whose samples lie under a folder.

    Raises:
        SteeringError: if there are none, none of them is generated text, a file is damaged, or the run used another
            identifier than would be used now.
    """
    register_all()
    done = [rescored for run in _runs(folder) if (rescored := _rescore(run, asked)) is not None]
    if not done:
        raise SteeringError(f"{folder}: its samples are of likelihood tasks; only generated text has a language")
    return done


def _runs(folder: Path) -> list[RunFiles]:
    runs: dict[tuple[Path, str], RunFiles] = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        if match := _SAMPLES.fullmatch(path.name):
            run = runs.setdefault((path.parent, match["date"]), RunFiles(path.parent, match["date"]))
            run.samples[match["task"]] = path
    if not runs:
        raise SteeringError(
            f"{folder}: no samples_<task>_<date>.jsonl; run lm_eval with --output_path and --log_samples (or "
            "--predict_only)"
        )
    return list(runs.values())


def _rescore(run: RunFiles, asked: RescoreOptions) -> Rescored | None:
    stored = run.stored()
    steering = (stored.get("config") or {}).get("steering") or {}
    identifier = _identifier(stored, steering, asked)
    targets = asked.targets or tuple(steering.get("target_languages") or ())
    configs = stored.get("configs") or {}
    values: dict[str, list[dict[str, Any]]] = {}
    for task, path in run.samples.items():
        rows = list(_generated(path, configs.get(task) or {}))
        if rows:
            values[task] = [_scored(row, configs.get(task) or {}, targets, identifier, asked) for row in rows]
    if not values:
        return None
    settings = _settings(identifier, targets, asked)
    files = {task: run.samples[task].name for task in values}
    return _write(run.folder, run.date, values, settings, {"samples": files}, stored.get("config"))


def _write(
    folder: Path,
    name: str,
    values: Mapping[str, list[dict[str, Any]]],
    settings: dict[str, Any],
    source: Mapping[str, Any],
    config: Any = None,
) -> Rescored:
    """Aggregate the items of each task, and write them and their scores to files that name the settings."""
    mark = fingerprint(settings)[:8]
    scores, counts = {}, {}
    for task, rows in values.items():
        scores[task], counts[task] = _aggregate(rows)
        write_json_lines(folder / f"rescored_samples_{task}_{name}_{mark}.jsonl", rows)
    content = {"results": scores, "counts": counts, "rescored": settings | dict(source), "config": config}
    path = folder / f"rescored_{name}_{mark}.json"
    write_json(path, content, indent=2)
    return Rescored(path, scores, counts, settings)


# --- A plain table of texts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; those of the languages may be absent from the table.

    Attributes:
        text: what the model wrote.
        target: code of the target language of a row, or several joined by `+`.
        expected: code of the language that a row expects.
    """

    text: str = "text"
    target: str = "target"
    expected: str = "expected"


def rescore_table(path: Path, asked: RescoreOptions, columns: Columns = Columns()) -> Rescored:
    """Score the texts of a table; the options go before its columns.

    Raises:
        SteeringError: naming file and line, for a file that is no table, a row without a text or with an unknown
            language.
    """
    register_all()
    identifier = asked.identifier or LanguageIdentifier()
    rows = read_located(path)
    if not rows:
        raise SteeringError(f"{path}: no rows")
    settings = _settings(identifier, asked.targets, asked)
    targets: set[str] = set()
    scored = []
    for number, located in enumerate(rows):
        row_targets = asked.targets or _codes_in(located, columns.target)
        expected = asked.expected or next(iter(_codes_in(located, columns.expected)), None)
        text = IdentifiedText.of(_text_in(located, columns), identifier, row_targets)
        options = {"about": asked.about} if asked.about else {}
        values = {metric: value_of(metric, text, options, expected) for metric in METRICS}
        scored.append(
            {"doc_id": number, "filter": "none"}
            | {metric: value for metric, value in values.items() if value is not None}
        )
        targets |= set(row_targets)
    settings["target_languages"] = sorted(targets)
    return _write(path.parent, path.name, {path.stem: scored}, settings, {"table": path.name})


def _text_in(located: LocatedRow, columns: Columns) -> str:
    refuse_invalid_text(located.row, located.where)
    text = located.row.get(columns.text)
    if not isinstance(text, str):
        names = ", ".join(str(name) for name in located.row)
        raise SteeringError(
            f"{located.where}: no text in the column {columns.text!r}; name it by --text-column (the row has {names})"
        )
    return text


def _codes_in(located: LocatedRow, column: str) -> tuple[str, ...]:
    try:
        return codes(str(located.row.get(column) or ""))
    except UnknownLanguageError as error:
        raise SteeringError(f"{located.where}, column {column!r}: {error}") from None


# --- Reading a run ----------------------------------------------------------------------------------------------------


def _identifier(stored: Mapping[str, Any], steering: Mapping[str, Any], asked: RescoreOptions) -> LanguageIdentifier:
    """The one asked for, else that of the run, which must give the signature that the run has."""
    if asked.identifier is not None:
        return asked.identifier
    arguments = (stored.get("config") or {}).get("model_args")
    arguments = arguments if steering and isinstance(arguments, Mapping) else {}
    identifier = LanguageIdentifier.from_arguments(arguments)
    signature = steering.get("language_identifier")
    if signature and signature != identifier.signature():
        raise SteeringError(
            f"the run identified languages with {signature}, this would be {identifier.signature()}: pass --lid (and "
            "--lid-threshold, --lid-letters) to say which you mean"
        )
    return identifier


def _generated(path: Path, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Samples of a task that generates text; none where its filter makes something else of every answer.

    Raises:
        SteeringError: if a line is no sample, or some answers are texts and some are not: a share of the texts alone
            would have another denominator than the run.
    """
    others = texts = 0
    if config.get("output_type", "generate_until") != "generate_until":
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                answer = row["filtered_resps"][0]
            except (ValueError, LookupError, TypeError):
                raise SteeringError(f"{path}, line {number}: no sample of lm-eval, or cut short") from None
            if isinstance(answer, str):
                texts += 1
                yield row
            else:
                others += 1
    if others and texts:
        raise SteeringError(
            f"{path}: the task's filter turns {others} of {others + texts} answers into something that is no text, so "
            "a share of the texts would be of other items than the run's"
        )


def _scored(
    row: Mapping[str, Any],
    config: Mapping[str, Any],
    targets: Sequence[str],
    identifier: LanguageIdentifier,
    asked: RescoreOptions,
) -> dict[str, Any]:
    """All metrics of one sample that are defined for it, and what tells which sample it was."""
    unfinished = bool(row["unfinished"]) if row.get("unfinished") is not None else None  # the text does not say it
    text = IdentifiedText.of(row["filtered_resps"][0], identifier, targets, unfinished)
    expected = expected_language(row.get("doc"), config.get("metadata"))
    known = {name: row.get(name) for name in ("doc_id", "filter", "doc_hash", "prompt_hash")}
    over = {key: value for key, value in (("about", asked.about), ("expected", asked.expected)) if value}
    options = _options(config)
    values: dict[str, Value | None] = {
        name: value_of(name, text, options_of(row.get("doc"), options.get(name, {})) | over, expected)
        for name in METRICS
    }
    return known | {name: value for name, value in values.items() if value is not None}


def _options(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the task's list says beside our metrics; `--predict_only` stores none of it."""
    entries = [entry for entry in config.get("metric_list") or () if isinstance(entry, Mapping)]
    return {
        str(entry.get("metric")): {key: entry[key] for key in ("about", "expected") if key in entry}
        for entry in entries
    }


def _aggregate(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """One task's scores under lm-eval's keys, with lm-eval's standard errors, and the number of values of each."""
    from lm_eval.api.registry import aggregation_registry

    items: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in rows:
        for name in METRICS:
            if name in row:
                items[name, row["filter"]].append(row[name])
    scores: dict[str, Any] = {}
    for (name, of), values in items.items():
        scores |= aggregated(name, of, aggregation_registry.get(METRICS[name].aggregation), values)
    return scores, {f"{name},{of}": len(values) for (name, of), values in items.items()}


def _settings(identifier: LanguageIdentifier, targets: Sequence[str], asked: RescoreOptions) -> dict[str, Any]:
    return {
        "target_languages": list(targets),
        "expected_language": asked.expected,
        "about": asked.about,
        "language_identifier": identifier.signature(),
        "pass_rates": pass_rates.signature(),
        "versions": versions(),
    }


def codes(text: str | None) -> tuple[str, ...]:
    """Codes from `fra_Latn+deu_Latn`."""
    return tuple(normalise(code) for code in text.split("+")) if text else ()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SteeringError(f"{path}: no JSON, or cut short: {error}") from None
