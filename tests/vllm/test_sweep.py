"""Sweeps in one live engine: the scores of `steered-hf`, kills at any moment, and a worker that dies."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.report.comparison import compare_runs
from lm_eval_steering.report.read import read_results
from lm_eval_steering.sweep import Store
from lm_eval_steering.sweep.cells import Cell
from lm_eval_steering.sweep.estimate import CellLog
from tests.sweep.conftest import PLAN, Spell, merged, run

EAGER: dict[str, Any] = {"enforce_eager": True, "max_model_len": 512}
ENGINE = {"name": "steered-vllm", "arguments": EAGER}
CHANGES: dict[str, Any] = {
    "model": {"pretrained": "demo", "dtype": "float32"},
    "tasks": ["small_lss", "small_forcing", "small_choice"],
    "interventions": [*PLAN["interventions"], {"op": "scale", "factors": {"damage": [0.3]}}],
    "damage": {"sentences": 12},
}
KILLS = 5


@pytest.fixture(scope="module")
def by_hooks(vllm: None, spell: Spell, tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("hooks") / "run"
    assert run(spell(PLAN, **CHANGES), out).exit_code == 0
    return Store(out)


@pytest.fixture(scope="module")
def plan_file(spell: Spell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan = spell(PLAN, **CHANGES, engine=ENGINE).plan
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json", exclude_none=True)))
    return path


def command(plan: Path, out: Path) -> list[str]:
    return [str(Path(sys.executable).parent / "lm-eval-steering"), "sweep", str(plan), "--out", str(out)]


@pytest.fixture(scope="module")
def uninterrupted(vllm: None, plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same plan in one engine, by the command."""
    out = tmp_path_factory.mktemp("engine") / "run"
    done = subprocess.run(command(plan_file, out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Store(out)


def differences(found: Store, expected: Store) -> float:
    """Largest difference of a likelihood metric; everything that counts items is equal."""
    furthest = 0.0
    ours = {(cell.intervention.name, cell.task, cell.target): cell for cell in expected.planned()}
    theirs = {(cell.intervention.name, cell.task, cell.target): cell for cell in found.planned()}
    assert theirs.keys() == ours.keys()
    for place, cell in theirs.items():
        one, other = found.read(cell.key), expected.read(ours[place].key)
        assert one.facts["metrics"].keys() == other.facts["metrics"].keys()
        for key, value in one.facts["metrics"].items():
            was = other.facts["metrics"][key]
            if any(word in key for word in ("nats_per_token", "bits_per_byte", "perplexity", "lss_shift")):
                furthest = max(furthest, abs(value - was) / max(1.0, abs(was)))
            else:
                assert value == was, (place, key)
        assert one.facts["n"] == other.facts["n"]
        if cell.task == "small_forcing":
            texts = [
                [sample["filtered_resps"] for sample in store.samples(key)]
                for store, key in ((found, cell.key), (expected, ours[place].key))
            ]
            assert texts[0] == texts[1]
    return furthest


def test_a_sweep_in_one_engine_scores_as_steered_hf(
    by_hooks: Store, uninterrupted: Store, tmp_path: Path, record_property: Any
) -> None:
    furthest = differences(uninterrupted, by_hooks)
    record_property("furthest", furthest)
    assert furthest < 1e-4
    cells = uninterrupted.planned()
    assert len(cells) == len(by_hooks.planned()) > 15
    assert {cell.stage for cell in cells} == {0, 1, 2} and any(cell.intervention.control == 0 for cell in cells)
    assert not {cell.key for cell in cells} & {cell.key for cell in by_hooks.planned()}
    fingerprints = [{stored.facts["fingerprint"] for stored in store.stored()} for store in (uninterrupted, by_hooks)]
    assert not fingerprints[0] & fingerprints[1]
    steering = uninterrupted.read(cells[-1].key).results["config"]["steering"]
    assert steering["engine"]["name"] == "vllm"
    assert uninterrupted.timings().device.unique().tolist() == ["cpu x 1"]
    # Both in one table, told apart by the engine.
    tables = merged([uninterrupted.path, by_hooks.path], tmp_path / "both")["metrics.csv"].decode()
    assert "engine" in tables.splitlines()[0] and ",steered-vllm," in tables and ",steered-hf," in tables
    comparison = compare_runs(read_results(by_hooks.path), read_results(uninterrupted.path))
    assert len(comparison.cells) > 10


def test_factors_of_equal_damage_are_those_of_steered_hf(by_hooks: Store, uninterrupted: Store) -> None:
    searches = [
        {path.name: json.loads(path.read_text()) for path in (store.path / "factors").glob("*.json")}
        for store in (uninterrupted, by_hooks)
    ]
    assert searches[0].keys() == searches[1].keys() and len(searches[0]) >= 2
    reached = 0
    for name, found in searches[0].items():
        expected = searches[1][name]
        (target,), (other,) = found["targets"], expected["targets"]
        assert (target["factor"], target["within"]) == (other["factor"], other["within"]), name
        assert target["damage"] == pytest.approx(other["damage"], abs=1e-4)
        damages = [{one["factor"]: one["damage"] for one in each["evaluations"]} for each in (found, expected)]
        assert damages[0] == pytest.approx(damages[1], abs=1e-4), name
        reached += target["within"]
    assert reached > 0


def test_the_folder_of_another_engine_is_refused(by_hooks: Store, spell: Spell) -> None:
    with pytest.raises(SteeringError, match=r"is the sweep of another model .*engine: None here, .*steered-vllm"):
        run(spell(PLAN, **CHANGES, engine=ENGINE), by_hooks.path)


def descendants(pid: int) -> set[int]:
    """Processes that a process has started, and theirs."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def are_gone(pids: set[int], seconds: float = 20) -> bool:
    """Whether processes have ended; those that nobody has waited for count as ended."""
    deadline = time.monotonic() + seconds
    while alive := {pid for pid in pids if Path(f"/proc/{pid}").exists() and _state(pid) != "Z"}:
        if time.monotonic() > deadline:
            return False
        pids = alive
        time.sleep(0.1)
    return True


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_killed_at_five_moments_it_ends_with_the_same_tables(
    uninterrupted: Store, plan_file: Path, tmp_path: Path
) -> None:
    out, moments = tmp_path / "run", random.Random(3)
    for kill in range(KILLS):
        before = len(Store(out).folders())
        with subprocess.Popen(command(plan_file, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            # In turn while it starts, and when it has finished another cell.
            while kill % 2 and len(Store(out).folders()) == before:
                time.sleep(0.05)
            time.sleep(moments.uniform(0, 1 if kill % 2 else 15))
            engine = descendants(process.pid)
            process.kill()
        assert are_gone(engine), "the engine's processes do not stay behind with their memory"
    before = len(Store(out).folders())
    assert 0 < before < len(uninterrupted.folders())
    assert subprocess.run(command(plan_file, out), capture_output=True, check=False).returncode == 0
    assert not list(out.glob("cells/.*"))
    assert merged([out], tmp_path / "a") == merged([uninterrupted.path], tmp_path / "b")


class Killing(CellLog):
    """Kills a worker of the engine soon after a cell has begun."""

    def __init__(self, at: int) -> None:
        super().__init__(stream=io.StringIO())
        self.lines: list[str] = []
        self._at = at

    def begin(self, cell: Cell, done: int, total: int, left: float | None) -> None:
        super().begin(cell, done, total, left)
        if done == self._at:
            self._at = -1
            workers = [pid for pid in descendants(os.getpid()) if "Worker_TP1" in _command(pid)]
            assert len(workers) == 1
            os.kill(workers[0], signal.SIGKILL)

    def say(self, text: str) -> None:
        self.lines.append(text)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_killed_worker_costs_one_cells_time_and_no_result(
    by_hooks: Store,
    spell: Spell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    grid_alone = {"interventions": PLAN["interventions"], "damage": None}
    changes = CHANGES | {"tasks": ["small_lss", "small_forcing"], "controls": None} | grid_alone
    engine = {"name": "steered-vllm", "arguments": EAGER | {"tensor_parallel_size": 2}}
    grid, log = spell(PLAN, **changes, engine=engine), Killing(3)
    outcome = run(grid, tmp_path / "run", progress=log)
    assert (outcome.exit_code, outcome.failed) == (0, [])
    assert outcome.ran == len(Store(tmp_path / "run").folders())
    (line,) = [line for line in log.lines if "the engine died" in line]
    assert line.startswith(grid.cells[3].name)
    hooks = tmp_path / "hooks"
    assert run(spell(PLAN, **changes), hooks).exit_code == 0
    assert differences(Store(tmp_path / "run"), Store(hooks)) < 1e-4
