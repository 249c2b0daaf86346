"""What must not go wrong in silence: an edited plan, edited data, languages without documents, counts and names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.report.read import read_results
from lm_eval_steering.resources import demo_calibration, demo_model
from lm_eval_steering.sweep.cells import Cell, Grid
from lm_eval_steering.sweep.choice import check_choice
from lm_eval_steering.sweep.halves import half_of
from lm_eval_steering.sweep.merge import merge
from lm_eval_steering.sweep.store import Store
from tests.lmeval.task_families.items import BELEBELE, INCLUDE, write
from tests.sweep.conftest import ITEMS, PLAIN, Spell, run

NATS: dict[str, Any] = {"tasks": ["small_nats"], "then": {"tasks": ["small_choice"]}}

# --- an edited plan ---------------------------------------------------------------------------------------------------


def choose_with(seed: int) -> dict[str, Any]:
    return NATS | {"choose": {"metric": "nats_per_token", "seed": seed}}


def nats_of(samples: Sequence[Any], seed: int, half: str) -> float:
    own = [sample["nats_per_token"] for sample in samples if half_of(str(sample["doc"]["id"]), seed) == half]
    return -sum(nats for nats, _ in own) / sum(tokens for _, tokens in own)


def test_another_split_of_the_same_cells_is_computed_anew(spell: Spell, tmp_path: Path) -> None:
    assert run(spell(PLAIN, **NATS | {"then": None}), tmp_path).ran == 3
    assert Store(tmp_path).frame().value_choose.isna().all()
    for seed in (2, 5):  # which do not agree on any half
        grid = spell(PLAIN, **choose_with(seed))
        outcome = run(grid, tmp_path)
        assert (outcome.exit_code, outcome.ran) == (0, 2)  # the second stage alone
        store = Store(tmp_path)
        choice, frame, items = store.json("then/deu_Latn.json"), store.frame(), store.items()
        read = read_results(tmp_path).items
        assert choice["seed"] == seed and len(choice["values"]) == 2
        for cell in grid.cells:
            samples = store.samples(cell)
            row = frame[(frame.cell == cell.name) & (frame.metric == "nats_per_token")].iloc[0]
            for half in ("choose", "report"):
                assert row[f"value_{half}"] == pytest.approx(nats_of(samples, seed, half), rel=1e-12)
            assert row.n_choose + row.n_report == row.n == ITEMS
            if not cell.intervention.is_baseline:
                assert choice["values"][cell.intervention.name] == row.value_choose
            halves = items[items.cell == cell.name].set_index("item").half
            assert dict(halves) == {item: half_of(item, seed) for item in halves.index}
            reported = read[cell.name].reported
            assert reported is not None and list(reported) == [half == "report" for half in halves]


def test_a_task_that_is_not_chosen_on_needs_no_item(spell: Spell, tmp_path: Path, task_files: Path) -> None:
    own = tmp_path / "tasks"
    shutil.copytree(task_files, own)
    nameless = own / "functions.py"
    nameless.write_text(
        nameless.read_text() + "\ndef nameless(**settings):\n"
        '    return {"test": few(demo.perplexity_documents(**settings))["test"].remove_columns("id")}\n'
    )
    text = (
        (own / "small_nats.yaml").read_text().replace("small_nats", "nameless").replace(".perplexity\n", ".nameless\n")
    )
    (own / "nameless.yaml").write_text(text)
    plan = choose_with(2) | {"tasks": ["small_nats", "nameless"], "include_path": [str(own)]}
    with pytest.raises(SteeringError, match="nameless: its documents have no id"):
        check_choice(spell(PLAIN, **plan))
    grid = spell(PLAIN, **plan | {"choose": plan["choose"] | {"tasks": ["small_nats"]}})
    assert run(grid, tmp_path / "run").exit_code == 0
    store = Store(tmp_path / "run")
    frame, items = store.frame(), store.items()
    assert frame[frame.task == "nameless"].value_report.isna().all()
    assert frame[(frame.task == "small_nats") & (frame.metric == "nats_per_token")].value_report.notna().all()
    assert items[items.task == "nameless"].half.isna().all()
    cell = next(cell.name for cell in grid.cells if cell.task == "nameless")
    assert read_results(tmp_path / "run").items[cell].reported is None


# --- what a cell's key knows ------------------------------------------------------------------------------------------


def keys(grid: Grid) -> set[str]:
    return {cell.key for cell in grid.cells}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("small_choice.yaml", "tag: small", "tag: small\ntarget_delimiter: ' '"),
        ("functions.py", f"range({ITEMS})", f"range({ITEMS - 1})"),
        ("functions.py", "def few", "# scored otherwise\ndef few"),
    ],
)
def test_an_edited_task_is_another_one_and_a_moved_one_is_the_same(
    spell: Spell, task_files: Path, tmp_path: Path, file: str, old: str, new: str
) -> None:
    before, own = keys(spell(PLAIN)), tmp_path / "moved"
    shutil.copytree(task_files, own)
    assert keys(spell(PLAIN, include_path=[str(own)])) == before
    edited = own / file
    edited.write_text(edited.read_text().replace(old, new))
    assert not keys(spell(PLAIN, include_path=[str(own)])) & before


def test_edited_data_make_other_cells(spell: Spell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERING_DATA", str(tmp_path))
    plan = {"tasks": ["steering_include_lite_44_fra_Latn"]}
    write(tmp_path, "include_lite_44", INCLUDE)
    before = keys(spell(PLAIN, **plan))
    assert keys(spell(PLAIN, **plan)) == before
    other = {code: [row | {"option_a": "?"} for row in rows] for code, rows in INCLUDE.items()}
    write(tmp_path, "include_lite_44", other)
    assert not keys(spell(PLAIN, **plan)) & before


def test_an_edited_calibration_text_makes_other_controls(spell: Spell, tmp_path: Path) -> None:
    def made(text: Path) -> dict[bool, set[str]]:
        grid = spell(PLAIN, controls={"random": 1, "calibration": str(text), "sentences": 8})
        return {
            control: {cell.key for cell in grid.cells if (cell.intervention.control is None) != control}
            for control in (True, False)
        }

    texts = [Path(shutil.copytree(demo_calibration(), tmp_path / name)) for name in ("one", "two")]
    before = made(texts[0])
    assert made(texts[1]) == before
    edited = sorted(path for path in texts[1].rglob("*") if path.is_file())[0]
    edited.write_text(edited.read_text() + "\nEine Zeile mehr.\n")
    after = made(texts[1])
    assert after[False] == before[False] and not after[True] & before[True]


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "spiece.model", "modeling_own.py"])
def test_what_lies_beside_the_weights_is_part_of_the_model(spell: Spell, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(demo_model(), tmp_path / "model"))
    before = spell(PLAIN, model={"pretrained": str(folder)}).model
    (folder / name).write_text("a")
    assert spell(PLAIN, model={"pretrained": str(folder)}).model != before


# --- languages without documents --------------------------------------------------------------------------------------


@pytest.fixture
def parallel(tmp_path: Path) -> dict[str, Any]:
    for code, text in (("eng_Latn", "one bridge and {} ships"), ("deu_Latn", "eine Brücke und {} Schiffe")):
        (tmp_path / f"{code}.txt").write_text("".join(text.format(number) + "\n" for number in range(8)))
    return {
        "tasks": ["steering_lss_eng_Latn"], "languages": ["eng_Latn", "deu_Latn"], "choose": {"metric": "lss"},
        "metadata": {"parallel": str(tmp_path / "{lang}.txt")},
    }  # fmt: skip


def test_lss_towards_its_own_base_is_left_out_and_the_plan_can_be_split(spell: Spell, parallel: dict[str, Any]) -> None:
    grid = spell(PLAIN, **parallel)
    check_choice(grid)
    assert {cell.target for cell in grid.cells} == {"deu_Latn"}
    assert "left out: steering_lss_eng_Latn steered to eng_Latn: it is not defined for that language" in grid.notes


def test_missing_data_are_not_taken_for_a_language_without_documents(
    spell: Spell, parallel: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "deu_Latn.txt").unlink()
    with pytest.raises(SteeringError, match="no file for deu_Latn"):
        spell(PLAIN, **parallel)
    with pytest.raises(SteeringError, match="no rows for flores"):
        spell(PLAIN, **parallel | {"metadata": {}})


QUESTIONS = [BELEBELE | {"link": f"en.wikinews.org/{page}", "question_number": 1} for page in range(8)]
RELATIONS = [{"premise": f"There are {n} ships.", "hypothesis": "There is one.", "label": n % 3} for n in range(8)]
GAPS = [{"sentence": f"Ann told Eve {n} times that _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"}
        for n in range(8)]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "split", "rows", "tasks"),
    [
        ("belebele", "test", {"eng_Latn": QUESTIONS, "deu_Latn": QUESTIONS[::-1]}, ("eng_Latn", "deu_Latn")),
        ("xnli", "validation", {"eng_Latn": RELATIONS, "deu_Latn": RELATIONS}, ("eng_Latn", "deu_Latn_gurgurov")),
        ("xwinograd", "test", {"eng_Latn": GAPS}, ("eng_Latn", "eng_Latn_natural")),
        ("include_lite_44", "test", INCLUDE, ("fra_Latn", "fra_Latn_rahmanisa")),
    ],
    ids=["belebele", "xnli", "xwinograd", "include"],
)
def test_items_have_one_name_in_all_tasks_of_a_data_set_and_can_be_split(
    spell: Spell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, split: str, rows: dict[str, Any],
    tasks: tuple[str, str],
) -> None:  # fmt: skip
    monkeypatch.setenv("STEERING_DATA", str(tmp_path))
    write(tmp_path, family, rows, split)
    names = [f"steering_{family}_{task}" for task in tasks]
    grid = spell(PLAIN, tasks=names, choose={"metric": "acc", "seed": 1})
    check_choice(grid)
    first, second = ([document["id"] for document in grid.book.task(name, None).eval_docs] for name in names)
    assert set(first) == set(second) and len(set(first)) == len(first) > 4


# --- counts, names, and lines -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(spell: Spell, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Path]:
    """A metric that some documents have, text with odd separators, a control, and a task that cannot be written."""
    out = tmp_path_factory.mktemp("odd") / "run"
    grid = spell(
        PLAIN, tasks=["small_unwritable", "small_partial"], interventions=[{"op": "scale", "factor": 2}],
        controls={"random": 1}, force=True,
    )  # fmt: skip
    outcome = run(grid, out)
    assert (outcome.exit_code, outcome.ran) == (1, 3)
    return grid, out


def test_a_cell_that_cannot_be_written_is_noted_and_the_others_go_on(odd: tuple[Grid, Path]) -> None:
    missing = Store(odd[1]).missing()
    assert set(missing.task) == {"small_unwritable"} and set(missing.status) == {"failed"}
    assert "it is evaluated and cannot be written: TypeError" in missing.why[0]


def test_each_metric_counts_the_items_that_have_it(odd: tuple[Grid, Path]) -> None:
    frame = Store(odd[1]).frame()
    assert {(row.metric, row.n) for row in frame.itertuples()} == {("even", 4), ("odd", 3)}


def test_text_with_separators_of_lines_can_be_read(odd: tuple[Grid, Path]) -> None:
    store = Store(odd[1])
    cell = next(cell for cell in odd[0].cells if cell.task == "small_partial")
    assert [sample["doc"]["text"][-4:] for sample in store.samples(cell)] == ["\u2028\u2029\u0085."] * ITEMS
    (results,) = (odd[1] / "cells" / cell.name).glob("results_*.json")
    assert len(read_results(results).items[f"{results.stem}--small_partial"].docs) == ITEMS


def test_the_results_of_a_control_say_that_it_is_one(odd: tuple[Grid, Path]) -> None:
    def arguments(cell: Cell) -> dict[str, Any]:
        (results,) = (odd[1] / "cells" / cell.name).glob("results_*.json")
        return dict(json.loads(results.read_text())["config"]["model_args"])

    found = {cell.intervention.name: arguments(cell) for cell in odd[0].cells if cell.task == "small_partial"}
    assert found["deu_Latn-scale-x2"]["neurons"] == "demo" and "neurons" not in found["baseline"]
    assert found["deu_Latn-scale-x2-random0"]["neurons"].startswith("random0:")
    assert [name for name, own in found.items() if own.get("force")] == [name for name in found if name != "baseline"]


def test_the_value_of_a_step_stands_beside_that_of_the_metric(finished: Path) -> None:
    frame = Store(finished).frame()
    assert set(frame[frame.intervention != "baseline"].step_value) == {"mean"}
    assert frame.value.dtype == float


def test_folders_that_differ_in_text_alone_are_told(finished: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    path = sorted(other.glob("cells/*small_forcing*/cell.json"))[0]
    facts = json.loads(path.read_text())
    assert isinstance(facts["metrics"]["output_language,none"], str)
    facts["metrics"]["output_language,none"] = "tlh_Latn: 7"
    path.write_text(json.dumps(facts))
    _, notes = merge([finished, other], tmp_path / "tables")
    assert notes[1].startswith(f"1 of them differ between folders, such as {path.parent.name} output_language")
