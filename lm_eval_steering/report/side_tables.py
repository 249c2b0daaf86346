"""What stands beside a gain: random controls, and the damage that came with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_steering.metrics.statistics import against_random
from lm_eval_steering.report.data import CROSS, SELF, Sweep
from lm_eval_steering.report.effects import Effects
from lm_eval_steering.report.tables import single

if TYPE_CHECKING:
    import pandas as pd

CONTROLS_FOR_SD = 5  # below that many random sets a standard deviation says nothing, and their range is given
CONTROLLED = ("lfs", "lss", "lss_distinct")
# The same damage under several names; the first that a task has is taken.
PERPLEXITIES = ("nats_per_token", "token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
DAMAGES = {"degenerate": "degenerate", "unknown": "lang_unknown"}
_NO_FACTOR = "none"
_PLACE = ["task", "steered", "kind", "factor", "items", "target"]


def controls(sweep: Sweep, effects: Effects) -> pd.DataFrame:
    """LSS and LFS of each cell beside the same score of its matched random sets.

    Columns: `score`, `sets` (number of random sets), their `mean`, `lowest`, `highest`, `difference` from their mean,
    `deviations` (that difference in their standard deviations, from 5 sets up, else blank), and `at_or_above`, the
    share of random sets that score as high, with its Wilson interval.
    """
    import pandas as pd

    random = sweep.cells[sweep.cells["control"].notna()].merge(sweep.scores, on="cell")
    random = random[random["metric"].isin(CONTROLLED) & random["value"].notna()]
    random = random.assign(factor=[_NO_FACTOR if np.isnan(factor) else factor for factor in random["factor"]])
    found = {key: own["value"].tolist() for key, own in random.groupby([*_PLACE, "metric"])}
    targets = sweep.cells.set_index("cell")["target"]
    rows = []
    for row in single(effects).to_dict("records"):
        if row["metric"] not in CONTROLLED:
            continue
        factor = _NO_FACTOR if np.isnan(row["factor"]) else row["factor"]
        place = (row["task"], row["steered"], row["kind"], factor, row["items"], targets[row["cell"]], row["metric"])
        values = found.get(place, [])
        rows.append(_against(row, values) if values else _uncontrolled(row))
    return pd.DataFrame(rows)


def _against(row: dict[str, Any], values: list[float]) -> dict[str, Any]:
    null = against_random(row["score"], values)
    deviation = float(np.std(values, ddof=1)) if len(values) >= CONTROLS_FOR_SD else np.nan
    difference = null.own - null.mean
    return _uncontrolled(row) | {
        "sets": null.sets, "mean": null.mean, "lowest": null.lowest, "highest": null.highest, "difference": difference,
        "deviations": difference / deviation if deviation and deviation > 0 else np.nan,
        "at_or_above": null.share, "at_or_above_low": null.interval[0], "at_or_above_high": null.interval[1],
    }  # fmt: skip


def _uncontrolled(row: dict[str, Any]) -> dict[str, Any]:
    facts = ("family", "metric", "kind", "factor", "steered", "evaluated", "n", "score")
    blank = ("mean", "lowest", "highest", "difference", "deviations", "at_or_above", "at_or_above_low",
             "at_or_above_high")  # fmt: skip
    return {name: row[name] for name in facts} | {"sets": 0} | dict.fromkeys(blank, np.nan)


def damage(effects: Effects) -> pd.DataFrame:
    """For each language, intervention and factor: success beside its price.

    `success` is the mean LFS. `perplexity_self`, `perplexity_cross` and `perplexity_all` are rises of the perplexity
    of the steered language, of the others and of all texts; `perplexity` names the unit. `degenerate` and `unknown` are
    rises of the share of outputs that repeat themselves or are in no known language; a `_score` column is the share
    itself. `n_outputs` and `n_texts` count what the means are over.
    """
    import pandas as pd

    frame = single(effects)
    unit = next((name for name in PERPLEXITIES if (frame["metric"] == name).any()), "")
    rows = []
    for key, group in frame.groupby(["steered", "kind", "factor"], sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(("steered", "kind", "factor"), key, strict=True))
        forced = group[group["metric"] == "lfs"]
        row |= {"success": forced["score"].mean(), "success_gain": forced["difference"].mean()}
        row["n_outputs"] = int(forced["n"].sum())
        texts = group[group["metric"] == unit] if unit else group.iloc[:0]
        row |= {"perplexity": unit, "n_texts": int(texts["n"].sum())}
        row["perplexity_all"] = texts["difference"].mean()
        for relation in (SELF, CROSS):
            row[f"perplexity_{relation}"] = texts[texts["relation"] == relation]["difference"].mean()
        for name, metric in DAMAGES.items():
            own_rows = group[group["metric"] == metric]
            row |= {name: own_rows["difference"].mean(), f"{name}_score": own_rows["score"].mean()}
        rows.append(row)
    found = pd.DataFrame(rows)
    measured = [name for name in found.columns if name.startswith(("success", "perplexity_", "degenerate", "unknown"))]
    return found[found[measured].notna().any(axis=1)].reset_index(drop=True) if len(found) else found
