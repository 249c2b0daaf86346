"""Language Steering Shift (Rahmanisa et al. 2025) on MLAMA-dod-185, and on any parallel sentences.

Items have a prompt in the base language and one object in the base and in the steered language. Each is scored with and
without the intervention in one run (`metrics.likelihood`). Where base and steered language are the same LSS is not
defined (0 in the original): that cell stays blank, with a warning.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.sources import Hub, RowsSource, as_dataset, load_rows
from lm_eval_steering.lmeval.task_families import demo as tasks
from lm_eval_steering.lmeval.task_families import group_file, task_file, task_name
from lm_eval_steering.lmeval.task_families.common import ALL, MLAMA, keeps_to_its_file
from lm_eval_steering.lmeval.task_families.parallel import cut, joint, read_pairs
from lm_eval_steering.metrics.likelihood import MADE_FOR, NEEDS_UNSTEERED_SCORE

log = logging.getLogger("lm_eval.steering")

NEEDS = "Muennighoff/flores200 or inayarhmns/MLAMA-dod-185 (hub) or local files; --model steered-hf"
UNDEFINED = "undefined"  # a document with this key stands for a blank cell
SHARE = 0.5
VARIANTS = ("mlama", "mlama_paper")
METRICS = ("lss", "lss_ties", "lss_shift")  # of every item; `lss_distinct` is of some, and not averaged over tasks


def _item(number: str, base: str, target: str, prompt: str, choices: Sequence[str]) -> dict[str, Any]:
    return {
        "id": number,
        "prompt": prompt,
        "choices": list(choices),
        "base": base,
        UNDEFINED: False,
        MADE_FOR: [target],
        NEEDS_UNSTEERED_SCORE: True,
    }


def _target(base: str, settings: Mapping[str, Any]) -> str:
    return tasks.steered_language(settings, f"LSS from {base}")


def _blank(base: str) -> dict[str, Any]:
    """One document that gives no metric: lm-eval runs no task without any."""
    log.warning("LSS from %s to %s is not defined: its cell stays blank", base, base)
    item = _item("undefined", base, base, "-", [" -", " -"]) | {UNDEFINED: True, NEEDS_UNSTEERED_SCORE: False}
    return as_dataset([item])


# --- any parallel sentences -------------------------------------------------------------------------------------------


@keeps_to_its_file
def parallel_documents(evaluated: str, **settings: Any) -> dict[str, Any]:
    """The first part of a sentence in the base language; the rest of it in the base and in the steered language.

    Settings: `share` of its words after which a sentence is cut (0.5), and those of `parallel.read_pairs`. Sentences of
    one word are left out, and counted in a warning.
    """
    base, target = evaluated, _target(evaluated, settings)
    if target == base:
        return _blank(base)
    share = _share(settings.get("share", SHARE))
    documents, short = [], []
    for pair in read_pairs(base, target, settings):
        in_base, in_target = cut(pair.first, share, base), cut(pair.second, share, target)
        if in_base is None or in_target is None:
            short.append(pair.id)
            continue
        choices = [joint(base, base) + in_base[1], joint(base, target) + in_target[1]]
        documents.append(_item(pair.id, base, target, in_base[0], choices))
    if short:
        log.warning("LSS from %s to %s: %d sentences of one word left out", base, target, len(short))
    if not documents:
        raise SteeringError(f"LSS from {base} to {target}: no sentence has two words")
    return as_dataset(documents)


def _share(given: Any) -> float:
    try:
        share = float(given)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 < share < 1:
        raise SteeringError(f"share={given!r}: expected a number between 0 and 1, the share of words in the prompt")
    return share


# --- MLAMA-dod-185 ----------------------------------------------------------------------------------------------------


@keeps_to_its_file
def mlama_documents(evaluated: str, variant: str = "mlama", **settings: Any) -> dict[str, Any]:
    """Facts with one template a language: the subject and template in the base language, the object in both.

    Variant `mlama`: the prompt is the template up to [Y] without the blank before it. Words after the object, which
    every template has where the verb comes last, are no part of it; a warning counts those items. Templates whose
    subject is not before the object, or that have other marks, are left out and named in a warning. No blank stands
    between scripts that have none. Variant `mlama_paper`: " [Y]" is deleted wherever it stands, so a [Y] without a
    blank before it and everything after the object stay in the prompt, and a blank stands before every object.
    """
    if variant not in VARIANTS:
        raise SteeringError(f"variant={variant!r}: expected one of {', '.join(VARIANTS)}")
    base, target, paper = evaluated, _target(evaluated, settings), variant == "mlama_paper"
    if target == base:
        return _blank(base)
    source = mlama(base, target)
    columns = _short(base), _short(target)
    documents, left_out, cut_short = [], Counter[str](), 0
    for number, row in enumerate(load_rows(source, settings)):
        prompt = prompt_of(row["template"], row[f"sub_{columns[0]}"], paper)
        if prompt is None:
            left_out[f"{row.get('predicate_id', '?')} {row['template']!r}"] += 1
            continue
        cut_short += not paper and _has_words_after(row["template"])
        blanks = (" ", " ") if paper else (joint(base, base), joint(base, target))
        choices = [blank + row[f"obj_{code}"] for blank, code in zip(blanks, columns, strict=True)]
        documents.append(_item(str(number), base, target, prompt, choices))
    _report(left_out, cut_short, len(documents), base)
    return as_dataset(documents)


def mlama(base: str, target: str) -> RowsSource:
    """MLAMA-dod-185 in one base language; every row has the subjects and objects of all its languages."""
    code = _short(base)
    columns = ("template", f"sub_{code}", f"obj_{code}", f"obj_{_short(target)}")
    return RowsSource("mlama", base, "test", columns, (Hub("inayarhmns/MLAMA-dod-185", code),))


def _short(code: str) -> str:
    """The two-letter code that the columns are named by."""
    return min(languages.spellings(code), key=len)


def prompt_of(template: str, subject: str, paper: bool = False) -> str | None:
    """Text before the object, with the subject filled in; None for a template that has no such text."""
    if paper:
        return template.replace("[X]", subject).replace(" [Y]", "")
    before, mark, _ = template.partition("[Y]")
    if not mark or "[X]" not in before or "[" in before.replace("[X]", ""):
        return None
    return before.replace("[X]", subject).rstrip()


def _has_words_after(template: str) -> bool:
    return any(character.isalnum() for character in template.partition("[Y]")[2])


def _report(left_out: Counter[str], cut_short: int, kept: int, base: str) -> None:
    if left_out:
        named = "; ".join(f"{template} ({count})" for template, count in sorted(left_out.items()))
        log.warning(
            "LSS from %s: %d items left out, whose subject is not before the object: %s", base, left_out.total(), named
        )
    if cut_short:
        log.warning("LSS from %s: %d items have words after the object, which no model sees", base, cut_short)
    if not kept:
        raise SteeringError(f"LSS from {base}: no template has its subject [X] before its object [Y]")


# --- metrics and files ------------------------------------------------------------------------------------------------


def metrics(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Those of `tasks.lss_metrics`, and the shift twice more, for the ends of its interval.

    Raises:
        SteeringError: for scores of a model that cannot be unsteered in the same run, as every model type but ours.
    """
    if document[UNDEFINED]:
        return {}
    scores = tasks.lss_metrics(document, results)
    return scores | {"lss_shift_low": scores["lss_shift"], "lss_shift_high": scores["lss_shift"]}


def generated_files() -> dict[Path, str]:
    """Path and text of the task files."""
    return dict(_files())


def _files() -> Iterable[tuple[Path, str]]:
    plain = [task_name("lss", code) for code in ALL]
    yield group_file("lss", "steering_lss", plain, METRICS)
    for code, name in zip(ALL, plain, strict=True):
        yield task_file("lss", "_parallel.yaml", name, evaluated=code)
    for variant in VARIANTS:
        names = [task_name("lss", code, variant) for code in MLAMA]
        yield group_file("lss", f"steering_lss_{variant}", names, METRICS)
        for code, name in zip(MLAMA, names, strict=True):
            yield task_file("lss", "_mlama.yaml", name, evaluated=code, variant=variant)
