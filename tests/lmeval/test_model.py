"""`steered-hf` in this process: answers with a memory, two models at once, safe caching."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval import cache
from lm_eval_steering.lmeval.arguments import refuse_other_name, split
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.metrics.likelihood import MADE_FOR, NEEDS_UNSTEERED_SCORE, Score
from lm_eval_steering.metrics.output_language import IdentifiedText
from lm_eval_steering.metrics.registered import lfs
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import versions
from tests.conftest import make_set, tiny_model, tiny_tokenizer

PAIRS = [("w1 w2 w3", " w4 w5"), ("w1 w2", " w7"), ("", "w9 w8 w7"), ("w5 w5 w5 w5", " w1")]
STRONG = {"language": "fra_Latn", "op": "add", "value": 2.0, "factor": 2.0}


@pytest.fixture
def neurons() -> NeuronSet:
    return make_set({"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5), (1, 7)], "tur_Latn": []})


@pytest.fixture
def folder(tmp_path: Path, neurons: NeuronSet) -> Path:
    """A model on disk, with its neuron set beside it."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    neurons.save(tmp_path / "neurons.safetensors")
    return tmp_path


def loaded(batch_size: int = 2, **arguments: Any) -> SteeredHFLM:
    return SteeredHFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=batch_size, **arguments)


def scoring(twin: bool = False) -> list[Instance]:
    doc = {NEEDS_UNSTEERED_SCORE: True} if twin else {}
    return [Instance("loglikelihood", doc, pair, i) for i, pair in enumerate(PAIRS)]


def generating() -> list[Instance]:
    settings = {"max_gen_toks": 4, "do_sample": False, "until": []}
    return [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(["w1 w2", "w3"])]


def test_factor_one_is_bit_equal_to_hf(folder: Path) -> None:
    plain = HFLM(str(folder / "model"), device="cpu", batch_size=2)
    for batch_size in (1, 2):
        ours = SteeredHFLM(
            str(folder / "model"), device="cpu", batch_size=batch_size,
            neurons=str(folder / "neurons.safetensors"), language="fra_Latn", op="scale", factor=1,
            scoring="plain",
        )  # fmt: skip
        plain.batch_size_per_gpu = batch_size
        assert [tuple(score) for score in ours.loglikelihood(scoring())] == plain.loglikelihood(scoring())
        assert list(ours.generate_until(generating())) == plain.generate_until(generating())


def test_scores_know_tokens_twin_and_target(neurons: NeuronSet) -> None:
    lm = loaded()
    unsteered = lm.loglikelihood(scoring())
    lm.intervene(neurons, **STRONG)
    steered = lm.loglikelihood(scoring())
    both = lm.loglikelihood(scoring()[:1] + scoring(twin=True)[1:])
    assert [score.tokens for score in steered] == [2, 1, 3, 1]
    assert [score[0] for score in both] == pytest.approx([score[0] for score in steered], rel=1e-5)
    assert both[0].unsteered is None
    assert [score.unsteered for score in both[1:]] == pytest.approx([score[0] for score in unsteered[1:]], rel=1e-5)
    assert all(score.targets == ("fra_Latn",) for score in both)
    assert [score[0] for score in steered] != [score[0] for score in unsteered]


def test_an_identity_has_a_twin_that_is_exactly_equal(neurons: NeuronSet) -> None:
    lm = loaded()
    lm.intervene(neurons, language="fra_Latn", op="scale", factor=1)
    assert all(score[0] == score.unsteered for score in lm.loglikelihood(scoring(twin=True)))


def test_two_models_in_one_process_keep_their_own_targets(neurons: NeuronSet) -> None:
    one, other = loaded(), loaded()
    one.intervene(neurons, **STRONG)
    other.intervene(neurons, **(STRONG | {"language": "deu_Latn"}))
    texts = one.generate_until(generating()), other.generate_until(generating())
    assert {text.targets for text in texts[0]} == {("fra_Latn",)}
    assert {text.targets for text in texts[1]} == {("deu_Latn",)}
    one.intervene()
    assert {text.targets for text in one.generate_until(generating())} == {()}
    assert {text.targets for text in texts[0]} == {("fra_Latn",)}, "an answer given keeps its target"


def test_answers_survive_pickling() -> None:
    text = IdentifiedText("hallo", "deu_Latn", 0.75, ("deu_Latn",))
    again = pickle.loads(pickle.dumps(text))
    assert (again, again.language, again.confidence, again.targets) == ("hallo", "deu_Latn", 0.75, ("deu_Latn",))
    score = pickle.loads(pickle.dumps(Score((-1.5, True), 3, -2.0, ("deu_Latn",))))
    assert (tuple(score), score.tokens, score.unsteered, score.targets) == ((-1.5, True), 3, -2.0, ("deu_Latn",))


