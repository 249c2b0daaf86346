"""Runs what is missing of a plan: the model is loaded once, and every cell is locked, evaluated, and stored whole."""

from __future__ import annotations

import gc
import os
import platform
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.lmeval.compat import be_quiet, describe_machine_once, failed_metric
from lm_eval_steering.lmeval.unscored import Kept, keep
from lm_eval_steering.neurons.running import launched
from lm_eval_steering.sweep.cells import Cell, Grid, engine_arguments, model_arguments
from lm_eval_steering.sweep.choice import check_choice, choose, groups_of, keep_halves, why_baseline
from lm_eval_steering.sweep.controls import ControlSets
from lm_eval_steering.sweep.damage import bound, forget_others, keep_factors, next_cell, overflowed, resolved, summary
from lm_eval_steering.sweep.estimate import CellLog, Estimate
from lm_eval_steering.sweep.evaluate import StorageFullError, evaluate, store_cell
from lm_eval_steering.sweep.locks import locked, why_unsafe
from lm_eval_steering.sweep.plan import STEERED_HF, PlanError
from lm_eval_steering.sweep.store import Store
from lm_eval_steering.sweep.sweep_model import RankError, SweepLM, SweepModel, is_out_of_memory

DONE, FAILED, BUSY, RUN = "done", "failed", "busy", "run"
OK, SOME_FAILED, WAITING, INTERRUPTED = 0, 1, 3, 130
_PATIENCE = 1.0  # seconds between two looks at cells that other runners are at


@dataclass(frozen=True)
class Shard:
    """A part of a plan: every `number`-th cell, so that each task's cells are divided evenly.

    Attributes:
        index: from 0.
        number: of parts.
    """

    index: int = 0
    number: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `2/8`, the second of eight.

        Raises:
            PlanError: if it is not of that form.
        """
        first, _, number = text.partition("/")
        if not (first.isdecimal() and number.isdecimal() and 1 <= int(first) <= int(number)):
            raise PlanError(f"--shard {text}: expected i/n with i from 1 to n, such as 2/8")
        return cls(int(first) - 1, int(number))

    def of(self, cells: Sequence[Cell], shift: int = 0) -> list[Cell]:
        """This part's cells."""
        return [cell for position, cell in enumerate(cells) if (position + shift) % self.number == self.index]


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        done: cells of this part that are finished, whoever ran them.
        ran: how many of them this run did.
        failed: cells that failed, now or before.
        waiting: what the second stage waits for.
        interrupted: whether a signal ended it.
    """

    done: int = 0
    ran: int = 0
    failed: list[Cell] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 all done, 1 cells failed, 3 waiting for other shards, 130 interrupted."""
        if self.interrupted:
            return INTERRUPTED
        if self.failed:
            return SOME_FAILED
        return WAITING if self.waiting else OK


