"""Private names of sacreBLEU that we use: its public API scores a corpus, a bootstrap thousands of its resamples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Name -> the public interface that would replace it.
PRIVATE = {
    "_extract_corpus_statistics": "the statistics of each segment of a corpus, whose sums make its score",
    "_compute_score_from_stats": "the score of such sums",
    "_aggregate_and_compute": "the score of the segments' statistics",
}


def corpus_scores(
    metric: Any, hypotheses: Sequence[str], weights: NDArray[np.float64], references: Sequence[str] | None = None
) -> tuple[float, NDArray[np.float64]]:
    """A corpus's score, and (resamples,) those of its resamples.

    Args:
        metric: `sacrebleu.metrics.BLEU` or `CHRF`.
        hypotheses: one for each segment.
        weights: (resamples, segments), how often each resample holds each segment.
        references: one for each segment; the metric's own by default.
    """
    segments = metric._extract_corpus_statistics(list(hypotheses), None if references is None else [list(references)])
    sums = weights @ np.array(segments, dtype=np.float64)
    replicates = np.array([metric._compute_score_from_stats(row).score for row in sums], dtype=np.float64)
    return float(metric._aggregate_and_compute(segments).score), replicates
