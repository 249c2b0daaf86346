"""Factors of equal damage: the stage before the grid, killed and resumed, its text, its controls, what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.resources import demo_calibration
from lm_eval_steering.sweep.cells import BASELINE
from lm_eval_steering.sweep.choice import choose, groups_of
from lm_eval_steering.sweep.damage import bound
from lm_eval_steering.sweep.damage_search import MOST_EVALUATIONS, TOLERANCE
from lm_eval_steering.sweep.damage_text import TASK
from lm_eval_steering.sweep.estimate import CellLog
from lm_eval_steering.sweep.plan import build_plan
from lm_eval_steering.sweep.status import describe, status
from lm_eval_steering.sweep.store import Store
from tests.commands import ended, forked
from tests.sweep.conftest import PLAIN, PLAN, Spell, merged, run

TARGETS = [0.1, 0.5]
ENTRIES = [
    {"op": "scale", "factors": {"damage": TARGETS}},
    {"op": "add", "value": "mean", "site": "product", "factors": {"damage": TARGETS}},
]
EQUAL: dict[str, Any] = PLAN | {
    "interventions": ENTRIES,
    "controls": {"random": 1, "calibration": "demo", "sentences": 8, "at": ["factor", "damage"]},
    "damage": {"sentences": 12},
    "tasks": ["small_lss", "small_nats"],
    "then": {"tasks": ["small_choice"]},
}


def files(out: Path) -> dict[str, Any]:
    """What the searches found, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "factors").glob("*.json"))}


