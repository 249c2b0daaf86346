"""`doctor --engine vllm`: what it finds in a right engine, and in a wrong one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm_eval_steering.resources import demo_model
from tests.vllm.conftest import in_this_process


def test_every_check_passes_on_the_demo_model(vllm: None, tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lm-eval-steering", "doctor", "--engine", "vllm", "--model", demo_model(),
         "--neurons", "demo", "--dtype", "float32", "--model-args", "max_model_len=128",
         "--json", tmp_path / "checks.json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "checks.json").read_text())
    assert found["passed"] and len(found["checks"]) == 15
    assert "15 checks passed" in done.stdout
    compiled = next(check for check in found["checks"] if check["name"].startswith("compiled scores"))
    assert float(compiled["found"]) < 1e-4


def test_a_module_that_edits_nothing_is_found_out(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_steering.analysis.doctor_vllm import examine_engine
    from lm_eval_steering.vllm.activation import SteeredModule

    def untouched(_module: SteeredModule, _site: int, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return units, torch.zeros_like(units)

    monkeypatch.setattr(SteeredModule, "_edit", untouched)
    with in_this_process():
        checks = examine_engine(
            str(demo_model()), {"enforce_eager": True, "dtype": "float32", "max_model_len": 128,
                                "distributed_executor_backend": "uni"}
        )  # fmt: skip
    failed = {check.name for check in checks if not check.passed}
    assert "a real intervention changes the scores" in failed
    assert len([name for name in failed if "follows the definition" in name]) == 3
    assert len([name for name in failed if name.startswith("hidden states") and "follow the" in name]) == 3
    assert "scale by 1 is bit-equal to no intervention" not in failed
