"""A synthetic sweep, its report and a browser for all tests of the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.report.page import Report, write_report
from lm_eval_steering.report.read import read_results
from lm_eval_steering.report.tables import Results, compute
from tests.report.synthetic import write_sweep

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("runs") / "made-up")


@pytest.fixture(scope="session")
def results(sweep_folder: Path) -> Results:
    return compute(read_results(sweep_folder))


@pytest.fixture(scope="session")
def report(sweep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    command = ["lm-eval-steering", "report", "runs/made-up", "--out", "report"]
    return write_report(read_results(sweep_folder), tmp_path_factory.mktemp("report"), command)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install -e .[dev])"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
