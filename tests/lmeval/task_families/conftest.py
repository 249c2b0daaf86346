from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.resources import demo_model, tasks_folder
from tests.conftest import SHARED
from tests.lmeval.task_families.items import INCLUDE, MLQA, write, write_everywhere


@pytest.fixture(scope="session")
def language_model() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(demo_model()), device="cpu", batch_size=8)


@pytest.fixture(scope="session")
def manager() -> Any:
    """Our tasks alone: lm-eval's own index takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks_folder()), include_defaults=False)


@pytest.fixture(scope="session")
def whole() -> Iterator[tuple[Any, list[str]]]:
    """The index that `lm_eval` itself uses, its own tasks and ours, and the warnings while it was made."""
    from lm_eval.tasks import TaskManager

    from lm_eval_steering.lmeval.registration import register_all

    register_all()
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lm_eval.tasks._index")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # whatever another test made of its parent
    yield TaskManager(), told
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def lm_evals(whole: tuple[Any, list[str]]) -> dict[str, Any]:
    """lm-eval's own tasks, groups and tags."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    index = whole[0].task_index
    named = {name: entry for name, entry in index.items() if entry.yaml_path and folder in entry.yaml_path.parents}
    tags = {tag for entry in named.values() for tag in entry.tags}
    return named | {tag: index[tag] for tag in tags if tag in index}


@pytest.fixture(scope="session")
def own_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("items")
    write(folder, "include_base_44", INCLUDE)
    write(folder, "include_lite_44", INCLUDE)
    write(folder, "mlqa", MLQA)
    return folder


@pytest.fixture(scope="session")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for every task of these families: excerpts where they are at hand, else items of our own."""
    folder = tmp_path_factory.mktemp("everywhere")
    write_everywhere(folder)
    if (SHARED / "data").is_dir():
        for name in ("xcopa", "xwinograd", "xnli", "xquad"):
            (folder / name).symlink_to((SHARED / "data" / "evaluation" / name).resolve())
        for code in ("eng_Latn", "deu_Latn"):
            (folder / "belebele" / f"{code}.test.jsonl").unlink()
            excerpt = SHARED / "data" / "evaluation" / "belebele" / code / "test.jsonl"
            (folder / "belebele" / f"{code}.test.jsonl").symlink_to(excerpt.resolve())
    return folder


@pytest.fixture
def own_data(own_items: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEERING_DATA", str(own_items))
    return own_items


@pytest.fixture
def excerpts(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shared_data / "evaluation"
    monkeypatch.setenv("STEERING_DATA", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
