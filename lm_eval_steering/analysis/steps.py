"""A step of a stepwise deactivation, as it is computed and drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_steering.metrics.language_id import Identified, in_language

EMPTY = "empty"


@dataclass(frozen=True)
class Step:
    """What the model answers after one more language is deactivated.

    Attributes:
        deactivated: languages, in the order in which they were; empty in step 0.
        neurons: distinct neurons that are set to 0.
        outputs: continuation of each prompt.
        identified: language and confidence of each.
        signature: of the intervention.
        fingerprint: over everything that decides the outputs.
        evidence: what the hooks did (`steering.attach.Evidence`); None in step 0.
        seconds: that it took.
    """

    deactivated: tuple[str, ...]
    neurons: int
    outputs: tuple[str, ...]
    identified: tuple[Identified, ...]
    signature: str
    fingerprint: str
    evidence: Mapping[str, Any] | None
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """Language -> number of outputs, most frequent first, codes in alphabetical order where equal.

        Outputs without text, where the model ended at once, are `empty` and not `unknown`.
        """
        labels = zip(self.outputs, self.identified, strict=True)
        found = Counter(one.language if text.strip() else EMPTY for text, one in labels)
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def shares(self) -> dict[str, float]:
        """Language -> share of all outputs, in the same order; they add up to 1, `unknown` and `empty` among them."""
        return {code: count / len(self.identified) for code, count in self.counts.items()}

    @property
    def in_off(self) -> float:
        """Share of the outputs in languages that are deactivated."""
        return sum(
            share
            for code, share in self.shares.items()
            if code != EMPTY and any(in_language(code, off) for off in self.deactivated)
        )
