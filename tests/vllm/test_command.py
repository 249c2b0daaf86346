"""What a user types: the command with the default engine, and a checkpoint of ours under `--model vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm_eval_steering.resources import demo_model
from tests.vllm.conftest import MODES, demo_set, furthest, hooks, rolling, running, scoring

BIN = Path(sys.executable).parent
STEERED = "neurons=demo,language=fra_Latn,op=add,value=mean,site=product,factor=4"
ENGINE = f"pretrained={demo_model()},dtype=float32,enforce_eager=True,max_model_len=512"
TASKS = "steering_demo_lss_eng_Latn,steering_demo_forcing_choose,steering_demo_perplexity_fra_Latn"


def test_the_command_scores_our_tasks_and_stores_what_was_done(vllm: None, tmp_path: Path) -> None:
    done = subprocess.run(
        [BIN / "lm_eval", "--model", "steered-vllm", "--model_args", f"{ENGINE},{STEERED}", "--tasks", TASKS,
         "--limit", "4", "--output_path", tmp_path, "--log_samples", "--use_cache", tmp_path / "cache"],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    steering = results["config"]["steering"]
    assert steering["engine"]["name"] == "vllm"
    assert steering["evidence"]["positions"] >= steering["evidence"]["asked"] > 0
    assert steering["target_languages"] == ["fra_Latn"]
    found = results["results"]
    assert 0 <= found["steering_demo_lss_eng_Latn"]["lss,none"] <= 1
    assert 0 <= found["steering_demo_forcing_choose"]["lfs,none"] <= 1
    assert found["steering_demo_perplexity_fra_Latn"]["token_perplexity,none"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("data_parallel_size=2", "data_parallel_size=2: lm-eval makes new engines for every batch"),
        (f"{STEERED},positions=prompt", "positions=prompt: vLLM's batches mix"),
        ("neurons=demo,language=fra_Latn,op=add,value=live_max", "value=live_max: a live statistic"),
        ("neurons=demo,language=fra_Latn,op=scal", "did you mean 'scale'"),
        ("tensor_paralel_size=2", "did you mean 'tensor_parallel_size'"),
        ("worker_cls=mine", "worker_cls='mine': steered-vllm brings the worker"),
        ("scoring=shared", "scoring='shared': vLLM has one method"),
        (f"neurons=demo,language=fra_Latn,op=scale,factor=2,lora_local_path={demo_model()}", "adapter"),
        ("steered_residual=3", "steered_residual=3: expected True or False"),
        ("neurons=demo,language=fra_Latn,op=add,site=residual,layers=2", "no statistics of hidden states"),
        ("max_model_len=100000000", "vLLM did not start"),
    ],
)
def test_mistakes_are_one_line_before_the_engine_starts(vllm: None, arguments: str, message: str) -> None:
    from lm_eval.api.registry import get_model

    from lm_eval_steering.errors import SteeringError

    with pytest.raises(SteeringError) as error:
        get_model("steered-vllm").create_from_arg_string(f"{ENGINE},{arguments}", {"batch_size": 1, "device": None})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_engine_that_does_not_start_is_one_line_after_its_own_log(vllm: None, tmp_path: Path) -> None:
    done = subprocess.run(
        [BIN / "lm_eval", "--model", "steered-vllm", "--model_args", ENGINE, "--tasks", "steering_demo_lss_eng_Latn",
         "--output_path", tmp_path],
        capture_output=True, text=True, check=False, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1000000"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "Available memory on node" in done.stdout + done.stderr, "vLLM's own message"
    last = [line for line in done.stderr.splitlines() if line.startswith("lm-eval-steering: error: ")][-1]
    for fact in ("vLLM did not start", "log above", "VLLM_CPU_KVCACHE_SPACE=1", "gpu_memory_utilization="):
        assert fact in last
    after = done.stderr[done.stderr.rindex(last) :]
    assert "Traceback" not in after and "SteeringError" not in done.stderr


def test_a_checkpoint_of_ours_under_plain_vllm_is_steered_hf(vllm: None, tmp_path: Path) -> None:
    from lm_eval_steering.export.job import Job, export_checkpoint
    from lm_eval_steering.export.verify import Loader

    arguments = {"language": "fra_Latn", "op": "add", "value": "mean", "factor": 4, "site": "product"}
    lm = hooks()
    lm.intervene(demo_set(), **arguments)
    scores = lm.loglikelihood(scoring(), disable_tqdm=True)
    export_checkpoint(Job(Loader(str(demo_model()), dtype="float32"), demo_set(), arguments, tmp_path / "exported"))
    with running("plain", MODES["two-workers-eager"], str(tmp_path / "exported")) as plain:
        assert furthest(plain.loglikelihood(scoring(), disable_tqdm=True), scores) < 1e-4
        texts = lm.loglikelihood_rolling(rolling(), disable_tqdm=True)
        assert furthest(plain.loglikelihood_rolling(rolling(), disable_tqdm=True), texts) < 1e-4
