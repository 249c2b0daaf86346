"""Read results for a report: a sweep's folder, merged tables, or result files of lm-eval, steered or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.files import read_json_lines
from lm_eval_steering.languages import normalise, same_language
from lm_eval_steering.lmeval.evaluated_language import evaluated_language
from lm_eval_steering.lmeval.expected_language import EVALUATED_LANGUAGE
from lm_eval_steering.metrics.degenerate import degenerate
from lm_eval_steering.metrics.language_id import UNKNOWN, in_language
from lm_eval_steering.provenance import versions
from lm_eval_steering.report import naming
from lm_eval_steering.sweep.halves import REPORT, half_of, item_of
from lm_eval_steering.sweep.store import Store

if TYPE_CHECKING:
    import pandas as pd

BASELINE = "baseline"
CELL_COLUMNS = (
    "cell", "model", "task", "family", "evaluated", "steered", "relation", "kind", "factor", "control", "is_baseline",
    "deactivation", "target", "items", "stage", "signature", "fingerprint", "baseline_cell", "model_id", "asked",
    "damage_asked", "damage_reached",
)  # fmt: skip
SCORE_COLUMNS = ("cell", "metric", "value", "text", "n", "higher_is_better")
MAX_SAMPLES = 100_000
_PAIR = 2  # numbers of an item whose score is a ratio of two sums
LABELS, FORCED, CLEAN, DEGENERATE, LANG_UNKNOWN = "output_language", "lfs", "lfs_clean", "degenerate", "lang_unknown"
REPEATED = "repeated"  # seen from all outputs of a cell, not a metric of a task


class ReportError(SteeringError):
    """A report that cannot be made from what was given."""


# --- What a report is made of, whatever it is read from


@dataclass(frozen=True)
class Items:
    """The items of one cell.

    Attributes:
        docs: (items,) lm-eval's document numbers, ascending.
        values: metric -> (items,) numbers, (items, 2) pairs of a sum and its size, or objects (labels, texts); nan or
            None where an item has none.
        reported: (items,) whether the item is in the half that nothing was chosen on; None where nothing was split.
        documents: (items,) hashes of the documents, to see that two runs had the same ones; None where unknown.
        prompts: (items,) hashes of what the model was asked (prompt and continuations); None where unknown.
    """

    docs: NDArray[np.int64]
    values: dict[str, NDArray[Any]]
    reported: NDArray[np.bool_] | None = None
    documents: NDArray[np.uint64] | None = None
    prompts: NDArray[np.uint64] | None = None


@dataclass(frozen=True)
class ItemOutput:
    """The generated text of one item of one cell, and its identified language."""

    doc: int
    text: str
    language: str


@dataclass
class Samples:
    """Generated text for the explorer.

    Attributes:
        prompts: (task, target or "") -> document number -> prompt.
        outputs: cell -> its outputs, by document.
        left_out: number of outputs that were not kept, because there are too many for one page.
    """

    prompts: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)
    outputs: dict[str, list[ItemOutput]] = field(default_factory=dict)
    left_out: int = 0

    @property
    def count(self) -> int:
        """Number of outputs kept."""
        return sum(map(len, self.outputs.values()))


@dataclass
class Facts:
    """What a reader needs to reproduce the report.

    Attributes:
        title: of the report.
        sources: paths of the results.
        command: the command that made it.
        plan: text of the plan, empty if unknown.
        versions: package -> version.
        neurons: name or path of the neuron set, as the plan has it.
        config: lm-eval's `config` of one steered run, empty if there is none.
        choices: the factors that the sweep chose, one mapping per group.
        notes: what a reader should know: cells left out, halves, baselines that are missing.
        warnings: pairs that differ in prompts or model and were accepted by `allow_different_prompts`; every table
            repeats them.
    """

    title: str
    sources: list[str] = field(default_factory=list)
    command: str = ""
    plan: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    neurons: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    choices: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Sweep:
    """The results of a report: of a sweep, of lm-eval runs, or of a comparison of two.

    Attributes:
        cells: CELL_COLUMNS. `steered` is empty for a baseline; `evaluated` is empty where the items are in several
            languages; `control` is the seed of a random control; `deactivation` says that nothing is amplified;
            `baseline_cell` is what the cell is compared with; `model_id` and `asked` (JSON) are what a pair must have
            in common, empty where unknown; `damage_asked` (several joined by `+`, empty where the factor was written
            in the plan) and `damage_reached` are in nats per token.
        scores: SCORE_COLUMNS, one row per cell and metric.
        items: cell -> items; a cell without items has scores and no intervals.
        timings: cell, seconds, tokens.
        missing: planned cells that are not done: cell, task, status, why.
        samples: generated text.
        facts: the rest.
        against: what a difference is to: `baseline`, or the name of the other run.
        allow_different_prompts: whether pairs may differ in what was asked and of which model.
    """

    cells: pd.DataFrame
    scores: pd.DataFrame
    items: dict[str, Items]
    timings: pd.DataFrame
    missing: pd.DataFrame
    samples: Samples
    facts: Facts
    against: str = BASELINE
    allow_different_prompts: bool = False

    def is_shift(self, metric: str) -> bool:
        """Whether a score is itself a comparison with the unsteered model (LSS), whose null is random sets."""
        return self.against == BASELINE and naming.is_lss(metric)

    def steered_cells(self) -> pd.DataFrame:
        """Interventions on a language's own neurons: neither baselines nor controls."""
        return self.cells[~self.cells["is_baseline"] & self.cells["control"].isna()]


