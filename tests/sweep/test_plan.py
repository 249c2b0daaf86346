"""Plan files: what is refused and how, overrides, and which cells a plan is spelled out into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.sweep.cells import engine_arguments
from lm_eval_steering.sweep.plan import PlanError, SweepPlan, build_plan, read_plan
from lm_eval_steering.sweep.status import describe
from lm_eval_steering.sweep.store import Store
from tests.sweep.conftest import PLAIN, PLAN, Spell, run

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"languags": ["fra_Latn"]}, "unknown key 'languags'; did you mean 'languages'"),
    (
        {"interventions": [{"op": "scale", "factor": 2, "layer": "3"}]},
        r"'interventions.0.layer'; did you mean 'layers'",
    ),
    ({"controls": {"randm": 3}}, "unknown key 'controls.randm'; did you mean 'random'"),
    ({"interventions": [{"factors": [2]}]}, "interventions.0: expected op, preset, deactivate or prompt"),
    ({"interventions": [{"op": "scale", "factor": 2, "factors": [2]}]}, "factor conflicts with factors"),
    ({"languages": ["french_Latn"]}, "french_Latn"),
    ({"choose": None, "then": {"tasks": ["small_nats"]}}, "then without choose"),
    ({"engine": "vllm"}, r"engine.name: .*'steered-hf' or 'steered-vllm', got 'vllm'"),
    ({"engine": {"arguments": {"dtype": "half"}}}, "engine.arguments: steered-hf takes its arguments from model"),
    (
        {"engine": {"name": "steered-vllm", "arguments": {"pretrained": "other"}}},
        "engine.arguments.pretrained conflicts with model.pretrained",
    ),
    (
        {"engine": {"name": "steered-vllm", "arguments": {"factor": 3}}},
        "engine.arguments.factor: what is done to the neurons stands in neurons and interventions",
    ),
    ({"engine": {"name": "steered-vllm", "verify": 4}}, "unknown key 'engine.verify'"),
    ({"languages": [False]}, 'an unquoted no as false: write "no" with quotes, or nob_Latn'),
    ({"interventions": [{"deactivate": False}]}, "unquoted no as false"),
    ({"evaluated": {"small_choice": False}}, "unquoted no as false"),
    ({"evaluated": {"small_choice": "klingon"}}, "klingon"),
    ({"controls": {"random": -1}}, r"controls.random: .*got -1"),
    ({"neurons": None}, "neurons is missing"),
    ({"model": PLAIN["model"] | {"enable_thinking": True}}, "model: enable_thinking without think_end_token"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_plan_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    found = {key: value for key, value in (PLAIN | changes).items() if value is not None}
    with pytest.raises(SteeringError, match=message) as error:
        build_plan(found)
    assert "\n" not in str(error.value)


SPELLED_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tasks": ["small_chioce"]}, "no task 'small_chioce'; did you mean 'small_choice'"),
    ({"interventions": [{"op": "scal", "factor": 2}]}, "interventions.0: .*scale"),
    ({"interventions": [{"op": "set", "value": "p77"}]}, "interventions.0: .*p77"),
    ({"languages": ["fin_Latn"]}, "fin_Latn"),
    ({"neurons": "dmo"}, "'dmo': no such file.*did you mean 'demo'"),
    ({"tasks": ["small_lss"], "languages": ["eng_Latn"]}, "small_lss is not defined for any of the plan's languages"),
    (
        {"controls": {"random": 1}, "interventions": [{"preset": "p_max"}]},
        "needs the statistic 'max' of random neurons.*calibration: CORPUS",
    ),
    (
        {"interventions": [{"op": "add", "value": "diffmean", "site": "residual", "layers": 1}]},
        r"interventions.0: site=residual: .*calibrate SET --residual",
    ),
    ({"interventions": [{"op": "add", "site": "residual"}]}, "interventions.0: site=residual without layers="),
]


@pytest.mark.parametrize(("changes", "message"), SPELLED_WRONG, ids=[message for _, message in SPELLED_WRONG])
def test_what_no_cell_could_do_is_refused_before_a_model_is_loaded(
    spell: Spell, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteeringError, match=message):
        spell(PLAIN, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choose": {"metric": "acc", "item": "sentence"}}, r"no sentence to split them by.*fields: .*id"),
        ({"choose": {"metric": "acc", "seed": 0}}, "small_choice: no item falls into the half to choose on"),
        ({"choose": {"metric": "acc", "tasks": ["small_nats"]}}, "choose.tasks: small_nats is not among the plan's"),
    ],
)
def test_a_choice_that_could_not_be_made_is_refused_before_anything_runs(
    spell: Spell, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteeringError, match=message):
        describe(spell(PLAIN, **changes), tmp_path / "run")


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    plan = read_plan(path, ["controls.random=5", "interventions.0.factors=[1.5, 3]", "model.dtype=bfloat16"])
    assert (plan.controls.random, plan.interventions[0].factors, plan.model.dtype) == (5, (1.5, 3), "bfloat16")
    for wrong, message in (("controls", "expected key=value"), ("neurons.x=1", "neurons is 'demo', which has no keys")):
        with pytest.raises(SteeringError, match=message):
            read_plan(path, [wrong])


def test_a_plan_lets_a_model_think_and_says_what_ends_a_thought(spell: Spell, tmp_path: Path) -> None:
    """The demo model ends no thought, so every answer is one that did not end."""
    thinking = PLAIN["model"] | {"enable_thinking": True, "think_end_token": "</think>"}
    grid = spell(PLAIN, model=thinking, tasks=["small_forcing"])
    assert run(grid, tmp_path / "run").exit_code == 0
    frame = Store(tmp_path / "run").frame()
    for metric, value in (("unfinished", 1), ("lang_unknown", 1), ("lfs", 0)):
        assert set(frame.loc[frame["metric"] == metric, "value"]) == {value}, metric
    assert not {cell.key for cell in grid.cells} & {cell.key for cell in spell(PLAIN, tasks=["small_forcing"]).cells}


def test_every_field_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text()
    seen: list[Any] = [SweepPlan]
    for part in seen:
        for name, field in part.model_fields.items():
            assert f"`{name}`" in page, name
            assert field.description
            inner = [*getattr(field.annotation, "__args__", ()), field.annotation]
            seen += [kind for kind in inner if hasattr(kind, "model_fields") and kind not in seen]


def test_the_baseline_is_a_cell_once_and_no_change_is_the_baseline(spell: Spell) -> None:
    factors = {"interventions": [{"op": "scale", "factors": [1, 2, 2.0]}, {"op": "add", "value": "mean", "factor": 0}]}
    grid = spell(PLAIN, **factors)
    assert [cell.intervention.name for cell in grid.cells] == ["baseline", "deu_Latn-scale-x2"]
    assert grid.notes == [
        "deu_Latn-scale-x1 changes nothing: it is the baseline",
        "deu_Latn-add-mean-x0 changes nothing: it is the baseline",
    ]


def test_a_task_that_knows_the_steered_language_has_a_baseline_for_each(spell: Spell) -> None:
    grid = spell(PLAIN, tasks=["small_lss", "small_choice"], languages=["deu_Latn", "tur_Latn", "eng_Latn"])
    baselines = [(cell.task, cell.target) for cell in grid.cells if cell.intervention.is_baseline]
    assert baselines == [("small_choice", None)]  # an unsteered LSS is 0 by definition
    assert "left out: the unsteered small_lss, whose LSS is 0 by definition" in grid.notes
    assert any(
        note.startswith("left out: small_lss steered to eng_Latn: LSS from eng_Latn to eng_Latn is undef")
        for note in grid.notes
    )
    forcing = spell(PLAIN, tasks=["small_forcing"], languages=["deu_Latn", "tur_Latn"])
    baselines = [(cell.task, cell.target) for cell in forcing.cells if cell.intervention.is_baseline]
    assert baselines == [("small_forcing", "deu_Latn"), ("small_forcing", "tur_Latn")]


def test_a_deactivation_carries_the_name_of_its_language(spell: Spell) -> None:
    entries = [{"preset": "deactivate"}, {"deactivate": "tur_Latn+fra_Latn"}, {"deactivate": "others", "op": "scale"}]
    names = {planned.name for planned in spell(PLAIN, interventions=entries).interventions}
    assert names == {
        "baseline", "deu_Latn-deactivate", "tur_Latn+fra_Latn-deactivate", "deu_Latn-scale-without-others"
    }  # fmt: skip


def test_a_key_that_is_written_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("tasks: [small_choice]\nneurons: demo\ntasks: [small_lss]\n")
    with pytest.raises(SteeringError, match=r"plan.yaml: .*'tasks' is written twice, in line 1 and in line 3"):
        read_plan(path)
    path.write_text(yaml.safe_dump(PLAIN).replace("batch_size: 4", "batch_size: 4\n  batch_size: 8"))
    with pytest.raises(SteeringError, match="'batch_size' is written twice"):
        read_plan(path)


def test_paths_of_a_plan_expand_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = build_plan(
        PLAIN
        | {
            "neurons": "~/n.safetensors", "model": {"pretrained": "~/model"}, "include_path": "~/tasks",
            "controls": {"random": 1, "calibration": "~/text"}, "metadata": {"data_dir": "~/data", "pair": "a~b"},
        }
    )  # fmt: skip
    assert plan.neurons == f"{tmp_path}/n.safetensors" and plan.model.pretrained == f"{tmp_path}/model"
    assert plan.include_path == (f"{tmp_path}/tasks",) and plan.controls.calibration == f"{tmp_path}/text"
    assert plan.metadata == {"data_dir": f"{tmp_path}/data", "pair": "a~b"}


def test_the_language_of_a_tasks_items(spell: Spell) -> None:
    """Its metadata first, then its name, then the plan's `evaluated`; it decides no score."""
    before = spell(PLAIN)
    assert {cell.evaluated for cell in before.cells} == {None}
    grid = spell(PLAIN, evaluated={"small_choice": "de"})
    assert {cell.evaluated for cell in grid.cells} == {"deu_Latn"}
    assert [cell.key for cell in grid.cells] == [cell.key for cell in before.cells]
    ours = spell(PLAIN, tasks=["steering_demo_perplexity_deu_Latn"])
    assert {cell.evaluated for cell in ours.cells} == {"deu_Latn"}
    with pytest.raises(SteeringError, match=r"evaluated: .*small_chioce is not among.*did you mean 'small_choice'"):
        spell(PLAIN, evaluated={"small_chioce": "de"})
    with pytest.raises(SteeringError, match=r"evaluated: .*steering_demo_perplexity_deu_Latn.*fra.*leave it out"):
        spell(PLAIN, tasks=["steering_demo_perplexity_deu_Latn"], evaluated={"steering_demo_perplexity_deu_Latn": "fr"})


