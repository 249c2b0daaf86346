"""A grid of interventions x tasks: the plan, the runner, the store. `Store("runs/x").frame()` reads what is done."""

from __future__ import annotations

from lm_eval_steering.sweep.store import Store

__all__ = ["Store"]
