"""What ends a sweep too early, and several runners on one folder: nothing finished is lost, nothing is done twice."""

from __future__ import annotations

import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.steering.intervention import Intervention
from lm_eval_steering.sweep.cells import Grid
from lm_eval_steering.sweep.estimate import CellLog, Estimate
from lm_eval_steering.sweep.locks import locked, owners, why_unsafe
from lm_eval_steering.sweep.runner import Shard
from lm_eval_steering.sweep.status import status
from lm_eval_steering.sweep.store import Store
from lm_eval_steering.sweep.sweep_model import SweepModel
from tests.commands import ended, forked
from tests.sweep.conftest import PLAIN, Spell, merged, run

KILLS = 10


def test_killed_at_ten_moments_it_ends_with_the_same_tables(grid: Grid, finished: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "run", random.Random(6)
    for kill in range(KILLS):
        before = len(Store(out).folders())
        pid = forked(lambda: run(grid, out).exit_code)
        # In turn while it starts, and while it is at its second cell.
        while kill % 2 and len(Store(out).folders()) == before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15 if kill % 2 else 0.5))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
    before = len(Store(out).folders())
    assert 0 < before < len(Store(finished).folders())
    last = run(grid, out)
    assert (last.exit_code, last.ran) == (0, last.done - before)
    assert not list(out.glob("cells/.*"))
    assert merged([out], tmp_path / "a") == merged([finished], tmp_path / "b")


def test_a_signal_ends_it_cleanly_and_the_next_run_goes_on(spell: Spell, tmp_path: Path) -> None:
    grid, out = spell(PLAIN, interventions=[{"op": "scale", "factors": list(range(2, 30))}]), tmp_path / "run"
    pid = forked(lambda: run(grid, out).exit_code)
    while not Store(out).folders():
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130
    before = Store(out).folders()
    assert 0 < len(before) < len(grid.cells)
    assert not list(out.glob("cells/.*")) and not list(out.glob("locks/*"))
    assert run(grid, out).ran == len(grid.cells) - len(before)
    assert before.items() <= Store(out).folders().items()


@pytest.mark.parametrize("runners", [2, 3])
def test_runners_on_one_folder_share_the_cells(grid: Grid, finished: Path, tmp_path: Path, runners: int) -> None:
    out, counts = tmp_path / "run", tmp_path / "counts"
    counts.mkdir()

    def work() -> int:
        outcome = run(grid, out)
        (counts / str(os.getpid())).write_text(str(outcome.ran))
        return outcome.exit_code

    assert [ended(pid) for pid in [forked(work) for _ in range(runners)]] == [0] * runners
    ran = [int(path.read_text()) for path in counts.iterdir()]
    assert sum(ran) == len(Store(out).planned()) == len(Store(out).folders())
    assert min(ran) > 0
    assert merged([out], tmp_path / "a") == merged([finished], tmp_path / "b")