def test_a_file_is_no_folder_for_cells(spell: Spell, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SteeringError, match=f"--out {file} is a file; expected a folder"):
        describe(spell(PLAIN), file)


def test_the_same_cell_has_the_same_key_in_every_plan_and_another_one_where_it_matters(spell: Spell) -> None:
    keys = {cell.intervention.name: cell.key for cell in spell(PLAIN).cells}
    wider = spell(PLAIN, languages=["tur_Latn", "deu_Latn"], interventions=[{"op": "scale", "factors": [7, 3]}])
    assert {cell.key for cell in wider.cells} & set(keys.values()) == {keys["baseline"], keys["deu_Latn-scale-x3"]}
    batched = spell(PLAIN, model={"pretrained": "demo", "batch_size": 1})
    assert {cell.key for cell in batched.cells} == set(keys.values())
    for change in (
        {"limit": 2}, {"num_fewshot": 1}, {"model": {"pretrained": "demo", "dtype": "bfloat16"}},
        {"model": {"pretrained": "demo", "scoring": "plain"}}, {"interventions": [{"op": "scale", "factor": 2.5}]},
    ):  # fmt: skip
        steered = {cell.key for cell in spell(PLAIN, **change).cells if not cell.intervention.is_baseline}
        assert not steered & set(keys.values()), change


