"""Which way is used, that it is proven, and what is kept: cache, evidence, baseline, memory."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, LlamaForCausalLM

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.packing import Cost
from lm_eval_steering.lmeval.scoring import method_of
from lm_eval_steering.metrics.likelihood import NEEDS_UNSTEERED_SCORE, preference_shift
from tests.conftest import CONFIGS, tiny_model
from tests.lmeval.scoring.conftest import FRENCH, PAIRS, instances, loaded, neurons

TWICE = {NEEDS_UNSTEERED_SCORE: True}
DEAR = Cost(1, 1e9)  # only what is nearly equal shares a row


def calls(lm: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Token ids of the forward passes to come."""
    seen: list[torch.Tensor] = []
    real = lm.forward_pass
    monkeypatch.setattr(lm, "forward_pass", lambda inps, *given: (seen.append(inps), real(inps, *given))[1])
    return seen


# --- which way ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "way", "why"),
    [
        ({}, "packed", ""),
        ({"value": "live_max", "op": "add"}, "packed", ""),
        ({"positions": "prompt"}, "rows", "where a token stands in its row"),
        ({"preset": "+max", "op": None, "value": None}, "plain", "scope=sequence looks ahead"),
    ],
)
def test_results_say_which_way_was_used_and_why(arguments: dict[str, Any], way: str, why: str) -> None:
    lm = loaded()
    lm.intervene(neurons(), **{k: v for k, v in (FRENCH | arguments).items() if v is not None})
    lm.loglikelihood(instances())
    report = lm.get_model_info()["steering"]["scoring"]
    assert report["setting"] == "auto" and report["way"] == way and report["requests"] == {way: len(PAIRS)}
    assert why in report["why"]


def test_what_is_asked_for_and_not_exact_is_refused() -> None:
    lm = loaded(scoring="shared")
    lm.intervene(neurons(), language="fra_Latn", preset="+max")
    with pytest.raises(SteeringError, match=r"scoring=shared: scope=sequence looks ahead.*scoring=auto"):
        lm.loglikelihood(instances())
    assert lm.steering_report()["scoring"]["way"] == "plain"
    with pytest.raises(SteeringError, match=r"scoring='plian': expected auto, shared, plain; did you mean 'plain'"):
        loaded(scoring="plian")


def test_models_that_take_no_mask_of_ours() -> None:
    def way(family: str, backend: str = "causal", **change: Any) -> str:
        model = tiny_model(family)
        for name, value in change.items():
            setattr(model.config, name, value)
        found = method_of(model, backend, False, False)
        assert bool(found.why) is (found.name != "packed")
        return found.name

    assert way("llama") == "packed"
    assert way("llama", "seq2seq") == "plain"
    assert way("bloom") == way("falcon", alibi=True) == "rows"
    assert way("llama", _attn_implementation_internal="flash_attention_2") == "rows"
    assert way("phi3", rope_parameters={"rope_type": "longrope"}) == "plain"
    assert way("gemma3_text", rope_parameters={"full_attention": {"rope_type": "dynamic"}}) == "plain"


class Unmasked(LlamaForCausalLM):
    """A model that takes masks and positions, and does not use them."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return super().forward(input_ids)


class Narrow(LlamaForCausalLM):
    """A model that takes token ids alone."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        return super().forward(input_ids)


class Unplaced(LlamaForCausalLM):
    """A model that counts positions by itself."""

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        return super().forward(input_ids, **given | {"position_ids": None})


