"""Every task of these families builds its requests and scores, offline, with the demo model."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.task_families import belebele, include, mlqa, xcopa, xnli, xquad, xwinograd
from lm_eval_steering.resources import demo_model, tasks_folder
from tests.conftest import SHARED
from tests.lmeval.task_families.items import INCLUDE, MLQA

MODULES = (xcopa, xwinograd, xnli, xquad, belebele, include, mlqa)
EXCERPTS = [
    *(f"xcopa_{code}{wording}" for code in xcopa.CODES for wording in ("", "_natural")),
    *(f"xwinograd_{code}{wording}" for code in xwinograd.CODES for wording in ("", "_natural")),
    *(f"xnli_{code}{wording}" for code in xnli.CODES for wording in ("", "_gurgurov")),
    *(f"belebele_{code}{wording}" for code in ("eng_Latn", "deu_Latn") for wording in ("", "_gurgurov")),
    *(f"xquad_{code}{wording}" for code in xquad.CODES for wording in ("", "_gurgurov")),
]
OURS = [
    *(f"include_{size}_{code}{rest}" for size in include.SIZES for code in INCLUDE for rest in ("", "_rahmanisa")),
    *("include_lite_44_fra_Latn_stem", "include_lite_44_heb_Hebr_driving_license"),
    *(f"mlqa_{pair.replace('-', '_')}{wording}" for pair in MLQA for wording in ("", "_gurgurov")),
]


def other_tasks() -> list[str]:
    """Those that the command below leaves out; of INCLUDE's domains, whose files differ in that word, one each."""
    modules = MODULES if (SHARED / "data").is_dir() else (belebele, include, mlqa)
    names = [path.stem for module in modules for path in module.generated_files() if not path.name.startswith("_")]
    first = {f"include_base_44_{codes.split()[0]}_{domain}" for domain, codes in include.DOMAINS.items()}
    run, domains = {*EXCERPTS, *OURS}, tuple(include.DOMAINS)
    return [name for name in names if name not in run and (name in first or not name.endswith(domains))]


def test_every_other_task_builds_its_requests(everywhere: Path, manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERING_DATA", str(everywhere))
    names = other_tasks()
    assert len(names) > 500
    for name in names:
        (task,) = manager.load([f"steering_{name}"])["tasks"].values()
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=1, rank=0, world_size=1)
        assert task.instances, name


def command(*arguments: str | Path, data: str = "") -> subprocess.CompletedProcess[str]:
    """The real `lm_eval` command on the demo model."""
    model = ["--model", "steered-hf", "--model_args", f"pretrained={demo_model()}", "--device", "cpu"]
    return subprocess.run(
        [Path(sys.executable).parent / "lm_eval", *model, "--batch_size", "16", *arguments],
        check=False, capture_output=True, text=True, env={**os.environ, "STEERING_DATA": data},
    )  # fmt: skip


