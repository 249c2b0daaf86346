"""CLaS-Bench (Gurgurov et al. 2026): 70 questions in one of 32 languages, answers steered to another.

`clas_language` is the share of answers in the steered language by NLLB's identifier lid218e, whose best guess counts
however doubtful, as in the benchmark. `clas_relevance` is a judge model's opinion (`lmeval.judge`; without a judge it
and the score are absent), `clas_score` the harmonic mean of both. Every pair of the 32 languages can be run: a task is
the question's language, the model's target is the other one. The groups `t1` to `t3` are the tracks of the shared task
CLaS at SemEval-2027: their pairs, one target language a run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError, UndefinedForLanguageError
from lm_eval_steering.lmeval.expected_language import ABOUT_LANGUAGE, EXPECTED_LANGUAGE
from lm_eval_steering.lmeval.judge import Judge, JudgeError, mean_relevance
from lm_eval_steering.lmeval.sources import as_dataset
from lm_eval_steering.lmeval.task_families import demo as tasks
from lm_eval_steering.lmeval.task_families import group_file, task_file, task_name
from lm_eval_steering.lmeval.task_families.common import (
    CLAS_BENCH,
    CLAS_HIGH,
    CLAS_LOW,
    keeps_to_its_file,
    language_metrics,
)
from lm_eval_steering.lmeval.task_families.questions import clas_bench
from lm_eval_steering.metrics.language_id import LanguageIdentifier, in_language
from lm_eval_steering.metrics.likelihood import MADE_FOR
from lm_eval_steering.metrics.output_language import TARGET

log = logging.getLogger("lm_eval.steering")

NEEDS = "DGurgurov/CLaS-Bench (hub) or local files; lid218e; for relevance an OpenAI-compatible endpoint"
METRICS = ("clas_language", "clas_relevance", "clas_score", "lfs", "lang_unknown", "degenerate")
UNDEFINED = "undefined"  # a document with this key stands for a pair that the track leaves out
IDENTIFIER = "lid218e"


@dataclass(frozen=True)
class PromptVariant:
    """Which pairs, and how the questions are put.

    Attributes:
        sources: languages of the questions.
        targets: languages that a run may steer to.
        instruction: whether the prompt asks, in English, for the target language.
        same: whether a question in the target language itself is asked.
    """

    sources: tuple[str, ...] = CLAS_BENCH
    targets: tuple[str, ...] = ()
    instruction: bool = False
    same: bool = True


VARIANTS = {
    "": PromptVariant(),
    "instruction": PromptVariant(instruction=True),
    "t1": PromptVariant(CLAS_HIGH, CLAS_HIGH, same=False),
    "t2": PromptVariant(CLAS_HIGH, CLAS_LOW),
    "t3": PromptVariant((*CLAS_HIGH, *CLAS_LOW), ("jpn_Jpan", "rus_Cyrl", "deu_Latn"), same=False),
}
_failed: set[str] = set()  # judges that went away in this process: one error each, not one an answer


@keeps_to_its_file
def documents(evaluated: str, variant: str = "", **settings: Any) -> dict[str, Any]:
    """Questions in one language for one steered language.

    Settings: `clas_identifier` (lid218e; or another name or path), and those of `Judge.from_settings`. The variant
    `instruction` asks in English to answer in the steered language: the benchmark's baseline by prompting. The tracks
    leave out the pair of a language with itself: its cell stays blank, with a warning.

    Raises:
        SteeringError: before anything is generated, for an identifier that is not at hand or does not know the steered
            language, for a judge that does not answer, and for a language that is no target of the track.
    """
    if variant not in VARIANTS:
        raise SteeringError(f"variant={variant!r}: expected one of {', '.join(VARIANTS)}")
    chosen = VARIANTS[variant]
    target = tasks.steered_language(settings, f"CLaS-Bench from {evaluated}")
    if chosen.targets and target not in chosen.targets:
        raise UndefinedForLanguageError(
            f"track {variant} of CLaS-Bench steers to {', '.join(chosen.targets)}; found {target}"
        )
    if target == evaluated and not chosen.same:
        return _blank(variant, target)
    name = str(settings.get("clas_identifier") or IDENTIFIER)
    require_identifier(name, target)
    judge = Judge.from_settings(settings)
    if judge is not None:
        judge.require()
    request = f" Respond in {languages.english_name(target)}." if chosen.instruction else ""
    return as_dataset(
        {
            "id": str(number),
            "question": question,
            "prompt": question + request,
            "language": evaluated,
            EXPECTED_LANGUAGE: target if chosen.instruction else None,
            ABOUT_LANGUAGE: TARGET,
            MADE_FOR: [target],
            UNDEFINED: False,
            "clas_identifier": name,
            "judge": json.dumps(vars(judge)) if judge else "",
        }
        for number, question in enumerate(clas_bench(evaluated, settings))
    )


def _blank(variant: str, target: str) -> dict[str, Any]:
    """One document that gives no metric: lm-eval runs no task without any."""
    log.warning("track %s of CLaS-Bench has no pair %s-%s: its cell stays blank", variant, target, target)
    return as_dataset([{"id": UNDEFINED, "prompt": "-", "language": target, MADE_FOR: [target], UNDEFINED: True}])


@cache
def _identifier(name: str) -> LanguageIdentifier:
    return LanguageIdentifier.named(name, threshold=0.0, letters=1)


def require_identifier(name: str, target: str) -> None:
    """Refuse an identifier that is not at hand, or cannot answer the target language."""
    try:
        _identifier(name).refuse_unknown([target])
    except SteeringError as error:
        raise SteeringError(
            f'CLaS-Bench: {error}; or name another one: --metadata \'{{"clas_identifier": "lid.176"}}\', which is not '
            "the benchmark's"
        ) from error


def metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Language success, relevance and score of one answer, and the output-language metrics."""
    if document[UNDEFINED]:
        return {}
    text = str(results[0])
    (found,) = _identifier(document["clas_identifier"]).identify([text])
    success = float(any(in_language(found.language, target) for target in document[MADE_FOR]))
    return {
        "clas_language": success,
        **(_judged(document, text, success) if document["judge"] else {}),
        **language_metrics(document, results),
    }


def _judged(document: Mapping[str, Any], text: str, success: float) -> dict[str, Any]:
    """Both scores' items; a judge that has failed once is asked no more, and the aggregate is then NaN."""
    settings = document["judge"]
    if settings not in _failed:
        try:
            ratings = Judge(**json.loads(settings)).rate(document["question"], text, document["language"])
        except JudgeError as error:
            _failed.add(settings)
            log.error("clas_relevance and clas_score are not computed: %s", error)
        else:
            value = mean_relevance(ratings)
            item = (success, value, False)
            return {"clas_relevance": item, "clas_score": item, "clas_unrated": float(value is None)}
    item = (success, None, True)
    return {"clas_relevance": item, "clas_score": item}


def generated_files() -> dict[Path, str]:
    """Path and text of the task files."""
    return dict(_files())


def _files() -> Iterable[tuple[Path, str]]:
    for variant, chosen in VARIANTS.items():
        ending = (variant,) if variant else ()
        names = {code: task_name("clas_bench", code, *ending) for code in chosen.sources}
        yield group_file("clas_bench", "_".join(["steering_clas_bench", *ending]), list(names.values()), METRICS)
        for code, name in names.items():
            said = {"variant": variant} if variant else {}
            yield task_file("clas_bench", "_clas_bench.yaml", name, evaluated=code, **said)
