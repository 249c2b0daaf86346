"""Family and branch of every language of FLORES-200, so that tables and pictures can put relatives side by side.

Source: Glottolog 5 (glottolog.org) for the families and for what belongs to them; a branch has the common name of a
subgroup, that of ISO 639-5 where there is one, at a depth that is useful for a picture. As in Glottolog, a creole
stands with the language that its words come from (Haitian Creole is Romance), and isolates are families of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = ("Unknown", "Unknown")

# family -> branch -> ISO 639-3 codes. A family without branches here is its own branch.
_FAMILIES: dict[str, dict[str, str]] = {
    "Afro-Asiatic": {
        "Berber": "kab taq tzm",
        "Chadic": "hau",
        "Cushitic": "gaz som",
        "Semitic": "acm acq aeb ajp amh apc arb ars ary arz heb mlt tir",
    },
    "Artificial": {"Artificial": "epo"},
    "Atlantic-Congo": {
        "Bantu": "bem cjk kam kik kin kmb kon lin lua lug nso nya run sna sot ssw swh tsn tso tum umb xho zul",
        "Gur": "kbp mos",
        "Igboid": "ibo",
        "Kwa": "aka ewe fon twi",
        "North-Central Atlantic": "fuv wol",
        "Ubangi": "sag",
        "Yoruboid": "yor",
    },
    "Austroasiatic": {"Khmer": "khm", "Munda": "sat", "Vietic": "vie"},
    "Austronesian": {
        "Javanese": "jav",
        "Malagasic": "plt",
        "Malayo-Sumbawan": "ace ban bjn ind min sun zsm",
        "Oceanic": "fij mri smo",
        "Philippine": "ceb ilo pag tgl war",
        "South Sulawesi": "bug",
    },
    "Aymaran": {"Aymaran": "ayr"},
    "Basque": {"Basque": "eus"},
    "Dravidian": {"Dravidian": "kan mal tam tel"},
    "Indo-European": {
        "Albanian": "als",
        "Armenian": "hye",
        "Baltic": "lit ltg lvs",
        "Celtic": "cym gla gle",
        "Germanic": "afr dan deu eng fao isl lim ltz nld nno nob swe tpi ydd",
        "Greek": "ell",
        "Indo-Aryan": "asm awa ben bho guj hin hne kas mag mai mar npi ory pan san sin snd urd",
        "Iranian": "ckb kmr pbt pes prs tgk",
        "Romance": "ast cat fra fur glg hat ita kea lij lmo oci pap por ron scn spa srd vec",
        "Slavic": "bel bos bul ces hrv mkd pol rus slk slv srp szl ukr",
    },
    "Japonic": {"Japonic": "jpn"},
    "Kartvelian": {"Kartvelian": "kat"},
    "Koreanic": {"Koreanic": "kor"},
    "Mande": {"Mande": "bam dyu"},
    "Mongolic": {"Mongolic": "khk"},
    "Nilotic": {"Nilotic": "dik luo nus"},
    "Quechuan": {"Quechuan": "quy"},
    "Saharan": {"Saharan": "knc"},
    "Sino-Tibetan": {
        "Burmese": "mya",
        "Jingpho": "kac",
        "Kuki-Chin-Naga": "lus mni",
        "Sinitic": "yue zho",
        "Tibetic": "bod dzo",
    },
    "Tai-Kadai": {"Tai": "lao shn tha"},
    "Tupian": {"Tupi-Guarani": "grn"},
    "Turkic": {"Turkic": "azb azj bak crh kaz kir tat tuk tur uig uzn"},
    "Uralic": {"Finnic": "est fin", "Hungarian": "hun"},
}

_BRANCH_OF = {
    code: (family, branch)
    for family, branches in _FAMILIES.items()
    for branch, codes in branches.items()
    for code in codes.split()
}


def family_of(code: str) -> tuple[str, str]:
    """(family, branch) of a language: `("Indo-European", "Romance")` for `fra_Latn` or `fra`; UNKNOWN if not listed."""
    return _BRANCH_OF.get(code.split("_", maxsplit=1)[0], UNKNOWN)


def family_order(codes: Sequence[str]) -> list[str]:
    """The codes ordered by (family, branch, code), so that relatives are neighbours; unknown ones come last."""

    def place(code: str) -> tuple[bool, str, str, str]:
        family, branch = family_of(code)
        return (family, branch) == UNKNOWN, family, branch, code

    return sorted(codes, key=place)
