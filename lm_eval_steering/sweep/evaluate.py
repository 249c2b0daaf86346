"""One cell: lm-eval's own evaluation on a loaded model, and its files, put in place by one rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.compat import release_requests
from lm_eval_steering.lmeval.fewshot import SEED, draw_per_document
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.sweep.cells import Cell, Grid, engine_arguments, options_of
from lm_eval_steering.sweep.halves import REPORT
from lm_eval_steering.sweep.store import FORMAT_VERSION, as_json, cell_versions
from lm_eval_steering.sweep.sweep_model import SweepLM


class StorageFullError(SteeringError):
    """A finished cell that could not be written: no other one could be either."""


def evaluate(lm: SweepLM, grid: Grid, cell: Cell, neuron_set: NeuronSet) -> dict[str, Any] | None:
    """lm-eval's results of one cell, samples included; None on processes other than the first.

    Args:
        lm: the loaded model.
        grid: of the cell.
        cell: what to evaluate.
        neuron_set: the plan's, or the control's instead of it; an instruction needs none.
    """
    from lm_eval import simple_evaluate

    planned, plan = cell.intervention, grid.plan
    if planned.is_baseline:
        lm.intervene(None, target_language=cell.target)
    else:
        lm.intervene(
            None if planned.is_prompt else neuron_set,
            target_language=cell.target,
            allow_empty=plan.allow_empty,
            force=plan.force,
            **planned.arguments,
        )
    task = grid.book.task(cell.task, cell.target)
    release_requests(task)  # an earlier cell's answers are none of this one
    manager = grid.book.manager(cell.task, cell.target)
    positions = grid.positions(cell.task, cell.target, cell.items)
    options = {key: value for key, value in options_of(plan, cell.stage).items() if key != "metadata"}
    if positions is not None:
        options["limit"] = None  # lm-eval takes one of the two
    draw_per_document(task, positions, options["limit"], lm.rank, lm.world_size)
    results: dict[str, Any] | None
    with lm.together():
        results = simple_evaluate(
            model=lm, tasks=[task], task_manager=manager, log_samples=True,
            samples=None if positions is None else {cell.task: positions}, fewshot_random_seed=SEED, **options,
        )  # fmt: skip
    return results


def store_cell(folder: Path, lm: SweepLM, grid: Grid, cell: Cell, evaluation: Mapping[str, Any]) -> None:
    """Put an evaluated cell into the store, as `put_cell` does."""
    results, samples = dict(evaluation), list(evaluation["samples"][cell.task])
    del results["samples"]
    facts = facts_of(lm, grid, cell, results, samples)
    date = datetime.now().isoformat().replace(":", "-")
    texts = {
        f"samples_{cell.task}_{date}.jsonl": "".join(_lines(samples)),
        f"results_{date}.json": _results_text(lm, grid, cell, results, samples),
    }
    put_cell(folder, cell, texts, facts)


def put_cell(folder: Path, cell: Cell, texts: Mapping[str, str], facts: dict[str, Any]) -> None:
    """Write a cell's files into a temporary folder and rename it: a reader sees all of them or none.

    Raises:
        StorageFullError: if they cannot be written; nothing half written stays.
    """
    facts["files"] = {
        name: {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in texts.items()
    }
    partial = folder / f".{cell.key[:10]}.{os.getpid()}.partial"
    try:
        for left in folder.glob(f".{cell.key[:10]}.*.partial"):  # by a process that was killed: the lock is ours now
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in [*texts.items(), ("cell.json", as_json(facts))]:
            _write(partial / name, text)
        if not any(folder.glob(f"*--{cell.key[:10]}")):
            partial.rename(folder / cell.name)
            _sync(folder)
    except OSError as error:
        raise StorageFullError(
            f"{cell.name} is evaluated and cannot be stored: {error.strerror or error} ({folder}, "
            f"{_free(folder)} free); what was finished before is whole: free some space and run the same command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Scored(Protocol):
    """What says under which intervention scores were made."""

    @property
    def fingerprint(self) -> str:
        """Hash over everything that decides them."""

    @property
    def signature(self) -> str:
        """Its readable form."""


def facts_of(
    lm: Scored, grid: Grid, cell: Cell, results: Mapping[str, Any], samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `cell.json` holds besides the files: nothing in it depends on when or where the cell was evaluated."""
    scores, plan = results["results"][cell.task], grid.plan
    metrics = {key: scores[key] for key in scores if "," in key and "_stderr," not in key}
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "cell": cell.describe(),
        "model": grid.model["name"],
        "engine": plan.engine.name,
        "fingerprint": lm.fingerprint,
        "signature": lm.signature,
        "versions": cell_versions(),
        "prompts": prompts_digest(samples),
        "metrics": metrics,
        "higher_is_better": results["higher_is_better"].get(cell.task, {}),
        "n": Counter(f"{metric},{sample['filter']}" for sample in samples for metric in sample["metrics"]),
    }
    if cell.items == REPORT and plan.choose is not None:
        facts["split"] = {"seed": plan.choose.seed, "item": plan.choose.item}
    return facts