def read_results(path: Path | str, max_samples: int = MAX_SAMPLES, evaluated: Mapping[str, str] | None = None) -> Sweep:
    """Results of any kind.

    Args:
        path: a sweep's folder, a folder of merged tables (or its `metrics.parquet`), a `results_*.json` of lm-eval, or
            a folder with such files at any depth.
        max_samples: outputs to keep for the page.
        evaluated: task -> language of its items, for tasks whose name and metadata do not say it.

    Raises:
        SteeringError: if it is none of these, is damaged, or holds no finished cell.
    """
    path, evaluated = Path(path), evaluated or {}
    if (path / "sweep.json").is_file():
        return _read_store(path, max_samples, evaluated)
    folder = path.parent if path.name == "metrics.parquet" else path
    if (folder / "metrics.parquet").is_file():
        return _read_merged(folder, max_samples, evaluated)
    if path.suffix == ".json":
        return _read_lm_eval(path, [path], max_samples, evaluated)
    files = sorted(path.rglob("results_*.json")) if path.is_dir() else []
    if files:
        return _read_lm_eval(path, files, max_samples, evaluated)
    problem = "is not a folder" if not path.is_dir() else (
        "holds neither sweep.json (a sweep) nor metrics.parquet (merged tables) nor results_*.json (lm-eval)"
    )  # fmt: skip
    raise ReportError(f"{path} {problem}; run lm-eval-steering sweep PLAN --out {path} first")


# --- Pairs of cells


def align(sides: Sequence[Items], metric: str) -> tuple[NDArray[np.int64], list[NDArray[Any] | None]]:
    """Documents that any of these items has, and for each its values over them, nan where it has none.

    Returns:
        (documents,), and arrays (documents,) or (documents, 2); None for items without the metric.
    """
    docs = sides[0].docs
    if any(side.docs is not docs and not np.array_equal(side.docs, docs) for side in sides):
        docs = np.unique(np.concatenate([side.docs for side in sides]))
    aligned: list[NDArray[Any] | None] = []
    for side in sides:
        values = side.values.get(metric)
        if values is None or len(side.docs) == len(docs):
            aligned.append(values)
            continue
        empty = None if values.dtype == object else np.nan
        spread = np.full((len(docs), *values.shape[1:]), empty, dtype=values.dtype)
        spread[np.searchsorted(docs, side.docs)] = values
        aligned.append(spread)
    return docs, aligned


def check_pairs(sweep: Sweep) -> None:
    """Refuse pairs of a cell and its baseline that differ in documents, in what was asked, or in the model.

    Where the results allow it (`allow_different_prompts`), other prompts and models become warnings; other documents
    are never paired.

    Raises:
        ReportError: naming the task, what differs and the way out.
    """
    by_cell = {row["cell"]: row for row in sweep.cells.to_dict("records")}
    unknown: set[str] = set()
    warnings: dict[str, None] = {}
    for cell in by_cell.values():
        baseline = by_cell.get(cell["baseline_cell"])
        if baseline is None:
            continue
        first, second = sweep.items.get(baseline["cell"]), sweep.items.get(cell["cell"])
        problem = _difference_of_settings(baseline, cell)
        if first is not None and second is not None:
            _check_documents(first, second, cell["task"])
            problem = problem or _difference_of_prompts(first, second, cell["task"])
            if first.prompts is None or second.prompts is None:
                unknown.add(cell["task"])
        if problem and not sweep.allow_different_prompts:
            raise ReportError(
                f"{problem}; evaluate both with the same settings, or pass --allow-different-prompts to compare them "
                "nevertheless, with a warning beside every table"
            )
        if problem:
            warnings[problem] = None
    sweep.facts.warnings = list(dict.fromkeys([*sweep.facts.warnings, *warnings]))
    if unknown and sweep.cells["asked"].ne("").any():
        sweep.facts.notes.append(
            f"Whether the same prompts were asked is not known for {', '.join(sorted(unknown))}: no hashes were kept."
        )


def _check_documents(first: Items, second: Items, task: str) -> None:
    _, ours, theirs = np.intersect1d(first.docs, second.docs, return_indices=True)
    if not len(ours):
        raise ReportError(f"{task}: the two runs have no document in common; they cannot be paired")
    if first.documents is None or second.documents is None:
        return
    if differ := int((first.documents[ours] != second.documents[theirs]).sum()):
        raise ReportError(
            f"{task}: {differ} of {len(ours)} documents differ between a cell and its baseline; they cannot be paired: "
            "evaluate both on the same data (language forcing and LSS have other documents for each steered language; "
            "an unsteered run gets them by --metadata target_language=CODE)"
        )


def _difference_of_prompts(first: Items, second: Items, task: str) -> str:
    if first.prompts is None or second.prompts is None:
        return ""
    _, ours, theirs = np.intersect1d(first.docs, second.docs, return_indices=True)
    differ = int((first.prompts[ours] != second.prompts[theirs]).sum())
    return f"{task}: {differ} of {len(ours)} prompts differ between the two sides" if differ else ""


def _difference_of_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """How a cell differs from its baseline in model, few-shot examples, template, system text or decoding."""
    ids = [str(side["model_id"]) for side in (first, second)]
    if all(ids) and not same_model(*ids):
        return f"{second['task']}: the two sides are of different models: {_of_model(ids[0])} and {_of_model(ids[1])}"
    asked = [json.loads(side["asked"] or "{}") for side in (first, second)]
    for key in asked[0].keys() & asked[1].keys():
        if asked[0][key] != asked[1][key]:
            return f"{second['task']}: the two sides differ in {key}: {asked[0][key]!r} and {asked[1][key]!r}"
    for side in asked:
        if str(side.get("few-shot", "")).startswith("per rank"):
            return f"{second['task']}: few-shot examples were drawn per rank, so the prompts of two runs differ"
    return ""


