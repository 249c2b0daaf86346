"""INCLUDE (Romanou et al. 2024): exam questions of the languages' own regions; base-44, and lite-44, its smaller half.

Default wording: that of lm-eval's include_base_44, with its line about the domain before each question; all domains of
a language together, or one of them. The variant `rahmanisa` is that of Rahmanisa et al. 2025: "A)" for "A.", no line
about the domain, and the letters scored without a blank before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_steering.lmeval.sources import DataError, Hub, RowsSource, as_dataset, hub_copies, load_rows
from lm_eval_steering.lmeval.task_families import code_of, expect, group_file, language_tag, task_file, task_name
from lm_eval_steering.lmeval.task_families.common import is_other_wording, keeps_to_its_file, text_id

NEEDS = "CohereLabs/include-base-44, CohereLabs/include-lite-44 (hub) or local files"
SIZES = ("base_44", "lite_44")
LETTERS = "ABCD"
CODES = {
    "als_Latn": "Albanian", "arb_Arab": "Arabic", "hye_Armn": "Armenian", "azj_Latn": "Azerbaijani",
    "eus_Latn": "Basque", "bel_Cyrl": "Belarusian", "ben_Beng": "Bengali", "bul_Cyrl": "Bulgarian",
    "zho_Hans": "Chinese", "hrv_Latn": "Croatian", "nld_Latn": "Dutch", "est_Latn": "Estonian",
    "fin_Latn": "Finnish", "fra_Latn": "French", "kat_Geor": "Georgian", "deu_Latn": "German",
    "ell_Grek": "Greek", "heb_Hebr": "Hebrew", "hin_Deva": "Hindi", "hun_Latn": "Hungarian",
    "ind_Latn": "Indonesian", "ita_Latn": "Italian", "jpn_Jpan": "Japanese", "kaz_Cyrl": "Kazakh",
    "kor_Hang": "Korean", "lit_Latn": "Lithuanian", "zsm_Latn": "Malay", "mal_Mlym": "Malayalam",
    "npi_Deva": "Nepali", "mkd_Cyrl": "North Macedonian", "pes_Arab": "Persian", "pol_Latn": "Polish",
    "por_Latn": "Portuguese", "rus_Cyrl": "Russian", "srp_Cyrl": "Serbian", "spa_Latn": "Spanish",
    "tgl_Latn": "Tagalog", "tam_Taml": "Tamil", "tel_Telu": "Telugu", "tur_Latn": "Turkish",
    "ukr_Cyrl": "Ukrainian", "urd_Arab": "Urdu", "uzn_Latn": "Uzbek", "vie_Latn": "Vietnamese",
}  # fmt: skip
# Domain -> the languages that have questions of it, as lm-eval's own list of tasks has them.
DOMAINS = {
    "applied_science": "azj_Latn zho_Hans nld_Latn est_Latn fin_Latn hin_Deva hun_Latn ind_Latn ita_Latn por_Latn "
    "rus_Cyrl tel_Telu",
    "arts_humanities": "als_Latn arb_Arab hye_Armn azj_Latn bel_Cyrl ben_Beng bul_Cyrl zho_Hans hrv_Latn nld_Latn "
    "est_Latn fin_Latn fra_Latn kat_Geor ell_Grek heb_Hebr hin_Deva ind_Latn ita_Latn kaz_Cyrl lit_Latn zsm_Latn "
    "mal_Mlym mkd_Cyrl pes_Arab por_Latn rus_Cyrl srp_Cyrl spa_Latn tgl_Latn tel_Telu tur_Latn ukr_Cyrl urd_Arab "
    "uzn_Latn vie_Latn",
    "business_commerce": "als_Latn arb_Arab azj_Latn zho_Hans ell_Grek lit_Latn zsm_Latn mkd_Cyrl por_Latn rus_Cyrl "
    "tur_Latn",
    "driving_license": "arb_Arab hye_Armn zho_Hans fra_Latn deu_Latn heb_Hebr hin_Deva jpn_Jpan npi_Deva pes_Arab "
    "rus_Cyrl tgl_Latn",
    "general_knowledge": "arb_Arab ben_Beng hin_Deva mal_Mlym tam_Taml",
    "health_oriented_education": "als_Latn azj_Latn zho_Hans nld_Latn est_Latn fin_Latn fra_Latn ell_Grek hin_Deva "
    "ita_Latn mal_Mlym por_Latn rus_Cyrl spa_Latn urd_Arab",
    "marine_license": "mal_Mlym rus_Cyrl",
    "medical_license": "ell_Grek jpn_Jpan uzn_Latn",
    "professional_certification": "eus_Latn ben_Beng zho_Hans ell_Grek hin_Deva ind_Latn ita_Latn jpn_Jpan kor_Hang "
    "lit_Latn npi_Deva pes_Arab pol_Latn",
    "social_science": "als_Latn arb_Arab hye_Armn azj_Latn bel_Cyrl bul_Cyrl zho_Hans hrv_Latn nld_Latn est_Latn "
    "fin_Latn fra_Latn deu_Latn ell_Grek hin_Deva hun_Latn ind_Latn ita_Latn kor_Hang lit_Latn zsm_Latn mal_Mlym "
    "mkd_Cyrl pes_Arab pol_Latn por_Latn rus_Cyrl srp_Cyrl spa_Latn tel_Telu tur_Latn ukr_Cyrl uzn_Latn vie_Latn",
    "stem": "als_Latn arb_Arab hye_Armn azj_Latn bel_Cyrl ben_Beng bul_Cyrl zho_Hans hrv_Latn nld_Latn est_Latn "
    "fin_Latn fra_Latn deu_Latn ell_Grek hin_Deva hun_Latn ind_Latn ita_Latn lit_Latn mal_Mlym mkd_Cyrl pes_Arab "
    "pol_Latn por_Latn rus_Cyrl srp_Cyrl spa_Latn tam_Taml tel_Telu tur_Latn ukr_Cyrl urd_Arab uzn_Latn vie_Latn",
}
ODD_SPELLING = {("heb_Hebr", "Driving License"): "Driving license"}  # in lm-eval's line about the domain


OPTIONS = ("option_a", "option_b", "option_c", "option_d")


def source(evaluated: str, size: str) -> RowsSource:
    """Where the questions of a language are; the hub's organisation was renamed, both names are tried."""
    name, repository = code_of(evaluated, CODES, "INCLUDE"), f"include-{size.replace('_', '-')}"
    columns = ("question", *OPTIONS, "answer", "domain")
    copies = (*hub_copies(f"CohereLabs/{repository}", name, "test"), Hub(f"CohereForAI/{repository}", name))
    return RowsSource(f"include_{size}", evaluated, "test", columns, copies, may_be_empty=OPTIONS)