def prompts_digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """Hash over every prompt that was sent, few-shot examples and template included, in the order of the documents."""
    prompts = [sample["prompt_hash"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return fingerprint({"prompts": prompts})


def _results_text(lm: SweepLM, grid: Grid, cell: Cell, results: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """As lm-eval's EvaluationTracker writes them, which would hide that a disk is full."""
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
    from lm_eval.utils import handle_non_serializable, hash_string

    engine = grid.plan.engine.name
    arguments = {**engine_arguments(grid), **_neurons(lm, grid, cell), **cell.intervention.arguments}
    if cell.target and cell.target != arguments.get("language"):
        arguments["target_language"] = cell.target
    results["config"] |= {"model": engine, "model_args": arguments, "batch_size": str(lm.batch_size)}
    results["config"]["sweep_cell"] = cell.describe()
    tracker = GeneralConfigTracker()
    tracker.log_experiment_args(
        engine,
        {"pretrained": grid.model["name"]},
        grid.plan.system_instruction,
        lm.chat_template(grid.plan.apply_chat_template) or "",
        fewshot_as_multiturn=True,
    )
    tracker.log_end_time()
    hashes = [sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples]
    whole = results | {"task_hashes": {cell.task: hash_string("".join(hashes))}} | asdict(tracker)
    return json.dumps(whole, indent=2, default=handle_non_serializable, ensure_ascii=False)


def _neurons(lm: SweepLM, grid: Grid, cell: Cell) -> dict[str, Any]:
    """Model arguments that say which neurons; of a control its seed and its hash, as it is no set that has a name."""
    plan, control = grid.plan, cell.intervention.control
    if cell.intervention.is_baseline or cell.intervention.is_prompt:
        return {}
    arguments: dict[str, Any] = {"neurons": plan.neurons}
    if control is not None and lm.neuron_set is not None:
        arguments["neurons"] = f"random{control}:{lm.neuron_set.content_hash()[:8]}"
    return arguments | {name: True for name in ("allow_empty", "force") if getattr(plan, name)}


def _lines(samples: list[dict[str, Any]]) -> Iterator[str]:
    """As lm-eval's EvaluationTracker writes them."""
    from lm_eval.utils import handle_non_serializable, sanitize_list

    for sample in samples:
        arguments = {
            f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(request)}
            for i, request in enumerate(sample["arguments"])
        }
        plain = sample | {
            "resps": sanitize_list(sample["resps"]),
            "filtered_resps": sanitize_list(sample["filtered_resps"]),
            "arguments": arguments,
            "target": str(sample["target"]),
        }
        yield json.dumps(plain, default=handle_non_serializable, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"
    except OSError:
        return "unknown"
