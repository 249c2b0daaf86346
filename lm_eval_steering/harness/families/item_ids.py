"""Names of items whose data set gives them none."""

from __future__ import annotations

import hashlib

_DIGITS = 16


def text_id(text: str) -> str:
    """Sixteen digits of SHA-256: the same item in each part and wording of a data set, whatever its place there."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:_DIGITS]
