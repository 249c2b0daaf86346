"""By `make check-vllm`: every task of ours whose rows are at hand scores under `vllm` and `steered-vllm`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.resources import demo_model, tasks_folder
from tests.conftest import SHARED
from tests.vllm.conftest import MODES, demo_set, running

FRENCH: dict[str, Any] = {"language": "fra_Latn", "op": "add", "value": "mean", "site": "product", "factor": 4}


def loadable(settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """Tasks whose rows are in the package or at `STEERING_DATA`."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=settings)
    names = []
    for name in manager.all_subtasks:
        try:
            manager.load([name])
            names.append(name)
        except (SteeringError, OSError, ValueError):  # no rows here
            continue
    return manager, names


if os.environ.get("CHECK_VLLM") == "1":

    @pytest.mark.parametrize("kind", ["steered", "plain"])
    def test_every_task_scores(vllm: None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import lm_eval

        from lm_eval_steering.lmeval import registration

        registration.register_all()
        data = Path(os.environ.get("STEERING_DATA", SHARED / "data" / "evaluation"))
        monkeypatch.setenv("STEERING_DATA", str(data))
        monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "described elsewhere")
        settings = {"language": "fra_Latn", "pair": "deu_Latn-fra_Latn", "bleu_tokenizer": "char"}
        manager, names = loadable(settings)
        if kind == "plain":  # the twins of LSS need a steered engine
            names = [name for name in names if "_lss_" not in name and "preference" not in name]
        print(f"\n{len(names)} tasks under {kind}")
        assert len(names) > 20
        with running(kind, MODES["eager"], str(demo_model())) as lm:
            if kind == "steered":
                lm.intervene(demo_set(), **FRENCH)
            found = lm_eval.simple_evaluate(
                lm, tasks=names, task_manager=manager, limit=1, bootstrap_iters=2, gen_kwargs={"max_gen_toks": 2}
            )
        assert set(found["results"]) >= set(names)
