"""Prompting: the instruction is in every prompt as it is sent, is counted there, and in nothing that lm-eval keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_steering.errors import DidNotHappenError, InterventionError, SteeringError
from lm_eval_steering.lmeval.arguments import SteeringArguments
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.prompting import Prompting
from lm_eval_steering.metrics.likelihood import preference_shift
from tests.conftest import make_set, tiny_model, tiny_tokenizer
from tests.lmeval.test_chat_template import IGNORING, KEEPING, REFUSING, YAML
from tests.lmeval.test_model import PAIRS, generating, loaded, scoring

FRENCH = {"instruction": "w9 w8", "language": "fra_Latn"}
TEXT = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13"


def plain(**arguments: Any) -> HFLM:
    return HFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=2, **arguments)


def log_probability(context: list[int], continuation: list[int]) -> float:
    """Summed log P(continuation | context), in nats, by three lines of PyTorch."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        each = tiny_model("llama")(tokens).logits[0].log_softmax(-1)[len(context) - 1 : -1]
    return float(each.gather(1, torch.tensor(continuation)[:, None]).sum())


def ids(text: str) -> list[int]:
    return tiny_tokenizer().encode(text, add_special_tokens=False)


@pytest.mark.parametrize("method", ["auto", "plain"])
def test_scores_are_those_of_prompts_that_begin_with_the_instruction(method: str) -> None:
    lm = loaded(scoring=method, **FRENCH)
    by_hand = [replace(each, arguments=(f"w9 w8\n{each.args[0]}", each.args[1])) for each in scoring()]
    expected = [score[0] for score in plain().loglikelihood(by_hand)]
    scores = lm.loglikelihood(scoring())
    assert [score[0] for score in scores] == pytest.approx(expected, abs=1e-5)
    assert [score.tokens for score in scores] == [2, 1, 3, 1]  # the instruction is no part of the continuation
    assert all(score.targets == ("fra_Latn",) for score in scores)
    assert lm.steering_report()["evidence"] == {"prompts": 4, "rank": "0 of 1"}


def test_a_text_without_a_prompt_comes_after_bos_and_the_instruction() -> None:
    lm = loaded(**FRENCH)
    expected = log_probability([0, *ids("w9 w8")], ids(TEXT))
    (score,) = lm.loglikelihood([Instance("loglikelihood", {}, ("", TEXT), 0)])
    (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)])
    (blank,) = lm.loglikelihood([Instance("loglikelihood", {}, (" \n", TEXT), 0)])
    assert [score[0], rolling, blank[0]] == pytest.approx([expected] * 3, abs=1e-5)
    assert score.tokens == rolling.tokens == 13


@pytest.mark.parametrize("method", ["auto", "plain"])
def test_every_window_of_a_long_text_begins_with_the_instruction(method: str) -> None:
    """Seven tokens fit: the prefix, two of the instruction, and four of the text in the first window, as many in others
    after the last token of the window before."""
    lm = loaded(scoring=method, max_length=7, **FRENCH)
    head, text = [0, *ids("w9 w8")], ids(TEXT)
    windows = [(head, text[:4]), ([*head, text[3]], text[4:8]), ([*head, text[7]], text[8:12])]
    expected = sum(log_probability(*window) for window in windows)
    expected += log_probability(
        [*head, *text[8:12]], text[12:]
    )  # the last window takes the context that it has room for
    (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)])
    assert rolling == pytest.approx(expected, abs=1e-5) and rolling.tokens == 13
    document = {"too_long": True, "text": TEXT}
    (score,) = lm.loglikelihood([Instance("loglikelihood", document, ("", "w1 w2"), 0)])
    assert score[0] == pytest.approx(expected, abs=1e-5) and score.tokens == 13
    assert lm.steering_report()["evidence"]["prompts"] == 8
    long = loaded(max_length=3, **FRENCH)
    with pytest.raises(InterventionError, match=r"the instruction has 2 tokens.*3"):
        long.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)])


