"""Language forcing (Gurgurov et al. 2025): a question in one language, and which language the answer is in.

`lfs` is the share of answers in the steered language, `lang_expected` the share that stay in the question's. Where the
two are the same language both count the same; the paper keeps that diagonal in its mean, so a group does too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.expected_language import ABOUT_LANGUAGE, EXPECTED_LANGUAGE
from lm_eval_steering.lmeval.sources import as_dataset
from lm_eval_steering.lmeval.task_families import group_file, language_tag, task_file, task_name
from lm_eval_steering.lmeval.task_families.common import CLAS_BENCH, MVICUNA, keeps_to_its_file
from lm_eval_steering.lmeval.task_families.questions import QUESTIONS, everyday_languages
from lm_eval_steering.metrics.output_language import TARGET

NEEDS = "nothing (our own questions); variants: DGurgurov/CLaS-Bench (hub) or local files, mVicuna in local files"
# Variant -> whose questions. `plain` asks without `Q:` and `A:`, for chat models with --apply_chat_template.
VARIANTS = {"": "everyday", "plain": "everyday", "mvicuna": "mvicuna", "clas_bench": "clas_bench"}
METRICS = ("lfs", "lfs_clean", "lang_expected", "lang_unknown", "degenerate")


@keeps_to_its_file
def documents(evaluated: str, variant: str = "", **settings: Any) -> dict[str, Any]:
    """Questions in one language."""
    if variant not in VARIANTS:
        raise SteeringError(f"variant={variant!r}: expected one of {', '.join(VARIANTS)}")
    questions = QUESTIONS[VARIANTS[variant]](evaluated, settings)
    return as_dataset(
        # What the answer is to be is the steered language; that it stays in the question's is worth a metric too.
        {
            "id": str(number),
            "question": question,
            "language": evaluated,
            EXPECTED_LANGUAGE: evaluated,
            ABOUT_LANGUAGE: TARGET,
        }
        for number, question in enumerate(questions)
    )


def generated_files() -> dict[Path, str]:
    """Path and text of the task files."""
    return dict(_files())


def _files() -> Iterable[tuple[Path, str]]:
    covered = {"everyday": everyday_languages(), "mvicuna": MVICUNA, "clas_bench": CLAS_BENCH}
    for variant, whose in VARIANTS.items():
        ending = (variant,) if variant else ()
        template = "_plain.yaml" if variant == "plain" else "_forcing.yaml"
        names = {code: task_name("forcing", code, *ending) for code in covered[whose]}
        yield group_file("forcing", "_".join(["steering_forcing", *ending]), list(names.values()), METRICS)
        for code, name in names.items():
            tag = None if variant else language_tag(code)
            metadata = {"variant": variant} if variant else {}
            yield task_file("forcing", template, name, tag, evaluated=code, **metadata)
