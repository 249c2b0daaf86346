"""Commands one after another in one process, each from its own entry point, and processes to kill.

Most of an `lm_eval` command's time goes into imports, once here, and into reading the YAML files of its own 14,000
tasks, which are left out. What depends on a process of its own or on those tasks is tested in another way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

_COMMANDS = """
import json, sys
from pathlib import Path
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks.manager import TaskIndex
from lm_eval_steering.cli import app
build = TaskIndex.build
own = Path(lm_eval.tasks.__file__).parent
TaskIndex.build = staticmethod(lambda paths: build([path for path in paths if path != own]))
for command in json.loads(sys.argv[1]):
    sys.argv = command
    if command[0] == "lm_eval":
        cli_evaluate()
    else:
        app(standalone_mode=False)
"""

# tqdm's own lock is one for all processes, and stays held where one is killed that has it. A thread may hold this one
# at the moment of a fork, so each child gets its own.
tqdm.set_lock(threading.RLock())


def run_together(
    *commands: Sequence[str | Path], cwd: Path | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """What they print, all of them; the first that fails ends it, and one must fail where `fails` says so."""
    listed = json.dumps([[str(part) for part in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, listed], capture_output=True, text=True, cwd=cwd, env=os.environ, check=False
    )
    assert (done.returncode != 0) is fails, done.stderr[-3000:]
    return done


def forked(work: Callable[[], int]) -> int:
    """Number of a process that does something and exits with its code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)  # PyTorch's own pool, made anew here and not by two threads that load weights at once
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work()
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)


def ended(pid: int) -> int:
    """Exit code of a forked process; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
