"""What is missing of a plan, run into a folder."""

from __future__ import annotations

from pathlib import Path

from lm_eval_steering.neurons.running import launched
from lm_eval_steering.sweep.cells import Grid
from lm_eval_steering.sweep.plan import STEERED_HF, PlanError
from lm_eval_steering.sweep.runner import Outcome, Shard, SweepRunner
from lm_eval_steering.sweep.store import Store


def run_sweep(grid: Grid, out: Path, shard: Shard | None = None, retry_failed: bool = False) -> Outcome:
    """Run what is missing of a plan into a folder.

    Raises:
        SteeringError: if the folder is another model's, or the plan's engine cannot run so.
    """
    engine = grid.plan.engine.name
    if engine != STEERED_HF and launched()[0].size > 1:
        raise PlanError(f"engine {engine}: it starts its own processes; run the sweep in one (tensor_parallel_size=)")
    return SweepRunner(grid, Store(out), shard, retry_failed).run()
