"""Write the task files that differ in one word: `python scripts/generate_tasks.py` (a test says when to run it)."""

from __future__ import annotations

from pathlib import Path

from lm_eval_steering.harness.tasks import demo_languages

TASKS = Path(__file__).parents[1] / "tasks"
# family -> the argument of its dataset function that names the language
DEMO = {"continuation": "evaluated", "perplexity": "evaluated", "lss": "base"}


def files() -> dict[Path, str]:
    """Path and content of every generated file."""
    return {
        TASKS / "demo" / f"{family}_{code}.yaml": (
            f"include: _{family}.yaml\ntask: steering_demo_{family}_{code}\ndataset_kwargs: {{{argument}: {code}}}\n"
        )
        for family, argument in DEMO.items()
        for code in demo_languages()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
