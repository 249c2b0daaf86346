"""A sweep that an engine runs: interventions are exported, lm-eval's commands written, and their results read back.

runs/x/engine/commands.txt      one command a line: an exported model and all its tasks
              run.sh            runs them, or the one whose number it is given
              exports/          the models (`engine.exports` names another folder)
              notes/            fingerprint and verification of each
              samples/          items of each task where a run has not all of them
              results/RUN/      what lm-eval writes; the next run of the sweep makes cells of it
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.files import write_bytes
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.sweep.cells import (
    ALL,
    Cell,
    Grid,
    PlannedIntervention,
    declared_model,
    model_arguments,
    options_of,
)
from lm_eval_steering.sweep.choice import check_choice
from lm_eval_steering.sweep.engine_exports import Exports, prompts_of
from lm_eval_steering.sweep.engine_items import Item, items_of, positions, prepared, wants_hooks
from lm_eval_steering.sweep.engine_results import PLACE, Asked, answer_of, check
from lm_eval_steering.sweep.engine_store import store_answer
from lm_eval_steering.sweep.estimate import CellLog
from lm_eval_steering.sweep.evaluate import StorageFullError
from lm_eval_steering.sweep.locks import locked
from lm_eval_steering.sweep.plan import PlanError
from lm_eval_steering.sweep.runner import DONE, FAILED, Outcome, SweepRunner
from lm_eval_steering.sweep.store import MISSING, Store

_OPTIONS = ("batch_size", "max_batch_size", "device")  # lm-eval's command hands these to the model class itself
_SCRIPT = """#!/bin/bash
# Runs the lines of commands.txt, one after another, or the one whose number is given:
#     bash run.sh 3        sbatch --array=1-{count} --gpus=1 run.sh
commands={commands}
number=${{1:-${{SLURM_ARRAY_TASK_ID:-}}}}
if [ -n "$number" ]; then
    bash -c "$(sed -n "${{number}}p" "$commands")"
    exit
fi
failed=0
while IFS= read -r line <&3; do
    bash -c "$line" || failed=1
done 3< "$commands"
exit $failed
"""


class EngineGrid(Grid):
    """A grid whose cells an engine runs: they are other cells than those of `steered-hf`."""

    @cached_property
    def model(self) -> dict[str, Any]:
        """What is known of the model before it is loaded, and what runs it."""
        engine = self.plan.engine
        deciding = {key: value for key, value in engine.arguments.items() if key not in PLACE}
        return declared_model(self.plan) | {"engine": {"name": engine.name, **deciding}}


def engine_grid(grid: Grid) -> Grid:
    """The grid as the plan's engine has it; as it is where the engine is `steered-hf`."""
    if not grid.plan.engine.is_external or isinstance(grid, EngineGrid):
        return grid
    own = EngineGrid(grid.plan, grid.book, grid.neuron_set, grid.interventions, notes=list(grid.notes))
    codes = {code for planned in grid.interventions for code in planned.languages}
    own.cells = own._product(grid.interventions, grid.plan.tasks, 1, codes)
    return own


@dataclass(frozen=True)
class Run:
    """What one command evaluates: one model on some tasks.

    Attributes:
        intervention: which one, or the baseline.
        target: language that the documents are made for.
        items: `all` or `report`.
        cells: one a task.
    """

    intervention: PlannedIntervention
    target: str | None
    items: str
    cells: tuple[Cell, ...]

    def name(self, grid: Grid) -> str:
        """Folder of its results: the same whatever the tasks are, so that a plan can grow."""
        seed = self.intervention.control
        control = None if seed is None else {"seed": seed, "calibration": grid.calibration}
        mark = fingerprint(
            {
                "model": grid.model, "neurons": grid.neuron_set.content_hash(), "control": control,
                "intervention": self.intervention.resolved, "options": options_of(grid.plan),
            }
        )  # fmt: skip
        parts = [self.intervention.name[:120], self.target if self.intervention.is_baseline else None]
        parts.append(None if self.items == ALL else self.items)
        return f"{'-'.join(part for part in parts if part)}--{mark[:10]}"


