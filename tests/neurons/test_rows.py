"""Text cut into rows of tokens."""

from __future__ import annotations

from lm_eval_steering.neurons.rows import TokenRows, packed_rows, sentence_rows
from tests.conftest import tiny_tokenizer


def test_rows_are_packed_or_one_a_sentence() -> None:
    tokenizer = tiny_tokenizer()
    text = ["w0 w1 w2", "w3", "w4 w5 w6 w7"]

    def lists(rows: TokenRows) -> list[list[int]]:
        return [row.tolist() for row in rows]

    assert lists(packed_rows(text, tokenizer, 3)) == [[3, 4, 5], [6, 7, 8], [9, 10]]
    assert lists(packed_rows(text, tokenizer, 3, budget=4)) == [[3, 4, 5], [6]]
    assert lists(packed_rows([], tokenizer, 3)) == []
    assert lists(sentence_rows(text, tokenizer, 3)) == [[3, 4, 5], [6], [7, 8, 9]]
    assert lists(sentence_rows(text, tokenizer, 9, at_least=2, at_most=1)) == [[3, 4, 5]]
    assert lists(sentence_rows(text, tokenizer, 9, budget=5)) == [[3, 4, 5], [6], [7]]


def test_the_hash_of_the_text_depends_on_where_rows_end() -> None:
    assert len({TokenRows.of(rows).sha256() for rows in ([[1, 2]], [[1], [2]], [[2], [1]])}) == 3
