"""Items of our own in the fields of the data sets that may not even be excerpted here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval_steering.lmeval.task_families import belebele, include, mlqa


def _question(question: str, options: str, answer: int, domain: str) -> dict[str, Any]:
    letters = zip("abcd", options.split("|"), strict=True)
    texts = {f"option_{letter}": text for letter, text in letters}
    return {"language": "x", "question": question, **texts, "answer": answer, "domain": domain, "subject": "x"}


INCLUDE = {
    "fra_Latn": [
        _question("Quel fleuve traverse Paris ? ", "La Loire|La Seine|Le Rhône|La Garonne", 1, "Social Science"),
        _question("Combien font deux fois trois ?", "Quatre|Cinq|Six|Sept", 2, "STEM"),
        _question("Qui a écrit ce poème ?", "Le boulanger|Le poète|Le maire|Le juge", 1, "Arts & Humanities"),
        _question("De quel métal est ce fil ?", "Cuivre|Bois|Verre|Laine", 0, "STEM"),
        _question("À un feu rouge, que fait-on ?", "On accélère|On tourne|On chante|On s'arrête", 3, "Driving License"),
    ],
    "heb_Hebr": [  # lm-eval writes this domain with a small l in Hebrew alone
        _question("מה עושים ברמזור אדום?", "נוסעים|עוצרים|שרים|פונים", 1, "Driving License"),
        _question("מי כתב את השיר?", "האופה|המשורר|השופט|הרופא", 1, "Arts & Humanities"),
    ],
}


def _span(context: str, question: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"id": question, "context": context, "question": question,
            "answers": {"text": list(answers), "answer_start": starts}}  # fmt: skip


MLQA = {
    "deu_Latn-eng_Latn": [
        _span("Die alte Brücke steht seit 1820 in der Stadt.", "Since when has the bridge stood?", "1820", "seit 1820"),
        _span("Der Garten gehört der Schule am Fluss.", "Whose is the garden?", "der Schule", "Schule am Fluss"),
    ],
    "zho_Hans-zho_Hans": [
        _span("老桥建于1820年，位于城市的北边。", "老桥在哪里？", "城市的北边", "北边"),
        _span("花园属于河边的学校。", "花园属于谁？", "河边的学校"),
    ],
    "arb_Arab-arb_Arab": [_span("الجسر القديم في المدينة منذ عام 1820.", "منذ متى؟", "عام 1820")],
}


def write(folder: Path, family: str, items: Mapping[str, Iterable[Mapping[str, Any]]], split: str = "test") -> None:
    """Items as `STEERING_DATA` has them."""
    for language, rows in items.items():
        path = folder / family / f"{language}.{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_everywhere(folder: Path) -> None:
    """A few items for every language and domain of INCLUDE, every pair of MLQA and every language of Belebele."""
    questions = {code: [*INCLUDE.get(code, []), *_of_each_domain(code)] for code in include.CODES}
    for size in include.SIZES:
        write(folder, f"include_{size}", questions)
    write(folder, "mlqa", {pair: MLQA.get(pair, MLQA["deu_Latn-eng_Latn"]) for pair in mlqa.PAIRS})
    write(folder, "belebele", {code: [BELEBELE] for code in belebele.CODES})


def _of_each_domain(code: str) -> list[dict[str, Any]]:
    domains = [domain.replace("_", " ").title() for domain, codes in include.DOMAINS.items() if code in codes.split()]
    return [_question(f"{domain}?", "a|b|c|d", 2, domain) for domain in domains]


BELEBELE = {
    "flores_passage": "The bridge stood for a hundred years.", "question": "How long did it stand?",
    "mc_answer1": "a day", "mc_answer2": "a hundred years", "mc_answer3": "a year", "mc_answer4": "never",
    "correct_answer_num": "2", "dialect": "x",
}  # fmt: skip
