"""The house keeps its floors: a file imports only from floors below its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lm_eval_steering

PACKAGE = Path(lm_eval_steering.__file__).parent
FLOORS = [
    {"errors"},
    {"languages", "language_families", "architectures", "resources", "fingerprint"},
    {"neurons"},
    {"metrics", "steering"},
    {"harness", "export"},
    {"vllm"},
    {"analysis"},
    {"sweep"},
    {"report"},
    {"demo"},
    {"cli"},
    {"__main__", "__init__"},
]
WITHOUT_LM_EVAL = {
    "errors",
    "languages",
    "language_families",
    "architectures",
    "resources",
    "fingerprint",
    "neurons",
    "metrics",
    "steering",
    "export",
}


def room(module: str) -> str:
    return module.removeprefix("lm_eval_steering").lstrip(".").split(".")[0] or "__init__"


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = str(node.module)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "lm_eval_steering" else {module}
    return found


def violations(path: Path, own: str) -> list[str]:
    wrong = []
    for name in imports(path):
        if name.startswith("lm_eval_steering"):
            other = room(name)
            if other not in {own, "__version__"} and floor(other) >= floor(own):
                wrong.append(name)
        elif own in WITHOUT_LM_EVAL and name.split(".")[0] == "lm_eval":
            wrong.append(name)
    return wrong


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if "startup" not in path.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert violations(path, own) == []


def test_the_check_sees_a_broken_floor(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from lm_eval_steering.harness import model\nimport lm_eval.api\nimport torch\n")
    assert sorted(violations(bad, "neurons")) == ["lm_eval.api", "lm_eval_steering.harness"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable_at_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 330
