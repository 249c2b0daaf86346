"""Tables against what was written down by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lm_eval_steering.report import tables
from lm_eval_steering.report.comparison import compare_interventions, compare_runs
from lm_eval_steering.report.conclusions import answer
from lm_eval_steering.report.figures import draw, gallery
from lm_eval_steering.report.naming import families, kind_of, silenced
from lm_eval_steering.report.page import Report, render
from lm_eval_steering.report.read import ReportError, add_baseline, read_results
from lm_eval_steering.report.table_files import latex, markdown
from lm_eval_steering.report.tables import Results, compute
from lm_eval_steering.sweep.merge import merge
from tests.report.synthetic import FolderOfCells, right, write_sweep

NAN = float("nan")


def test_self_and_cross_equal_the_table_made_by_hand(results: Results) -> None:
    found = results.summary[results.summary["metric"] == "acc"].set_index("factor")
    columns = ["self_cells", "self_missing", "self_n", "self_score", "self_difference", "self_improved", "cross_cells",
               "cross_missing", "cross_n", "cross_score", "cross_difference", "cross_improved", "gap"]  # fmt: skip
    by_hand = pd.DataFrame(
        [[3, 0, 120, 0.7, 0.2, 3, 6, 0, 240, 0.4, -0.1, 0, 0.3], [3, 0, 120, 0.6, 0.1, 3, 5, 1, 200, 0.2, -0.3, 0, 0.4]],  # noqa: E501
        index=pd.Index([2.0, 4.0], name="factor"), columns=columns,
    )  # fmt: skip
    pd.testing.assert_frame_equal(found[columns], by_hand, check_dtype=False)


def test_a_missing_cell_is_blank(results: Results) -> None:
    found = tables.matrix(results.effects, "xcopa", "acc", "scale", 4, "difference")
    assert np.isnan(found.loc["deu_Latn", "tha_Thai"])
    assert found.notna().to_numpy().sum() == 8
    assert found.loc["fra_Latn", "fra_Latn"] == pytest.approx(0.1)


def test_every_row_says_n_and_its_family_of_comparisons(results: Results) -> None:
    own = results.effects.frame[results.effects.frame["metric"] == "acc"]
    assert set(own["n"]) == {40}
    assert set(own["comparisons"]) == {17}
    assert (own["p_holm"] >= own["p"]).all()
    assert set(own["test"]) == {"exact McNemar"}


def test_the_baselines_lfs_is_counted_for_each_language_from_its_labels(results: Results) -> None:
    own = results.effects.frame[results.effects.frame["metric"] == "lfs"].set_index(["steered", "factor"])
    assert own.loc[("fra_Latn", 2.0), "baseline"] == pytest.approx(6 / 60)
    assert own.loc[("deu_Latn", 2.0), "baseline"] == 0
    assert own.loc[("deu_Latn", 4.0), "score"] == pytest.approx(40 / 60)


def test_perplexity_is_a_ratio_of_sums_and_its_interval_is_about_it(results: Results) -> None:
    own = results.effects.frame[results.effects.frame["metric"] == "nats_per_token"]
    assert own.loc[own["factor"] == 4, "difference"].to_numpy() == pytest.approx(0.4)
    assert (own["low"] <= own["difference"] + 1e-6).all() and (own["difference"] <= own["high"] + 1e-6).all()


def test_few_controls_give_a_range_and_no_deviations(results: Results) -> None:
    own = results.controls[(results.controls["metric"] == "lfs") & (results.controls["factor"] == 4)]
    assert own["sets"].tolist() == [2, 2, 2]
    assert own["lowest"].tolist() == [0.0] * 3 and own["highest"].to_numpy() == pytest.approx(1 / 60)
    assert own["difference"].to_numpy() == pytest.approx(40 / 60 - 0.5 / 60)
    assert own["deviations"].isna().all()


def test_five_controls_give_deviations(tmp_path: Path) -> None:
    made = FolderOfCells(tmp_path / "sweep")
    made.add("made_up", {"lfs": right(0.0)})
    made.add("made_up", {"lfs": right(0.9)}, "deu_Latn", 2)
    for control, share in enumerate((0.1, 0.2, 0.3, 0.4, 0.5)):
        made.add("made_up", {"lfs": right(share)}, "deu_Latn", 2, control)
    (row,) = compute(read_results(tmp_path / "sweep")).controls.to_dict("records")
    assert row["deviations"] == pytest.approx(0.6 / np.std([0.1, 0.2, 0.3, 0.4, 0.5], ddof=1))
    assert row["at_or_above"] == 0


def test_the_best_factor_is_chosen_and_reported_on_different_items(results: Results) -> None:
    own = results.best[results.best["metric"] == "acc"]
    assert own["factor"].tolist() == [2.0, 2.0, 2.0]
    assert set(own["on"]) == {"self"}
    assert (own["n"] + own["n_choose"] == 40).all()


def test_damage_is_in_the_row_of_success(results: Results) -> None:
    own = results.damage.set_index(["steered", "factor"]).loc[("deu_Latn", 4.0)]
    assert own["success"] == pytest.approx(40 / 60)
    assert own["perplexity_self"] == pytest.approx(0.4)
    assert own["n_texts"] == 30


def test_factors_are_compared_over_the_tasks_that_all_of_them_have(tmp_path: Path) -> None:
    """What only the chosen factor was run on in the second stage does not enter its success and damage."""
    made = FolderOfCells(tmp_path / "sweep")
    for factor, stage, task, share in ((0, 1, "asked", 0), (2, 1, "asked", 0.5), (4, 1, "asked", 0.75),
                                       (0, 2, "other", 0), (4, 2, "other", 0.25)):  # fmt: skip
        steered = "deu_Latn" if factor else ""
        made.add(task, {"lfs": right(share)}, steered, factor, target="deu_Latn", stage=stage)
    found = compute(read_results(tmp_path / "sweep")).damage.set_index("factor")
    assert found["success"].to_dict() == {2.0: 0.5, 4.0: 0.75}
    assert found["n_outputs"].to_dict() == {2.0: 40, 4.0: 40}


def test_merged_tables_give_the_same_effects(sweep_folder: Path, results: Results, tmp_path: Path) -> None:
    merge([sweep_folder], tmp_path, items=True)
    merged = compute(read_results(tmp_path)).effects.frame
    own = results.effects.frame
    own = own[own["metric"] != "degenerate"]  # seen from the text of the samples
    key = ["cell", "metric"]
    ordered = [frame.sort_values(key, ignore_index=True) for frame in (own, merged[merged["metric"] != "degenerate"])]
    pd.testing.assert_frame_equal(*ordered)


def test_other_documents_than_the_baselines_are_refused(tmp_path: Path) -> None:
    made = FolderOfCells(tmp_path / "sweep")
    made.add("made_up", {"acc": right(0.5)})
    made.add("made_up", {"acc": right(0.6)}, "deu_Latn", 2, documents="others")
    with pytest.raises(ReportError, match="made_up: 40 of 40 documents differ"):
        compute(read_results(tmp_path / "sweep"))


def test_a_cell_without_a_baseline_has_a_score_and_no_difference(tmp_path: Path) -> None:
    made = FolderOfCells(tmp_path / "sweep")
    made.add("made_up", {"acc": right(0.6)}, "deu_Latn", 2)
    found = compute(read_results(tmp_path / "sweep"))
    (row,) = found.effects.frame.to_dict("records")
    assert row["score"] == 0.6 and np.isnan(row["difference"]) and np.isnan(row["p"])
    assert "1 steered cells have no finished baseline" in found.sweep.facts.notes[0]


def test_lss_has_no_baseline_by_definition_and_none_is_missed(tmp_path: Path) -> None:
    made = FolderOfCells(tmp_path / "sweep")
    made.add("made_up_lss", {"lss": right(0.6)}, "deu_Latn", 2)
    found = compute(read_results(tmp_path / "sweep"))
    assert found.sweep.facts.notes == []
    verdict = answer(found).sentences[0]
    assert "LSS is 0.6" in verdict and "improved" not in verdict


def test_a_plain_lm_eval_run_is_a_baseline(tmp_path: Path) -> None:
    made = FolderOfCells(tmp_path / "sweep")
    made.add("made_up", {"acc": right(0.6)}, "deu_Latn", 2)
    plain = FolderOfCells(tmp_path / "plain")
    name = plain.add("made_up", {"acc": right(0.5)})
    sweep = read_results(tmp_path / "sweep")
    add_baseline(sweep, next((tmp_path / "plain" / "cells" / name).glob("results_*.json")))
    (row,) = compute(sweep).effects.frame.to_dict("records")
    assert row["difference"] == pytest.approx(0.1) and row["n"] == 40


def test_two_runs_and_two_interventions_are_compared_cell_by_cell(tmp_path: Path, sweep_folder: Path) -> None:
    made = FolderOfCells(tmp_path / "sweep")
    made.add("made_up", {"acc": right(0.5)})
    made.add("made_up", {"acc": right(0.6)}, "deu_Latn", 2)
    made.add("made_up", {"acc": right(0.9)}, "deu_Latn", 2, op="set")
    sweep = read_results(tmp_path / "sweep")
    (row,) = compute(compare_interventions(sweep, ["scale", "set 1"])).effects.frame.to_dict("records")
    assert row["baseline"] == 0.6 and row["difference"] == pytest.approx(0.3)
    other = read_results(write_sweep(tmp_path / "again"))
    same = compute(compare_runs(read_results(sweep_folder), other)).effects.frame
    assert (same["difference"] == 0).all() and (same["p"] == 1).all() and len(same)
    with pytest.raises(ReportError, match="no cell in common"):
        compare_runs(sweep, other)
    with pytest.raises(ReportError, match="did you mean 'scale'"):
        compare_interventions(sweep, ["scal", "set 1"])


def test_names_of_interventions_and_families() -> None:
    assert kind_of("op:add|value:mean|factor:4|lang:fra_Latn|site:product|layers:0-3", None, "") == (
        "add mean at product, layers 0-3"
    )
    assert kind_of("op:set|value:max|factor:1|lang:fra_Latn|site:activation|layers:all", "p_max", "others") == (
        "p_max, others silenced"
    )
    assert kind_of("op:add|value:diffmean|factor:2|lang:fra_Latn|site:residual|dims:400|layers:14", None, "") == (
        "add diffmean at residual, 400 dimensions, layer 14"
    )
    clas = "op:add|value:clas_diffmean|factor:5|lang:fra_Latn|source:eng_Latn|site:residual|layers:14"
    assert kind_of(clas, "clas_diffmean", "") == "clas_diffmean at residual, from eng_Latn, layer 14"
    assert silenced(["deu", "fra"], ["fra+ita", "deu+ita"]) == ["others", "others"]
    assert silenced(["deu", "fra"], ["ita", "ita"]) == ["ita", "ita"]
    assert set(families(["xcopa_it", "xcopa_id", "steering_xcopa_ita_Latn"]).values()) != {""}
    assert families(["steering_xnli_deu_Latn"]) == {"steering_xnli_deu_Latn": "xnli"}


def test_all_formats_are_written(report: Report) -> None:
    suffixes = {path.suffix for path in report.files}
    assert suffixes == {".html", ".svg", ".pdf", ".bib", ".png", ".csv", ".parquet", ".md", ".tex"}
    csv, parquet = (
        next(path for path in report.files if path.name == f"effects.{kind}") for kind in ("csv", "parquet")
    )
    assert len(pd.read_csv(csv)) == len(pd.read_parquet(parquet)) == len(report.results.effects.frame)


def test_markdown_and_latex_keep_odd_letters() -> None:
    frame = pd.DataFrame({"a|b": ["50% & _x_ {y} \\ ~ ^ # $"]})
    assert "a\\|b" in markdown(frame, "caption")
    text = latex(frame, "100 %", "t")
    assert r"50\% \& \_x\_ \{y\} \textbackslash \space \textasciitilde \space \textasciicircum \space \# \$" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex (apt-get install texlive-latex-recommended)")
def test_latex_compiles(report: Report, tmp_path: Path) -> None:
    found = sorted(path for path in report.files if path.suffix == ".tex")
    (tmp_path / "odd.tex").write_text(latex(pd.DataFrame({"50% & _x_": [r"{y} \ ~ ^ # $ ×"]}), "100 %", "odd"))
    inputs = "\n".join(rf"\input{{{path}}}" for path in [*found, tmp_path / "odd.tex"])
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage[utf8]{inputenc}\\usepackage{booktabs,graphicx}\n"
        f"\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert len(found) >= 4 and (tmp_path / "paper.pdf").stat().st_size > 0


def test_the_same_sweep_gives_the_same_figures_and_page(results: Results, tmp_path: Path) -> None:
    pictures = gallery(results)[:1]
    figured = [draw(pictures, tmp_path / name) for name in ("first", "second")]
    assert figured[0][0] == figured[1][0]
    for first, second in zip(figured[0][1], figured[1][1], strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert render(results, figured[0][0]) == render(results, figured[1][0])


def test_the_answer_has_numbers_and_their_n(report: Report) -> None:
    helps, others, chance = report.sentences
    reported = report.results.best[report.results.best["metric"] == "lfs_clean"]
    before, after = reported["baseline"].mean(), reported["score"].mean()
    assert helps.startswith("Helps at this price: with scale at ×4 (German, French and Thai)")
    assert f"went from {before:.3g} to {after:.3g}" in helps and f"n = {reported['n'].sum()} items" in helps
    assert "degenerate outputs +0 points" in helps and "+0.4 (German); not measured for French and Thai" in helps
    assert "+0.4 (French) and +0.4 (Thai); not measured for German" in others
    assert "2 random sets, too few to exclude chance" in chance


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds neither sweep\.json"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps([]))
    with pytest.raises(ReportError, match="not a results file of lm-eval"):
        read_results(tmp_path / "results.json")
