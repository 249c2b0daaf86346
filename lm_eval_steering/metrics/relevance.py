"""CLaS-Bench's score (Gurgurov et al. 2026): harmonic mean of language success and judged relevance, both 0 to 1.

Both are means over items, and only then combined. The published script takes a success rate of at most 1 (per cent) for
a fraction and multiplies it by 100, so that 0.5 % becomes 50 %; here nothing guesses a unit.

An item is (1 or 0 for its language, its relevance or None where the judge gave no rating, whether the judge failed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RatedItem = tuple[float, float | None, bool]


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b); 0 where either is 0."""
    return 2 * first * second / (first + second) if first and second else 0.0


def relevance(items: Sequence[RatedItem]) -> float:
    """Aggregation: mean relevance of the items with a rating; NaN if the judge failed for any, or rated none."""
    rated = [item[1] for item in items if item[1] is not None]
    if not rated or any(failed for _, _, failed in items):
        return math.nan
    return sum(rated) / len(rated)


def clas_score(items: Sequence[RatedItem]) -> float:
    """Aggregation: harmonic mean of the share of items in the wanted language and of mean relevance; NaN as above."""
    judged = relevance(items)
    return math.nan if math.isnan(judged) else harmonic_mean(sum(item[0] for item in items) / len(items), judged)
