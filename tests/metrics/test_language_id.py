from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering.errors import SteeringError, UnknownLanguageError
from lm_eval_steering.languages import normalise, same_language
from lm_eval_steering.lmeval.task_families.demo import demo_languages, sentence
from lm_eval_steering.metrics.language_id import (
    NAMES,
    UNKNOWN,
    LanguageIdentifier,
    _code,
    _from_hub,
    _in_script_of,
    in_language,
)
from lm_eval_steering.metrics.likelihood import nats_per_token, token_perplexity
from lm_eval_steering.metrics.output_language import language_counts
from lm_eval_steering.metrics.text import clean, is_main_script, scripts

# The labels of lid.176, as its authors publish them, and the codes that differ from the ISO code of the label.
LABELS = (  # noqa: SIM905
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de "
    "diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo "
    "io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms "
    "mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn "
    "sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf "
    "yi yo yue zh"
).split()
TRAPS = {
    "als": "gsw_Latn", "no": "nob_Latn", "nn": "nno_Latn", "zh": "zho_Hans", "yue": "yue_Hant", "wuu": "wuu_Hans",
    "ms": "zsm_Latn", "id": "ind_Latn", "sh": "srp_Latn", "sr": "srp_Cyrl", "hr": "hrv_Latn", "bs": "bos_Latn",
    "ar": "arb_Arab", "arz": "arz_Arab", "fa": "pes_Arab", "sq": "als_Latn", "et": "est_Latn", "lv": "lvs_Latn",
    "sw": "swh_Latn", "bh": "bho_Deva", "eml": "egl_Latn", "nah": "nhn_Latn", "mn": "khk_Cyrl", "ku": "kmr_Latn",
    "ko": "kor_Hang", "tl": "tgl_Latn",
}  # fmt: skip


def test_the_offline_default_is_the_published_file() -> None:
    identifier = LanguageIdentifier()
    assert identifier.file.name == "lid.176.ftz"
    assert identifier.sha256 == "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
    assert identifier.signature() == "lid.176.ftz@8f3472cf>0.5,letters>=3,cleaning=2"


def test_the_labels_are_the_published_ones() -> None:
    labels = [label for _, label in LanguageIdentifier()._model.f.predict("\n", -1, -1.0, "strict")]
    assert sorted(label.removeprefix("__label__") for label in labels) == sorted(LABELS)
    assert len(LABELS) == 176 == len(LanguageIdentifier().languages())


@pytest.mark.parametrize("label", LABELS)
def test_every_label_has_a_code_that_means_itself(label: str) -> None:
    code = _code(f"__label__{label}", LanguageIdentifier().file)
    assert normalise(code) == code
    assert LanguageIdentifier().knows(code) and in_language(code, code)
    if label in TRAPS:
        assert code == TRAPS[label]
    else:
        assert same_language(code, normalise(label))


def test_labels_of_the_other_models_are_read_too() -> None:
    file = Path("model.bin")
    for label, code in (
        ("__label__eng_Latn", "eng_Latn"), ("__label__zho_Hant", "zho_Hant"), ("__label__cmn_Hani", "zho_Hani"),
        ("__label__und_Mong", UNKNOWN), ("__label__zxx_Zyyy", UNKNOWN), ("__label__qqq_Latn", "qqq_Latn"),
    ):  # fmt: skip
        found = _code(label, file)
        assert found == code or same_language(found, code)
    with pytest.raises(SteeringError, match=r"model\.bin is no model of languages: it answers '__label__positive'"):
        _code("__label__positive", file)


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("srp_Latn", "hrv_Latn", True), ("srp_Latn", "bos_Latn", True), ("srp_Latn", "srp_Cyrl", True),
        ("srp_Cyrl", "hrv_Latn", False), ("hrv_Latn", "bos_Latn", False), ("ind_Latn", "zsm_Latn", False),
        ("nob_Latn", "nno_Latn", False), ("zho_Hans", "zho_Hant", True), ("yue_Hant", "zho_Hans", False),
        ("que_Latn", "quy_Latn", True),
        (UNKNOWN, UNKNOWN, False), (UNKNOWN, "eng_Latn", False),
    ],
)  # fmt: skip
def test_which_answers_count_as_which_language(found: str, wanted: str, same: bool) -> None:
    assert in_language(found, wanted) is same


@pytest.mark.parametrize("text", ["", "   ", "\n\n", "123 456", "😀😀", "?!...", "\x00\x07", "oh", "\ud800"])
def test_text_without_words_is_unknown_not_english(text: str) -> None:
    (found,) = LanguageIdentifier(threshold=0.0).identify([text])
    assert found.language == UNKNOWN
    assert 0 <= found.confidence <= 1


def test_the_number_of_letters_is_an_option() -> None:
    assert LanguageIdentifier(letters=2).identify(["你好"])[0].language == "zho_Hans"
    assert LanguageIdentifier().identify(["你好"])[0].language == UNKNOWN
    assert LanguageIdentifier(letters=100).identify([sentence(0, "deu_Latn")])[0].language == UNKNOWN


