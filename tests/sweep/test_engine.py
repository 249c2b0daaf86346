"""A sweep that an engine runs: `lm_eval --model hf` on the exports stands in for vLLM, and scores as hooks do."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks.manager import TaskIndex

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.compat import describe_machine_once
from lm_eval_steering.report.read import read_results
from lm_eval_steering.report.tables import compute
from lm_eval_steering.resources import demo_model
from lm_eval_steering.sweep import Store
from lm_eval_steering.sweep.cells import Grid
from lm_eval_steering.sweep.engine import EngineRunner, engine_grid
from lm_eval_steering.sweep.estimate import CellLog
from lm_eval_steering.sweep.plan import build_plan
from lm_eval_steering.sweep.run import run_sweep
from lm_eval_steering.sweep.runner import SOME_FAILED, WAITING, Outcome, Shard
from lm_eval_steering.sweep.status import describe, status
from tests.commands import ended, forked
from tests.sweep.conftest import PLAIN, PLAN, Spell, merged, run

CHANGES: dict[str, Any] = {
    "languages": ["deu_Latn"],
    "interventions": [{"op": "add", "value": "mean", "site": "product", "factor": 8}],
    "tasks": ["small_choice", "small_forcing"],
    "choose": {"metric": "lfs", "seed": 2, "tasks": ["small_forcing"]},
    "then": {"tasks": ["small_nats"]},
}
ENGINE = {"name": "hf", "arguments": {"device": "cpu"}, "verify": 1}
UNKNOWN = {"token_perplexity", "nats_per_token"}  # an engine does not say how many tokens it scored


def commands_of(out: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (out / "engine" / "commands.txt").read_text().splitlines()]


def obey(out: Path) -> None:
    """Do what a folder's commands say, in a process of its own, which knows the tasks of --include_path alone."""
    assert ended(forked(lambda: _obey(out))) == 0


def _obey(out: Path) -> int:
    build = TaskIndex.build
    TaskIndex.build = staticmethod(lambda paths: build(paths[-1:]))  # an index of 14,000 other tasks takes seconds
    describe_machine_once()
    for command in commands_of(out):
        sys.argv = command
        cli_evaluate()
    return 0


def sweep(grid: Grid, out: Path) -> Outcome:
    return EngineRunner(grid, Store(out), CellLog(show=False)).run()


@pytest.fixture(scope="session")
def rehearsal(spell: Spell) -> Grid:
    return engine_grid(spell(PLAN, **CHANGES, engine=ENGINE))


