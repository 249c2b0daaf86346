"""XQuAD (Artetxe et al. 2020): questions answered by a span of a paragraph; 12 languages, parallel.

Default wording and `exact_match`, `f1`: lm-eval's (SQuAD 1.1 against the first reference). The variant `gurgurov` has
the prompt of Gurgurov et al. 2025, and its normalisation for the two. Both also report `exact_match_mlqa`, `f1_mlqa`:
the best reference under MLQA's multilingual normalisation, the fair number where words are not set apart by blanks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.lmeval.expected_language import EXPECTED_LANGUAGE
from lm_eval_steering.lmeval.sources import DataError, RowsSource, as_dataset, hub_copies, load_rows
from lm_eval_steering.lmeval.task_families import code_of, files_of_two_wordings
from lm_eval_steering.lmeval.task_families.answers import exact_match, f1, gurgurov, mlqa, squad
from lm_eval_steering.lmeval.task_families.common import answer_language, is_other_wording, keeps_to_its_file

NEEDS = "google/xquad (hub) or local files"
COLUMNS = ("context", "question", "answers")
METRICS = ("exact_match", "f1", "exact_match_mlqa", "f1_mlqa")
CODES = {
    "arb_Arab": "ar", "deu_Latn": "de", "ell_Grek": "el", "eng_Latn": "en", "hin_Deva": "hi", "ron_Latn": "ro",
    "rus_Cyrl": "ru", "spa_Latn": "es", "tha_Thai": "th", "tur_Latn": "tr", "vie_Latn": "vi", "zho_Hans": "zh",
}  # fmt: skip
WORDS = {  # lm-eval's, misspellings included
    "ar": ("سيا", "سؤال", "إجابة"),
    "de": ("Kontext", "Frage", "Antwort"),
    "el": ("Συμφραζόμενα", "Ερώτηση", "Απάντηση"),
    "en": ("Context", "Question", "Answer"),
    "es": ("Contexto", "Pregunta", "Respuesta"),
    "hi": ("प्रसंग", "सवाल", "उत्तर"),
    "ro": ("Context", "Întrebare", "Răspuns"),
    "ru": ("Контекст", "Вопрос", "Ответ"),
    "th": ("บริบท", "คำถาม", "คำตอบ"),
    "tr": ("Bağlam", "Soru", "Cevap"),
    "vi": ("Bối cảnh", "Câu hỏi", "Trả lời"),
    "zh": ("语境", "问题", "回答"),
}


def source(evaluated: str) -> RowsSource:
    """Where the questions of a language are."""
    code = f"xquad.{code_of(evaluated, CODES, 'XQuAD')}"
    return RowsSource("xquad", evaluated, "validation", COLUMNS, hub_copies("google/xquad", code, "validation"))


@keeps_to_its_file
def documents(evaluated: str, variant: str = "", **settings: Any) -> dict[str, Any]:
    """Prompt, references and the language of the answer."""
    origin, paper = source(evaluated), is_other_wording(variant, "gurgurov")

    def document(row: Mapping[str, Any]) -> dict[str, Any]:
        prompt = as_gurgurov(row, languages.english_name(evaluated)) if paper else as_lm_eval(row, CODES[evaluated])
        return {**row, "prompt": prompt, "references": references(row, origin), EXPECTED_LANGUAGE: evaluated}

    return as_dataset(document(row) for row in load_rows(origin, settings))


def references(row: Mapping[str, Any], origin: RowsSource) -> list[str]:
    """The right answers of a row in SQuAD's fields, at least one."""
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if not texts:
        raise DataError(f"{origin}: column 'answers' holds {answers!r}, expected {{'text': [one answer at least]}}")
    return list(texts)


def as_lm_eval(row: Mapping[str, Any], code: str) -> str:
    """lm-eval's wording, in the language's own words."""
    context, question, answer = WORDS[code]
    return f"{context}: {row['context']}\n\n{question}: {row['question']}\n\n{answer}:"


def as_gurgurov(row: Mapping[str, Any], language: str) -> str:
    """The wording of Gurgurov et al. 2025."""
    return (
        f"Answer the question based on the {language} context provided. Extract the exact answer from the context."
        f"\n\nContext: {row['context']}\n\nQuestion: {row['question']}\n\nAnswer:"
    )


def metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """SQuAD 1.1 against the first reference, as lm-eval scores it, and MLQA's against all."""
    first = document["references"][:1]
    return {
        "exact_match": exact_match(results[0], first, squad),
        "f1": f1(results[0], first, squad),
        **mlqa_metrics(document, results),
    }


def gurgurov_metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The paper's normalisation and MLQA's, against all references."""
    text, right = results[0].strip(), document["references"]
    return {
        "exact_match": exact_match(text, right, gurgurov),
        "f1": f1(text, right, gurgurov),
        **mlqa_metrics(document, results),
    }


def mlqa_metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """MLQA's normalisation in the language of the answer, and the language that the answer is in."""
    text, right, words = results[0].strip(), document["references"], mlqa(document[EXPECTED_LANGUAGE])
    return {
        "exact_match_mlqa": exact_match(text, right, words),
        "f1_mlqa": f1(text, right, words, both_empty=0.0),
        **answer_language(results[0], document[EXPECTED_LANGUAGE]),
    }


def generated_files() -> dict[Path, str]:
    """One file a language and wording, and a group for each wording."""
    return files_of_two_wordings("xquad", CODES, METRICS, "gurgurov", METRICS)
