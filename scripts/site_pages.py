"""Hook of mkdocs: notebooks and the changelog become pages, and links that work on GitHub work on the site too.

mkdocs-jupyter would render notebooks, but its pages name scripts of other hosts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page with stored outputs for each notebook, and one for the changelog."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        name = Path(notebook.src_uri).stem
        cells = nbformat.read(str(notebook.abs_src_path), as_version=4)
        page, produced = MarkdownExporter().from_notebook_node(cells, {"output_files_dir": f"{name}-outputs"})
        files.append(File.generated(config, f"{name}.md", content=page))
        for path, content in produced["outputs"].items():
            files.append(File.generated(config, path, content=content))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changes.md", content=changes))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to their pages; a file outside docs/ is named, not linked."""
    markdown = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`\2`)", markdown)
