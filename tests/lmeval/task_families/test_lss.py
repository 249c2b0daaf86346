from __future__ import annotations

import json
import logging
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families import lss
from lm_eval_steering.lmeval.task_families.parallel import Pair, _in_two_languages
from lm_eval_steering.metrics.statistics import against_random, wilson_interval
from lm_eval_steering.neurons.find import random_set
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.lmeval.task_families.conftest import FRENCH, Evaluate, write_rows

PARALLEL = [  # ours
    {"en": en, "fr": fr, "ja": ja}
    for en, fr, ja in (
        (
            "The old man drinks his tea in the garden.",
            "Le vieil homme boit son thé dans le jardin.",
            "老人は庭でお茶を飲む。",
        ),
        (
            "We take the early train to the sea.",
            "Nous prenons le premier train pour la mer.",
            "私たちは早い電車で海へ行く。",
        ),
        ("Her brother sells bread at the market.", "Son frère vend du pain au marché.", "彼女の兄は市場でパンを売る。"),
        ("Yes.", "Oui.", "はい"),
    )
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "parallel.jsonl", PARALLEL)


def scores(model: SteeredHFLM, documents: list[dict[str, Any]]) -> list[dict[str, float]]:
    requests = [
        Instance("loglikelihood", document, (document["prompt"], choice), number)
        for document in documents
        for number, choice in enumerate(document["choices"])
    ]
    answers = model.loglikelihood(requests, disable_tqdm=True)
    return [lss.metrics(document, answers[2 * n : 2 * n + 2]) for n, document in enumerate(documents)]


def mean(found: list[dict[str, float]], name: str = "lss") -> float:
    return sum(values[name] for values in found) / len(found)


def test_one_run_scores_both_sides_and_the_diagonal_stays_blank_in_a_group_too(
    french: SteeredHFLM, evaluate: Evaluate, shared_data: Path, tmp_path: Path
) -> None:
    names = [f"steering_lss_{code}" for code in ("eng_Latn", "fra_Latn", "jpn_Jpan")]
    (tmp_path / "group.yaml").write_text(
        json.dumps(
            {"group": "two", "task": names, "aggregate_metric_list": [{"metric": "lss", "weight_by_size": True}]}
        )
    )
    settings = {"language": "fra_Latn", "data_dir": str(shared_data / "evaluation")}
    results = evaluate(french, "two", limit=8, more=tmp_path, **settings)
    english, own, japanese = (results["results"][name] for name in names)
    assert english["lss,none"] > 0.5 and english["lss_ties,none"] == 0
    assert english["lss_shift_low,none"] <= english["lss_shift,none"] <= english["lss_shift_high,none"]
    assert not [key for key in own if "lss," in key or "shift" in key]
    both = (english["lss,none"] + japanese["lss,none"]) / 2
    assert results["groups"]["two"]["lss,none"] == pytest.approx(both)


def test_an_identity_gives_exactly_nothing_and_ties_everywhere(
    loaded: SteeredHFLM, demo_set: NeuronSet, evaluate: Evaluate, table: Path
) -> None:
    loaded.intervene(demo_set, language="fra_Latn", op="scale", factor=1)
    settings = {"language": "fra_Latn", "parallel": str(table)}
    found = evaluate(loaded, "steering_lss_eng_Latn", **settings)["results"]["steering_lss_eng_Latn"]
    assert (found["lss,none"], found["lss_shift,none"], found["lss_ties,none"]) == (0, 0, 1)
    assert found["sample_len"] == 3


def test_an_identity_after_other_interventions_gives_exactly_nothing_too(
    loaded: SteeredHFLM, demo_set: NeuronSet, shared_data: Path
) -> None:
    """The unsteered scores of the first run are kept for the same batches; the second must not see a trace of it."""
    settings = {"language": "fra_Latn", "data_dir": str(shared_data / "evaluation")}
    documents = [dict(document) for document in lss.parallel_documents("eng_Latn", **settings)["test"]][:8]
    loaded.intervene(demo_set, **FRENCH)
    moved = scores(loaded, documents)
    assert mean(moved) > 0.5 and mean(moved, "lss_ties") == 0
    loaded.intervene(demo_set, **FRENCH | {"factor": 0})
    still = scores(loaded, documents)
    assert (mean(still), mean(still, "lss_ties")) == (0, 1) and {values["lss_shift"] for values in still} == {0}
    loaded.intervene(demo_set, **FRENCH)
    assert scores(loaded, documents) == moved


