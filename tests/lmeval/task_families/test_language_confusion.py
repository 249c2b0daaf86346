"""The Language Confusion Benchmark's files in its own layout, with rows of ours, and what is expected of an answer."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.sources import DataError
from lm_eval_steering.lmeval.task_families.language_confusion import CROSSLINGUAL, MONOLINGUAL, documents, rows
from lm_eval_steering.metrics.output_language import output_metrics
from tests.lmeval.task_families.conftest import Evaluate

MONO = [
    {"prompt": "Comment fonctionne une montgolfière ?", "source": "native_prompts", "language": "fr"},
    {"prompt": 'Résumez ceci :\n\n"Il pleut, il fait froid."', "source": "native_prompts", "language": "fr"},
]
CROSS = [
    {"prompt": f"{how} in {name}. Why is the sky blue?", "location": "Start", "phrasing": "reply", "language": code}
    for how in ("Reply", "Answer")
    for code, name in (("fr", "French"), ("de", "German"))
]


def write_csv(path: Path, table: Iterable[dict[str, Any]]) -> None:
    table = list(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


@pytest.fixture(params=["language_confusion/test_sets", "language_confusion", "test_sets", "."])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    top = tmp_path / request.param
    write_csv(top / "monolingual" / "native" / "fr.csv", MONO)
    for code in ("fr", "de"):
        write_csv(top / "crosslingual" / "okapi" / f"{code}.csv", [row for row in CROSS if row["language"] == code])
    return tmp_path


def test_rows_are_read_from_the_benchmarks_own_layout(data: Path) -> None:
    found = documents("fra_Latn", "native", data_dir=str(data))["test"]
    assert found["prompt"] == [row["prompt"] for row in MONO]
    assert set(found["expected_language"]) == {"fra_Latn"}
    cross = {
        code: documents(f"eng_Latn-{code}", "okapi", data_dir=str(data))["test"] for code in ("fra_Latn", "deu_Latn")
    }
    assert cross["deu_Latn"]["prompt"][0] == "Reply in German. Why is the sky blue?"
    assert cross["deu_Latn"]["expected_language"] == ["deu_Latn"] * 2
    assert cross["deu_Latn"]["id"] == cross["fra_Latn"]["id"]  # one request, in two languages: halves keep it together


def test_json_lines_in_our_layout_serve_too(tmp_path: Path) -> None:
    path = tmp_path / "language_confusion" / "fra_Latn.monolingual-native.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in MONO), encoding="utf-8")
    assert [row["prompt"] for row in rows("monolingual", "native", "fra_Latn", {"data_dir": str(tmp_path)})] == [
        row["prompt"] for row in MONO
    ]


def test_what_is_wrong_is_refused(tmp_path: Path) -> None:
    settings = {"data_dir": str(tmp_path)}
    with pytest.raises(DataError, match="no rows for language_confusion fra_Latn monolingual-native"):
        documents("fra_Latn", "native", **settings)
    write_csv(tmp_path / "monolingual" / "native" / "fr.csv", [MONO[0], MONO[1] | {"language": "de"}])
    with pytest.raises(DataError, match=r"fr\.csv, row 2: language 'de', expected fra_Latn"):
        documents("fra_Latn", "native", **settings)
    write_csv(tmp_path / "monolingual" / "native" / "fr.csv", [MONO[0] | {"prompt": " "}])
    with pytest.raises(DataError, match="'prompt' is empty"):
        documents("fra_Latn", "native", **settings)
    for evaluated, source in (("fra_Latn", "aya"), ("eng_Latn-fra_Latn", "aya"), ("fra_Latn-deu_Latn", "okapi")):
        with pytest.raises(SteeringError, match=f"no source '{source}' in {evaluated}"):
            documents(evaluated, source, **settings)


def test_a_steered_answer_is_scored_against_the_language_of_its_row(
    french: SteeredHFLM, evaluate: Evaluate, tmp_path: Path
) -> None:
    write_csv(tmp_path / "monolingual" / "native" / "fr.csv", MONO)
    write_csv(tmp_path / "crosslingual" / "okapi" / "de.csv", [row for row in CROSS if row["language"] == "de"])
    names = ("steering_language_confusion_fra_Latn_native", "steering_language_confusion_eng_Latn_deu_Latn_okapi")
    found = evaluate(french, *names, tokens=24, data_dir=str(tmp_path))
    for name, expected in zip(names, ("fra_Latn", "deu_Latn"), strict=True):
        samples = found["samples"][name]
        assert len(samples) == 2 and all(sample["doc"]["prompt"] == sample["arguments"][0][0] for sample in samples)
        for sample in samples:
            judged = output_metrics(sample["filtered_resps"][0], expected=expected)
            assert {key: sample[key] for key in ("lpr", "lpr_skipped") if key in sample} == {
                key: judged[key] for key in ("lpr", "lpr_skipped") if key in judged
            }


def test_the_benchmarks_sources_and_sizes() -> None:
    assert sum(map(len, MONOLINGUAL.values())) == 24 and len(CROSSLINGUAL) == 3