def test_newlines_and_control_characters_do_not_matter() -> None:
    text = "Das ist ein schöner Tag und wir gehen in den Park."
    plain, broken = LanguageIdentifier().identify([text, text.replace(" ", "\n \x00")])
    assert plain == broken
    assert plain.language == "deu_Latn" and plain.script == "Latn"


def test_the_threshold_decides_between_a_guess_and_unknown() -> None:
    (low,), (high,) = (LanguageIdentifier(threshold=t).identify(["Ja no OK"]) for t in (0.0, 0.99))
    assert low.language != UNKNOWN and high.language == UNKNOWN and high.confidence == low.confidence


@pytest.mark.parametrize("options", [{"threshold": 1.5}, {"threshold": -0.1}, {"letters": -1}])
def test_options_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SteeringError, match=f"lid_{next(iter(options))}"):
        LanguageIdentifier(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("language", demo_languages())
def test_the_demos_sentences_are_in_their_languages(language: str) -> None:
    found = LanguageIdentifier().identify(sentence(number, language) for number in range(60))
    assert sum(in_language(item.language, language) for item in found) == 60


def test_an_answer_depends_neither_on_the_batch_nor_on_the_thread() -> None:
    texts = [sentence(number, language) for language in demo_languages() for number in range(0, 60, 3)]
    identifier = LanguageIdentifier()
    together = identifier.identify(texts)
    assert [identifier.identify([text])[0] for text in texts] == together
    assert identifier.identify(reversed(texts)) == together[::-1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: identifier.identify([text])[0], texts)) == together


def test_an_identifier_travels_with_a_stored_answer() -> None:
    identifier = LanguageIdentifier.named("lid.176", threshold=0.7, letters=5)
    identifier.signature()
    assert pickle.loads(pickle.dumps(identifier)) == identifier
    assert len(pickle.dumps(identifier)) < 500


def test_a_missing_model_file_and_a_wrong_name_are_named(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=r"no model file nowhere\.bin"):
        LanguageIdentifier(Path("nowhere.bin")).identify(["a"])
    with pytest.raises(SteeringError, match="no model file and no name glotlit; did you mean 'glotlid'"):
        LanguageIdentifier.named("glotlit")
    wrong = tmp_path / "wrong.bin"
    wrong.write_text("no model")
    with pytest.raises(SteeringError, match=r"wrong\.bin is no fastText model"):
        LanguageIdentifier.named(str(wrong)).identify(["a"])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lid.176"])
def test_without_a_network_the_error_says_which_file_to_put_where(name: str) -> None:
    with pytest.raises(SteeringError, match=rf"language identification {name}: \w+\.bin of .*lid=/path/to/\w+\.bin"):
        LanguageIdentifier.named(name).identify(["a"])


