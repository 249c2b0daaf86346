"""Prompts, readers of answers and scores of the papers, against their own output (golden/prompts_parsers_metrics.json).

Gurgurov et al. 2025: prompts of Belebele, XQuAD and XNLI, their parsers and EM/F1. Rahmanisa et al. 2025: XCOPA and
XWinograd. Where their reader or score is wrong, ours is right, and `OURS_IS_RIGHT` says which and why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering import languages
from lm_eval_steering.lmeval.sources import RowsSource
from lm_eval_steering.lmeval.task_families import belebele, include, xcopa, xnli, xquad, xwinograd
from lm_eval_steering.lmeval.task_families.answers import exact_match, f1, gurgurov, letter, relation, score_answer

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "prompts_parsers_metrics.json").read_text())

# Response -> what ours says instead of the paper's answer.
OURS_IS_RIGHT = {
    # Any word that begins with A to D was an answer.
    "Because": None,
    "Apple": None,
    "Cat": None,
    # A clear answer that their pattern misses (one of their two scripts reads the first of these).
    "I think B)": "B",
    '"A"': "A",
    # The first label found was taken, also a denied one; the first digit of a number; a digit over a word beside it.
    "not entailment but contradiction": "contradiction",
    "12": None,
    "2) Entailment": None,
    # The verb is the label.
    "Contradicts": "contradiction",
}


@pytest.mark.parametrize("case", GOLDEN["belebele_extract"], ids=lambda case: repr(case[0]))
def test_letters_are_read_like_the_papers_or_better(case: list[Any]) -> None:
    response, published, _other_script = case
    assert letter(response) == OURS_IS_RIGHT.get(response, published)


@pytest.mark.parametrize("case", GOLDEN["xnli_extract"], ids=lambda case: repr(case[0]))
def test_relations_are_read_like_the_papers_or_better(case: list[Any]) -> None:
    response, published = case
    assert relation(response) == OURS_IS_RIGHT.get(response, published)


def test_every_difference_is_one() -> None:
    """No entry of the table is there for nothing."""
    published = {response: answer for response, answer, *_ in GOLDEN["belebele_extract"] + GOLDEN["xnli_extract"]}
    assert all(published[response] != ours for response, ours in OURS_IS_RIGHT.items())


@pytest.mark.parametrize("case", GOLDEN["xquad_em_f1"], ids=lambda case: repr(case[:2]))
def test_em_and_f1_are_the_papers(case: list[Any]) -> None:
    prediction, reference, same, overlap = case
    assert exact_match(prediction, [reference], gurgurov) == same
    assert f1(prediction, [reference], gurgurov) == pytest.approx(overlap, abs=1e-6)


@pytest.mark.parametrize(("text", "published"), [("the the cat", 2 / 3), ("new york new york", 1 / 2)])
def test_a_text_is_right_about_itself(text: str, published: float) -> None:
    words = text.split()
    shared = len(set(words))  # their intersection is of sets, their lengths are not
    assert 2 * (shared / len(words)) ** 2 / (2 * shared / len(words)) == pytest.approx(published)
    assert f1(text, [text], gurgurov) == 1


def test_accuracies_of_the_labels() -> None:
    """Golds and answers with the published counts: 5 items, and 1 of 2, 1 of 2 and 1 of 1 right by label."""
    published = GOLDEN["xnli_metrics"]
    items = [(label, label if number < published["class_correct"][label] else None)
             for label, count in published["class_counts"].items() for number in range(count)]  # fmt: skip
    scores = [score_answer(answer, gold)["acc"] for gold, answer in items]
    assert sum(scores) / len(scores) == published["accuracy"]
    for label in published["class_counts"]:
        own = [score for score, (gold, _) in zip(scores, items, strict=True) if gold == label]
        assert sum(own) / len(own) == published[f"{label}_accuracy"]


def test_prompts_of_gurgurov() -> None:
    row = {"flores_passage": "P.", "question": "Q?", **dict(zip(belebele.ANSWERS, "abcd", strict=True))}
    assert belebele.as_gurgurov(row, "German") == GOLDEN["prompts"]["belebele"]
    assert xquad.as_gurgurov({"context": "C.", "question": "Q?"}, "German") == GOLDEN["prompts"]["xquad"]
    assert xnli.as_gurgurov({"premise": "P.", "hypothesis": "H."}, "German") == GOLDEN["prompts"]["xnli"]


def test_language_names_are_the_papers() -> None:
    for code, name in GOLDEN["map_language"].items():
        assert languages.english_name(code) == name


@pytest.mark.parametrize("code", GOLDEN["xcopa"])
@pytest.mark.parametrize("question", ["cause", "effect"])
def test_xcopa_of_rahmanisa_is_the_default_wording(code: str, question: str) -> None:
    row = {"premise": "The man fell.  ", "choice1": "He slipped.", "choice2": "It rained."}
    assert xcopa.as_lm_eval(row, code, question) == {
        "prompt": GOLDEN["xcopa"][code][question], "choices": GOLDEN["xcopa_choices"],
    }  # fmt: skip


def test_xwinograd_of_rahmanisa_is_the_default_wording() -> None:
    golden = GOLDEN["xwinograd"]
    found = xwinograd.halves(golden["doc"], RowsSource("xwinograd", "eng_Latn", "test", ()))
    assert found == {"contexts": golden["choices"], "rest": golden["target"]}
    assert ("1", "2").index(golden["doc"]["answer"]) == golden["gold_index"]


def test_include_of_rahmanisa() -> None:
    """The form is in the reference's description of the task; no output of it was published."""
    row = {"question": "Q?", "option_a": "a", "option_b": "b", "option_c": "c", "option_d": "d"}
    assert include.as_rahmanisa(row, "nld_Latn") == {"prompt": "Q?\nA) a\nB) b\nC) c\nD) d\nAnswer:"}
