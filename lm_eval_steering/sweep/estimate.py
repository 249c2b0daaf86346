"""What a runner prints while it works, and how long the rest will take."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from lm_eval_steering.progress import readable_seconds
from lm_eval_steering.sweep.cells import Cell


class Estimate:
    """Seconds that cells take, from those already run: of the same task where there are some, else of any task.

    Runners on one folder share its cells as they did so far.
    """

    def __init__(self, timings: Iterable[Mapping[str, Any]] = ()) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._here, self._elsewhere = 0, 0
        for timing in timings:
            self._take(str(timing["task"]), float(timing["seconds"]))

    def add(self, task: str, seconds: float) -> None:
        """Take one more cell into account, which was run here."""
        self._here += 1
        self._take(task, seconds)

    def add_elsewhere(self) -> None:
        """Another runner has, or had, a cell that was missing when this one began."""
        self._elsewhere += 1

    def _take(self, task: str, seconds: float) -> None:
        self._seconds.setdefault(task, []).append(seconds)

    def of(self, cells: Iterable[Cell]) -> float | None:
        """Seconds until some cells are done; None where nothing was run yet."""
        everything = [seconds for of_task in self._seconds.values() for seconds in of_task]
        if not everything:
            return None
        means = {task: sum(of_task) / len(of_task) for task, of_task in self._seconds.items()}
        rest = sum(everything) / len(everything)
        share = self._here / (self._here + self._elsewhere) if self._here else 1.0
        return share * sum(means.get(cell.task, rest) for cell in cells)


class CellLog:
    """One line per cell: a log where the output is a file, one line that changes on a terminal."""

    def __init__(self, show: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._show, self._moving = show, self._stream.isatty()
        self._tokens, self._busy = 0, 0.0

    def begin(self, cell: Cell, done: int, total: int, left: float | None) -> None:
        """A cell begins: say which, how many are done, how fast it goes and how long the rest takes."""
        parts = [f"[{done}/{total}] {cell.name}"]
        if self._busy:
            parts.append(f"{self._tokens / self._busy:,.0f} tokens/s")
        if left is not None:
            parts.append(f"{readable_seconds(left)} left")
        self._write(", ".join(parts), moving=self._moving)

    def end(self, tokens: int, seconds: float) -> None:
        """A cell is done."""
        self._tokens, self._busy = self._tokens + tokens, self._busy + seconds

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(text, moving=False)

    def close(self) -> None:
        """Take the moving line away."""
        self._write("", moving=True)

    def _write(self, text: str, moving: bool) -> None:
        if not self._show:
            return
        if self._moving:
            self._stream.write("\r\x1b[K")
        self._stream.write(text if moving else f"{text}\n")
        self._stream.flush()
