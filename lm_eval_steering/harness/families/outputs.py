"""Metrics of the language of generated text, the same for every family that generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_steering.harness.expected import expected_language, options_of
from lm_eval_steering.metrics.output_language import output_metrics


def language_metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Every output-language metric that is defined for an answer (`docs/output-language.md`).

    The document says what language it expects, and what the metrics of a wanted language are about
    (`harness.expected`). A template that calls this lists all of `output_language.METRICS`.
    """
    return dict(output_metrics(results[0], expected=expected_language(document, None), **options_of(document, {})))
