"""Samples scored afterwards give what the run itself would have given: the real commands, on the demo model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from typer import Typer
from typer.testing import CliRunner

from lm_eval_steering.cli.rescore import rescore as verb
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.expected_language import expected_language
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.rescore import Columns, RescoreOptions, rescore, rescore_table
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.metrics.output_language import output_metrics
from lm_eval_steering.metrics.registered import METRICS
from lm_eval_steering.resources import demo_model
from tests.commands import run_together

STEERED = f"pretrained={demo_model()},neurons=demo,language=fra_Latn,op=add,value=mean,site=product,factor=4"
FORCING = "steering_demo_forcing"
# Every registered metric on items of several languages, two references each, one of them without an expectation.
OWN = """
task: rescore_own
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answers}}}}"
generation_kwargs: {{do_sample: false, repetition_penalty: 1.2, max_gen_toks: 24, min_new_tokens: 12, until: ["\\n"]}}
metric_list:
{metrics}
metadata:
  version: 1.0
"""
PROMPTS = [
    ("Сегодня утром мы пошли", "rus_Cyrl"), ("The children are", "eng_Latn"), ("今天早上", "zho_Hans"), ("Ich", ""),
    ("Bu sabah", "tur_Latn"), ("今朝は", "jpn_Jpan"), ("Questa mattina", "ita_Latn"), ("الأولاد", "arb_Arab"),
]  # fmt: skip


def about(code: str) -> str:
    return "target" if code == "tur_Latn" else ""


@pytest.fixture(scope="module")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"prompt": prompt, "answers": ["a", "b"], "expected_language": code, "about_language": about(code)}
        for prompt, code in PROMPTS
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, documents)))
    metrics = "\n".join(f"  - metric: {name}" for name in METRICS)
    (folder / "own.yaml").write_text(OWN.format(file=folder / "items.jsonl", metrics=metrics))
    return folder


def command(out: Path, tasks: Path, *extra: str, model: str = "steered-hf", model_args: str = STEERED) -> list[Any]:
    return [
        "lm_eval", "--model", model, "--model_args", model_args, "--tasks", f"{FORCING},rescore_own", "--include_path",
        tasks, "--device", "cpu", "--batch_size", "16", "--limit", "16", "--output_path", out, *extra,
    ]  # fmt: skip


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(own_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    run_together(
        command(work / "direct", own_task, "--log_samples"),
        command(work / "predicted", own_task, "--predict_only"),
        command(work / "plain", own_task, "--log_samples", model="hf", model_args=f"pretrained={demo_model()}"),
        cwd=work,
    )
    return work


@pytest.fixture
def direct(runs: Path) -> Path:
    return runs / "direct"


@pytest.fixture
def predicted(runs: Path) -> Path:
    return runs / "predicted"


@pytest.fixture
def plain(runs: Path) -> Path:
    return runs / "plain"


def results_of(out: Path) -> dict[str, Any]:
    (found,) = out.rglob("results_*.json")
    return json.loads(found.read_text())["results"]


def shared(direct: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in direct.items() if key in again}


def test_predict_only_and_rescore_equal_a_direct_run(direct: Path, predicted: Path) -> None:
    before = contents(predicted)
    (done,) = rescore(predicted, RescoreOptions())
    after = contents(predicted)
    assert {path: after[path] for path in before} == before
    assert {path.name.split("_2")[0] for path in set(after) - set(before)} == {
        "rescored", f"rescored_samples_{FORCING}", "rescored_samples_rescore_own",
    }  # fmt: skip
    scores = results_of(direct)
    own = {key: value for key, value in scores["rescore_own"].items() if key.split(",")[0] in METRICS}
    # No line passes in a script other than Latin (the Japanese answer goes on in French), so there is no word rate.
    assert {key.split(",")[0] for key in own} == set(METRICS) - {"wpr", "unfinished"}  # and the model does not think
    for task in (FORCING, "rescore_own"):
        assert shared(scores[task], done.scores[task]) == shared(done.scores[task], scores[task]) != {}
    assert {"lfs,none", "lfs_stderr,none", "output_language,none"} <= set(shared(scores[FORCING], done.scores[FORCING]))
    assert done.scores["rescore_own"]["lcpr_stderr,none"] == "N/A"
    assert done.counts["rescore_own"]["lang_expected,none"] == 7
    assert done.settings["target_languages"] == ["fra_Latn"]


def test_values_are_not_rounded_where_an_item_has_several_references(direct: Path) -> None:
    (samples,) = direct.rglob("samples_rescore_own_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len({row["lang_confidence"] for row in rows}) > 2
    assert all(isinstance(row["output_language"], str) for row in rows)
    assert ["lang_expected" in row for row in sorted(rows, key=lambda row: row["doc_id"])] == [
        bool(code) for _, code in PROMPTS
    ]


def test_rescoring_a_direct_run_gives_its_own_numbers_and_twice_the_same_file(direct: Path) -> None:
    (first,) = rescore(direct, RescoreOptions())
    content = first.path.read_bytes()
    (second,) = rescore(direct, RescoreOptions())
    assert second.path == first.path and second.path.read_bytes() == content
    assert shared(results_of(direct)["rescore_own"], first.scores["rescore_own"]) == first.scores["rescore_own"]


def test_plain_hf_has_no_target_until_one_is_named(plain: Path) -> None:
    assert "lfs,none" not in results_of(plain)["rescore_own"]
    (without,) = rescore(plain, RescoreOptions())
    assert "lfs,none" not in without.scores[FORCING] and "lang_expected,none" in without.scores["rescore_own"]
    named, other = (rescore(plain, RescoreOptions(targets=(code,)))[0] for code in ("fra_Latn", "deu_Latn"))
    assert named.path != other.path != without.path and named.path.exists() and other.path.exists()
    labels = named.scores[FORCING]["output_language,none"].split()
    french = sum(int(label.split(":")[1]) for label in labels if label.startswith("fra_Latn"))
    assert named.scores[FORCING]["lfs,none"] == french / 16


def test_the_verb_prints_a_table(plain: Path) -> None:
    app = Typer()
    app.command()(verb)
    done = CliRunner().invoke(app, [str(plain), "--target-language", "fr", "--expected-language", "eng_Latn"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split() == ["task", "filter", "metric", "value", "stderr", "outputs"]
    rows = [line.split() for line in lines]
    assert any(row[:3] == ["rescore_own", "none", "lang_expected"] and row[-1] == "8" for row in rows)
    assert "target fra_Latn, identifier lid.176.ftz@8f3472cf" in done.output
    assert "wrote " in done.output


TEXTS = [
    ("Der Zug fährt heute leider nicht, wir nehmen den Bus.", "fra_Latn", "deu_Latn"),
    ("Le train ne circule pas aujourd'hui, nous prenons le bus.", "fr", "deu_Latn"),
    ("", "fra_Latn", ""),
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_plain_table_is_scored_like_samples(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts.{ending}"
    rows = [dict(zip(("text", "target", "expected"), row, strict=True)) for row in TEXTS]
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            quoting = csv.QUOTE_NONE if ending == "tsv" else csv.QUOTE_MINIMAL
            table = csv.writer(file, delimiter="\t" if ending == "tsv" else ",", quoting=quoting)
            table.writerows([("text", "target", "expected"), *TEXTS])
    app = Typer()
    app.command()(verb)
    done = CliRunner().invoke(app, [str(path)])
    assert done.exit_code == 0, done.output
    (written,) = tmp_path.glob("rescored_texts*.json")
    content = json.loads(written.read_text())
    assert content["results"]["texts"]["lfs,none"] == pytest.approx(1 / 3)
    assert content["results"]["texts"]["lang_expected,none"] == 0.5 and content["counts"]["texts"]["lfs,none"] == 3
    assert content["rescored"]["target_languages"] == ["fra_Latn"]
    (samples,) = tmp_path.glob("rescored_samples_texts*.jsonl")
    labels = [json.loads(line)["output_language"] for line in samples.read_text().splitlines()]
    assert labels == ["deu_Latn", "fra_Latn", "unknown"]
    german = rescore_table(path, RescoreOptions(targets=("deu_Latn",)))
    assert german.scores["texts"]["lfs,none"] == pytest.approx(1 / 3) and german.path != written


RUSSIAN = "Поезд сегодня не идёт, мы едем на автобусе в город."


def test_word_rates_and_thoughts_are_those_of_the_run(tmp_path: Path) -> None:
    """An answer without an English word, one with one, and one whose thought did not end; samples and a table."""
    texts = [RUSSIAN, RUSSIAN.replace("город", "office"), RUSSIAN]
    unfinished = [0.0, 0.0, 1.0]
    rows = [
        {"doc_id": place, "doc": {}, "filter": "none", "filtered_resps": [text], "unfinished": thought}
        for place, (text, thought) in enumerate(zip(texts, unfinished, strict=True))
    ]
    (tmp_path / "samples_t_2026-01-01T00-00-00.5.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = RescoreOptions(targets=("rus_Cyrl",))
    (samples,), table = rescore(tmp_path, asked), rescore_table(tmp_path / "texts.jsonl", asked)
    direct = [output_metrics(text, targets=("rus_Cyrl",)) for text in texts]
    assert [values["wpr"] for values in direct] == [1, 0, 1]
    assert samples.scores["t"]["wpr,none"] == 0.5 and samples.counts["t"]["wpr,none"] == 2
    assert table.scores["texts"]["wpr,none"] == pytest.approx(2 / 3) and table.counts["texts"]["wpr,none"] == 3
    assert samples.scores["t"]["unfinished,none"] == pytest.approx(1 / 3)
    assert samples.scores["t"]["lfs,none"] == pytest.approx(2 / 3) and table.scores["texts"]["lfs,none"] == 1
    assert "unfinished,none" not in table.scores["texts"]


def test_a_faulty_table_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("answer,target\nOui,fr\nNon,frensh\n")
    with pytest.raises(SteeringError, match=r"texts\.csv, line 2: no text in the column 'text'.*answer, target"):
        rescore_table(path, RescoreOptions())
    with pytest.raises(SteeringError, match=r"texts\.csv, line 3, column 'target': unknown language 'frensh'"):
        rescore_table(path, RescoreOptions(), Columns(text="answer"))
    (tmp_path / "empty.csv").write_text("text,target\n")
    with pytest.raises(SteeringError, match=r"empty\.csv: no rows"):
        rescore_table(tmp_path / "empty.csv", RescoreOptions())
    with pytest.raises(SteeringError, match=r"none\.csv: no such file or folder"):
        verb(tmp_path / "none.csv")
    (tmp_path / "texts.txt").write_text("Oui")
    with pytest.raises(SteeringError, match=r"expected a \.jsonl, \.parquet, \.csv or \.tsv file"):
        rescore_table(tmp_path / "texts.txt", RescoreOptions())


def test_another_identifier_is_refused_unless_it_is_asked_for(tmp_path: Path, predicted: Path) -> None:
    (results,) = predicted.rglob("results_*.json")
    (samples,) = predicted.rglob("samples_rescore_own_*.jsonl")
    for path in (results, samples):
        (tmp_path / path.name).write_text(path.read_text().replace("@8f3472cf", "@00000000"))
    with pytest.raises(SteeringError, match=r"the run identified languages with .*@00000000.*pass --lid"):
        rescore(tmp_path, RescoreOptions())
    (done,) = rescore(tmp_path, RescoreOptions(identifier=LanguageIdentifier(threshold=1.0)))
    assert ">1," in done.settings["language_identifier"]


def test_what_cannot_be_rescored_is_said(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="no samples_<task>_<date>"):
        rescore(tmp_path, RescoreOptions())
    samples = tmp_path / "samples_t_2026-01-01T00-00-00.5.jsonl"
    samples.write_text('{"filtered_resps": [["-1.0", "False"]], "filter": "none"}\n')
    with pytest.raises(SteeringError, match="likelihood"):
        rescore(tmp_path, RescoreOptions())
    samples.write_text('{"filtered_resps": ["Guten')
    with pytest.raises(SteeringError, match="line 1: no sample of lm-eval, or cut short"):
        rescore(tmp_path, RescoreOptions())
    samples.write_text('{"filtered_resps": ["Guten Tag"]}\n{"filtered_resps": [[7]]}\n')
    with pytest.raises(SteeringError, match="turns 1 of 2 answers into something that is no text"):
        rescore(tmp_path, RescoreOptions())
    with pytest.raises(SteeringError, match="about='words'"):
        RescoreOptions(about="words")


def test_what_cannot_be_is_refused_before_anything_is_generated(
    own_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = (own_task / "own.yaml").read_text().replace("task: rescore_own", "task: rescore_wrong")
    (tmp_path / "own.yaml").write_text(yaml.replace("- metric: lpr\n", "- {metric: lpr, expected: frensh}\n"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = SteeredHFLM(pretrained=str(demo_model()), device="cpu")
    monkeypatch.setattr(lm, "generate_until", lambda *_, **__: pytest.fail("something was generated"))
    with pytest.raises(SteeringError, match="unknown language 'frensh'"):
        simple_evaluate(model=lm, tasks=["rescore_wrong"], task_manager=manager)


@pytest.mark.parametrize(
    ("document", "metadata", "expected"),
    [
        ({"expected_language": "fr"}, {"evaluated_language": "deu_Latn"}, "fra_Latn"),
        ({"expected_language": ""}, {"evaluated_language": "deu_Latn"}, None),
        ({}, {"evaluated_language": "de"}, "deu_Latn"),
        ({}, {"evaluated_language": ["de"]}, "deu_Latn"),
        ({}, {"evaluated_language": ["eng_Latn", "deu_Latn"]}, None),
        ({}, {"evaluated_language": "eng_Latn+deu_Latn"}, None),
        ({}, {"evaluated_language": ["eng_Latn", "deu_Latn"], "expected_language": "deu_Latn"}, "deu_Latn"),
        ({}, None, None),
        ("no mapping", {"language": "fr"}, None),
    ],
)
def test_the_items_word_goes_before_the_tasks(document: Any, metadata: Any, expected: str | None) -> None:
    assert expected_language(document, metadata) == expected
