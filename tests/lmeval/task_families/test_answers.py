"""Readers of generated answers, and the scores of spans, in cases that the published ones get wrong."""

from __future__ import annotations

import pytest

from lm_eval_steering.lmeval.sources import DataError, RowsSource
from lm_eval_steering.lmeval.task_families import xcopa, xnli, xquad, xwinograd
from lm_eval_steering.lmeval.task_families.answers import exact_match, f1, gurgurov, letter, mlqa, relation, squad


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B) or C)", None), ("A cat sat there.", None), ("Dogs", None), ("**C**", "C"), (" c.", "C"),
        ("C\nBecause", "C"),
        ("Die Antwort lautet: B", "B"), ("答案：D。", "D"), ("The answer is (A).", "A"), ("Answer: A cat", None),
        ("The correct option is B) the river", "B"), ("A) x B) y", None), ("D: vier", "D"), ("ABCD", None),
        ("C'est la réponse B.", None), ("D'après le passage", None), ("c'è una risposta", None), ("'B'", "B"),
        ("A, B", None), ("Answer: A, B", None), ("A and B", None), ("(A) or (B)", None), ("A, because of rain", "A"),
    ],
)  # fmt: skip
def test_letters(text: str, found: str | None) -> None:
    assert letter(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(2)", "neutral"), ("1. Entailment", "entailment"), ("Entailment or neutral", None), ("13", None),
        ("3 hypotheses", "contradiction"), ("neither entailment nor contradiction: neutral", "neutral"),
        ("It is not neutral", None), ("no entailment", None), ("The premise entails it.", "entailment"),
        ("Nothing", None), ("Incorrect.", "contradiction"), ("२", "neutral"), ("non-entailment", None),
        ("It does not necessarily entail it.", None), ("It cannot be entailed.", None),
        ("not necessarily an entailment", None),
    ],
)  # fmt: skip
def test_relations(text: str, found: str | None) -> None:
    assert relation(text) == found


def test_xnli_reports_the_accuracy_of_each_label_apart() -> None:
    scores = xnli.generated_metrics({"gold": "neutral"}, ["2. Neutral"])
    assert {"acc": 1.0, "parsed": 1.0, "acc_neutral": 1.0}.items() <= scores.items()
    assert "acc_entailment" not in scores
    assert {"acc": 0.0, "parsed": 0.0}.items() <= xnli.generated_metrics({"gold": "neutral"}, ["maybe"]).items()


def test_chinese_and_thai_are_scored_by_character() -> None:
    assert mlqa("zho_Hans")("北京abc市，2019年") == ["北", "京", "abc", "市", "2019", "年"]
    assert mlqa("tha_Thai")("น้ำใส 20 ปี") == ["น้", "ำ", "ใ", "ส", "20", "ปี"]
    assert f1("北京市", ["北京"], mlqa("zho_Hans")) == pytest.approx(0.8)
    assert f1("北京市", ["北京"], squad) == 0
    assert 0 < f1("กรุงเทพ", ["กรุงเทพมหานคร"], mlqa("tha_Thai")) < 1
    assert exact_match("กรุงเทพ", [" กรุงเทพ."], mlqa("tha_Thai")) == 1


def test_articles_go_in_the_language_of_the_answer_alone() -> None:
    assert exact_match("der Hund", ["Hund"], mlqa("deu_Latn")) == 1
    assert exact_match("der Hund", ["Hund"], mlqa("eng_Latn")) == 0
    assert exact_match("«the dog»", ["dog"], mlqa("eng_Latn")) == 1
    assert exact_match("the dog", ["dog"], gurgurov) == 0
    assert exact_match("the dog", ["dog"], squad) == 1


def test_xquad_takes_the_best_reference_where_lm_eval_takes_the_first() -> None:
    document = {"references": ["der Fluss", "Fluss Aare"], "expected_language": "deu_Latn"}
    found = xquad.metrics(document, ["die Fluss Aare"])
    assert found["exact_match"] == 0 and found["exact_match_mlqa"] == 1
    assert found["lang_expected"] in (0.0, 1.0)


def test_natural_wordings_keep_every_letter_and_force_no_blank() -> None:
    thai = {"premise": "สิ่งของถูกห่อไว้ในพลาสติก", "choice1": "มันบอบบาง", "choice2": "มันเล็ก"}
    assert xcopa.as_lm_eval(thai, "th", "cause")["prompt"] == "สิ่งของถูกห่อไว้ในพลาสติ เพราะ"  # a letter is lost
    assert xcopa.natural(thai, "th", "cause") == {
        "prompt": "สิ่งของถูกห่อไว้ในพลาสติกเพราะ", "choices": ["มันบอบบาง", "มันเล็ก"],
    }  # fmt: skip
    english = {"premise": "The man fell. ", "choice1": "He slipped.", "choice2": "It rained."}
    assert xcopa.natural(english, "it", "effect") == {
        "prompt": "The man fell quindi", "choices": [" he slipped.", " it rained."],
    }  # fmt: skip
    origin = RowsSource("xwinograd", "jpn_Jpan", "test", ())
    chinese = {"sentence": "因_担心。 ", "option1": "甲", "option2": "乙"}
    assert xwinograd.halves(chinese, origin, natural=True) == {"contexts": ["因甲", "因乙"], "rest": "担心。"}
    english = {"sentence": "As _ ran.", "option1": "he", "option2": "she"}
    assert xwinograd.halves(english, origin, natural=True)["rest"] == " ran."
    with pytest.raises(DataError, match="no gap"):
        xwinograd.halves({**chinese, "sentence": "x"}, origin)