def test_texts_are_those_of_prompts_that_begin_with_the_instruction() -> None:
    lm = loaded(**FRENCH)
    by_hand = [replace(each, arguments=(f"w9 w8\n{each.args[0]}", each.args[1])) for each in generating()]
    texts = lm.generate_until(generating())
    assert list(texts) == plain().generate_until(by_hand) != plain().generate_until(generating())
    assert {text.targets for text in texts} == {("fra_Latn",)}
    assert lm.steering_report()["evidence"]["prompts"] == 2


def test_an_empty_instruction_is_the_unsteered_model_to_the_last_bit() -> None:
    lm, unsteered = loaded(), loaded()
    for instruction in ("", "  \n"):
        lm.intervene(instruction=instruction, language="fra_Latn")
        assert lm.loglikelihood(scoring()) == unsteered.loglikelihood(scoring())
        rolling = [Instance("loglikelihood_rolling", {}, (TEXT,), 0)]
        assert lm.loglikelihood_rolling(rolling) == unsteered.loglikelihood_rolling(rolling)
        assert lm.generate_until(generating()) == unsteered.generate_until(generating())
        twins = lm.loglikelihood(scoring(twin=True))
        assert all(score[0] == score.unsteered for score in twins)
        assert preference_shift(twins[0], twins[1]) == 0.0


def test_twins_are_of_the_two_prompts() -> None:
    lm, unsteered = loaded(**FRENCH), loaded()
    twins = lm.loglikelihood(scoring(twin=True))
    assert [score[0] for score in twins] == [score[0] for score in lm.loglikelihood(scoring())]
    without = [score[0] for score in unsteered.loglikelihood(scoring())]
    assert [score.unsteered for score in twins] == pytest.approx(without, abs=1e-6)
    shift = preference_shift(twins[0], twins[1])
    assert shift == pytest.approx((twins[1][0] - without[1]) - (twins[0][0] - without[0]), abs=1e-5) and shift != 0
    assert lm.steering_report()["evidence"]["prompts"] == 8  # those without it are not counted


def test_the_request_cache_tells_instructions_apart_and_a_resumed_run_misses_nothing(tmp_path: Path) -> None:
    lm = loaded(batch_size=1)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    other = FRENCH | {"instruction": "w9 w7"}
    ran, texts, scores = [], [], []
    for arguments in (FRENCH, other, FRENCH, {}):
        lm.intervene(**arguments)
        scores.append(cached.loglikelihood(scoring()))
        texts.append(cached.generate_until(generating()))
        ran.append(lm.prompting.sent)
    assert ran == [6, 6, 0, 0] and scores[0] == scores[2] and texts[0] == texts[2]
    assert scores[0] != scores[1] != scores[3] != scores[0]
    fresh = loaded(**other)
    assert [score[0] for score in scores[1]] == pytest.approx([score[0] for score in fresh.loglikelihood(scoring())])

    stopped = loaded(batch_size=1, **FRENCH)
    half = CachingLM(stopped, str(tmp_path / "half.db"))
    real, calls = stopped._model_generate, []

    def stop_at_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    stopped._model_generate = stop_at_the_second  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        half.generate_until(generating())
    half.dbdict.close()
    again = loaded(batch_size=1, **FRENCH)
    assert CachingLM(again, str(tmp_path / "half.db")).generate_until(generating()) == texts[0]
    assert again.prompting.sent == 1


def test_identity_knows_the_instruction_and_the_signature_says_it() -> None:
    lm = loaded()
    fingerprints = []
    for change in (
        {}, {"instruction": "w9 w7"}, {"language": "deu_Latn"}, {"instruction_names": "native"}, {"instruction": ""},
    ):  # fmt: skip
        lm.intervene(**(FRENCH | change))
        fingerprints.append(lm.fingerprint)
    lm.intervene()
    assert len({*fingerprints, lm.fingerprint}) == 6
    lm.intervene(instruction="Answer in {language}; or | not.", language="fr", instruction_names="native")
    text = '"Answer in français\\u003b or \\u007c not."'
    assert lm.signature.startswith(f"prompt:{text}|names:native|lang:fra_Latn|lid:")
    report = lm.steering_report()
    assert report["intervention"]["prompt"]["instruction"] == "Answer in français; or | not."
    assert report["target_languages"] == ["fra_Latn"] and "neuron_set" not in report
    lm.intervene(instruction="Answer in {language}.", language="deu_Latn", target_language="fra_Latn")
    assert lm.targets == ("fra_Latn",) and '"Answer in German."|lang:deu_Latn' in lm.signature  # as a control


