from __future__ import annotations

import re
from pathlib import Path

import pytest

from lm_eval_steering import languages
from lm_eval_steering.errors import UnknownLanguageError
from lm_eval_steering.languages import choose, normalise, spellings
from tests.test_language_families import FLORES_200


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("fra_Latn", "fra_Latn"), ("fra-Latn", "fra_Latn"), ("fr", "fra_Latn"), ("fra", "fra_Latn"),
        ("fre", "fra_Latn"), ("zh", "zho_Hans"), ("zho_Hant", "zho_Hant"), ("ar", "arb_Arab"), ("no", "nob_Latn"),
        ("nb", "nob_Latn"), ("nn", "nno_Latn"), ("ms", "zsm_Latn"), ("id", "ind_Latn"), ("sw", "swh_Latn"),
        ("fa", "pes_Arab"), ("als_Latn", "als_Latn"), ("__label__als", "gsw_Latn"), ("__label__fr", "fra_Latn"),
        ("he", "heb_Hebr"), ("__label__sh", "srp_Latn"),
        # As BCP 47 and careless people write them.
        ("fra_latn", "fra_Latn"), ("FRA_LATN", "fra_Latn"), ("zh-CN", "zho_Hans"), ("zh-TW", "zho_Hant"),
        ("zh_hans", "zho_Hans"), ("zh-HK", "zho_Hant"), ("zh-Hant-TW", "zho_Hant"), ("pt-BR", "por_Latn"),
        ("pt_br", "por_Latn"), ("en-US", "eng_Latn"), ("es-419", "spa_Latn"), ("ko-KR", "kor_Hang"),
        ("ar-EG", "arb_Arab"), ("arz", "arz_Arab"), ("sr-Latn-RS", "srp_Latn"), ("EN", "eng_Latn"),
        ("cmn_Hans", "zho_Hans"), ("prs-AF", "prs_Arab"),
    ],
)  # fmt: skip
def test_codes_are_normalised(given: str, expected: str) -> None:
    assert languages.normalise(given) == expected


@pytest.mark.parametrize("code", ["xx", "french", "fra_Latm", "", "zzz_Latn", "fra Latn", "12", "fr-Latn-XQ-x"])
def test_unknown_codes_are_refused_by_name(code: str) -> None:
    with pytest.raises(UnknownLanguageError, match="expected a code such as fra_Latn") as error:
        languages.normalise(code)
    assert repr(code.strip()) in str(error.value)


@pytest.mark.parametrize("code", ["mul", "zxx", "ZXX", "mul_Latn", "und", "mis"])
def test_codes_of_no_single_language_are_refused(code: str) -> None:
    with pytest.raises(UnknownLanguageError, match=rf"'{code}' is .*: expected one language"):
        languages.normalise(code)


@pytest.mark.parametrize("code", ["cmn_Hani", "zho-Hani", "zh_hani"])
def test_a_code_that_leaves_the_script_open_is_asked_about(code: str) -> None:
    with pytest.raises(UnknownLanguageError, match=rf"'{code}' .*expected zho_Hans or zho_Hant"):
        languages.normalise(code)


def test_a_name_gets_its_code_proposed() -> None:
    with pytest.raises(UnknownLanguageError, match="did you mean 'fra_Latn'"):
        languages.normalise("french")


def test_the_nearest_available_language_is_proposed() -> None:
    with pytest.raises(UnknownLanguageError, match=r"fra_Arab.*did you mean 'fra_Latn'"):
        languages.choose("fra_Arab", ("fra_Latn", "deu_Latn"), "the neuron set")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("zho_Hans", "zho_Hant", True), ("arb_Arab", "arz_Arab", False), ("nob_Latn", "nob_Latn", True),
        ("zsm_Latn", "ind_Latn", False), ("fra_Latn", "deu_Latn", False), ("swh_Latn", "swa_Latn", True),
    ],
)  # fmt: skip
def test_languages_are_compared_at_the_identifiers_grain(first: str, second: str, same: bool) -> None:
    assert languages.same_language(first, second) is same


@pytest.mark.parametrize("code", FLORES_200)
def test_every_code_of_flores_200_is_itself_and_is_found_without_its_script(code: str) -> None:
    assert normalise(code) == code
    assert code in spellings(code)
    several = {other for other in FLORES_200 if other.startswith(code[:3])} | {"sat_Olck"}  # the data says Olck
    assert normalise(code[:3]) in several
    assert all(normalise(name) == code for name in spellings(code))


def test_short_spellings_stand_for_one_code_alone() -> None:
    assert spellings("fra_Latn")[:2] == ("fra_Latn", "fra-Latn")
    assert {"fr", "fra"} <= set(spellings("fra_Latn"))
    assert "zh" in spellings("zho_Hans") and "zh" not in spellings("zho_Hant")
    assert {"no", "nb"} <= set(spellings("nob_Latn"))
    assert "ko" in spellings("kor_Hang") and "ar" in spellings("arb_Arab") and "tl" in spellings("tgl_Latn")


def test_a_language_that_a_set_lacks_is_answered_with_those_it_has() -> None:
    has = ("nld_Latn", "fra_Latn", "zho_Hans")
    with pytest.raises(UnknownLanguageError, match=r"which has nld_Latn, fra_Latn, zho_Hans$"):
        choose("ind_Latn", has, "the neuron set")  # nld_Latn is spelled almost alike and another language
    with pytest.raises(UnknownLanguageError, match="did you mean 'zho_Hans'"):
        choose("zho_Hant", has, "the neuron set")
    with pytest.raises(UnknownLanguageError, match=r"'klingon'.*the neuron set has nld_Latn") as error:
        choose("klingon", has, "the neuron set")
    assert "did you mean" not in str(error.value)


def test_the_docs_name_the_macrolanguages_that_serve_a_language() -> None:
    page = (Path(__file__).parents[1] / "docs" / "corpora.md").read_text(encoding="utf-8")
    paragraph = page[page.index("The code of a macrolanguage") : page.index("A short spelling")]
    named = set(re.findall(r"`([a-z]{3})(?:\.txt)?`", paragraph))
    assert {"ara", "swa", "fas"} <= named and all(code in spellings(normalise(code)) for code in named)
    for code, meant in (("ara", "arb_Arab"), ("swa", "swh_Latn"), ("fas", "pes_Arab"), ("msa", "zsm_Latn")):
        assert f"{meant}" in paragraph and normalise(code) == meant


@pytest.mark.parametrize(
    ("code", "name"),
    [("fra_Latn", "français"), ("zho_Hans", "中文"), ("srp_Cyrl", "српски"), ("eng_Latn", "English"),
     ("afr_Latn", "Afrikaans"), ("plt_Latn", "Malagasy"), ("nob_Latn", "norsk bokmål"), ("arb_Arab", "العربية")],
)  # fmt: skip
def test_a_language_has_its_name_in_itself(code: str, name: str) -> None:
    assert languages.native_name(code) == name


def test_a_language_without_one_is_named_and_the_english_name_never_stands_for_it() -> None:
    unknown = 0
    for code in FLORES_200:
        try:
            assert languages.native_name(code)
        except UnknownLanguageError as error:
            unknown += 1
            assert repr(code) in str(error) and languages.english_name(code) in str(error)
    assert 20 < unknown < 60  # CLDR has the others
    with pytest.raises(UnknownLanguageError, match="the name of Fon in the language itself is not known"):
        languages.native_name("fon_Latn")