def runs_of(cells: Iterable[Cell]) -> list[Run]:
    """Cells put together, so that lm-eval starts once for all tasks of an intervention."""
    found: dict[tuple[str, str | None, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.intervention.name, cell.target, cell.items), []).append(cell)
    return [Run(own[0].intervention, target, items, tuple(own)) for (_, target, items), own in found.items()]


def refuse(grid: Grid, store: Store) -> None:
    """Refuse a plan that its engine cannot run; nothing is written.

    Raises:
        SteeringError: naming the task or the intervention.
    """
    name = grid.plan.engine.name
    store.check(grid)
    check_choice(grid)
    for cell in [*grid.cells, *grid.then_cells(grid.candidates())]:
        if wants_hooks(grid, cell):
            raise PlanError(
                f"engine {name}: tasks: {cell.task} needs steered and unsteered scores of the same rows, which hooks "
                "alone give; put it into a plan of its own without engine (steered-hf)"
            )
    Exports(grid, store).refuse()


class EngineRunner(SweepRunner):
    """Reads what results there are, and exports and writes commands for the rest."""

    def __init__(self, grid: Grid, store: Store, progress: CellLog | None = None) -> None:
        super().__init__(engine_grid(grid), store, progress=progress)
        self.exports = Exports(self.grid, store)
        self._folder = store.path.absolute() / "engine"
        self._items: dict[tuple[str, str | None, str], dict[int, Item]] = {}
        self._open: list[Cell] = []

    def run(self) -> Outcome:
        """Read results back, and write commands for the cells that have none.

        Raises:
            SteeringError: if the engine cannot run the plan, or the folder is another model's; nothing was written.
        """
        if self.ranks.size > 1:
            raise PlanError(f"engine {self.grid.plan.engine.name}: run one process; its commands are dealt to GPUs")
        refuse(self.grid, self.store)
        with locked(self.store.path / "locks" / "engine.lock") as free:
            if not free:
                raise SteeringError(f"{self.store.path}: another process is reading results or exporting; wait for it")
            super().run()
            try:
                if not self.outcome.interrupted:
                    self._hand_out()
            except KeyboardInterrupt:
                self.outcome.interrupted = True
        return self.outcome

    # --- reading ------------------------------------------------------------------------------------------------

    def _drain(self, cells: Sequence[Cell]) -> None:
        """Make cells of the results that are there."""
        for run in runs_of(cells):
            for cell in run.cells:
                state = DONE if self.store.is_done(cell.key) else self._read(run, cell)
                if state == DONE:
                    self.outcome.done += 1
                    continue
                self._open.append(cell)
                if state == FAILED:
                    self.outcome.failed.append(cell)

    def _read(self, run: Run, cell: Cell) -> str:
        (self.store.path / "failed" / f"{cell.key}.json").unlink(missing_ok=True)
        try:
            answer = answer_of(self._folder / "results" / run.name(self.grid), cell.task)
            if answer is None:
                return MISSING
            asked = self._asked(run.intervention)
            version = (prepared(self.grid, cell).config.metadata or {}).get("version")
            check(answer, self.grid.plan, cell.task, asked, self._items_of(cell), version)
            store_answer(self.store.path / "cells", self.grid, cell, answer, asked)
        except StorageFullError:
            raise
        except Exception as error:
            self._fail(cell, error)
            return FAILED
        self.outcome.ran += 1
        return DONE

    def _asked(self, planned: PlannedIntervention) -> Asked:
        if planned.is_baseline:
            return Asked(self._arguments(planned))
        note = self.exports.note(planned)
        if note is None:
            raise SteeringError(f"{planned.name}: there are results, and this sweep has not exported that model")
        return Asked(self._arguments(planned), note["export"], note["verified"])

    def _items_of(self, cell: Cell) -> dict[int, Item]:
        place = (cell.task, cell.target if self.grid.book.is_targeted(cell.task) else None, cell.items)
        if place not in self._items:
            self._items[place] = items_of(self.grid, cell, self._template)
        return self._items[place]

    @cached_property
    def _template(self) -> Any:
        """Puts messages into the chat template, as lm-eval's models do; None where the plan asks for none."""
        if not self.grid.plan.apply_chat_template:
            return None
        tokenizer = self.exports.loader().model().tokenizer

        def apply(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                tokenizer.apply_chat_template(
                    history, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip

        return apply

    # --- handing out --------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Export what is to be run, and write its commands."""
        commands: list[str] = []
        for run in runs_of(self._open):
            if self._exported(run):
                commands.append(self._command(run))
        path, script = self._folder / "commands.txt", self._folder / "run.sh"
        if self._open or path.exists():
            write_bytes(path, "".join(f"{command}\n" for command in commands).encode())
            text = _SCRIPT.format(count=max(len(commands), 1), commands=shlex.quote(str(path)))
            write_bytes(script, text.encode())
        failed = {cell.key for cell in self.outcome.failed}
        if left := [cell for cell in self._open if cell.key not in failed]:
            self.outcome.waiting.insert(
                0, f"{self.grid.plan.engine.name}: {len(left)} cells have no results; {len(commands)} commands, "
                f"bash {script} runs them"
            )  # fmt: skip

    def _exported(self, run: Run) -> bool:
        """Whether the run's model is there, made now where it was not; why not is noted with its cells."""
        planned, control = run.intervention, run.intervention.control
        try:
            if planned.is_baseline or self.exports.is_made(planned):
                return True
            if control is None:
                neurons = self.grid.neuron_set
            else:
                measured = self.grid.plan.controls.calibration is not None
                neurons = self._controls(control, self._model() if measured else None)
            said = self.exports.make(planned, neurons, self._prompts)
        except StorageFullError:
            raise
        except SteeringError as error:
            for cell in run.cells:
                self._fail(cell, error)
            self.outcome.failed += [cell for cell in run.cells if cell not in self.outcome.failed]
            return False
        self.progress.say(f"exported {planned.name}: {said}")
        return True

    @cached_property
    def _prompts(self) -> tuple[str, ...]:
        """Texts of the plan's own tasks, to compare hooks and exports on."""
        return prompts_of(self._texts(), self.grid.plan.engine.verify)

    def _texts(self) -> Iterator[str]:
        for cell in self.grid.cells:
            for item in self._items_of(cell).values():
                yield "".join(item.texts[0])

    def _arguments(self, planned: PlannedIntervention) -> dict[str, Any]:
        """Arguments of the engine's model class."""
        plain = model_arguments(self.grid.plan)
        named, folder = plain["pretrained"], Path(plain["pretrained"])
        found = {key: str(plain[key]) for key in ("revision", "dtype") if plain.get(key)}
        if not planned.is_baseline:
            named, _ = str(self.exports.path(planned)), found.pop("revision", None)
        elif folder.is_dir():
            named = str(folder.absolute())
        return {"pretrained": named} | found | dict(self.grid.plan.engine.arguments)

    def _command(self, run: Run) -> str:
        plan, name = self.grid.plan, run.name(self.grid)
        arguments = self._arguments(run.intervention)
        # vLLM makes its own batches.
        options = {"batch_size": plan.model.batch_size if plan.engine.name == "hf" else "auto"}
        options |= {key: arguments.pop(key) for key in _OPTIONS if key in arguments}
        words = ["lm_eval", "--model", plan.engine.name]
        words += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
        words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        words += ["--tasks", ",".join(cell.task for cell in run.cells)]
        if metadata := {**plan.metadata, **({"target_language": run.target} if run.target else {})}:
            words += ["--metadata", json.dumps(metadata)]
        for option in ("limit", "num_fewshot", "system_instruction"):
            if (value := getattr(plan, option)) is not None:
                words += [f"--{option}", str(value)]
        if plan.apply_chat_template:
            words += ["--apply_chat_template", "--fewshot_as_multiturn", "false"]
        if plan.gen_kwargs:
            words += ["--gen_kwargs", json.dumps(dict(plan.gen_kwargs))]
        for folder in plan.include_path:
            words += ["--include_path", str(Path(folder).absolute())]
        if chosen := {cell.task: found for cell in run.cells if (found := positions(self.grid, cell)) is not None}:
            place = f"engine/samples/{name}.json"
            self.store.keep(place, chosen)
            words += ["--samples", str(self.store.path.absolute() / place)]
        words += ["--output_path", str(self._folder / "results" / name), "--log_samples"]
        command = shlex.join(words)
        if "\n" in command:
            raise PlanError("engine: a line break, as in system_instruction, cannot stand in commands.txt; take it out")
        return command
