"""The decision table of docs/report.md, one test for each of its cells, and the sentences that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_eval_steering.report.conclusions import (
    DEGENERATE_LIMIT,
    DESTROYS,
    HELPS,
    HURTS,
    NATS_LIMIT,
    NO_EVIDENCE,
    SETS_FOR_A_CLAIM,
    Evidence,
    answer,
)  # fmt: skip
from lm_eval_steering.report.figures import gallery
from lm_eval_steering.report.page import explorer_data
from lm_eval_steering.report.read import read_results
from lm_eval_steering.report.tables import Results, by_relation, compute
from tests.report.synthetic import FolderOfCells, right

ABOVE, INCLUDES, BEGINS_AT, BELOW, NONE = (0.1, 0.3), (-0.1, 0.3), (0.0, 0.3), (-0.3, -0.1), (np.nan, np.nan)
FEW, ENOUGH = {"sets": 3}, {"sets": SETS_FOR_A_CLAIM}
REACHED_BY_FEW, REACHED = FEW | {"reached": 1}, ENOUGH | {"reached": 1}
GARBAGE, NATS = {"degenerate": DEGENERATE_LIMIT}, {"nats": NATS_LIMIT}


@pytest.mark.parametrize(
    ("interval", "beside", "expected"),
    [
        # past a limit of damage, whatever else is true
        (ABOVE, GARBAGE, DESTROYS),
        (ABOVE, NATS, DESTROYS),
        (ABOVE, NATS | ENOUGH, DESTROYS),
        (INCLUDES, GARBAGE, DESTROYS),
        (BELOW, GARBAGE, DESTROYS),
        (NONE, NATS, DESTROYS),
        # below 0
        (BELOW, {}, HURTS),
        (BELOW, ENOUGH, HURTS),
        # includes 0, begins at 0, or is not known
        (INCLUDES, ENOUGH, NO_EVIDENCE),
        (BEGINS_AT, ENOUGH, NO_EVIDENCE),
        (NONE, ENOUGH, NO_EVIDENCE),
        # above 0, by random sets
        (ABOVE, REACHED, NO_EVIDENCE),
        (ABOVE, REACHED_BY_FEW, NO_EVIDENCE),
        (ABOVE, ENOUGH, HELPS),
        (ABOVE, FEW, HELPS),
        (ABOVE, {}, HELPS),
        # damage within its limits
        (ABOVE, {"degenerate": DEGENERATE_LIMIT - 0.01, "nats": NATS_LIMIT - 0.01}, HELPS),
        # LSS, whose null is random sets
        (ABOVE, ENOUGH | {"random_is_null": True}, HELPS),
        (ABOVE, FEW | {"random_is_null": True}, NO_EVIDENCE),
        (ABOVE, {"random_is_null": True}, NO_EVIDENCE),
        (ABOVE, REACHED | {"random_is_null": True}, NO_EVIDENCE),
    ],
)
def test_each_cell_of_the_decision_table(interval: tuple[float, float], beside: dict[str, Any], expected: str) -> None:
    assert Evidence(*interval, **beside).verdict == expected


FORCING, TEXTS = "made_up_generation", {code: f"steering_nats_{code}" for code in ("deu_Latn", "fra_Latn", "tha_Thai")}


class Made:
    """A sweep of generations and perplexities whose numbers are chosen here."""

    def __init__(self, path: Path) -> None:
        self.cells = FolderOfCells(path)
        self.baseline()

    def baseline(self, items: int = 40, task: str = FORCING) -> None:
        words = [f"The weather is fine today {place}" for place in range(items)]
        self.cells.add(task, {"output_language": ["eng_Latn"] * items, "degenerate": [0.0] * items}, texts=words)

    def forcing(
        self, code: str, hits: int, garbage: int = 0, factor: float = 2, items: int = 40, distinct: int = 40,
        task: str = FORCING, **more: Any,
    ) -> None:  # fmt: skip
        """So many outputs in the language, so many of them degenerate, and so many that differ from each other."""
        labels = [code if place < hits else "eng_Latn" for place in range(items)]
        metrics = {
            "output_language": labels, "lfs": [float(label == code) for label in labels],
            "degenerate": [float(place < garbage) for place in range(items)],
        }  # fmt: skip
        self.cells.add(
            task, metrics, code, factor, texts=[f"text {place % distinct}" for place in range(items)], **more
        )

    def nats(self, text: str, code: str = "", rise: float = 0.0, factor: float = 2, **more: Any) -> None:
        """A rise of nats per token on the texts of a language."""
        pairs = [[-10.0 * (2 + rise) - place % 3, 10] for place in range(20)]
        self.cells.add(TEXTS[text], {"nats_per_token": pairs}, code, factor if code else 0, **more)

    def results(self) -> Results:
        return compute(read_results(self.cells.path))

    def sentences(self) -> tuple[str, ...]:
        return answer(self.results()).sentences


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "sweep")


def test_an_improvement_is_stated_with_intervention_factor_language_and_damage(made: Made) -> None:
    made.forcing("deu_Latn", 30, garbage=4)
    made.nats("deu_Latn")
    made.nats("deu_Latn", "deu_Latn", 0.5)
    verdict, _, chance = made.sentences()
    assert verdict.startswith("Helps at this price: with scale at ×2 (German)")
    # 4 of 30 hits are degenerate
    assert "from 0 to 0.65" in verdict and "degenerate outputs +10 points" in verdict and "own text +0.5" in verdict
    assert "no matched random sets" in chance


def test_outputs_that_ignore_their_prompts_are_part_of_the_price(made: Made) -> None:
    made.forcing("deu_Latn", 30, distinct=10)
    verdict, *_ = made.sentences()
    assert "equal to that of another prompt +75 points" in verdict  # 30 of 40 repeat one of the first ten


def test_the_price_is_the_mean_over_all_tasks_of_a_language(made: Made) -> None:
    for task, garbage in (("steering_forcing_ita_Latn", 4), ("steering_forcing_spa_Latn", 20)):
        made.baseline(task=task)
        made.forcing("deu_Latn", 30, garbage, task=task)
    verdict, *_ = made.sentences()
    assert "degenerate outputs +30 points" in verdict  # 4 and 20 of 40


def test_text_that_is_destroyed_is_not_called_help(made: Made) -> None:
    made.forcing("deu_Latn", 40, garbage=24)
    verdict, *_ = made.sentences()
    assert verdict.startswith("Destroys the text") and "degenerate outputs +60 points" in verdict
    assert "limit of 50 points" in verdict


def test_an_interval_that_begins_at_0_is_no_evidence(made: Made) -> None:
    made.forcing("deu_Latn", 1)
    verdict, *_ = made.sentences()
    assert verdict.startswith("No evidence") and "includes 0" in verdict


@pytest.mark.parametrize(("sets", "claimed"), [(3, False), (SETS_FOR_A_CLAIM, True)])
def test_being_above_random_sets_is_claimed_from_twenty_on(made: Made, sets: int, claimed: bool) -> None:
    made.forcing("deu_Latn", 30)
    for control in range(sets):
        made.forcing("deu_Latn", control % 5, control=control)
    verdict, _, chance = made.sentences()
    assert verdict.startswith("Helps")
    assert ("above every one of them" in chance) is claimed
    assert (f"{sets} random sets, too few to exclude chance" in chance) is not claimed


def test_what_random_sets_reach_is_no_evidence(made: Made) -> None:
    made.forcing("deu_Latn", 30)
    for control in range(SETS_FOR_A_CLAIM):
        made.forcing("deu_Latn", 31 if control == 7 else 2, control=control)
    verdict, _, chance = made.sentences()
    assert verdict.startswith("No evidence") and "random neurons do as much" in verdict
    assert "1 of them reached" in chance


def test_averages_over_other_languages_are_not_compared(made: Made) -> None:
    """Damage is known for one of two languages, and its limit is passed there."""
    for code in ("deu_Latn", "fra_Latn"):
        made.forcing(code, 30)
    made.nats("deu_Latn")
    made.nats("deu_Latn", "deu_Latn", NATS_LIMIT + 0.46)
    verdict, *_ = made.sentences()
    assert verdict.startswith("Destroys") and "+3.46 (German); not measured for French" in verdict


def test_the_answer_follows_what_the_sweep_chose_for_each_language(tmp_path: Path) -> None:
    """Each language has another intervention in the second stage; the damage is that of the chosen one."""
    made = Made(tmp_path / "sweep")
    for code, op, factor in (("deu_Latn", "set", 1), ("fra_Latn", "scale", 4)):
        for stage in (1, 2):
            made.forcing(code, 30, factor=factor, op=op, stage=stage, **({"items": 30} if stage == 2 else {}))
        made.nats("deu_Latn", code, 1.0, factor=factor, op=op)
        made.nats("deu_Latn", code, 2.9, factor=8)
    made.nats("deu_Latn")
    verdict, others, _ = made.sentences()
    assert "scale at ×4 (French); set 1 at ×1 (German)" in verdict
    assert "own text +1 (German); not measured for French" in verdict
    assert "+1 (French); not measured for German" in others


def deactivations(made: Made, own: float, other: float, controls: int = 0) -> None:
    for text in TEXTS:
        made.nats(text)
        for code in TEXTS:
            made.nats(text, code, own if text == code else other, factor=1, op="deactivate")
            for control in range(controls):
                made.nats(text, code, 0.1, factor=1, op="deactivate", control=control)


def test_a_deactivation_is_judged_by_damage_to_the_deactivated_language(tmp_path: Path) -> None:
    made = Made.__new__(Made)
    made.cells = FolderOfCells(tmp_path / "sweep")
    deactivations(made, 2.0, 0.25, controls=2)
    (sentence,) = made.sentences()
    assert sentence.startswith("Damages its own language most") and "help" not in sentence
    assert "own text by +2 " in sentence and "others' by +0.25" in sentence
    assert "3 of 3 rows" in sentence and "2 matched random sets" in sentence and "too few" in sentence


def test_a_deactivation_that_hurts_all_alike_is_no_evidence(tmp_path: Path) -> None:
    made = Made.__new__(Made)
    made.cells = FolderOfCells(tmp_path / "sweep")
    deactivations(made, 1.0, 1.0)
    (sentence,) = made.sentences()
    assert sentence.startswith("No evidence") and "0 of 3 rows" in sentence and "no matched random sets" in sentence


def test_a_high_lss_with_degenerate_outputs_is_pointed_out_and_captions_name_lss(made: Made) -> None:
    for factor in (2, 4):
        made.forcing("deu_Latn", 3, garbage=30, factor=factor)
        made.cells.add("steering_lss_eng_Latn", {"lss": right(1.0)}, "deu_Latn", factor)
    sentences = made.sentences()
    warning = next(sentence for sentence in sentences if sentence.startswith("LSS is high"))
    assert "German, scale ×2: LSS 1, 0 % of the outputs in the language and not degenerate, 75 % degenerate" in warning
    captions = [picture.caption for picture in gallery(made.results()) if picture.caption.startswith("LSS")]
    assert captions
    assert not any("comparisons" in caption or "difference from the baseline" in caption for caption in captions)


def test_the_first_table_has_data_in_every_row_and_the_explorer_opens_on_generations(made: Made) -> None:
    made.cells.add("aaa_first_by_name", {"acc": right(0.0)})
    made.cells.add("aaa_first_by_name", {"acc": right(0.0)}, "deu_Latn", 2)
    made.forcing("deu_Latn", 30)
    results = made.results()
    rows = by_relation(results.summary)
    assert rows["score"].notna().all() and (rows["cells"] > 0).all()
    assert rows["metric"].iloc[0] == "lfs_clean" and rows["metric"].iloc[-1] != "lfs_clean"
    assert [group["task"] for group in explorer_data(results.sweep)] == [FORCING]


def test_best_factors_are_of_scores_that_are_known_to_be_better_high_or_low(made: Made) -> None:
    for factor in (2, 4):
        made.forcing("deu_Latn", 30, factor=factor)
        made.cells.add("odd", {"unjudged": right(0.5)}, "deu_Latn", factor)
    made.cells.add("odd", {"unjudged": right(0.4)})
    best = made.results().best
    assert "lfs_clean" in set(best["metric"]) and "unjudged" not in set(best["metric"])
    assert (best["n"] + best["n_choose"] == 40).all()
