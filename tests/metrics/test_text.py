from __future__ import annotations

import pytest

from lm_eval_steering.metrics.text import NO_SCRIPT, clean, main_script, script_share, scripts, segmenter, words


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a\r\nb\tc", "a b c"), ("\x00a\x85b\u2028c\x7f", "a b c"), ("half \ud800 a pair", "half a pair"),
        ("  Mixed CASE, ¿signs? 12 \u200c\U0001f600 ", "Mixed CASE, ¿signs? 12 \u200c\U0001f600"),
    ],
)  # fmt: skip
def test_blanks_and_control_characters_go_and_nothing_else(given: str, expected: str) -> None:
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


def test_words_stand_between_blanks_or_are_letters_where_there_are_none() -> None:
    assert words("a b-c  d") == ["a", "b-c", "d"]
    assert words("我喜欢hello世界") == ["我", "喜", "欢", "hello", "世", "界"]
    assert words("ที่นี่ ok") == ["ที่", "นี่", "ok"]
    assert segmenter("fra_Latn") is words
