"""What a long run shows while it lasts, and what it leaves beside its result: bars, times, the machine."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_eval_steering.files import write_json

_QUIET_INTERVAL = 30.0  # seconds between lines where the bars go to a file


class Log:
    """Progress on the screen, and a record of times that is written to NAME.log.json.

    Attributes:
        show: whether anything is shown.
        entries: what was noted, in order.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self.entries: list[dict[str, Any]] = []
        self.started = datetime.now(UTC)
        self._clock = time.perf_counter()

    def bar(self, name: str, total: int, unit: str, level: int = 0) -> tqdm[Any]:
        """A bar with its rate and the time left; `level` 1 stands below another one and goes when it is full."""
        interval = 0.1 if sys.stderr.isatty() else _QUIET_INTERVAL
        return tqdm(
            total=total, desc=name, unit=f" {unit}", unit_scale=unit == "tok", disable=not self.show,
            position=level, leave=level == 0, mininterval=interval, dynamic_ncols=True,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """One line for the user, beside the bars."""
        if self.show:
            tqdm.write(text, file=sys.stderr)

    def note(self, what: str, **values: Any) -> None:
        """Keep a fact for the log file."""
        self.entries.append({"what": what, **values})

    @contextmanager
    def timed(self, what: str, **values: Any) -> Iterator[dict[str, Any]]:
        """Note how long something took; what is added to the dictionary is noted too."""
        start = time.perf_counter()
        extra: dict[str, Any] = {}
        yield extra
        self.note(what, seconds=round(time.perf_counter() - start, 3), **values, **extra)

    def write(self, result: Path) -> None:
        """Write NAME.log.json beside a result: dates, times and the machine, which the result itself leaves out."""
        content = {
            "result": result.name,
            "command": shlex.join(sys.argv),
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._clock, 3),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "steps": self.entries,
        }
        write_json(result.with_name(f"{result.stem}.log.json"), content)


def readable_seconds(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
