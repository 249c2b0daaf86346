"""MLQA (Lewis et al. 2020): questions in one language about a paragraph in another or the same; 7 x 7 pairs.

`steering_mlqa_<context>_<question>`: the answer is a span of the context, so in the context's language; its official
normalisation scores it. Default wording: lm-eval's. The variant `gurgurov` has the prompt that Gurgurov et al. 2025 use
for XQuAD, and its normalisation for `exact_match` and `f1`, with the official one beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.lmeval.expected_language import EXPECTED_LANGUAGE
from lm_eval_steering.lmeval.sources import RowsSource, as_dataset, hub_copies, load_rows
from lm_eval_steering.lmeval.task_families import code_of, group_file, language_tag, task_file, task_name
from lm_eval_steering.lmeval.task_families import xquad as squad_like
from lm_eval_steering.lmeval.task_families.answers import exact_match, f1
from lm_eval_steering.lmeval.task_families.answers import mlqa as normalised
from lm_eval_steering.lmeval.task_families.common import answer_language, is_other_wording, keeps_to_its_file

NEEDS = "facebook/mlqa (hub, its parquet conversion) or local files"
CODES = {
    "arb_Arab": "ar", "deu_Latn": "de", "eng_Latn": "en", "hin_Deva": "hi", "spa_Latn": "es", "vie_Latn": "vi",
    "zho_Hans": "zh",
}  # fmt: skip
PAIRS = tuple(f"{context}-{question}" for context in CODES for question in CODES)


def source(evaluated: str) -> RowsSource:
    """Where the questions of a pair `context-question` are; one code stands for both."""
    context, _, question = evaluated.partition("-")
    codes = [code_of(code, CODES, "MLQA") for code in (context, question or context)]
    copies = hub_copies("facebook/mlqa", ".".join(["mlqa", *codes]), "test")
    return RowsSource("mlqa", f"{context}-{question or context}", "test", squad_like.COLUMNS, copies)


@keeps_to_its_file
def documents(evaluated: str, variant: str = "", **settings: Any) -> dict[str, Any]:
    """Prompt, references and the language of the answer."""
    origin, paper = source(evaluated), is_other_wording(variant, "gurgurov")
    language = evaluated.partition("-")[0]

    def document(row: Mapping[str, Any]) -> dict[str, Any]:
        prompt = squad_like.as_gurgurov(row, languages.english_name(language)) if paper else as_lm_eval(row)
        return {**row, "prompt": prompt, "references": squad_like.references(row, origin), EXPECTED_LANGUAGE: language}

    return as_dataset(document(row) for row in load_rows(origin, settings))


def as_lm_eval(row: Mapping[str, Any]) -> str:
    """lm-eval's wording, in English whatever the languages."""
    return f"Context: {row['context']}\n\nQuestion: {row['question']}\n\nAnswer:"


def metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """MLQA's official exact match and F1, the best over the references."""
    text, right, words = results[0].strip(), document["references"], normalised(document[EXPECTED_LANGUAGE])
    return {
        "exact_match": exact_match(text, right, words),
        "f1": f1(text, right, words, both_empty=0.0),
        **answer_language(results[0], document[EXPECTED_LANGUAGE]),
    }


def generated_files() -> dict[Path, str]:
    """One file a pair and wording; a group for each wording, and one for the pairs of a language with itself."""
    plain = {pair: task_name("mlqa", pair) for pair in PAIRS}
    other = {pair: task_name("mlqa", pair, "gurgurov") for pair in PAIRS}
    same = {f"{code}-{code}": code for code in CODES}
    files = []
    for pair, name in plain.items():
        code = same.get(pair)
        files.append(
            task_file("mlqa", "_mlqa.yaml", name, language_tag(code) if code else None, evaluated=code or pair)
        )
        files.append(task_file("mlqa", "_mlqa_gurgurov.yaml", other[pair], evaluated=code or pair, variant="gurgurov"))
    both = ("exact_match", "f1")
    files.append(group_file("mlqa", "steering_mlqa", list(plain.values()), both))
    files.append(group_file("mlqa", "steering_mlqa_gurgurov", list(other.values()), squad_like.METRICS))
    files.append(group_file("mlqa", "steering_mlqa_same", [plain[pair] for pair in same], both))
    return dict(files)