def test_the_real_command_scores_them_offline_from_a_folder(everywhere: Path, tmp_path: Path) -> None:
    excerpts = EXCERPTS if (SHARED / "data").is_dir() else []
    names = [f"steering_{name}" for name in [*excerpts, *OURS]]
    done = command(
        "--tasks", ",".join(names), "--metadata", json.dumps({"data_dir": str(everywhere)}), "--limit", "1",
        "--gen_kwargs", "max_gen_toks=4", "--output_path", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert set(found["results"]) == set(names)
    for name, row in found["results"].items():
        scores = {key: value for key, value in row.items() if "," in key and "stderr" not in key}
        numbers = [value for key, value in scores.items() if not key.startswith("output_language")]
        assert numbers and all(math.isfinite(value) for value in numbers), row
        assert found["n-shot"][name] == 0 and row["sample_len"] >= 1
        codes = re.findall(r"[a-z]{3}_[A-Z][a-z]{3}", name)
        assert found["configs"][name]["metadata"]["evaluated"] == "-".join(dict.fromkeys(codes))
    span = found["results"]["steering_mlqa_deu_Latn_eng_Latn"]
    assert {"exact_match,none", "f1,none", "lang_expected,none", "output_language,none"} <= set(span)
    assert "lfs,none" not in span  # nothing is steered here
    if excerpts:
        quad = {"exact_match,none", "f1,none", "exact_match_mlqa,none", "f1_mlqa,none"}
        assert quad <= set(found["results"]["steering_xquad_tha_Thai"])
        assert {"acc,none", "parsed,none"} <= set(found["results"]["steering_xnli_fra_Latn_gurgurov"])


def test_a_group_averages_over_items(excerpts: Path, language_model: Any, manager: Any) -> None:
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=language_model, tasks=["steering_xwinograd"], task_manager=manager, limit=20, bootstrap_iters=0
    )
    members = [found["results"][f"steering_xwinograd_{code}"] for code in xwinograd.CODES]
    total = sum(member["sample_len"] for member in members)
    assert total == 5 * 20 + 16  # the Chinese excerpt has 16 items
    mean = sum(member["acc,none"] * member["sample_len"] for member in members) / total
    assert found["groups"]["steering_xwinograd"]["acc,none"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("name", "family", "row", "message"),
    [
        ("xcopa_ita_Latn", "xcopa", {"premise": "a.", "choice1": "b", "choice2": "c", "question": "why", "label": 0},
         "column 'question' holds 'why', expected one of 'cause', 'effect'"),
        ("xnli_fra_Latn", "xnli", {"premise": "a", "hypothesis": "b", "label": -1}, "column 'label' holds -1"),
        ("xwinograd_fra_Latn", "xwinograd",
         {"sentence": "a b", "option1": "c", "option2": "d", "answer": "1"}, "no gap"),
        ("belebele_fra_Latn", "belebele", {"flores_passage": "p", "question": "q", "correct_answer_num": "5",
         **{f"mc_answer{n}": "a" for n in (1, 2, 3, 4)}}, "column 'correct_answer_num' holds '5'"),
        ("xquad_deu_Latn", "xquad", {"context": "c", "question": "q", "answers": {"text": []}}, "one answer at least"),
        ("include_base_44_fra_Latn_stem", "include_base_44", {**INCLUDE["fra_Latn"][0]},
         "no question of the domain stem; the rows have social_science"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(
    name: str, family: str, row: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any, manager: Any
) -> None:
    from lm_eval_steering.lmeval.sources import DataError

    code = "_".join(name.removeprefix(f"{family}_").split("_")[:2])
    split = "validation" if family in ("xnli", "xquad") else "test"
    (tmp_path / family).mkdir()
    (tmp_path / family / f"{code}.{split}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("STEERING_DATA", str(tmp_path))
    with pytest.raises(DataError, match=message):
        manager.load([f"steering_{name}"])


def test_mlqa_of_one_language_is_its_pair() -> None:
    assert mlqa.source("deu_Latn") == mlqa.source("deu_Latn-deu_Latn")
    assert mlqa.source("deu_Latn-eng_Latn").hub[1].data_files == "mlqa.de.en/test/*.parquet"
    assert belebele.source("deu_Latn").hub[0].name == "deu_Latn"


@pytest.fixture
def overriding(excerpts: Path) -> Any:
    """A TaskManager of the XCOPA tasks with metadata of the user's, which lm-eval puts over the file's."""
    from lm_eval.tasks import TaskManager

    return lambda **said: TaskManager(
        include_path=str(tasks_folder() / "xcopa"), include_defaults=False, metadata=said
    )  # fmt: skip


@pytest.mark.parametrize("said", ["tur_Latn", {"arc_easy": "eng_Latn"}])
def test_a_task_is_what_its_file_says(said: Any, overriding: Any) -> None:
    with pytest.raises(SteeringError, match=r"^xcopa_ita_Latn: evaluated is 'ita_Latn' in the task's file and "):
        overriding(evaluated=said).load(["steering_xcopa_ita_Latn"])


def test_a_model_argument_that_is_called_like_a_wording_is_none(overriding: Any) -> None:
    name = "steering_xcopa_ita_Latn"
    (plain,), (named,) = (overriding(**said).load([name])["tasks"].values() for said in ({}, {"variant": "fp16"}))
    assert named.eval_docs[:] == plain.eval_docs[:]
    with pytest.raises(SteeringError, match="variant is 'natural' in the task's file and 'fp16'"):
        overriding(variant="fp16").load([f"{name}_natural"])
    with pytest.raises(SteeringError, match="variant='naturel': expected 'natural'"):
        xcopa.documents("ita_Latn", variant="naturel")
