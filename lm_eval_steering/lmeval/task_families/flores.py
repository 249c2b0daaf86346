"""FLORES-200: translation between any two languages, and perplexity.

Translation is scored as one corpus by chrF++ and BLEU (`metrics.translation`). Prompts: lm-eval's (the default), those
of Gurgurov et al. 2025 and of Rahmanisa et al. 2025 (with and without the target language's name).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.expected_language import EXPECTED_LANGUAGE
from lm_eval_steering.lmeval.sources import as_dataset, load_rows
from lm_eval_steering.lmeval.task_families import group_file, language_tag, task_file, task_name
from lm_eval_steering.lmeval.task_families.common import ALL, keeps_to_its_file, language_metrics, text_documents
from lm_eval_steering.lmeval.task_families.parallel import flores, read_pairs
from lm_eval_steering.metrics.translation import NO_BLEU, bleu_tokenizer, require_tokenizer

NEEDS = "Muennighoff/flores200 (hub) or local files; BLEU into ja, ko, th, bo: sacreBLEU's tokenizer for it"
# As they are printed in lm-eval's tasks and the two papers' scripts. Gurgurov's has two full stops after a sentence.
PROMPTS = {
    "lm_eval": "{source} sentence: {text}\n{target} sentence:",
    "gurgurov": "Translate this {source} sentence into {target}: {text}. Translation:",
    "rahmanisa": "Translate from {source} into the target language.\n\n{source}: {text}\nTarget language: ",
    "rahmanisa_targeted": "Translate from {source} to {target}.\n\n{source}: {text}\n{target}:",
}
DEFAULT = "lm_eval"
PIVOT = "eng_Latn"
GROUP = ("chrf++", "bleu", "lang_expected")
PERPLEXITY = ("bits_per_byte", "bits_per_character", "byte_perplexity", "nats_per_token")
# The papers say Norwegian for Bokmål.
_NAMES = {"nob_Latn": "Norwegian"}


def _name(code: str) -> str:
    return _NAMES.get(code) or languages.english_name(code)


def prompt_of(prompt: str, source: str, target: str, text: str) -> str:
    """One of `PROMPTS`, filled in."""
    return PROMPTS[prompt].format(source=_name(source), target=_name(target), text=text)


# --- translation ------------------------------------------------------------------------------------------------------


@keeps_to_its_file
def translation_documents(evaluated: str | None = None, variant: str = DEFAULT, **settings: Any) -> dict[str, Any]:
    """Prompts with a sentence of the first language of a pair, and its translation.

    Settings: `pair` (`fra_Latn-deu_Latn`) for the task of any pair, `bleu_tokenizer` (by default the one that
    suits the target; `none` leaves BLEU out), `parallel` for other sentences than FLORES'.

    Raises:
        SteeringError: before anything is generated, for a pair that is not one and for a tokenizer that is not at hand.
    """
    source, target = parse_pair(evaluated or settings.get("pair"))
    tokenizer = str(settings.get("bleu_tokenizer") or bleu_tokenizer(target))
    require_tokenizer(tokenizer, target)
    return as_dataset(
        {
            "id": item.id,
            "prompt": prompt_of(variant, source, target, item.first),
            "source_text": item.first,
            "reference": item.second,
            "source": source,
            EXPECTED_LANGUAGE: target,
            "bleu_tokenizer": tokenizer,
        }
        for item in read_pairs(source, target, settings)
    )


def parse_pair(pair: str | None) -> tuple[str, str]:
    """Source and target of `fra_Latn-deu_Latn`; other spellings of a language are accepted.

    Raises:
        SteeringError: for anything else.
    """
    codes = str(pair or "").split("-")
    if len(codes) != 2 or not all(codes):
        raise SteeringError(
            f"pair={pair!r}: expected two languages, source first, such as fra_Latn-deu_Latn "
            '(--metadata \'{"pair": "fra_Latn-deu_Latn"}\')'
        )
    source, target = (languages.normalise(code) for code in codes)
    if source == target:
        raise SteeringError(f"pair={pair!r}: both languages are {source}")
    return source, target


def translation_metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """What the corpus scores are computed from, and the language of the translation."""
    text = str(results[0]).strip()
    item = (document["bleu_tokenizer"], document["reference"], text)
    scores: dict[str, Any] = dict.fromkeys(("chrf++", "chrf++_ci", "chrf++_signature"), item)
    if document["bleu_tokenizer"] != NO_BLEU:
        scores |= dict.fromkeys(("bleu", "bleu_ci", "bleu_signature"), item)
    return scores | language_metrics(document, results)


# --- perplexity -------------------------------------------------------------------------------------------------------


@keeps_to_its_file
def perplexity_documents(evaluated: str, **settings: Any) -> dict[str, Any]:
    """Whole sentences of one language."""
    rows = load_rows(flores(evaluated), settings)
    return text_documents(((str(row["id"]), row["sentence"]) for row in rows), settings)


# --- files ------------------------------------------------------------------------------------------------------------


def directions() -> list[tuple[str, str]]:
    """The pairs that have a task file: English with every language that a paper covers, both ways."""
    others = [code for code in ALL if code != PIVOT]
    return [(PIVOT, code) for code in others] + [(code, PIVOT) for code in others]


def generated_files() -> dict[Path, str]:
    """Path and text of the task files."""
    return dict(_files())


def _files() -> Iterable[tuple[Path, str]]:
    for variant in PROMPTS:
        yield from _translation_files(variant, () if variant == DEFAULT else (variant,))
    names = [task_name("flores", code, "perplexity") for code in ALL]
    yield group_file("flores", "steering_flores_perplexity", names, PERPLEXITY)
    for code, name in zip(ALL, names, strict=True):
        yield task_file("flores", "_perplexity.yaml", name, language_tag(code), version="2.0", evaluated=code)


def _translation_files(variant: str, ending: tuple[str, ...]) -> Iterable[tuple[Path, str]]:
    names = {pair: task_name("flores", "-".join(pair), *ending) for pair in directions()}
    for pair, name in names.items():
        yield task_file("flores", f"_{variant}.yaml", name, evaluated="-".join(pair), variant=variant)
    yield task_file("flores", f"_{variant}.yaml", task_name("flores", "pair", *ending), variant=variant)
    for side, direction in enumerate(("from_english", "to_english")):
        members = [name for pair, name in names.items() if pair[side] == PIVOT]
        yield group_file("flores", "_".join(["steering_flores", direction, *ending]), members, GROUP)
