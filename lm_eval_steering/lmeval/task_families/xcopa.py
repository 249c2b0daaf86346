"""XCOPA (Ponti et al. 2020): which of two sentences is the cause or the effect of a premise.

Default wording: lm-eval's, which is also that of Rahmanisa et al. 2025 (premise without its last character, a
connector, the choice with a small first letter). Two things in it are faults of the text, not of the model: Thai and
Tamil premises end without a full stop, so a letter is cut off, and a blank is forced where Chinese and Thai write none.
The variant `natural` cuts only a full stop and writes no such blank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_steering.lmeval.sources import RowsSource, as_dataset, hub_copies, load_rows
from lm_eval_steering.lmeval.task_families import code_of, expect, files_of_two_wordings
from lm_eval_steering.lmeval.task_families.common import is_other_wording, keeps_to_its_file

NEEDS = "cambridgeltl/xcopa (hub) or local files"
CODES = {
    "est_Latn": "et", "hat_Latn": "ht", "ind_Latn": "id", "ita_Latn": "it", "quy_Latn": "qu", "swh_Latn": "sw",
    "tam_Taml": "ta", "tha_Thai": "th", "tur_Latn": "tr", "vie_Latn": "vi", "zho_Hans": "zh",
}  # fmt: skip
CONNECTORS = {  # cause, effect
    "et": ("sest", "seetõttu"), "ht": ("poukisa", "donk sa"), "id": ("karena", "maka"), "it": ("perché", "quindi"),
    "qu": ("imataq", "chaymi"), "sw": ("kwa sababu", "kwa hiyo"), "ta": ("காரணமாக", "எனவே"),
    "th": ("เพราะ", "ดังนั้น"), "tr": ("çünkü", "bu yüzden"), "vi": ("bởi vì", "vì vậy"), "zh": ("因为", "所以"),
}  # fmt: skip
UNSPACED = ("th", "zh")
FULL_STOPS = ".。．।"


def source(evaluated: str) -> RowsSource:
    """Where the items of a language are."""
    code = code_of(evaluated, CODES, "XCOPA")
    columns = ("premise", "choice1", "choice2", "question", "label")
    return RowsSource("xcopa", evaluated, "test", columns, hub_copies("cambridgeltl/xcopa", code, "test"))


@keeps_to_its_file
def documents(evaluated: str, variant: str = "", **settings: Any) -> dict[str, Any]:
    """Prompt, two choices and the right one's index."""
    origin = source(evaluated)
    write = natural if is_other_wording(variant, "natural") else as_lm_eval
    return as_dataset(
        {
            **row,
            **write(row, CODES[evaluated], expect(row, "question", ("cause", "effect"), origin)),
            "label": expect(row, "label", (0, 1), origin),
        }
        for row in load_rows(origin, settings)
    )


def connector(code: str, question: str) -> str:
    """The word between premise and choice."""
    return CONNECTORS[code][question == "effect"]


def small_first_letter(choice: str) -> str:
    """The choice as the second half of a sentence."""
    return choice[:1].lower() + choice[1:]


def as_lm_eval(row: Mapping[str, Any], code: str, question: str) -> dict[str, Any]:
    """lm-eval's and Rahmanisa's wording; the blank before the choice is the template's."""
    return {
        "prompt": f"{row['premise'].strip()[:-1]} {connector(code, question)}",
        "choices": [small_first_letter(row[name]) for name in ("choice1", "choice2")],
    }


def natural(row: Mapping[str, Any], code: str, question: str) -> dict[str, Any]:
    """Nothing but a full stop is cut off, and blanks stand only where the language writes them."""
    blank = "" if code in UNSPACED else " "
    premise = row["premise"].strip()
    premise = premise[:-1].rstrip() if premise[-1:] in FULL_STOPS else premise
    return {
        "prompt": f"{premise}{blank}{connector(code, question)}",
        "choices": [blank + small_first_letter(row[name]) for name in ("choice1", "choice2")],
    }


def generated_files() -> dict[Path, str]:
    """One file a language and wording, and a group for each wording."""
    return files_of_two_wordings("xcopa", CODES, ("acc",), "natural", ("acc",))
