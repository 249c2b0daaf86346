"""Rescore the outputs that ku-nlp/language-specific-dimensions publishes (arXiv 2510.07213), for docs/comparison.md.

    git clone https://github.com/ku-nlp/language-specific-dimensions DIMENSIONS
    python scripts/rescore_dimensions.py DIMENSIONS/outputs OUT

Each file of theirs, `MODEL_dims400_para/mt/en.control.LAYER.STRENGTH.LANGUAGE.json[l]`, holds translations from English
by a model that is steered to one language at one layer and strength. They become one table of texts, which `rescore`
scores; the scores are printed by model, layer, strength and language as Markdown, and written to OUT/success.csv.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_steering.files import read_json_lines
from lm_eval_steering.languages import normalise

_NAME = re.compile(r"en\.control\.(\d+)\.(\d+\.\d+)\.([a-z]+)\.jsonl?")
_LAYER = 18  # of their notebook
_SETTING = ["model", "layer", "strength", "target"]


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """One row for each text of a file: setting, target language and text."""
    name = _NAME.fullmatch(file.name)
    if name is None:
        return
    content = file.read_text(encoding="utf-8")
    records = json.loads(content) if file.suffix == ".json" else map(json.loads, filter(None, content.split("\n")))
    model = file.parents[1].name.partition("_")[0]
    for record in records:
        yield {
            "model": model, "layer": int(name[1]), "strength": float(name[2]), "target": normalise(name[3]),
            "text": record["trans"],
        }  # fmt: skip


def main() -> None:
    """Write the table, rescore it, and print the scores."""
    outputs, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([row for file in sorted(outputs.rglob("en.control.*")) for row in rows_of(file)])
    table.to_json(out / "texts.jsonl", orient="records", lines=True, force_ascii=False)
    subprocess.run([sys.executable, "-m", "lm_eval_steering", "rescore", str(out / "texts.jsonl")], check=True)
    (scored,) = out.glob("rescored_samples_texts_*.jsonl")
    scores = pd.DataFrame(list(read_json_lines(scored))).set_index("doc_id")
    names = ["lfs", "lfs_clean", "degenerate", "lang_unknown"]
    by_setting = table.join(scores).groupby(_SETTING)
    success = by_setting[names].mean().assign(n=by_setting.size()).reset_index()
    success.to_csv(out / "success.csv", index=False)
    for model, of_model in success.groupby("model"):
        n = of_model.drop_duplicates("target").set_index("target")["n"].to_dict()
        print(f"\n{model}, n of each setting: {n}")
        best = of_model.loc[of_model.groupby(["layer", "target"])["lfs_clean"].idxmax()]
        shown = best["lfs_clean"].map("{:.2f}".format) + " at " + best["strength"].map("{:g}".format)
        print(best.assign(shown=shown).pivot(index="layer", columns="target", values="shown").to_markdown())
        _print(of_model[of_model["layer"] == _LAYER], "target", "lfs_clean")
        _print(of_model[of_model["layer"] == _LAYER], "target", "degenerate")
        _print(of_model, "layer", "lfs_clean")  # the mean over languages


def _print(success: pd.DataFrame, rows: str, values: str) -> None:
    table = success.pivot_table(index=rows, columns="strength", values=values).map("{:.2f}".format).replace("nan", "")
    print(f"\n{values}\n{table.to_markdown(disable_numparse=True)}")


if __name__ == "__main__":
    main()
