"""LSS against the published matrix (Rahmanisa et al. 2025)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.metrics.likelihood import Score, lss, preference_shift

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "lss_matrix.json").read_text())
NAMES = {"en": "intv_eng_Latn", "id": "intv_ind_Latn", "zh": "intv_zho_Hans"}
PAIRS = [(base, target) for base in GOLDEN["langs"] for target in GOLDEN["langs"] if base != target]


def prompt(row: dict[str, str], base: str) -> str:
    # The published prompt is the template up to [Y], where that stands at the end; for zh it does not, and stays.
    return row["template"].replace("[X]", row[f"sub_{base}"]).removesuffix(" [Y]")


def score(steered: Any, text: str, continuation: str) -> Score:
    table = GOLDEN["logprob_table"]
    unsteered = table[f"None|{text}|{continuation}"]
    return Score((table[f"{steered}|{text}|{continuation}"], False), tokens=1, unsteered=unsteered)


@pytest.mark.parametrize(("base", "target"), PAIRS)
def test_the_matrix_is_the_published_one(base: str, target: str) -> None:
    steered = GOLDEN["target_index_of_lang"][target]
    shifts = []
    for row in GOLDEN["rows"][base]:
        own, other = (score(steered, prompt(row, base), row[f"obj_{code}"]) for code in (base, target))
        shifts.append(preference_shift(own, other))
    row_of = GOLDEN["matrix"]["lang"].index(base)
    assert lss(shifts) == pytest.approx(GOLDEN["matrix"][NAMES[target]][row_of])


@pytest.mark.parametrize(("steered", "baseline", "expected"), GOLDEN["eval_dod_examples"])
def test_ties_do_not_count(steered: list[float], baseline: list[float], expected: float) -> None:
    assert lss([s - b for s, b in zip(steered, baseline, strict=True)]) == pytest.approx(expected, abs=1e-6)
