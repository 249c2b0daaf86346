"""Language of generated text, and whether it is the steered one.

The channel from model to metric is the text itself. `steered-hf` returns each output as an `IdentifiedText`, a `str`
that knows its identified language and the languages it was steered to. Nothing is stored outside the output, so two
models in one process cannot see each other's target, a cached output keeps its own, and there is nothing to clear.
A filter that makes a new string takes the knowledge away: the metric is then left out, with a warning, and never 0.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

from lm_eval_steering.languages import same_language

_log = logging.getLogger("lm_eval.steering")
_warned = False


class IdentifiedText(str):
    """Generated text with its identified language.

    Attributes:
        language: our code, or `unknown`.
        confidence: the identifier's probability for its best guess, 0 to 1.
        targets: codes of the languages steered to; empty where no target is known.
    """

    language: str
    confidence: float
    targets: tuple[str, ...]

    def __new__(
        cls, text: str = "", language: str = "unknown", confidence: float = 0.0, targets: Sequence[str] = ()
    ) -> Self:
        """A text with what is known about it; one argument alone makes a text of unknown language."""
        made = super().__new__(cls, text)
        made.language, made.confidence, made.targets = language, confidence, tuple(targets)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.language, self.confidence, self.targets)


def forced(text: str) -> float | None:
    """1.0 where the output is in a language it was steered to, else 0.0; None where no target is known.

    `unknown` is not a success and stays in the denominator.
    """
    if not isinstance(text, IdentifiedText) or not text.targets:
        return None
    return float(any(same_language(text.language, target) for target in text.targets if text.language != "unknown"))


def lfs(references: Sequence[str], predictions: Sequence[str], **_: Any) -> dict[str, float]:
    """Language forcing success: 1 where the output is identified as the target language (Gurgurov et al. 2025).

    Without a target (an unsteered run without `target_language=`, another model type) the metric is absent.
    """
    global _warned  # noqa: PLW0603  (one warning a process)
    success = forced(predictions[0])
    if success is None:
        if not _warned:
            _log.warning("lfs is left out: the outputs carry no target language (see docs/output-language.md)")
            _warned = True
        return {}
    return {"lfs": success}


def language_counts(labels: Sequence[str]) -> str:
    """Aggregation of identified languages: `fra_Latn:31 eng_Latn:7 unknown:2`, most frequent first."""
    ordered = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))
    return " ".join(f"{label}:{count}" for label, count in ordered)
