"""Items, folders of rows and models for the tests of the task families, and lm-eval's own evaluator around them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import pytest
import torch
from lm_eval.tasks import TaskManager

from lm_eval_steering.lmeval import registration
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.resources import demo_model, tasks_folder
from tests.conftest import SHARED
from tests.lmeval.task_families.items import INCLUDE, MLQA, write, write_everywhere

registration.register_all()

FRENCH = {"language": "fra_Latn", "op": "add", "value": "mean", "site": "product", "factor": 4}
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def described_once() -> Iterator[None]:
    """lm-eval describes the machine at the end of each evaluation, which takes longer than ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "described elsewhere")
        yield


@pytest.fixture(scope="session")
def demo_set() -> NeuronSet:
    return NeuronSet.load("demo")


@pytest.fixture(scope="session")
def loaded() -> SteeredHFLM:
    return SteeredHFLM(str(demo_model()), device="cpu", batch_size=16)


@pytest.fixture
def french(loaded: SteeredHFLM, demo_set: NeuronSet) -> SteeredHFLM:
    loaded.intervene(demo_set, **FRENCH)
    return loaded


@pytest.fixture
def unsteered(loaded: SteeredHFLM) -> SteeredHFLM:
    loaded.intervene()
    return loaded


@pytest.fixture
def evaluate() -> Evaluate:
    def run(
        model: Any, *tasks: str, limit: int | None = None, tokens: int | None = None, more: Path | None = None,
        **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        include = [*map(str, folders_of(tasks) or [tasks_folder()]), *([str(more)] if more else [])]
        manager = TaskManager(include_path=include, include_defaults=False, metadata=settings)
        return lm_eval.simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=2,
            gen_kwargs={"max_gen_toks": tokens} if tokens else None,
        )  # fmt: skip

    return run


def folders_of(names: Iterable[str]) -> list[Path]:
    """The families' own folders: reading the files of all of them takes seconds."""
    prefixes = {f"steering_{folder.name}_": folder for folder in tasks_folder().iterdir() if folder.is_dir()}
    found = {prefix for name in names for prefix in prefixes if f"{name}_".startswith(prefix)}
    return [prefixes[prefix] for prefix in sorted(found)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# In the fields of DGurgurov/CLaS-Bench; the items are ours.
CLAS_ROWS = [
    {"question_id": number, "language_code": code, "question": text}
    for code, texts in {
        "en": ["How can I learn to cook?", "Why is the sky blue?", "Write a short poem about rain."],
        "de": ["Wie lerne ich kochen?", "Warum ist der Himmel blau?", "Schreib ein kurzes Gedicht über Regen."],
        "no": ["Hvordan lærer jeg å lage mat?", "Hvorfor er himmelen blå?", "Skriv et kort dikt om regn."],
    }.items()
    for number, text in enumerate(texts)
]


@pytest.fixture
def clas_data(tmp_path: Path) -> Path:
    for name in ("eng_Latn", "deu_Latn", "nob_Latn", "fra_Latn"):
        write_rows(tmp_path / "clas_bench" / f"{name}.train.jsonl", CLAS_ROWS)
    return tmp_path


@pytest.fixture(scope="session")
def language_model() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(demo_model()), device="cpu", batch_size=8)


@pytest.fixture(scope="session")
def manager() -> Any:
    """Our tasks alone: lm-eval's own index takes seconds."""
    return TaskManager(include_path=str(tasks_folder()), include_defaults=False)


@pytest.fixture(scope="session")
def whole() -> Iterator[tuple[Any, list[str]]]:
    """The index that `lm_eval` itself uses, its own tasks and ours, and the warnings while it was made."""
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
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
