"""Our scores are lm-eval's: every family, steered and unsteered, and requests of any kind."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.requests import Request
from lm_eval_steering.lmeval.scoring import PACKABLE
from tests.conftest import CONFIGS, tiny_model, tiny_tokenizer
from tests.lmeval.scoring.conftest import FRENCH, HIDDEN, LONG, PAIRS, instances, loaded, neurons


def same(found: list[Any], expected: list[Any]) -> None:
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4)


def test_every_family_scores_as_hf_does(family: str) -> None:
    model = tiny_model(family)
    plain = HFLM(model, tokenizer=tiny_tokenizer(), batch_size=1, max_length=64)
    for implementation in ("sdpa", "eager"):
        if implementation == "eager" and model._can_set_attn_implementation():
            model.set_attn_implementation("eager")
        # With the same attention: transformers before 5.21 leaves out Gemma 2's soft cap under sdpa. And one by one:
        # lm-eval gives requests of equal tokens and other context lengths the scores of wrong positions.
        expected = [plain.loglikelihood([request], disable_tqdm=True)[0] for request in instances()]
        lm = loaded(model)
        same(lm.loglikelihood(instances(), disable_tqdm=True), expected)
        assert lm.steering_report()["scoring"]["way"] == ("packed" if family in PACKABLE else "rows")


@pytest.mark.parametrize("arguments", [FRENCH, HIDDEN], ids=["units", "hidden states"])
def test_every_family_is_steered_as_in_the_plain_way(family: str, arguments: dict[str, Any]) -> None:
    model = tiny_model(family)
    found = []
    for way in ("plain", "auto"):
        lm = loaded(model, scoring=way)
        lm.intervene(neurons(family), **arguments)
        found.append(lm.loglikelihood(instances(), disable_tqdm=True))
        lm.intervene()
    same(*found)


@pytest.mark.parametrize("arguments", [
    {"op": "add", "value": "live_max"}, {"preset": "+max"}, FRENCH | {"positions": "prompt"},
    FRENCH | {"positions": "generated"}, FRENCH | {"positions": "last"}, FRENCH | {"positions": "prompt[-2:]"},
    FRENCH | {"site": "product"}, {"op": "add", "value": "mean", "deactivate": "deu", "deactivate_to": "noise"},
    HIDDEN, HIDDEN | {"dimensions": 3, "positions": "generated"}, HIDDEN | {"value": "live_max"},
], ids=str)  # fmt: skip
def test_every_kind_of_intervention_scores_as_in_the_plain_way(arguments: dict[str, Any]) -> None:
    found = []
    for way in ("plain", "auto"):
        lm = loaded(scoring=way)
        lm.intervene(neurons(), **({"language": "fra_Latn"} | arguments))
        found.append(lm.loglikelihood(instances(), disable_tqdm=True))
    same(*found)


def test_plain_is_bit_equal_to_hf() -> None:
    distinct = [pair for pair in PAIRS if pair not in {PAIRS[4], PAIRS[5]}]
    expected = HFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=3, max_length=64)
    lm = loaded(scoring="plain")
    assert [tuple(score) for score in lm.loglikelihood(instances(distinct))] == expected.loglikelihood(
        instances(distinct)
    )
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (LONG, "w1", LONG * 2)]
    assert lm.loglikelihood_rolling(texts) == expected.loglikelihood_rolling(texts)


def test_rolling_likelihood_is_that_of_hf() -> None:
    texts = [
        Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("w1 w2 w3", LONG, "w5", LONG + " w1 " + LONG)
    ]
    expected = HFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=2, max_length=64)
    for batch_size in (1, 4):
        lm = loaded(batch_size=batch_size)
        assert lm.loglikelihood_rolling(texts) == pytest.approx(expected.loglikelihood_rolling(texts), abs=1e-4)


def test_adapters_and_half_precision() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    )
    for model, tolerance in ((adapted.eval(), 1e-4), (tiny_model("llama").bfloat16(), 0.5)):
        found, expected = (
            [score[0] for score in loaded(model, scoring=way).loglikelihood(instances(), disable_tqdm=True)]
            for way in ("shared", "plain")
        )
        assert found == pytest.approx(expected, abs=tolerance)


# --- any requests ---------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(3, 6), min_size=1, max_size=14)  # few ids, so that much is shared
ITEMS = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=6)
MODELS = ("llama", "gemma3_text", "mistral", "gpt2")


@cache
def pair_of(family: str) -> tuple[SteeredHFLM, SteeredHFLM]:
    """A model of 16 positions and a window of 5 where its family has one: scored by us, and in lm-eval's way."""
    torch.manual_seed(0)
    window = {"sliding_window": 5} if "sliding_window" in AutoConfig.for_model(family).to_dict() else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(CONFIGS[family] | window))).eval()
    return loaded(model, max_length=16, scoring="shared"), loaded(model, max_length=16, scoring="plain")


@pytest.mark.parametrize("family", MODELS)
@given(items=ITEMS, order=st.randoms(use_true_random=False), batch_size=st.sampled_from([1, 2, 7, 64]))
@settings(max_examples=25)
def test_any_requests_in_any_order_and_batches(family: str, items: Any, order: Any, batch_size: int) -> None:
    requests: list[Request] = [
        ((str(context), str(continuation)), context, continuation)
        for context, continuations in items
        for continuation in continuations
    ]
    order.shuffle(requests)
    ours, plain = pair_of(family)
    assert ours.scoring_report()["way"] == "packed"
    ours.batch_size_per_gpu = batch_size
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    same(found, plain._loglikelihood_tokens(requests, disable_tqdm=True))
    assert [score.tokens for score in found] == [len(request[2]) for request in requests]
