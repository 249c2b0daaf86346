"""XNLI (Conneau et al. 2018): does a premise entail a hypothesis, contradict it, or neither?

Default wording: lm-eval's, scored by log-likelihood on its split, validation. The variant `gurgurov` generates an
answer to the prompt of Gurgurov et al. 2025 and reads it strictly. (The paper took the first 1000 of the test split:
`--metadata '{"split": "test"}' --limit 1000`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.lmeval.sources import RowsSource, as_dataset, hub_copies, load_rows
from lm_eval_steering.lmeval.task_families import code_of, expect, files_of_two_wordings
from lm_eval_steering.lmeval.task_families.answers import RELATIONS, relation, score_answer
from lm_eval_steering.lmeval.task_families.common import answer_language, is_other_wording, keeps_to_its_file

NEEDS = "facebook/xnli (hub) or local files"
CODES = {
    "arb_Arab": "ar", "bul_Cyrl": "bg", "deu_Latn": "de", "ell_Grek": "el", "eng_Latn": "en", "fra_Latn": "fr",
    "hin_Deva": "hi", "rus_Cyrl": "ru", "spa_Latn": "es", "swh_Latn": "sw", "tha_Thai": "th", "tur_Latn": "tr",
    "urd_Arab": "ur", "vie_Latn": "vi", "zho_Hans": "zh",
}  # fmt: skip
# lm-eval's words, its mistranslations included: right?, and one for each label in order.
WORDS = {
    "ar": ("صحيح", "نعم", "لذا", "رقم"),
    "bg": ("правилно", "да", "така", "не"),
    "de": ("richtig", "Ja", "Auch", "Nein"),
    "el": ("σωστός", "Ναί", "Έτσι", "όχι"),
    "en": ("right", "Yes", "Also", "No"),
    "es": ("correcto", "Sí", "Asi que", "No"),
    "fr": ("correct", "Oui", "Aussi", "Non"),
    "hi": ("सही", "हाँ", "इसलिए", "नहीं"),
    "ru": ("правильно", "Да", "Так", "Нет"),
    "sw": ("sahihi", "Ndiyo", "Hivyo", "Hapana"),
    "th": ("ถูกต้อง", "ใช่", "ดังนั้น", "ไม่"),
    "tr": ("doğru", "Evet", "Böylece", "Hayır"),
    "ur": ("صحیح", "جی ہاں", "اس لئے", "نہیں"),
    "vi": ("đúng", "Vâng", "Vì vậy", "Không"),
    "zh": ("正确", "是的", "所以", "不是的"),
}


def source(evaluated: str) -> RowsSource:
    """Where the items of a language are."""
    code = code_of(evaluated, CODES, "XNLI")
    columns = ("premise", "hypothesis", "label")
    return RowsSource("xnli", evaluated, "validation", columns, hub_copies("facebook/xnli", code, "validation"))


@keeps_to_its_file
def documents(evaluated: str, variant: str = "", **settings: Any) -> dict[str, Any]:
    """Prompt, choices and the label."""
    origin, paper = source(evaluated), is_other_wording(variant, "gurgurov")

    def document(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        label = expect(row, "label", (0, 1, 2), origin)
        if paper:
            wording: dict[str, Any] = {"prompt": as_gurgurov(row, languages.english_name(evaluated))}
        else:
            wording = {"choices": as_lm_eval(row, CODES[evaluated])}
        # The rows of all languages are translations of each other, in one order.
        return {"id": number, **row, **wording, "gold": RELATIONS[label]}

    return as_dataset(document(number, row) for number, row in enumerate(load_rows(origin, settings)))


def as_lm_eval(row: Mapping[str, Any], code: str) -> list[str]:
    """lm-eval's wording: three whole sentences after an empty prompt."""
    right, *words = WORDS[code]
    return [f"{row['premise']}, {right}? {word}, {row['hypothesis']}" for word in words]


def as_gurgurov(row: Mapping[str, Any], language: str) -> str:
    """The wording of Gurgurov et al. 2025."""
    return (
        f"Given the following {language} premise and hypothesis, determine the relationship between them.\n\n"
        f"Premise: {row['premise']}\n\nHypothesis: {row['hypothesis']}\n\n"
        "Options:\n1. Entailment\n2. Neutral\n3. Contradiction\n\nAnswer:"
    )


def generated_metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """`acc`, the share `parsed`, and the accuracy of each right answer apart, for a model that always says one."""
    scores = score_answer(relation(results[0]), document["gold"])
    return {**scores, f"acc_{document['gold']}": scores["acc"], **answer_language(results[0])}


def generated_files() -> dict[Path, str]:
    """One file a language and wording, and a group for each wording."""
    return files_of_two_wordings("xnli", CODES, ("acc",), "gurgurov", ("acc", "parsed"))
