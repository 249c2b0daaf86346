from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.long_texts import WholeTextScore
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families import flores
from lm_eval_steering.lmeval.task_families.common import perplexity_metrics
from lm_eval_steering.metrics import translation
from lm_eval_steering.metrics.likelihood import Score
from lm_eval_steering.resources import demo_model
from tests.lmeval.task_families.conftest import Evaluate, write_rows

PUBLISHED: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "parity" / "golden" / "prompts_parsers_metrics.json").read_text(encoding="utf-8")
)
GOLDEN: dict[str, Any] = PUBLISHED["tau_batch_bleu"]
PAIR = [  # ours
    {"en": "The train leaves at noon.", "de": "Der Zug fährt um zwölf Uhr ab.", "ja": "電車は正午に出る。"},
    {"en": "My sister likes apples.", "de": "Meine Schwester mag Äpfel.", "ja": "妹はりんごが好きだ。"},
]


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "table.jsonl", PAIR))


# --- scores -----------------------------------------------------------------------------------------------------------


def items(tokenizer: str) -> list[translation.Item]:
    return [(tokenizer, ref, hyp) for ref, hyp in zip(GOLDEN["refs"], GOLDEN["candidates"], strict=True)]


def test_bleu_is_of_one_corpus_not_the_published_mean_of_batches() -> None:
    assert translation.corpus_bleu(items("13a")) == pytest.approx(GOLDEN["single_corpus"], abs=1e-5)
    assert translation.corpus_bleu(items("13a")) != pytest.approx(GOLDEN["mean_of_batches"], abs=1)


def test_bleu_is_not_the_published_mean_of_sentences_either() -> None:
    """Theirs: sentence BLEU with 13a, which finds nothing in a Chinese sentence that is right but for a letter."""
    for candidate, reference, score in PUBLISHED["sentence_bleu_div100"]:
        assert sacrebleu.sentence_bleu(candidate, [reference]).score / 100 == pytest.approx(score, abs=1e-6)
    assert translation.corpus_bleu(items("13a")) / 100 > PUBLISHED["sentence_bleu_mean"] + 0.1


def test_chrf_is_sacrebleus_with_word_bigrams_and_says_so() -> None:
    expected = sacrebleu.corpus_chrf(GOLDEN["candidates"], [GOLDEN["refs"]], word_order=2).score
    assert translation.corpus_chrf(items("13a")) == pytest.approx(expected)
    assert "nw:2" in translation.chrf_signature(items("13a"))


def test_chinese_near_matches_score_with_the_tokenizer_for_chinese() -> None:
    near = ("猫坐在垫子上面。", "猫坐在垫子上。")
    assert translation.corpus_bleu([("13a", *near)]) == 0
    assert translation.corpus_bleu([("zh", *near)]) > 50
    assert "tok:zh" in translation.bleu_signature([("zh", *near)])


def test_signatures_and_scores_do_not_change_after_resampling() -> None:
    before = translation.corpus_bleu(items("13a")), translation.bleu_signature(items("13a"))
    width = translation.bleu_interval(items("13a"))
    assert width > 0 and width == translation.bleu_interval(items("13a"))
    for ours, metric in (
        (width, sacrebleu.BLEU(tokenize="13a")),
        (translation.chrf_interval(items("13a")), sacrebleu.CHRF(word_order=2)),
    ):  # fmt: skip
        theirs = metric.corpus_score(GOLDEN["candidates"], [GOLDEN["refs"]], n_bootstrap=translation.RESAMPLES)
        assert ours == pytest.approx(theirs._ci, rel=1e-6)  # sacreBLEU adds in float32
    assert before == (translation.corpus_bleu(items("13a")), translation.bleu_signature(items("13a")))
    assert "bs:" not in before[1]
    assert math.isnan(translation.chrf_interval(items("13a")[:1]))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("zho_Hans", "zh"), ("zho_Hant", "zh"), ("jpn_Jpan", "ja-mecab"), ("kor_Hang", "ko-mecab"),
        ("tha_Thai", "flores200"), ("bod_Tibt", "flores200"), ("deu_Latn", "13a"),
    ],
)  # fmt: skip
def test_the_tokenizer_suits_the_target(target: str, name: str) -> None:
    assert translation.bleu_tokenizer(target) == name


