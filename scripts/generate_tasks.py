"""Write the task files that differ in a few words: `python scripts/generate_tasks.py` (a test says when to run it).

Each module under lm_eval_steering/lmeval/task_families says which files it has (`generated_files()`); the shared
templates, whose names begin with an underscore, are written by hand.
"""

from __future__ import annotations

from pathlib import Path

from lm_eval_steering.lmeval import task_families as families
from lm_eval_steering.lmeval.task_families.demo import demo_languages

TASKS = Path(__file__).parents[1] / "tasks"
# family -> the argument of its dataset function that names the language
DEMO = {"continuation": "evaluated", "perplexity": "evaluated", "lss": "base"}


def demo_files() -> dict[Path, str]:
    return {
        TASKS / "demo" / f"{family}_{code}.yaml": (
            f"include: _{family}.yaml\ntask: steering_demo_{family}_{code}\ndataset_kwargs: {{{argument}: {code}}}\n"
        )
        for family, argument in DEMO.items()
        for code in demo_languages()
    }


def files() -> dict[Path, str]:
    """Path and content of every generated file."""
    return demo_files() | {TASKS / path: text for path, text in families.generated_files().items()}


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
