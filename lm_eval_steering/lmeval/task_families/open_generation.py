"""Open generation: mVicuna's questions, or nothing at all, and the language of what the model writes.

`steering_open_generation_*` (Tang et al. 2024) are questions with the request to answer in the question's language. The
paper deactivates a language's neurons and reads what the model still writes in it. Which language that is, and how much
of it repeats itself, is counted here; the paper let GPT-4 judge it.

`steering_open_generation_sampled` (Andrylie et al. 2025, SAE-LAPE, text_generation.py) goes on from an empty prompt:
100 samples of 256 tokens with the seeds 0, 1, ..., and temperature and top-p of Llama 3.2's generation config, which
the script leaves to the model. A seed belongs to its sample alone: the text does not depend on batch, order or process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.expected_language import ABOUT_LANGUAGE, EXPECTED_LANGUAGE
from lm_eval_steering.lmeval.sources import as_dataset
from lm_eval_steering.lmeval.task_families import group_file, task_file, task_name
from lm_eval_steering.lmeval.task_families.common import MVICUNA, keeps_to_its_file
from lm_eval_steering.lmeval.task_families.questions import mvicuna
from lm_eval_steering.metrics.output_language import TARGET

NEEDS = "mVicuna in local files (data/ of github.com/RUCAIBox/Language-Specific-Neurons); `sampled`: nothing"
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
SAMPLES = 100  # of the empty prompt


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


@keeps_to_its_file
def sampled_documents(**settings: Any) -> dict[str, Any]:
    """The empty prompt, once for each seed.

    Settings: `samples`, their number (100). An item expects no language: `lfs` is about the steered one.

    Raises:
        SteeringError: for a number of samples that is none.
    """
    given = settings.get("samples", SAMPLES)
    if isinstance(given, bool) or not str(given).isdecimal() or int(given) == 0:
        raise SteeringError(f"samples={given!r}: expected a number above 0")
    return as_dataset(
        {"id": f"seed-{seed}", "prompt": "", "seed": seed, EXPECTED_LANGUAGE: None, ABOUT_LANGUAGE: TARGET}
        for seed in range(int(given))
    )


def generated_files() -> dict[Path, str]:
    """Path and text of the task files."""
    return dict(_files())


def _files() -> Iterable[tuple[Path, str]]:
    names = {code: task_name("open_generation", code) for code in MVICUNA}
    yield group_file("open_generation", "steering_open_generation", list(names.values()), METRICS)
    for code, name in names.items():
        yield task_file("open_generation", "_open_generation.yaml", name, evaluated=code)
    yield task_file("open_generation", "_sampled.yaml", "steering_open_generation_sampled", variant="sampled")