def test_a_tokenizer_that_is_not_at_hand_is_an_error_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: str
) -> None:
    monkeypatch.setattr("sacrebleu.utils.SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(
        SteeringError, match=r"tokenizer flores200, which is not available here \(no file .*flores200sacrebleuspm"
    ):
        translation.require_tokenizer("flores200", "tha_Thai")
    with pytest.raises(SteeringError, match="bleu_tokenizer='mecab': expected one of none, 13a"):
        flores.translation_documents("eng_Latn-jpn_Jpan", parallel=table, bleu_tokenizer="mecab")
    translation.require_tokenizer("none", "tha_Thai")


def test_japanese_needs_its_own_tokenizer_or_a_choice(table: str) -> None:
    try:
        import MeCab  # noqa: F401
    except ImportError:
        with pytest.raises(SteeringError, match=r"pip install 'sacrebleu\[ja\]'; or --metadata"):
            flores.translation_documents("eng_Latn-jpn_Jpan", parallel=table)
    docs = flores.translation_documents("eng_Latn-jpn_Jpan", parallel=table, bleu_tokenizer="char")["test"]
    assert docs[0]["bleu_tokenizer"] == "char" and docs[0]["expected_language"] == "jpn_Jpan"
    without = flores.translation_documents("eng_Latn-jpn_Jpan", parallel=table, bleu_tokenizer="none")["test"][0]
    assert not [name for name in flores.translation_metrics(without, ["電車"]) if name.startswith("bleu")]


# --- prompts and pairs ------------------------------------------------------------------------------------------------


def test_prompts_are_the_published_ones() -> None:
    text = "Hello world."
    assert flores.prompt_of("gurgurov", "eng_Latn", "deu_Latn", text) == PUBLISHED["prompts"]["flores"]
    assert (
        flores.prompt_of("lm_eval", "spa_Latn", "eng_Latn", text) == "Spanish sentence: Hello world.\nEnglish sentence:"
    )
    assert flores.prompt_of("rahmanisa", "eng_Latn", "fra_Latn", text) == (
        "Translate from English into the target language.\n\nEnglish: Hello world.\nTarget language: "
    )
    assert flores.prompt_of("rahmanisa_targeted", "eng_Latn", "zsm_Latn", text) == (
        "Translate from English to Malay.\n\nEnglish: Hello world.\nMalay:"
    )


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (None, "expected two languages"), ("fra_Latn", "expected two languages"), ("a-b-c", "expected two languages"),
        ("fra_Latn-frensh", "unknown language 'frensh'"), ("fra_Latn-fr", "both languages are fra_Latn"),
    ],
)  # fmt: skip
def test_an_unknown_pair_is_one_clear_error(pair: str | None, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        flores.translation_documents(pair)


def test_a_local_file_with_a_missing_column_is_one_clear_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "flores200" / "eng_Latn.devtest.jsonl", [{"id": 1, "text": "x"}])
    with pytest.raises(SteeringError, match=r"eng_Latn.devtest.jsonl, line 1: no 'sentence', which flores200 needs"):
        flores.perplexity_documents("eng_Latn", data_dir=str(tmp_path))


def test_sentences_are_paired_by_id_and_gaps_refused(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "flores200" / "eng_Latn.devtest.jsonl", [{"id": 2, "sentence": "b"}, {"id": 1, "sentence": "a"}]
    )
    german = tmp_path / "flores200" / "deu_Latn.devtest.jsonl"
    write_rows(german, [{"id": 1, "sentence": "A"}, {"id": 2, "sentence": "B"}])
    docs = flores.translation_documents("eng_Latn-deu_Latn", data_dir=str(tmp_path))["test"]
    assert [(doc["source_text"], doc["reference"]) for doc in docs] == [("b", "B"), ("a", "A")]
    write_rows(german, [{"id": 1, "sentence": "A"}])
    with pytest.raises(SteeringError, match="2 and 1 sentences, 1 ids in both"):
        flores.translation_documents("eng_Latn-deu_Latn", data_dir=str(tmp_path))