def test_one_cache_file_serves_a_whole_sweep(neurons: NeuronSet, tmp_path: Path) -> None:
    """Factors 1, 0, 1: the model runs for the first and the second, and not for the third; all scores are right."""
    lm = loaded()
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    found = []
    for factor in (1, 0, 1):
        lm.intervene(neurons, language="fra_Latn", op="scale", factor=factor)
        answers = cached.loglikelihood(scoring())
        assert lm.steering is not None
        found.append((lm.steering.evidence().forwards > 0, answers))
    assert [ran for ran, _ in found] == [True, True, False]
    assert found[2][1] == found[0][1] != found[1][1]
    assert [score.tokens for score in found[2][1]] == [2, 1, 3, 1]
    fresh = loaded()
    fresh.intervene(neurons, language="fra_Latn", op="scale", factor=0)
    assert fresh.loglikelihood(scoring()) == found[1][1]


def test_the_cache_keeps_plain_hf_apart(neurons: NeuronSet, tmp_path: Path) -> None:
    path = str(tmp_path / "cache.db")
    plain = CachingLM(HFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=2), path)
    expected = plain.loglikelihood(scoring())
    plain.dbdict.close()
    lm = loaded()
    lm.intervene(neurons, **STRONG)
    assert CachingLM(lm, path).loglikelihood(scoring()) != expected


def test_answers_of_other_versions_come_with_one_warning_that_names_them(
    neurons: NeuronSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def answers() -> list[Any]:
        lm = loaded()
        lm.intervene(neurons, **STRONG)
        cached = CachingLM(lm, str(tmp_path / "cache.db"))
        found = cached.loglikelihood(scoring())
        cached.dbdict.close()
        return found

    cache._warn_once.cache_clear()
    first, same = answers(), answers()
    assert same == first and "other versions" not in caplog.text  # the same versions: not a word
    monkeypatch.setattr(cache, "versions", lambda: versions() | {"transformers": "99.0"})
    assert answers() == first
    (warning,) = [record.message for record in caplog.records if "other versions" in record.message]
    assert f"transformers {versions()['transformers']} and 99.0" in warning and "delete the file" in warning
    assert "torch" not in warning


def test_an_interrupted_run_leaves_whole_answers_in_the_cache(neurons: NeuronSet, tmp_path: Path) -> None:
    lm = loaded(batch_size=1, scoring="plain")
    lm.intervene(neurons, **STRONG)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    real, calls = lm._model_call, []

    def stop_at_the_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    lm._model_call = stop_at_the_third  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(scoring())
    lm._model_call = real  # type: ignore[method-assign]
    answers = cached.loglikelihood(scoring())
    assert [score.tokens for score in answers] == [2, 1, 3, 1]
    assert lm.steering is not None and lm.steering.evidence().forwards == 4, "finished rows were scored again"


def test_the_report_names_everything_that_decides_a_score(neurons: NeuronSet) -> None:
    lm = loaded()
    lm.intervene(neurons, **STRONG)
    lm.loglikelihood(scoring())
    report = lm.steering_report()
    assert report["evidence"]["forwards"] > 0 and report["evidence"]["neurons"] == 3
    assert report["neuron_set"]["sha256"] == neurons.content_hash()
    assert report["signature"].startswith("op:add|value:2|factor:2|lang:fra_Latn|site:activation|layers:all|neurons:")
    assert f"fp:{report['fingerprint'][:8]}" in report["signature"]
    assert "lid:lid.176.ftz@8f3472cf>0.5" in report["signature"]
    assert lm.get_model_info()["steering"] == report


def test_the_fingerprint_follows_what_decides_a_score(neurons: NeuronSet) -> None:
    lm = loaded()
    found = set()
    settings: list[dict[str, Any]] = [{}, STRONG, STRONG | {"factor": 3}, STRONG | {"site": "product"}]
    for arguments in settings:
        lm.intervene(neurons if arguments else None, **arguments)
        found.add(lm.fingerprint)
    assert len(found) == len(settings)
    lm.intervene(neurons, **STRONG)
    assert lm.fingerprint in found


def test_bad_arguments_fail_before_the_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(HFLM, "_create_model", never)
    neurons = str(folder / "neurons.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "neurons.safetensors").read_bytes()[:200])
    other = make_set({"fra_Latn": [(0, 0)]}, "gpt2")
    other.save(folder / "other.safetensors")
    good = {"neurons": neurons, "language": "fra_Latn", "op": "scale", "factor": 2}
    for change, message in (
        ({"language": "klingon"}, r"unknown language 'klingon'.*the neuron set has .*fra_Latn"),
        ({"language": "fra_Arab"}, r"not in the neuron set, which has .*; did you mean 'fra_Latn'"),
        ({"language": "tur"}, "tur_Latn has no neurons"),
        ({"factor": "nan"}, "expected a finite number"),
        ({"op": "scael"}, "did you mean 'scale'"),
        ({"op": "add", "value": "p75"}, "statistic 'p75' at site 'activation' is not in the neuron set"),
        ({"facter": 3}, "unknown model argument 'facter'; did you mean 'factor'"),
        ({"neurons": "nowhere.safetensors"}, "no such file"),
        ({"neurons": str(folder / "cut.safetensors")}, "not a whole safetensors file"),
        ({"neurons": str(folder / "other.safetensors")}, "the neuron set is for tiny"),
        ({"neurons": None}, "language= without neurons="),
        ({"language": None, "op": None, "factor": None}, "neurons= without language="),
        ({"target_language": "klingonisch"}, "unknown language"),
        ({"allow_empty": "perhaps"}, "expected True or False"),
    ):
        with pytest.raises(SteeringError, match=message) as error:
            SteeredHFLM(str(folder / "model"), **(good | change))
        assert "\n" not in str(error.value)
    with pytest.raises(SteeringError, match="pretrained='nowhere'"):
        SteeredHFLM("nowhere", **good)


def test_arguments_of_hf_and_of_transformers_pass_through() -> None:
    config = tiny_model("llama").config
    given = {"dtype": "float32", "attn_implementation": "eager", "rope_theta": 1.0, "factor": 2, "language": "fra_Latn",
             "op": "scale", "neurons": "x", "bnb_4bit_use_double_quant": True}  # fmt: skip
    config.rope_theta = 1.0
    own, rest = split(given, HFLM, config)
    assert set(rest) == {"dtype", "attn_implementation", "rope_theta", "bnb_4bit_use_double_quant"}
    assert (own.factor, own.language) == (2, "fra_Latn")


def test_lfs_is_absent_without_a_target_and_never_zero() -> None:
    french = "Je ne sais pas ce que tu veux dire par là."
    assert lfs(["x"], [french]) == {}
    assert lfs(["x"], [IdentifiedText(french, "fra_Latn", 0.9)]) == {}
    assert lfs(["x"], [IdentifiedText(french, "fra_Latn", 0.9, ("fra_Latn",))]) == {"lfs": 1.0}
    assert lfs(["x"], [IdentifiedText(french, "fra_Latn", 0.9, ("deu_Latn",))]) == {"lfs": 0.0}
    assert lfs(["x"], [IdentifiedText("", "unknown", 0.1, ("eng_Latn",))]) == {"lfs": 0.0}


def test_the_fingerprint_knows_tokens_tokenizer_config_and_adapters(neurons: NeuronSet) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(alpha: int) -> Any:
        torch.manual_seed(0)
        return get_peft_model(
            tiny_model("llama"), LoraConfig(target_modules=["down_proj"], r=2, lora_alpha=alpha)
        ).eval()

    other_words = tiny_tokenizer()
    other_words.add_tokens(["w1 w2"])
    stretched = tiny_model("llama")
    stretched.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    made = [
        loaded(),
        SteeredHFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), prefix_token_id=5),
        SteeredHFLM(tiny_model("llama"), tokenizer=other_words),
        SteeredHFLM(stretched, tokenizer=tiny_tokenizer()),
        SteeredHFLM(adapted(8), tokenizer=tiny_tokenizer()),
        SteeredHFLM(adapted(64), tokenizer=tiny_tokenizer()),
    ]
    assert len({lm.fingerprint for lm in made}) == len(made)
    assert loaded().fingerprint == made[0].fingerprint


