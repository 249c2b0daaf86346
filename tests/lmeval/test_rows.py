"""What the intervention is told of lm-eval's batches: row lengths, context lengths, and which requests share a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.utils import simple_parse_args_string

from lm_eval_steering import steer
from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.lmeval import requests as batches
from lm_eval_steering.lmeval.arguments import SteeringArguments, split
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.metrics.likelihood import NEEDS_UNSTEERED_SCORE
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.intervention import from_arguments
from tests.conftest import make_set, tiny_model, tiny_tokenizer

# Options of one token, of several, the same tokens split elsewhere, an empty context, and rows of many lengths.
PAIRS = [
    ("w1 w2 w3", " w4"), ("w1 w2 w3", " w5"), ("w1 w2 w3", " w4 w5"), ("w1 w2", " w3 w6"), ("w1", " w2 w3 w7"),
    ("", "w9 w8 w7"), ("w5 w5 w5 w5 w5 w5", " w1 w2"), ("w7", " w7"),
]  # fmt: skip
FRENCH = {"language": "fra_Latn"}
BOUND: list[dict[str, Any]] = [
    FRENCH | {"op": "set", "value": 4.0, "positions": "prompt"},
    FRENCH | {"op": "set", "value": 4.0, "positions": "generated"},
    FRENCH | {"op": "set", "value": 4.0, "positions": "last"},
    FRENCH | {"op": "set", "value": 4.0, "positions": "-2:", "site": "product"},
    FRENCH | {"preset": "+max"},
    FRENCH | {"preset": "=P10", "positions": "1:4"},
]
FREE: list[dict[str, Any]] = [
    FRENCH | {"op": "add", "value": 2.0, "factor": 2.0},
    FRENCH | {"op": "add", "value": "live_max", "deactivate": "others", "deactivate_to": "noise", "seed": 5},
]


@pytest.fixture
def neurons() -> NeuronSet:
    return make_set({"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5), (1, 7)]})


def loaded(batch_size: Any = 2, **arguments: Any) -> SteeredHFLM:
    return SteeredHFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=batch_size, **arguments)


def scoring(kind: str = "loglikelihood", doc: Any = None, pairs: list[Any] = PAIRS) -> list[Instance]:
    return [Instance(kind, doc or {}, pair, number) for number, pair in enumerate(pairs)]


@torch.no_grad()
def by_hand(neurons: NeuronSet, arguments: dict[str, Any], context: list[int], continuation: list[int]) -> float:
    """One request by itself: one row, no padding, its context length said."""
    model = tiny_model("llama")
    row = torch.tensor([(context + continuation)[:-1]])
    steering = steer(model, neurons, **arguments)
    with steering, steering.rows(torch.ones_like(row), torch.tensor([len(context)])):
        logits = model(row).logits[0].log_softmax(-1)
    picked = logits[len(context) - 1 :].gather(1, torch.tensor(continuation).unsqueeze(1))
    return float(picked.sum())


@pytest.mark.parametrize("arguments", [*BOUND, *FREE], ids=str)
def test_scores_are_those_of_each_request_by_itself(neurons: NeuronSet, arguments: dict[str, Any]) -> None:
    expected = None
    for batch_size in (1, 3, 64):
        lm = loaded(batch_size)
        lm.intervene(neurons, **arguments)
        found = [score[0] for score in lm.loglikelihood(scoring())]
        if expected is None:
            tokens = [lm._encode_pair(*pair) if pair[0] else ([0], lm.tok_encode(pair[1])[1:]) for pair in PAIRS]
            tokens[5] = ([0], lm.tok_encode(PAIRS[5][1], add_special_tokens=False))
            expected = [by_hand(neurons, arguments, *each) for each in tokens]
        assert found == pytest.approx(expected, abs=1e-5), batch_size
        assert lm.steering_report()["lookahead"] is (arguments.get("preset") is not None)


def rows_scored(lm: SteeredHFLM, monkeypatch: pytest.MonkeyPatch) -> int:
    seen: list[int] = []
    real = HFLM._model_call

    def counting(self: Any, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(inps))
        return real(self, inps, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", counting)
    lm.loglikelihood(scoring())
    monkeypatch.setattr(HFLM, "_model_call", real)
    return sum(seen)


def test_requests_share_a_row_only_where_tokens_and_context_lengths_agree(
    neurons: NeuronSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = loaded(batch_size=64, scoring="plain")
    for arguments in (FREE[0], BOUND[0], BOUND[4]):
        lm.intervene(neurons, **arguments)
        assert rows_scored(lm, monkeypatch) == len(PAIRS) - 1  # the two one-token options alone
    lm.intervene()
    assert rows_scored(lm, monkeypatch) == len(PAIRS) - 1


def test_equal_tokens_with_contexts_of_other_lengths_get_their_own_scores() -> None:
    """lm-eval 0.4.13 scores them by one row, and the shorter continuation at the wrong positions."""
    pairs = [("w1 w2 w3", " w4"), ("w1", " w2 w3 w7")]
    plain = HFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=1)
    alone = [plain.loglikelihood(scoring(pairs=[pair]))[0][0] for pair in pairs]
    assert plain.loglikelihood(scoring(pairs=pairs))[0][0] != pytest.approx(alone[0], abs=1e-3)
    assert [score[0] for score in loaded(1).loglikelihood(scoring(pairs=pairs))] == pytest.approx(alone, abs=1e-6)


def test_evidence_counts_real_positions_alone(neurons: NeuronSet) -> None:
    lm = loaded(batch_size=64, scoring="plain")
    lm.intervene(neurons, **FREE[0])
    lm.loglikelihood(scoring(pairs=[("w1 w2 w3", " w4"), ("w1", " w2")]))
    evidence = lm.steering_report()["evidence"]
    assert (evidence["forwards"], evidence["positions"], evidence["nonfinite"]) == (1, 4 + 2, 0.0)
    lm.intervene(neurons, **BOUND[1])
    lm.loglikelihood(scoring())
    assert lm.steering_report()["evidence"]["positions"] == sum((0, 1, 1, 2, 2, 1, 0))


def test_no_chosen_position_is_an_error_not_the_unsteered_score(neurons: NeuronSet) -> None:
    lm = loaded()
    lm.intervene(neurons, **BOUND[1])
    with pytest.raises(DidNotHappenError, match=r"no position was edited: op:set.*positions:generated chooses none"):
        lm.loglikelihood(scoring(pairs=PAIRS[:2]))
    with pytest.raises(DidNotHappenError, match="no position was edited"):
        lm.loglikelihood_rolling(scoring("loglikelihood_rolling", pairs=[("w1 w2 w3",)]))


def test_in_rolling_likelihood_every_token_is_prompt(neurons: NeuronSet) -> None:
    texts = [("w1 w2 w3 w4 w5",), ("w6 w7",), (" ".join(f"w{i % 50}" for i in range(90)),)]  # the last has two windows
    found = []
    for positions in ("all", "prompt"):
        for batch_size in (1, 2):
            lm = loaded(batch_size)
            lm.intervene(neurons, **(FRENCH | {"op": "set", "value": 4.0, "positions": positions}))
            found.append(lm.loglikelihood_rolling(scoring("loglikelihood_rolling", pairs=texts)))
    assert all(each == pytest.approx(found[0], abs=1e-4) for each in found)


@pytest.mark.parametrize("arguments", [*BOUND[:5], FREE[1]], ids=str)
def test_generated_texts_do_not_depend_on_their_batch(neurons: NeuronSet, arguments: dict[str, Any]) -> None:
    settings = {"max_gen_toks": 5, "do_sample": False, "until": []}
    requests = [
        Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(["w1 w2", "w3", "w4 w5 w6 w7"])
    ]
    found = []
    for batch_size in (1, 3):
        lm = loaded(batch_size)
        lm.intervene(neurons, **arguments)
        found.append(list(lm.generate_until(requests)))
        positions = lm.steering_report()["evidence"]["positions"]
        if arguments.get("positions") == "prompt":
            assert positions == 3 + 2 + 5
        if arguments.get("positions") == "last":
            assert positions == 3
    assert found[0] == found[1]


def test_beams_belong_to_their_prompt(neurons: NeuronSet) -> None:
    settings = {"max_gen_toks": 3, "do_sample": False, "num_beams": 2, "until": []}
    requests = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(["w1 w2", "w3"])]
    lm = loaded(2)
    lm.intervene(neurons, **BOUND[2])
    lm.generate_until(requests)
    assert lm.steering_report()["evidence"]["positions"] == 4


def test_twins_are_scored_in_the_same_rounds(neurons: NeuronSet) -> None:
    lm = loaded(batch_size=3)
    lm.intervene(neurons, **(FRENCH | {"op": "scale", "factor": 1, "positions": "prompt"}))
    answers = lm.loglikelihood(scoring(doc={NEEDS_UNSTEERED_SCORE: True}))
    assert all(score[0] == score.unsteered for score in answers)


def test_a_search_for_the_batch_size_works_with_rounds(neurons: NeuronSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda *_args, **_kwargs: 3)
    plain = loaded(batch_size=64)
    plain.intervene(neurons, **BOUND[0])
    lm = loaded(batch_size="auto:4")
    lm.intervene(neurons, **BOUND[0])
    expected = [score[0] for score in plain.loglikelihood(scoring())]
    assert [score[0] for score in lm.loglikelihood(scoring())] == pytest.approx(expected, abs=1e-5)


def test_an_order_that_is_not_lm_evals_is_refused(neurons: NeuronSet, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = loaded()
    lm.intervene(neurons, **BOUND[0])
    monkeypatch.setattr(Collator, "_reorder", lambda self, arr: iter([each[1] for each in arr]))
    lm.loglikelihood(scoring())  # both in another order: still the rows that the model gets
    book = batches.ExpectedRows([(("a", "b"), [1, 2], [3])], 64, True)
    with pytest.raises(DidNotHappenError, match="in an order that this release"):
        book.take(torch.tensor([[1, 5]]))
    with pytest.raises(DidNotHappenError, match="more rows than it has requests"):
        book.take(torch.tensor([[1, 2]]))


def test_context_lengths_survive_truncation(neurons: NeuronSet) -> None:
    lm = loaded(1, max_length=8)
    lm.intervene(neurons, **BOUND[2])
    long = " ".join(f"w{i}" for i in range(20))
    found = lm.loglikelihood(scoring(pairs=[(long, " w30 w31")]))[0][0]
    tokens = lm.tok_encode(long + " w30 w31")[-9:]
    assert found == pytest.approx(by_hand(neurons, BOUND[2], tokens[:-2], tokens[-2:]), abs=1e-5)


def test_counters_are_read_once_a_batch_and_not_once_an_answer(
    neurons: NeuronSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = loaded(batch_size=64, scoring="plain")
    lm.intervene(neurons, **FREE[0])
    assert lm.steering is not None
    reads: list[int] = []
    real = type(lm.steering).evidence
    monkeypatch.setattr(type(lm.steering), "evidence", lambda self: (reads.append(1), real(self))[1])
    CachingLM(lm, str(tmp_path / "cache.db")).loglikelihood(scoring(pairs=PAIRS[:2] + PAIRS[5:]))
    assert len(reads) == 3  # before, after, and for the batch's answers


def test_changing_the_intervention_swaps_tensors_and_leaves_hooks_alone(neurons: NeuronSet) -> None:
    lm = loaded()
    lm.intervene(neurons, **FREE[0])
    first = lm.steering
    hooks = [list(module._forward_hooks) for module in lm.model.modules()]
    expected = {}
    for factor in (3, 0.5, 3):
        lm.intervene(neurons, **(FREE[0] | {"factor": factor}))
        assert lm.steering is first and [list(module._forward_hooks) for module in lm.model.modules()] == hooks
        found = lm.loglikelihood(scoring())
        assert expected.setdefault(factor, found) == found
    lm.intervene(neurons, language="deu_Latn", op="set", value=3, site="product")
    fresh = loaded()
    fresh.intervene(neurons, language="deu_Latn", op="set", value=3, site="product")
    assert lm.loglikelihood(scoring()) == fresh.loglikelihood(scoring())
    assert lm.steering_report()["evidence"] == fresh.steering_report()["evidence"]
    lm.intervene()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in lm.model.modules())


def test_a_model_whose_hooks_never_run_gives_no_score(neurons: NeuronSet, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = loaded()
    lm.intervene(neurons, **FREE[0])
    other = tiny_model("llama")
    monkeypatch.setattr(type(lm), "model", property(lambda _self: other))  # as code compiled before does
    with pytest.raises(DidNotHappenError, match="the model ran and the intervention's hooks did not"):
        lm.loglikelihood(scoring())


def test_the_fingerprint_and_one_cache_file_tell_positions_scopes_and_seeds_apart(
    neurons: NeuronSet, tmp_path: Path
) -> None:
    lm = loaded(batch_size=3)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    kinds: list[dict[str, Any]] = [BOUND[0], BOUND[1], BOUND[4], FRENCH | {"op": "add", "value": "live_max"}]
    kinds += [{"deactivate": "fra", "deactivate_to": "noise", "seed": seed} for seed in (0, 1)]
    fresh, fingerprints = [], set()
    for arguments in kinds:
        lm.intervene(neurons, **arguments)
        fresh.append(cached.loglikelihood(scoring()))
        fingerprints.add(lm.fingerprint)
    assert len(fingerprints) == len(kinds)
    for arguments, expected in zip(kinds, fresh, strict=True):
        lm.intervene(neurons, **arguments)
        assert cached.loglikelihood(scoring()) == expected
        assert lm.steering is not None and lm.steering.forwards == 0


# --- how the arguments arrive -------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [simple_parse_args_string, key_val_to_dict])
@pytest.mark.parametrize(
    ("written", "signature"),
    [
        ("language=fr,preset==max", "op:set|value:live_max|factor:1|LANG|scope:sequence"),
        ("language=fr,preset=+max", "op:add|value:live_max|factor:1|LANG|scope:sequence"),
        ("language=fr,preset==0", "op:set|value:0|factor:1|LANG"),
        ("language=fr,preset==1.5", "op:set|value:1.5|factor:1|LANG"),
        ("language=fr,preset=*-2.5", "op:scale|factor:-2.5|LANG"),
        ("language=fr,preset=set_p10", "op:set|value:live_p10|factor:1|LANG|scope:sequence"),
        ("language=fr,op=scale,factor=3,positions=-5:", "op:scale|factor:3|LANG|positions:-5:"),
        (
            "language=fr,op=scale,factor=-1e-3,positions=prompt[3:9]",
            "op:scale|factor:-0.001|LANG|positions:prompt[3:9]",
        ),
        ("deactivate=fr,deactivate_to=noise,seed=3", "op:add|value:normal|factor:5|OFF|seed:3"),
        ("deactivate=fr,deactivate_to=-1.5,keep_shared=False", "op:set|value:-1.5|factor:1|OFF|keep_shared:false"),
    ],
)
def test_every_form_survives_lm_evals_own_reading(read: Any, written: str, signature: str) -> None:
    signature = signature.replace("LANG", "lang:fra_Latn|site:activation|layers:all")
    signature = signature.replace("OFF", "deactivate:fra_Latn|site:activation|layers:all")
    own, rest = split(read(f"neurons=demo,{written}"), HFLM, tiny_model("llama").config)
    assert not rest and from_arguments(own.steps()).signature() == signature


def test_a_file_of_steps_is_an_intervention(neurons: NeuronSet, tmp_path: Path) -> None:
    steps = [
        {"deactivate": "deu_Latn", "deactivate_to": "live_mean", "layers": "0-1"},
        {"language": "fra_Latn", "op": "add", "value": "mean", "factor": 2, "positions": "1:"},
    ]
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump(steps))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    neurons.save(tmp_path / "neurons.safetensors")
    lm = SteeredHFLM(
        str(tmp_path / "model"), device="cpu", neurons=str(tmp_path / "neurons.safetensors"),
        intervention=str(tmp_path / "steps.yaml"),
    )  # fmt: skip
    assert lm.targets == ("fra_Latn",)
    assert lm.intervention == from_arguments({"intervention": steps})
    before = lm.fingerprint
    lm.intervene(neurons, intervention=steps)
    assert lm.fingerprint == before


def test_tensor_parallelism_is_refused_before_loading() -> None:
    config = tiny_model("llama").config
    good = {"neurons": "demo", "language": "fra_Latn", "op": "scale"}
    with pytest.raises(SteeringError, match=r"tp_plan='auto': tensor parallelism.*parallelize=True"):
        split(good | {"tp_plan": "auto"}, HFLM, config)
    assert split({"tp_plan": "auto"}, HFLM, config)[0] == SteeringArguments()
