"""Compiled engines in a process each: `python -m tests.vllm.one_engine MODEL TOKENIZER plain steered`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import lm_eval_steering.vllm.model  # noqa: F401  imported once, before the forks
from tests.vllm.conftest import MODES, running, tiny_set, words

STEERED: dict[str, Any] = {"language": "fra_Latn", "op": "scale", "factor": 3}


def one(kind: str, pretrained: str, tokenizer: str) -> None:
    """Print the scores that one engine gives."""
    with running(kind, MODES["compiled"], pretrained, tokenizer=tokenizer, max_model_len=64) as lm:
        if kind == "steered":
            lm.intervene(tiny_set(pretrained, "llama"), **STEERED)
        scores = [score[0] for score in lm.loglikelihood(words(), disable_tqdm=True)]
        print("SCORES", json.dumps(scores), flush=True)


def main(pretrained: str, tokenizer: str, *kinds: str) -> int:
    for kind in kinds:
        pid = os.fork()
        if not pid:
            one(kind, pretrained, tokenizer)
            sys.stdout.flush()
            os._exit(0)
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            return code
        print("AFTER", kind, flush=True)
        sys.stdin.readline()  # the test looks at the folder
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