def same_model(first: str, second: str) -> bool:
    """Whether two `model_id`s name one model and revision; local folders are compared by their last name."""
    one, other = json.loads(first), json.loads(second)
    if one["parts"] != other["parts"]:
        return False
    if one["sha"] and other["sha"]:
        return bool(one["sha"] == other["sha"])
    local = any(Path(side["name"]).is_absolute() or side["name"].startswith((".", "~")) for side in (one, other))
    names = [Path(side["name"]).name if local else side["name"] for side in (one, other)]
    return names[0] == names[1] and one["revision"] == other["revision"]


def _of_model(model_id: str) -> str:
    model = json.loads(model_id)
    extra = "".join(f", {key}={value}" for key, value in model["parts"].items())
    return f"{model['name']} (revision {model['revision']}{extra})"


# --- From a sweep's folder


def _read_store(path: Path, max_samples: int, evaluated: Mapping[str, str]) -> Sweep:
    import pandas as pd

    store = Store(path)
    frame = store.frame()
    if frame.empty:
        raise ReportError(f"{path}: no cell is done yet; `lm-eval-steering status {path}` says what is missing")
    facts = Facts(title=path.resolve().name, sources=[str(path)], versions=versions())
    plan = json.loads((path / "plan.json").read_text("utf-8"))["plan"] if (path / "plan.json").is_file() else {}
    results = {stored.cell["name"]: stored.results for stored in store.stored()}
    frame["model_id"] = [_model_id(results[cell]) for cell in frame["cell"]]
    frame["asked"] = [_asked(results[cell], task) for cell, task in zip(frame["cell"], frame["task"], strict=True)]
    configs = {task: config for found in results.values() for task, config in found.get("configs", {}).items()}
    stated = _evaluated_languages(frame["task"].unique(), configs, {**(plan.get("evaluated") or {}), **evaluated})
    cells, scores = _from_frame(frame, facts, stated)
    items, samples, rule = {}, Samples(), store.rule()
    for row in cells.itertuples():
        logged = store.samples(row.cell)
        split = store.read(row.cell.rsplit("--", 1)[-1]).facts.get("split") or rule
        items[row.cell] = items_of(logged, split)
        if pd.isna(row.control):
            _keep_outputs(samples, row.cell, (row.task, row.target), logged, max_samples)
    noted = {cell: _notes_of(found, _tasks_of(found)) for cell, found in results.items() if cell in items}
    facts.notes += dict.fromkeys(note for notes in noted.values() for note in notes)
    facts.plan = yaml.safe_dump(_without_defaults(plan), sort_keys=False, allow_unicode=True) if plan else ""
    facts.neurons = str(plan.get("neurons", ""))
    facts.config = _steered_config(results.values())
    facts.choices = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((path / "then").glob("*.json"))]
    return Sweep(cells, scores, items, store.timings(), store.missing(), samples, facts)