def test_swapping_the_objects_gives_what_is_left_of_one(french: SteeredHFLM, table: Path) -> None:
    documents = [dict(doc) for doc in lss.parallel_documents("eng_Latn", language="fra", parallel=str(table))["test"]]
    documents.append({**documents[0], "choices": [" same", " same"]})
    swapped = [{**document, "choices": document["choices"][::-1]} for document in documents]
    there, back = scores(french, documents), scores(french, swapped)
    assert mean(there, "lss_ties") == 0.25
    assert mean(back) == 1 - mean(there) - mean(there, "lss_ties")


def test_twenty_random_sets_make_the_null(loaded: SteeredHFLM, demo_set: NeuronSet, table: Path) -> None:
    documents = [dict(doc) for doc in lss.parallel_documents("eng_Latn", language="fra", parallel=str(table))["test"]]

    def score(neurons: NeuronSet) -> float:
        loaded.intervene(neurons, language="fra_Latn", op="scale", factor=4)
        return mean(scores(loaded, documents))

    own = score(demo_set)
    null = against_random(own, [score(random_set(demo_set, seed)) for seed in range(20)])
    assert null.sets == 20 and null.lowest <= null.mean <= null.highest and null.lowest < null.highest
    assert null.interval[0] <= null.share <= null.interval[1]


def test_the_share_of_random_sets_has_its_interval() -> None:
    null = against_random(0.9, [0.5] * 19 + [0.95])
    assert (null.share, null.mean, null.lowest, null.highest) == (0.05, pytest.approx(0.5225), 0.5, 0.95)
    assert null.interval == pytest.approx((0.00888, 0.23613), abs=1e-5)  # Wilson's, by hand
    assert wilson_interval(0, 20) == (0, pytest.approx(0.16113, abs=1e-5))
    assert wilson_interval(20, 20) == (pytest.approx(1 - 0.16113, abs=1e-5), 1)
    with pytest.raises(SteeringError, match="at least 20"):
        against_random(0.9, [])


def test_models_that_cannot_be_unsteered_are_told(evaluate: Evaluate, table: Path) -> None:
    with pytest.raises(SteeringError, match="--model steered-hf"):
        evaluate("dummy", "steering_lss_eng_Latn", language="fra_Latn", parallel=str(table))


def test_sentences_are_cut_at_their_share_of_words_or_of_characters(table: Path, caplog: Any) -> None:
    settings = {"parallel": str(table), "language": "jpn_Jpan"}
    with caplog.at_level(logging.WARNING):
        first = lss.parallel_documents("eng_Latn", share=0.34, **settings)["test"][0]
    assert first["prompt"] == "The old man"
    assert first["choices"] == [" drinks his tea in the garden.", " でお茶を飲む。"]
    assert "1 sentences of one word left out" in caplog.text
    assert first["made_for"] == ["jpn_Jpan"]
    chinese = lss.parallel_documents("jpn_Jpan", language="zho", parallel=str(two_scripts(table)))["test"][0]
    assert (chinese["prompt"], chinese["choices"]) == ("老人は茶", ["を飲む。", "喝茶。"])
    with pytest.raises(SteeringError, match="share=1"):
        lss.parallel_documents("eng_Latn", share=1, **settings)


def two_scripts(table: Path) -> Path:
    return write_rows(table.with_name("two.jsonl"), [{"jpn_Jpan": "老人は茶を飲む。", "zho_Hans": "老人们喝茶。"}])


def test_a_mark_stays_with_its_letter() -> None:
    from lm_eval_steering.lmeval.task_families.parallel import cut

    for share in (0.2, 0.4, 0.6, 0.8):
        first, second = cut("ที่นี่มีน้ำ", share, "tha_Thai") or ("", "")
        assert first + second == "ที่นี่มีน้ำ"
        assert second[0] not in "ี่้ำิ"


