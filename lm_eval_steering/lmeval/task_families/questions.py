"""Questions that a model is to answer in another language: our own, mVicuna's, and those of CLaS-Bench."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.files import read_json_lines
from lm_eval_steering.lmeval.sources import DataError, Hub, RowsSource, data_folder, load_rows

FILE = Path(__file__).parent / "data" / "questions.jsonl"


@cache
def _everyday() -> tuple[Mapping[str, str], ...]:
    return tuple(read_json_lines(FILE))


@cache
def everyday_languages() -> tuple[str, ...]:
    """Languages that our own questions are in."""
    return tuple(code for code in _everyday()[0] if code != "id")


def everyday(code: str, _settings: Mapping[str, Any]) -> list[str]:
    """Short everyday questions of our own writing, parallel over languages (`data/questions.LICENSE.txt`)."""
    if code not in everyday_languages():
        raise SteeringError(f"our own questions are not in {code}; they are in {', '.join(everyday_languages())}")
    return [row[code] for row in _everyday()]


def mvicuna_source(code: str) -> RowsSource:
    """mVicuna (Tang et al. 2024): 70 questions a language. No copy on the hub is known to us: local files only.

    `data/` of github.com/RUCAIBox/Language-Specific-Neurons can be named as it is.
    """
    return RowsSource("mvicuna", code, "test", ("prompt",))


def mvicuna(code: str, settings: Mapping[str, Any]) -> list[str]:
    """mVicuna's questions in one language; also from `mvicuna/fr.txt`, a question a line, as they were published."""
    folder = data_folder(settings)
    if folder is not None:
        published = [folder / "mvicuna" / f"{name}.txt" for name in languages.spellings(code)]
        if path := next((path for path in published if path.is_file()), None):
            return [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [str(row["prompt"]).strip() for row in load_rows(mvicuna_source(code), settings)]


def clas_bench_source(code: str) -> RowsSource:
    """CLaS-Bench (Gurgurov et al. 2026): 70 questions in each of 32 languages; on the hub one table for all."""
    return RowsSource(
        "clas_bench", code, "train", ("language_code", "question"), (Hub("DGurgurov/CLaS-Bench", None, "train"),)
    )


def clas_bench(code: str, settings: Mapping[str, Any]) -> list[str]:
    """CLaS-Bench's questions in one language."""
    source = clas_bench_source(code)
    spelled = languages.spellings(code)
    rows = load_rows(source, settings)
    questions = [str(row["question"]).strip() for row in rows if row["language_code"] in spelled]
    if not questions:
        there = sorted({str(row["language_code"]) for row in rows})
        raise DataError(f"{source}: no question in {code}; language_code holds {', '.join(there)}")
    return questions


QUESTIONS: Mapping[str, Callable[[str, Mapping[str, Any]], list[str]]] = {
    "everyday": everyday,
    "mvicuna": mvicuna,
    "clas_bench": clas_bench,
}
