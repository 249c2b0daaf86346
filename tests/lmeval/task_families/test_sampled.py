"""Sampled continuations of an empty prompt: a seed belongs to its sample, whatever the batch and the order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.requests import begun
from lm_eval_steering.lmeval.task_families.open_generation import SAMPLES, sampled_documents
from tests.conftest import tiny_model, tiny_tokenizer
from tests.lmeval.task_families.conftest import Evaluate

NAME = "steering_open_generation_sampled"


def texts(found: dict[str, Any]) -> dict[str, str]:
    return {sample["doc"]["id"]: sample["resps"][0][0] for sample in found["samples"][NAME]}


def test_there_is_a_document_for_each_seed() -> None:
    found = sampled_documents()["test"]
    assert len(found) == SAMPLES == 100 and found["seed"] == list(range(100)) and set(found["prompt"]) == {""}
    assert len(sampled_documents(samples=3)["test"]) == 3
    for wrong in (0, -1, "many", True, 1.5):
        with pytest.raises(SteeringError, match="samples="):
            sampled_documents(samples=wrong)


def test_a_sample_depends_on_its_seed_and_the_intervention_alone(french: SteeredHFLM, evaluate: Evaluate) -> None:
    french.batch_size_per_gpu = 8
    all_of_them = texts(evaluate(french, NAME, tokens=12, samples=5))
    assert len(set(all_of_them.values())) == 5
    torch.manual_seed(99)
    french.batch_size_per_gpu = 1
    found = evaluate(french, NAME, tokens=12, samples=3)
    assert texts(found) == {key: all_of_them[key] for key in ("seed-0", "seed-1", "seed-2")}
    assert 0 <= found["results"][NAME]["lfs,none"] <= 1 and "lang_expected,none" not in found["results"][NAME]
    french.intervene()
    assert texts(evaluate(french, NAME, tokens=12, samples=3)) != texts(found)


def test_random_numbers_outside_go_on_as_if_nothing_had_been_sampled(unsteered: SteeredHFLM) -> None:
    arguments = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4, "until": [], "seed": 3}
    torch.manual_seed(1)
    unsteered.generate_until([Instance("generate_until", {}, ("", arguments), 0)], disable_tqdm=True)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


def test_an_empty_prompt_begins_with_the_prefix_where_the_tokenizer_adds_nothing(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    assert tokenizer("").input_ids == []
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = SteeredHFLM(str(tmp_path), device="cpu", batch_size=2)
    tokens, mask = model.tok_batch_encode(["", ""])
    assert tokens.tolist() == [[model.prefix_token_id]] * 2 and mask.tolist() == [[1]] * 2
    tokens, mask = model.tok_batch_encode(["", "w1 w2"])
    assert tokens[0, -1] == model.prefix_token_id and mask.tolist() == [[0, 1], [1, 1]]
    arguments = {"do_sample": False, "max_gen_toks": 3, "until": []}
    (text,) = model.generate_until([Instance("generate_until", {}, ("", arguments), 0)], disable_tqdm=True)
    assert text.split()


def test_rows_with_tokens_are_left_as_they_are() -> None:
    tokens, mask = torch.tensor([[1, 5], [7, 8]]), torch.tensor([[0, 1], [1, 1]])
    found = begun(tokens.clone(), mask.clone(), 9)
    assert torch.equal(found[0], tokens) and torch.equal(found[1], mask)
