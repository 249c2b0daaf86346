"""`lm-eval-steering report` and `compare` as a user types them, and a store whose plan has halved its items."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from lm_eval_steering.report.read import read_results
from lm_eval_steering.report.tables import compute
from lm_eval_steering.sweep.halves import REPORT, half_of
from lm_eval_steering.sweep.merge import merge
from tests.conftest import Command
from tests.report.synthetic import FolderOfCells, right

TASK = "steering_xcopa_fra_Latn"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweeps of one cell and its baseline of 0.5: `first` scores 0.6 and `second` 0.8."""
    folder = tmp_path_factory.mktemp("runs")
    for name, share in (("first", 0.6), ("second", 0.8)):
        made = FolderOfCells(folder / name)
        made.add(TASK, {"acc": right(0.5)})
        made.add(TASK, {"acc": right(share)}, "fra_Latn", 2)
        made.add(TASK, {"acc": right(0.9)}, "fra_Latn", 2, op="set")
    return folder


def differences(out: Path) -> dict[str, float]:
    frame = pd.read_csv(out / "tables" / "effects.csv")
    return dict(zip(frame["kind"], frame["difference"].round(9), strict=True))


def test_report_writes_the_page_and_says_the_answer(command: Command, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    code, said, _ = command("report", runs / "first", "--out", out)
    assert code == 0 and f"wrote {out / 'report.html'}" in said and "n = 40 items" in said
    assert differences(out) == {"scale": 0.1, "set 1": 0.4}
    assert f"lm-eval-steering report {runs / 'first'} --out {out}" in (out / "report.html").read_text()
    assert {path.suffix for path in (out / "figures").iterdir()} <= {".svg", ".pdf", ".png"}


def test_report_takes_a_plain_run_as_baseline(command: Command, tmp_path: Path) -> None:
    FolderOfCells(tmp_path / "sweep").add(TASK, {"acc": right(0.75)}, "fra_Latn", 2)
    plain = FolderOfCells(tmp_path / "plain").add(TASK, {"acc": right(0.5)})
    (baseline,) = (tmp_path / "plain" / "cells" / plain).glob("results_*.json")
    assert command("report", tmp_path / "sweep", "--out", tmp_path / "out", "--baseline", baseline)[0] == 0
    assert differences(tmp_path / "out") == {"scale": 0.25}


def test_compare_shows_the_second_run_against_the_first(command: Command, runs: Path, tmp_path: Path) -> None:
    assert command("compare", runs / "first", runs / "second", "--out", tmp_path)[0] == 0
    assert differences(tmp_path)["scale"] == 0.2


def test_compare_shows_one_intervention_against_another(command: Command, runs: Path, tmp_path: Path) -> None:
    kinds = ("--intervention", "scale", "--intervention", "set 1")
    assert command("compare", runs / "second", *kinds, "--out", tmp_path)[0] == 0
    assert list(differences(tmp_path).values()) == [0.1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("report", "{runs}/third", "--out", "{out}"), "third is not a folder"),
        (("compare", "{runs}/first", "--out", "{out}", "--intervention", "scal"), "give two|two"),
        (("compare", "{runs}/first", "{runs}/second", "--out", "{out}", "--intervention", "scale"), "leave one"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    command: Command, runs: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    code, out, err = command(*(word.format(runs=runs, out=tmp_path / "out") for word in words))
    assert code == 2 and not out and err.count("\n") == 1
    assert any(part in err for part in said.split("|"))
    assert not (tmp_path / "out").exists()


def test_the_halves_are_those_of_the_plan(tmp_path: Path) -> None:
    made = FolderOfCells(tmp_path / "sweep")
    made.add(TASK, {"acc": right(0.5)})
    for factor, share in ((2, 0.6), (4, 0.8)):
        made.add(TASK, {"acc": right(share)}, "fra_Latn", factor)
    plan = {"choose": {"split": "half", "seed": 11, "item": None}}
    (made.path / "plan.json").write_text(json.dumps({"plan": plan, "plan_hash": "synthetic", "cells": []}))
    reported = [place for place in range(40) if half_of(str(place), 11) == REPORT]
    merge([made.path], tmp_path / "merged", items=True)
    for folder in ("sweep", "merged"):
        (row,) = compute(read_results(tmp_path / folder)).best.to_dict("records")
        assert (row["factor"], row["n"], row["n_choose"]) == (4, len(reported), 40 - len(reported))
        assert row["score"] == pytest.approx(sum(place < 32 for place in reported) / len(reported))
        assert row["baseline"] == pytest.approx(sum(place < 20 for place in reported) / len(reported))
