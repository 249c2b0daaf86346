"""A cell of the store made of an engine's answer: its text scored as ours is, with a steering block of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering.lmeval.aggregation import aggregated, values_of
from lm_eval_steering.metrics import pass_rates
from lm_eval_steering.metrics.language_id import DEFAULT, LETTERS, THRESHOLD, LanguageIdentifier
from lm_eval_steering.metrics.output_language import IdentifiedText
from lm_eval_steering.metrics.registered import METRICS
from lm_eval_steering.provenance import fingerprint, versions
from lm_eval_steering.steering.intervention import Intervention
from lm_eval_steering.sweep.cells import Cell, Grid
from lm_eval_steering.sweep.engine_items import prepared
from lm_eval_steering.sweep.engine_results import Answer, Asked
from lm_eval_steering.sweep.evaluate import facts_of, put_cell
from lm_eval_steering.sweep.plan import SweepPlan

_BY_TASK = {
    "results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """Identity of a cell's scores, for `facts_of`."""

    fingerprint: str
    signature: str


def identifier_of(plan: SweepPlan) -> LanguageIdentifier:
    """What identifies the language of finished text, as `steered-hf` would be told."""
    own = plan.model.model_extra or {}
    return LanguageIdentifier.named(
        str(own.get("lid", DEFAULT)),
        float(own.get("lid_threshold", THRESHOLD)),
        int(own.get("lid_letters", LETTERS)),
    )


def rescore(answer: Answer, task: Any, name: str, identifier: LanguageIdentifier, targets: Sequence[str]) -> None:
    """Score generated text again where a metric is about its language, as `steered-hf` would have scored it.

    An engine's text knows neither its language nor what it was steered to. Metrics that come out as the engine's run
    has them keep its numbers, standard errors included.
    """
    if task.OUTPUT_TYPE != "generate_until" or not set(task.aggregation()) & set(METRICS):
        return
    from lm_eval.api.metrics import mean

    before = values_of(answer.samples)
    after: dict[tuple[str, str], list[Any]] = {}  # before they become JSON
    for sample in answer.samples:
        texts = [_identified(found, identifier, targets) for found in sample["filtered_resps"]]
        for metric in sample["metrics"]:
            del sample[metric]
        found = task.process_results(sample["doc"], texts)
        sample.update(_plain(found) | {"metrics": list(found)})
        for metric, value in found.items():
            after.setdefault((metric, sample["filter"]), []).append(value)
    row = answer.results["results"][name]
    for metric, filter_ in before.keys() - after.keys():
        row.pop(f"{metric},{filter_}", None)
        row.pop(f"{metric}_stderr,{filter_}", None)
    for (metric, filter_), values in after.items():
        if before.get((metric, filter_)) != _plain(values):
            row |= aggregated(metric, filter_, task.aggregation().get(metric, mean), values)


def _identified(found: Any, identifier: LanguageIdentifier, targets: Sequence[str]) -> Any:
    if isinstance(found, list):
        return [_identified(each, identifier, targets) for each in found]
    return IdentifiedText.of(found, identifier, targets) if isinstance(found, str) else found


def _plain(found: Any) -> Any:
    """As JSON gives it back."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(found, default=handle_non_serializable))


def store_answer(folder: Path, grid: Grid, cell: Cell, answer: Answer, asked: Asked) -> None:
    """Put a checked answer into the store as an ordinary cell.

    Raises:
        StorageFullError: if it cannot be written; nothing half written stays.
    """
    targets = cell.target.split("+") if cell.target else []
    identifier = identifier_of(grid.plan)
    task = prepared(grid, cell)
    rescore(answer, task, cell.task, identifier, targets)
    report = steering_report(grid, cell, asked, identifier, targets)
    results = {key: found for key, found in answer.results.items() if key not in _BY_TASK | {"groups"}}
    for key in sorted(_BY_TASK):
        results[key] = {cell.task: found} if (found := answer.results.get(key, {}).get(cell.task)) is not None else {}
    results["config"] |= {"steering": report, "sweep_cell": cell.describe()}
    identity = Made(report["fingerprint"], report["signature"])
    facts = facts_of(identity, grid, cell, results, answer.samples)
    date = answer.path.stem.removeprefix("results_")
    samples = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in answer.samples)
    texts = {
        f"samples_{cell.task}_{date}.jsonl": samples,
        f"results_{date}.json": json.dumps(results, indent=2, ensure_ascii=False),
    }
    put_cell(folder, cell, texts, facts)


def steering_report(
    grid: Grid, cell: Cell, asked: Asked, identifier: LanguageIdentifier, targets: Sequence[str]
) -> dict[str, Any]:
    """What was done, and the proof of it: no hooks ran, so the proof is the export's comparison with them."""
    intervention, export = Intervention.model_validate(cell.intervention.resolved), asked.export
    whole = fingerprint(
        {
            "model": grid.model,
            "export": export["fingerprint"] if export else None,
            "intervention": cell.intervention.resolved,
            "identifier": identifier.signature(),
            "targets": list(targets),
        }
    )
    parts = [intervention.signature(), f"lid:{identifier.signature()}", f"fp:{whole[:8]}"]
    if export:
        parts.insert(1, f"neurons:{export['neuron_set']['sha256'][:8]}")
    report: dict[str, Any] = {
        "signature": "|".join([*parts, f"v:{versions()['lm-eval-steering']}"]),
        "fingerprint": whole,
        "intervention": cell.intervention.resolved,
        "lookahead": False,
        "target_languages": list(targets),
        "language_identifier": identifier.signature(),
        "pass_rates": pass_rates.signature(),
        "engine": {"name": grid.plan.engine.name, "arguments": dict(asked.arguments)},
        "versions": versions(),
    }
    if export:
        report["neuron_set"] = dict(export["neuron_set"])
        report["evidence"] = {
            "kind": "export",
            "fingerprint": export["fingerprint"],
            "form": export["form"],
            "verified": asked.verified,
        }
    return report
