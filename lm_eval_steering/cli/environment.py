"""`lm-eval-steering env`: what an issue should say about an installation."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import typer

from lm_eval_steering import __version__, extras, resources

_LIBRARIES = (
    "lm-eval", "torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "safetensors", "numpy",
    "huggingface_hub",
)  # fmt: skip
_ENGINES = {"vllm": "vllm", "sglang": "sglang"}  # distribution -> module


def env() -> None:
    """Print versions, devices, engines, the state of the plugin, and where data, neuron sets and caches are."""
    for name, text in facts().items():
        typer.echo(f"{name:<22} {text}")


def facts() -> dict[str, str]:
    """What `env` prints, by name."""
    rows = {
        "lm-eval-steering": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }
    rows |= {name: _version(name) for name in _LIBRARIES}
    rows |= {f"extra {name}": _extra(name) for name in extras.EXTRAS}
    rows |= {f"engine {name}": _version(name) if find_spec(module) else "no" for name, module in _ENGINES.items()}
    rows["devices"] = _devices()
    rows["plugin"] = _plugin()
    rows["tasks"] = str(resources.tasks_folder())
    rows["neuron sets"] = str(resources.neuron_sets_folder())
    from huggingface_hub import constants

    rows["hub cache"] = str(constants.HF_HUB_CACHE)
    rows["data sets cache"] = os.environ.get("HF_DATASETS_CACHE", str(Path(constants.HF_HOME) / "datasets"))
    rows["offline"] = "yes" if constants.HF_HUB_OFFLINE else "no"
    return rows


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "no"


def _extra(name: str) -> str:
    missing = [module for module in extras.EXTRAS[name] if find_spec(module) is None]
    return f"no ({', '.join(missing)} missing)" if missing else "yes"


def _devices() -> str:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return ", ".join([*names, f"CPU with {torch.get_num_threads()} threads"])


def _plugin() -> str:
    """Whether a plain `lm_eval` knows our model, and why not."""
    if os.environ.get("LM_EVAL_STEERING_NO_STARTUP"):
        return "off: LM_EVAL_STEERING_NO_STARTUP is set; `lm-eval-steering run` works"
    if "_lm_eval_steering_startup" in sys.modules:
        return "on: plain lm_eval knows steered-hf"
    return "off: the start-up file did not run in this Python (docs/registration.md); `lm-eval-steering run` works"