# --- Evidence


def test_prompts_that_lose_the_instruction_are_an_error() -> None:
    lm = loaded(max_length=7, **FRENCH)
    fits = Instance("loglikelihood", {}, ("w1 w2", " w3 w4 w5"), 0)
    assert lm.loglikelihood([fits])
    long = Instance("loglikelihood", {}, ("w1 w2 w3 w4 w5 w6", " w7"), 0)
    with pytest.raises(DidNotHappenError, match=r"1 of 2 prompts do not carry the instruction 'w9 w8'.*max_length="):
        lm.loglikelihood([fits, long])
    generate = Instance("generate_until", {}, ("w1 w2 w3 w4", {"max_gen_toks": 2, "do_sample": False}), 0)
    with pytest.raises(DidNotHappenError, match="1 of 1 prompts"):
        lm.generate_until([generate])


def test_an_instruction_that_reaches_no_prompt_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = loaded(**FRENCH)
    monkeypatch.setattr(Prompting, "with_instruction", lambda self, context: context)
    with pytest.raises(DidNotHappenError, match="do not carry"):
        lm.loglikelihood(scoring()[:1])
    with pytest.raises(DidNotHappenError, match="do not carry"):
        lm.generate_until(generating())
    monkeypatch.setattr(Prompting, "prove", lambda self, prompts: None)
    with pytest.raises(DidNotHappenError, match="4 requests were answered and no prompt carried"):
        lm.loglikelihood(scoring())


# --- Chat templates

ROLES = "{% for message in messages %}w40 {{ message['role'] }} {{ message['content'] }} w41 {% endfor %}w42 "


def evaluated(folder: Path, template: str, **arguments: Any) -> tuple[list[str], dict[str, Any], SteeredHFLM]:
    """Prompts as the model reads them, lm-eval's results, and the model."""
    (folder / "items.jsonl").write_text('{"question": "w3 w4"}\n{"question": "w5"}\n')
    (folder / "template_choice.yaml").write_text(YAML.format(folder=folder))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["user", "system"])
    tokenizer.chat_template = template
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))  # type: ignore[attr-defined, operator]
    lm = SteeredHFLM(model, tokenizer=tokenizer, batch_size=2, max_length=64, **arguments)
    read: list[str] = []
    score = lm._log_likelihoods

    def spy(requests: list[Any], *rest: Any) -> Any:
        read.extend(tokenizer.decode(request[1]) for request in requests)
        return score(requests, *rest)

    lm._log_likelihoods = spy  # type: ignore[method-assign]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(
        model=lm, tasks=["template_choice"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0,
        system_instruction="w7",
    )  # fmt: skip
    assert results is not None
    return list(dict.fromkeys(read)), results, lm


def test_in_a_template_it_begins_the_user_s_message_or_the_system_s(tmp_path: Path) -> None:
    unsteered, before, _ = evaluated(tmp_path, ROLES)
    assert unsteered[0] == "<s> w40 system w7 w41 w40 user w3 w4 w41 w42"
    user, after, lm = evaluated(tmp_path, ROLES, **FRENCH)
    assert user[0] == "<s> w40 system w7 w41 w40 user w9 w8 w3 w4 w41 w42"
    assert lm.prompting.sent == 4
    system, _, _ = evaluated(tmp_path, ROLES, **FRENCH, instruction_system=True)
    assert system[0] == "<s> w40 system w9 w8 w7 w41 w40 user w3 w4 w41 w42"
    # What lm-eval keeps is without it: the samples of both runs pair.
    for key in ("prompt_hash", "doc_hash", "arguments"):
        kept = [[sample[key] for sample in run["samples"]["template_choice"]] for run in (before, after)]
        assert kept[0] == kept[1]