@pytest.mark.parametrize("name", ["sides.tsv", "sides.csv", "{lang}.txt", "{lang}.jsonl"])
def test_parallel_data_of_every_shape(name: str, tmp_path: Path) -> None:
    rows = [(row["en"], row["fr"]) for row in PARALLEL[:3]]
    if name.startswith("{lang}"):
        for place, code in enumerate(("en", "fra_Latn")):
            lines = [row[place] for row in rows]
            text = [json.dumps({"text": line}) for line in lines] if name.endswith("jsonl") else lines
            (tmp_path / name.replace("{lang}", code)).write_text("\n".join(text) + "\n")
    else:
        between = "\t" if name.endswith("tsv") else ","
        (tmp_path / name).write_text("\n".join(between.join(row) for row in [("eng", "fr"), *rows]) + "\n")
    docs = lss.parallel_documents("eng_Latn", language="fra", parallel=str(tmp_path / name))["test"]
    assert len(docs) == 3 and docs[1]["prompt"] == "We take the early"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "no such file"),
        ("{lang}.txt", "no file for eng_Latn"),
        ("table.jsonl", r"no column for fra_Latn \(one of fra_Latn"),
        ("table.xml", "expected a .jsonl, .parquet, .csv or .tsv file"),
    ],
)
def test_parallel_data_that_is_not_there_is_one_clear_error(name: str, message: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "table.jsonl", [{"en": "a b"}])
    (tmp_path / "table.xml").touch()
    with pytest.raises(SteeringError, match=message):
        lss.parallel_documents("eng_Latn", language="fra", parallel=str(tmp_path / name))


