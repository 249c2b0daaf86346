from __future__ import annotations

import pytest

from lm_eval_steering.metrics.text import (
    NO_SCRIPT,
    clean,
    letters_or_words,
    main_script,
    script_share,
    scripts,
    segmenter,
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a\r\nb\tc", "a b c"), ("\x00a\x85b\u2028c\x7f", "a b c"), ("half \ud800 a pair", "half a pair"),
        ("  Mixed Case, ¿signs? 12 \u200c\U0001f600 ", "Mixed Case, ¿signs? 12 \u200c\U0001f600"),
        ("a </s> b</s>c <s>", "a b c"), ("</</s>s>", "</ s>"), ("__label__fr x <|end|> <pad>", "fr x"),
        ("a < b > c_d", "a < b > c_d"), ("a\ufffdb \ufffd", "ab"), ("Ａｂ１，。", "Ab1，。"),
        ("ﬁn ﻣﺮﺣﺒﺎ ｶﾞ", "fin مرحبا ガ"),
        ("ATTENTION : le TGV de l'OTAN, I A", "attention : le tgv de l'otan, I A"), ("À L'ÉCOLE", "à l'école"),
        ("iPhone McDONALD USAs", "iPhone McDONALD USAs"), ("น้ำ ຳ", "น้ำ ຳ"),
    ],
)  # fmt: skip
def test_a_text_is_cleaned(given: str, expected: str) -> None:
    assert clean(given) == expected


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Grüße, Zoë", "Latn"), ("Привет, world of", "Latn"), ("Привет, мир, ok", "Cyrl"), ("東京", "Hani"),
        ("東京へ行く", "Jpan"), ("カタカナ", "Jpan"), ("안녕 세상", "Hang"), ("مرحبا", "Arab"), ("שלום", "Hebr"),
        ("नमस्ते", "Deva"), ("สวัสดี", "Thai"), ("ᱥᱟᱱᱛᱟᱲᱤ", "Olck"), ("123 !?", NO_SCRIPT), ("", NO_SCRIPT),
    ],
)  # fmt: skip
def test_the_script_is_that_of_most_letters(text: str, script: str) -> None:
    assert main_script(scripts(text)) == script


@pytest.mark.parametrize(
    ("text", "code", "share"),
    [
        ("abc абв", "Cyrl", 0.5), ("東京へイク abc de", "Jpan", 0.5), ("東京 abc", "Hans", 0.4),
        ("東京 abc", "Hant", 0.4), ("1 2 3", "Latn", 0.0), ("", "Latn", 0.0), ("コーヒー", "Jpan", 1.0),
        ("abc", "Cyrl", 0.0),
    ],
)  # fmt: skip
def test_the_share_is_over_letters_alone(text: str, code: str, share: float) -> None:
    assert script_share(text, code) == share


def test_letters_stand_for_words_only_in_languages_without_blanks() -> None:
    assert letters_or_words("a b-c  d") == ["a", "b-c", "d"]
    assert letters_or_words("我喜欢hello世界") == ["我", "喜", "欢", "hello", "世", "界"]
    assert letters_or_words("ที่นี่ ok") == ["ที่", "นี่", "ok"]
    assert segmenter("tha_Thai") is segmenter("yue_Hant") is letters_or_words
    assert segmenter("kor_Hang")("韓國語文學 수업") == ["韓國語文學", "수업"]
    assert segmenter("fra_Latn")("le 東京 express") == ["le", "東京", "express"]
