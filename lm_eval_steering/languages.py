"""Language codes: FLORES style (`fra_Latn`) inside, ISO 639 codes and fastText labels accepted at the edge.

Nothing else in the package knows about code systems. The tables hold only what the `langcodes` library does not
decide: which individual language FLORES-200 means by a macrolanguage, and the labels of fastText that are not ISO.
"""

from __future__ import annotations

import re
from functools import cache

from langcodes import Language, LanguageTagError, find

from lm_eval_steering.errors import UnknownLanguageError, did_you_mean

# ISO 639-3 macrolanguage -> the individual language that FLORES-200 uses for it.
_FLORES_OF_MACRO = {
    "ara": "arb", "aze": "azj", "fas": "pes", "kur": "kmr", "lav": "lvs", "mlg": "plt", "mon": "khk", "msa": "zsm",
    "nep": "npi", "nor": "nob", "ori": "ory", "orm": "gaz", "pus": "pbt", "sqi": "als", "swa": "swh", "uzb": "uzn",
    "yid": "ydd", "fil": "tgl", "cmn": "zho", "ekk": "est",
}  # fmt: skip

# What the library does not lead to: an old name, and individual languages that newer corpora are sorted by.
_OTHER_SPELLINGS = {"tgl": ("tl",), "zho": ("cmn",), "est": ("ekk",)}

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

_FLORES = re.compile(r"([a-z]{2,3})[_-]([A-Z][a-z]{3})")


def normalise(code: str) -> str:
    """FLORES-style code of a language, from `fra_Latn`, `fra-Latn`, `fr`, `fra` or `__label__fr`.

    Raises:
        UnknownLanguageError: if the code names no language; the message proposes one where the text is a name.
    """
    text = code.strip()
    return from_fasttext(text) if text.startswith("__label__") else _normalise(text)


@cache
def _normalise(text: str) -> str:
    pattern = _FLORES.fullmatch(text)
    if not pattern and not re.fullmatch(r"[A-Za-z]{2,3}", text):
        raise UnknownLanguageError(_unknown(text))
    tag = f"{pattern[1]}-{pattern[2]}" if pattern else text.lower()
    try:
        language = Language.get(tag)
        # The library takes Dari for Persian; FLORES keeps them apart.
        alpha3 = "prs" if tag.startswith("prs") else language.to_alpha3()
    except (LookupError, LanguageTagError):
        raise UnknownLanguageError(_unknown(text)) from None
    if not language.is_valid() or language.language_name().startswith("Unknown"):
        raise UnknownLanguageError(_unknown(text))
    alpha3 = _FLORES_OF_MACRO.get(alpha3, alpha3)
    script = pattern[2] if pattern else _FLORES_SCRIPT.get(alpha3, language.maximize().script)
    return f"{alpha3}_{script}"


def _unknown(text: str) -> str:
    message = f"unknown language {text!r}: expected a code such as fra_Latn, fra or fr"
    try:
        found = find(text) if len(text) > 3 else None
        return f"{message}; did you mean {normalise(found.to_tag())!r}?" if found else message
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


def choose(code: str, available: tuple[str, ...], where: str) -> str:
    """The code as `available` spells it; raises UnknownLanguageError with the nearest one where it is not there."""
    normal = normalise(code)
    if normal not in available:
        hint = did_you_mean(normal, available)
        raise UnknownLanguageError(f"language {code!r} ({normal}) is not in {where}{hint}")
    return normal
