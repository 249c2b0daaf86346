"""Where the files that travel with the package lie, in a wheel and in an editable install alike."""

from __future__ import annotations

from pathlib import Path

from lm_eval_steering.errors import NeuronSetError, did_you_mean

_PACKAGE = Path(__file__).parent


def _travelling(name: str) -> Path:
    """`tasks` and `neuron_sets` lie inside the package in a wheel, and beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def tasks_folder() -> Path:
    """Folder with our task YAML."""
    return _travelling("tasks")


def neuron_sets_folder() -> Path:
    """Folder with the neuron sets that ship."""
    return _travelling("neuron_sets")


def demo_model() -> Path:
    """Folder of the demo model's checkpoint."""
    return _PACKAGE / "demo" / "demo-model"


def demo_sentences() -> Path:
    """JSON lines with the demo's parallel sentences."""
    return _PACKAGE / "demo" / "data" / "sentences.jsonl"


def demo_calibration() -> Path:
    """Folder with the demo's text for finding neurons, one `{lang}.txt` a language."""
    return _PACKAGE / "demo" / "data" / "corpus"


def demo_plan() -> Path:
    """The small sweep of the demo model."""
    return _PACKAGE / "demo" / "plan.yaml"


def demo_plan_all() -> Path:
    """The sweep of the demo model over all its languages."""
    return _PACKAGE / "demo" / "plan-all.yaml"


def real_plan() -> Path:
    """The sweep of a pretrained model on the demo's sentences, which `make real` runs."""
    return _PACKAGE / "demo" / "plan-real.yaml"


def find_neuron_set(name: str | Path) -> Path:
    """Path of a neuron-set file: a path as it is, or the name of one that ships (`demo`)."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for file in neuron_sets_folder().glob("*.safetensors")}
    if str(name) in shipped:
        return shipped[str(name)]
    raise NeuronSetError(
        f"neuron set {str(name)!r}: no such file, and no set of that name ships"
        f"{did_you_mean(str(name), shipped)}; those that ship: {', '.join(sorted(shipped))}"
    )