def test_requests_made_for_another_language_are_refused(neurons: NeuronSet) -> None:
    lm = loaded()
    lm.intervene(neurons, **STRONG)
    for kind, arguments in (("loglikelihood", PAIRS[0]), ("generate_until", generating()[0].args)):
        stale = [Instance(kind, {MADE_FOR: ["deu_Latn"]}, arguments, 0)]
        with pytest.raises(
            SteeringError, match=r"made for deu_Latn, the model is steered to fra_Latn.*--cache_requests"
        ):
            getattr(lm, kind)(stale)


def test_a_failed_change_leaves_the_intervention_as_it_was(neurons: NeuronSet) -> None:
    lm = loaded()
    lm.intervene(neurons, **STRONG)
    before = lm.fingerprint
    foreign = make_set({"fra_Latn": [(0, 1)]}, "gpt2")
    tuned = make_set({"fra_Latn": [(0, 1)]})
    tuned = replace(tuned, provenance=replace(tuned.provenance, weights=(0.5,) * 256))
    for bad_set, change in ((neurons, {"language": "tur_Latn"}), (foreign, {}), (tuned, {}), (None, {})):
        with pytest.raises(SteeringError):
            lm.intervene(bad_set, **(STRONG | change))
        assert lm.fingerprint == before and lm.targets == ("fra_Latn",) and lm.neuron_set is neurons


