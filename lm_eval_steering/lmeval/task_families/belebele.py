"""Belebele (Bandarkar et al. 2024): a question about a passage of FLORES-200, four answers; 122 languages.

Default wording: lm-eval's, scored by the letters' log-likelihood. The variant `gurgurov` generates an answer to the
prompt of Gurgurov et al. 2025 and reads the letter strictly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.lmeval.sources import RowsSource, as_dataset, hub_copies, load_rows
from lm_eval_steering.lmeval.task_families import code_of, expect, files_of_two_wordings
from lm_eval_steering.lmeval.task_families.answers import LETTERS, letter, score_answer
from lm_eval_steering.lmeval.task_families.common import answer_language, is_other_wording, keeps_to_its_file

NEEDS = "facebook/belebele (hub) or local files"
_CODES = """
acm_Arab afr_Latn als_Latn amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng azj_Latn bam_Latn
ben_Beng ben_Latn bod_Tibt bul_Cyrl cat_Latn ceb_Latn ces_Latn ckb_Arab dan_Latn deu_Latn ell_Grek eng_Latn est_Latn
eus_Latn fin_Latn fra_Latn fuv_Latn gaz_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hin_Latn hrv_Latn
hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kac_Latn kan_Knda kat_Geor kaz_Cyrl
kea_Latn khk_Cyrl khm_Khmr kin_Latn kir_Cyrl kor_Hang lao_Laoo lin_Latn lit_Latn lug_Latn luo_Latn lvs_Latn mal_Mlym
mar_Deva mkd_Cyrl mlt_Latn mri_Latn mya_Mymr nld_Latn nob_Latn npi_Deva npi_Latn nso_Latn nya_Latn ory_Orya pan_Guru
pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn ron_Latn rus_Cyrl shn_Mymr sin_Latn sin_Sinh slk_Latn slv_Latn sna_Latn
snd_Arab som_Latn sot_Latn spa_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn tam_Taml tel_Telu tgk_Cyrl tgl_Latn
tha_Thai tir_Ethi tsn_Latn tso_Latn tur_Latn ukr_Cyrl urd_Arab urd_Latn uzn_Latn vie_Latn war_Latn wol_Latn xho_Latn
yor_Latn zho_Hans zho_Hant zsm_Latn zul_Latn
"""
CODES = {code: code for code in _CODES.split()}
ANSWERS = ("mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")


def source(evaluated: str) -> RowsSource:
    """Where the questions of a language are."""
    code = code_of(evaluated, CODES, "Belebele")
    columns = ("flores_passage", "question", *ANSWERS, "correct_answer_num")
    return RowsSource("belebele", evaluated, "test", columns, hub_copies("facebook/belebele", code, "test"))


@keeps_to_its_file
def documents(evaluated: str, variant: str = "", **settings: Any) -> dict[str, Any]:
    """Prompt and the right letter's index."""
    origin, paper = source(evaluated), is_other_wording(variant, "gurgurov")

    def document(row: Mapping[str, Any]) -> dict[str, Any]:
        number = expect({"correct_answer_num": str(row["correct_answer_num"])}, "correct_answer_num",
                        ("1", "2", "3", "4"), origin)  # fmt: skip
        prompt = as_gurgurov(row, languages.english_name(evaluated)) if paper else as_lm_eval(row)
        label = int(number) - 1
        return {
            **item_id(row),
            **row,
            "prompt": prompt,
            "choices": list(LETTERS),
            "label": label,
            "gold": LETTERS[label],
        }

    return as_dataset(document(row) for row in load_rows(origin, settings))


def item_id(row: Mapping[str, Any]) -> dict[str, str]:
    """The name of a question in all languages: its passage's link and its number; nothing where the rows lack them."""
    if row.get("link") is None or row.get("question_number") is None:
        return {}
    return {"id": f"{row['link']} {row['question_number']}"}


def as_lm_eval(row: Mapping[str, Any]) -> str:
    """lm-eval's wording."""
    options = "".join(f"{mark}: {row[name]}\n" for mark, name in zip(LETTERS, ANSWERS, strict=True))
    return f"P: {row['flores_passage']}\nQ: {row['question'].strip()}\n{options}Answer:"


def as_gurgurov(row: Mapping[str, Any], language: str) -> str:
    """The wording of Gurgurov et al. 2025."""
    options = "".join(f"{mark}) {row[name]}\n" for mark, name in zip(LETTERS, ANSWERS, strict=True))
    return (
        f"Read the following {language} passage and answer the question.\n\nPassage: {row['flores_passage']}\n\n"
        f"Question: {row['question']}\n\n{options}\nAnswer:"
    )


def generated_metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """`acc`, and `parsed`: the share of answers that name one letter."""
    return {**score_answer(letter(results[0]), document["gold"]), **answer_language(results[0])}


def generated_files() -> dict[Path, str]:
    """One file a language and wording, and a group for each wording."""
    return files_of_two_wordings("belebele", CODES, ("acc", "acc_norm"), "gurgurov", ("acc", "parsed"))