@pytest.fixture(scope="module")
def equal(spell: Spell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("equal") / "run"
    assert run(spell(EQUAL), out).exit_code == 0
    return out


def test_the_damage_is_within_a_tenth_of_what_was_asked_or_marked(equal: Path) -> None:
    searches = files(equal)
    assert len(searches) == 2 * 2 * 2  # entries, languages, own and random neurons
    within = 0
    for search in searches.values():
        assert 0 < len(search["evaluations"]) <= MOST_EVALUATIONS
        measured = {each["factor"]: each["damage"] for each in search["evaluations"]}
        for target in search["targets"]:
            if target["factor"] is None:
                assert "none up to" in target["why"]
                continue
            assert target["damage"] == measured[target["factor"]]
            assert target["within"] == (abs(target["damage"] - target["target"]) <= TOLERANCE * target["target"])
            assert target["within"] or "not within" in target["why"]
            within += target["within"]
    assert within > 8  # of 16


def test_each_evaluation_is_a_cell_and_the_damage_stands_beside_every_result(equal: Path) -> None:
    frame = Store(equal).frame()
    nats = frame[(frame.task == TASK) & (frame.metric == "nats_per_token")]
    assert set(nats.stage) == {0} and set(nats.n) == {12} and nats.planned.all()
    base = nats[nats.intervention == BASELINE].set_index("target").value
    for search in files(equal).values():
        rise = {
            row.cell: row.value - base[search["search"]["language"]]
            for row in nats[nats.intervention != BASELINE].itertuples()
        }
        for each in search["evaluations"]:
            assert each["damage"] == pytest.approx(rise[each["cell"]], abs=1e-12)
    results = frame[(frame.stage > 0) & (frame.intervention != BASELINE)]
    own = results[results.control.isna()]
    assert own.damage_asked.notna().all() and own.damage_reached.notna().all()
    asked = {
        (target["factor"], search["search"]["control"]): target
        for search in files(equal).values() for target in search["targets"] if target["within"]
    }  # fmt: skip
    for row in own.itertuples():
        target = asked.get((row.factor, None))
        assert target is None or f"{target['target']:g}" in row.damage_asked.split("+")
    # Controls at the same factor, whose damage nobody measured, and controls at the same damage.
    controls = results[results.control.notna()]
    assert controls.damage_asked.isna().any() and controls.damage_asked.notna().any()
    assert frame[frame.intervention == BASELINE].damage_asked.isna().all()


def test_killed_and_resumed_it_finds_the_same_factors(spell: Spell, equal: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    grid = spell(EQUAL)

    class Killing(CellLog):
        def __init__(self, after: int) -> None:
            super().__init__(stream=io.StringIO())
            self.left = after

        def end(self, tokens: int, seconds: float) -> None:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)

    for after in (3, 9):
        kill = forked(lambda after=after: run(grid, out, progress=Killing(after)).exit_code)
        assert ended(kill) == -signal.SIGKILL
        assert "factors of equal damage are being searched for: 8 searches" in status(out)
    stored = len(Store(out).folders())
    assert 0 < stored <= 12
    outcome = run(grid, out)
    whole = len(Store(equal).folders())
    assert outcome.exit_code == 0 and outcome.ran == whole - stored
    assert files(out) == files(equal)
    assert set(Store(out).folders()) == set(Store(equal).folders())
    assert run(grid, out).ran == 0
    assert "being searched for" not in status(out)


def test_two_shards_search_together_and_find_the_same(spell: Spell, equal: Path, tmp_path: Path) -> None:
    grid, out = spell(EQUAL), tmp_path / "run"
    parts = [forked(lambda part=part: run(grid, out, part).exit_code) for part in ("1/2", "2/2")]
    assert {ended(pid) for pid in parts} <= {0, 3}
    assert [run(grid, out, part).exit_code for part in ("1/2", "2/2")] == [0, 0]
    assert files(out) == files(equal)
    assert merged([out], tmp_path / "a") == merged([equal], tmp_path / "b")


def test_other_targets_use_the_evaluations_that_are_there(spell: Spell, equal: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "run"
    shutil.copytree(equal, out)
    entries = [ENTRIES[0] | {"factors": {"damage": [0.1]}}]
    before = len(Store(out).folders())
    outcome = run(spell(EQUAL, interventions=entries, controls={"random": 0}), out)
    assert outcome.exit_code == 0
    walked = {each["factor"] for each in files(equal)["0-deu_Latn-scale"]["evaluations"]}
    assert len(walked & {each["factor"] for each in files(out)["0-deu_Latn-scale"]["evaluations"]}) >= 3
    assert len(Store(out).folders()) - before < 8


def test_dry_run_shows_the_bound_and_then_what_was_found(spell: Spell, equal: Path, tmp_path: Path) -> None:
    grid = spell(EQUAL)
    assert bound(grid) == 8 * MOST_EVALUATIONS + 2
    text = describe(grid, tmp_path / "none")
    assert "damage: 8 searches for factors, of at most 12 cells each: at most 98 cells; 0 searches are done" in text
    assert "as many as there can be" in text
    assert len(grid.cells) >= len([cell for cell in Store(equal).planned() if cell.stage == 1])
    done = describe(grid, equal)
    assert "8 searches are done" in done and "as many as there can be" not in done


def test_then_takes_the_controls_at_the_same_damage_along(spell: Spell, equal: Path) -> None:
    store = Store(equal)
    for path in (equal / "then").glob("*.json"):
        choice = json.loads(path.read_text())
        cells = [cell["intervention"] for cell in choice["cells"]]
        chosen = next(cell for cell in cells if cell["name"] == choice["chosen"])
        controls = [cell for cell in cells if cell["control"] is not None]
        assert {cell["factor"] for cell in controls if not cell["damage"]} == {chosen["factor"]}
        at_damage = [cell for cell in controls if cell["damage"]]
        assert all(set(cell["damage"]) & set(chosen["damage"]) for cell in at_damage)
    assert store.missing().empty
    from lm_eval_steering.sweep.damage import resolved

    grid = resolved(spell(EQUAL), store)
    assert grid is not None
    assert [choose(grid, store, group)["chosen"] for group in groups_of(grid)]


def test_the_text_is_beyond_calibration_and_in_no_task(spell: Spell, equal: Path) -> None:
    for code in ("deu_Latn", "tur_Latn"):
        corpus = (demo_calibration() / f"{code}.txt").read_text().splitlines()
        cell = next(c for c in Store(equal).planned() if c.stage == 0 and c.target == code)
        texts = [sample["doc"]["text"] for sample in Store(equal).samples(cell)]
        assert texts == [line for line in corpus[100:] if line in texts][:12] and len(texts) == 12
    # A text that begins with the items of a task: they are left out.
    items = [
        document["text"] for document in spell(PLAIN, tasks=["small_nats"]).book.task("small_nats", None).eval_docs
    ]
    corpus = (demo_calibration() / "deu_Latn.txt").read_text().splitlines()[110:140]
    folder = equal.parent / "text"
    folder.mkdir(exist_ok=True)
    (folder / "deu_Latn.txt").write_text("\n".join([*items, *corpus]) + "\n")
    grid = spell(PLAIN, tasks=["small_nats"], interventions=ENTRIES[:1], damage={"text": str(folder), "sentences": 20})
    documents = grid.book.task(TASK, "deu_Latn").eval_docs
    assert [document["text"] for document in documents] == corpus[:20]
    (folder / "deu_Latn.txt").write_text("\n".join([*items, *corpus[:5]]) + "\n")
    with pytest.raises(SteeringError, match=r"damage.text: text has 5 lines of deu_Latn.*expected 10 at least"):
        spell(PLAIN, tasks=["small_nats"], interventions=ENTRIES[:1], damage={"text": str(folder)})


def test_prompts_and_limits_of_the_plan_do_not_reach_the_damage(spell: Spell) -> None:
    def key(**changes: Any) -> str:
        grid = spell(PLAIN, interventions=ENTRIES[:1], damage={"sentences": 12}, **changes)
        return grid.damage_cell(grid.searches[0], 2.0).key

    assert key() == key(limit=2) == key(num_fewshot=1) == key(tasks=["small_nats"])
    assert key() != key(model={"pretrained": "demo", "dtype": "bfloat16"})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"interventions": [{"op": "set", "value": "mean", "factors": {"damage": [1]}}]}, "set changes something at every"),
    ({"interventions": [{"preset": "p_max", "factors": {"damage": [1]}}]}, "p_max changes something at every factor"),
    (
        {"interventions": [{"op": "scale", "deactivate": "others", "factors": {"damage": [1]}}]},
        "conflicts with deactivate",
    ),
    ({"interventions": [{"op": "scale", "factors": {"damage": [0]}}]}, "damage: 0: expected a finite rise"),
    ({"interventions": [{"op": "scale", "factors": {"damage": [1], "max_fctor": 3}}]}, "did you mean 'max_factor'"),
    (
        {"interventions": [{"op": "scale", "factors": {"damage": [1], "max_factor": 1}}]},
        "max_factor: 1 changes nothing",
    ),
    ({"controls": {"random": 1, "at": ["damage"]}}, "controls.at: damage needs an intervention with factors"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_searched_for_is_refused_by_name(spell: Spell, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        spell(PLAIN, **changes)


def test_a_set_of_another_text_needs_one_to_be_named(spell: Spell, tmp_path: Path) -> None:
    from dataclasses import replace

    from lm_eval_steering.neurons.neuron_set import NeuronSet

    demo = NeuronSet.load("demo")
    corpus = {**demo.provenance.corpus, "calibration": {"source": "elsewhere", "sentences": {}, "sha256": {}}}
    replace(demo, provenance=replace(demo.provenance, corpus=corpus)).save(tmp_path / "other.safetensors")
    plan = {"neurons": str(tmp_path / "other.safetensors"), "interventions": ENTRIES[:1]}
    with pytest.raises(SteeringError, match=r"damage.text is missing.*'elsewhere'.*damage: \{text: CORPUS\}"):
        spell(PLAIN, **plan)
    assert spell(PLAIN, **plan, damage={"text": "demo", "sentences": 12}).searches


def test_a_factor_that_overflows_is_more_damage_than_any(spell: Spell, tmp_path: Path) -> None:
    entry = {"op": "add", "value": 6e4, "factors": {"damage": [1e6], "max_factor": 4}}
    grid = spell(
        PLAIN, interventions=[entry], damage={"sentences": 12}, model={"pretrained": "demo", "dtype": "float16"}
    )
    outcome = run(grid, tmp_path)
    # What overflowed on the way is no failure; the nearest factor may overflow on other texts.
    assert all(cell.stage == 1 for cell in outcome.failed)
    (search,) = files(tmp_path).values()
    assert any(each["damage"] is None for each in search["evaluations"])
    assert not search["targets"][0]["within"]


def test_a_plan_reads_back(spell: Spell) -> None:
    plan = spell(EQUAL).plan
    assert build_plan(plan.model_dump(mode="json")) == plan
