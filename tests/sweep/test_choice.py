"""Choosing: bounds on the damage, the default metric, `limit` on each half, and what is said where none qualifies."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.sweep.cells import BASELINE
from lm_eval_steering.sweep.choice import check_choice, metric_of
from lm_eval_steering.sweep.estimate import CellLog
from lm_eval_steering.sweep.halves import half_of
from lm_eval_steering.sweep.plan import build_plan
from lm_eval_steering.sweep.store import Store
from tests.sweep.conftest import PLAIN, Spell, run

# German text: steering to Turkish makes it less likely at either factor.
BOUNDED: dict[str, Any] = PLAIN | {
    "languages": ["tur_Latn"],
    "interventions": [{"op": "add", "value": "mean", "site": "product", "factors": [2, 8]}],
    "tasks": ["small_lss", "small_nats"],
    "then": {"tasks": ["small_choice"]},
}


def bounded(rise: float) -> dict[str, Any]:
    return {"metric": "lss", "seed": 2, "at_most": {"nats_per_token": rise}}


def test_at_most_bounds_the_rise_over_the_baseline_on_the_choosing_items(spell: Spell, tmp_path: Path) -> None:
    assert run(spell(BOUNDED, choose=bounded(1e6)), tmp_path).exit_code == 0
    store = Store(tmp_path)
    choice, frame = store.json("then/tur_Latn.json"), store.frame()
    nats = frame[frame.metric == "nats_per_token"].set_index("intervention").value_choose
    rises = {name: nats[name] - nats[BASELINE] for name in choice["values"]}
    assert choice["rises"]["nats_per_token"] == pytest.approx(rises, rel=1e-12)
    gentle, harsh = sorted(rises, key=lambda name: rises[name])
    assert choice["chosen"] == max(choice["values"], key=lambda name: choice["values"][name])
    # Between the two rises only the gentler one qualifies, whatever its LSS; below both, the baseline is chosen.
    assert run(spell(BOUNDED, choose=bounded((rises[gentle] + rises[harsh]) / 2)), tmp_path).exit_code == 0
    assert store.json("then/tur_Latn.json")["chosen"] == gentle
    log = io.StringIO()
    assert rises[gentle] > 0
    outcome = run(spell(BOUNDED, choose=bounded(rises[gentle] / 2)), tmp_path, progress=CellLog(stream=log))
    assert outcome.exit_code == 0
    choice = store.json("then/tur_Latn.json")
    assert (choice["chosen"], choice["factor"]) == (BASELINE, None)
    assert {cell["intervention"]["name"] for cell in choice["cells"]} == {BASELINE}
    assert "tur_Latn: no candidate keeps to choose.at_most (nats_per_token" in log.getvalue()


def test_a_bound_that_no_task_measures_is_refused_by_name(spell: Spell) -> None:
    grid = spell(BOUNDED, choose={"metric": "lss", "at_most": {"degenerate": 0.1}})
    with pytest.raises(SteeringError, match=r"choose.at_most: no task of the plan measures degenerate"):
        check_choice(grid)
    for rise in (-0.1, float("inf"), float("nan")):
        with pytest.raises(SteeringError, match=r"choose.at_most: degenerate: .*0 or more"):
            build_plan(PLAIN | {"choose": {"at_most": {"degenerate": rise}}})


def test_the_damage_is_that_of_the_steered_languages_text(spell: Spell) -> None:
    from lm_eval_steering.sweep.choice import groups_of

    tasks = {"tasks": ["small_lss", "small_nats", "small_fragile"]}
    both = spell(BOUNDED, choose=bounded(1), languages=["deu_Latn", "tur_Latn"], **tasks)
    by_language = {group.name: {cell.task for cell in group.bounded["nats_per_token"]} for group in groups_of(both)}
    assert by_language == {"deu_Latn": {"small_nats", "small_fragile"}, "tur_Latn": {"small_nats", "small_fragile"}}
    stated = {"evaluated": {"small_nats": "deu", "small_fragile": "tr"}}
    named = spell(BOUNDED, choose=bounded(1), languages=["deu_Latn", "tur_Latn"], **tasks, **stated)
    by_language = {group.name: {cell.task for cell in group.bounded["nats_per_token"]} for group in groups_of(named)}
    assert by_language == {"deu_Latn": {"small_nats"}, "tur_Latn": {"small_fragile"}}


def test_the_metric_is_lfs_clean_by_default_and_must_be_named_elsewhere(spell: Spell) -> None:
    assert metric_of(spell(PLAIN, tasks=["small_choice", "small_clean"], choose={"seed": 2})) == "lfs_clean"
    with pytest.raises(SteeringError, match=r"choose.metric is missing.*lfs_clean.*acc"):
        check_choice(spell(PLAIN, tasks=["small_choice"], choose={"seed": 2}))


def test_limit_is_per_half(spell: Spell, tmp_path: Path) -> None:
    plan = {
        "tasks": ["small_nats"], "interventions": [{"op": "scale", "factor": 2}], "limit": 2,
        "choose": {"metric": "nats_per_token", "seed": 2}, "then": {"tasks": ["small_choice"]},
    }  # fmt: skip
    grid = spell(PLAIN, **plan)
    assert run(grid, tmp_path).exit_code == 0
    store = Store(tmp_path)
    whole = spell(PLAIN, **plan | {"limit": None}).book.task("small_nats", None).eval_docs
    halves: dict[str, list[Any]] = {"choose": [], "report": []}
    for document in whole:
        halves[half_of(str(document["id"]), 2)].append(document["id"])
    for cell in store.planned():
        items = {sample["doc"]["id"] for sample in store.samples(cell)}
        report = set(halves["report"][:2])
        assert items == (report if cell.stage == 2 else report | set(halves["choose"][:2]))
    frame = store.frame()
    first = frame[frame.metric == "nats_per_token"]
    assert set(first.n_choose) == set(first.n_report) == {2}
    other = spell(PLAIN, **plan | {"choose": {"metric": "nats_per_token", "seed": 5}})
    assert not {cell.key for cell in other.cells} & {cell.key for cell in grid.cells}  # other documents
    unsplit = spell(PLAIN, **plan | {"choose": None, "then": None})
    assert unsplit.positions("small_nats", None, "all") is None
