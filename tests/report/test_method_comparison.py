"""Methods compared by language: at equal damage and each at its best, from known scores of known items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lm_eval_steering.analysis.style import LIGHT
from lm_eval_steering.metrics.statistics import Arm, compare
from lm_eval_steering.report.conclusions import _winner, answer
from lm_eval_steering.report.effects import halves_of
from lm_eval_steering.report.figures import success_against_damage
from lm_eval_steering.report.method_comparison import BEST, MEAN_OVER, MethodComparison
from lm_eval_steering.report.read import read_results
from lm_eval_steering.report.table_files import printed
from lm_eval_steering.report.tables import Results, compute
from tests.report.synthetic import FolderOfCells, right

TASK = "made_up_forcing"
ITEMS = 40
# (operation, language, damages asked for, damage measured, factor, share right); `set` has one point, as a prompt has.
CELLS: list[tuple[str, str, tuple[float, ...], float | None, float, float]] = [
    ("scale", "deu_Latn", (0.1,), 0.1, 2.0, 0.2), ("scale", "fra_Latn", (0.1,), 0.1, 5.0, 0.3),
    ("scale", "deu_Latn", (1.0,), 1.0, 9.0, 0.4), ("scale", "fra_Latn", (1.0,), 1.0, 21.0, 0.25),
    ("add", "deu_Latn", (0.1,), 0.1, 0.4, 0.6), ("add", "fra_Latn", (0.1,), 0.1, 0.7, 0.325),
    ("add", "deu_Latn", (1.0,), 1.0, 1.5, 0.9),
    ("set", "deu_Latn", (), 0.05, 1.0, 0.575), ("set", "fra_Latn", (), 0.6, 1.0, 0.5),
]  # fmt: skip


def write(path: Path, cells: list[Any] = CELLS, sets: int = 2, metric: str = "lfs") -> Path:
    made = FolderOfCells(path)
    made.add(TASK, {metric: right(0.1)})
    for op, language, asked, reached, factor, share in cells:
        made.add(TASK, {metric: right(share)}, language, factor, op=op, damage=asked, reached=reached)
        for seed in range(sets if asked else 0):
            values = {metric: right(0.1 + 0.3 * seed)}
            made.add(TASK, values, language, 3 * factor, seed, op=op, damage=asked, reached=asked[0])
    return path


def compared(path: Path, *arguments: Any, **more: Any) -> Results:
    return compute(read_results(write(path / "run", *arguments, **more)))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return compared(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def comparison(results: Results) -> MethodComparison:
    assert results.methods is not None
    return results.methods


def row_of(comparison: MethodComparison, at: str, steered: str, kind: str) -> Any:
    rows = comparison.rows
    (row,) = rows[(rows["at"] == at) & (rows["steered"] == steered) & (rows["kind"] == kind)].itertuples()
    return row


def pair_of(comparison: MethodComparison, at: str, steered: str, kinds: set[str]) -> Any:
    pairs = comparison.pairs
    (row,) = [
        row for row in pairs[(pairs["at"] == at) & (pairs["steered"] == steered)].itertuples()
        if {row.kind, row.other} == kinds
    ]  # fmt: skip
    return row


def test_a_row_has_success_damage_and_random_sets_at_that_damage(comparison: MethodComparison) -> None:
    assert (comparison.family, comparison.metric) == (TASK, "lfs")
    row = row_of(comparison, "0.1", "deu_Latn", "add 1")
    assert (row.factor, row.damage, row.n) == (0.4, 0.1, ITEMS)
    assert (row.baseline, row.success, row.difference) == pytest.approx((0.1, 0.6, 0.5))
    assert row.low < row.difference < row.high
    assert (row.sets, row.random_reached) == (2, 0)
    assert (row.random_lowest, row.random_mean, row.random_highest) == pytest.approx((0.1, 0.25, 0.4))
    assert row_of(comparison, "0.1", "deu_Latn", "scale").random_reached == 1  # 0.4 against 0.2


def test_a_pair_is_compared_over_the_same_items(comparison: MethodComparison) -> None:
    row = pair_of(comparison, "0.1", "deu_Latn", {"add 1", "scale"})
    shares = {"add 1": 0.6, "scale": 0.2}
    arms = [Arm(np.array(right(shares[kind]))).column() for kind in (row.other, row.kind)]
    expected = compare(*arms)
    assert (row.difference, row.low, row.high, row.p, row.n) == pytest.approx(
        (expected.difference[0], expected.low[0], expected.high[0], expected.p_value[0], ITEMS)
    )


def test_a_winner_exceeds_every_other_method_by_the_whole_interval(comparison: MethodComparison) -> None:
    assert row_of(comparison, "0.1", "deu_Latn", "add 1").ahead_of == "scale"  # 0.6 against 0.575 of `set` is no win
    assert not row_of(comparison, "0.1", "deu_Latn", "add 1").wins
    assert row_of(comparison, "1", "deu_Latn", "add 1").wins
    (french,) = {row.ahead_of for row in comparison.rows.itertuples() if (row.at, row.steered) == ("0.1", "fra_Latn")}
    assert french == ""  # 0.325 against 0.3


def test_a_method_of_one_point_is_compared_where_it_costs_no_more(comparison: MethodComparison) -> None:
    assert row_of(comparison, "0.1", "deu_Latn", "set 1").success == 0.575
    assert row_of(comparison, "0.1", "deu_Latn", "set 1").damage == 0.05
    costly = row_of(comparison, "0.1", "fra_Latn", "set 1")
    assert costly.missing == "its one point does a damage of 0.6" and np.isnan(costly.success)
    assert row_of(comparison, "1", "fra_Latn", "set 1").success == 0.5


def test_what_is_missing_says_why(tmp_path: Path, comparison: MethodComparison) -> None:
    assert row_of(comparison, "1", "fra_Latn", "add 1").missing == "no factor does this damage"
    listed = [("add", "deu_Latn", (), None, 2.0, 0.2), ("add", "deu_Latn", (), None, 4.0, 0.3)]
    unmeasured = [("set", "deu_Latn", (), None, 1.0, 0.3), ("set", "fra_Latn", (), 0.1, 1.0, 0.3)]
    other = compared(tmp_path, [*CELLS[:4], *listed, *unmeasured]).methods
    assert other is not None
    assert row_of(other, "0.1", "deu_Latn", "add 1").missing == "its factors were not searched for"
    assert row_of(other, "0.1", "fra_Latn", "add 1").missing == "no finished cell"
    assert row_of(other, "0.1", "deu_Latn", "set 1").missing == "its damage was not measured"
    assert row_of(other, BEST, "deu_Latn", "set 1").success > 0


def test_means_are_over_the_same_languages_for_every_method(comparison: MethodComparison) -> None:
    row = row_of(comparison, "0.1", MEAN_OVER, "add 1")
    assert row.languages == 2 and row.success == pytest.approx((0.6 + 0.325) / 2) and row.n == 2 * ITEMS
    assert row_of(comparison, "0.1", MEAN_OVER, "set 1").missing == "of other languages: deu_Latn"
    pair = pair_of(comparison, "0.1", MEAN_OVER, {"add 1", "scale"})
    assert abs(pair.difference) == pytest.approx((0.4 + 0.025) / 2)
    alone = pair_of(comparison, "0.1", "deu_Latn", {"add 1", "scale"})
    assert pair.high - pair.low > alone.high - alone.low  # languages are drawn too
    kinds = {row.kind for row in comparison.pairs.itertuples() if (row.at, row.steered) == ("0.1", MEAN_OVER)}
    assert kinds <= {"add 1", "scale"}


def test_at_its_best_a_factor_is_chosen_on_one_half_and_measured_on_the_other(results: Results) -> None:
    comparison = results.methods
    assert comparison is not None
    row = row_of(comparison, BEST, "deu_Latn", "scale")
    items = next(results.sweep.items[cell] for cell in results.sweep.items if cell.startswith("deu_Latn-scale-x9--"))
    reported = halves_of(items)
    assert row.factor == 9.0 and row.n == reported.sum() < ITEMS
    assert row.success == pytest.approx(items.values["lfs"][reported].mean())
    one_point = row_of(comparison, BEST, "deu_Latn", "set 1")
    assert one_point.n == row.n, "a method of one point is measured on the same half"
    assert row.sets == 2, "random sets at the damage of the factor that was chosen"


def test_one_method_is_no_comparison(tmp_path: Path) -> None:
    assert compared(tmp_path, CELLS[:4]).methods is None


def sentence_of(
    rows: list[tuple[str, float, str]], sets: int, reached: int, low: float, n: int = 40, at: str = "0.3"
) -> str:
    """The sentence of two methods on one language, the first of which exceeds the other by an interval from `low`."""
    table = pd.DataFrame([
        {"at": at, "steered": "deu_Latn", "languages": 1, "kind": kind, "success": success, "damage": 0.3, "n": n,
         "missing": missing, "wins": low > 0 and kind == "a", "sets": sets, "random_reached": reached}
        for kind, success, missing in rows
    ])  # fmt: skip
    pair = {"at": at, "steered": "deu_Latn", "kind": "b", "other": "a", "difference": -0.2, "low": -0.4, "high": -low}
    return _winner(MethodComparison("forcing", "lfs_clean", table, pd.DataFrame([pair]), pd.DataFrame()), at)


@pytest.mark.parametrize(
    ("sets", "reached", "low", "verdict", "why"),
    [
        (
            20,
            0,
            0.1,
            "The winner is a (0.6, n = 40), exceeding b by +0.2 [+0.1, +0.4]",
            "none of 20 controls reaches it.",
        ),
        (5, 0, 0.1, "The winner is a", "none of 5 controls reaches it, too few to exclude chance (20)"),
        (0, 0, 0.1, "The winner is a", "no controls were run beside it"),
        (20, 3, 0.1, "No evidence for the highest, a", "3 of 20 controls reach it"),
        (20, 0, -0.1, "No winner", "exceeds b by +0.2 [-0.1, +0.4], which includes 0"),
    ],
)
def test_the_sentence_follows_the_decision_table(sets: int, reached: int, low: float, verdict: str, why: str) -> None:
    text = sentence_of([("a", 0.6, ""), ("b", 0.4, "")], sets, reached, low)
    assert text.startswith(verdict) and why in text


def test_no_winner_on_few_items_or_where_a_method_could_not_be_compared() -> None:
    rows = [("a", 0.6, ""), ("b", 0.4, "")]
    few = sentence_of(rows, 20, 0, 0.1, n=3)
    assert few.startswith("No winner") and "fewer than 10 items" in few
    other = [*rows, ("c", np.nan, "its items cannot be halved")]
    missing = sentence_of(other, 20, 0, 0.1, at=BEST)
    assert missing.startswith("No winner") and "c (its items cannot be halved)" in missing
    assert sentence_of(other, 20, 0, 0.1).startswith("The winner is a")


def test_printed_drawn_and_told(results: Results, comparison: MethodComparison) -> None:
    tables = printed(results)
    frame, caption = tables["methods-0.1"]
    assert "at a damage of 0.1 nats per token" in caption and "asterisk" in caption
    assert list(frame["language"]) == ["deu_Latn"] * 3 + ["fra_Latn"] * 3 + ["mean of 2"] * 3
    assert "its one point does a damage of 0.6" in set(frame["missing"])
    assert set(tables["methods-1"][0]["success"]) >= {"0.9*"} and "one half" in tables["methods-best"][1]
    assert {"methods", "methods-paired"} <= set(results.frames())
    figure = success_against_damage(comparison, LIGHT)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["German", "French", "mean of 2 languages"]
    lengths = [[len(line.get_xdata()) for line in axes.lines[1:]] for axes in panels]
    order = list(dict.fromkeys(comparison.points["kind"]))
    mean = dict(zip(order, lengths[-1], strict=True))
    assert mean == {"scale": 2, "add 1": 1, "set 1": 1}, "only damages that a method does in all languages"
    sentences = answer(results).sentences
    (at_damage,) = [text for text in sentences if text.startswith("At a damage of 0.1 ")]
    assert "exceeds scale by" in at_damage and "winners by language: none" in at_damage
    (at_best,) = [text for text in sentences if text.startswith("Each at its best")]
    assert "winners by language: add 1 on German" in at_best
