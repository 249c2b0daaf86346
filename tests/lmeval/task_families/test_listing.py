"""The commands `tasks` and `fetch-data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lm_eval_steering.cli import app
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.sources import DataError
from tests.lmeval.task_families.items import INCLUDE, MLQA


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception:
        raise done.exception
    return done.output


def test_families_are_listed_with_what_they_need() -> None:
    text = run("tasks", "--needs")
    assert "xcopa: 22 tasks, 11 languages" in text and "wordings   default, natural" in text
    assert "needs      facebook/belebele (hub) or local files" in text
    assert "belebele: 244 tasks, 122 languages" in text
    assert "demo:" in text and "nothing: its data travel with the package" in text
    only = run("tasks", "xquad", "--language", "th").splitlines()
    assert only == ["steering_xquad_tha_Thai  (generate_until)", "steering_xquad_tha_Thai_gurgurov  (generate_until)"]
    with pytest.raises(SteeringError, match="no task family 'xcoppa'; did you mean 'xcopa'"):
        run("tasks", "xcoppa")


def test_fetched_data_are_what_the_tasks_read(own_data: Path, tmp_path: Path) -> None:
    names = "steering_include_base_44_fra_Latn,steering_include_base_44_fra_Latn_r*,steering_mlqa_deu_Latn_eng_Latn"
    text = run("fetch-data", "--tasks", names, "--out", tmp_path)
    assert f"wrote 2 files; export STEERING_DATA={tmp_path}" in text
    written = tmp_path / "include_base_44" / "fra_Latn.test.jsonl"
    assert [json.loads(line) for line in written.open(encoding="utf-8")] == INCLUDE["fra_Latn"]
    pair = tmp_path / "mlqa" / "deu_Latn-eng_Latn.test.jsonl"
    assert [json.loads(line) for line in pair.open(encoding="utf-8")] == MLQA["deu_Latn-eng_Latn"]


def test_what_cannot_be_had_does_not_take_the_rest_along(own_data: Path) -> None:
    names = "steering_xcopa_ita_Latn,steering_mlqa_deu_Latn_eng_Latn"
    done = CliRunner().invoke(app, ["fetch-data", "--tasks", names])
    assert done.output == "mlqa deu_Latn-eng_Latn test  2 rows\n"
    assert isinstance(done.exception, DataError)
    assert str(done.exception).startswith("1 of the tasks have no data. steering_xcopa_ita_Latn: no rows for xcopa")


def test_a_language_that_no_task_has_gets_the_nearest() -> None:
    assert run("tasks", "--needs", "--language", "xho").startswith(
        "belebele: 2 tasks, 1 language\n  languages  xho_Latn"
    )
    for text, message in (
        ("ita_Lat", "mean ita_Latn"),
        ("German", "mean 'deu_Latn'"),
        ("tlh", "no task of ours is in"),
    ):
        with pytest.raises(SteeringError, match=message):
            run("tasks", "--language", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "steering_xcopa_ita_Lat"), "did you mean 'steering_xcopa_ita_Latn'"),
        (("--tasks", "x", "--metadata", "{"), "not JSON"),
        (("--tasks", "x", "--metadata", "[]"), "expected a JSON object"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        run("fetch-data", *arguments)