def test_shards_are_balanced_and_one_that_is_early_says_what_it_waits_for(
    grid: Grid, finished: Path, tmp_path: Path
) -> None:
    parts = [Shard.parse(f"{i}/3").of(grid.cells) for i in (1, 2, 3)]
    assert sorted(cell.key for part in parts for cell in part) == sorted(cell.key for cell in grid.cells)
    for task in {cell.task for cell in grid.cells}:
        sizes = [sum(cell.task == task for cell in part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    out = tmp_path / "run"
    first = run(grid, out, "1/3")
    assert (first.exit_code, first.ran) == (3, len(parts[0]))
    assert "cells to choose on are not done, such as deu_Latn-" in first.waiting[0]
    rest = [run(grid, out, part) for part in ("2/3", "3/3", "1/3", "2/3")]
    assert [outcome.exit_code for outcome in rest] == [3, 0, 0, 0]
    assert merged([out], tmp_path / "a") == merged([finished], tmp_path / "b")


def test_shards_in_folders_of_their_own_merge_to_one_table(spell: Spell, small_run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders, 1):
        assert run(spell(PLAIN), folder, f"{number}/2").exit_code == 0
    assert merged(folders, tmp_path / "a") == merged([small_run], tmp_path / "b")


def test_a_cell_that_raises_is_noted_and_the_others_go_on(spell: Spell, task_files: Path, tmp_path: Path) -> None:
    grid, out, broken = spell(PLAIN, tasks=["small_fragile", "small_nats"]), tmp_path / "run", task_files / "broken"
    broken.touch()
    try:
        outcome = run(grid, out)
    finally:
        broken.unlink()
    assert outcome.exit_code == 1
    assert {cell.task for cell in outcome.failed} == {"small_fragile"}
    assert outcome.done == len(grid.cells) / 2
    missing = Store(out).missing()
    assert set(missing.status) == {"failed"}
    assert set(missing.why) == {"ArithmeticError: the metric of item 20 is not defined"}
    assert "in fragile" in Store(out).failure(outcome.failed[0].key)["traceback"]  # type: ignore[index]
    again = run(grid, out)
    assert (again.exit_code, again.ran) == (1, 0)
    repaired = run(grid, out, retry_failed=True)
    assert (repaired.exit_code, repaired.ran) == (0, len(outcome.failed))
    assert Store(out).missing().empty


class Tight(SweepModel):
    """A device with room for two rows; what it was asked for is noted."""

    asked: list[int]

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        super().__init__(pretrained, **arguments)
        self.asked = asked = []

        def allocate(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            tokens = args[0] if args else named["input_ids"]
            asked.append(len(tokens))
            if len(tokens) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        self.model.register_forward_pre_hook(allocate, with_kwargs=True)


@pytest.mark.parametrize("task", ["small_forcing", "small_choice"])
def test_out_of_memory_halves_the_batch_and_goes_on(spell: Spell, tmp_path: Path, task: str) -> None:
    model = {"pretrained": "demo", "batch_size": 7, "scoring": "plain"}
    grid, message = spell(PLAIN, tasks=[task], model=model), io.StringIO()
    models: list[Tight] = []

    def load(*args: Any, **arguments: Any) -> Tight:
        models.append(Tight(*args, **arguments))
        return models[0]

    outcome = run(grid, tmp_path / "run", load=load, progress=CellLog(stream=message))
    assert (outcome.exit_code, outcome.done) == (0, len(grid.cells))
    assert "out of memory, going on with 3 rows per forward pass" in message.getvalue()
    assert "out of memory, going on with 1 rows per forward pass" in message.getvalue()
    assert models[0].asked[:2] == [7, 3]
    assert set(models[0].asked[2:]) == {1}


def test_out_of_memory_with_one_row_fails_the_cell(spell: Spell, tmp_path: Path) -> None:
    def load(*args: Any, **arguments: Any) -> SweepModel:
        lm = SweepModel(*args, **arguments)

        def allocate(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        lm.model.register_forward_pre_hook(allocate)
        return lm

    grid = spell(PLAIN, tasks=["small_forcing"], model={"pretrained": "demo", "batch_size": 2})
    outcome = run(grid, tmp_path / "run", load=load)
    assert (outcome.exit_code, len(outcome.failed)) == (1, len(grid.cells))
    assert "OutOfMemoryError" in Store(tmp_path / "run").missing().why[0]


def test_a_full_disk_ends_it_with_a_clear_message_and_loses_nothing(spell: Spell, tmp_path: Path) -> None:
    grid, out = spell(PLAIN), tmp_path / "run"
    assert run(grid, out, "1/2").exit_code == 0
    before = sorted(Store(out).folders())

    def limited() -> int:
        size = max(path.stat().st_size for path in out.rglob("*.jsonl"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))
        try:
            run(grid, out)
        except SteeringError as error:
            (tmp_path / "message").write_text(str(error))
        return 0

    ended(forked(limited))
    message = (tmp_path / "message").read_text()
    assert "is evaluated and cannot be stored: File too large" in message and "free some space" in message
    assert sorted(Store(out).folders()) == before and not list(out.glob("cells/.*"))
    assert len(Store(out).frame()) > 0
    assert run(grid, out).ran == len(grid.cells) - len(before)


def test_a_small_full_file_system(spell: Spell, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this account may not mount a small file system; a limited file size is tested beside this")
    try:
        grid = spell(PLAIN, interventions=[{"op": "scale", "factors": [2, 3, 4, 5, 6, 7, 8]}])
        with pytest.raises(SteeringError, match=r"cannot be stored: No space left on device .*free some space"):
            run(grid, place / "run")
        store = Store(place / "run")
        done = len(store.folders())
        assert 0 < done < len(grid.cells) and len(set(store.frame().cell)) == done
        subprocess.run(["mount", "-o", "remount,size=8m", str(place)], check=True)
        assert run(grid, place / "run").ran == len(grid.cells) - done
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_plan_that_is_edited_keeps_what_is_finished(spell: Spell, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(spell(PLAIN), out).ran == 3
    edited = spell(PLAIN, interventions=[{"op": "scale", "factors": [3, 5]}])
    assert run(edited, out).ran == 1
    frame = Store(out).frame()
    assert len(set(frame.cell)) == 4
    assert set(frame[frame.planned].factor.dropna()) == {3.0, 5.0}
    assert "1 finished cells are not in the last plan" in status(out)


def test_the_folder_of_another_model_is_refused(spell: Spell, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(spell(PLAIN, interventions=[{"op": "scale", "factor": 2}]), out)
    before = sorted(Store(out).folders())
    other = spell(PLAIN, model={"pretrained": "demo", "dtype": "bfloat16"})
    with pytest.raises(SteeringError, match=r"sweep of another model \(dtype: None here, 'bfloat16' now\); choose ano"):
        run(other, out)
    assert sorted(Store(out).folders()) == before
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").touch()
    with pytest.raises(SteeringError, match="there are files here and no sweep"):
        run(spell(PLAIN), tmp_path / "else")


def test_other_weights_under_the_same_name_are_refused(spell: Spell, tmp_path: Path) -> None:
    grid, out = spell(PLAIN), tmp_path / "run"
    run(grid, out, "1/2")

    def load(*args: Any, **arguments: Any) -> SweepModel:
        lm = SweepModel(*args, **arguments)
        with torch.no_grad():
            next(lm.model.parameters()).add_(1)
        return lm

    with pytest.raises(SteeringError, match="had other weights when this sweep began"):
        run(grid, out, load=load)


@pytest.mark.parametrize("harm", ["cut", "changed", "removed", "description"])
def test_a_damaged_cell_is_named_put_aside_and_done_again(finished_small: Path, spell: Spell, harm: str) -> None:
    grid, out = spell(PLAIN), finished_small
    before = merged([out], out.parent / "before")
    folder = sorted(Store(out).folders().values())[0]
    samples = next(folder.glob("samples_*"))
    if harm == "cut":
        samples.write_bytes(samples.read_bytes()[:-20])
    elif harm == "changed":
        samples.write_bytes(samples.read_bytes().replace(b'"acc": 1.0', b'"acc": 0.0'))
    elif harm == "removed":
        samples.unlink()
    else:
        (folder / "cell.json").write_text('{"cell": ')
    with pytest.raises(SteeringError, match=re.escape(folder.name)):
        merged([out], out.parent / "never")
    message = io.StringIO()
    assert run(grid, out, progress=CellLog(stream=message)).ran == 1
    assert folder.name in message.getvalue() and "is done again" in message.getvalue()
    assert len(list((out / "damaged").iterdir())) == 1
    assert merged([out], out.parent / "after") == before


@pytest.fixture
def finished_small(spell: Spell, tmp_path: Path, small_run: Path) -> Path:
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def test_a_model_that_cannot_be_loaded_fails_no_cell(spell: Spell, tmp_path: Path) -> None:
    grid = spell(PLAIN, model={"pretrained": "demo", "no_such_argument": 1})
    with pytest.raises(SteeringError, match="no_such_argument"):
        run(grid, tmp_path / "run")
    assert set(Store(tmp_path / "run").missing().status) == {"missing"}


def test_a_lock_tells_its_owner_and_does_not_outlive_it(tmp_path: Path) -> None:
    def hold() -> int:
        with locked(tmp_path / "a.lock"):
            time.sleep(60)
        return 0

    pid = forked(hold)
    while not owners(tmp_path).get("a"):
        time.sleep(0.01)
    assert owners(tmp_path)["a"]["pid"] == pid
    with locked(tmp_path / "a.lock") as ours:
        assert not ours
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert owners(tmp_path) == {}
    with locked(tmp_path / "a.lock") as ours:
        assert ours
    assert not (tmp_path / "a.lock").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nfs4", "rw,vers=4.2", None),
        ("nfs", "rw,nolock", "mounted with nolock"),
        ("nfs4", "rw,local_lock=flock", "mounted with local_lock=flock"),
        ("lustre", "rw", "without flock"),
        ("lustre", "rw,flock", None),
    ],
)
def test_file_systems_whose_locks_do_not_reach_other_machines(
    tmp_path: Path, kind: str, options: str, message: str | None
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/root / ext4 rw 0 0\nhost:/x {tmp_path} {kind} {options} 0 0\n")
    found = why_unsafe(tmp_path / "run", mounts)
    assert found is None if message is None else message in str(found)


class Mortal(SweepModel):
    """A model whose engine dies: at evaluations of one intervention, as often as a list says."""

    deaths: list[str]
    started: list[Mortal]
    dead = False

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        super().__init__(pretrained, **arguments)
        self.started.append(self)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        if self.intervention.signature() in self.deaths:
            self.deaths.remove(self.intervention.signature())
            self.dead = True
        if self.dead:
            raise RuntimeError("the engine's process is gone")
        return super().loglikelihood(requests, disable_tqdm)

    @property
    def is_lost(self) -> bool:
        return self.dead


@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_that_dies_is_started_anew_and_costs_no_other_cell(
    spell: Spell, small_run: Path, tmp_path: Path, times: int
) -> None:
    grid, out, log = spell(PLAIN), tmp_path / "run", io.StringIO()
    planned = grid.cells[1]
    signature = Intervention.model_validate(planned.intervention.resolved).signature()
    engine = type("Engine", (Mortal,), {"deaths": [signature] * times, "started": []})
    outcome = run(grid, out, load=engine, progress=CellLog(stream=log))
    assert len(engine.started) == times + 1
    assert f"{planned.name}: the engine died" in log.getvalue()
    if times == 1:  # whatever killed it, the cell has done nothing wrong
        assert (outcome.exit_code, outcome.ran) == (0, len(grid.cells))
        assert merged([out], tmp_path / "a") == merged([small_run], tmp_path / "b")
    else:
        assert (outcome.exit_code, outcome.ran) == (1, len(grid.cells) - 1)
        assert [cell.key for cell in outcome.failed] == [planned.key]
        assert Store(out).missing().why.tolist() == ["RuntimeError: the engine's process is gone"]


def test_the_time_that_is_left_is_shared_with_other_runners(grid: Grid) -> None:
    """Two runners that do every other cell need half the time that one needs."""
    cells = [cell for cell in grid.cells if cell.task == grid.cells[0].task]
    alone, shared = Estimate(), Estimate()
    for _ in range(3):
        alone.add(cells[0].task, 10.0)
        shared.add(cells[0].task, 10.0)
        shared.add_elsewhere()
    assert alone.of(cells) == 10 * len(cells)
    assert shared.of(cells) == 5 * len(cells)
    earlier = Estimate([{"task": cells[0].task, "seconds": 10.0}])  # of an earlier run, whoever did it
    assert earlier.of(cells) == 10 * len(cells)