# --- through the evaluator --------------------------------------------------------------------------------------------


def test_translation_into_both_directions_and_any_pair(
    french: SteeredHFLM, evaluate: Evaluate, shared_data: Path
) -> None:
    names = ["steering_flores_eng_Latn_fra_Latn_rahmanisa", "steering_flores_deu_Latn_eng_Latn", "steering_flores_pair"]
    settings = {"language": "fra_Latn", "pair": "deu_Latn-zh", "data_dir": str(shared_data / "evaluation")}
    found = evaluate(french, *names, limit=3, tokens=12, **settings)
    for name in names:
        scores = found["results"][name]
        pairs = [(sample["doc"]["reference"], sample["resps"][0][0].strip()) for sample in found["samples"][name]]
        chrf = sacrebleu.corpus_chrf([hyp for _, hyp in pairs], [[ref for ref, _ in pairs]], word_order=2).score
        assert scores["chrf++,none"] == pytest.approx(chrf)
        assert scores["chrf++_signature,none"].startswith("nrefs:1|case:mixed")
        assert {"bleu,none", "bleu_ci,none", "lang_expected,none", "lfs,none"} <= set(scores)
    assert found["results"]["steering_flores_eng_Latn_fra_Latn_rahmanisa"]["lang_expected,none"] > 0.5
    assert "tok:zh" in found["results"]["steering_flores_pair"]["bleu_signature,none"]
    json.dumps(found["configs"])


def test_perplexity_by_byte_and_by_character(unsteered: SteeredHFLM, evaluate: Evaluate, shared_data: Path) -> None:
    names = [f"steering_flores_{code}_perplexity" for code in ("deu_Latn", "jpn_Jpan")]
    found = evaluate(unsteered, *names, limit=4, data_dir=str(shared_data / "evaluation"))
    for name in names:
        texts = [sample["doc"]["text"] for sample in found["samples"][name]]
        total = sum(sample["resps"][0][0][0] for sample in found["samples"][name])
        scores = found["results"][name]
        in_bytes, in_characters = (sum(len(x) for x in units) for units in ([t.encode() for t in texts], texts))
        assert scores["bits_per_byte,none"] == pytest.approx(-total / in_bytes / math.log(2))
        assert scores["byte_perplexity,none"] == pytest.approx(math.exp(-total / in_bytes))
        assert scores["bits_per_character,none"] == pytest.approx(-total / in_characters / math.log(2))


@pytest.fixture(scope="module")
def adds_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a tokenizer that puts BOS before every text, as Llama's and Gemma's do."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(demo_model(), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = AutoTokenizer.from_pretrained(folder).bos_token
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = AutoTokenizer.from_pretrained(folder)("Der Zug").input_ids
    assert tokens[0] == tokenizer.token_to_id(bos) and len(tokens) > 1
    return folder


