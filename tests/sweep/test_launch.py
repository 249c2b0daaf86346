"""Plans dealt to jobs: submitit's local and debug executors, and what is handed to SLURM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.sweep.launch import ShardJob, _exit_code, _on_gpus, launch_local, launch_slurm
from lm_eval_steering.sweep.store import Store
from tests.sweep.conftest import PLAIN, Spell, merged, run

# What sbatch does, as far as submitit sees it: take a script, keep it, and answer with a number.
SBATCH = """#!/bin/sh
cat "$1" >> {scripts}
echo "Submitted batch job $((41 + $(grep -c '^#SBATCH --job-name' {scripts})))"
"""


def test_two_local_workers_do_every_cell_once(
    spell: Spell, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "run"
    launched = launch_local(spell(PLAIN).plan, out, workers=2)
    assert (launched.exit_code, len(launched.jobs)) == (0, 2)
    assert merged([out], tmp_path / "a") == merged([small_run], tmp_path / "b")
    assert Store(out).timings().pid.nunique() == 2


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: int("seven"), r"a worker died: ValueError: invalid literal.*'seven'; its log is .*it finished stays"),
        (lambda: os.kill(os.getpid(), 9), r"a worker died: .*has not produced any output.*; its log is "),
    ],
    ids=["raises", "killed"],
)
def test_a_local_worker_that_dies_is_named(tmp_path: Path, end: Callable[[], int], message: str) -> None:
    executor = submitit.LocalExecutor(folder=tmp_path)
    executor.update_parameters(timeout_min=1)
    with pytest.raises(SteeringError, match=message):
        _exit_code(executor.submit(end))


def test_a_job_is_a_shard_and_goes_on_when_it_is_queued_again(spell: Spell, tmp_path: Path) -> None:
    grid, out = spell(), tmp_path / "run"
    jobs = [ShardJob(grid.plan.model_dump(mode="json"), str(out), index, 2) for index in range(2)]
    executor = submitit.DebugExecutor(folder=tmp_path / "jobs")
    assert executor.submit(jobs[0]).result() == 3  # the second stage waits for the other shard
    assert executor.submit(jobs[1]).result() == 0
    again = jobs[0].checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert executor.submit(again.function).result() == 0
    assert Store(out).missing().empty
    assert run(grid, out).ran == 0


def scheduler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scheduler that keeps the scripts which it is handed in one file."""
    scripts, programs = folder / "scripts", folder / "bin"
    programs.mkdir()
    scripts.touch()
    for name, text in (("sbatch", SBATCH.format(scripts=scripts)), ("srun", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return scripts


def test_what_slurm_is_handed(spell: Spell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = scheduler(tmp_path, monkeypatch)
    slurm = {"partition": "gpu", "gpus": 4, "minutes": 90, "shards": 8, "parallel": 3, "account": "lab",
             "setup": ["module load cuda"], "more": {"constraint": "h100"}}  # fmt: skip
    launched = launch_slurm(spell(slurm=slurm).plan, tmp_path / "x")
    first, second = scripts.read_text().split("#!/bin/bash")[1:]
    for line in (
        "--array=0-7%3", "--partition=gpu", "--gpus-per-node=4", "--ntasks-per-node=4", "--time=90", "--account=lab",
        "--constraint=h100", "--requeue", "--job-name=sweep-x",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in first and f"#SBATCH {line}\n" in second, line
    assert "module load cuda\n" in first
    assert "--dependency" not in first
    assert "#SBATCH --dependency=afterany:42\n" in second
    assert launched.jobs[0] == "42_0" and launched.jobs[8] == "43_0" and len(launched.jobs) == 16


def test_without_a_scheduler_it_says_what_to_do(spell: Spell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SteeringError, match=r"--launcher submitit: .*on one machine use --launcher local"):
        launch_slurm(spell(PLAIN).plan, tmp_path / "x")


def test_an_engine_uses_the_gpus_of_its_job(spell: Spell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = scheduler(tmp_path, monkeypatch)
    slurm = {"gpus": 4, "cpus": 8, "shards": 2}
    plan = spell(PLAIN, slurm=slurm, engine="steered-vllm").plan
    launch_slurm(plan, tmp_path / "x")
    script = scripts.read_text()
    for line in ("--gpus-per-node=4", "--ntasks-per-node=1", "--cpus-per-task=32", "--array=0-1%2"):
        assert f"#SBATCH {line}\n" in script, line
    pickles = sorted((tmp_path / "x" / "jobs").glob("*.pkl"))
    jobs = [submitit.core.utils.DelayedSubmission.load(path).function for path in pickles]
    assert [job.plan["engine"]["arguments"] for job in jobs] == [{"tensor_parallel_size": 4}] * 2
    own = {"name": "steered-vllm", "arguments": {"pipeline_parallel_size": 2}}
    assert _on_gpus(spell(PLAIN, slurm=slurm, engine=own).plan).engine.arguments == {"pipeline_parallel_size": 2}
    assert _on_gpus(spell(PLAIN, slurm=slurm).plan).engine.arguments == {}
