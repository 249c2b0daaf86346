#!/usr/bin/env python3
"""Write the tables of docs/real-model.md from a finished `make real`, so that the page shows what it printed.

    python scripts/real_page.py real-results docs/real-model.md

Text between `<!-- NAME -->` and `<!-- end -->` is replaced; what stands outside is left alone.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_steering.languages import english_name
from lm_eval_steering.report.conclusions import answer
from lm_eval_steering.report.read import read_results
from lm_eval_steering.report.tables import Results, compute
from lm_eval_steering.sweep import Store

NATS, DEACTIVATE = "nats_per_token", "deactivate"
OPEN = "steering_forcing_eng_Latn"  # the task that a factor is chosen on
ANSWER = """
## The report's answer
"""
DEACTIVATION = """
## Deactivation

Rise of nats per token when the row's neurons are set to 0, on 20 sentences of the column's language; *random*: as many
random neurons of each layer set to 0, on the row's own language, one set.

![Rise of nats per token; row deactivated, column evaluated](real-model-deactivation.png)
"""
AMPLIFICATION = """
Questions in English, n = 12; share of answers that are French and not degenerate (clean LFS), that are French (LFS),
and that are degenerate; rise of nats per token on 20 French sentences and on 60 of the other three languages; the same
with one matched random set.

