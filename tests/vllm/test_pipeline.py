"""Pipeline parallelism: each worker edits its own layers, counted from the model's first.

Compiled, since vLLM 0.32.0 cannot run a pipeline eagerly on CPU: its warm-up, which makes the tensors that pass between
the stages, is left out then.
"""

from __future__ import annotations

from typing import Any

from lm_eval_steering.resources import demo_model
from tests.vllm.conftest import Mode, furthest, generating, rolling, running, scoring
from tests.vllm.test_modes import expected, steer


def test_two_stages_answer_as_steered_hf(vllm: None, record_property: Any) -> None:
    with running("steered", Mode(eager=False, stages=2), str(demo_model())) as lm:
        for name in ("none", "add-product", "layers", "both-sites", "hidden-states", "every-site"):
            steer(lm, name)
            scores, texts, greedy = expected(name)
            found = lm.loglikelihood(scoring(), disable_tqdm=True)
            record_property(name, furthest(found, scores))
            assert furthest(found, scores) < 1e-4
            assert furthest(lm.loglikelihood_rolling(rolling(), disable_tqdm=True), texts) < 1e-4
            assert list(lm.generate_until(generating(), disable_tqdm=True)) == list(greedy)
        evidence = lm.steering.evidence()
        assert [one["layers"] for one in evidence.workers] == ["0-2", "3-5"]
        assert all(one["fewest_tokens"] >= evidence.asked > 0 for one in evidence.workers)
        assert lm.steering.report()["pipeline_parallel_size"] == 2
        lm.intervene(target_language="fra_Latn")
        before = [tuple(score) for score in lm.loglikelihood(scoring(), disable_tqdm=True)]
        steer(lm, "layers-of-one-stage")
        lm.loglikelihood(scoring(), disable_tqdm=True)
        first, second = lm.steering.evidence().workers
        assert first["edited_layers"] == 0 and second["edited_layers"] > 0
        lm.intervene()
        assert [tuple(score) for score in lm.loglikelihood(scoring(), disable_tqdm=True)] == before
