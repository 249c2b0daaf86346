"""Two processes of one job under gloo: each does half, and together they give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm_eval_steering.sweep.store import Store
from tests.sweep.conftest import ITEMS, PLAIN, Spell, run

# Batches of one row, because a row's last digits depend on the rows beside it, and two processes deal them otherwise.
TOGETHER: dict[str, Any] = PLAIN | {
    "model": {"pretrained": "demo", "batch_size": 1, "scoring": "plain"},
    "interventions": [{"op": "add", "value": "mean", "site": "product", "factor": 4}],
    "tasks": ["small_fragile", "small_lss", "small_choice", "small_nats", "small_forcing"],
}


@pytest.fixture(scope="module")
def alone(spell: Spell, tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run(spell(TOGETHER, tasks=TOGETHER["tasks"][1:]), out).exit_code == 0
    return Store(out)


def launch(plan: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "lm_eval_steering", "sweep", str(plan), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def together(task_files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    folder = tmp_path_factory.mktemp("together")
    (folder / "plan.yaml").write_text(yaml.safe_dump(TOGETHER | {"include_path": [str(task_files)]}))
    (task_files / "broken").write_text("21")  # the second item, which the second process has
    try:
        done = launch(folder / "plan.yaml", folder / "run")
    finally:
        (task_files / "broken").unlink()
    assert done.returncode == 1, done.stderr
    return Store(folder / "run"), done.stdout


def test_every_score_and_sample_is_that_of_one_process(alone: Store, together: tuple[Store, str]) -> None:
    store, message = together
    assert ITEMS % 2 == 1
    assert message.count("7 cells done, 7 of them now") == 1
    assert store.frame().equals(alone.frame())
    for name in sorted(set(alone.frame().cell)):
        assert store.samples(name) == alone.samples(name), name


def test_each_process_ran_about_half(alone: Store, together: tuple[Store, str]) -> None:
    for stored in alone.stored():
        other = together[0].read(stored.cell["key"])
        report, one = other.results["config"]["steering"], stored.results["config"]["steering"]
        assert report["processes"]["number"] == 2
        calls = report["processes"]["calls"]
        assert sum(calls) * 3 / ITEMS <= min(calls) and max(calls) <= sum(calls) * 4 / ITEMS
        if "evidence" in one:
            assert report["evidence"]["rank"] == "all of 2"
            padding = 2 * report["evidence"]["positions"] / ITEMS  # the last request of the smaller share, once more
            assert 0 <= report["evidence"]["positions"] - one["evidence"]["positions"] <= padding


def test_an_error_of_one_process_fails_the_cell_on_both_and_the_others_go_on(together: tuple[Store, str]) -> None:
    missing = together[0].missing()
    assert set(missing.task) == {"small_fragile"}
    assert set(missing.why) == {"ArithmeticError: the metric of item 21 is not defined"}