@pytest.mark.parametrize("kind", [Unmasked, Unplaced])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_fault(kind: type[LlamaForCausalLM], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lm = loaded(kind(AutoConfig.for_model("llama", **CONFIGS["llama"])).eval().to(dtype))
    lm.loglikelihood(instances(), disable_tqdm=True)
    assert lm.scoring_report()["way"] == "plain"
    lm = loaded(LlamaForCausalLM(AutoConfig.for_model("llama", **CONFIGS["llama"])).eval().to(dtype))
    lm.loglikelihood(instances(), disable_tqdm=True)
    assert lm.scoring_report()["way"] == "packed"


@pytest.mark.parametrize(("kind", "why"), [(Unmasked, "where the plain forward pass gives"), (Narrow, "TypeError")])
def test_a_model_that_fails_its_proof_is_scored_in_the_plain_way(
    kind: type[LlamaForCausalLM], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = kind(AutoConfig.for_model("llama", **CONFIGS["llama"])).eval()
    lm = loaded(model)
    with caplog.at_level(logging.WARNING):
        found = lm.loglikelihood(instances(), disable_tqdm=True)
    assert why in caplog.text and "lm-eval's own way is used" in caplog.text
    assert found == loaded(model, scoring="plain").loglikelihood(instances(), disable_tqdm=True)
    assert lm.scoring_report()["way"] == "plain" and why in lm.scoring_report()["why"]
    with pytest.raises(SteeringError, match="scoring=shared: scoring packed is not exact for this model"):
        loaded(model, scoring="shared").loglikelihood(instances(), disable_tqdm=True)


def test_the_proof_is_made_once_and_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = loaded(batch_size=64)
    lm.scorer._cost = Cost(1, 0)
    lm.intervene(neurons(), **FRENCH)
    pairs = [("w1 w2 w3", " w4 w5"), ("w1 w2 w3", " w6 w7 w8"), ("w9 w9", " w1")]
    seen = calls(lm, monkeypatch)
    lm.loglikelihood(instances(pairs))
    assert lm.steering is not None
    assert len(seen) > 2 and lm.steering.forwards == 1
    lm.loglikelihood(instances(pairs))
    evidence = lm.steering.evidence()
    # <s>, below it w1 w2 w3, below that w4 and w6 w7; below <s> also w9 w9: each read once a call.
    assert (evidence.forwards, evidence.positions, evidence.fired) == (2, 2 * 9, 2 * 2)
    assert [inps.shape for inps in seen[-2:]] == [(1, 9)] * 2


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_an_interrupted_run_leaves_whole_answers_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("w1 w2 w3", " w4 w5"), ("w2 w2 w2 w2", " w7"), ("w5 w5 w5 w5", " w1"), ("w6 w8 w8", " w1 w2")]
    lm = loaded(batch_size=1)
    lm.scorer._cost = DEAR
    lm.intervene(neurons(), **FRENCH)
    expected = lm.loglikelihood(instances(pairs))
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    real, seen = lm.forward_pass, []

    def stop_at_the_third(inps: torch.Tensor, *given: Any) -> Any:
        seen.append(inps)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(inps, *given)

    monkeypatch.setattr(lm, "forward_pass", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(instances(pairs))
    answers = cached.loglikelihood(instances(pairs))
    assert [score[0] for score in answers] == pytest.approx([score[0] for score in expected], abs=1e-5)
    assert [score.tokens for score in answers] == [2, 1, 1, 2]
    before = {tuple(row) for batch in seen[:2] for row in batch.tolist()}
    after = {tuple(row) for batch in seen[3:] for row in batch.tolist()}
    assert after and not before & after, "finished rows were scored again"


def test_pairs_of_lss_run_twice_in_the_same_batches_and_the_baseline_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = loaded()
    expected = [score[0] for score in lm.loglikelihood(instances())]
    seen = calls(lm, monkeypatch)
    unsteered = []
    for number, factor in enumerate((1, 3, 0.5)):
        lm.intervene(neurons(), language="fra_Latn", op="scale", factor=factor)
        before = len(seen)
        scores = lm.loglikelihood(instances(doc=TWICE))
        batches = seen[before:]
        if number == 0:
            assert all(torch.equal(*pair) for pair in zip(batches[::2], batches[1::2], strict=True))
            assert all(score[0] == score.unsteered for score in scores)
            first = len(batches)
        else:
            assert len(batches) == first // 2
            assert any(score[0] != score.unsteered for score in scores)
        unsteered.append([score.unsteered for score in scores])
    assert unsteered[0] == unsteered[1] == unsteered[2] == pytest.approx(expected, abs=1e-5)
    lm.scorer.forget_baseline()
    before = len(seen)
    lm.loglikelihood(instances(doc=TWICE))
    assert len(seen) - before == first


@pytest.mark.parametrize("doc", [None, TWICE])
def test_batches_shrink_where_memory_runs_out(doc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(f"w{i} w{i + 1}", f" w{j} w{i}") for i in range(8) for j in range(2)]
    lm = loaded(batch_size="auto")
    lm.scorer._cost = DEAR
    lm.intervene(neurons(), **FRENCH)
    expected = lm.loglikelihood(instances(pairs, doc))
    lm.scorer.forget_baseline()
    real, sizes = lm.forward_pass, []

    def small(inps: torch.Tensor, *given: Any) -> Any:
        sizes.append(len(inps))
        if len(inps) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(inps, *given)

    monkeypatch.setattr(lm, "forward_pass", small)
    found = lm.loglikelihood(instances(pairs, doc))
    assert [score[0] for score in found] == pytest.approx([score[0] for score in expected], abs=1e-5)
    assert [score.unsteered or 0 for score in found] == pytest.approx([s.unsteered or 0 for s in expected], abs=1e-5)
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) <= {2}
    monkeypatch.setattr(lm, "forward_pass", lambda inps, *given: small(inps.expand(9, -1), *given))
    with pytest.raises(torch.OutOfMemoryError):
        lm.loglikelihood(instances(pairs[:1]))


def test_no_search_for_a_batch_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> int:
        raise AssertionError("searched")

    monkeypatch.setattr(HFLM, "_detect_batch_size", never)
    lm = loaded(batch_size="auto")
    assert len(lm.loglikelihood(instances())) == len(PAIRS)


def test_logits_are_made_where_a_token_is_scored_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = loaded()
    lm.loglikelihood(instances())
    made: list[torch.Size] = []
    lm.model.lm_head.register_forward_hook(lambda _module, _inputs, output: made.append(output.shape))
    lm.loglikelihood(instances([("w1 w2 w3 w4", " w5 w6"), ("w1 w2 w3 w4", " w5 w7"), ("w1 w2 w3 w4", " w8")]))
    assert [tuple(shape[:2]) for shape in made] == [(1, 2)]


# --- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scoring", ["auto", "plain"])
@pytest.mark.parametrize("identity", [{"op": "scale", "factor": 1.0}, {"op": "add", "value": 2.0, "factor": 0.0}])
def test_lss_under_identity_is_exactly_0_in_half_precision(
    dtype: torch.dtype, scoring: str, identity: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.for_model("llama", **CONFIGS["llama"])).eval().to(dtype)
    for batch_size in (1, 3, 16):
        lm = loaded(model, batch_size=batch_size, scoring=scoring)
        lm.intervene(neurons(), language="fra_Latn", **identity)
        scores = lm.loglikelihood(instances(doc=TWICE), disable_tqdm=True)
        shifts = [preference_shift(*pair) for pair in itertools.pairwise(scores)]
        assert set(shifts) == {0.0}
        assert lm.scoring_report()["way"] == ("plain" if scoring == "plain" else "packed")
        lm.intervene(neurons(), **FRENCH)
        steered = lm.loglikelihood(instances(doc=TWICE), disable_tqdm=True)
        assert [score.unsteered for score in steered] == [score.unsteered for score in scores]
        assert any(preference_shift(*pair) for pair in itertools.pairwise(steered))
        lm.intervene(None)


def test_the_results_say_what_half_precision_does() -> None:
    assert loaded().scoring_report()["precision"] == ""
    half = loaded(LlamaForCausalLM(AutoConfig.for_model("llama", **CONFIGS["llama"])).to(torch.bfloat16))
    assert re.match("bfloat16: .*docs/half-precision.md", half.scoring_report()["precision"])
