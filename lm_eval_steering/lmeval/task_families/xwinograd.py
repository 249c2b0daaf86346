"""XWinograd (Tikhonov and Ryabinin 2021): which of two names a pronoun stands for.

Default wording: lm-eval's partial scoring, which is also that of Rahmanisa et al. 2025: the rest of the sentence is
scored after each name. Both put a blank before the rest whatever the language; the variant `natural` keeps the text's
blank or none.

The French part has two items without a sentence in its makers' file; they are left out, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_steering.lmeval.sources import DataError, RowsSource, as_dataset, hub_copies, load_rows
from lm_eval_steering.lmeval.task_families import code_of, expect, files_of_two_wordings
from lm_eval_steering.lmeval.task_families.common import is_other_wording, keeps_to_its_file, text_id

NEEDS = "Muennighoff/xwinograd (hub) or local files"
CODES = {
    "eng_Latn": "en", "fra_Latn": "fr", "jpn_Jpan": "jp", "por_Latn": "pt", "rus_Cyrl": "ru", "zho_Hans": "zh",
}  # fmt: skip


def source(evaluated: str) -> RowsSource:
    """Where the items of a language are."""
    code = code_of(evaluated, CODES, "XWinograd")
    columns = ("sentence", "option1", "option2", "answer")
    copies = hub_copies("Muennighoff/xwinograd", code, "test")
    return RowsSource("xwinograd", evaluated, "test", columns, copies, skip_incomplete=True)


@keeps_to_its_file
def documents(evaluated: str, variant: str = "", **settings: Any) -> dict[str, Any]:
    """Two contexts, the rest of the sentence, and the right context's index."""
    origin, natural = source(evaluated), is_other_wording(variant, "natural")
    return as_dataset(
        {
            "id": text_id(row["sentence"]),
            **row,
            **halves(row, origin, natural=natural),
            "label": ("1", "2").index(expect(row, "answer", ("1", "2"), origin)),
        }
        for row in load_rows(origin, settings)
    )


def halves(row: Mapping[str, Any], origin: RowsSource, natural: bool = False) -> dict[str, Any]:
    """The sentence up to the gap with each name, and the rest: stripped, or `natural`, with its own leading blank."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise DataError(f"{origin}: no gap (_) in {row['sentence']!r}")
    return {
        "contexts": [before + row[name] for name in ("option1", "option2")],
        "rest": after.rstrip() if natural else after.strip(),
    }


def generated_files() -> dict[Path, str]:
    """One file a language and wording, and a group for each wording."""
    return files_of_two_wordings("xwinograd", CODES, ("acc",), "natural", ("acc",))
