from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering.metrics.degenerate import degenerate, longest_run


@pytest.mark.parametrize(
    "text",
    [
        "", " \n\t", "\x00", "no no no", "No no NO", "the cat the cat the cat", "the cat the cat the cat the",
        "well then yes yes yes yes", "你好你好你好", "ha" * 12, "-" * 30, "very very very good",
        "Answer: " + "la, " * 10,
    ],
)  # fmt: skip
def test_empty_or_repeating(text: str) -> None:
    assert degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "no no", "10000000", "Hmmmmm", "a", "Paris", "The cat sat on the mat.", "yes yes yes and then we all went home",
        "the cat the cat", "12", "...", "。。。。。。", "谢谢",
    ],
)  # fmt: skip
def test_not_degenerate(text: str) -> None:
    assert not degenerate(text)


def test_more_than_half_is_meant_strictly() -> None:
    assert longest_run(list("aaabcd")) == 0
    assert longest_run(list("aaabc")) == 3
    assert longest_run(list("xababab")) == 6


def by_definition(text: str) -> int:
    """The same by a plain regular expression: a unit, two copies and more of it, and a last one cut short."""
    best = 0
    for start in range(len(text)):
        for period in range(1, len(text) // 3 + 1):
            end = start + period
            while end < len(text) and text[end] == text[end - period]:
                end += 1
            if end - start >= 3 * period and end - start > len(text) / 2:
                best = max(best, end - start)
    return best


@given(st.text(alphabet="ab ", max_size=24))
def test_the_fast_way_agrees_with_the_definition(text: str) -> None:
    assert (longest_run(text) > 0) == (by_definition(text) > 0)
    assert degenerate(text) == (not text.strip() or longest_run(text.split()) > 0 or longest_run(text_line(text)) >= 20)


def text_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip() + " "
