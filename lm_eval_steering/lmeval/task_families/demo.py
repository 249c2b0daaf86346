"""The Python parts of our tasks: where documents come from, and how answers become metrics.

lm-eval calls the dataset functions with the model arguments and the task's settings, so a task knows which
language is steered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError, UndefinedForLanguageError
from lm_eval_steering.files import read_json_lines
from lm_eval_steering.lmeval.sources import as_dataset
from lm_eval_steering.lmeval.task_families import common, group_file
from lm_eval_steering.lmeval.task_families.common import text_documents
from lm_eval_steering.lmeval.task_families.parallel import joint
from lm_eval_steering.metrics.likelihood import MADE_FOR, NEEDS_UNSTEERED_SCORE, Score, preference_shift
from lm_eval_steering.resources import demo_sentences

NEEDS = "nothing: its data travel with the package"
CHOOSE = range(20)  # items to choose a factor on
REPORT = range(20, 60)  # items to report on


@cache
def _sentences() -> tuple[Mapping[str, Any], ...]:
    return tuple(row["sentence"] for row in read_json_lines(demo_sentences()))


def demo_languages() -> tuple[str, ...]:
    """Codes of the demo's languages."""
    return tuple(_sentences()[0])


def sentence(number: int, language: str) -> str:
    """One whole sentence of the demo."""
    return joint(language, language).join(_sentences()[number][language])


def _ids(items: str) -> Sequence[int]:
    parts = {"choose": CHOOSE, "report": REPORT, "all": range(60)}
    if items not in parts:
        raise SteeringError(f"items={items!r}: expected one of {', '.join(parts)}")
    return parts[items]


def steered_language(settings: Mapping[str, Any], task: str) -> str:
    """The one language that a run steers to, from the model arguments.

    Raises:
        UndefinedForLanguageError: if there is none, or more than one.
    """
    named = settings.get("target_language") or settings.get("language")
    if not named or "+" in str(named):
        raise UndefinedForLanguageError(
            f"{task} needs one steered language: pass language= (or target_language=) in --model_args; got {named!r}"
        )
    return languages.normalise(str(named))


# --- choosing the right continuation: an ability, scored by any model -----------------------------------------------


def continuation_documents(evaluated: str, items: str = "all", **_: Any) -> dict[str, Any]:
    """First clause, and four second clauses of which one belongs to it."""
    ids, everything = _ids(items), _sentences()

    def document(position: int, number: int) -> dict[str, Any]:
        # Three others at fixed distances, and the right one at a position that depends on the item alone.
        wrong = [everything[ids[(position + step) % len(ids)]][evaluated][1] for step in (7, 11, 17)]
        right = everything[number][evaluated][1]
        label = number % 4
        choices = [*wrong[:label], right, *wrong[label:]]
        return {
            "id": number,
            # The blank ends the prompt, so that no request here equals one of LSS, which stores more in a cache.
            "prompt": everything[number][evaluated][0] + joint(evaluated, evaluated),
            "choices": choices,
            "label": label,
        }

    return as_dataset(document(position, number) for position, number in enumerate(ids))


# --- perplexity -----------------------------------------------------------------------------------------------------


def perplexity_documents(evaluated: str, items: str = "all", **settings: Any) -> dict[str, Any]:
    """Whole sentences of one language."""
    return text_documents(((number, sentence(number, evaluated)) for number in _ids(items)), settings)


def perplexity_metrics(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """Those of `common.perplexity_metrics` that the demo's template lists."""
    listed = ("bits_per_byte", "token_perplexity", "nats_per_token", "left_out")
    return {name: value for name, value in common.perplexity_metrics(document, results).items() if name in listed}


# --- Language Steering Shift ----------------------------------------------------------------------------------------


def lss_documents(base: str, items: str = "report", **settings: Any) -> dict[str, Any]:
    """First clause in the base language; its second clause in the base language and in the steered one."""
    target = steered_language(settings, f"LSS from {base}")
    if target == base:
        raise UndefinedForLanguageError(
            f"LSS from {base} to {base} is undefined: steer another language or take another base"
        )
    if target not in demo_languages():
        raise SteeringError(f"the demo's sentences are not in {target}; known: {', '.join(demo_languages())}")
    documents = []
    for number in _ids(items):
        in_base, in_target = _sentences()[number][base], _sentences()[number][target]
        documents.append(
            {
                "id": number,
                "prompt": in_base[0],
                "choices": [joint(base, base) + in_base[1], joint(base, target) + in_target[1]],
                "base": base,
                MADE_FOR: [target],
                NEEDS_UNSTEERED_SCORE: True,
            }
        )
    return as_dataset(documents)


def lss_metrics(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """1 where the preference moved towards the steered language; ties and identical objects apart.

    Raises:
        SteeringError: if the scores are not ours, or were steered to another language than the document's.
    """
    base, target = results
    if not isinstance(base, Score) or not isinstance(target, Score):
        raise SteeringError("LSS needs steered and unsteered scores of the same rows, which --model steered-hf gives")
    if document[MADE_FOR] != list(target.targets):
        raise SteeringError(f"the documents are for {document[MADE_FOR]}, the model is steered to {target.targets}")
    shift = preference_shift(base, target)
    same = document["choices"][0] == document["choices"][1]
    return {
        "lss": float(shift > 0),
        "lss_shift": shift,
        "lss_ties": float(shift == 0),
        **({} if same else {"lss_distinct": float(shift > 0)}),
    }


# --- output language ------------------------------------------------------------------------------------------------


def forcing_documents(items: str = "report", **settings: Any) -> dict[str, Any]:
    """Whole sentences as prompts, in turn in each of the languages that are not steered."""
    named = settings.get("target_language") or settings.get("language")
    targets = {languages.normalise(code) for code in str(named).split("+")} if named else set()
    others = [code for code in demo_languages() if code not in targets]
    return as_dataset(
        {
            "id": number,
            "language": others[number % len(others)],
            MADE_FOR: sorted(targets),
            "prompt": sentence(number, others[number % len(others)]),
        }
        for number in _ids(items)
    )


def open_documents(samples: int = 40, **_: Any) -> dict[str, Any]:
    """Empty prompts, for text from an open start; sampled, so each is another text."""
    return as_dataset({"id": number, "prompt": ""} for number in range(samples))


# --- files ----------------------------------------------------------------------------------------------------------

# Task -> the argument of its dataset function that names the language, and the metrics that a group averages.
_BY_LANGUAGE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "continuation": ("evaluated", ("acc",)),
    "perplexity": ("evaluated", ("bits_per_byte", "nats_per_token")),
    "lss": ("base", ("lss", "lss_shift")),
}


def generated_files() -> dict[Path, str]:
    """One file a language, and a group, of each task that is in one language."""
    files: dict[Path, str] = {}
    for task, (argument, metrics) in _BY_LANGUAGE.items():
        names = {code: f"steering_demo_{task}_{code}" for code in demo_languages()}
        files |= dict([group_file("demo", f"steering_demo_{task}", list(names.values()), metrics)])
        for code, name in names.items():
            text = f"include: _{task}.yaml\ntask: {name}\ndataset_kwargs: {{{argument}: {code}}}\n"
            files[Path("demo") / f"{task}_{code}.yaml"] = text
    return files
