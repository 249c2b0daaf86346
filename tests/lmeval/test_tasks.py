from __future__ import annotations

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.task_families import demo as tasks
from lm_eval_steering.lmeval.task_families import generated_files
from lm_eval_steering.lmeval.task_families.common import language_metrics
from lm_eval_steering.metrics.likelihood import Score
from lm_eval_steering.metrics.output_language import IdentifiedText
from lm_eval_steering.resources import tasks_folder


def test_generated_task_files_are_up_to_date() -> None:
    files = generated_files()
    stale = [str(path) for path, text in files.items() if (tasks_folder() / path).read_text(encoding="utf-8") != text]
    assert len(files) > 1000 and stale == [], "run python scripts/generate_tasks.py"


def test_continuation_has_one_right_answer_and_moves_it_around() -> None:
    docs = tasks.continuation_documents("fra_Latn")["test"]
    assert len(docs) == 60
    assert {doc["label"] for doc in docs} == {0, 1, 2, 3}
    for doc in docs:
        assert len(set(doc["choices"])) == 4
        assert doc["prompt"] + doc["choices"][doc["label"]] == tasks.sentence(doc["id"], "fra_Latn")


def test_lss_documents_pair_the_base_with_the_steered_language() -> None:
    docs = tasks.lss_documents("eng_Latn", language="jpn", factor=3)["test"]
    assert len(docs) == 40 and docs[0]["id"] == 20
    doc = docs[0]
    assert doc["prompt"] + doc["choices"][0] == tasks.sentence(20, "eng_Latn")
    assert doc["made_for"] == ["jpn_Jpan"] and doc["choices"][1].startswith(" ")
    assert tasks.lss_documents("zho_Hans", language="jpn")["test"][0]["choices"][1][0] != " "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs one steered language"),
        ({"language": "fra_Latn+deu_Latn"}, "needs one steered language"),
        ({"language": "eng"}, "undefined"),
        ({"language": "ind"}, "not in ind_Latn"),
        ({"language": "fra", "items": "some"}, "items='some'"),
    ],
)
def test_lss_without_one_other_language_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        tasks.lss_documents("eng_Latn", **settings)


def test_lss_counts_strict_shifts_and_reports_ties_and_identical_objects() -> None:
    doc = {"made_for": ["fra_Latn"], "choices": ["a", "b"]}

    def scores(base: float, target: float) -> list[Score]:
        return [Score((x, False), 1, unsteered=-3.0, targets=("fra_Latn",)) for x in (base, target)]

    assert tasks.lss_metrics(doc, scores(-4, -3)) == {"lss": 1, "lss_shift": 1, "lss_ties": 0, "lss_distinct": 1}
    assert tasks.lss_metrics(doc, scores(-3, -3)) == {"lss": 0, "lss_shift": 0, "lss_ties": 1, "lss_distinct": 0}
    same = {**doc, "choices": ["a", "a"]}
    assert "lss_distinct" not in tasks.lss_metrics(same, scores(-3, -3))


def test_lss_refuses_scores_of_another_model_or_target() -> None:
    doc = {"made_for": ["fra_Latn"], "choices": ["a", "b"]}
    with pytest.raises(SteeringError, match="--model steered-hf"):
        tasks.lss_metrics(doc, [(-1.0, False), (-2.0, False)])
    german = [Score((-1.0, False), 1, unsteered=-1.0, targets=("deu_Latn",))] * 2
    with pytest.raises(SteeringError, match=r"the documents are for \['fra_Latn'\]"):
        tasks.lss_metrics(doc, german)
    bare = [Score((-1.0, False), 1, targets=("fra_Latn",))] * 2
    with pytest.raises(SteeringError, match="--use_cache"):
        tasks.lss_metrics(doc, bare)


def test_forcing_prompts_are_never_in_the_steered_language_and_halves_do_not_meet() -> None:
    report = tasks.forcing_documents(target_language="fra")["test"]
    choose = tasks.forcing_documents(items="choose", target_language="fra")["test"]
    assert "fra_Latn" not in {doc["language"] for doc in report}
    assert len({doc["language"] for doc in report}) == 11
    assert not {doc["id"] for doc in report} & {doc["id"] for doc in choose}
    assert len({doc["language"] for doc in tasks.forcing_documents()["test"]}) == 12


def test_forcing_metrics_keep_label_and_confidence_with_each_sample() -> None:
    found = language_metrics({}, [IdentifiedText("x", "fra_Latn", 0.9, ("fra_Latn",))])
    assert (found["output_language"], found["lang_confidence"], found["lfs"]) == ("fra_Latn", 0.9, 1.0)
    plain = language_metrics({}, ["Das ist ein schöner Tag im Park."])
    assert plain["output_language"] == "deu_Latn" and "lfs" not in plain
