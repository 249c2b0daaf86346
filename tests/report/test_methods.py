"""The methods paragraph says what was run, cites what it uses, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lm_eval_steering.report.methods import methods, references
from lm_eval_steering.report.page import Report
from lm_eval_steering.report.tables import Results

NEURON_SET = {
    "layers": 6, "units": 1024, "languages": ["deu_Latn", "fra_Latn"],
    "selection": {"method": "lape", "rate": 0.05, "filter_rate": 0.95, "bar_rate": 0.95},
    "corpus": {
        "source": "corpus", "tokens": {"deu_Latn": 2536, "fra_Latn": 2623},
        "calibration": {"sentences": {"deu_Latn": 100, "fra_Latn": 100}},
    },
}  # fmt: skip


@pytest.fixture
def configured(results: Results) -> Results:
    results.sweep.facts.config = {
        "model_dtype": "torch.bfloat16", "model_sha": "abc123",
        "steering": {
            "neuron_set": NEURON_SET, "versions": {"lm-eval": "0.4.13", "transformers": "5.23.0"},
            "language_identifier": "lid.176.ftz@8f3472cf",
        },
    }  # fmt: skip
    return results


def test_it_says_model_neurons_interventions_and_tasks(configured: Results) -> None:
    text = methods(configured).plain
    for fact in ("abc123", "bfloat16", "lm-evaluation-harness 0.4.13", "transformers 5.23.0", "6 layers of 1,024 units",
                 "LAPE (Tang et al., 2024)", "rate 0.05", "2,536 to 2,623 tokens", "100 sentences"):  # fmt: skip
        assert fact in text, fact
    cells = configured.sweep.steered_cells()
    for factor in cells["factor"].dropna().unique():
        assert re.search(rf"\b{factor:g}\b", text)
    for family, rows in configured.effects.frame.groupby("family"):
        assert f"{family} (n = {int(rows['n'].max())})" in text


def test_what_is_done_to_hidden_states_is_said(configured: Results) -> None:
    assert "hidden states" not in methods(configured).text
    cells = configured.sweep.cells
    steered = ~cells["is_baseline"]
    cells.loc[steered, "kind"] = "clas_diffmean at residual, from eng_Latn, layers 14"
    corpus = NEURON_SET["corpus"] | {"residual": {"sentences": {"deu_Latn": 90, "fra_Latn": 100}}}
    configured.sweep.facts.config["steering"]["neuron_set"] = NEURON_SET | {"corpus": corpus}
    text = methods(configured).text
    assert "activations of language-specific neurons" not in text and "on the neurons of" not in text
    assert "random neuron set" not in text
    for fact in ("change no neurons but the hidden states", "90 to 100 sentences", "[@gurgurov-etal-2026-clas]"):
        assert fact in text, fact
    assert ("random directions of the same norm" in text) == bool(cells.loc[steered, "control"].notna().any())


def test_what_is_not_known_is_left_out(results: Results) -> None:
    results.sweep.facts.config = {}
    text = methods(results).plain
    assert "LAPE" not in text and "revision" not in text and "nan" not in text and "None" not in text


def test_it_cites_exactly_its_references(configured: Results) -> None:
    paragraph = methods(configured)
    cited = set(re.findall(r"\[@([\w-]+)\]", paragraph.text))
    assert cited == set(re.findall(r"^@\w+\{([\w-]+),", paragraph.bibtex, re.MULTILINE)) > {"tang-etal-2024-language"}
    assert cited <= references().keys()
    assert set(re.findall(r"\\citep\{([\w-]+)\}", paragraph.latex)) == cited


def test_tests_that_were_not_run_are_not_named(configured: Results) -> None:
    text, tests = methods(configured).plain, set(configured.effects.frame["test"])
    assert ("McNemar" in text) == ("exact McNemar" in tests)
    assert ("paired bootstrap of sacreBLEU" in text) == ("sacreBLEU paired bootstrap" in tests)


def test_it_is_on_the_page_and_in_files(report: Report) -> None:
    folder = report.page.parent / "methods"
    assert {path.name for path in folder.iterdir()} == {"methods.md", "methods.tex", "references.bib"}
    assert "Methods, for a paper" in report.page.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex (apt-get install texlive-latex-recommended)")
def test_the_latex_compiles(configured: Results, tmp_path: Path) -> None:
    methods(configured).write(tmp_path)
    page = "\\documentclass{article}\\usepackage{natbib}\\begin{document}\\input{methods}\\bibliographystyle{plainnat}"
    (tmp_path / "page.tex").write_text(page + "\\bibliography{references}\\end{document}", encoding="utf-8")
    for command in (["pdflatex", "-halt-on-error", "page"], ["bibtex", "page"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
