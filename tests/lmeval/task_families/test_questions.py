"""Forcing, open generation and the questions that they ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.languages import normalise
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families import common as coverage
from lm_eval_steering.lmeval.task_families import forcing, open_generation, questions
from lm_eval_steering.metrics.language_id import LanguageIdentifier, in_language
from tests.lmeval.task_families.conftest import Evaluate


def test_our_own_questions_are_parallel_and_in_at_least_32_languages() -> None:
    codes = questions.everyday_languages()
    assert len(codes) >= 32 and all(normalise(code) == code for code in codes)
    assert set(coverage.ALL) - set(codes) == {"bod_Tibt", "bul_Cyrl", "quy_Latn"}
    for code in codes:
        asked = questions.everyday(code, {})
        assert len(asked) == len(set(asked)) == 12 and all(text == text.strip() for text in asked)
    assert (questions.FILE.with_name("questions.LICENSE.txt")).is_file()


def test_the_identifier_agrees_on_the_language_of_a_set() -> None:
    identifier, wrong = LanguageIdentifier(), []
    for code in questions.everyday_languages():
        (found,) = identifier.guess([" ".join(questions.everyday(code, {}))])
        if not in_language(found.language, code):
            wrong.append(code)
    # The small model calls Haitian Creole French; nothing else.
    assert set(wrong) <= {"hat_Latn", "zsm_Latn", "nob_Latn"}


def test_documents_expect_the_language_of_the_question() -> None:
    docs = forcing.documents("deu_Latn", language="fra")["test"]
    assert docs[0]["question"] == "Was isst du gern zum Frühstück?" and docs[0]["expected_language"] == "deu_Latn"
    assert len(forcing.documents("deu_Latn", "plain")["test"]) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bod_Tibt",), "our own questions are not in bod_Tibt"),
        (("deu_Latn", "gurgurov"), "variant='gurgurov': expected one of"),
        (("deu_Latn", "mvicuna"), "no rows for mvicuna deu_Latn test"),
    ],
)
def test_what_is_not_there_is_one_clear_error(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=message):
        forcing.documents(*arguments, data_dir=str(tmp_path))


def test_clas_bench_rows_are_picked_by_language(clas_data: Path) -> None:
    docs = forcing.documents("nob_Latn", "clas_bench", data_dir=str(clas_data))["test"]
    assert [doc["question"] for doc in docs][1] == "Hvorfor er himmelen blå?"
    with pytest.raises(SteeringError, match="no question in fra_Latn; language_code holds de, en, no"):
        forcing.documents("fra_Latn", "clas_bench", data_dir=str(clas_data))


def test_forcing_counts_the_steered_language(french: SteeredHFLM, evaluate: Evaluate) -> None:
    name = "steering_forcing_eng_Latn"
    found = evaluate(french, name, tokens=24, language="fra_Latn")
    scores, samples = found["results"][name], found["samples"][name]
    assert samples[0]["arguments"][0][0] == f"Q: {questions.everyday('eng_Latn', {})[0]}\nA:"
    assert scores["lfs,none"] == sum(sample["lfs"] for sample in samples) / 12
    assert scores["lfs,none"] > scores["lang_expected,none"]
    assert {"lang_confidence,none", "lang_unknown,none", "degenerate,none", "output_language,none"} <= set(scores)


def test_without_a_target_there_is_no_share_of_it(unsteered: SteeredHFLM, evaluate: Evaluate) -> None:
    scores = evaluate(unsteered, "steering_forcing_eng_Latn_plain", limit=2, tokens=8)["results"]
    found = scores["steering_forcing_eng_Latn_plain"]
    assert "lfs,none" not in found and "lang_expected,none" in found


def test_mvicuna_is_asked_in_the_papers_words(french: SteeredHFLM, evaluate: Evaluate, shared_data: Path) -> None:
    names = (
        "steering_open_generation_jpn_Jpan",
        "steering_open_generation_spa_Latn",
        "steering_forcing_fra_Latn_mvicuna",
    )
    settings = {"language": "fra_Latn", "data_dir": str(shared_data / "evaluation")}
    found = evaluate(french, *names, limit=2, tokens=8, **settings)
    japanese, spanish, _ = (found["samples"][name][0]["arguments"][0][0] for name in names)
    assert japanese.endswith("日本語で答えてください。\nA:") and "Q: " in japanese
    assert spanish.endswith("? Por favor responda en español.\nA:")
    assert all("lang_expected,none" in found["results"][name] for name in names)


def test_mvicuna_is_read_as_it_was_published(tmp_path: Path) -> None:
    (tmp_path / "mvicuna").mkdir()
    (tmp_path / "mvicuna" / "fr.txt").write_text("Où ?\n\nQuand ?\n", encoding="utf-8")
    assert questions.mvicuna("fra_Latn", {"data_dir": str(tmp_path)}) == ["Où ?", "Quand ?"]
    with pytest.raises(SteeringError, match="no rows for mvicuna spa_Latn test"):
        questions.mvicuna("spa_Latn", {"data_dir": str(tmp_path)})


def test_mvicuna_in_another_language_is_refused() -> None:
    with pytest.raises(SteeringError, match="mVicuna is not in deu_Latn"):
        open_generation.documents("deu_Latn")


def test_an_unsteered_run_can_name_the_language(loaded: SteeredHFLM, evaluate: Evaluate) -> None:
    loaded.intervene(target_language="fra_Latn")
    found = evaluate(loaded, "steering_forcing_eng_Latn", limit=3, tokens=8, target_language="fra_Latn")
    results: dict[str, Any] = found["results"]["steering_forcing_eng_Latn"]
    assert 0 <= results["lfs,none"] <= 1
    json.dumps(found["configs"], default=str)
