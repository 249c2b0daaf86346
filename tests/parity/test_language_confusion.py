"""Line and word pass rates against the verdicts of the benchmark's own script (Marchisio et al. 2024).

`golden/language_confusion.json` has texts of ours in 15 languages, and for each what compute_metrics.py of
github.com/for-ai/language-confusion (commit 0cfdbb4) said of it with our list of words, lid.176.ftz, jieba 0.42.1 and
fugashi 1.5.2 with unidic-lite: `lines` (no line of another language; null where no line has five tokens) and `words`
(no English word; null where the script gives no word rate). `rates` is what it printed for all texts of a language.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.metrics.output_language import output_metrics
from lm_eval_steering.metrics.pass_rates import Passes, passes

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "language_confusion.json").read_text(encoding="utf-8")
)
TEXTS: list[dict[str, Any]] = GOLDEN["texts"]


def test_the_texts_are_many_and_hold_the_hard_cases() -> None:
    assert len(TEXTS) >= 60 and len(GOLDEN["rates"]) >= 13
    korean = [each for each in TEXTS if each["language"] == "kor_Hang"]
    assert sum(any("\u4e00" <= letter <= "\u9fff" for letter in each["text"]) for each in korean) >= 3
    assert {(each["lines"], each["words"]) for each in TEXTS} == {
        (True, True), (True, False), (True, None), (False, None), (None, None),
    }  # fmt: skip


def test_every_text_has_the_scripts_verdict() -> None:
    identifier = LanguageIdentifier()
    ours = [passes(each["text"], [each["language"]], identifier) for each in TEXTS]
    assert ours == [Passes(each["lines"], each["words"]) for each in TEXTS]


@pytest.mark.parametrize("code", GOLDEN["rates"])
def test_the_rates_of_a_language_are_the_scripts(code: str) -> None:
    found = [output_metrics(each["text"], expected=code) for each in TEXTS if each["language"] == code]

    def mean(name: str) -> float | None:
        values = [metrics[name] for metrics in found if name in metrics]
        return sum(values) / len(values) if values else None  # type: ignore[arg-type]

    assert {"lpr": mean("lpr"), "wpr": mean("wpr")} == pytest.approx(
        {"lpr": GOLDEN["rates"][code]["lpr"], "wpr": GOLDEN["rates"][code].get("wpr")}
    )
