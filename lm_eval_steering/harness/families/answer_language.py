"""The language of a short generated answer: those of the output-language metrics that a few words can have.

Line and word pass rates need lines of five tokens and say nothing about a span; `lm-eval-steering rescore` computes
any of them from the samples.
"""

from __future__ import annotations

from typing import Any

from lm_eval_steering.metrics.output_language import output_metrics

LISTED = ("lfs", "lang_expected", "lang_confidence", "lang_unknown", "degenerate", "output_language")


def answer_language(text: str, expected: str | None = None) -> dict[str, Any]:
    """The metrics that a template lists; `expected` where the answer is to be in the language of the item."""
    return {name: value for name, value in output_metrics(text, expected=expected).items() if name in LISTED}