@pytest.fixture(scope="session")
def answered(rehearsal: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose first commands have been run, and whose results have not been read."""
    out = tmp_path_factory.mktemp("engine") / "run"
    first = sweep(rehearsal, out)
    assert first.exit_code == WAITING and first.done == 0
    assert "6 cells have no results; 4 commands" in first.waiting[0]
    obey(out)
    return out


@pytest.fixture(scope="session")
def read_back(rehearsal: Grid, answered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder, moved and run to its end, `then` included."""
    out = tmp_path_factory.mktemp("read_back") / "run"
    moved(answered, out)
    second = sweep(rehearsal, out)
    assert (second.exit_code, second.ran, second.failed) == (WAITING, 6, [])
    obey(out)
    last = sweep(rehearsal, out)
    assert (last.exit_code, last.ran, last.done) == (0, 3, 9)
    assert commands_of(out) == []
    return out


def moved(folder: Path, out: Path) -> None:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("exports"))
    (out / "engine" / "exports").symlink_to(folder / "engine" / "exports")


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def by_hooks(spell: Spell, tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("by_hooks") / "run"
    assert run(spell(PLAN, **CHANGES), out).exit_code == 0
    return Store(out)


def numbers(found: Any) -> list[float]:
    """Every number in lm-eval's nested answers."""
    if isinstance(found, list):
        return [number for part in found for number in numbers(part)]
    return [{"True": 1.0, "False": 0.0}[found] if found in ("True", "False") else float(found)]


def test_scores_are_those_of_hooks(read_back: Path, by_hooks: Store) -> None:
    store = Store(read_back)
    ours = {(cell.intervention.name, cell.task): cell for cell in by_hooks.planned()}
    theirs = {(cell.intervention.name, cell.task): cell for cell in store.planned()}
    assert set(theirs) == set(ours) and len(theirs) == 9
    for place, cell in theirs.items():
        assert cell.key != ours[place].key
        expected, found = by_hooks.read(ours[place].key).facts, store.read(cell.key).facts
        unknown = {key for key in expected["metrics"] if key.split(",")[0] in UNKNOWN}
        # An engine cannot window a text that is longer than its context; how many it left out is counted.
        left_out = {key: found["metrics"].pop(key) for key in list(found["metrics"]) if key.startswith("left_out")}
        assert all(number == 0 for number in left_out.values())
        assert set(found["metrics"]) == set(expected["metrics"]) - unknown
        assert bool(unknown) == (cell.task == "small_nats")
        for key, value in found["metrics"].items():
            assert value == (
                pytest.approx(expected["metrics"][key], abs=1e-4) if "bits" in key else expected["metrics"][key]
            )
        counted = {key: number for key, number in found["n"].items() if not key.startswith("left_out")}
        assert counted == {key: expected["n"][key] for key in found["metrics"]}
        for one, other in zip(store.samples(cell), by_hooks.samples(ours[place]), strict=True):
            assert one["doc_id"] == other["doc_id"]
            if cell.task == "small_forcing":
                assert one["filtered_resps"] == other["filtered_resps"]
                assert {m: one[m] for m in one["metrics"]} == {m: other[m] for m in other["metrics"]}
            else:
                assert numbers(one["resps"]) == pytest.approx(numbers(other["resps"]), abs=1e-4)
    assert store.json("then/deu_Latn.json")["values"] == by_hooks.json("then/deu_Latn.json")["values"]
    frame = store.frame()
    assert frame[frame.stage == 1].n_report.notna().all()


def test_a_cell_says_what_ran_it_and_how_that_was_verified(read_back: Path) -> None:
    store = Store(read_back)
    for cell in store.planned():
        (results,) = (store.path / "cells" / cell.name).glob("results_*.json")
        config = json.loads(results.read_text())["config"]
        steering = config["steering"]
        assert config["model"] == steering["engine"]["name"] == "hf"
        assert steering["fingerprint"] == store.read(cell.key).facts["fingerprint"]
        assert steering["intervention"] == cell.intervention.resolved
        if cell.intervention.is_baseline:
            assert "evidence" not in steering
            continue
        record = json.loads((Path(config["model_args"]["pretrained"]) / "steering.json").read_text())
        evidence = steering["evidence"]
        assert (evidence["kind"], evidence["fingerprint"]) == ("export", record["fingerprint"])
        assert evidence["verified"].startswith("1 prompts,")


def test_status_merge_and_report_take_it_for_a_sweep(read_back: Path, tmp_path: Path) -> None:
    message = status(read_back)
    assert "9        0        0        0" in message and "commands" not in message
    tables = merged([read_back], tmp_path / "tables")
    assert set(tables) == {"metrics.parquet", "metrics.csv", "items.parquet", "items.csv"}
    frame = Store(read_back).frame()
    assert set(frame.control.dropna()) == {0} and set(frame[frame.stage == 2]["items"]) == {"report"}
    reported = compute(read_results(read_back))
    assert not reported.effects.frame.empty and not reported.controls.empty


# --- what is refused --------------------------------------------------------------------------------------------------

Spoil = Callable[[Path, Path], None]


def results_of(folder: Path) -> Path:
    return next(folder.rglob("results_*.json"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def foreign(own: Path, other: Path) -> None:
    shutil.rmtree(own)
    shutil.copytree(other, own)


def fewer(own: Path, other: Path) -> None:
    path = next(own.rglob("samples_small_choice_*.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def other_prompt(own: Path, other: Path) -> None:
    path = next(own.rglob("samples_small_choice_*.jsonl"))
    lines = path.read_text().splitlines()
    sample = json.loads(lines[2])
    sample["arguments"]["gen_args_1"]["arg_0"] += " indeed"
    path.write_text("\n".join([*lines[:2], json.dumps(sample), *lines[3:]]))


def swapped(own: Path, other: Path) -> None:
    path = next(own.rglob("samples_small_choice_*.jsonl"))
    path.write_text(path.read_text().replace('"doc_hash": "', '"doc_hash": "0', 1))


SPOILT: list[tuple[Spoil, str]] = [
    (foreign, "model_args.pretrained is '.*-random0--.*', expected 'deu_Latn-add-mean-x8-product--"),
    (fewer, "the number of items of small_choice is 6, expected 7"),
    (other_prompt, "small_choice, item 2 is .*indeed"),
    (swapped, "task_hashes.small_choice is"),
    (lambda own, _: edit(results_of(own), lambda all_: all_["config"].update(model="vllm")), "config.model is 'vllm'"),
    (
        lambda own, _: edit(results_of(own), lambda all_: all_["config"]["model_args"].update(dtype="float16")),
        "model_args is {'dtype': 'float16'}, expected {}",
    ),
    (
        lambda own, _: edit(results_of(own), lambda all_: all_["versions"].update(small_choice=7)),
        "versions.small_choice is 7",
    ),
    (lambda own, _: results_of(own).write_text('{"results": '), "no results of lm-eval, or cut short"),
    (lambda own, _: next(own.rglob("samples_small_choice_*")).unlink(), "there is none.*--log_samples"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[message for _, message in SPOILT])
def test_wrong_results_are_refused_by_name_and_nothing_else_is_lost(
    spoil: Spoil, message: str, rehearsal: Grid, answered: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    moved(answered, out)
    results = {path.name.split("--")[0]: path for path in (out / "engine" / "results").iterdir()}
    own, other = (results[f"deu_Latn-add-mean-x8-product{end}"] for end in ("", "-random0"))
    spoil(own, other)
    first = sweep(rehearsal, out)
    assert first.exit_code == SOME_FAILED
    store = Store(out)
    failed = {cell.task: store.why(cell) for cell in first.failed}
    assert re.search(message, failed["small_choice"]), failed
    assert "small_choice" in " ".join(commands_of(out)[0])  # to be run again
    assert first.done == 6 - len(failed) and f"failed   {first.failed[0].name}" in status(out)
    shutil.rmtree(own)
    shutil.copytree(answered / "engine" / "results" / own.name, own)
    again = sweep(rehearsal, out)
    assert (again.failed, again.ran) == ([], len(failed))


def test_an_export_that_was_replaced_is_noticed(rehearsal: Grid, answered: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(answered, out)
    record = next((out / "engine" / "exports").glob("*-random0--*/steering.json"))
    edit(record, lambda found: found.update(fingerprint="0" * 64))
    outcome = sweep(rehearsal, out)
    assert (outcome.exit_code, len(outcome.failed)) == (SOME_FAILED, 3)  # `then` included
    for cell in outcome.failed:
        assert cell.intervention.control == 0 and "000, this sweep exported" in Store(out).why(cell)
    assert sorted(path.name.split("--")[0] for path in (out / "cells").iterdir()) == [
        "baseline", "baseline-for-deu_Latn", "deu_Latn-add-mean-x8-product", "deu_Latn-add-mean-x8-product",
    ]  # fmt: skip


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"engine": "sglang"}, "engine.name: .*'vllm'"),
    ({"engine": {"nam": "vllm"}}, "unknown key 'engine.nam'; did you mean 'name'"),
    ({"engine": {"arguments": {"device": "cpu"}}}, "engine.arguments: steered-hf takes its arguments from model"),
    (
        {"engine": "vllm", "model": {"pretrained": "demo", "scoring": "plain"}},
        "model.scoring: vllm does not get it; write what it takes into engine.arguments",
    ),
    ({"engine": {"name": "vllm", "arguments": {"pretrained": "x"}}}, "the sweep says which model is loaded"),
    ({"engine": {"name": "vllm", "arguments": {"seed": "1,2"}}}, "engine.arguments.seed: '1,2' cannot be passed"),
    (
        {
            "engine": {"name": "vllm", "arguments": {"dtype": "float16"}},
            "model": {"pretrained": "demo", "dtype": "auto"},
        },
        "model.dtype auto conflicts with engine.arguments.dtype float16",
    ),
    ({"engine": "vllm", "bootstrap_iters": 10}, "bootstrap_iters: lm_eval's command has 100000 alone"),
    ({"engine": "vllm", "include_path": ["a", "b"]}, "include_path: lm_eval's command takes one folder"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_plan_that_no_engine_can_be_asked_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        build_plan(PLAIN | changes)


STEPS: list[tuple[dict[str, Any], str]] = [
    ({"tasks": ["small_lss"]}, "tasks: small_lss needs steered and unsteered scores of the same rows"),
    (
        {"choose": {"metric": "acc", "seed": 2}, "then": {"tasks": ["small_lss"]}},
        "tasks: small_lss needs steered and unsteered scores",
    ),
    (
        {"interventions": [{"op": "add", "value": "live_max", "scope": "token"}]},
        r"engine hf: deu_Latn-add-live_max \(interventions.0\): step 1 cannot be written into weights: value=live_max",
    ),
    ({"interventions": [{"op": "scale", "factor": 2, "positions": "last"}]}, "positions=last acts on some tokens"),
    ({"interventions": [{"op": "add", "value": "normal"}]}, "value=normal is drawn anew for every token"),
]


@pytest.mark.parametrize(("changes", "message"), STEPS, ids=[message for _, message in STEPS])
def test_what_weights_cannot_say_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, spell: Spell, tmp_path: Path
) -> None:
    grid = spell(PLAIN, **changes, engine="hf")
    for asked in (run_sweep, lambda grid, out: describe(engine_grid(grid), out)):
        with pytest.raises(SteeringError, match=message):
            asked(grid, tmp_path / "run")
    with pytest.raises(SteeringError, match="--shard with engine hf"):
        run_sweep(grid, tmp_path / "run", Shard(0, 2))
    assert not list(tmp_path.iterdir())


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands_for_vllm(spell: Spell, tmp_path: Path) -> None:
    def grid(**arguments: Any) -> Grid:
        engine = {"name": "vllm", "arguments": arguments, "verify": 0, "exports": str(tmp_path / "models")}
        changes = {"tasks": ["small_choice", "small_nats"], "interventions": [{"op": "scale", "factor": 2}]}
        return engine_grid(spell(PLAIN, **changes, engine=engine, limit=3, num_fewshot=0))

    one, out = grid(tensor_parallel_size=4, dtype="float32"), tmp_path / "a folder"
    assert sweep(one, out).exit_code == WAITING
    baseline, steered = commands_of(out)
    (model,) = (tmp_path / "models").iterdir()
    assert baseline[:3] == steered[:3] == ["lm_eval", "--model", "vllm"]
    more = "tensor_parallel_size=4,dtype=float32"
    assert f"pretrained={demo_model()},{more}" in baseline and f"pretrained={model},{more}" in steered
    options = dict(zip(steered[1::2], steered[2::2], strict=False))
    assert options["--tasks"] == "small_choice,small_nats" and options["--batch_size"] == "auto"
    assert (options["--limit"], options["--num_fewshot"]) == ("3", "0")
    assert json.loads(options["--metadata"]) == {"target_language": "deu_Latn"} and steered[-1] == "--log_samples"
    assert {cell.key for cell in one.cells} == {cell.key for cell in grid(dtype="float32").cells}
    for other in (grid(dtype="bfloat16"), spell(PLAIN, tasks=["small_choice", "small_nats"], limit=3, num_fewshot=0)):
        assert not {cell.key for cell in one.cells} & {cell.key for cell in other.cells}
    with pytest.raises(SteeringError, match=r"the sweep of another model .*engine: "):
        sweep(grid(dtype="bfloat16"), out)

    stand_in = tmp_path / "bin" / "lm_eval"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@" | tail -2 | head -1\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    script = ["bash", str(out / "engine" / "run.sh")]
    message = [
        subprocess.run([*script, *number], env=environment, capture_output=True, text=True, check=True).stdout
        for number in ([], ["2"])
    ]
    assert message == [f"{baseline[-2]}\n{steered[-2]}\n", f"{steered[-2]}\n"]
    (out / "engine" / "notes" / f"{model.name}.json").unlink()
    assert "there is something already" in Store(out).why(sweep(one, out).failed[0])
