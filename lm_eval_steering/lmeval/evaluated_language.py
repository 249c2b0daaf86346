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
from lm_eval_steering.errors import SteeringError, UnknownLanguageError
from lm_eval_steering.lmeval.task_families import belebele, include, mlqa, xcopa, xnli, xquad, xwinograd


def _two_letters(codes: str) -> dict[str, str]:
    return {code: languages.normalise(code) for code in codes.split()}


def _turned(codes: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in codes.items()}


_OKAPI = "ar bn ca da de es eu fr gu hi hr hu hy id it kn ml mr ne nl pt ro ru sk sr sv ta te uk vi zh"
# Folders of lm-eval 0.4.13 with tasks in several languages that stay out, and why.
LEFT_OUT = {
    "afrobench": "most tasks are translations, or in two languages",
    "aradice": "dialects and English by abbreviations that are no language codes",
    "bhs": "minimal pairs in three languages, named by English words",
    "llama3": "the prompts of one model, a few of them in other languages",
    "infinitebench": "English and Chinese, some in both",
    "noreval": "Norwegian in both written forms, and translation",
    "pisa": "pisa_ch does not say which Chinese",
    "portuguese_bench": "translation, and tasks that name no language",
    "translation": "in two languages",
}
_MMLU_PROX = "af ar bn cs de en es fr hi hu id it ja ko mr ne pt ru sr sw te th uk ur vi wo yo zh zu"
# AfriXNLI, AfriMMLU and AfriMGSM.
_IROKO = "amh eng ewe fra hau ibo kin lin lug orm sna sot swa twi wol xho yor zul"
_MGSM = "bn de en es fr ja ru sw te th zh"
_CATALAN = (
    "cabreu_abstractive cabreu_extractive cabreu_extreme catalanqa catcola cieacova_choice cieacova_word cocoteros_va "
    "coqcat parafraseja teca terretaqa truthfulqa_va xnli_va"
)
_INCLUDE = {name.lower().replace(" ", "_"): code for code, name in include.CODES.items()}


# What precedes the language in a name of lm-eval 0.4.13, its languages, what may follow, and what may come between.
@cache
def _families() -> tuple[tuple[str, dict[str, str], str] | tuple[str, dict[str, str], str, str], ...]:
    mgsm = _two_letters(_MGSM)
    of_macro = {"orm": "gaz", "swa": "swh"}  # FLORES' codes of two macrolanguages
    iroko = {code: languages.normalise(of_macro.get(code, code)) for code in _IROKO.split()}
    return (
        ("xcopa_", _turned(xcopa.CODES) | _two_letters("eu"), ""),
        ("xwinograd_", _turned(xwinograd.CODES), ""),
        ("xnli_", _turned(xnli.CODES) | _two_letters("ca gl") | {"es_spanish_bench": "spa_Latn"}, ""),
        ("xnli_eu", {"": "eus_Latn"}, r"(?:_mt|_native)?"),
        ("xquad_", _turned(xquad.CODES) | _two_letters("ca"), ""),
        ("belebele_", belebele.CODES | {"glg_Latn": "glg_Latn"}, ""),
        ("include_base_44_", _INCLUDE, r"(?:_few_shot_(?:en|og))?(?:_[a-z_]+)?"),
        ("mgsm_direct_", mgsm | _two_letters("ca eu gl") | {"es_spanish_bench": "spa_Latn"}, ""),
        ("mgsm_en_cot_", mgsm, ""),  # the question's language; the reasoning is in English
        ("mgsm_native_cot_", mgsm | _two_letters("eu"), ""),
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
        ("arc_", _two_letters(_OKAPI), "(?:_easy|_challenge)?"),
        ("hellaswag_", _two_letters(_OKAPI), ""),
        ("truthfulqa_", _two_letters(f"{_OKAPI} gl"), "_(?:mc[12]|gen)"),
        ("arc_challenge_mt_", _two_letters("da de el es fi hu is it nb pl pt sv"), ""),
        ("truthfulqa-multi_", _two_letters("ca en es eu gl"), "", r"(?:gen|mc1|mc2)_"),
        ("paws_", _two_letters("ca de en es eu fr gl ja ko zh") | {"es_spanish_bench": "spa_Latn"}, ""),
        ("xstorycloze_", _two_letters("ar ca en es eu gl hi id my ru sw te zh"), ""),
        ("openbookqa_", _two_letters("ca es gl"), ""),
        ("piqa_", _two_letters("ca eu"), ""),
        ("wnli_", _two_letters("ca es eu"), ""),
        ("copa_", _two_letters("ca es"), ""),
        ("siqa_", _two_letters("ca"), ""),
        ("mela_", _two_letters("ar de en es fr is it ja ru zh"), ""),
        ("indicxnli_", _two_letters("gu"), ""),
        ("eus_exams_", _two_letters("es eu"), r"(?:_[a-z0-9_]+)?"),
        ("turblimp_", {"": "tur_Latn"}, "[a-z_]+"),
        ("turkishmmlu", {"": "tur_Latn"}, r"(?:_[a-z_]+)?"),
        ("copal_id_", {"": "ind_Latn"}, "(?:standard|colloquial)"),
        ("icelandic_winogrande", {"": "isl_Latn"}, ""),
        ("french_bench_", {"": "fra_Latn"}, "[A-Za-z0-9_]+"),
        # Tests that the Iberian benches have in one language alone; Valencian, `va`, is Catalan.
        ("", dict.fromkeys(_CATALAN.split(), "cat_Latn"), ""),
        ("", dict.fromkeys(("galcola", "parafrases_gl", "summarization_gl"), "glg_Latn"), ""),
        ("", dict.fromkeys(("cocoteros_es", "escola", "xlsum_es"), "spa_Latn"), ""),
        ("mmlu_prox_", _two_letters(_MMLU_PROX), r"(?:_[a-z_]+)?", "(?:lite_)?"),
        ("mmmlu_", _two_letters("ar bn de es fr hi id it ja ko pt sw yo zh"), r"_[a-z]{2}(?:_[a-z_]+)?"),
        # Translated into English for the test (`..._translate_...`): not in the language of the name.
        ("afrixnli_", iroko, r"(?:_prompt_\d)?", "(?:(?:en|native|manual)_direct_)?"),
        ("afrimmlu_direct_", iroko, r"(?:_prompt_\d)?"),
        ("afrimgsm_", iroko, r"(?:_prompt_\d)?", "(?:cot_)?"),
        ("tydiqa_goldp_", _two_letters("ar bn en fi id ko ru sw te"), ""),
        ("lambada_openai_mt_", _two_letters("de en es fr it"), ""),
        ("lambada_openai_mt_stablelm_", _two_letters("de en es fr it nl pt"), ""),
    )


