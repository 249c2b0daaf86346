"""Language codes: FLORES style (`fra_Latn`) inside; ISO 639, BCP 47 and fastText labels accepted at the edge.

Nothing else in the package knows about code systems. The tables hold only what the `langcodes` library does not
decide: which individual language FLORES-200 means by a macrolanguage, and the labels of fastText that are not ISO.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from langcodes import Language, LanguageTagError, find
from language_data.names import code_to_names

from lm_eval_steering.errors import UnknownLanguageError

# --- Family and branch of every language of FLORES-200, so that tables and pictures can put relatives side by side
#
# Source: Glottolog 5 (glottolog.org) for the families and for what belongs to them; a branch has the common name of a
# subgroup, that of ISO 639-5 where there is one, at a depth that is useful for a picture. As in Glottolog, a creole
# stands with the language that its words come from (Haitian Creole is Romance), and isolates are families of their
# own.

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

    def key(code: str) -> tuple[bool, str, str, str]:
        family, branch = family_of(code)
        return (family, branch) == UNKNOWN, family, branch, code

    return sorted(codes, key=key)


# ISO 639-3 macrolanguage -> the individual language that FLORES-200 uses for it.
_FLORES_OF_MACRO = {
    "ara": "arb", "aze": "azj", "fas": "pes", "kur": "kmr", "lav": "lvs", "mlg": "plt", "mon": "khk", "msa": "zsm",
    "nep": "npi", "nor": "nob", "ori": "ory", "orm": "gaz", "pus": "pbt", "sqi": "als", "swa": "swh", "uzb": "uzn",
    "yid": "ydd", "fil": "tgl", "cmn": "zho", "ekk": "est",
}  # fmt: skip

# What the library does not lead to: an old name, a macrolanguage, and individual languages that newer corpora are
# sorted by.
_OTHER_SPELLINGS = {"tgl": ("tl",), "zho": ("cmn",), "est": ("ekk",), "pbt": ("pus", "ps")}

# FLORES-200's script where CLDR's most likely one is another.
_FLORES_SCRIPT = {
    "kor": "Hang", "crh": "Latn", "tzm": "Tfng",
    **dict.fromkeys(("acm", "acq", "ajp", "azb", "pbt", "prs"), "Arab"),
}  # fmt: skip

# Labels of lid.176 that are not the ISO codes they look like, or that ISO has withdrawn.
_FASTTEXT = {
    "als": "gsw_Latn",  # Alemannic; in ISO 639-3 `als` is Tosk Albanian
    "bh": "bho_Deva", "eml": "egl_Latn", "nah": "nhn_Latn",
}  # fmt: skip

# langcodes keeps Bokmaal apart from the macrolanguage that fastText's label `no` stands for.
_MACRO_OF = {"nb": "no"}

# Language, script and region of BCP 47, joined by either of two characters, in any case.
_TAG = re.compile(
    r"(?P<language>[a-z]{2,3})(?:[_-](?P<script>[a-z]{4}))?(?:[_-](?P<region>[a-z]{2}|\d{3}))?", re.IGNORECASE
)

# Codes of ISO 639 that name no single language.
_NO_LANGUAGE = {
    "mul": "several languages", "zxx": "no language", "und": "an undetermined language", "mis": "an uncoded language",
}  # fmt: skip

# Scripts that leave open which of two a text is in.
_SEVERAL_SCRIPTS = {"Hani": ("Hans", "Hant")}


def normalise(code: str) -> str:
    """FLORES-style code of a language.

    Read are `fra_Latn`, `fra-Latn`, `fr`, `fra`, tags of BCP 47 in any case (`zh-TW`, `pt_BR`, `FRA_LATN`) and
    `__label__fr`. A region decides the script where a language has several (`zh-TW` is zho_Hant), and nothing else:
    `ar-EG` is arb_Arab like `ar`, and Egyptian Arabic is `arz`.

    Raises:
        UnknownLanguageError: if the code names no single language, or leaves its script open; the message proposes
            one where the text is a name.
    """
    text = code.strip()
    if text.startswith("__label__"):
        return from_fasttext(text)
    tag = _TAG.fullmatch(text)
    if tag and (meaning := _NO_LANGUAGE.get(tag["language"].lower())):
        raise UnknownLanguageError(f"language {text!r} is {meaning}: expected one language, such as fra_Latn")
    normal = _normalise(text)
    base, script = normal.split("_")
    if base == "zho" and script in _SEVERAL_SCRIPTS:
        choices = " or ".join(f"{base}_{choice}" for choice in _SEVERAL_SCRIPTS[script])
        raise UnknownLanguageError(f"language {text!r} leaves the script open: expected {choices}")
    return normal


@cache
def _normalise(text: str) -> str:
    match = _TAG.fullmatch(text)
    if not match:
        raise UnknownLanguageError(_unknown(text))
    tag = "-".join(part for part in match.groups() if part)
    try:
        language = Language.get(tag)
        # The library takes Dari for Persian; FLORES keeps them apart.
        alpha3 = "prs" if tag.lower().startswith("prs") else language.to_alpha3()
    except (LookupError, LanguageTagError):
        raise UnknownLanguageError(_unknown(text)) from None
    if not language.is_valid() or language.language_name().startswith("Unknown"):
        raise UnknownLanguageError(_unknown(text))
    alpha3 = _FLORES_OF_MACRO.get(alpha3, alpha3)
    script = match["script"].title() if match["script"] else _FLORES_SCRIPT.get(alpha3, language.maximize().script)
    return f"{alpha3}_{script}"


def _unknown(text: str) -> str:
    message = f"unknown language {text!r}: expected a code such as fra_Latn, fra or fr"
    try:
        meant = normalise(find(text).to_tag()) if len(text) > 3 else ""
        return f"{message}; did you mean {meant!r}?" if family_of(meant) != UNKNOWN else message
    except (LookupError, UnknownLanguageError):
        return message


@cache
def spellings(code: str) -> tuple[str, ...]:
    """How files and datasets may spell a language, the most exact first: `fra_Latn`, `fra-Latn`, `fra`, `fr`.

    A short spelling is listed only where it means this code: `zh` stands for zho_Hans, not for zho_Hant.
    """
    alpha3, script = code.split("_")
    macro = Language.get(_macrolanguage(code))
    bases = [alpha3, Language.get(alpha3).language, macro.to_alpha3(), macro.language]
    bases += _OTHER_SPELLINGS.get(alpha3, ())
    with_script = [f"{base}{joint}{script}" for base in bases for joint in "_-"]
    short = [base for base in bases if base not in _FASTTEXT]  # `als` names Alemannic text wherever it stands alone
    return tuple(dict.fromkeys(name for name in [*with_script, *short] if _means(name, code)))


def _means(text: str, code: str) -> bool:
    try:
        return _normalise(text) == code
    except UnknownLanguageError:
        return False


@cache
def from_fasttext(label: str) -> str:
    """Our code for a label of a fastText identifier: lid.176 (`__label__fr`) or FLORES style (`__label__fra_Latn`)."""
    text = label.removeprefix("__label__")
    return _FASTTEXT.get(text) or _normalise(text)


def from_english_name(name: str) -> str:
    """Our code for a language's English name.

    Raises:
        UnknownLanguageError: if no language has this name.
    """
    try:
        return normalise(find(name).to_tag())
    except LookupError:
        raise UnknownLanguageError(f"no language has the name {name!r}") from None


@cache
def same_language(first: str, second: str) -> bool:
    """Whether two codes are one language at the grain that lid.176 can tell apart: macrolanguage, script ignored."""
    return _macrolanguage(first) == _macrolanguage(second)


def _macrolanguage(code: str) -> str:
    language = Language.get(code.split("_", maxsplit=1)[0]).prefer_macrolanguage().language
    return str(_MACRO_OF.get(language, language))


@cache
def english_name(code: str) -> str:
    """English name of a language, without its script: `English`, `Chinese`."""
    return str(Language.get(code.split("_", maxsplit=1)[0]).prefer_macrolanguage().language_name())


@cache
def native_name(code: str) -> str:
    """Name of a language in the language itself, of CLDR and in the code's script: `français`, `中文`.

    Raises:
        UnknownLanguageError: if CLDR has none; the library would give the English one.
    """
    language = Language.get(code.replace("_", "-")).prefer_macrolanguage()
    if not (set(language.broader_tags()) - {"und"}) & code_to_names(language.language).keys():
        raise UnknownLanguageError(
            f"language {code!r}: the name of {english_name(code)} in the language itself is not known; use names in "
            "English, or write it into the instruction"
        )
    return str(language.language_name(language))


def choose(code: str, available: tuple[str, ...], where: str) -> str:
    """The code as `available` spells it.

    Raises:
        UnknownLanguageError: if it is not there; the message lists what is, and proposes the same language in another
            script.
    """
    try:
        normal = normalise(code)
    except UnknownLanguageError as error:
        raise UnknownLanguageError(f"{error}; {where} has {', '.join(available)}") from None
    if normal not in available:
        near = [repr(other) for other in available if same_language(other, normal)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(available)
        raise UnknownLanguageError(f"language {code!r} ({normal}) is not in {where}, which has {known}{hint}")
    return normal
