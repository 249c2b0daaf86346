"""What the documentation shows works."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import lm_eval_steering
from lm_eval_steering import __version__
from lm_eval_steering.lmeval.arguments import SteeringArguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "lm_eval_steering"


def modules_of_the_map() -> list[str]:
    """Paths below the package, in the order of CONTRIBUTING.md: headings name folders, lines name modules."""
    map_ = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Map")[1].split("\nOutside the package")[0]
    folder, modules = "", []
    for line in map_.splitlines():
        if heading := re.match(r"### `([^`]+)/`", line):
            folder = "" if heading[1] == "lm_eval_steering" else f"{heading[1]}/"
        elif module := re.match(r"- `([^`]+\.py)`: \S", line):
            modules.append(folder + module[1])
    return modules


def test_the_map_has_every_module_once_and_no_other() -> None:
    modules = modules_of_the_map()
    there = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert sorted(there - set(modules)) == [], "add a line to the map in CONTRIBUTING.md"
    assert sorted(set(modules) - there) == [], "these lines of CONTRIBUTING.md name no module"
    assert len(modules) == len(set(modules))


def test_every_file_that_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:lm_eval_steering|tests|docs|scripts)/[\w./]+\.(?:py|md))`", text)
    names += [f"lm_eval_steering/{name}" for name in re.findall(r"\| `([a-z_]+/\w+\.py)` \|", text)]
    assert len(names) > 20
    assert [name for name in names if "NAME" not in name and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert hasattr(import_module(f"benchmarks.{name}"), "main") or name in {"items", "measure", "models"}


def test_the_readme_has_every_argument_of_ours_and_no_other() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| [^|]{10,} \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(documented) == sorted(field.name for field in fields(SteeringArguments))


def test_the_version_is_that_of_the_changelog_and_of_the_citation() -> None:
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version("lm-eval-steering") == __version__


def run(notebook: Path) -> tuple[dict[str, object], list[str]]:
    """The names that a notebook leaves behind, and what each of its cells printed."""
    namespace: dict[str, object] = {}
    printed: list[str] = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec("".join(cell["source"]), namespace)
            printed.append(out.getvalue())
    return namespace, printed


def test_the_notebook_runs_and_its_steering_shows() -> None:
    namespace, printed = run(DOCS / "steer.ipynb")
    steered, after = next(text for text in printed if text).splitlines()
    complete = namespace["complete"]
    assert callable(complete)
    assert after == complete(namespace["prompt"]) != steered
    assert namespace["evidence"].positions > 0


def test_the_notebook_of_results_runs_and_shows_what_it_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace, _ = run(DOCS / "results.ipynb")
    frame = namespace["frame"]
    scores = frame[(frame["metric"] == "lfs_clean") & frame["factor"].notna()]
    stored = (DOCS / "results.ipynb").read_text(encoding="utf-8")
    assert len(scores) == 6
    assert all(f"<td>{value:.6f}</td>" in stored for value in scores["value"])
    assert namespace["report"].page.is_file()


def test_notebooks_store_no_path_of_a_machine() -> None:
    for notebook in DOCS.glob("*.ipynb"):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            assert not re.search(r"/(tmp|home|root)/|site-packages", json.dumps(cell.get("outputs", [])))


def test_every_public_name_is_exported_typed_and_on_the_page_of_the_api() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in set(lm_eval_steering.__all__) - {"__version__"}:
        public = getattr(lm_eval_steering, name)
        assert public.__doc__
        assert f"::: {public.__module__}.{name}\n" in page


@pytest.mark.parametrize(
    "page", sorted(DOCS.parent.glob("*.md")) + sorted(DOCS.glob("*.md")), ids=lambda path: path.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
