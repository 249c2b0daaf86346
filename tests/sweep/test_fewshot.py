"""A document's few-shot examples are those that one process of lm-eval draws for it, and are part of a cell's key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.lmeval.fewshot import SEED, draw_per_document
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.sweep.cells import Grid
from lm_eval_steering.sweep.sweep_model import SweepModel
from tests.conftest import tiny_model, tiny_tokenizer
from tests.sweep.conftest import PLAIN, Spell

DOCUMENTS = 12
YAML = """task: shots
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}}}
test_split: test
fewshot_split: {split}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def rows(name: str, number: int) -> str:
    return "".join(json.dumps({"id": n, "question": f"{name} {n}?", "answer": n % 2}) + "\n" for n in range(number))


@pytest.fixture(params=["train", "test"])
def shots(request: pytest.FixtureRequest, tmp_path: Path, spell: Spell) -> Any:
    """A plan's grid over a task whose examples come from another split, or from the split that is evaluated."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text(rows("Is it", DOCUMENTS))
    (folder / "train.jsonl").write_text(rows("Was it", DOCUMENTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "shots.yaml").write_text(YAML.format(folder=folder, split=request.param))

    def make(**changes: Any) -> Grid:
        plan = {"tasks": ["shots"], "num_fewshot": 2, "include_path": [str(tmp_path / "tasks")]}
        return spell(PLAIN, **plan | changes)

    return make


def prompts(task: Any, **options: Any) -> dict[int, str]:
    """doc_id -> prompt, as lm-eval builds them."""
    task.set_config(key="num_fewshot", value=2)
    task.set_fewshot_seed(seed=SEED)
    task.build_all_requests(**options)
    return {instance.doc["id"]: instance.args[0] for instance in task.instances}


def test_prompts_do_not_depend_on_processes_limit_and_chosen_documents(shots: Any) -> None:
    whole = prompts(shots().book.task("shots", None))  # lm-eval's own sampler, one process
    assert len(set(whole.values())) == DOCUMENTS
    task = shots().book.task("shots", None)
    for positions, limit, world_size in (
        (None, None, 1), (None, None, 2), (None, 5, 1), (None, 5, 3), ([1, 4, 10], None, 1), ([1, 4, 5, 10], None, 2),
    ):  # fmt: skip
        seen: dict[int, str] = {}
        for rank in range(world_size):
            draw_per_document(task, positions, limit, rank, world_size)
            seen |= prompts(task, limit=limit, samples=positions, rank=rank, world_size=world_size)
        expected = positions if positions is not None else range(limit or DOCUMENTS)
        assert seen == {number: whole[number] for number in expected}, (positions, limit, world_size)


def test_lm_eval_alone_draws_otherwise_under_two_processes(shots: Any) -> None:
    """What makes the sampler necessary; where lm-eval mends this, the sampler can go."""
    whole = prompts(shots().book.task("shots", None))
    task = shots().book.task("shots", None)
    assert prompts(task, rank=1, world_size=2) != {number: whole[number] for number in range(1, DOCUMENTS, 2)}


def test_few_shot_documents_are_part_of_the_key(shots: Any, tmp_path: Path) -> None:
    def keys(**changes: Any) -> set[str]:
        return {cell.key for cell in shots(**changes).cells}

    before, without = keys(), keys(num_fewshot=None)
    assert keys() == before and not before & without and not before & keys(num_fewshot=3)
    split = "train" if "fewshot_split: train" in (tmp_path / "tasks" / "shots.yaml").read_text() else "test"
    path = tmp_path / "data" / f"{split}.jsonl"
    path.write_text(path.read_text().replace('it 3?"', 'it 33?"'))
    assert not keys() & before
    if split == "train":
        assert keys(num_fewshot=None) == without  # nothing is drawn from it


class Two(SteeredHFLM):
    """As under a launcher with two processes and two GPUs."""

    world_size = 2  # type: ignore[assignment]
    rank = 0  # type: ignore[assignment]


def test_bare_lm_eval_says_how_several_processes_drew_and_a_sweep_need_not() -> None:
    class TwoOfASweep(SweepModel):
        world_size = 2  # type: ignore[assignment]
        rank = 0  # type: ignore[assignment]

    alone, both, sweep = (kind(tiny_model("llama"), tokenizer=tiny_tokenizer())
                          for kind in (SteeredHFLM, Two, TwoOfASweep))  # fmt: skip
    assert both.steering_report()["few_shot"] == "per rank, of 2 processes"
    assert "few_shot" not in alone.steering_report() and "few_shot" not in sweep.steering_report()
