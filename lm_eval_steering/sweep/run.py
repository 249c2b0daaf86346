"""What is missing of a plan, run by the engine that the plan names."""

from __future__ import annotations

from pathlib import Path

from lm_eval_steering.sweep.cells import Grid
from lm_eval_steering.sweep.engine import EngineRunner
from lm_eval_steering.sweep.plan import PlanError
from lm_eval_steering.sweep.runner import Outcome, Shard, SweepRunner
from lm_eval_steering.sweep.store import Store


def run_sweep(grid: Grid, out: Path, shard: Shard | None = None, retry_failed: bool = False) -> Outcome:
    """Run what is missing of a plan into a folder."""
    engine = grid.plan.engine
    if not engine.is_external:
        return SweepRunner(grid, Store(out), shard, retry_failed).run()
    if shard is not None:
        raise PlanError(f"--shard with engine {engine.name}: divide its commands among jobs instead")
    return EngineRunner(grid, Store(out)).run()