def test_a_set_found_in_other_weights_of_the_same_shape_needs_force(folder: Path, neurons: NeuronSet) -> None:
    other = replace(neurons, provenance=replace(neurons.provenance, model="tuned", weights=(0.5,) * 256))
    other.save(folder / "tuned.safetensors")
    arguments = {"device": "cpu", "neurons": str(folder / "tuned.safetensors"), "language": "fr", "op": "scale"}
    with pytest.raises(SteeringError, match=r"found in tuned, whose weights are not those of.*force=true"):
        SteeredHFLM(str(folder / "model"), **arguments)
    assert SteeredHFLM(str(folder / "model"), force=True, **arguments).targets == ("fra_Latn",)
    hub = replace(neurons, provenance=replace(neurons.provenance, model="maker/tuned"))
    with pytest.raises(SteeringError, match="for maker/tuned, the model is maker/base"):
        refuse_other_name(hub, "maker/base")
    refuse_other_name(hub, "maker/tuned")
    refuse_other_name(hub, str(folder / "model"))


def half_precision() -> SteeredHFLM:
    return SteeredHFLM(tiny_model("llama").half(), tokenizer=tiny_tokenizer())


def test_overflowing_activations_are_neither_a_score_nor_cached(neurons: NeuronSet, tmp_path: Path) -> None:
    for _ in range(2):
        lm = half_precision()
        lm.intervene(neurons, language="fra_Latn", op="add", value=1, factor=1e6)
        with pytest.raises(SteeringError, match=r"activations overflowed torch\.float16"):
            CachingLM(lm, str(tmp_path / "cache.db")).loglikelihood(scoring())


def test_an_overflow_beyond_the_edited_units_is_seen_too(neurons: NeuronSet) -> None:
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 1] *= 20
    lm = SteeredHFLM(model, tokenizer=tiny_tokenizer())
    lm.intervene(neurons, language="fra_Latn", op="add", value=1, factor=3e4, site="product")
    for kind, requests in (("loglikelihood", scoring()), ("generate_until", generating())):
        with pytest.raises(SteeringError, match=r"activations overflowed torch\.float16"):
            getattr(lm, kind)(requests)


def test_a_large_finite_change_is_no_overflow(neurons: NeuronSet) -> None:
    """40000 - (-40000) is beyond float16, but no activation is."""
    model = tiny_model("llama").half()
    hook = model.model.layers[2].mlp.act_fn.register_forward_hook(
        lambda _m, _i, out: out.index_fill(-1, torch.tensor([3]), 40000)
    )
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[:, 3] = 0
        model.model.layers[2].mlp.up_proj.weight[3] = 0
    lm = SteeredHFLM(model, tokenizer=tiny_tokenizer())
    lm.intervene(neurons, language="fra_Latn", op="scale", factor=-1, layers="2")
    assert all(score[0] < 0 for score in lm.loglikelihood(scoring()))
    assert lm.steering_report()["evidence"]["largest_change"] == 80000
    hook.remove()


def test_ranks_sample_each_for_themselves_and_repeat_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 5.0, "until": []}
    requests = [Instance("generate_until", {}, ("w1 w2", settings), i) for i in range(4)]
    lm = loaded(batch_size=4)
    monkeypatch.setattr(lm, "_world_size", 3)
    found = []
    for rank in (0, 1, 2, 1):
        monkeypatch.setattr(lm, "_rank", rank)
        torch.manual_seed(7)
        found.append(tuple(lm.generate_until(requests)))
    assert len(set(found[:3])) == 3 and found[3] == found[1]


def test_both_passes_of_a_twin_use_the_batches_that_were_detected_once(
    neurons: NeuronSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([3, 1, 2, 2])
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda *_args, **_kwargs: next(sizes))
    lm = SteeredHFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size="auto", scoring="plain")
    lm.intervene(neurons, language="fra_Latn", op="scale", factor=1)
    seen: list[int] = []
    real = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda inps, **kwargs: (seen.append(len(inps)), real(inps, **kwargs))[1])
    assert all(score[0] == score.unsteered for score in lm.loglikelihood(scoring(twin=True)))
    half = len(seen) // 2
    assert seen[:half] == seen[half:]


def test_from_python_a_misspelt_argument_is_an_error_and_the_options_reach(neurons: NeuronSet) -> None:
    lm = loaded()
    with pytest.raises(SteeringError, match="unknown argument 'facter'; did you mean 'factor'"):
        lm.intervene(neurons, language="fra_Latn", op="scale", facter=3)
    tuned = replace(neurons, provenance=replace(neurons.provenance, weights=(0.5,) * 256))
    lm.intervene(tuned, force=True, **STRONG)
    assert lm.neuron_set is tuned
    lm.intervene(neurons, allow_empty=True, language="tur_Latn", op="scale", factor=2)
    assert lm.targets == ("tur_Latn",)
