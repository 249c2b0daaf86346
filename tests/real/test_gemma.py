"""google/gemma-3-270m in float32: the set that ships, every check of `doctor`, `hf`'s scores, an oracle, an output.

`make test-real` writes the checkpoint and runs this. Elsewhere it skips; with CI_REAL=1 that is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_steering.analysis.doctor import examine, plain_text
from lm_eval_steering.files import read_json_lines
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families.demo import sentence
from lm_eval_steering.lmeval.task_families.parallel import joint
from lm_eval_steering.metrics.degenerate import degenerate
from lm_eval_steering.metrics.likelihood import NEEDS_UNSTEERED_SCORE
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.resources import demo_sentences

FOLDER = Path(os.environ.get("GEMMA_3_270M") or Path.home() / ".cache" / "lm-eval-steering" / "gemma-3-270m-q4km")
MISSING = f"{FOLDER} holds no checkpoint of google/gemma-3-270m; `make test-real` writes it (GEMMA_3_270M=FOLDER)"
FRENCH, ENGLISH = "fra_Latn", "eng_Latn"
# Of the twelve questions of `steering_forcing_eng_Latn`, which ends after 24 tokens.
QUESTIONS = (
    "Which season do you like best?",
    "Which animals do you like?",
    "Where can I buy fresh bread?",
    "What time do you get up in the morning?",
)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    if not (FOLDER / "config.json").is_file():
        (pytest.fail if os.environ.get("CI_REAL") == "1" else pytest.skip)(MISSING)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def neurons() -> NeuronSet:
    return NeuronSet.load("gemma-3-270m-q4km-lape-1")


@pytest.fixture(scope="module")
def steered(loaded: tuple[Any, Any]) -> SteeredHFLM:
    return SteeredHFLM(loaded[0], tokenizer=loaded[1], batch_size=8)


# --- fifty items ----------------------------------------------------------------------------------------------------


SENTENCES = [row["sentence"] for row in read_json_lines(demo_sentences())]


def clauses(number: int, language: str) -> tuple[str, str]:
    """The two clauses of one of the demo's sentences."""
    first, second = SENTENCES[number][language]
    return first, second


def items() -> list[Instance]:
    """Ten premises with two options each, ten LSS items with two continuations each, and ten texts after BOS."""
    blank = joint(FRENCH, FRENCH)
    requests = []
    for number in range(10):
        premise, right = clauses(number, FRENCH)
        wrong = clauses(number + 7, FRENCH)[1]
        requests += [Instance("loglikelihood", {}, (premise, blank + option), 0) for option in (right, wrong)]
    for number in range(10, 20):
        base, target = clauses(number, ENGLISH), clauses(number, FRENCH)
        document = {"id": number, NEEDS_UNSTEERED_SCORE: True}
        requests += [Instance("loglikelihood", document, (base[0], f" {part[1]}"), 0) for part in (base, target)]
    requests += [Instance("loglikelihood", {}, ("", sentence(number, FRENCH)), 0) for number in range(20, 30)]
    return requests


def tokens_of(request: Instance, tokenizer: Any) -> tuple[list[int], int]:
    """Token ids with BOS, and how many of them are the context."""
    context, continuation = request.args
    if not context:
        return [tokenizer.bos_token_id, *tokenizer(continuation, add_special_tokens=False).input_ids], 1
    ids = tokenizer(context + continuation).input_ids
    assert ids[0] == tokenizer.bos_token_id
    return ids, len(tokenizer(context).input_ids)


# --- the oracle: hooks of our own making in this file, rows alone, and float64 from the last hidden states on -------

Edit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (values, calibrated means) -> new values
OPERATIONS: dict[str, tuple[dict[str, Any], Edit]] = {
    "scale": ({"language": FRENCH, "op": "scale", "factor": 2}, lambda values, _: values * 2),
    "add": (
        {"language": FRENCH, "op": "add", "value": "mean", "factor": 0.5},
        lambda values, mean: values + 0.5 * mean,
    ),
    "set": (
        {"language": FRENCH, "op": "set", "value": "mean", "factor": 1.5},
        lambda values, mean: (1.5 * mean).expand_as(values),
    ),
    "deactivate": ({"deactivate": FRENCH}, lambda values, _: torch.zeros_like(values)),
}


