"""Every task of ours builds and scores under `vllm` and `steered-vllm`, on the rows that are at hand.

One task of each kind, whatever its language; `make check-vllm` takes all of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval import registration
from lm_eval_steering.resources import demo_model, tasks_folder
from tests.conftest import SHARED
from tests.vllm.conftest import MODES, demo_set, furthest, hooks, running

EVERYTHING = os.environ.get("CHECK_VLLM") == "1"
FRENCH: dict[str, Any] = {"language": "fra_Latn", "op": "add", "value": "mean", "site": "product", "factor": 4}
METADATA = {
    "language": "fra_Latn", "pair": "deu_Latn-fra_Latn", "bleu_tokenizer": "char", "target_language": "fra_Latn",
}  # fmt: skip
_CODE = re.compile(r"_[a-z]{2,3}(_[A-Z][a-z]{3})?(?=_|$)")


def with_rows(manager: Any, names: list[str]) -> list[str]:
    """Those whose rows are in the package or at `STEERING_DATA`; the first of each kind unless all are wanted."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name if EVERYTHING else _CODE.sub("_*", name), []).append(name)
    return [name for of_kind in kinds.values() if (name := _first_with_rows(manager, of_kind)) is not None]


def _first_with_rows(manager: Any, names: list[str]) -> str | None:
    for name in sorted(names, key=lambda name: "fra_Latn" in name):  # LSS is not defined from French to French
        try:
            manager.load([name])
        except (SteeringError, OSError, ValueError):  # no rows here
            continue
        return name
    return None


@pytest.mark.parametrize("kind", ["steered", "plain"])
def test_every_task_scores(vllm: None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    registration.register_all()
    monkeypatch.setenv("STEERING_DATA", os.environ.get("STEERING_DATA", str(SHARED / "data" / "evaluation")))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "described elsewhere")
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=METADATA)
    names = with_rows(manager, list(manager.all_subtasks))
    if kind == "plain":  # LSS needs scores of a steered engine
        names = [name for name in names if "_lss_" not in name and "_t1" not in name]
    print(f"\n{len(names)} tasks under {kind}")
    assert len([name for name in names if name.startswith("steering_demo_")]) >= 5
    if Path(os.environ["STEERING_DATA"]).is_dir():
        assert len(names) > 20
    with running(kind, MODES["eager"], str(demo_model())) as lm:
        if kind == "steered":
            lm.intervene(demo_set(), **FRENCH)
        found = lm_eval.simple_evaluate(
            lm, tasks=names, task_manager=manager, limit=1, bootstrap_iters=2, gen_kwargs={"max_gen_toks": 2}
        )
    assert set(found["results"]) >= set(names)


TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}"


def test_few_shot_examples_and_chat_templates_are_those_of_steered_hf(
    vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    registration.register_all()
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "described elsewhere")
    manager = TaskManager(include_path=str(tasks_folder() / "demo"), include_defaults=False, metadata=METADATA)
    expected = with_template(hooks(), manager)
    with running("steered", MODES["eager"], str(demo_model())) as lm:
        found = with_template(lm, manager)
    assert [prompt for prompt, _ in found] == [prompt for prompt, _ in expected]
    assert "<assistant>" in found[0][0][0], "an example was put into the template"
    assert (
        furthest([score for _, scores in found for score in scores], [s for _, scores in expected for s in scores])
        < 1e-4
    )


def with_template(lm: Any, manager: Any) -> list[tuple[Any, Any]]:
    """(prompts, scores) of each item of a task, with two examples and a chat template."""
    import lm_eval
    from lm_eval.tasks import get_task_dict

    lm.intervene(demo_set(), **FRENCH)
    lm.tokenizer.chat_template = TEMPLATE
    name = "steering_demo_continuation_fra_Latn"
    task = get_task_dict([name], manager)[name]
    task.set_config("num_fewshot", 2)  # its file says 0, which lm-eval lets no argument override
    results = lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, limit=3, apply_chat_template=True, fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )  # fmt: skip
    lm.tokenizer.chat_template = None
    return [(sample["arguments"][0], [answer[0] for answer in sample["resps"]]) for sample in results["samples"][name]]
