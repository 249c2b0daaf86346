"""lm-eval asks git for the commit of the working directory; outside a repository git complains on stderr.

Written for lm-eval 0.4.13, whose `evaluator.get_git_commit_hash` starts `git describe` with our stderr. Nothing is
patched: the function is called once with stderr closed, and `describe_machine_once` keeps what it returned. lm-eval
would need to pass `stderr=subprocess.DEVNULL`.
"""

from __future__ import annotations

import os
import sys


def look_up_commit_quietly() -> None:
    """Call the function once, without git's `fatal: not a git repository`; later calls take its cached result."""
    from lm_eval import evaluator

    sys.stderr.flush()
    kept, silent = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)  # of the process, not `sys.stderr`: git writes to the descriptor
        evaluator.get_git_commit_hash()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silent)
