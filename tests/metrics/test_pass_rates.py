"""LPR and WPR of twenty short texts in several scripts, against verdicts reached by hand."""

from __future__ import annotations

import importlib.util

import pytest

from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.metrics.output_language import output_metrics
from lm_eval_steering.metrics.pass_rates import Passes, english_words, harmonic_mean, passes

# (wanted, text, every counted line is in the wanted language, no English word in it)
BY_HAND: list[tuple[str, str, bool | None, bool | None]] = [
    # Latin letters: English words cannot be told apart, so there is no word rate.
    ("fra_Latn", "Je ne sais pas encore ce que nous ferons demain.", True, None),
    ("fra_Latn", "I do not know yet what we are going to do tomorrow.", False, None),
    # One English line among French ones fails the response.
    ("fra_Latn", "Voici la réponse à votre question.\nHere is the answer to your question.", False, None),
    # A line of four tokens does not count, in whatever language.
    ("deu_Latn", "Sure, here you go:\nIch habe heute leider keine Zeit für dich.", True, None),
    ("deu_Latn", "Ich komme morgen.", None, None),
    ("tur_Latn", "Bu sabah erkenden kalkıp işe yürüyerek gittim.", True, None),
    ("eng_Latn", "The children are playing in the garden today.", True, None),
    ("eng_Latn", "", None, None),
    # Cyrillic, Arabic, Devanagari, Greek, Hangul: four letters and more, in lower case, and in the list of words.
    ("rus_Cyrl", "Сегодня утром мы пошли в парк и долго гуляли.", True, True),
    ("rus_Cyrl", "Сегодня утром мы пошли в beautiful парк и долго гуляли.", True, False),
    ("rus_Cyrl", "This is the wrong language for this answer.", False, None),
    ("rus_Cyrl", "Мы купили новый телефон фирмы Samsung и очень довольны.", True, True),  # a name
    ("rus_Cyrl", "Мы сказали ему the cat, и он долго смеялся над нами.", True, True),  # three letters
    ("arb_Arab", "ذهب الأولاد إلى المدرسة في الصباح الباكر اليوم.", True, True),
    ("arb_Arab", "ذهب الأولاد إلى المدرسة together في الصباح الباكر اليوم.", True, False),
    ("hin_Deva", "आज सुबह हम लोग बाज़ार गए और बहुत सारे फल खरीदे।", True, True),
    ("ell_Grek", "Σήμερα το πρωί πήγαμε στην αγορά και πήραμε fresh ψωμί.", True, False),
    ("kor_Hang", "오늘 아침에 우리는 시장에 가서 과일을 많이 샀습니다.", True, True),
    # No blanks between words; an English word is a word of its own all the same.
    ("zho_Hans", "今天早上我们去市场买了很多水果，大家都非常高兴。", True, True),
    ("jpn_Jpan", "今朝は市場へ行って、たくさんのorangeを買いました。", True, False),
]


@pytest.mark.parametrize(("wanted", "text", "lines", "words"), BY_HAND)
def test_twenty_texts_are_judged_as_by_hand(wanted: str, text: str, lines: bool | None, words: bool | None) -> None:
    assert passes(text, [wanted], LanguageIdentifier()) == Passes(lines, words)


def test_the_rates_over_the_twenty_are_those_by_hand() -> None:
    assert len(BY_HAND) == 20
    found = [output_metrics(text, expected=wanted) for wanted, text, _, _ in BY_HAND]

    def mean(name: str) -> float:
        values = [metrics[name] for metrics in found if name in metrics]
        return sum(values) / len(values)  # type: ignore[arg-type]

    assert mean("lpr") == 15 / 18
    assert mean("lpr_skipped") == 2 / 20
    assert mean("wpr") == 7 / 11
    # Non-Latin scripts alone: 11 of 12 pass by their lines, 7 of these 11 by their words.
    pairs = [metrics["lcpr"] for metrics in found if "lcpr" in metrics]
    assert len(pairs) == 12
    assert harmonic_mean(pairs) == pytest.approx(2 * (11 / 12) * (7 / 11) / (11 / 12 + 7 / 11))  # type: ignore[arg-type]


def test_a_korean_line_with_chinese_characters_is_split_at_blanks() -> None:
    assert passes("韓國語文學 수업", ["kor_Hang"], LanguageIdentifier()) == Passes(None, None)
    assert passes("오늘 아침에 韓國語文學 수업을 들었습니다.", ["kor_Hang"], LanguageIdentifier()) == Passes(True, True)


def test_markers_of_models_are_no_words_of_a_line() -> None:
    assert passes("Мы видели домик </s> </s>", ["rus_Cyrl"], LanguageIdentifier()).lines is None


def test_punctuation_is_deleted_before_the_identifier_and_the_tokens() -> None:
    assert passes("¿? - - - - -", ["spa_Latn"], LanguageIdentifier()).lines is None
    assert passes("Мы видели — «очень» — small! — домик у озера.", ["rus_Cyrl"], LanguageIdentifier()).words is False


def test_a_line_below_the_papers_threshold_fails_and_the_identifiers_own_does_not_matter() -> None:
    digits = "1 2 3 4 5 6"
    assert passes(digits, ["eng_Latn"], LanguageIdentifier()).lines is False
    strict, lax = LanguageIdentifier(threshold=1.0), LanguageIdentifier(threshold=0.0)
    for wanted, text, lines, words in BY_HAND:
        assert passes(text, [wanted], strict) == passes(text, [wanted], lax) == Passes(lines, words)


def test_of_several_wanted_languages_each_line_may_choose() -> None:
    text = "Je ne sais pas encore ce que nous ferons demain.\nIch habe heute leider keine Zeit für dich."
    assert passes(text, ["fra_Latn", "deu_Latn"], LanguageIdentifier()).lines is True
    assert passes(text, ["fra_Latn"], LanguageIdentifier()).lines is False


def test_no_response_that_passes_gives_zero_not_an_error() -> None:
    assert harmonic_mean([(0.0, None), (0.0, None)]) == 0.0
    assert harmonic_mean([(1.0, 0.0)]) == 0.0
    assert harmonic_mean([(1.0, 1.0), (0.0, None)]) == pytest.approx(2 / 3)


def test_the_words_are_those_that_the_authors_keep_of_a_list() -> None:
    found = english_words()
    assert len(found) == 63189
    assert {"garden", "together", "fresh", "orange"} <= found
    assert all(word.islower() and len(word) > 3 for word in found)


@pytest.mark.skipif(importlib.util.find_spec("jieba") is not None, reason="jieba is installed")
def test_without_a_segmenter_letters_are_the_tokens_and_the_signature_says_so() -> None:
    from lm_eval_steering.metrics.pass_rates import signature

    assert signature().startswith("zho:letters,jpn:")
    assert passes("今天很好吃", ["zho_Hans"], LanguageIdentifier()).lines is not None
    assert passes("今天很好", ["zho_Hans"], LanguageIdentifier()).lines is None


@pytest.mark.skipif(importlib.util.find_spec("jieba") is None, reason="needs the extra `words`")
def test_with_the_extra_words_are_the_tokens() -> None:
    from lm_eval_steering.metrics.pass_rates import signature
    from lm_eval_steering.metrics.text import segmenter

    assert segmenter("zho_Hans")("今天早上我们去 市场") == ["今天", "早上", "我们", "去", "市场"]
    assert segmenter("jpn_Jpan")("今朝は市場へ行く") == ["今朝", "は", "市場", "へ", "行く"]
    assert "zho:jieba-" in signature() and "jpn:fugashi-" in signature()
