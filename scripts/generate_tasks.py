"""Write the task files that differ in a few words: `python scripts/generate_tasks.py` (a test says when to run it).

Each module under lm_eval_steering/lmeval/task_families says which files it has (`generated_files()`); the shared
templates, whose names begin with an underscore, are written by hand.
"""

from __future__ import annotations

from lm_eval_steering.lmeval.task_families import generated_files
from lm_eval_steering.resources import tasks_folder

if __name__ == "__main__":
    for path, text in generated_files().items():
        target = tasks_folder() / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
