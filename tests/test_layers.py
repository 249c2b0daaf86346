"""The layers of the package, as CONTRIBUTING.md names them: a module imports only from layers below its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lm_eval_steering

PACKAGE = Path(lm_eval_steering.__file__).parent
LAYERS = [
    {"errors", "provenance"},
    {"files", "resources", "demo", "extras"},
    {"progress"},
    {"languages", "architectures"},
    {"neurons"},
    {"metrics", "steering"},
    {"lmeval", "export"},
    {"vllm"},
    {"analysis"},
    {"sweep"},
    {"plans"},
    {"report"},
    {"cli"},
    {"__main__", "__init__"},
]
METRICS_AND_STEERING = next(number for number, packages in enumerate(LAYERS) if "steering" in packages)
WITHOUT_LM_EVAL = {name for packages in LAYERS[: METRICS_AND_STEERING + 1] for name in packages} | {"export"}


def package_of(module: str) -> str:
    return module.removeprefix("lm_eval_steering").lstrip(".").split(".")[0] or "__init__"


def layer(name: str) -> int:
    numbers = [number for number, packages in enumerate(LAYERS) if name in packages]
    assert numbers, f"{name} is in no layer: add it to LAYERS, and to CONTRIBUTING.md"
    return numbers[0]


def imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = str(node.module)
            modules |= {f"{module}.{alias.name}" for alias in node.names} if module == "lm_eval_steering" else {module}
    return modules


def violations(path: Path, own: str) -> list[str]:
    wrong = []
    for name in imports(path):
        if name.startswith("lm_eval_steering"):
            other = package_of(name)
            if other not in {own, "__version__"} and layer(other) >= layer(own):
                wrong.append(name)
        elif own in WITHOUT_LM_EVAL and name.split(".")[0] == "lm_eval":
            wrong.append(name)
    return wrong


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if "startup" not in path.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_layers_below(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert violations(path, own) == []


def test_the_check_sees_a_broken_layer(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from lm_eval_steering.lmeval import model\nimport lm_eval.api\nimport torch\n")
    assert sorted(violations(bad, "neurons")) == ["lm_eval.api", "lm_eval_steering.lmeval"]