def test_a_template_without_a_system_role_is_refused(tmp_path: Path) -> None:
    for template in (REFUSING, IGNORING):
        with pytest.raises(InterventionError, match=r"leaves the system message's text out.*leave instruction_system"):
            evaluated(tmp_path, template, **FRENCH, instruction_system=True)
    user, _, _ = evaluated(tmp_path, REFUSING, **FRENCH)  # lm-eval takes the system role away
    assert user[0] == "<s> w9 w8 w3 w4"


def test_a_system_instruction_needs_a_template_around_the_prompt() -> None:
    with pytest.raises(InterventionError, match="the model's tokenizer has no chat template"):
        loaded(**FRENCH, instruction_system=True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = KEEPING
    lm = SteeredHFLM(tiny_model("llama"), tokenizer=tokenizer, **FRENCH, instruction_system=True)
    with pytest.raises(InterventionError, match=r"the prompt is in no chat template.*--apply_chat_template"):
        lm.loglikelihood(scoring()[:1])
    (text,) = lm.loglikelihood([Instance("loglikelihood", {}, ("", TEXT), 0)])  # has no prompt that could be in one
    assert text[0] == pytest.approx(log_probability([0, *ids("w9 w8")], ids(TEXT)), abs=1e-5)


def test_prompts_that_were_put_into_the_template_elsewhere_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ROLES
    lm = SteeredHFLM(tiny_model("llama"), tokenizer=tokenizer, **FRENCH)
    with pytest.raises(InterventionError, match="--cache_requests"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("w40 user w3 w41 w42 ", "w1"), 0)])
    assert lm.loglikelihood(scoring()[:1])  # a bare prompt of the same model


# --- Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instruction": "Answer."}, "instruction= without language="),
        ({"instruction_names": "native", "language": "fra_Latn"}, "instruction_names= without instruction="),
        (FRENCH | {"op": "scale"}, "op= conflicts with instruction="),
        (FRENCH | {"factor": 2}, "factor= conflicts with instruction="),
        (FRENCH | {"layers": "1-2"}, "layers= conflicts with instruction="),
        (FRENCH | {"neurons": "demo"}, "neurons= conflicts with an instruction"),
        (FRENCH | {"language": "fra_Latn+deu_Latn"}, "names one language"),
        (FRENCH | {"language": "xx_Latn"}, "unknown language"),
        (FRENCH | {"instruction": "Answer in {lang}."}, r"unknown \{lang\}; expected \{language\}"),
        (FRENCH | {"instruction": 5}, "instruction=5: expected text"),
        (FRENCH | {"instruction_names": "french"}, "instruction_names='french': expected english or native"),
        (FRENCH | {"instruction_system": "maybe"}, "instruction_system='maybe': expected True or False"),
        (
            {"instruction": "{language}", "language": "fon_Latn", "instruction_names": "native"},
            "language 'fon_Latn': the name of Fon in the language itself is not known",
        ),
        ({"intervention": [FRENCH, {"language": "fra_Latn", "op": "scale"}]}, "step 1: instruction stands alone"),
        ({"intervention": [FRENCH | {"op": "add"}]}, "step 1: op= conflicts with instruction="),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        SteeringArguments(**arguments)


def test_a_file_holds_what_model_args_cannot(tmp_path: Path) -> None:
    file = tmp_path / "prompt.yaml"
    file.write_text('- {instruction: "w1, w2 = {language}?", language: fra, instruction_names: native}\n')
    lm = loaded(intervention=str(file))
    assert lm.signature.startswith('prompt:"w1, w2 = français?"|names:native|lang:fra_Latn|')
    with pytest.raises(InterventionError, match="an instruction changes no neurons; leave the neuron set out"):
        lm.intervene(make_set({"fra_Latn": [(0, 1)]}), **FRENCH)
    assert lm.intervention.prompt is not None and "français" in lm.intervention.prompt.instruction  # it stays on
    assert len(PAIRS) == len(lm.loglikelihood(scoring()))
