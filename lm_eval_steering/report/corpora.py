"""Corpus scores (BLEU, chrF++): paired tests by sacreBLEU, and the interval of the difference on the same resamples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm_eval_steering.metrics.paired import Array, interval_of_items, resampling_weights
from lm_eval_steering.metrics.paired_corpora import compare_corpora
from lm_eval_steering.report.data import Sweep, check_same_documents

_TEST = "sacreBLEU paired bootstrap"


def is_corpus_metric(metric: str) -> bool:
    """Whether sacreBLEU computes it over all items together."""
    return metric.partition("@")[0] in ("bleu", "chrf++")


def fresh_metric(metric: str, tokenizer: str, references: Sequence[str]) -> Any:
    """A sacreBLEU metric with its references; a new one each time, because it remembers what it scored."""
    from sacrebleu.metrics import BLEU, CHRF

    cached = [list(references)]
    if metric.startswith("bleu"):
        return BLEU(tokenize=tokenizer, references=cached)
    return CHRF(word_order=2, references=cached)


def rows(
    sweep: Sweep,
    cells: Sequence[dict[str, Any]],
    metric: str,
    scores: dict[str, Any],
    replicates: dict[tuple[str, str], Array],
    columns: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """One row a cell whose items are (tokenizer, reference, hypothesis); those of one baseline are tested together."""
    if not is_corpus_metric(metric):
        return
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        found = sweep.items.get(cell["cell"])
        if found is not None and metric in found.values:
            groups.setdefault(cell["baseline_cell"], []).append(cell)
    for baseline, own in groups.items():
        before = sweep.items.get(baseline)
        if before is None or metric not in before.values:
            continue
        tokenizer, references, first = zip(*before.values[metric], strict=True)
        whole = []
        for cell in own:
            after = sweep.items[cell["cell"]]
            check_same_documents(before, after, cell["task"])
            if np.array_equal(before.docs, after.docs):
                whole.append(cell)
        systems = {cell["cell"]: [item[2] for item in sweep.items[cell["cell"]].values[metric]] for cell in whole}
        tested = compare_corpora(fresh_metric(metric, tokenizer[0], references), first, systems, references)
        drawn = {name: resampled(metric, tokenizer[0], references, texts) for name, texts in systems.items()}
        base = resampled(metric, tokenizer[0], references, first)
        for cell in whole:
            name = cell["cell"]
            replicates[name, metric] = drawn[name] - base
            low, high = interval_of_items(replicates[name, metric][:, None], np.array([len(references)]))
            yield {
                **{column: cell[column] for column in columns if column in cell},
                "metric": metric, "higher_is_better": True, "n": len(references),
                "baseline": tested[name].baseline, "score": tested[name].score,
                "difference": tested[name].score - tested[name].baseline, "low": float(low[0]), "high": float(high[0]),
                "p": tested[name].p_value, "test": _TEST,
            }  # fmt: skip


def resampled(metric: str, tokenizer: str, references: Sequence[str], hypotheses: Sequence[str]) -> Array:
    """(resamples,) the corpus score of each resample, from sacreBLEU's statistics of each segment."""
    scorer = fresh_metric(metric, tokenizer, references)
    statistics = np.array(scorer._extract_corpus_statistics(list(hypotheses), None), dtype=np.float64)
    sums = resampling_weights(len(statistics)) @ statistics
    return np.array([scorer._compute_score_from_stats(row).score for row in sums])