def _steered_config(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """lm-eval's `config` of the first steered run."""
    configs = (dict(found.get("config", {})) for found in results)
    return next((config for config in configs if _is_steered(config.get("steering") or {})), {})


def _is_steered(steering: Mapping[str, Any]) -> bool:
    """Whether `config.steering` names an intervention: steps on neurons, or an instruction in the prompts."""
    intervention = steering.get("intervention") or {}
    return bool(intervention.get("steps") or (intervention.get("prompt") or {}).get("instruction"))


def _without_defaults(plan: Any) -> Any:
    """A plan without the values that are defaults."""
    if isinstance(plan, Mapping):
        kept = {key: _without_defaults(value) for key, value in plan.items() if key != "slurm"}
        return {key: value for key, value in kept.items() if value not in (None, {}, [], False)}
    return [_without_defaults(part) for part in plan] if isinstance(plan, list) else plan


# --- From result files of lm-eval

_MODEL_PARTS = ("peft", "delta", "gguf_file", "subfolder")  # that make another model of the same checkpoint


def _read_lm_eval(path: Path, files: Sequence[Path], max_samples: int, evaluated: Mapping[str, str]) -> Sweep:
    """One cell per task and result file: a baseline if the model was not steered.

    Of several files with the same task, intervention and model the newest is taken.
    """
    import pandas as pd

    results = {file: _load_results(file) for file in files}
    facts = Facts(title=path.resolve().stem if path.suffix == ".json" else path.resolve().name, sources=[str(path)])
    facts.versions = versions()
    facts.config = _steered_config(results.values())
    newest: dict[tuple[str, ...], tuple[Path, str]] = {}
    replaced = 0
    for file in sorted(files, key=lambda file: (float(results[file].get("date") or 0), file.name)):
        for task in _tasks_of(results[file]):
            steering = _steering_of(results[file])
            key = (task, _model_id(results[file]), str(steering.get("fingerprint", "")), _asked(results[file], task))
            replaced += key in newest
            newest[key] = (file, task)
    if replaced:
        facts.notes.append(f"{replaced} older results of the same task, model and intervention are left out.")
    rows = [row for file, task in newest.values() for row in _lm_eval_rows(path, file, results[file], task)]
    if not rows:
        raise ReportError(f"{path}: lm-eval's results hold no score of a task")
    configs = {task: config for file in files for task, config in results[file].get("configs", {}).items()}
    frame = pd.DataFrame(rows)
    stated = _evaluated_languages(frame["task"].unique(), configs, evaluated)
    cells, scores = _from_frame(frame, facts, stated)
    items, samples = {}, Samples()
    names = {_cell_name(path, file, task): (file, task) for file, task in newest.values()}
    for row in cells.itertuples():
        file, task = names[row.cell]
        logged = _load_samples(file, task)
        if logged:
            items[row.cell] = items_of(logged)
            _keep_outputs(samples, row.cell, (row.task, row.target), logged, max_samples)
    for file in dict.fromkeys(file for file, _ in newest.values()):
        facts.notes += _notes_of(results[file], _tasks_of(results[file]))
    if not items:
        facts.notes.append(
            f"{path} has no samples (run lm_eval with --log_samples): its scores cannot be paired by item."
        )
    return Sweep(cells, scores, items, pd.DataFrame(), pd.DataFrame(columns=["cell"]), samples, facts)


def _load_results(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{file}: not a results file of lm-eval ({error})") from None
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise ReportError(f"{file}: not a results file of lm-eval (no key 'results')")
    return results


def _load_samples(file: Path, task: str) -> list[dict[str, Any]]:
    date = file.stem.removeprefix("results_")
    logged = file.parent / f"samples_{task}_{date}.jsonl"
    if not logged.is_file():
        return []
    return list(read_json_lines(logged, ReportError))


def _tasks_of(results: Mapping[str, Any]) -> list[str]:
    """Tasks with scores; groups are left out."""
    return [task for task in results["results"] if task in results.get("configs", results["results"])]


def _steering_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """`config.steering`, empty for an unsteered run of any engine."""
    steering = (results.get("config") or {}).get("steering") or {}
    return steering if _is_steered(steering) else {}


def _notes_of(results: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """What the results say of their prompts: a template that dropped an instruction, a thought before an option."""
    notes = ((results.get("config") or {}).get("steering") or {}).get("notes") or []
    return [f"{', '.join(tasks)}: {note}." for note in notes]


def _cell_name(path: Path, file: Path, task: str) -> str:
    relative = file.relative_to(path).with_suffix("") if path.is_dir() else Path(file.stem)
    return f"{'-'.join(relative.parts)}--{task}"


def _lm_eval_rows(path: Path, file: Path, results: Mapping[str, Any], task: str) -> Iterator[dict[str, Any]]:
    """Rows as those of `Store.frame()`, one per metric."""
    steering = _steering_of(results)
    steps = steering.get("intervention", {}).get("steps", [])
    last = next((step for step in reversed(steps) if not step["deactivation"]), steps[-1] if steps else {})
    codes = {off: [code for step in steps if step["deactivation"] is off for code in step["languages"]]
             for off in (False, True)}  # fmt: skip
    if prompt := steering.get("intervention", {}).get("prompt"):
        codes[False] = [prompt["language"]]
    arguments = _arguments(results)
    targets = ((results.get("config") or {}).get("steering") or {}).get("target_languages") or []
    identity = {
        "cell": _cell_name(path, file, task), "model": _model_name(results, file), "task": task,
        "languages": "+".join(dict.fromkeys(codes[False])), "deactivated": "+".join(dict.fromkeys(codes[True])),
        "preset": arguments.get("preset"), "factor": last.get("factor"), "control": None,
        "target": "+".join(targets) if steering else "", "items": "all", "stage": 1, "planned": True,
        "fingerprint": steering.get("fingerprint", ""), "signature": steering.get("signature", "none"),
        "model_id": _model_id(results), "asked": _asked(results, task),
    }  # fmt: skip
    n = ((results.get("n-samples") or {}).get(task) or {}).get("effective") or 0
    better = (results.get("higher_is_better") or {}).get(task) or {}
    for key, value in results["results"][task].items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        yield identity | {
            "metric": metric, "filter": filter_, "n": int(n), "higher_is_better": better.get(metric),
            "value": float(value) if isinstance(value, int | float) else None,
            "text": value if isinstance(value, str) else None,
        }  # fmt: skip


def _arguments(results: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's model arguments, which are a mapping or `name=value,name=value`."""
    given = (results.get("config") or {}).get("model_args") or {}
    if isinstance(given, str):
        return dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    return dict(given)


def _model_name(results: Mapping[str, Any], file: Path) -> str:
    arguments = _arguments(results)
    return str(results.get("model_name") or arguments.get("pretrained") or file.stem)


def _model_id(results: Mapping[str, Any]) -> str:
    """Name, revision, commit and adapters of the model that was evaluated, as JSON; empty where it is not stated."""
    arguments, config = _arguments(results), results.get("config") or {}
    name = arguments.get("pretrained") or arguments.get("model") or results.get("model_name")
    if not name:
        return ""
    parts = {key: str(arguments[key]) for key in _MODEL_PARTS if arguments.get(key)}
    revision = arguments.get("revision") or config.get("model_revision") or "main"
    return json.dumps({"name": str(name).rstrip("/"), "revision": str(revision), "sha": config.get("model_sha") or "",
                       "parts": parts})  # fmt: skip


def _asked(results: Mapping[str, Any], task: str) -> str:
    """Settings that decide prompts and answers, as JSON: few-shot examples, template, system text, decoding."""
    config = (results.get("configs") or {}).get(task) or {}
    steering = (results.get("config") or {}).get("steering") or {}
    known = {
        "number of few-shot examples": (results.get("n-shot") or {}).get(task),
        "few-shot": steering.get("few_shot") if (results.get("n-shot") or {}).get(task) else None,
        "chat template (SHA-256)": results.get("chat_template_sha"),
        "system instruction (SHA-256)": results.get("system_instruction_sha"),
        "generation arguments": config.get("generation_kwargs"),
    }
    whole = {key: value for key, value in known.items() if value is not None}
    # A template or a system text that only one side has is a difference, so its absence is kept too.
    if "chat_template_sha" in results:
        whole["chat template (SHA-256)"] = results["chat_template_sha"] or ""
    if "system_instruction_sha" in results:
        whole["system instruction (SHA-256)"] = results["system_instruction_sha"] or ""
    return json.dumps(whole, sort_keys=True) if whole else ""


def add_baseline(sweep: Sweep, path: Path, max_samples: int = MAX_SAMPLES) -> None:
    """Add the tasks of an unsteered lm-eval run as baselines of the tasks that have none.

    Raises:
        ReportError: if the run is steered, or has none of the tasks.
    """
    import pandas as pd

    plain = read_results(path, max_samples)
    steered = plain.cells[~plain.cells["is_baseline"]]
    if len(steered):
        raise ReportError(
            f"--baseline {path}: steered ({steered['signature'].iloc[0]}); a baseline is a run without an intervention"
        )
    present = set(sweep.cells.loc[sweep.cells["is_baseline"], "task"])
    added = plain.cells[plain.cells["task"].isin(set(sweep.cells["task"]) - present)]
    if added.empty:
        shared = sorted(set(plain.cells["task"]) & present)
        why = f"{', '.join(shared)} have baselines already" if shared else "it has none of these tasks"
        raise ReportError(f"--baseline {path}: nothing to add, {why}")
    names = {cell: f"baseline: {cell}" for cell in added["cell"]}  # files of one date have cells of one name
    scores = plain.scores[plain.scores["cell"].isin(names)]
    sweep.cells = pd.concat([sweep.cells, added.assign(cell=added["cell"].map(names))], ignore_index=True)
    sweep.scores = pd.concat([sweep.scores, scores.assign(cell=scores["cell"].map(names))], ignore_index=True)
    sweep.items |= {names[cell]: items for cell, items in plain.items.items() if cell in names}
    sweep.samples.outputs |= {names[cell]: kept for cell, kept in plain.samples.outputs.items() if cell in names}
    sweep.facts.sources += plain.facts.sources
    sweep.facts.notes = [note for note in sweep.facts.notes if "no finished baseline" not in note] + plain.facts.notes
    sweep.facts.notes.append(f"Baselines of {', '.join(added['task'])} are from {path}.")
    _link_baselines(sweep.cells, sweep.scores, sweep.facts)


# --- Cells, scores and items


def _evaluated_languages(tasks: Sequence[str], configs: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Task -> language of its items, empty where unknown: its metadata first, then its name, then what the user says.

    Raises:
        SteeringError: if two of them disagree, or the user names a task that is not here.
    """
    if unknown := [task for task in given if task not in tasks]:
        raise ReportError(f"--evaluated {unknown[0]}=...: no such task here; tasks: {', '.join(sorted(tasks))}")
    languages = {}
    for task in tasks:
        stated = ((configs.get(task) or {}).get("metadata") or {}).get(EVALUATED_LANGUAGE)
        codes = stated if isinstance(stated, list) else str(stated).split("+") if stated else []
        if len(codes) == 1:
            languages[task] = normalise(str(codes[0]))
            if task in given and not same_language(normalise(given[task]), languages[task]):
                raise ReportError(f"--evaluated {task}={given[task]}: the task's metadata say {languages[task]}")
        else:
            languages[task] = "" if codes else evaluated_language(task, given) or ""
    return languages


def _from_frame(frame: pd.DataFrame, facts: Facts, evaluated: Mapping[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and scores from `Store.frame()`; what was left out is noted.

    Raises:
        ReportError: if the cells are of several models.
    """
    if frame["planned"].any() and not frame["planned"].all():
        unplanned = frame.loc[~frame["planned"].astype(bool), "cell"].nunique()
        facts.notes.append(f"{unplanned} finished cells are not in the last plan and are left out.")
        frame = frame[frame["planned"].astype(bool)]
    frame = frame[frame["stage"] != 0]  # evaluations on the way to factors of equal damage
    models = sorted(frame["model"].astype(str).unique())
    if len(models) > 1:
        named = ", ".join(models)
        raise ReportError(f"cells of {len(models)} models ({named}): name the results of one, or compare two")
    scores = frame.assign(
        metric=[naming.metric_label(*pair) for pair in zip(frame["metric"], frame["filter"].fillna(""), strict=True)]
    )
    cells = _cells_of(frame.drop_duplicates("cell"), evaluated)
    _link_baselines(cells, scores, facts)
    return cells, scores.reindex(columns=list(SCORE_COLUMNS)).reset_index(drop=True)


def _cells_of(rows: pd.DataFrame, evaluated: Mapping[str, str]) -> pd.DataFrame:
    """CELL_COLUMNS from `Store.frame()` with one row per cell."""
    import pandas as pd

    rows = rows.reset_index(drop=True)
    languages, off = rows["languages"].fillna("").astype(str), rows["deactivated"].fillna("").astype(str)
    family = naming.families(sorted(rows["task"].astype(str).unique()))
    presets = [None if pd.isna(preset) else str(preset) for preset in rows["preset"]]
    asked = list(zip(rows["signature"].astype(str), presets, naming.silenced(list(languages), list(off)), strict=True))
    kinds = {one: naming.kind_of(*one) for one in set(asked)}
    # An intervention that only silences is about the languages that it silences.
    cells = rows.assign(steered=languages.where(languages != "", off), kind=[kinds[one] for one in asked])
    cells["deactivation"] = (languages == "") & (off != "")
    cells["family"] = cells["task"].map(family)
    cells["evaluated"] = cells["task"].map(dict(evaluated))
    relations = {
        pair: naming.relation_of(*pair) for pair in set(zip(cells["steered"], cells["evaluated"], strict=True))
    }
    cells["relation"] = [relations[pair] for pair in zip(cells["steered"], cells["evaluated"], strict=True)]
    cells["is_baseline"] = cells["steered"] == ""
    for name in ("target", "model_id", "asked", "damage_asked"):
        cells[name] = cells[name].fillna("").astype(str) if name in cells else ""
    cells["items"] = cells["items"].fillna("all")
    cells["factor"] = cells["factor"].astype(float)
    cells["control"] = cells["control"].astype("Int64")
    cells["damage_reached"] = cells.get("damage_reached", pd.Series(dtype=float)).astype(float)
    return cells.reindex(columns=list(CELL_COLUMNS))


def _link_baselines(cells: pd.DataFrame, scores: pd.DataFrame, facts: Facts) -> None:
    """Set `baseline_cell`: same task and items; made for the same target where the task is another for each."""
    baselines = {(row.task, row.items, row.target): row.cell for row in cells[cells["is_baseline"]].itertuples()}
    cells["baseline_cell"] = [
        "" if row.is_baseline
        else baselines.get((row.task, row.items, row.target)) or baselines.get((row.task, row.items, ""), "")
        for row in cells.itertuples()
    ]  # fmt: skip
    # LSS compares with the unsteered model in itself and has none.
    compared = scores.loc[[not naming.is_lss(metric) for metric in scores["metric"]], "cell"]
    alone = int(((cells["baseline_cell"] == "") & ~cells["is_baseline"] & cells["cell"].isin(set(compared))).sum())
    if alone:
        facts.notes.append(f"{alone} steered cells have no finished baseline: their differences are left blank.")


_NO_METRICS = frozenset(
    ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash",
     "target_hash")
)  # fmt: skip


def items_of(samples: Sequence[Mapping[str, Any]], split: Mapping[str, Any] | None = None) -> Items:
    """Items of one cell from lm-eval's samples; shares that can be seen from the outputs are added.

    Args:
        samples: of lm-eval.
        split: how a sweep halved the items (seed, item), None where it did not; a task whose documents name no source
            item is not halved.
    """
    docs = sorted({int(sample["doc_id"]) for sample in samples})
    row_of = {doc: number for number, doc in enumerate(docs)}
    columns: dict[str, list[Any]] = {}
    texts: dict[str, list[str | None]] = {}
    documents, prompts = np.zeros(len(docs), dtype=np.uint64), np.zeros(len(docs), dtype=np.uint64)
    reported = np.zeros(len(docs), dtype=bool)
    for sample in samples:
        row = row_of[int(sample["doc_id"])]
        documents[row] = int(str(sample.get("doc_hash") or "0")[:16], 16)
        prompts[row] = _prompt_digest(sample)
        item = item_of(sample["doc"], sample["doc_id"], split["item"]) if split else None
        if split and item is not None:
            reported[row] = half_of(item, split["seed"]) == REPORT
        else:
            split = None
        filter_ = str(sample.get("filter", ""))
        if LABELS in (found := _values_of(sample)):
            texts.setdefault(naming.metric_label(REPEATED, filter_), [None] * len(docs))[row] = text_of(sample)
        for metric, value in found.items():
            columns.setdefault(naming.metric_label(metric, filter_), [None] * len(docs))[row] = value
    values = {metric: _as_array(column) for metric, column in columns.items()}
    values |= {metric: repeated(outputs) for metric, outputs in texts.items()}
    add_clean(values)
    return Items(
        np.array(docs, dtype=np.int64), values, reported if split else None,
        documents if documents.any() else None, prompts if prompts.any() else None,
    )  # fmt: skip


def _texts_asked(sample: Mapping[str, Any]) -> list[str]:
    """Prompts and continuations of a sample, in the order of its requests; decoding settings are no text."""
    parts = [list(request.values()) if isinstance(request, Mapping) else request for request in _requests(sample)]
    return [text for request in parts for text in request if isinstance(text, str)]


def _requests(sample: Mapping[str, Any]) -> list[Any]:
    """The arguments of each request of a sample, which lm-eval logs by name or as a list."""
    arguments = sample.get("arguments") or {}
    return list(arguments.values()) if isinstance(arguments, Mapping) else list(arguments)


def _prompt_digest(sample: Mapping[str, Any]) -> int:
    """64 bits over what was asked; 0 where the sample does not hold it."""
    texts = _texts_asked(sample)
    if not texts:
        return int(str(sample.get("prompt_hash") or "0")[:16], 16)
    return int(hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16], 16)


def _values_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Metric -> value of one sample, with `lang_unknown` and `degenerate` of generated text where it has none."""
    names = sample["metrics"] if "metrics" in sample else [name for name in sample if name not in _NO_METRICS]
    values = {metric: sample.get(metric) for metric in names}
    if LABELS in values:
        values.setdefault(LANG_UNKNOWN, float(values[LABELS] == UNKNOWN))
        text = text_of(sample)
        if text is not None:
            values.setdefault(DEGENERATE, float(degenerate(text)))
    return values


def repeated(outputs: Iterable[str | None]) -> NDArray[np.float64]:
    """(item,) 1 where an output is that of an earlier item, blanks and case aside: text that ignores its prompt.

    Nan where there is no output.
    """
    seen: set[str] = set()
    flags = []
    for output in outputs:
        text = None if output is None else " ".join(output.casefold().split())
        flags.append(np.nan if text is None else float(text in seen))
        seen |= {text} if text else set()  # an empty output is degenerate, and repeats nothing
    return np.array(flags)


def add_clean(values: dict[str, NDArray[Any]]) -> None:
    """Add `lfs_clean` (in the target language and not degenerate) where its two parts are there and it is not."""
    for name in [name for name in values if name.partition("@")[0] == FORCED]:
        clean, garbage = (name.replace(FORCED, other, 1) for other in (CLEAN, DEGENERATE))
        if clean not in values and garbage in values:
            values[clean] = values[name] * (1.0 - values[garbage])


def forced(items: Items, metric: str, steered: str) -> NDArray[np.float64] | None:
    """`lfs` or `lfs_clean` of a cell for a steered language, counted from the stored labels; nan where there is none.

    `unknown` is in no language. None where the cell has no labels, or for `lfs_clean` no degenerate flags.
    """
    name = metric.partition("@")[0]
    labels = items.values.get(metric.replace(name, LABELS, 1))
    if labels is None:
        return None
    hits = {
        label: float(any(in_language(label, code) for code in steered.split("+")))
        for label in {label for label in labels if label is not None}
    }
    shares = np.array([hits.get(label, np.nan) for label in labels], dtype=np.float64)
    if name == FORCED:
        return shares
    garbage = items.values.get(metric.replace(name, DEGENERATE, 1))
    return None if garbage is None else shares * (1.0 - garbage)


def text_of(sample: Mapping[str, Any]) -> str | None:
    """The generated text; None for log-likelihoods, which lm-eval logs as text too."""
    first: Any = next(iter(_requests(sample)), {})
    decoding = first.get("arg_1") if isinstance(first, Mapping) else first[1] if len(first) > 1 else None
    if not isinstance(decoding, Mapping) and LABELS not in sample:
        return None
    response = _first_response(sample["filtered_resps"])
    return response if isinstance(response, str) else None


def _first_response(responses: Any) -> Any:
    """The first response of an item, which lm-eval logs inside lists."""
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return responses


def _as_array(column: Sequence[Any]) -> NDArray[Any]:
    """Numbers as (items,), pairs of numbers as (items, 2), everything else as objects."""
    first = next((value for value in column if value is not None), None)
    blank = [np.nan] * _PAIR if isinstance(first, list | tuple) else np.nan
    try:
        numbers = np.array([blank if value is None else value for value in column])
    except ValueError:  # of several lengths
        numbers = np.empty(0, dtype=object)
    if numbers.dtype.kind in "biuf" and (numbers.ndim == 1 or numbers.shape[1:] == (_PAIR,)):
        return numbers.astype(np.float64)
    objects = np.empty(len(column), dtype=object)
    objects[:] = [tuple(value) if isinstance(value, list) else value for value in column]
    return objects


def _keep_outputs(
    samples: Samples, cell: str, prompts_of: tuple[str, str], logged: Sequence[Mapping[str, Any]], limit: int
) -> None:
    """Keep a cell's generated text for the explorer, up to the limit."""
    outputs: dict[int, ItemOutput] = {}
    kept = limit - samples.count
    for sample in logged:
        text, doc = text_of(sample), int(sample["doc_id"])
        if text is None or doc in outputs:  # a second filter reads the same output
            continue
        if len(outputs) >= kept:
            samples.left_out += 1
            continue
        outputs[doc] = ItemOutput(doc, text, str(sample.get(LABELS) or ""))
        samples.prompts.setdefault(prompts_of, {}).setdefault(doc, next(iter(_texts_asked(sample)), ""))
    if outputs:
        samples.outputs[cell] = list(outputs.values())


# --- From merged tables (`lm-eval-steering merge --items`), for sweeps of thousands of cells
#
# `metrics.parquet` holds cells and scores, `items.parquet` (optional) the items. Items are read in batches, and each
# distinct JSON text of values is parsed once: millions of rows of a 0/1 metric have two such texts.

_BATCH = 1 << 20
_COLUMNS = ["cell", "doc_id", "half", "filter", "metrics"]
Part = tuple[NDArray[np.int64], NDArray[Any] | None, dict[str, NDArray[Any]]]


def _read_merged(folder: Path, max_samples: int, evaluated: Mapping[str, str]) -> Sweep:
    import pandas as pd

    path = folder / "metrics.parquet"
    frame = pd.read_parquet(path)
    if frame.empty:
        raise ReportError(f"{path}: it holds no cell")
    facts = Facts(title=folder.resolve().name, sources=[str(folder)], versions=versions())
    cells, scores = _from_frame(frame, facts, _evaluated_languages(frame["task"].unique(), {}, evaluated))
    items: dict[str, Items] = {}
    samples = Samples()
    if (folder / "items.parquet").is_file():
        items = _read_items(folder / "items.parquet", set(cells["cell"]))
        samples = _outputs(folder / "items.parquet", cells, items, max_samples)
    else:
        facts.notes.append("There is no items.parquet (merge --items): scores have no intervals and no tests.")
    timings = pd.read_parquet(folder / "timings.parquet") if (folder / "timings.parquet").is_file() else pd.DataFrame()
    missing = pd.DataFrame(columns=["cell", "task", "stage", "status", "why"])
    return Sweep(cells, scores, items, timings, missing, samples, facts)


def _read_items(path: Path, cells: set[str]) -> dict[str, Items]:
    """Items of these cells of `items.parquet`, whose rows are sorted by cell."""
    parts: dict[str, dict[str, list[Part]]] = {}
    for cell, filter_, part in _parts(path):
        if cell in cells:
            parts.setdefault(cell, {}).setdefault(filter_, []).append(part)
    return {cell: _joined(by_filter) for cell, by_filter in parts.items()}


def _parts(path: Path) -> Iterator[tuple[str, str, Part]]:
    """(cell, filter, part) of consecutive rows of one cell, with their values by metric."""
    file = pq.ParquetFile(path, read_dictionary=["cell", "filter", "half", "metrics"])
    for batch in file.iter_batches(batch_size=_BATCH, columns=_COLUMNS):
        cells, filters, halves = (_encoded(batch.column(name)) for name in ("cell", "filter", "half"))
        docs = np.asarray(batch.column("doc_id").cast(pa.int64()))
        texts, codes = _encoded(batch.column("metrics"))
        values = _by_metric(texts)
        present = {metric: _present(column) for metric, column in values.items()}
        starts = np.flatnonzero(np.diff(cells[1], prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(docs)], strict=True):
            for code in np.unique(filters[1][start:end]):
                rows = start + np.flatnonzero(filters[1][start:end] == code)
                part = codes[rows]
                kept = {metric: column[part] for metric, column in values.items() if present[metric][part].any()}
                in_reported = [number for number, half in enumerate(halves[0]) if half == REPORT]
                reported = None if not halves[0] else np.isin(halves[1][rows], in_reported)
                yield cells[0][cells[1][start]], filters[0][code] if code >= 0 else "", (docs[rows], reported, kept)


def _encoded(column: Any) -> tuple[list[str], NDArray[np.int64]]:
    """(distinct texts, index of each row's text among them; -1 for null)."""
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column.cast(pa.string()))
    codes = np.asarray(pc.fill_null(column.indices.cast(pa.int64()), -1))
    return column.dictionary.to_pylist(), codes


def _by_metric(texts: list[str]) -> dict[str, NDArray[Any]]:
    """Metric -> value in each distinct text."""
    parsed: list[dict[str, Any]] = json.loads(f"[{','.join(texts)}]")
    names = dict.fromkeys(name for values in parsed for name in values)
    return {name: _as_array([values.get(name) for values in parsed]) for name in names}


def _present(column: NDArray[Any]) -> NDArray[np.bool_]:
    """(texts,) whether a text has a value."""
    if column.dtype == object:
        return np.array([value is not None for value in column], dtype=bool)
    return ~np.isnan(column).reshape(len(column), -1).all(axis=1)


def _joined(filters: dict[str, list[Part]]) -> Items:
    """The items of one cell from its parts; its filters share the documents."""
    values: dict[str, NDArray[Any]] = {}
    docs = reported = None
    for filter_, parts in filters.items():
        numbers = np.concatenate([part[0] for part in parts]) if len(parts) > 1 else parts[0][0]
        order = None if (np.diff(numbers) > 0).all() else np.argsort(numbers, kind="stable")
        columns = _concatenated(parts)
        if order is not None:
            numbers, columns = numbers[order], {name: column[order] for name, column in columns.items()}
        values |= {naming.metric_label(name, filter_): column for name, column in columns.items()}
        if docs is None:
            docs = numbers
            halves = [part[1] for part in parts if part[1] is not None]
            if len(halves) == len(parts):
                whole = np.concatenate(halves)
                reported = whole if order is None else whole[order]
    assert docs is not None
    if LABELS in values and LANG_UNKNOWN not in values:
        values[LANG_UNKNOWN] = (values[LABELS] == UNKNOWN).astype(np.float64)
    return Items(docs, values, reported)


def _concatenated(parts: list[Part]) -> dict[str, NDArray[Any]]:
    names = dict.fromkeys(name for part in parts for name in part[2])
    concatenated = {}
    for name in names:
        columns = [part[2].get(name) for part in parts]
        like = next(column for column in columns if column is not None)
        filled = [
            np.full((len(part[0]), *like.shape[1:]), None if like.dtype == object else np.nan, dtype=like.dtype)
            if column is None else column
            for part, column in zip(parts, columns, strict=True)
        ]  # fmt: skip
        concatenated[name] = np.concatenate(filled) if len(filled) > 1 else filled[0]
    return concatenated


def _outputs(path: Path, cells: pd.DataFrame, items: dict[str, Items], limit: int) -> Samples:
    """Generated text of the first cells up to the limit; merged tables hold no prompts.

    Adds `degenerate` and `lfs_clean` to the items of every cell with identified outputs whose task did not score them.
    """
    samples = Samples()
    generated = {cell for cell in cells["cell"] if cell in items and LABELS in items[cell].values}
    if not generated:
        return samples
    shown = cells[cells["control"].isna()].set_index("cell")[["task", "target"]]
    texts: dict[str, dict[int, str]] = {}
    for batch in pq.ParquetFile(path).iter_batches(columns=["cell", "doc_id", "response"]):
        wanted = batch.filter(pc.is_in(batch.column("cell").cast(pa.string()), pa.array(sorted(generated))))
        for row in wanted.to_pylist():
            text = str(_first_response(json.loads(row["response"])))
            texts.setdefault(row["cell"], {}).setdefault(row["doc_id"], text)
    for cell, outputs in texts.items():
        values = items[cell].values
        if DEGENERATE not in values:
            values[DEGENERATE] = np.array([float(degenerate(outputs[doc])) for doc in items[cell].docs.tolist()])
        values[REPEATED] = repeated(outputs[doc] for doc in items[cell].docs.tolist())
        add_clean(values)
        if cell not in shown.index:
            continue
        if samples.count + len(outputs) > limit:
            samples.left_out += len(outputs)
            continue
        labels = dict(zip(items[cell].docs.tolist(), values[LABELS], strict=True))
        samples.outputs[cell] = [ItemOutput(doc, text, str(labels.get(doc) or "")) for doc, text in outputs.items()]
        prompts = samples.prompts.setdefault(tuple(shown.loc[cell]), {})
        prompts |= {doc: f"document {doc} (merged tables hold no prompts)" for doc in outputs}
    return samples
