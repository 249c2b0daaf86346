"""Open generation (Tang et al. 2024): mVicuna's questions with the request to answer in the language of the question.

The paper deactivates a language's neurons and reads what the model still writes in it. Which language that is, and how
much of it repeats itself, is counted here; the paper let GPT-4 judge it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.expected_language import EXPECTED_LANGUAGE
from lm_eval_steering.lmeval.sources import as_dataset
from lm_eval_steering.lmeval.task_families import group_file, task_file, task_name
from lm_eval_steering.lmeval.task_families.common import MVICUNA, keeps_to_its_file
from lm_eval_steering.lmeval.task_families.questions import mvicuna

NEEDS = "mVicuna in local files (data/ of github.com/RUCAIBox/Language-Specific-Neurons)"
# As the paper's script appends them, with the blank before those that are written with blanks.
INSTRUCTIONS = {
    "zho_Hans": "请用中文回答。",
    "eng_Latn": " Answer in English.",
    "fra_Latn": " Veuillez répondre en français.",
    "spa_Latn": " Por favor responda en español.",
    "ind_Latn": " Tolong dijawab dalam bahasa Indonesia.",
    "jpn_Jpan": "日本語で答えてください。",
    "vie_Latn": " Hãy trả lời bằng tiếng Việt.",
}
METRICS = ("lang_expected", "lfs", "lfs_clean", "lang_unknown", "degenerate")


@keeps_to_its_file
def documents(evaluated: str, **settings: Any) -> dict[str, Any]:
    """Questions with the answer instruction, in the paper's form."""
    if evaluated not in INSTRUCTIONS:
        raise SteeringError(f"mVicuna is not in {evaluated}; its languages: {', '.join(INSTRUCTIONS)}")
    return as_dataset(
        {
            "id": str(number),
            "question": question,
            "prompt": f"Q: {question}{INSTRUCTIONS[evaluated]}\nA:",
            "language": evaluated,
            EXPECTED_LANGUAGE: evaluated,
        }
        for number, question in enumerate(mvicuna(evaluated, settings))
    )


def generated_files() -> dict[Path, str]:
    """Path and text of the task files."""
    return dict(_files())


def _files() -> Iterable[tuple[Path, str]]:
    names = {code: task_name("open_generation", code) for code in MVICUNA}
    yield group_file("open_generation", "steering_open_generation", list(names.values()), METRICS)
    for code, name in names.items():
        yield task_file("open_generation", "_open_generation.yaml", name, evaluated=code)
