"""Unsteered answers that are kept over a sweep, in bounded memory."""

from __future__ import annotations

from lm_eval_steering.lmeval.packing import PackedRow, ScoredRequest
from lm_eval_steering.lmeval.scoring import Baseline, digest_of
from lm_eval_steering.metrics.likelihood import NEEDS_UNSTEERED_SCORE
from tests.lmeval.scoring.conftest import FRENCH, instances, loaded, neurons


def batch(*tokens: int) -> bytes:
    row = PackedRow(prompt=1)
    row.add(ScoredRequest(tokens, 1, (1,), 0), 0)
    return digest_of([row])


def test_what_was_not_asked_for_longest_goes() -> None:
    baseline = Baseline(limit=4)
    for token in (1, 2):
        baseline.keep(batch(token), [(0, (float(token), True))] * 2)
    assert baseline.get(batch(1)) == [(0, (1.0, True))] * 2  # now 2 is older
    baseline.keep(batch(3), [(0, (3.0, True))])
    assert baseline.get(batch(2)) is None and baseline.get(batch(1)) and baseline.get(batch(3))
    assert len(baseline) == 3
    baseline.keep(batch(4), [(0, (4.0, True))] * 9)  # more than the limit: the next batch of the pass may need it
    assert len(baseline) == 9 and baseline.get(batch(1)) is None
    baseline.clear()
    assert len(baseline) == 0 and baseline.get(batch(4)) is None


def test_scores_do_not_depend_on_what_was_kept() -> None:
    found = []
    for limit in (1, 1000):
        lm = loaded()
        lm.scorer._baseline = Baseline(limit)
        for value in (2.0, 3.0):
            lm.intervene(neurons(), **(FRENCH | {"value": value}))
            scores = lm.loglikelihood(instances(doc={NEEDS_UNSTEERED_SCORE: True}))
            found.append([score.unsteered for score in scores])
        assert 0 < len(lm.scorer._baseline) <= max(limit, 14)
    assert all(each == found[0] for each in found)