def test_interventions_whose_short_names_are_equal_are_told_apart(spell: Spell) -> None:
    entries = [{"op": "set", "value": "live_max", "scope": scope} for scope in ("token", "sequence")]
    grid = spell(PLAIN, interventions=entries, controls={"random": 2})
    assert len({planned.name for planned in grid.interventions}) == len(grid.interventions) == 1 + 2 + 4


def test_tags_and_groups_are_spelled_out(spell: Spell, task_files: Path) -> None:
    assert {cell.task for cell in spell(PLAIN, tasks=["small"]).cells} >= {"small_lss", "small_choice", "small_nats"}


def test_dry_run_tells_cells_what_is_done_and_the_time(spell: Spell, finished: Path, tmp_path: Path) -> None:
    empty = describe(spell(), tmp_path / "none")
    assert "18 cells: baseline, 4 interventions and 4 random controls, on 2 tasks" in empty
    assert "how long they take is known when the first are done" in empty
    assert "then: at most 5 cells" in empty
    wider = describe(spell(languages=["deu_Latn", "tur_Latn", "fra_Latn"]), finished)
    assert "cells left, about" in wider and "for one runner" in wider
    assert not (tmp_path / "none").exists()


def test_cells_of_an_engine_are_other_cells_and_where_it_runs_is_no_part_of_them(spell: Spell) -> None:
    hooks, engine = spell(PLAIN), spell(PLAIN, engine="steered-vllm")
    assert [cell.task for cell in engine.cells] == [cell.task for cell in hooks.cells]
    assert not {cell.key for cell in engine.cells} & {cell.key for cell in hooks.cells}
    placed = {"name": "steered-vllm", "arguments": {"tensor_parallel_size": 4, "enforce_eager": True}}
    assert [cell.key for cell in spell(PLAIN, engine=placed).cells] == [cell.key for cell in engine.cells]
    quantised = {"name": "steered-vllm", "arguments": {"quantization": "fp8"}}
    assert not {cell.key for cell in spell(PLAIN, engine=quantised).cells} & {cell.key for cell in engine.cells}
    arguments = engine_arguments(spell(PLAIN, engine=placed))
    assert arguments["tensor_parallel_size"] == 4 and arguments["batch_size"] == "auto"
    assert arguments["steered_units"] == 128, "room for every language of the set"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "add", "value": "live_max"}, "interventions.0: value=live_max: a live statistic .*steered-hf"),
        ({"op": "scale", "factor": 2, "positions": "prompt"}, "interventions.0: positions=prompt: .*steered-hf"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_it_starts(
    spell: Spell, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        spell(PLAIN, engine="steered-vllm", interventions=[changes])


def test_hidden_states_are_swept_with_random_directions_and_need_no_text(spell: Spell, tmp_path: Path) -> None:
    demo = NeuronSet.load("demo")
    shape = (demo.provenance.layers, 192, len(demo.languages))
    means = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    replace(demo, residual={"mean": means}).save(tmp_path / "set.safetensors")
    entries = [
        {"op": "add", "value": "diffmean", "site": "residual", "layers": "2-3", "dimensions": 8, "factor": 3},
        {"preset": "clas_diffmean", "source": "fr", "layers": 2, "factors": [2, 4]},
        {"preset": "clas_diffmean", "source": "eng", "layers": 2, "factors": [2]},
    ]
    plan = {"neurons": str(tmp_path / "set.safetensors"), "interventions": entries, "controls": {"random": 1}}
    grid = spell(PLAIN, **plan)
    own = [planned for planned in grid.interventions if planned.control is None and not planned.is_baseline]
    assert [planned.name for planned in own] == [
        "deu_Latn-add-diffmean-x3-residual-dims8-2-3",
        "deu_Latn-clas_diffmean-x2-from-fr-2",
        "deu_Latn-clas_diffmean-x4-from-fr-2",
        "deu_Latn-clas_diffmean-x2-from-eng-2",
    ]
    assert own[1].resolved["steps"][0]["source"] == "fra_Latn"
    assert len({cell.key for cell in grid.cells}) == len(grid.cells) == 1 + 2 * 4
    assert run(grid, tmp_path / "run").exit_code == 0
    store = Store(tmp_path / "run")
    reports = {cell.intervention.name: store.read(cell.key).results["config"]["steering"] for cell in grid.cells[1:]}
    for planned in own:
        mine, control = reports[planned.name], reports[f"{planned.name}-random0"]
        assert mine["evidence"]["neurons"] == control["evidence"]["neurons"] == (16 if planned.entry == 0 else 192)
        assert mine["evidence"]["positions"] == control["evidence"]["positions"] > 0
        assert mine["neuron_set"]["sha256"] != control["neuron_set"]["sha256"]
    few = own[0].name
    largest = [reports[name]["evidence"]["largest_change"] for name in (few, f"{few}-random0")]
    assert largest[0] == pytest.approx(largest[1], rel=1e-3)
