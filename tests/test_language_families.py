"""Families: every language of FLORES-200 has exactly one branch, and relatives become neighbours."""

from __future__ import annotations

from collections import Counter

import pytest

from lm_eval_steering.languages import _FAMILIES, UNKNOWN, family_of, family_order, normalise

# The table "Languages in FLORES-200" of github.com/facebookresearch/flores, flores200/README.md.
_README = """
ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab
ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn ban_Latn bel_Cyrl bem_Latn
ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn cjk_Latn ckb_Arab
crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn
fao_Latn fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn
hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn
jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor knc_Arab knc_Latn kaz_Cyrl kbp_Latn kea_Latn
khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kmr_Latn kon_Latn kor_Hang lao_Laoo lij_Latn lim_Latn lin_Latn lit_Latn
lmo_Latn ltg_Latn ltz_Latn lua_Latn lug_Latn luo_Latn lus_Latn lvs_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Arab
min_Latn mkd_Cyrl plt_Latn mlt_Latn mni_Beng khk_Cyrl mos_Latn mri_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva
nso_Latn nus_Latn nya_Latn oci_Latn gaz_Latn ory_Orya pag_Latn pan_Guru pap_Latn pes_Arab pol_Latn por_Latn prs_Arab
pbt_Arab quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Beng scn_Latn shn_Mymr sin_Sinh slk_Latn slv_Latn
smo_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn als_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn
szl_Latn tam_Taml tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi taq_Latn taq_Tfng tpi_Latn tsn_Latn tso_Latn
tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn
wol_Latn xho_Latn ydd_Hebr yor_Latn yue_Hant zho_Hans zho_Hant zsm_Latn zul_Latn
"""
FLORES_200 = _README.split()
CODES = [code for branches in _FAMILIES.values() for codes in branches.values() for code in codes.split()]


def test_the_list_is_whole() -> None:
    assert len(FLORES_200) == len(set(FLORES_200)) == 204


def test_no_code_stands_in_two_branches() -> None:
    assert [code for code, times in Counter(CODES).items() if times > 1] == []


def test_the_table_holds_flores_200_and_nothing_that_no_code_of_ours_leads_to() -> None:
    assert {code.split("_")[0] for code in FLORES_200} == set(CODES)


@pytest.mark.parametrize("code", FLORES_200)
def test_every_code_has_a_family_also_as_we_normalise_it(code: str) -> None:
    assert UNKNOWN not in {family_of(code), family_of(normalise(code))}
    assert family_of(code) == family_of(normalise(code))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("fra_Latn", ("Indo-European", "Romance")),
        ("fra", ("Indo-European", "Romance")),
        ("zho_Hant", ("Sino-Tibetan", "Sinitic")),
        ("arb_Latn", ("Afro-Asiatic", "Semitic")),
        ("tur_Latn", ("Turkic", "Turkic")),
        ("hat_Latn", ("Indo-European", "Romance")),  # a creole stands with the source of its words
        ("tlh_Latn", UNKNOWN),
    ],
)
def test_a_few_that_everyone_knows(code: str, expected: tuple[str, str]) -> None:
    assert family_of(code) == expected


def test_order_is_by_family_then_branch_then_code_and_unknown_last() -> None:
    codes = ["tlh_Latn", "zho_Hans", "spa_Latn", "tur_Latn", "deu_Latn", "fra_Latn", "eng_Latn", "arb_Arab"]
    assert family_order(codes) == [
        "arb_Arab", "deu_Latn", "eng_Latn", "fra_Latn", "spa_Latn", "zho_Hans", "tur_Latn", "tlh_Latn",
    ]  # fmt: skip
    assert family_order(codes[::-1]) == family_order(codes)


def test_nothing_is_lost_or_added_by_ordering() -> None:
    assert sorted(family_order(FLORES_200)) == sorted(FLORES_200)
