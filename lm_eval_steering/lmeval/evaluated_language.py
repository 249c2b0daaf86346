"""Which language the items of a task are in, for lm-eval's own multilingual families and ours; never a guess.

A run is *self* where the evaluated language is the steered one and *cross* where it is not. A task that is in neither
table, or whose items are in two languages (MLQA with question and context in different ones), has no evaluated
language here; where that matters, the user says it: `evaluated: {task: code}`. Where a family does not say which
script or variety it means, the code is FLORES-200's for the language (`sr` is srp_Cyrl); `languages.same_language`
ignores both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.task_families import belebele, include, mlqa, xcopa, xnli, xquad, xwinograd


def _two_letters(codes: str) -> dict[str, str]:
    return {code: languages.normalise(code) for code in codes.split()}


def _turned(codes: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in codes.items()}


_OKAPI = "ar bn ca da de es eu fr gu hi hr hu hy id it kn ml mr ne nl pt ro ru sk sr sv ta te uk vi zh"
_MGSM = "bn de en es fr ja ru sw te th zh"
_INCLUDE = {name.lower().replace(" ", "_"): code for code, name in include.CODES.items()}


# What precedes the language in a name of lm-eval 0.4.13 -> its languages, and what may follow.
@cache
def _families() -> tuple[tuple[str, dict[str, str], str], ...]:
    mgsm = _two_letters(_MGSM)
    return (
        ("xcopa_", _turned(xcopa.CODES), ""),
        ("xwinograd_", _turned(xwinograd.CODES), ""),
        ("xnli_", _turned(xnli.CODES), ""),
        ("xquad_", _turned(xquad.CODES), ""),
        ("belebele_", belebele.CODES, ""),
        ("include_base_44_", _INCLUDE, r"(?:_few_shot_(?:en|og))?(?:_[a-z_]+)?"),
        ("mgsm_direct_", mgsm, ""),
        ("mgsm_en_cot_", mgsm, ""),  # the question's language; the reasoning is in English
        ("mgsm_native_cot_", mgsm, ""),
        ("global_mmlu_", _two_letters("ar bn de en es fr hi id it ja ko pt sw yo zh"), r"(?:_[a-z_]+)?"),
        (
            "global_mmlu_full_",
            _two_letters(
                "am ar bn cs de el en es fa fil fr ha he hi id ig it ja ko ky lt mg ms ne nl ny pl pt ro ru si sn so "
                "sr sv sw te tr uk vi yo zh"
            ),
            r"(?:_[a-z_]+)?",
        ),
        ("m_mmlu_", _two_letters(f"{_OKAPI} en is nb"), ""),
        ("arc_", _two_letters(_OKAPI), ""),
        ("hellaswag_", _two_letters(_OKAPI), ""),
        ("truthfulqa_", _two_letters(_OKAPI), "_mc[12]"),
        ("paws_", _two_letters("de en es fr ja ko zh"), ""),
        ("xstorycloze_", _two_letters("ar en es eu hi id my ru sw te zh"), ""),
        ("tydiqa_goldp_", _two_letters("ar bn en fi id ko ru sw te"), ""),
        ("lambada_openai_mt_", _two_letters("de en es fr it"), ""),
        ("lambada_openai_mt_stablelm_", _two_letters("de en es fr it nl pt"), ""),
    )


def family_prefixes() -> tuple[str, ...]:
    """How the names of the families in the table begin."""
    return (*(prefix for prefix, _, _ in _families()), "mlqa_")


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], dict[str, str]], ...]:
    """Each family as a pattern: a group of lm-eval's is named like a task without what follows."""
    made = []
    for prefix, codes, rest in _families():
        names = "|".join(sorted(map(re.escape, codes), key=len, reverse=True))
        made.append((re.compile(f"{prefix}({names}){rest}"), codes))
    return tuple(made)


_OUR_CODE = re.compile(r"_([a-z]{3}_[A-Z][a-z]{3})(?=_|$)")


def evaluated_language(task: str, given: Mapping[str, str] | None = None) -> str | None:
    """Our code of the language that a task's items are in, or None where neither name nor user settles it.

    Args:
        task: Its name, lm-eval's or ours.
        said: What the user says of other tasks, `evaluated: {task: code}`.

    Raises:
        UnknownLanguageError: if what is given is no language.
        SteeringError: if the task's name says another language.
    """
    by_name = _by_name(task)
    if not given or task not in given:
        return by_name
    code = languages.normalise(str(given[task]))
    if by_name and not languages.same_language(by_name, code):
        raise SteeringError(f"evaluated: {{{task}: {given[task]}}}: the items of {task} are in {by_name}; leave it out")
    return by_name or code


def needed_language(task: str, given: Mapping[str, str] | None = None) -> str:
    """The same where a language is needed, as for telling self from cross.

    Raises:
        SteeringError: if it is not known; the message says how to say it.
    """
    found = evaluated_language(task, given)
    if found is None:
        raise SteeringError(f"{task}: the language of its items is not known; say `evaluated: {{{task}: fra_Latn}}`")
    return found


def _by_name(task: str) -> str | None:
    if task.startswith("steering_"):
        found = set(_OUR_CODE.findall(task))
        return found.pop() if len(found) == 1 else None
    pair = re.fullmatch(r"mlqa_([a-z]{2})_([a-z]{2})", task)
    if pair:
        return _turned(mlqa.CODES).get(pair[1]) if pair[1] == pair[2] else None
    for pattern, codes in _patterns():
        match = pattern.fullmatch(task)
        if match:
            return codes[match[1]]
    return None