@contextmanager
def edited(model: Any, neurons: NeuronSet, site: str, edit: Edit) -> Iterator[None]:
    """The model with the French neurons edited by plain hooks."""
    rows = torch.from_numpy(neurons.neurons(FRENCH))
    means = torch.from_numpy(neurons.statistics(FRENCH, "mean", site=site))
    handles = []
    for number, layer in enumerate(model.model.layers):
        units, mean = rows[rows[:, 0] == number, 1], means[rows[:, 0] == number]
        if not len(units):
            continue

        def change(values: torch.Tensor, units: torch.Tensor = units, mean: torch.Tensor = mean) -> torch.Tensor:
            values = values.clone()
            values[..., units] = edit(values[..., units], mean)
            return values

        if site == "activation":
            handles.append(layer.mlp.act_fn.register_forward_hook(lambda _m, _i, out, change=change: change(out)))
        else:
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _m, i, change=change: (change(i[0]),)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def hidden_states(model: Any, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """(position, hidden) last hidden states of each row, all rows in one batch padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return [states[number, : len(row)] for number, row in enumerate(rows)]


@torch.inference_mode()
def log_probabilities(
    states: Sequence[torch.Tensor], rows: Sequence[tuple[list[int], int]], head: torch.Tensor
) -> list[torch.Tensor]:
    """Of each row's tokens after its context, from the last hidden states on in the dtype of the head."""
    predicting = torch.cat([of_row[context - 1 : -1] for of_row, (_, context) in zip(states, rows, strict=True)])
    wanted = torch.tensor([token for ids, context in rows for token in ids[context:]])
    scores = []
    for hidden, tokens in zip(predicting.split(128), wanted.split(128), strict=True):  # 0.3 GB of logits at a time
        logits = (hidden.to(head.dtype) @ head).log_softmax(-1)
        scores.append(logits.gather(1, tokens[:, None])[:, 0].double())
    return list(torch.cat(scores).split([len(ids) - context for ids, context in rows]))


@pytest.fixture(scope="module")
def head(loaded: tuple[Any, Any]) -> torch.Tensor:
    """(hidden, vocabulary) float64."""
    assert loaded[0].config.final_logit_softcapping is None
    return loaded[0].lm_head.weight.detach().double().T


@pytest.fixture(scope="module")
def unsteered(steered: SteeredHFLM) -> list[float]:
    """Scores of the fifty items."""
    steered.intervene()
    return [score[0] for score in steered.loglikelihood(items(), disable_tqdm=True)]


@pytest.mark.parametrize("site", ["activation", "product"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_scores_equal_an_oracle(
    name: str,
    site: str,
    loaded: tuple[Any, Any],
    steered: SteeredHFLM,
    unsteered: list[float],
    neurons: NeuronSet,
    head: torch.Tensor,
) -> None:
    (model, tokenizer), (arguments, edit) = loaded, OPERATIONS[name]
    requests = items()
    assert len(requests) == 50
    rows = [tokens_of(request, tokenizer) for request in requests]
    steered.intervene(neurons, site=site, **arguments)
    scores = steered.loglikelihood(requests, disable_tqdm=True)
    steered.intervene()

    with edited(model, neurons, site, edit):
        states = [hidden_states(model, [ids])[0] for ids, _ in rows]
        batched = hidden_states(model, [ids for ids, _ in rows])
    oracle = log_probabilities(states, rows, head)
    # The float32 model's own noise: scores with its head in float32, of a row alone and beside others.
    plain = [log_probabilities(each, rows, model.lm_head.weight.detach().T) for each in (states, batched)]
    noise = max(abs(float((one - other).sum())) for each in plain for one, other in zip(each, oracle, strict=True))
    errors = [abs(score[0] - float(expected.sum())) for score, expected in zip(scores, oracle, strict=True)]
    changed = max(abs(score[0] - before) for score, before in zip(scores, unsteered, strict=True))
    print(f"\n{name} at {site}: largest error {max(errors):.1e} nats; noise {noise:.1e}; moved {changed:.1f}")
    assert changed > 0.1
    for error, expected in zip(errors, oracle, strict=True):
        assert error <= max(1e-5 * max(1.0, abs(float(expected.sum()))), noise)
    twins = [score.unsteered for score, request in zip(scores, requests, strict=True) if request.doc]
    assert len(twins) == 20 and all(twin is not None for twin in twins)


# --- what `doctor` and `hf` say, and one output ---------------------------------------------------------------------


def test_doctor_passes_every_check(loaded: tuple[Any, Any], neurons: NeuronSet) -> None:
    found = examine(loaded[0], neurons)
    assert len(found) == 26 and all(check.passed for check in found), plain_text(found)


def test_factor_one_equals_hf(loaded: tuple[Any, Any], neurons: NeuronSet) -> None:
    model, tokenizer = loaded
    plain = HFLM(model, tokenizer=tokenizer, batch_size=8)
    ours = SteeredHFLM(model, tokenizer=tokenizer, batch_size=8, scoring="plain")
    ours.intervene(neurons, language=FRENCH, op="scale", factor=1)
    requests = items()[:20]
    expected = plain.loglikelihood(requests, disable_tqdm=True)
    assert [tuple(score) for score in ours.loglikelihood(requests, disable_tqdm=True)] == expected
    sharing = SteeredHFLM(model, tokenizer=tokenizer, batch_size=8, scoring="shared")
    sharing.intervene(neurons, language=FRENCH, op="scale", factor=1)
    for score, other in zip(sharing.loglikelihood(requests, disable_tqdm=True), expected, strict=True):
        # `hf` takes log-softmax in float32, which is off by up to 2.5e-5 per token at a vocabulary of 262k.
        assert abs(score[0] - other[0]) <= 1e-4 + 2.5e-5 * score.tokens and score[1] == other[1]


def test_an_english_question_is_answered_in_french(steered: SteeredHFLM, neurons: NeuronSet) -> None:
    settings = {"max_gen_toks": 24, "do_sample": False, "repetition_penalty": 1.1, "until": ["\nQ:", "\nA:"]}
    requests = [Instance("generate_until", {}, (f"Q: {question}\nA:", settings), 0) for question in QUESTIONS]
    steered.intervene(target_language=FRENCH)
    before = steered.generate_until(requests, disable_tqdm=True)
    steered.intervene(neurons, language=FRENCH, op="add", value="mean", site="product", factor=1)
    after = steered.generate_until(requests, disable_tqdm=True)
    steered.intervene()
    print("\n", before, after)
    assert {text.language for text in before} == {ENGLISH}
    assert sum(text.language == FRENCH and not degenerate(text) for text in after) >= 3