def test_files_of_different_length_are_not_parallel(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("a b\nc d\n")
    (tmp_path / "fr.txt").write_text("a b\n")
    with pytest.raises(SteeringError, match="2 lines in eng_Latn and 1 in fra_Latn"):
        lss.parallel_documents("eng_Latn", language="fra", parallel=str(tmp_path / "{lang}.txt"))


@pytest.mark.parametrize("name", ["table.csv", "{lang}.txt", "{lang}.jsonl"])
def test_a_sentence_without_its_translation_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("en,fr\na b,c d\ne f,\n")
    (tmp_path / "en.txt").write_text("a b\ne f\n\ng h\n")
    (tmp_path / "fr.txt").write_text("c d\n \n\ni j\n")
    write_rows(tmp_path / "en.jsonl", [{"text": "a b"}, {"text": "e f"}])
    write_rows(tmp_path / "fr.jsonl", [{"text": "c d"}, {"text": ""}])
    where = name.replace("{lang}", "fr").replace(".", r"\.") + (", line 3" if name == "table.csv" else ", line 2")
    with pytest.raises(SteeringError, match=where + ": empty, while its counterpart"):
        lss.parallel_documents("eng_Latn", language="fra", parallel=str(tmp_path / name))


def test_one_language_where_two_are_expected_is_refused(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("a b\nc d\ne f\n")
    (tmp_path / "fr.txt").write_text("a b\nc d\nx y\n")
    with pytest.raises(SteeringError, match="2 of 3 sentences are the same text in eng_Latn and in fra_Latn"):
        lss.parallel_documents("eng_Latn", language="fra", parallel=str(tmp_path / "{lang}.txt"))
    english = ["The train is late today.", "We are going to the market.", "She reads a book in the garden."]
    (tmp_path / "en.txt").write_text("\n".join(english) + "\n")
    (tmp_path / "fr.txt").write_text("\n".join(text.replace("the", "this") for text in english[::-1]) + "\n")
    with pytest.raises(SteeringError, match=r"100% of the sentences in eng_Latn and 100% .* identified as eng_Latn"):
        lss.parallel_documents("eng_Latn", language="fra", parallel=str(tmp_path / "{lang}.txt"))
    (tmp_path / "cut.jsonl").write_text(json.dumps({"en": "a b", "fr": "c \ud800"}))
    with pytest.raises(SteeringError, match=r"cut\.jsonl, line 1: the text of 'fr' holds a lone surrogate"):
        lss.parallel_documents("eng_Latn", language="fra", parallel=str(tmp_path / "cut.jsonl"))


def test_no_two_languages_of_flores_are_taken_for_one(shared_data: Path) -> None:
    """Indonesian and Malay too, of which identifiers take more than half for Indonesian."""
    folder = shared_data / "evaluation" / "flores200"
    texts = {
        path.name.split(".")[0]: [json.loads(line)["sentence"] for line in path.read_text().splitlines()]
        for path in folder.glob("*.devtest.jsonl")
    }
    assert len(texts) > 20
    for first, second in combinations(sorted(texts), 2):
        pairs = [Pair(str(n), *two) for n, two in enumerate(zip(texts[first], texts[second], strict=False))]
        assert _in_two_languages(pairs, "FLORES", first, second) == pairs


# --- MLAMA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "ours", "paper"),
    [
        ("The capital of [X] is [Y]", "The capital of A is", "The capital of A is"),
        ("The capital of [X] is [Y] .", "The capital of A is", "The capital of A is ."),
        ("[X]的首都是[Y]", "A的首都是", "A的首都是[Y]"),
        ("[X]的首都是[Y]。", "A的首都是", "A的首都是[Y]。"),
        ("[Y] is the capital of [X]", None, "[Y] is the capital of A"),
        ("[X] has [Y] as its capital", "A has", "A has as its capital"),
        ("[X]は[Y]に属する。", "Aは", "Aは[Y]に属する。"),
        ("[X.Gen] capital is [Y]", None, "[X.Gen] capital is"),
        ("[X] [ARTDEF;Y] [Y]", None, "A [ARTDEF;Y]"),
        ("[X]", None, "A"),
    ],
)
def test_prompts_end_before_the_object(template: str, ours: str | None, paper: str) -> None:
    assert lss.prompt_of(template, "A") == ours
    assert lss.prompt_of(template, "A", paper=True) == paper


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    rows = [  # in the fields of inayarhmns/MLAMA-dod-185; the items are ours
        {"template": "[X] is in [Y]", "predicate_id": "P1", "sub_en": x, "obj_en": y, "sub_fr": x, "obj_fr": z}
        for x, y, z in (("Rome", "Italy", "Italie"), ("Munich", "Germany", "Allemagne"), ("Monaco", "Monaco", "Monaco"))
    ]
    rows.append({**rows[0], "template": "[Y] is where [X] lies", "predicate_id": "P2"})
    write_rows(tmp_path / "mlama" / "en.jsonl", rows)
    return tmp_path


def test_mlama_runs_and_names_the_templates_that_it_leaves_out(
    french: SteeredHFLM, evaluate: Evaluate, facts: Path, caplog: Any
) -> None:
    settings = {"language": "fra_Latn", "data_dir": str(facts)}
    with caplog.at_level(logging.WARNING):
        found = evaluate(french, "steering_lss_eng_Latn_mlama", **settings)["results"]["steering_lss_eng_Latn_mlama"]
    assert "1 items left out, whose subject is not before the object: P2 '[Y] is where [X] lies' (1)" in caplog.text
    assert found["sample_len"] == 3 and found["lss_ties,none"] == pytest.approx(1 / 3)
    assert found["lss_distinct,none"] == pytest.approx(found["lss,none"] * 3 / 2)
    with pytest.raises(SteeringError, match="'obj_de', which mlama needs"):
        evaluate(french, "steering_lss_eng_Latn_mlama", **settings | {"language": "deu_Latn"})


def test_real_triples_in_these_fields_make_documents(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "evaluation" / "wikidata_triples" / "triples.jsonl").read_text(encoding="utf-8").splitlines()
    for base, other in (("en", "fr"), ("ja", "zh")):
        rows = [
            {"template": triple["templates"][base], "predicate_id": triple["predicate_id"]}
            | {f"{key}_{code}": triple["labels"][code][key] for code in (base, other) for key in ("sub", "obj")}
            for triple in map(json.loads, lines)
            if base in triple["labels"] and other in triple["labels"]
        ]
        write_rows(tmp_path / "mlama" / f"{base}.jsonl", rows)
    english = lss.mlama_documents("eng_Latn", language="fra", data_dir=str(tmp_path))["test"]
    assert 0 < len(english) <= 552 and not any("[" in doc["prompt"] for doc in english)
    japanese = lss.mlama_documents("jpn_Jpan", language="zho_Hans", data_dir=str(tmp_path))["test"]
    assert len(japanese) > 500
    assert all(not choice.startswith(" ") for doc in japanese for choice in doc["choices"])
