"""Language Confusion Benchmark (Marchisio et al. 2024): is the answer in the language that was asked in, or for?

Monolingual prompts are in the language of the answer; cross-lingual ones are in English and ask for another language.
Line- and word-level pass rates are the benchmark's (`metrics.pass_rates`, compared with its script in
`tests/metrics/test_language_confusion.py`): an item expects the language of its row, whatever is steered to.

Prompts are sent as they are; the answer ends at "\\nQ:", where the benchmark's script cuts it. The paper samples
(temperature 0.3, top-p 0.75); here decoding is greedy, so that an answer depends on nothing but its prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.expected_language import EXPECTED_LANGUAGE
from lm_eval_steering.lmeval.sources import (
    DataError,
    DatasetRows,
    RowsSource,
    as_dataset,
    checked_rows,
    data_folder,
    load_rows,
    read_located,
)
from lm_eval_steering.lmeval.task_families import group_file, task_file, task_name
from lm_eval_steering.lmeval.task_families.common import keeps_to_its_file, text_id

NEEDS = "the benchmark's test_sets in local files (github.com/for-ai/language-confusion, test_sets.zip)"
FAMILY = "language_confusion"
PROMPTS_IN = "eng_Latn"  # of the cross-lingual part
MONOLINGUAL: Mapping[str, tuple[str, ...]] = {
    "aya": ("eng_Latn", "tur_Latn", "arb_Arab", "zho_Hans", "por_Latn"),
    "dolly": ("hin_Deva", "rus_Cyrl", "fra_Latn", "arb_Arab", "spa_Latn"),
    # The benchmark's README names Hindi and Russian too, its files do not have them.
    "okapi": (
        "eng_Latn", "fra_Latn", "ita_Latn", "deu_Latn", "zho_Hans", "vie_Latn", "spa_Latn", "ind_Latn", "por_Latn",
        "arb_Arab",
    ),
    "native": ("spa_Latn", "fra_Latn", "jpn_Jpan", "kor_Hang"),
}  # fmt: skip
CROSSLINGUAL = ("okapi", "sharegpt", "complex_prompts")
TARGETS = (
    "fra_Latn", "deu_Latn", "spa_Latn", "por_Latn", "ita_Latn", "jpn_Jpan", "kor_Hang", "zho_Hans", "arb_Arab",
    "tur_Latn", "hin_Deva", "rus_Cyrl", "ind_Latn", "vie_Latn",
)  # fmt: skip
METRICS = ("lpr", "wpr", "lcpr", "lang_expected", "lang_unknown", "degenerate")


def rows(part: str, source: str, code: str, settings: Mapping[str, Any]) -> DatasetRows:
    """Prompts of one source in, or asking for, one language.

    Args:
        part: `monolingual` or `crosslingual`.
        source: such as okapi.
        code: of the language of the answer.
        settings: lm-eval's metadata and model arguments; `data_dir` names the user's folder.

    Returns:
        The rows of `test_sets/PART/SOURCE/LL.csv`, as the benchmark publishes them, in the user's folder or in
        `language_confusion` there; else those of `language_confusion/CODE.PART-SOURCE.jsonl`.

    Raises:
        DataError: if there are none, or a row is in another language.
    """
    wanted = RowsSource(FAMILY, code, f"{part}-{source}", ("prompt", "language"))
    path = _published(part, source, code, settings)
    checked = checked_rows(read_located(path), wanted, str(path)) if path else load_rows(wanted, settings)
    for number, row in enumerate(checked, start=1):
        if row["language"] not in languages.spellings(code):
            raise DataError(f"{path or wanted}, row {number}: language {row['language']!r}, expected {code}")
    return checked


def _published(part: str, source: str, code: str, settings: Mapping[str, Any]) -> Path | None:
    folder = data_folder(settings)
    if folder is None:
        return None
    tops = (folder / FAMILY / "test_sets", folder / FAMILY, folder / "test_sets", folder)
    names = languages.spellings(code)
    files = (top / part / source / f"{name}.csv" for top in tops for name in names)
    return next((file for file in files if file.is_file()), None)


@keeps_to_its_file
def documents(evaluated: str, source: str, **settings: Any) -> dict[str, Any]:
    """Prompts of one source; `evaluated` is one language, or `eng_Latn-fra_Latn` where English asks for another.

    Raises:
        SteeringError: for a source or language that the benchmark does not have.
    """
    asked_in, _, asked_for = evaluated.partition("-")
    part, code = ("crosslingual", asked_for) if asked_for else ("monolingual", asked_in)
    known = dict.fromkeys(CROSSLINGUAL, TARGETS) if asked_for else MONOLINGUAL
    if code not in known.get(source, ()) or (asked_for and asked_in != PROMPTS_IN):
        raise SteeringError(f"the {part} part of language confusion has no source {source!r} in {evaluated}")
    return as_dataset(
        {
            # Cross-lingual rows are the same requests in each language, in the same order.
            "id": f"{source}-{number}" if asked_for else text_id(row["prompt"]),
            "prompt": row["prompt"],
            "language": code,
            EXPECTED_LANGUAGE: code,
        }
        for number, row in enumerate(rows(part, source, code, settings))
    )


def generated_files() -> dict[Path, str]:
    """Path and text of the task files."""
    return dict(_files())


def _files() -> Iterable[tuple[Path, str]]:
    mono = [(code, source) for source, codes in MONOLINGUAL.items() for code in codes]
    cross = [(f"{PROMPTS_IN}-{code}", source) for source in CROSSLINGUAL for code in TARGETS]
    for part, pairs in (("monolingual", mono), ("crosslingual", cross)):
        names = [task_name(FAMILY, evaluated, source) for evaluated, source in pairs]
        yield group_file(FAMILY, f"steering_{FAMILY}_{part}", names, METRICS)
        for (evaluated, source), name in zip(pairs, names, strict=True):
            yield task_file(FAMILY, f"_{FAMILY}.yaml", name, evaluated=evaluated, source=source)