def by_hand(folder: Path, text: str, max_length: int) -> tuple[float, int]:
    """log P(text | BOS) in nats and its tokens, from plain forward passes over lm-eval's windows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    total = 0.0
    for start in range(0, len(tokens), max_length):
        predicted = tokens[start : start + max_length]
        end = start + len(predicted)
        # Each window is as long as it may be: the last one looks further back.
        before = [tokenizer.bos_token_id, *tokens][max(0, end - max_length) : end]
        with torch.no_grad():
            logs = model(torch.tensor([before])).logits[0, -len(predicted) :].double().log_softmax(-1)
        total += float(logs[range(len(predicted)), predicted].sum())
    return total, len(tokens)


@pytest.mark.parametrize("max_length", [256, 16])
def test_a_texts_score_is_of_its_tokens_given_bos(
    adds_bos: Path, evaluate: Evaluate, first_sentences: Path, max_length: int
) -> None:
    """Also where the tokenizer adds BOS, and where a text is longer than the model's context."""
    name = "steering_flores_deu_Latn_perplexity"
    arguments = {"pretrained": str(adds_bos), "max_length": max_length}
    model = SteeredHFLM(**arguments, device="cpu", batch_size=2)
    found = evaluate(model, name, data_dir=str(first_sentences), **arguments)
    expected = [by_hand(adds_bos, sample["doc"]["text"], max_length) for sample in found["samples"][name]]
    assert len(expected) == 3 and (max_length == 256 or max(tokens for _, tokens in expected) > 16)
    totals = [sample["resps"][0][0][0] for sample in found["samples"][name]]
    assert totals == pytest.approx([total for total, _ in expected], rel=1e-5)
    nats = -sum(total for total, _ in expected) / sum(tokens for _, tokens in expected)
    assert found["results"][name]["nats_per_token,none"] == pytest.approx(nats, rel=1e-5)
    assert "left_out,none" not in found["results"][name]


def test_under_plain_hf_texts_that_do_not_fit_are_left_out_and_counted(
    adds_bos: Path, evaluate: Evaluate, first_sentences: Path
) -> None:
    name = "steering_flores_deu_Latn_perplexity"
    rows = flores.perplexity_documents("deu_Latn", data_dir=str(first_sentences))["test"]
    lengths = sorted(by_hand(adds_bos, row["text"], 256)[1] for row in rows)
    arguments = {"pretrained": str(adds_bos), "max_length": lengths[1]}
    model = HFLM(**arguments, device="cpu", batch_size=1)
    found = evaluate(model, name, data_dir=str(first_sentences), **arguments)["results"][name]
    assert found["left_out,none"] == pytest.approx(1 / 3)
    assert "nats_per_token,none" not in found
    kept = [row["text"] for row in rows if by_hand(adds_bos, row["text"], 256)[1] <= lengths[1]]
    totals = sum(by_hand(adds_bos, text, 256)[0] for text in kept)
    bits = -totals / sum(len(text.encode()) for text in kept) / math.log(2)
    assert found["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


@pytest.fixture
def first_sentences(tmp_path: Path) -> Path:
    texts = [
        "Der Zug nach Berlin fährt heute leider nicht, wir nehmen den Bus.",
        "Morgen wird es regnen, sagt meine Mutter.",
        "Die Kinder spielen im Garten hinter dem Haus, und der Hund schläft vor der Tür.",
    ]
    write_rows(
        tmp_path / "flores200" / "deu_Latn.devtest.jsonl",
        [{"id": number, "sentence": text} for number, text in enumerate(texts)],
    )
    return tmp_path


def test_perplexity_by_token_where_the_model_counts_them() -> None:
    score = pickle.loads(pickle.dumps(Score((-6.0, False), 3)))  # as from a --use_cache file
    document = {"text": "abc", "too_long": True}
    assert perplexity_metrics(document, [score]) == {"left_out": 1.0}  # of an engine without windows
    whole = pickle.loads(pickle.dumps(WholeTextScore(tuple(score), 3)))
    assert perplexity_metrics(document, [whole])["nats_per_token"] == (-6.0, 3)
    assert perplexity_metrics(document, [(-6.0, False)]) == {"left_out": 1.0}
    assert "nats_per_token" not in perplexity_metrics({"text": "abc", "too_long": False}, [(-6.0, False)])


def test_every_file_of_a_direction_is_there_once() -> None:
    files = flores.generated_files()
    assert len(flores.directions()) == len(set(flores.directions())) == 76
    assert Path("flores/flores_fra_Latn_eng_Latn_gurgurov.yaml") in files
    assert "evaluated: fra_Latn-eng_Latn" in files[Path("flores/flores_fra_Latn_eng_Latn.yaml")]
