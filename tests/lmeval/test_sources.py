from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.lmeval import sources
from lm_eval_steering.lmeval.sources import DataError, Hub, RowsSource, find_file, hub_copies, load_rows, write_rows
from lm_eval_steering.lmeval.task_families import belebele, mlqa, xcopa, xnli, xquad, xwinograd

ROWS = [{"text": "eins", "n": 1}, {"text": "zwei\u2028drei", "n": 2}]
SOURCE = RowsSource("things", "zho_Hans", "test", ("text", "n"), hub_copies("someone/things200", "cn", "test"))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEERING_DATA", raising=False)
    sources._from_hub.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every call of datasets.load_dataset; answers only the parquet conversion."""
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None = None, **given: Any) -> list[dict[str, Any]]:
        calls.append((path, name, given))
        if given.get("revision") != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found things.py\nmore")
        return [dict(row) for row in ROWS]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def put(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    ["things/zho_Hans.test", "things/cn.test", "things200/zho_Hans.test", "things/zho_Hans/test", "things/cn/test",
     "things200/zh/test", "things/zh", "things/zho.test"],
)  # fmt: skip
def test_local_files_in_every_layout(name: str, tmp_path: Path) -> None:
    put(tmp_path, f"{name}.jsonl")
    assert load_rows(SOURCE, {"data_dir": str(tmp_path)}) == ROWS


def test_parquet_and_the_layout_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "things").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "things" / "zho_Hans.test.parquet")
    monkeypatch.setenv("STEERING_DATA", str(tmp_path))
    assert load_rows(SOURCE, {}) == ROWS
    path = write_rows(tmp_path / "out", SOURCE, ROWS)
    assert path == tmp_path / "out" / "things" / "zho_Hans.test.jsonl"
    assert load_rows(SOURCE, {"data_dir": tmp_path / "out"}) == ROWS
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_exact_name_goes_before_a_shorter_one_and_the_setting_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a", "things/zh.jsonl", [{"text": "short", "n": 0}])
    put(tmp_path / "a", "things/zho_Hans.test.jsonl")
    put(tmp_path / "b", "things/zh/test.jsonl", [{"text": "b", "n": 0}])
    monkeypatch.setenv("STEERING_DATA", str(tmp_path / "b"))
    assert load_rows(SOURCE, {"data_dir": tmp_path / "a"}) == ROWS
    assert load_rows(SOURCE, {})[0]["text"] == "b"


def test_another_split_by_metadata(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    put(tmp_path, "things/cn/validation.jsonl")
    assert load_rows(SOURCE, {"data_dir": tmp_path, "split": "validation"}) == ROWS
    load_rows(SOURCE, {"split": "validation"})
    assert hub[0] == ("someone/things200", "cn", {"split": "validation", "revision": None})
    assert hub[1][2]["data_files"] == {"validation": "cn/validation/*.parquet"}


def test_the_hub_is_tried_in_order(tmp_path: Path, hub: list[tuple[Any, ...]], caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "lm_eval_steering.lmeval.sources"):
        assert load_rows(SOURCE, {"data_dir": tmp_path}) == ROWS
    assert [(call[0], call[1]) for call in hub] == [("someone/things200", "cn"), ("someone/things200", None)]
    assert "2 rows from someone/things200 cn/test/*.parquet split test at refs/convert/parquet" in caplog.text
    load_rows(SOURCE, {})
    assert len(hub) == 3  # what was found is kept, what failed is tried again


def test_rows_of_the_hub_are_not_shared(hub: list[tuple[Any, ...]]) -> None:
    load_rows(SOURCE, {})[0]["text"] = "changed"
    assert load_rows(SOURCE, {}) == ROWS


def test_the_error_names_everything_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    source = RowsSource("things", "fra_Latn", "test", ("text",), (Hub("a/b", "fr"), Hub("json", data_files="x.jsonl")))
    with pytest.raises(DataError) as caught:
        load_rows(source, {"data_dir": tmp_path})
    message = str(caught.value)
    parts = ["no rows for things fra_Latn test (offline", f"{tmp_path}/things", "a/b fr split test (", "json x.jsonl"]
    parts += ["things/fra_Latn.test.jsonl", "fields text", "STEERING_DATA", "fetch-data"]
    assert all(part in message for part in parts) and "\n" not in message, message
    with pytest.raises(DataError, match="no local folder"):
        load_rows(source, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a", "m": 1}\n', r"line 1: no 'n', which things needs; columns with a value: text, m"),
        ('{"text": "a", "n": 1}\n\n{"text": "b", "n": null}\n', r"line 3: no 'n'"),
        ('{"text": "a", "n": 1}\n{"te', r"line 2: not JSON"),
        ("[1, 2]\n", r"line 1: expected a JSON object, got list"),
        ("\n", r"no rows for things zho_Hans test"),
        ('{"text": "a", "n": 1}\n{"text": " \\n", "n": 2}\n', r"line 2: the text of 'text' is empty"),
        (
            '{"text": "a", "n": 1}\n{"text": "cut \\ud83d", "n": 2}\n',
            r"line 2: .* lone surrogate.*U\+D83D at character 5",
        ),
        ('{"text": "a", "n": {"deep": ["\\udc00"]}}\n', r"line 1: the text of 'n' holds a lone surrogate"),
        ('{"text": "a", "n": 1, "m": "\\udc00"}\n', r"line 1: the text of 'm' holds a lone surrogate"),
        (
            '{"id": 7, "text": "a", "n": 1}\n\n{"id": "7", "text": "b", "n": 2}\n',
            r"line 3: the id '7' is that of .*line 1 too",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_fault(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "things" / "zho_Hans.test.jsonl"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(SOURCE, {"data_dir": tmp_path})
    assert str(path) in str(caught.value)


def test_the_real_library_reads_a_conversion_after_a_place_without_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    part = tmp_path / "repository" / "cn" / "test" / "0000.parquet"
    part.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), part)
    first = Hub(str(tmp_path / "repository"), "cn")
    second = Hub(str(tmp_path / "repository"), data_files="cn/test/*.parquet")
    source = RowsSource("things", "zho_Hans", "test", ("text", "n"), (first, second))
    assert load_rows(source, {}) == ROWS
    with pytest.raises(DataError, match=r"repository cn split test \(ValueError: BuilderConfig 'cn' not found"):
        load_rows(replace(source, hub=(first,)), {})


def test_a_bad_parquet_file_and_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "zh.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"zh\.parquet: not a parquet file"):
        load_rows(SOURCE, {"data_dir": tmp_path})
    with pytest.raises(DataError, match=r"data_dir=.*nowhere: no such folder"):
        load_rows(SOURCE, {"data_dir": tmp_path / "nowhere"})


def test_incomplete_rows_are_left_out_only_where_a_family_says_so(tmp_path: Path, caplog: Any) -> None:
    source = RowsSource("things", "fra_Latn", "test", ("text", "n"), skip_incomplete=True)
    put(tmp_path, "things/fra_Latn.test.jsonl", [*ROWS, {"text": None, "n": 3}])
    with caplog.at_level(logging.WARNING):
        assert load_rows(source, {"data_dir": tmp_path}) == ROWS
    assert "left out 1 of 3 rows that lack a value: 3" in caplog.text
    put(tmp_path, "things/fra_Latn.test.jsonl", [{"text": None, "n": 3}])
    with pytest.raises(DataError, match="no row for"):
        load_rows(source, {"data_dir": tmp_path})


def test_an_empty_text_is_kept_where_a_family_can_score_it(tmp_path: Path) -> None:
    put(tmp_path, "things/fra_Latn.test.jsonl", [{"text": "a", "n": ""}])
    source = RowsSource("things", "fra_Latn", "test", ("text", "n"))
    with pytest.raises(DataError, match="the text of 'n' is empty"):
        load_rows(source, {"data_dir": tmp_path})
    assert load_rows(replace(source, may_be_empty=("n",)), {"data_dir": tmp_path}) == [{"text": "a", "n": ""}]


def test_what_is_loaded_can_be_observed(tmp_path: Path) -> None:
    put(tmp_path, "things/zh.jsonl")
    with sources.observed() as seen:
        load_rows(SOURCE, {"data_dir": tmp_path})
    load_rows(SOURCE, {"data_dir": tmp_path})
    assert seen == [(SOURCE, ROWS)]


def test_the_folder_of_excerpts_works_as_it_is(shared_data: Path) -> None:
    folder = shared_data / "evaluation"
    for source in [
        *map(xcopa.source, xcopa.CODES), *map(xwinograd.source, xwinograd.CODES), *map(xnli.source, xnli.CODES),
        *map(xquad.source, xquad.CODES), *map(belebele.source, ("eng_Latn", "deu_Latn")),
        *(xcopa.source(code).at_split("validation") for code in xcopa.CODES),
    ]:  # fmt: skip
        assert find_file(folder, source) is not None, source
        assert len(load_rows(source, {"data_dir": folder})) >= 16
    for name in ("mvicuna", "flores200"):
        assert find_file(folder, RowsSource(name, "fra_Latn", "devtest", ())) is not None
    assert (
        find_file(folder, RowsSource("flores", "fra_Latn", "devtest", (), (Hub("Muennighoff/flores200"),))) is not None
    )
    assert find_file(folder, mlqa.source("deu_Latn")) is None