@keeps_to_its_file
def documents(evaluated: str, size: str, domain: str = "", variant: str = "", **settings: Any) -> dict[str, Any]:
    """Prompt and the right letter's index, of all domains or of one."""
    origin = source(evaluated, size)
    rows = load_rows(origin, settings)
    chosen = [row for row in rows if not domain or domain_key(row["domain"]) == domain]
    if not chosen:
        domains = sorted({domain_key(row["domain"]) for row in rows})
        raise DataError(f"{origin}: no question of the domain {domain}; the rows have {', '.join(domains)}")
    write = as_rahmanisa if is_other_wording(variant, "rahmanisa") else as_lm_eval
    return as_dataset(
        {
            "id": text_id(row["question"]),
            **row,
            **write(row, evaluated),
            "label": expect(row, "answer", (0, 1, 2, 3), origin),
            "choices": list(LETTERS),
        }
        for row in chosen
    )


def domain_key(domain: str) -> str:
    """`Arts & Humanities` as task names have it: `arts_humanities`."""
    return domain.strip().lower().replace(" & ", "_").replace(" ", "_")


def as_lm_eval(row: Mapping[str, Any], evaluated: str) -> dict[str, str]:
    """lm-eval's wording, with the blank that its template has before D."""
    domain = ODD_SPELLING.get((evaluated, row["domain"]), row["domain"])
    return {
        "about": f"The following is multiple-choice question about {domain}.",
        "prompt": f"{row['question'].strip()}\nA. {row['option_a']}\nB. {row['option_b']}\nC. {row['option_c']}\n"
        f" D. {row['option_d']}\nAnswer:",
    }


def as_rahmanisa(row: Mapping[str, Any], _evaluated: str) -> dict[str, str]:
    """The wording of Rahmanisa et al. 2025."""
    return {
        "prompt": f"{row['question']}\nA) {row['option_a']}\nB) {row['option_b']}\nC) {row['option_c']}\n"
        f"D) {row['option_d']}\nAnswer:"
    }


def _files_of(size: str) -> list[tuple[Path, str]]:
    family = f"include_{size}"
    plain, other = ([task_name(family, code, *rest) for code in CODES] for rest in ((), ("rahmanisa",)))
    files = [
        task_file("include", "_include.yaml", name, language_tag(code), evaluated=code, size=size)
        for name, code in zip(plain, CODES, strict=True)
    ]
    files += [
        task_file("include", "_include_rahmanisa.yaml", name, evaluated=code, size=size, variant="rahmanisa")
        for name, code in zip(other, CODES, strict=True)
    ]
    for domain, codes in DOMAINS.items():
        names = {code: task_name(family, code, domain) for code in codes.split()}
        files += [
            task_file("include", "_include.yaml", name, evaluated=code, size=size, domain=domain)
            for code, name in names.items()
        ]
        files.append(group_file("include", f"steering_{family}_{domain}", list(names.values()), ("acc",)))
    files.append(group_file("include", f"steering_{family}", plain, ("acc",)))
    files.append(group_file("include", f"steering_{family}_rahmanisa", other, ("acc",)))
    return files


def generated_files() -> dict[Path, str]:
    """For both sizes a file a language, wording and domain, and the groups."""
    return dict(file for size in SIZES for file in _files_of(size))
