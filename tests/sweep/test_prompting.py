"""Prompting in a sweep: its cells, its controls, its one point and damage, and the report that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.languages import english_name
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.report.page import write_report
from lm_eval_steering.report.read import read_results
from lm_eval_steering.report.table_files import printed
from lm_eval_steering.resources import find_neuron_set
from lm_eval_steering.sweep.damage import bound
from lm_eval_steering.sweep.damage_text import TASK
from lm_eval_steering.sweep.plan import PlanError, build_plan
from lm_eval_steering.sweep.status import describe
from lm_eval_steering.sweep.store import Store
from tests.sweep.conftest import PLAIN, PLAN, Spell, run

ASK: dict[str, Any] = {"prompt": {"instruction": "Answer in {language}."}}
PROMPTS: dict[str, Any] = PLAIN | {
    "languages": ["deu_Latn", "tur_Latn"],
    "interventions": [ASK, {"op": "scale", "factors": {"damage": [0.1]}}, {"prompt": {"instruction": ""}}],
    "controls": {"random": 2, "calibration": None},
    "damage": {"sentences": 12},
    "tasks": ["small_lss", "small_forcing", "small_nats", "small_choice"],
}


@pytest.fixture(scope="module")
def prompted(spell: Spell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prompted") / "run"
    assert run(spell(PROMPTS), out).exit_code == 0
    return out


def test_the_cells_say_what_was_sent_and_that_it_was(prompted: Path) -> None:
    store = Store(prompted)
    own, controls = {}, {}
    for stored in store.stored():
        planned, report = stored.cell["intervention"], stored.results["config"]["steering"]
        if "instruction" not in planned["arguments"]:
            assert "prompt" not in report["intervention"]
            continue
        prompt, samples = report["intervention"]["prompt"], store.samples(stored.cell["name"])
        assert report["evidence"]["prompts"] == sum(len(sample["arguments"]) for sample in samples) > 0
        assert not any(prompt["instruction"] in json.dumps(sample, ensure_ascii=False) for sample in samples)
        assert report["target_languages"] == planned["languages"]
        assert stored.facts["signature"].startswith(f'prompt:"{prompt["instruction"]}"|lang:{prompt["language"]}|')
        (language,) = planned["languages"]
        assert (prompt["language"] == language) == (planned["control"] is None)
        (own if planned["control"] is None else controls)[language, planned["control"]] = prompt["instruction"]
    assert own == {("deu_Latn", None): "Answer in German.", ("tur_Latn", None): "Answer in Turkish."}
    # The next languages of the plan, then those of the neuron set.
    (third, *_) = [
        code for code in NeuronSet.load(find_neuron_set("demo")).languages if code not in ("deu_Latn", "tur_Latn")
    ]
    named = f"Answer in {english_name(third)}."
    assert (controls["deu_Latn", 0], controls["deu_Latn", 1]) == ("Answer in Turkish.", named)
    assert (controls["tur_Latn", 0], controls["tur_Latn", 1]) == ("Answer in German.", named)
    assert set(controls) == {(code, number) for code in ("deu_Latn", "tur_Latn") for number in (0, 1)}


def test_prompts_pair_with_those_of_the_baseline(prompted: Path) -> None:
    store, prompts = Store(prompted), {}
    for stored in store.stored():
        cell = stored.cell
        if cell["stage"] == 1:
            place = (cell["task"], cell["target"] if cell["task"] in ("small_lss", "small_forcing") else None)
            prompts.setdefault(place, set()).add(stored.facts["prompts"])
    assert len(prompts) == 6 and all(len(hashes) == 1 for hashes in prompts.values())


def test_its_damage_is_the_rise_given_the_instruction(prompted: Path) -> None:
    frame = Store(prompted).frame()
    nats = frame[(frame.task == TASK) & (frame.metric == "nats_per_token")]
    base = nats[nats.intervention == "baseline"].set_index("target").value
    for code in ("deu_Latn", "tur_Latn"):
        (measured,) = nats[nats.intervention == f"{code}-prompt"].value
        own = frame[(frame.intervention == f"{code}-prompt") & (frame.stage == 1)]
        assert own.damage_reached.nunique() == 1 and own.damage_asked.isna().all() and own.factor.isna().all()
        assert own.damage_reached.iloc[0] == pytest.approx(measured - base[code], abs=1e-12) != 0
        found = json.loads((prompted / "factors" / f"0-{code}-prompt.json").read_text())
        assert found["targets"] == [] and len(found["evaluations"]) == 1


def test_an_empty_instruction_is_the_baseline_and_is_not_run(spell: Spell, tmp_path: Path) -> None:
    grid = spell(PROMPTS)
    assert "deu_Latn-prompt changes nothing: it is the baseline" in grid.notes
    assert not [cell for cell in grid.cells if cell.intervention.arguments.get("instruction") == ""]
    # 12 for each search, one for each instruction, the unsteered model for each language.
    assert bound(grid) == 2 * 12 + 2 + 2
    text = describe(grid, tmp_path / "none")
    assert "and 4 random controls, 4 instructions that name another language, on 4 tasks" in text


def test_a_cell_does_not_know_the_neuron_set_and_knows_the_instruction(spell: Spell, tmp_path: Path) -> None:
    plan = PLAIN | {"interventions": [ASK], "controls": {"random": 0}}
    other = (
        NeuronSet.load(find_neuron_set("demo")).save(tmp_path / "other.safetensors") or tmp_path / "other.safetensors"
    )
    keys = {cell.key for cell in spell(plan).cells}
    assert keys == {cell.key for cell in spell(plan, neurons=str(other)).cells} and len(keys) == 2
    for change in ({"instruction": "Write in {language}."}, {"names": "native"}):
        changed = {"prompt": ASK["prompt"] | change}
        assert len(keys & {cell.key for cell in spell(plan, interventions=[changed]).cells}) == 1  # the baseline's


def test_a_job_reads_the_plan_that_it_was_given_as_plain_data(spell: Spell) -> None:
    plan = spell(PROMPTS).plan
    assert build_plan(json.loads(json.dumps(plan.model_dump(mode="json")))) == plan


def test_it_can_be_chosen_and_goes_on_with_its_controls(spell: Spell, tmp_path: Path) -> None:
    plan = PLAIN | {
        "interventions": [ASK], "tasks": ["small_lss"], "choose": PLAN["choose"], "then": {"tasks": ["small_nats"]},
        "controls": {"random": 1},
    }  # fmt: skip
    assert run(spell(plan), tmp_path / "run").exit_code == 0
    (choice,) = [json.loads(path.read_text()) for path in (tmp_path / "run" / "then").glob("*.json")]
    names = {cell["intervention"]["name"] for cell in choice["cells"]}
    (control,) = names - {"baseline", "deu_Latn-prompt"}
    assert choice["chosen"] == "deu_Latn-prompt" and control.startswith("deu_Latn-prompt-naming-")


def test_the_report_shows_it_at_its_own_damage_and_names_its_controls(prompted: Path, tmp_path: Path) -> None:
    report = write_report(read_results(prompted), tmp_path / "report", ["report"])
    results = report.results
    kind = 'prompt "Answer in {language}."'
    assert set(results.sweep.steered_cells()["kind"]) == {kind, "scale"}
    lss = results.controls[(results.controls["kind"] == kind) & (results.controls["metric"] == "lss")]
    assert list(lss["sets"]) == [2, 2]
    equal = results.equal[(results.equal["kind"] == kind) & (results.equal["metric"] == "lfs_clean")]
    assert len(equal) == 1 and equal["damage"].isna().all() and equal["sets_at_factor"].iloc[0] == 2
    damage = results.damage[results.damage["kind"] == kind].set_index("steered")
    assert damage["perplexity_self"]["tur_Latn"] == pytest.approx(
        results.sweep.cells.loc[results.sweep.cells["steered"] == "tur_Latn", "damage_reached"].dropna().iloc[0]
    )
    texts = " ".join(report.sentences)
    assert "At its own damage" in texts and "naming other languages" in texts
    assert "2 other languages that each instruction names instead" in report.page.read_text()
    tables = "\n".join(frame.to_csv() for name, (frame, _) in printed(results).items() if name.startswith("equal"))
    assert "2 other languages named" in tables
    methods = (tmp_path / "report" / "methods" / "methods.md").read_text()
    assert f"in front of every prompt: {kind}." in methods and "named 2 other languages instead" in methods


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ASK | {"factors": [1, 2]}, "factors conflicts with prompt"),
        (ASK | {"factor": 2}, "factor conflicts with prompt"),
        (ASK | {"op": "scale", "factor": 2}, "op conflicts with prompt"),
        (ASK | {"layers": "1"}, "layers conflicts with prompt"),
        ({"prompt": {"instruction": "Answer in French."}}, "is the same for every language"),
        ({"prompt": {"instruction": "In {lang}."}}, r"unknown \{lang\}"),
        (
            {"prompt": {"instruction": "{language}", "sistem": True}},
            "unknown key 'interventions.0.prompt.sistem'; did you mean 'system'",
        ),
        ({"prompt": {"instruction": "{language}", "names": "french"}}, "interventions.0.prompt.names"),
        ({"prompt": {"instruction": "{language}", "system": True}}, "prompt.system: a system instruction needs a chat"),
        ({"prompt": {"instruction": "{language}", "names": "native"}, "languages": ["fon_Latn"]}, "name of Fon in the"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(spell: Spell, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        spell(PLAIN, interventions=[entry])


def test_an_instruction_in_one_language_has_no_control_and_says_so(spell: Spell) -> None:
    french = {"prompt": {"instruction": "Réponds en français."}, "languages": ["fra_Latn"]}
    grid = spell(PLAIN, interventions=[french], controls={"random": 2})
    assert len(grid.interventions) == 2
    assert any("fra_Latn-prompt: 0 of 2 controls" in note for note in grid.notes)


def test_a_system_instruction_without_a_template_fails_by_name(spell: Spell, tmp_path: Path) -> None:
    """The demo model has no chat template."""
    entry = {"prompt": {"instruction": "{language}", "system": True}}
    grid = spell(PLAIN, interventions=[entry], apply_chat_template=True, controls={"random": 0})
    outcome = run(grid, tmp_path / "run")
    assert outcome.exit_code == 1
    errors = [json.loads(path.read_text())["error"] for path in (tmp_path / "run" / "failed").glob("*.json")]
    assert any("the model's tokenizer has no chat template" in error for error in errors)