class SweepRunner:
    """One process (or the processes of one `accelerate launch`) that works on one folder."""

    def __init__(
        self,
        grid: Grid,
        store: Store,
        shard: Shard | None = None,
        retry_failed: bool = False,
        progress: CellLog | None = None,
        load: Callable[..., SweepLM] | None = None,
    ) -> None:
        """Nothing is loaded or written yet.

        Args:
            grid: of the plan.
            store: the folder.
            shard: the part to run; all by default.
            retry_failed: whether cells that failed before are tried again.
            progress: where it says how far it is.
            load: makes the model from its arguments; by default what the plan's engine is.
        """
        self.grid, self.store, self.shard = grid, store, shard or Shard()
        self.ranks = launched()[0]
        self.progress = progress or CellLog(show=self.ranks.first)
        self.outcome = Outcome()
        self._retry, self._load = retry_failed, load
        self._lm: SweepLM | None = None
        self._lost: set[str] = set()  # keys of cells at which the engine died
        self._controls = ControlSets(grid, store, self.ranks)
        self._estimate = Estimate()
        self._ahead: list[Cell] = []
        self._said: set[str] = set()
        self._last_task: tuple[str, str | None] | None = None
        self._total = 0

    # --- the whole --------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Do what is missing; run again, it goes on where it was.

        Raises:
            SteeringError: if the folder is another model's, or cannot be written.
        """
        be_quiet()
        describe_machine_once()
        check_choice(self.grid)
        try:
            if self.grid.is_open:
                self._begin([])
                self._find_factors()
            cells = self.shard.of(self.grid.cells)
            self._begin(cells)
            self._drain(cells)
            self.ranks.after_first(lambda: keep_halves(self.grid, self.store, cells))
            self._drain(self._second_stage())
        except KeyboardInterrupt:
            self.outcome.interrupted = True
        finally:
            self.progress.close()
            self._close()
        return self.outcome

    def _close(self) -> None:
        if self._lm is not None:
            self._lm.close()
            self._lm = None

    def _find_factors(self) -> None:
        """Search for factors of equal damage, and go on with the grid at those.

        Every runner goes through all searches, a shard from another one on, since all of them need all factors.
        """
        searches, failed = list(self.grid.searches), []
        tidied: set[str] = set()

        def tidy(cell: Cell) -> None:
            if cell.key not in tidied:
                tidied.add(cell.key)
                self._tidy([cell])

        first = len(searches) * self.shard.index // self.shard.number
        waiting = searches[first:] + searches[:first]
        self._total = bound(self.grid)
        while waiting:
            waited = True
            for search in list(waiting):
                step = next_cell(self.grid, self.store, search, tidy) if self.ranks.first else None
                curve, cell = self._same(step)
                if cell is None:
                    self.ranks.after_first(partial(keep_factors, self.grid, self.store, search, curve))
                    self.progress.say(summary(curve, search))
                    waiting.remove(search)
                    continue
                self._ahead = [cell] * max(1, self._total - self.outcome.done)  # at most as many
                state = self._attempt(cell)
                waited = waited and state == BUSY
                if state == FAILED and not self._same(overflowed(self.store, cell)):
                    self.outcome.failed.append(cell)
                    failed.append(search)
                    waiting.remove(search)
                elif state != BUSY:
                    self.outcome.done += 1
            if waiting and waited:
                time.sleep(_PATIENCE)
        self.ranks.after_first(lambda: forget_others(self.grid, self.store))
        grid = resolved(self.grid, self.store, failed)
        assert grid is not None, "every search is finished or failed"
        self.grid = grid
        self._total = self.outcome.done + len(self.outcome.failed)

    def _begin(self, cells: Sequence[Cell]) -> None:
        def begin() -> None:
            self.store.begin(self.grid)
            for note in [note for note in self.grid.notes if note not in self._said]:
                self._said.add(note)
                self.progress.say(note)
            if reason := why_unsafe(self.store.path):
                self.progress.say(f"warning: {reason}; run one runner at a time, or one folder per shard")
            self._estimate = Estimate(timing for _, timing in self.store.timing_files())
            self._tidy(cells)
            if mixed := self.store.mixed_versions(cells):
                self.progress.say(mixed)

        self.ranks.after_first(begin)

    def _tidy(self, cells: Sequence[Cell]) -> None:
        """What must be done again is put aside."""
        for line in self.store.put_aside_damaged(cells):
            self.progress.say(line)
        for cell in cells if self._retry else ():
            (self.store.path / "failed" / f"{cell.key}.json").unlink(missing_ok=True)

    def _second_stage(self) -> list[Cell]:
        """Cells of `then` that follow from what is chosen by now; what is not chosen yet is noted."""
        if self.grid.plan.choose is None:
            return []
        then: list[Cell] = []
        for number, group in enumerate(groups_of(self.grid)):
            open_cells = self._same([cell.name for cell in group.needed if not self.store.is_done(cell.key)])
            if open_cells:
                self.outcome.waiting.append(
                    f"{group.name}: {len(open_cells)} cells to choose on are not done, such as {open_cells[0]}"
                )
                continue
            choice = choose(self.grid, self.store, group)
            self.ranks.after_first(partial(self.store.keep, group.file, choice))
            if reason := why_baseline(choice):
                self.progress.say(reason)
            then += self.shard.of([Cell.read(cell) for cell in choice["cells"]], number)
        cells = list({cell.key: cell for cell in then}.values())
        self.ranks.after_first(lambda: self._tidy(cells))
        return cells

    def _drain(self, cells: Sequence[Cell]) -> None:
        """Until each cell is done, here or elsewhere; cells that other runners hold are waited for, or taken over."""
        rest = list(cells)
        self._total += len(cells)
        missing = {cell.key for cell in cells if not self.store.is_done(cell.key)}  # not seen at another runner yet
        while rest:
            waited = True
            for position, cell in enumerate(before := list(rest)):
                self._ahead = before[position:]
                ran = self.outcome.ran
                state = self._attempt(cell)
                if state in (BUSY, DONE) and self.outcome.ran == ran and cell.key in missing:
                    self._estimate.add_elsewhere()
                missing.discard(cell.key)
                if state == BUSY:
                    continue
                waited = False
                rest.remove(cell)
                if state == FAILED:
                    self.outcome.failed.append(cell)
                else:
                    self.outcome.done += 1
            if waited:
                time.sleep(_PATIENCE)

    # --- one cell ---------------------------------------------------------------------------------------------------

    def _attempt(self, cell: Cell) -> str:
        with ExitStack() as stack:
            state = self._same(self._claim(cell, stack) if self.ranks.first else "")
            return self._run(cell) if state == RUN else state

    def _claim(self, cell: Cell, stack: ExitStack) -> str:
        """What is to be done with a cell; its lock is ours where it is to be run."""
        state = self._recorded(cell)
        if state is not None:
            return state
        if not stack.enter_context(locked(self.store.path / "locks" / f"{cell.key}.lock")):
            return BUSY
        return self._recorded(cell) or RUN  # another runner may have finished it in between

    def _recorded(self, cell: Cell) -> str | None:
        if self.store.is_done(cell.key):
            return DONE
        return FAILED if self.store.failure(cell.key) else None

    def _run(self, cell: Cell) -> str:
        done = self.outcome.done + len(self.outcome.failed)
        self.progress.begin(cell, done, self._total, self._estimate.of(self._ahead))
        lm = self._model()  # outside: a model that cannot be loaded is no failure of a cell
        begun, tokens = time.monotonic(), lm.tokens
        try:
            results = self._evaluated(lm, cell)
            seconds, tokens = time.monotonic() - begun, lm.tokens - tokens
            self.ranks.after_first(lambda: self._store(lm, cell, results))
        except StorageFullError:
            raise
        except Exception as error:
            if lm.is_lost:
                self._close()
                if cell.key not in self._lost:  # it may have done nothing wrong; a second time it has
                    self._lost.add(cell.key)
                    self.progress.say(f"{cell.name}: the engine died ({error!r}) and is started anew")
                    return self._run(cell)
                self._fail(cell, error)
                return FAILED
            self._fail(cell, error, lm)
            return FAILED
        self.ranks.after_first(lambda: self._note(cell, lm, seconds, tokens))
        self.progress.end(tokens, seconds)
        self._estimate.add(cell.task, seconds)
        self.outcome.ran += 1
        return DONE

    def _evaluated(self, lm: SweepLM, cell: Cell) -> dict[str, Any] | None:
        control = cell.intervention.control
        neuron_set = self.grid.neuron_set
        if control is not None and not cell.intervention.is_prompt:
            neuron_set = self._controls(control, lm)
        documents = (cell.task, cell.target if self.grid.book.is_targeted(cell.task) else None)
        if documents != self._last_task:
            lm.forget_requests()
            self.grid.book.forget_all_but(*documents)
            self._last_task = documents
        while True:
            try:
                return evaluate(lm, self.grid, cell, neuron_set)
            except Exception as error:
                if not (is_out_of_memory(error) and lm.can_halve):
                    raise
            # Only here is the error gone, whose traceback holds the tensors.
            smaller = lm.halve_batch()
            self.progress.say(f"{cell.name}: out of memory, going on with {smaller} rows per forward pass")

    def _store(self, lm: SweepLM, cell: Cell, results: dict[str, Any] | None) -> None:
        """Store a cell, with every error as one that `after_first` passes to the processes that wait."""
        assert results is not None
        try:
            store_cell(self.store.path / "cells", lm, self.grid, cell, results)
        except SteeringError:
            raise
        except Exception as error:
            raise SteeringError(f"it is evaluated and cannot be written: {error!r}") from error

    def _fail(self, cell: Cell, error: Exception, lm: SweepLM | None = None) -> None:
        """Note why a cell failed, and keep what was generated for it."""
        kept = self._keep_answers(lm, cell, error) if lm is not None else None
        if not self.ranks.first:
            return
        trace = str(error) if isinstance(error, RankError) else traceback.format_exc()
        line = trace.strip().splitlines()[-1] + (f"; {kept.sentence()}" if kept else "")
        self.store.keep(
            f"failed/{cell.key}.json",
            {"cell": cell.name, "error": line, "traceback": trace, "host": socket.gethostname()},
        )
        self.progress.say(f"failed: {cell.name}: {line}")

    def _keep_answers(self, lm: SweepLM, cell: Cell, error: Exception) -> Kept | None:
        """This process's answers of a cell that failed after they were complete, as samples in failed/KEY."""
        book = self.grid.book
        config = {"model": self.grid.plan.engine.name, "model_args": engine_arguments(self.grid)}
        try:
            task, positions = book.task(cell.task, cell.target), self.grid.positions(cell.task, cell.target, cell.items)
            config["steering"] = lm.steering_report()
            folder = self.store.path / "failed" / cell.key
            return keep(folder, [task], config, failed_metric(error.__traceback__), positions)
        except (SteeringError, DidNotHappenError, OSError):
            return None  # it is what the cell failed of

    def _note(self, cell: Cell, lm: SweepLM, seconds: float, tokens: int) -> None:
        """What differs from run to run, apart from the cell's own files."""
        self.store.keep(
            f"timings/{cell.key}.json",
            {
                "cell": cell.name, "task": cell.task, "seconds": round(seconds, 3), "tokens": tokens,
                "batch_size": str(lm.batch_size), "host": socket.gethostname(), "pid": os.getpid(),
                "processes": self.ranks.size, "device": lm.device_name, "python": platform.python_version(),
                "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
        )  # fmt: skip

    def _model(self) -> SweepLM:
        """Loaded when the first cell needs it: a sweep that is done loads nothing."""
        if self._lm is None:
            load = self._load or self._loader()
            arguments = engine_arguments(self.grid)
            lm = self._lm = load(arguments.pop("pretrained"), **arguments)
            self.ranks.after_first(lambda: self.store.check_weights(lm.weights_hash))
        return self._lm

    def _loader(self) -> Callable[..., SweepLM]:
        """What makes the model of the plan's engine."""
        if self.grid.plan.engine.name == STEERED_HF:
            return SweepModel
        from lm_eval_steering.sweep.sweep_engine import SweepEngine

        if not self._controls.are_measured:
            # By hooks, and before the engine takes the device's memory.
            arguments = model_arguments(self.grid.plan)
            self._controls(0, SweepModel(arguments.pop("pretrained"), **arguments))
            gc.collect()
            torch.cuda.empty_cache()
        return SweepEngine

    def _same(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        return self.ranks.gather(value)[0]
