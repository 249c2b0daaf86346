"""Plan files: what is refused and how, overrides, and which cells a plan is spelled out into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.sweep.plan import SweepPlan, build_plan, read_plan
from lm_eval_steering.sweep.status import describe
from tests.sweep.conftest import PLAIN, PLAN, Spell

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"languags": ["fra_Latn"]}, "unknown key 'languags'; did you mean 'languages'"),
    (
        {"interventions": [{"op": "scale", "factor": 2, "layer": "3"}]},
        r"'interventions.0.layer'; did you mean 'layers'",
    ),
    ({"controls": {"randm": 3}}, "unknown key 'controls.randm'; did you mean 'random'"),
    ({"interventions": [{"factors": [2]}]}, "interventions.0: expected op, preset or deactivate"),
    ({"interventions": [{"op": "scale", "factor": 2, "factors": [2]}]}, "factor beside factors"),
    ({"languages": ["french_Latn"]}, "french_Latn"),
    ({"choose": None, "then": {"tasks": ["small_nats"]}}, "then without choose"),
    ({"then": {"tasks": ["small_nats"]}, "choose": {"metric": "lss"}, "limit": 3}, "limit beside choose.split=half"),
    ({"controls": {"random": -1}}, r"controls.random: .*found -1"),
    ({"neurons": None}, "neurons is missing"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_plan_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    found = {key: value for key, value in (PLAIN | changes).items() if value is not None}
    with pytest.raises(SteeringError, match=said) as error:
        build_plan(found)
    assert "\n" not in str(error.value)


SPELLED_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tasks": ["small_chioce"]}, "no task 'small_chioce'; did you mean 'small_choice'"),
    ({"interventions": [{"op": "scal", "factor": 2}]}, "interventions.0: .*scale"),
    ({"interventions": [{"op": "set", "value": "p77"}]}, "interventions.0: .*p77"),
    ({"languages": ["fin_Latn"]}, "fin_Latn"),
    ({"neurons": "dmo"}, "'dmo': no such file; did you mean 'demo'"),
    ({"tasks": ["small_lss"], "languages": ["eng_Latn"]}, "small_lss is not defined for any of the plan's languages"),
    (
        {"controls": {"random": 1}, "interventions": [{"preset": "p_max"}]},
        "needs the statistic 'max' of random neurons.*calibration: CORPUS",
    ),
]


@pytest.mark.parametrize(("changes", "said"), SPELLED_WRONG, ids=[said for _, said in SPELLED_WRONG])
def test_what_no_cell_could_do_is_refused_before_a_model_is_loaded(
    spell: Spell, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SteeringError, match=said):
        spell(PLAIN, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"choose": {"metric": "acc", "item": "sentence"}}, r"no sentence to split them by.*fields: .*id"),
        ({"choose": {"metric": "acc", "seed": 0}}, "small_choice: no item falls into the half to choose on"),
        ({"choose": {"metric": "acc", "tasks": ["small_nats"]}}, "choose.tasks: small_nats is not among the plan's"),
    ],
)
def test_a_choice_that_could_not_be_made_is_refused_before_anything_runs(
    spell: Spell, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SteeringError, match=said):
        describe(spell(PLAIN, **changes), tmp_path / "run")


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    plan = read_plan(path, ["controls.random=5", "interventions.0.factors=[1.5, 3]", "model.dtype=bfloat16"])
    assert (plan.controls.random, plan.interventions[0].factors, plan.model.dtype) == (5, (1.5, 3), "bfloat16")
    for wrong, said in (("controls", "expected key=value"), ("neurons.x=1", "neurons is 'demo', which has no keys")):
        with pytest.raises(SteeringError, match=said):
            read_plan(path, [wrong])


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
    assert [cell.variant.name for cell in grid.cells] == ["baseline", "deu_Latn-scale-x2"]
    assert grid.notes == [
        "deu_Latn-scale-x1 changes nothing: it is the baseline",
        "deu_Latn-add-mean-x0 changes nothing: it is the baseline",
    ]


def test_a_task_that_knows_the_steered_language_has_a_baseline_for_each(spell: Spell) -> None:
    grid = spell(PLAIN, tasks=["small_lss", "small_choice"], languages=["deu_Latn", "tur_Latn", "eng_Latn"])
    baselines = [(cell.task, cell.target) for cell in grid.cells if cell.variant.is_baseline]
    assert baselines == [("small_lss", "deu_Latn"), ("small_lss", "tur_Latn"), ("small_choice", None)]
    assert grid.notes[0].startswith("left out: small_lss steered to eng_Latn: LSS from eng_Latn to eng_Latn is undef")


def test_the_same_cell_has_the_same_key_in_every_plan_and_another_one_where_it_matters(spell: Spell) -> None:
    keys = {cell.variant.name: cell.key for cell in spell(PLAIN).cells}
    wider = spell(PLAIN, languages=["tur_Latn", "deu_Latn"], interventions=[{"op": "scale", "factors": [7, 3]}])
    assert {cell.key for cell in wider.cells} & set(keys.values()) == {keys["baseline"], keys["deu_Latn-scale-x3"]}
    batched = spell(PLAIN, model={"pretrained": "demo", "batch_size": 1})
    assert {cell.key for cell in batched.cells} == set(keys.values())
    for change in (
        {"limit": 2}, {"num_fewshot": 1}, {"model": {"pretrained": "demo", "dtype": "bfloat16"}},
        {"model": {"pretrained": "demo", "scoring": "plain"}}, {"interventions": [{"op": "scale", "factor": 2.5}]},
    ):  # fmt: skip
        steered = {cell.key for cell in spell(PLAIN, **change).cells if not cell.variant.is_baseline}
        assert not steered & set(keys.values()), change


def test_interventions_whose_short_names_are_equal_are_told_apart(spell: Spell) -> None:
    entries = [{"op": "set", "value": "live_max", "scope": scope} for scope in ("token", "sequence")]
    grid = spell(PLAIN, interventions=entries, controls={"random": 2})
    assert len({variant.name for variant in grid.variants}) == len(grid.variants) == 1 + 2 + 4


def test_tags_and_groups_are_spelled_out(spell: Spell, task_files: Path) -> None:
    assert {cell.task for cell in spell(PLAIN, tasks=["small"]).cells} >= {"small_lss", "small_choice", "small_nats"}


def test_dry_run_tells_cells_what_is_done_and_the_time(spell: Spell, finished: Path, tmp_path: Path) -> None:
    empty = describe(spell(), tmp_path / "none")
    assert "20 cells: baseline, 4 interventions and 4 random controls, on 2 tasks" in empty
    assert "how long they take is known when the first are done" in empty
    assert "then: at most 5 cells" in empty
    wider = describe(spell(languages=["deu_Latn", "tur_Latn", "fra_Latn"]), finished)
    assert "cells left, about" in wider and "for one runner" in wider
    assert not (tmp_path / "none").exists()
