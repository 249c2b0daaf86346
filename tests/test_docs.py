"""What the documentation shows works."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_notebook_runs_and_its_steering_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((DOCS / "steer.ipynb").read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, object] = {}
    printed: list[str] = []
    for cell in cells:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec("".join(cell["source"]), namespace)
            printed.append(out.getvalue())
    steered, after = next(text for text in printed if text).splitlines()
    complete = namespace["complete"]
    assert callable(complete)
    assert after == complete(namespace["prompt"]) != steered
    assert namespace["evidence"].positions > 0


@pytest.mark.parametrize(
    "page", sorted(DOCS.parent.glob("*.md")) + sorted(DOCS.glob("*.md")), ids=lambda path: path.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
