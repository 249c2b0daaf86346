"""A plan divided among several jobs through submitit: processes of this machine, or a SLURM job array."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.sweep.plan import STEERED_VLLM, SweepPlan, build_plan

_POLL = 0.5  # seconds between two looks at local jobs


@dataclass(frozen=True)
class ShardJob:
    """One job: a part of the plan. It is pickled by submitit, and handed in again as it is when it is preempted.

    Attributes:
        plan: as plain data.
        out: folder of the sweep.
        index: of the part, from 0.
        number: of parts.
        retry_failed: whether failed cells are tried again.
    """

    plan: Mapping[str, Any]
    out: str
    index: int
    number: int
    retry_failed: bool = False

    def __call__(self) -> int:
        """Run the part; the exit code of `lm-eval-steering sweep`."""
        self._join_other_processes()
        from lm_eval_steering.lmeval.compat import be_quiet
        from lm_eval_steering.sweep.cells import spell_out
        from lm_eval_steering.sweep.run import run_sweep
        from lm_eval_steering.sweep.runner import Shard

        be_quiet()
        grid = spell_out(build_plan(self.plan))
        outcome = run_sweep(grid, Path(self.out), Shard(self.index, self.number), self.retry_failed)
        for line in outcome.waiting:
            print(f"waiting for {line}")
        return outcome.exit_code

    def checkpoint(self) -> Any:
        """What submitit queues again when the job is preempted or out of time: cells that are done stay done."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _join_other_processes(self) -> None:
        """One process per GPU: tell each its rank, as accelerate would."""
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export()


@dataclass(frozen=True)
class Launched:
    """What was handed to the scheduler.

    Attributes:
        jobs: ids, the first stage before the second.
        codes: exit codes of local jobs, which are waited for; none of a scheduler's.
        folder: with the jobs' logs, and the sbatch scripts.
    """

    jobs: tuple[str, ...]
    codes: tuple[int, ...]
    folder: Path

    @property
    def exit_code(self) -> int:
        """The last stage's worst."""
        return max(self.codes, default=0)


def launch_local(plan: SweepPlan, out: Path, workers: int, retry_failed: bool = False) -> Launched:
    """Run a plan by several processes of this machine, and wait for them; each has GPUs of its own where there are any.

    Raises:
        SteeringError: if a worker dies; what it finished stays.
    """
    jobs: list[Any] = []
    codes: list[int] = []
    try:
        for _ in range(2 if plan.then else 1):
            for index in range(workers):
                jobs.append(_local(plan, out, index, workers, retry_failed))
            codes = [_exit_code(job) for job in jobs[-workers:]]
            if not any(codes):
                break  # nobody had to wait for another one's choosing cells
            retry_failed = False  # what failed just now would fail again
    except BaseException:
        for job in jobs:
            job.cancel()  # as Ctrl-C does it
        raise
    return Launched(tuple(job.job_id for job in jobs), tuple(codes), out / "jobs")


def _local(plan: SweepPlan, out: Path, index: int, number: int, retry_failed: bool) -> Any:
    import submitit
    import torch

    gpus, needed = torch.cuda.device_count(), _gpus_of_engine(plan)
    executor = submitit.LocalExecutor(folder=out / "jobs")
    executor.update_parameters(
        timeout_min=plan.slurm.minutes,
        tasks_per_node=1,
        gpus_per_node=needed if gpus else 0,
        visible_gpus=[(index * needed + number) % gpus for number in range(needed)] if gpus else [],
    )
    return executor.submit(_job(plan, out, index, number, retry_failed))


def _gpus_of_engine(plan: SweepPlan) -> int:
    """Number of GPUs that one runner of a plan uses."""
    sizes = [int(plan.engine.arguments.get(f"{name}_parallel_size", 1)) for name in ("tensor", "pipeline")]
    return sizes[0] * sizes[1]


def _exit_code(job: Any) -> int:
    import submitit

    while not job.done():
        time.sleep(_POLL)
    try:
        return int(job.result())
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        raise SteeringError(
            f"a worker died: {_why(str(error))}; its log is {job.paths.stderr}; what it finished stays"
        ) from None


def _why(message: str) -> str:
    """The error's own line out of what submitit says: a trace between lines of dashes, and where the logs are."""
    lines = [line for line in message.partition("You can check full logs")[0].splitlines() if line.strip("- ")]
    return lines[-1] if "with trace:" in message else " ".join(lines[:2])


def launch_slurm(plan: SweepPlan, out: Path, shards: int | None = None, retry_failed: bool = False) -> Launched:
    """Hand a plan to SLURM as a job array, and `then` as a second one that depends on it. Nothing is waited for.

    Raises:
        SteeringError: if there is no scheduler on this machine.
    """
    number = shards or plan.slurm.shards
    first = _array(plan, out, number, retry_failed, None)
    jobs = list(first)
    if plan.then:
        # Also after failures: the second stage runs what can be run, and says what it waits for.
        jobs += _array(plan, out, number, False, f"afterany:{first[0].split('_')[0]}")
    return Launched(tuple(jobs), (), out / "jobs")


def _array(plan: SweepPlan, out: Path, number: int, retry_failed: bool, dependency: str | None) -> list[str]:
    import submitit

    slurm = plan.slurm
    # An engine starts the processes of its GPUs itself.
    processes = 1 if plan.engine.name == STEERED_VLLM else max(slurm.gpus, 1)
    try:
        executor = submitit.SlurmExecutor(folder=out / "jobs", max_num_timeout=100)
    except RuntimeError as error:
        raise SteeringError(f"--launcher submitit: {error}; on one machine use --launcher local") from None
    parameters: dict[str, Any] = {
        "job_name": f"sweep-{out.name}",
        "time": slurm.minutes,
        "partition": slurm.partition,
        "ntasks_per_node": processes,
        "gpus_per_node": slurm.gpus or None,
        "cpus_per_task": slurm.cpus * max(slurm.gpus, 1) // processes,
        "mem": f"{slurm.memory_gb}GB" if slurm.memory_gb else None,
        "account": slurm.account,
        "setup": list(slurm.setup) or None,
        "array_parallelism": slurm.parallel,
        "dependency": dependency,
        "additional_parameters": {"requeue": True, **slurm.more},
    }
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    with executor.batch():
        jobs = [executor.submit(_job(_on_gpus(plan), out, index, number, retry_failed)) for index in range(number)]
    return [job.job_id for job in jobs]


def _on_gpus(plan: SweepPlan) -> SweepPlan:
    """The plan whose engine uses the GPUs of its job, unless its arguments say otherwise."""
    sizes = {"tensor_parallel_size", "pipeline_parallel_size"}
    if plan.engine.name != STEERED_VLLM or plan.slurm.gpus < 2 or sizes & plan.engine.arguments.keys():
        return plan
    arguments = {**plan.engine.arguments, "tensor_parallel_size": plan.slurm.gpus}
    return plan.model_copy(update={"engine": plan.engine.model_copy(update={"arguments": arguments})})


def _job(plan: SweepPlan, out: Path, index: int, number: int, retry_failed: bool) -> ShardJob:
    return ShardJob(plan.model_dump(mode="json"), str(out.absolute()), index, number, retry_failed)
