"""lm-eval's index is the same where it is made in our way, and is made where it is needed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from lm_eval.tasks import TaskManager, _index
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_steering.lmeval import indexing
from lm_eval_steering.lmeval.registration import register_all
from lm_eval_steering.resources import tasks_folder

SOME, DEMO = "steering_xcopa_ita_Latn", "steering_demo_continuation_fra_Latn"


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_all()


def test_every_file_of_ours_is_read_as_lm_eval_reads_it() -> None:
    for path in sorted(tasks_folder().resolve().rglob("*.yaml")):
        expected: Any = load_yaml(path, resolve_func=False)
        assert indexing.read(path) == expected, path
    assert _index.load_yaml(path, resolve_func=False) == expected


def test_files_do_not_share_what_they_include() -> None:
    one, other = (indexing.read(path) for path in sorted((tasks_folder() / "xcopa").resolve().glob("xcopa_*.yaml"))[:2])
    one["metric_list"].append("x")
    assert "x" not in other["metric_list"]


def test_names_of_ours_need_no_index_of_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = TaskManager()
    build = _index.TaskIndex.build
    monkeypatch.setattr(_index.TaskIndex, "build", staticmethod(lambda paths: build(_only_ours(paths))))
    assert manager.match_tasks([SOME]) == [SOME]
    assert manager.match_tasks(["steering_xcopa_*"]) and manager.match_tasks(["steering_nothing"]) == []
    assert len(manager.match_tasks(["steering_xcopa", "steering_deu_Latn"])) == 2  # a group and a tag
    assert SOME in manager.task_index and "steering_nothing" not in manager.task_index


def _only_ours(paths: Any) -> list[Any]:
    assert list(paths) == [tasks_folder()]
    return list(paths)


@pytest.mark.parametrize(
    "question",
    [
        lambda manager: manager.match_tasks([SOME, "hellaswag"]),
        lambda manager: manager.match_tasks(["*copa_it*"]),
        lambda manager: manager.all_tasks,
        lambda manager: list(manager.task_index),
        lambda manager: "hellaswag" in manager.task_index,
        lambda manager: manager.load([SOME, {"task": "x"}]),
    ],
)
def test_any_other_question_makes_the_whole_index(question: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class BuiltError(Exception):
        pass

    def build(paths: list[Any]) -> Any:
        raise BuiltError(paths[0])

    manager = TaskManager(metadata={"a": "b"})
    assert manager.metadata == {"a": "b"} and not hasattr(manager, "__nothing__")
    monkeypatch.setattr(_index.TaskIndex, "build", staticmethod(build))
    with pytest.raises(BuiltError, match=r"lm_eval.tasks$"):
        question(manager)


def test_tasks_of_the_user_are_indexed_at_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("task: steering_mine\ndataset_path: json\n")
    build = _index.TaskIndex.build
    monkeypatch.setattr(_index.TaskIndex, "build", staticmethod(lambda paths: build(paths[1:])))  # without lm-eval's
    manager = TaskManager(include_path=str(tmp_path))
    assert indexing._LATER not in manager.__dict__
    assert manager.match_tasks(["steering_mine", SOME]) == sorted(["steering_mine", SOME])


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["validate", "--tasks", SOME], "All tasks found and valid"),
        (["run", "--model", "dummy", "--tasks", DEMO, "--limit", "2"], DEMO),
    ],
)
def test_the_command_does_ours_without_the_whole_index(arguments: list[str], answer: str) -> None:
    code = (
        "import sys, lm_eval.tasks._index as index; build = index.TaskIndex.build\n"
        "index.TaskIndex.build = staticmethod(lambda paths: (print(len(paths), 'folders'), build(paths))[1])\n"
        f"sys.argv = ['lm_eval', *{arguments}]\n"
        "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "1 folders" in done.stdout and "2 folders" not in done.stdout, done.stderr
    assert answer in done.stdout
