from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering.metrics.degenerate import degenerate, longest_run

# Thirty outputs that say nothing, thirty that do, as models wrote them or might have, in several scripts.
DEGENERATE = (
    # written by Gemma-3-270m under a strong intervention
    " 早餐 \n \n \n", "300 bile, 300 bile,", "bu 3 bile 3d 3d 3d", "100%\nQ：\nQ：\nQ：", "Q：\nQ：\nQ：\nQ：",
    # without letters
    "", " \n\t", "\x00", "1. 2. 3. 4.", "- - - -", "。。。。。。", "%%% 100 %", "������", "12",
    # one letter, one word, one phrase
    "aaaaaaaa", "的的的的的的", "ааа ааа", "No no NO", "the cat the cat the cat the", "你好你好你好",
    "はいはいはいはい",
    "да, да, да, да, да", "ha" * 12, "Answer: " + "la, " * 10, "नमस्ते नमस्ते नमस्ते नमस्ते", "سلام سلام سلام سلام",
    # phrases that come again, with something else between
    "Le chat est noir.\nLe chat est gris.\nLe chat est noir.\nLe chat est noir.",
    "Der Zug fährt nicht, der Bus fährt, der Zug fährt nicht, der Zug fährt nicht,",
    "Q：\nA：\nQ：\nB：", "我们去公园散步吧，今天天气很好，我们去公园散步吧，我们去公园散步吧，",
)  # fmt: skip
FINE = (
    "Paris", "谢谢", "Oui.", "ok", "Hmmmmm", "a", "no no", "the cat the cat", "yes yes yes and then we all went home",
    "The cat sat on the mat.", "No, no, that is not what I meant.", "Thank you, thank you very much!",
    "Je ne sais pas encore ce que nous ferons demain matin.", "Der Zug fährt heute leider nicht, wir nehmen den Bus.",
    "Сегодня утром мы пошли в парк и долго гуляли.", "今天早上我们去市场买了很多水果，大家都非常高兴。",
    "今朝は市場へ行って、果物をたくさん買いました。", "오늘 아침에 우리는 시장에 가서 과일을 많이 샀습니다.",
    "ذهب الأولاد إلى المدرسة في الصباح الباكر اليوم.", "आज सुबह हम लोग बाज़ार गए और बहुत सारे फल खरीदे।",
    "Σήμερα το πρωί πήγαμε στην αγορά και πήραμε φρέσκο ψωμί.", "วันนี้อากาศดีมาก เราไปเดินเล่นกันเถอะ",
    "1. Paris\n2. Lyon\n3. Nice", "Answer:\nParis is the capital of France.", "Q：法国的首都是哪里？\nA：巴黎。",
    "Name: Anna\nAlter: 30\nStadt: Bonn", "I came, I saw, I conquered.", "1945 in Berlin",
    "Bonjour !\n\nComment allez-vous ?",
    "Row, row, row your boat, gently down the stream.",
)  # fmt: skip


def test_there_are_sixty_texts_half_of_them_fine() -> None:
    assert (len(DEGENERATE), len(FINE)) == (30, 30) and len({*DEGENERATE, *FINE}) == 60


@pytest.mark.parametrize("text", DEGENERATE)
def test_outputs_that_say_nothing(text: str) -> None:
    assert degenerate(text)


@pytest.mark.parametrize("text", FINE)
def test_outputs_that_say_something(text: str) -> None:
    assert not degenerate(text)


@pytest.mark.parametrize(
    "text", ["no no no", "the cat the cat the cat", "well then yes yes yes yes", "-" * 30, "very very very good"]
)
def test_a_run_of_three_copies_that_fills_more_than_half(text: str) -> None:
    assert degenerate(text)


def test_more_than_half_is_meant_strictly() -> None:
    assert longest_run(list("aaabcd")) == 0
    assert longest_run(list("aaabc")) == 3
    assert longest_run(list("xababab")) == 6


def test_at_the_end_half_is_enough() -> None:
    assert longest_run(list("bcdaaa")) == 3
    assert longest_run(list("bcdeaaa")) == 0
    assert longest_run(list("wxyzababab")) == 6


def by_definition(text: str) -> int:
    """The same by a plain regular expression: a unit, two copies and more of it, and a last one cut short."""
    best = 0
    for start in range(len(text)):
        for period in range(1, len(text) // 3 + 1):
            end = start + period
            while end < len(text) and text[end] == text[end - period]:
                end += 1
            enough = end - start > len(text) / 2 or (end == len(text) and end - start >= len(text) / 2)
            if end - start >= 3 * period and enough:
                best = max(best, end - start)
    return best


@given(st.text(alphabet="ab ", max_size=24))
def test_the_fast_way_agrees_with_the_definition(text: str) -> None:
    assert (longest_run(text) > 0) == (by_definition(text) > 0)
    one_letter = len(set(text.replace(" ", ""))) == 1 and len(text.replace(" ", "")) >= 3
    runs = longest_run(text.split()) > 0 or longest_run(text_line(text)) >= 20
    assert degenerate(text) == (not text.strip() or one_letter or runs)


def text_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip() + " "