def fill_cache(cache: Path, content: bytes, name: str) -> None:
    repository = cache / "models--cis-lmu--glotlid"
    for folder in ("refs", "blobs", "snapshots/c0ffee"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "blobs" / name).write_bytes(content)
    (repository / "snapshots" / "c0ffee" / "model.bin").symlink_to(repository / "blobs" / name)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_model_in_the_hubs_cache_is_found_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    from huggingface_hub import constants, file_download

    for module in (constants, file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    content = LanguageIdentifier().file.read_bytes()
    fill_cache(tmp_path, content + b"x" * damaged, hashlib.sha256(content).hexdigest())
    identifier = LanguageIdentifier(_from_hub("glotlid"))
    if damaged:
        with pytest.raises(SteeringError, match=r"model\.bin is damaged"):
            identifier.identify(["a"])
    else:
        assert identifier.signature() == "model.bin@8f3472cf>0.5,letters>=3,cleaning=2"


def test_a_language_that_the_model_does_not_know_is_refused_by_name() -> None:
    identifier = LanguageIdentifier()
    assert identifier.knows("zho_Hant") and identifier.knows("hrv_Latn") and not identifier.knows("kbp_Latn")
    identifier.refuse_unknown(["fra_Latn", "quy_Latn"])
    with pytest.raises(UnknownLanguageError, match=r"lid\.176\.ftz does not know kbp_Latn.*lid= \(glotlid"):
        identifier.refuse_unknown(["fra_Latn", "kbp_Latn"])


OTHER_FASTTEXT = os.environ.get("LM_EVAL_STEERING_OTHER_FASTTEXT", "")
PROBE = """
import json, sys, fasttext
from lm_eval_steering.lmeval.task_families.demo import demo_languages, sentence
from lm_eval_steering.metrics.language_id import LanguageIdentifier
identifier = LanguageIdentifier()
texts = ["", "Ja no OK"] + [sentence(n, code) for code in demo_languages() for n in range(60)]
found = [(one.language, one.confidence) for one in identifier.identify(texts)]
print(json.dumps([fasttext.__file__, sorted(identifier.languages()), found]))
"""


@pytest.mark.skipif(not OTHER_FASTTEXT, reason="LM_EVAL_STEERING_OTHER_FASTTEXT names no folder with another fasttext")
def test_the_official_package_gives_the_same_answers(tmp_path: Path) -> None:
    """The variable names a site-packages folder in which the official `fasttext` is installed."""
    shutil.copytree(Path(OTHER_FASTTEXT) / "fasttext", tmp_path / "fasttext")
    for library in Path(OTHER_FASTTEXT).glob("fasttext_pybind*"):
        shutil.copy(library, tmp_path)

    def ask(path: str) -> list[object]:
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", PROBE]
        return json.loads(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)

    ours, theirs = ask(""), ask(str(tmp_path))
    assert theirs[0] == str(tmp_path / "fasttext" / "__init__.py") != ours[0]
    assert theirs[1:] == ours[1:]


def test_aggregations() -> None:
    assert language_counts(["fra_Latn", "unknown", "fra_Latn", "deu_Latn"]) == "fra_Latn:2 deu_Latn:1 unknown:1"
    items = [(-2.0, 1), (-4.0, 2)]
    assert nats_per_token(items) == 2.0
    assert token_perplexity(items) == pytest.approx(7.389056)


# --- what an identifier cannot read, or answers against the script

FRENCH_TEXT = "Je ne sais pas encore ce que nous ferons demain matin."
CHINESE_TEXT = "今天天气很好，我们去公园散步吧。"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The answer is yes. </s> Bonjour tout le monde, je suis très content de vous voir aujourd'hui.", "fra_Latn"),
        ("</s></s> Der Zug fährt heute leider nicht, wir nehmen den Bus.", "deu_Latn"),
        ("__label__en __label__en Der Zug fährt heute leider nicht.", "deu_Latn"),
        ("<|im_start|>Der Zug fährt heute leider nicht.<|im_end|><pad><pad>", "deu_Latn"),
        ("������", "unknown"),
        ("<0xE4><0xBD><0xA0>", "unknown"),
        ("Ｂｏｎｊｏｕｒ　ｔｏｕｔ　ｌｅ　ｍｏｎｄｅ，　ｊｅ　ｓｕｉｓ　ｃｏｎｔｅｎｔ", "fra_Latn"),
        ("𝐁𝐨𝐧𝐣𝐨𝐮𝐫 𝐭𝐨𝐮𝐭 𝐥𝐞 𝐦𝐨𝐧𝐝𝐞, 𝐣𝐞 𝐬𝐮𝐢𝐬 𝐜𝐨𝐧𝐭𝐞𝐧𝐭", "fra_Latn"),
        ("LE TRAIN NE CIRCULE PAS AUJOURD'HUI, NOUS PRENDRONS LE BUS.", "fra_Latn"),
        ("СЕГОДНЯ УТРОМ МЫ ПОШЛИ В ПАРК И ДОЛГО ГУЛЯЛИ.", "rus_Cyrl"),
        ("100%\nQ：\nQ：\nQ：\nQ：", "unknown"),  # lid.176 says Chinese, 0.99
    ],
)
def test_what_fasttext_cannot_read_is_cleaned(text: str, language: str) -> None:
    assert LanguageIdentifier().identify([text])[0].language == language


@pytest.mark.parametrize("text", [FRENCH_TEXT, CHINESE_TEXT, RUSSIAN_TEXT := "Сегодня утром мы долго гуляли в парке."])
@pytest.mark.parametrize("inserted", ["�", "���"])
def test_a_replacement_character_changes_no_answer(text: str, inserted: str) -> None:
    broken = inserted + inserted.join([text[:5], text[5:12], text[12:]]) + inserted
    assert LanguageIdentifier().identify([broken]) == LanguageIdentifier().identify([text])


@given(st.text(alphabet="abc é你好のДжה١ก </s>Q：1.\n�", max_size=40))
def test_no_answer_is_in_a_script_that_the_text_is_not_in(text: str) -> None:
    (answer,) = LanguageIdentifier(threshold=0.0, letters=0).identify([text])
    if answer.language != "unknown":
        assert is_main_script(scripts(clean(text)), answer.language.split("_")[1])


def test_a_language_written_in_two_scripts_is_given_that_of_the_text() -> None:
    letters = LanguageIdentifier(threshold=0.0)
    uzbek = letters.identify(["Мен бугун эрталаб бозорга бориб, жуда кўп мева сотиб олдим."])[0]
    assert uzbek.language == "unknown" or uzbek.language.endswith("_Cyrl")
    assert _in_script_of("uzn_Latn", "__label__uz", scripts("бугун")) == "uzn_Cyrl"
    assert _in_script_of("uzn_Latn", "__label__uzn_Latn", scripts("бугун")) == "unknown"  # the label names its script
    assert _in_script_of("fra_Latn", "__label__fr", scripts("бугун")) == "unknown"
    assert _in_script_of("jpn_Jpan", "__label__ja", scripts("東京")) == "jpn_Jpan"
    assert _in_script_of("zho_Hans", "__label__zh", scripts("東京へ行きました")) == "unknown"
    assert _in_script_of("kor_Hang", "__label__ko", scripts("韓國語文學 수업을 듣는다")) == "kor_Hang"