![Clean LFS against the rise of nats per token of French text; add mean at the product](real-model-trade-off.png)
"""
CHOSEN = """
The factor is chosen on one half of the questions. On the other half, asked in languages that nothing was chosen on, and
LSS from English on ten sentences:
"""


class Page:
    """The blocks of the page, from one sweep."""

    def __init__(self, results: Results, store: Store) -> None:
        self.results, self.store, self.frame = results, store, store.frame()
        unsteered = self.frame[(self.frame["intervention"] == "baseline") & (self.frame["metric"] == NATS)]
        self.unsteered = unsteered[unsteered["stage"] == 1].set_index("task")["value"]

    def blocks(self) -> dict[str, str]:
        """Name of a block -> its text."""
        return {
            "answer": f"{ANSWER}\n" + "\n".join(map(_item, answer(self.results).sentences)),
            "deactivation": f"{DEACTIVATION}\n{self.deactivation()}",
            "amplification": f"{AMPLIFICATION}\n{self.amplification()}",
            "chosen": f"{CHOSEN}\n{self.chosen()}",
            "outputs": self.outputs(),
        }

    def _effects(self, stage: int) -> pd.DataFrame:
        effects = self.results.effects.frame
        return effects[effects["stage"] == stage].assign(name=effects["metric"].str.partition("@")[0])

    def _random(self, cells: pd.DataFrame, metric: str) -> float:
        """Mean over the random sets of these cells: a rise for nats per token, else the score."""
        scores = [row["value"] - self.unsteered[row["task"]] if metric == NATS else row["value"]
                  for row in cells[cells["metric"] == metric].to_dict("records")]  # fmt: skip
        return sum(scores) / len(scores) if scores else float("nan")

    def deactivation(self) -> str:
        """Rise of nats per token; row deactivated, column evaluated."""
        effects = self._effects(1)
        rises = effects[effects["deactivation"] & (effects["name"] == NATS)]
        table = rises.pivot(index="steered", columns="evaluated", values="difference")
        controls = self.frame[self.frame["control"].notna() & (self.frame["deactivated"] != "")]
        lines = [_row(["", *(code[:3] for code in table.columns), "random"]), _row(["---"] * (len(table.columns) + 2))]
        for code, row in table.iterrows():
            cells = [f"**{value:+.3f}**" if code == other else f"{value:+.3f}" for other, value in row.items()]
            own = controls[(controls["deactivated"] == code) & (controls["evaluated"] == code)]
            lines.append(_row([str(code)[:3], *cells, f"{self._random(own, NATS):+.3f}"]))
        unsteered = rises.groupby("evaluated")["baseline"].first()[table.columns]
        lines.append(_row(["*unsteered*", *(f"{value:.3f}" for value in unsteered), ""]))
        return "\n".join(lines)

    def amplification(self) -> str:
        """Success and damage of each intervention, factor and language, beside the random sets."""
        effects = self._effects(1)
        lines = [
            _row(["steered", "intervention", "factor", "clean LFS", "LFS", "degenerate", "own text", "others' text",
                  "random: clean LFS", "random: own text"]),
            _row(["---"] * 10),
        ]  # fmt: skip
        settings = effects[~effects["deactivation"]].groupby(["steered", "kind", "factor"], sort=True)
        controls = self.frame[self.frame["control"].notna() & (self.frame["stage"] == 1)]
        for (code, kind, factor), rows in settings:
            here = rows[rows["task"] == OPEN].set_index("name")["score"]
            nats = rows[rows["name"] == NATS]
            own = nats["evaluated"] == code
            names = self.frame.loc[self.frame["cell"].isin(rows["cell"]), "intervention"].unique()
            random = controls[[_unmarked(name) in names for name in controls["intervention"]]]
            cells = [english_name(code), kind, f"{factor:g}"]
            cells += [f"{here[name]:.2f}" for name in ("lfs_clean", "lfs", "degenerate")]
            cells += [f"{nats.loc[which, 'difference'].mean():+.2f}" for which in (own, ~own)]
            cells.append(f"{self._random(random[random['task'] == OPEN], 'lfs_clean'):.2f}")
            cells.append(f"{self._random(random[random['evaluated'] == code], NATS):+.2f}")
            lines.append(_row(cells))
        return "\n".join(lines)

    def chosen(self) -> str:
        """The second stage: the chosen settings on what nothing was chosen on."""
        effects = self._effects(2)
        wanted = effects[effects["name"].isin(["lfs_clean", "degenerate", "lss"])]
        lines = [_row(["steered", "setting", "task", "metric", "unsteered", "steered", "n"]), _row(["---"] * 7)]
        for row in wanted.sort_values(["steered", "name", "task"], ascending=[True, False, True]).to_dict("records"):
            before = "" if pd.isna(row["baseline"]) else f"{row['baseline']:.2f}"
            setting, task = f"{row['kind']} x{row['factor']:g}", row["task"].removeprefix("steering_")
            cells = [english_name(row["steered"]), setting, task, row["name"], before, f"{row['score']:.2f}", row["n"]]
            lines.append(_row(cells))
        return "\n".join(lines)

    def outputs(self) -> str:
        """Answers to the first questions, unsteered and under each factor of add mean at product."""
        cells = self.frame[(self.frame["task"] == OPEN) & self.frame["control"].isna()]
        names = dict(zip(cells["intervention"], cells["cell"], strict=True))
        shown = [name for name in names if name == "baseline" or name.endswith("-product")]
        samples = {name: self.store.samples(names[name])[:5] for name in shown}
        lines = []
        for number, sample in enumerate(samples["baseline"]):
            lines.append(f"    {sample['doc']['question']}")
            for name in shown:
                text = str(samples[name][number]["filtered_resps"][0]).strip()
                label = "unsteered" if name == "baseline" else name.removesuffix("-product").rpartition("-")[2]
                lines.append(f"      {label:<10} {text!r}")
        return "\n".join(lines)


def _unmarked(intervention: str) -> str:
    """Name of the intervention that a random control repeats."""
    return re.sub(r"-random\d+", "", intervention)


def _item(sentence: str) -> str:
    return textwrap.fill(f"- {sentence}", 120, subsequent_indent="  ", break_on_hyphens=False)


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(folder: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, block in Page(compute(read_results(folder / "sweep")), Store(folder / "sweep")).blocks().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{page}: no place for {name}: expected <!-- {name} --> and <!-- end -->")
        text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
    page.write_text(text, encoding="utf-8")
    figures = {
        "layers": "neurons-by-layer",
        "deactivation": "matrix-demo_perplexity-nats_per_token-deactivate",
        "trade-off": "trade-off-add-mean-at-product",
    }
    for picture, figure in figures.items():
        source = folder / "report" / "figures" / f"{figure}.png"
        if source.exists():
            shutil.copy(source, page.with_name(f"real-model-{picture}.png"))
    print(f"wrote {page}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
