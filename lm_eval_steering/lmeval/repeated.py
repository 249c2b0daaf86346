"""For many evaluations in one process: what lm-eval says and looks up at each of them."""

from __future__ import annotations

import logging
from functools import cache


def be_quiet() -> None:
    """Errors alone: what lm-eval says at every evaluation would bury our own lines."""
    for name in ("lm_eval", "transformers", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def look_up_the_machine_once() -> None:
    """lm-eval describes the machine and its checkout anew in each result file, half a second each time."""
    from lm_eval import evaluator
    from torch.utils import collect_env

    for module, name in ((collect_env, "get_pretty_env_info"), (evaluator, "get_git_commit_hash")):
        if not hasattr(getattr(module, name), "cache_info"):
            setattr(module, name, cache(getattr(module, name)))
