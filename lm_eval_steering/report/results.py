"""Everything that a report computes, once: the data frames of the Python API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lm_eval_steering.report import side_tables, tables
from lm_eval_steering.report.choice import best_factors
from lm_eval_steering.report.data import Sweep
from lm_eval_steering.report.effects import Effects, effects_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Results:
    """Tables of one sweep, or of one comparison.

    Attributes:
        sweep: what was read.
        effects: one row a cell and metric.
        summary: self and cross for each factor (`tables.summary`).
        best: the best factor of each language (`choice.best_factors`).
        controls: LSS and LFS beside random neurons (`side_tables.controls`).
        damage: success beside its price (`side_tables.damage`).
        cost: seconds and tokens of each cell.
        neurons: steered language -> neurons in each layer; empty where the neuron set is not at hand.
    """

    sweep: Sweep
    effects: Effects
    summary: pd.DataFrame
    best: pd.DataFrame
    controls: pd.DataFrame
    damage: pd.DataFrame
    cost: pd.DataFrame
    neurons: dict[str, list[int]] = field(default_factory=dict)

    def frames(self) -> dict[str, pd.DataFrame]:
        """Name -> table, in the order in which a person reads them; tables without rows are left out."""
        found = {
            "summary": self.summary,
            "effects": self.effects.frame,
            "best-factors": self.best,
            "controls": self.controls,
            "damage": self.damage,
            "cost": self.cost,
            "missing": self.sweep.missing,
        }
        return {name: frame for name, frame in found.items() if len(frame)}


def compute(sweep: Sweep) -> Results:
    """All tables of a sweep."""
    effects = effects_of(sweep)
    return Results(
        sweep,
        effects,
        tables.summary(effects),
        best_factors(sweep, effects),
        side_tables.controls(sweep, effects),
        side_tables.damage(effects),
        tables.cost(sweep),
    )
