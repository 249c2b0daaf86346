"""Plain and steered engines of one model, in processes of their own, over one folder of compiled graphs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm_eval_steering.lmeval.model import SteeredHFLM
from tests.vllm.conftest import furthest, save_tiny, tiny_set, words

STEERED = {"language": "fra_Latn", "op": "scale", "factor": 3}


def entries(folder: Path) -> dict[str, str]:
    """Key of each compiled model -> hash of its file."""
    found = folder.glob("torch_compile_cache/torch_aot_compile/*/rank_0_0/model")
    return {path.parents[1].name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("order", [("plain", "steered", "plain"), ("steered", "plain", "steered")], ids="-".join)
def test_plain_and_steered_engines_never_mix(vllm: None, order: tuple[str, ...], tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama", num_hidden_layers=3)
    lm = SteeredHFLM(model[0], tokenizer=model[1], dtype="float32")
    expected = {"plain": lm.loglikelihood(words(), disable_tqdm=True)}
    lm.intervene(tiny_set(model[0], "llama"), **STEERED)
    expected["steered"] = lm.loglikelihood(words(), disable_tqdm=True)
    assert furthest(expected["plain"], expected["steered"]) > 0.01
    cache, scores, after = tmp_path / "cache", [], []
    errors = (tmp_path / "errors").open("w")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.vllm.one_engine", *model, *order], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"VLLM_CACHE_ROOT": str(cache)},
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        for line in process.stdout:
            if line.startswith("SCORES"):
                scores.append(json.loads(line.removeprefix("SCORES")))
            if line.startswith("AFTER"):
                after.append(entries(cache))
                process.stdin.write("\n")
                process.stdin.flush()
    assert process.returncode == 0, (tmp_path / "errors").read_text()[-3000:]
    for kind, found in zip(order, scores, strict=True):
        assert furthest([(score,) for score in found], expected[kind]) < 1e-4, f"{kind} in {order}"
    first, second, third = after
    (key,) = first
    (other,) = second.keys() - first.keys()
    assert second[key] == first[key], "the second did not write over the first"
    assert third.keys() == second.keys(), "the third knows the first's entry as its own"
    assert third[other] == second[other], "and left the second's alone"
