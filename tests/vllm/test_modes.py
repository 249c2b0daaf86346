"""The demo model in four engines: eager and compiled, one worker and two tensor-parallel ones, against `steered-hf`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from lm_eval_steering.errors import InterventionError, NeuronSetError, SteeringError
from lm_eval_steering.metrics.output_language import IdentifiedText, forced
from lm_eval_steering.resources import demo_model
from tests.vllm.conftest import answers, demo_set, furthest, generating, hooks, right, rolling, scoring

INTERVENTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"language": "fra_Latn", "op": "scale", "factor": 3},
    "negate": {"language": "deu_Latn", "op": "scale", "factor": -1},
    "add-product": {"language": "fra_Latn", "op": "add", "value": "mean", "factor": 4, "site": "product"},
    "set": {"language": "spa_Latn", "op": "set", "value": "max"},
    "deactivate": {"deactivate": "eng_Latn"},
    "two-languages": {"language": "fra_Latn+deu_Latn", "op": "add", "value": 1.5, "deactivate": "others"},
    "layers": {"language": "jpn_Jpan", "op": "scale", "factor": 2, "layers": "0-1+4", "site": "product"},
    "layers-of-one-stage": {"language": "jpn_Jpan", "op": "scale", "factor": 2, "layers": "4-5"},
    "both-sites": {
        "intervention": [
            {"language": "fra_Latn", "op": "set", "value": "mean", "factor": 2},
            {"language": "fra_Latn", "op": "scale", "factor": 1.5, "site": "product"},
        ]
    },
    # Layers 2 and 3 are the last of one stage of a pipeline and the first of the next.
    "hidden-states": {"language": "fra_Latn", "op": "add", "value": "diffmean", "factor": 2, "site": "residual"}
    | {"layers": "2-3"},
    "few-dimensions": {"language": "deu_Latn", "op": "set", "value": "mean", "factor": 1.5, "site": "residual"}
    | {"layers": "1+5", "dimensions": 7},
    "every-site": {
        "intervention": [
            {"language": "fra_Latn", "op": "scale", "factor": 2},
            {"language": "fra_Latn", "op": "scale", "factor": 1.5, "site": "product"},
            {
                "language": "spa_Latn",
                "op": "scale",
                "factor": -0.5,
                "site": "residual",
                "layers": "0-5",
                "dimensions": 3,
            },
            {"language": "spa_Latn", "source": "eng_Latn", "op": "add", "value": "clas_diffmean", "factor": 2}
            | {"site": "residual", "layers": "4"},
        ]
    },
}
ALL_HIDDEN_STATES = {"language": "fra_Latn", "site": "residual", "layers": "0-5"}


def steer(lm: Any, name: str) -> None:
    arguments = INTERVENTIONS[name]
    lm.intervene(demo_set() if arguments else None, **arguments)


@cache
def expected(name: str) -> tuple[list[Any], list[Any], list[str]]:
    """What `steered-hf` answers."""
    lm = hooks()
    steer(lm, name)
    return (
        lm.loglikelihood(scoring(), disable_tqdm=True),
        lm.loglikelihood_rolling(rolling(), disable_tqdm=True),
        lm.generate_until(generating(), disable_tqdm=True),
    )


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_answers_are_those_of_steered_hf(steered: Any, name: str, record_property: Any) -> None:
    steer(steered, name)
    scores, texts, greedy = expected(name)
    found = steered.loglikelihood(scoring(), disable_tqdm=True)
    record_property("furthest", furthest(found, scores))
    assert furthest(found, scores) < 1e-4
    assert right(found) == right(scores)
    assert [score[1] for score in found] == [score[1] for score in scores]
    assert [score.tokens for score in found] == [score.tokens for score in scores]
    whole = steered.loglikelihood_rolling(rolling(), disable_tqdm=True)
    assert furthest(whole, texts) < 1e-4
    assert [score.tokens for score in whole] == [score.tokens for score in texts]
    assert list(steered.generate_until(generating(), disable_tqdm=True)) == list(greedy)


def test_factors_change_without_a_trace_and_nothing_is_compiled(steered: Any) -> None:
    assert steered.steering.report()["prefix_caching"]
    before = steered.steering.compilations()
    found = []
    for factor in (1, 3, 1):
        steered.intervene(
            demo_set(),
            intervention=[
                {"language": "fra_Latn", "op": "scale", "factor": factor},
                {
                    "language": "fra_Latn",
                    "op": "scale",
                    "factor": (factor + 1) / 2,
                    "site": "residual",
                    "layers": "1-3",
                },
            ],
        )
        # Twice, so that the second is read from the prefix cache.
        twice = [steered.generate_until(generating(max_gen_toks=40), disable_tqdm=True) for _ in range(2)]
        assert twice[0] == twice[1]
        found.append((steered.loglikelihood(scoring(), disable_tqdm=True), twice))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert steered.steering.compilations() == before
    if not steered.mode.eager:
        assert sum(sum(one.values()) for one in before) > 0, "the counters saw that this engine was compiled"


@pytest.mark.parametrize(
    "op",
    [
        {"op": "scale", "factor": 1},
        {"op": "add", "value": "mean", "factor": 0},
        {"op": "add", "value": "diffmean", "factor": 0, **ALL_HIDDEN_STATES},
    ],
)
def test_an_identity_shifts_nothing_and_is_counted(steered: Any, op: dict[str, Any]) -> None:
    steered.intervene(demo_set(), **{"language": "fra_Latn", **op})
    both = steered.loglikelihood(scoring(twice=True), disable_tqdm=True)
    assert [score[0] - score.unsteered for score in both] == [0.0] * len(both)
    evidence = steered.steering.evidence()
    assert evidence.positions >= evidence.asked > 0
    assert evidence.largest_change == 0.0


def test_rows_that_are_scored_twice_have_the_unsteered_score(steered: Any) -> None:
    steered.intervene()
    unsteered = steered.loglikelihood(scoring(), disable_tqdm=True)
    steer(steered, "add-product")
    both = steered.loglikelihood(scoring(2) + scoring(twice=True), disable_tqdm=True)
    once, twice = both[: len(scoring(2))], both[len(scoring(2)) :]
    assert {score.unsteered for score in once} == {None}
    assert [score.unsteered for score in twice] == [score[0] for score in unsteered]
    assert furthest(twice, expected("add-product")[0]) < 1e-4, "steered before the unsteered pass, and after it"
    assert furthest(steered.loglikelihood(scoring(), disable_tqdm=True), expected("add-product")[0]) < 1e-4


def test_rows_that_are_scored_twice_go_one_by_one_where_batches_matter(
    steered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steer(steered, "add-product")
    together = steered.loglikelihood(scoring(2, twice=True), disable_tqdm=True)
    sizes: list[int] = []
    parents = type(steered)._model_generate

    def counted(lm: Any, requests: Any, *more: Any, **arguments: Any) -> Any:
        sizes.append(len(requests))
        return parents(lm, requests, *more, **arguments)

    monkeypatch.setattr(type(steered), "_model_generate", counted)
    monkeypatch.setattr("lm_eval_steering.vllm.compat.batches_matter", lambda: True)
    apart = steered.loglikelihood(scoring(2, twice=True), disable_tqdm=True)
    assert set(sizes) == {1} and len(sizes) == 2 * len(apart)
    assert furthest(apart, together) < 1e-4
    assert furthest([(one.unsteered,) for one in apart], [(one.unsteered,) for one in together]) < 1e-4
    assert steered.batch_size == "auto", "other requests go together again"


def test_evidence_counts_what_the_requests_needed(steered: Any) -> None:
    steer(steered, "add-product")
    start = steered.steering.evidence()
    assert (start.positions, start.asked, start.forwards) == (0, 0, 0)
    pairs = scoring(2)
    steered.loglikelihood(pairs, disable_tqdm=True)
    evidence = steered.steering.evidence()
    whole = sum(len(steered.tok_encode("".join(pair.args))) for pair in pairs)
    assert evidence.asked == whole
    assert evidence.positions == whole, "each token once: no warm-up, no padding"
    assert evidence.forwards > 0
    assert evidence.largest_change > 0.5
    assert evidence.neurons == hooks_plan("add-product").neurons
    assert [one["tensor_rank"] for one in evidence.workers] == list(range(steered.mode.workers))
    assert all(
        one["layers"] == "0-5" and one["fewest_tokens"] == whole for one in evidence.workers if one["edited_layers"]
    )


def test_each_worker_edits_all_dimensions_of_each_token_once(steered: Any) -> None:
    steer(steered, "hidden-states")
    pairs = scoring(2)
    steered.loglikelihood(pairs, disable_tqdm=True)
    evidence, plan = steered.steering.evidence(), hooks_plan("hidden-states")
    whole = sum(len(steered.tok_encode("".join(pair.args))) for pair in pairs)
    assert evidence.positions == evidence.asked == whole
    assert (evidence.modules, evidence.neurons) == (2, plan.neurons) and plan.neurons == 2 * demo_set().dimensions
    vectors = 2 * demo_set().hidden_states("fra_Latn", "diffmean")[2:4]
    assert evidence.largest_change == pytest.approx(abs(vectors).max(), rel=1e-5)
    numbers = ("edited_layers", "fewest_tokens", "most_tokens")
    assert [[one[name] for name in numbers] for one in evidence.workers] == [[2, whole, whole]] * steered.mode.workers


def hooks_plan(name: str) -> Any:
    lm = hooks()
    steer(lm, name)
    return lm.steering.plan


def test_the_report_names_the_engine_beside_the_fingerprint(steered: Any) -> None:
    steer(steered, "add-product")
    steered.loglikelihood(scoring(1), disable_tqdm=True)
    report = steered.get_model_info()["steering"]
    engine = report["engine"]
    assert engine["name"] == "vllm" and engine["release"].startswith("0.")
    assert engine["tensor_parallel_size"] == steered.mode.workers
    assert (engine["compilation"] == "NONE") == steered.mode.eager
    assert report["evidence"]["positions"] > 0
    assert report["signature"].startswith("op:add|value:mean|factor:4|lang:fra_Latn|site:product")
    assert report["target_languages"] == ["fra_Latn"]
    lm = hooks()
    steer(lm, "add-product")
    assert report["fingerprint"] != lm.fingerprint
    FINGERPRINTS.add(report["fingerprint"])
    assert len(FINGERPRINTS) == 1, "parallel sizes and compilation are no part of it"


FINGERPRINTS: set[str] = set()


def test_texts_know_their_language_and_target(steered: Any) -> None:
    steer(steered, "two-languages")
    texts = steered.generate_until(generating(2, min_new_tokens=12), disable_tqdm=True)
    assert all(isinstance(text, IdentifiedText) and text.targets == ("fra_Latn", "deu_Latn") for text in texts)
    assert all(forced(text) in (0.0, 1.0) for text in texts)
    steered.intervene(target_language="fra_Latn")
    (text,) = steered.generate_until(generating(1), disable_tqdm=True)
    assert text.targets == ("fra_Latn",)


def test_sampled_texts_do_not_depend_on_what_was_sampled_before(steered: Any) -> None:
    steer(steered, "scale")
    requests = generating(3, do_sample=True, temperature=0.8)
    first = steered.generate_until(requests, disable_tqdm=True)
    again = steered.generate_until(requests[::-1], disable_tqdm=True)[::-1]
    assert first == again
    same = steered.generate_until([requests[0]] * 3, disable_tqdm=True)
    assert same[0] == first[0] and len(set(same)) > 1, "repeats of one prompt draw anew"


def test_generation_arguments_are_translated_or_refused(steered: Any) -> None:
    steered.intervene()
    long = {"min_new_tokens": 10, "num_beams": 1, "use_cache": True, "until": []}
    (text,) = steered.generate_until(generating(1, **long), disable_tqdm=True)
    assert len(steered.tok_encode(text, add_special_tokens=False)) >= 9
    with pytest.raises(SteeringError, match="num_beams=4: vLLM has no such thing"):
        steered.generate_until(generating(1, num_beams=4), disable_tqdm=True)


def test_what_is_refused_leaves_the_intervention_on(steered: Any) -> None:
    steer(steered, "scale")
    before = steered.fingerprint
    for wrong, message in [
        ({"positions": "prompt"}, "positions=prompt"),
        ({"value": "live_max", "op": "add"}, "live"),
        ({"value": "normal", "op": "add"}, "random"),
        ({"factor": "nan"}, "factor"),
        ({"site": "residual", "layers": "2", "positions": "last"}, "positions=last"),
        ({"site": "residual", "layers": "2", "value": "live_mean", "op": "add"}, "live"),
        ({"site": "residual", "layers": "6"}, "layers='6'"),
    ]:
        with pytest.raises(InterventionError, match=message):
            steered.intervene(demo_set(), **{"language": "fra_Latn", "op": "scale", **wrong})
    narrow = replace(demo_set(), residual={"mean": demo_set().residual["mean"][:, :8]})
    with pytest.raises(InterventionError, match=r"layer 0 returns \d+ dimensions, the neuron set has statistics of 8"):
        steered.intervene(narrow, op="scale", factor=2, **ALL_HIDDEN_STATES)
    with pytest.raises(SteeringError, match="klingon"):
        steered.intervene(demo_set(), language="klingon", op="scale", factor=2)
    assert steered.fingerprint == before
    assert furthest(steered.loglikelihood(scoring(), disable_tqdm=True), expected("scale")[0]) < 1e-4


def test_the_request_cache_knows_the_intervention(steered: Any, tmp_path: Path) -> None:
    steer(steered, "scale")
    cached = CachingLM(steered, str(tmp_path / "cache.db"))
    first = cached.loglikelihood(scoring(1))
    start = steered.steering.evidence().forwards
    again = cached.loglikelihood(scoring(1))
    assert again == first and [score.tokens for score in again] == [score.tokens for score in first]
    assert steered.steering.evidence().forwards == start, "the second time nothing was run"
    steer(steered, "none")
    assert cached.loglikelihood(scoring(1)) != first
    steered.set_cache_hook(type(steered.cache_hook).__mro__[1](None))


@pytest.mark.parametrize("more", [None, {}, ALL_HIDDEN_STATES])
def test_an_identity_is_plain_vllm(steered: Any, more: dict[str, Any] | None) -> None:
    """Bit-equal, eager and compiled; with two workers an identity is compared with the unsteered engine."""
    if steered.plain_answers is None:
        steered.intervene()
        before = answers(steered)
    else:
        before = steered.plain_answers
    if more is not None:
        steered.intervene(demo_set(), **{"language": "fra_Latn", "op": "scale", "factor": 1, **more})
    else:
        steered.intervene()
    assert answers(steered) == before


def test_a_set_of_other_weights_is_refused_before_the_engine_starts(vllm: None, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm_eval_steering.vllm.model import SteeredVLLM

    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(tmp_path)
    with pytest.raises(NeuronSetError, match="whose weights are not those of"):
        SteeredVLLM(str(tmp_path), neurons="demo", language="fra_Latn", op="scale", factor=2)


def test_repeated_prompts_are_no_trouble(steered: Any) -> None:
    steer(steered, "scale")
    pairs = [Instance("loglikelihood", {}, ("Hello", " world"), number) for number in range(3)]
    assert len({score[0] for score in steered.loglikelihood(pairs, disable_tqdm=True)}) == 1


def test_prompting_is_that_of_steered_hf(steered: Any) -> None:
    """The model reads the same tokens: scores to the tolerance of two engines, and the same greedy texts."""
    for instruction in ("Answer in {language}.", ""):
        arguments = {"instruction": instruction, "language": "fra_Latn"}
        for lm in (steered, hooks()):
            lm.intervene(**arguments)
        many = [*scoring(), Instance("loglikelihood", {}, ("", "Je ne sais pas."), 99)]
        found, expected = (lm.loglikelihood(many, disable_tqdm=True) for lm in (steered, hooks()))
        assert furthest(found, expected) < 1e-4
        assert [score.tokens for score in found] == [score.tokens for score in expected]
        twins, theirs = (lm.loglikelihood(scoring(2, twice=True), disable_tqdm=True) for lm in (steered, hooks()))
        assert furthest([twin.unsteered for twin in twins], [twin.unsteered for twin in theirs]) < 1e-4
        assert all((twin[0] == twin.unsteered) == (not instruction) for twin in twins)
        texts, same = (lm.loglikelihood_rolling(rolling(), disable_tqdm=True) for lm in (steered, hooks()))
        assert furthest(texts, same) < 1e-4 and [text.tokens for text in texts] == [text.tokens for text in same]
        generated = [list(lm.generate_until(generating(), disable_tqdm=True)) for lm in (steered, hooks())]
        assert generated[0] == generated[1]
        evidence = [lm.steering_report()["evidence"] for lm in (steered, hooks())]
        assert evidence[0] == evidence[1] and (evidence[0]["prompts"] > 40) == bool(instruction)
    hooks().intervene()
