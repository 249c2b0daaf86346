"""Hook of mkdocs: each notebook of docs/ becomes a page with its stored outputs.

mkdocs-jupyter would do it too, but its pages name scripts of other hosts.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put a Markdown page, and its figures, in the place of each notebook."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        name = Path(notebook.src_uri).stem
        cells = nbformat.read(str(notebook.abs_src_path), as_version=4)
        resources = {"output_files_dir": f"{name}-outputs"}
        page, produced = MarkdownExporter().from_notebook_node(cells, resources)
        files.append(File.generated(config, f"{name}.md", content=page))
        for path, content in produced["outputs"].items():
            files.append(File.generated(config, path, content=content))
    return files
