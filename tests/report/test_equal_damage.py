"""Interventions at equal damage: the table, the sentence, the LaTeX table and the figure, from known scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.analysis.style import LIGHT
from lm_eval_steering.report.conclusions import answer
from lm_eval_steering.report.figures import at_equal_damage, gallery
from lm_eval_steering.report.methods import methods
from lm_eval_steering.report.page import write_report
from lm_eval_steering.report.read import read_results
from lm_eval_steering.report.table_files import printed
from lm_eval_steering.report.tables import Results, compute
from tests.report.synthetic import FolderOfCells, right

TASK = "made_up_forcing"
# (operation, language, asked, reached, factor, share right): factors differ, damage does not.
CELLS = [
    ("scale", "deu_Latn", (0.1,), 0.104, 2.0, 0.2), ("scale", "fra_Latn", (0.1,), 0.097, 5.0, 0.3),
    ("scale", "deu_Latn", (1.0,), 0.98, 9.0, 0.4), ("scale", "fra_Latn", (1.0,), 1.03, 21.0, 0.5),
    ("add", "deu_Latn", (0.1,), 0.1, 0.4, 0.4), ("add", "fra_Latn", (0.1,), 0.13, 0.7, 0.6),
    ("add", "deu_Latn", (1.0,), 1.0, 1.5, 0.9),
]  # fmt: skip


def write(path: Path, cells: list[Any] = CELLS) -> Path:
    made = FolderOfCells(path)
    made.add(TASK, {"lfs": right(0.1)})
    made.add("steering_damage", {"nats_per_token": [[-30.0, 10]] * 12}, stage=0, target="deu_Latn")
    made.add("steering_damage", {"nats_per_token": [[-32.0, 10]] * 12}, "deu_Latn", 2.0, stage=0)
    for op, language, asked, reached, factor, share in cells:
        made.add(TASK, {"lfs": right(share)}, language, factor, op=op, damage=asked, reached=reached)
        for seed in (0, 1):  # at the same factor, and at the same damage
            made.add(TASK, {"lfs": right(0.1)}, language, factor, seed, op=op)
            at_damage = {"lfs": right(0.1 + 0.05 * seed)}
            made.add(TASK, at_damage, language, 3 * factor, seed, op=op, damage=asked, reached=asked[0])
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return compute(read_results(write(tmp_path_factory.mktemp("equal") / "run")))


def test_the_table_compares_at_the_damage_and_not_at_the_factor(results: Results) -> None:
    table = results.equal.set_index(["kind", "damage"])
    assert set(table.index) == {("scale", 0.1), ("scale", 1.0), ("add 1", 0.1), ("add 1", 1.0)}
    row = table.loc["scale", 0.1]
    assert (row.score, row.baseline, row.difference) == pytest.approx((0.25, 0.1, 0.15))
    assert (row.reached_low, row.reached_high) == (0.097, 0.104)
    assert (row.factor_low, row.factor_high, row.languages, row.missing, row.off_target) == (2, 5, 2, "", 0)
    assert row.low < row.difference < row.high
    assert (row.sets, row.sets_at_factor) == (2, 2)
    assert (row.random_lowest, row.random_highest) == pytest.approx((0.1, 0.15))
    assert row.random_at_factor == pytest.approx(0.1)
    assert table.loc[("add 1", 0.1), "off_target"] == 1  # 0.13 where 0.1 was asked
    alone = table.loc["add 1", 1.0]
    assert (alone.languages, alone.steered, alone.missing) == (1, "deu_Latn", "fra_Latn")


def test_evaluations_on_the_way_are_in_no_other_table(results: Results) -> None:
    assert "steering_damage" not in set(results.sweep.cells.task)
    assert set(results.effects.frame.task) == {TASK}
    kinds = {picture.name.split("-")[0] for picture in gallery(results)}
    assert "equal" in kinds and "curve" not in kinds and "matrix" not in kinds


def test_the_sentence_names_the_damage_and_compares_the_same_languages(results: Results) -> None:
    told = [text for text in answer(results).sentences if text.startswith("At a damage of")]
    first, second = [text for text in told if "the steered language's own text" in text]
    assert "At a damage of 0.1 nats per token" in first and "over 2 languages is 0.5 under add 1" in first
    assert first.index("add 1") < first.index("scale")  # the higher first
    assert "random neurons 0.1 to 0.15 (2 sets at the same damage)" in first
    assert "damage reached 0.1 to 0.13" in first
    assert (
        "0.45 under scale" in second and "not compared, because it is of other languages: add 1 (1 language)" in second
    )


def test_the_methods_paragraph_names_damages_and_no_factors(results: Results) -> None:
    text = methods(results).plain
    assert "nats per token of held-out text in the steered language by 0.1 and 1 (found" in text
    assert " at factor" not in text


def test_printed_and_drawn(results: Results, tmp_path: Path) -> None:
    frame, caption = printed(results)["equal-damage-made-up-forcing-lfs-several"]
    assert "nats per token" in caption and "same damage" in caption
    assert list(frame["damage"]) == ["0.1", "0.1", "1", "1"]
    assert "0.1 to 0.13*" in set(frame["reached"]) and "fra_Latn" in set(frame["missing"])
    assert "0.125 (0.1 to 0.15, 2 sets)" in set(frame["random, same damage"])
    figure = at_equal_damage(results.equal, LIGHT)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and len(axes.containers) == 2
    assert [text.get_text() for text in axes.texts] == ["1 of 2"]
    write_report(results.sweep, tmp_path / "report")
    (latex,) = (tmp_path / "report").rglob("equal-damage-made-up-forcing-lfs-several.tex")
    assert r"\toprule" in latex.read_text()
    assert "At a damage of 0.1 nats per token" in (tmp_path / "report" / "report.html").read_text()


def test_without_searched_factors_there_is_no_such_table(tmp_path: Path) -> None:
    made = FolderOfCells(tmp_path / "run")
    made.add(TASK, {"lfs": right(0.1)})
    made.add(TASK, {"lfs": right(0.5)}, "deu_Latn", 2.0)
    results = compute(read_results(tmp_path / "run"))
    assert results.equal.empty and "equal-damage" not in results.frames()
    assert not any("At a damage of" in text for text in answer(results).sentences)