def family_prefixes() -> tuple[str, ...]:
    """How the names of the families in the table begin."""
    return (*filter(None, (family[0] for family in _families())), "mlqa_", "global_piqa_", "multiblimp_")


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], dict[str, str]], ...]:
    """Each family as a pattern: a group of lm-eval's is named like a task without what follows."""
    made = []
    for prefix, codes, rest, *between in _families():
        names = "|".join(sorted(map(re.escape, codes), key=len, reverse=True))
        made.append((re.compile(f"{prefix}{''.join(between)}({names}){rest}"), codes))
    return tuple(made)


_OUR_CODE = re.compile(r"_([a-z]{3}_[A-Z][a-z]{3})(?=_|$)")


def evaluated_language(task: str, given: Mapping[str, str] | None = None) -> str | None:
    """Our code of the language that a task's items are in, or None where neither name nor user settles it.

    Args:
        task: its name, lm-eval's or ours.
        given: what the user says of other tasks, `evaluated: {task: code}`.

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


# Global PIQA's and MultiBLiMP's names hold ISO 639-3 codes, Global PIQA's with the script and sometimes a region.
_SPELLED_OUT = re.compile(
    r"(?:global_piqa_(?:non)?parallel_(?:cloze|generation)_([a-z]{3})_(?=[a-z]{4})|multiblimp_([a-z]{3})$)"
    r"(?:([a-z]{4})(?:_[a-z]{4})?)?"
)


def _code(iso: str, script: str | None) -> str | None:
    """Our code of an ISO 639-3 code; None where it names no language that we know, such as an extinct one."""
    try:
        return languages.normalise(f"{iso}_{script.title()}" if script else iso)
    except UnknownLanguageError:
        return None


def _by_name(task: str) -> str | None:
    if task.startswith("steering_"):
        named = set(_OUR_CODE.findall(task))
        return named.pop() if len(named) == 1 else None
    pair = re.fullmatch(r"mlqa_([a-z]{2})_([a-z]{2})", task)
    if pair:
        return _turned(mlqa.CODES).get(pair[1]) if pair[1] == pair[2] else None
    if spelled := _SPELLED_OUT.fullmatch(task):
        return _code(spelled[1] or spelled[2], spelled[3])
    for pattern, codes in _patterns():
        match = pattern.fullmatch(task)
        if match:
            return codes[match[1]]
    return None
