"""Requests of the shapes that multilingual evaluations have, from the shared data folder, and models to score them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.models import random_set
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families.xcopa import as_lm_eval
from lm_eval_steering.metrics.likelihood import NEEDS_UNSTEERED_SCORE

DATA = Path(os.environ.get("LM_EVAL_STEERING_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "evaluation"
DEMO = Path(__file__).parents[1] / "lm_eval_steering" / "demo" / "demo-model"
LARGE_VOCABULARY = LlamaConfig(
    hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, vocab_size=128_256,
    max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
LANGUAGES = ("eng_Latn", "deu_Latn", "fra_Latn")
Pairs = list[list[tuple[str, str]]]  # of each item: (context, continuation) of each option


def _rows(*path: str) -> Iterator[dict[str, Any]]:
    with DATA.joinpath(*path).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def xcopa(number: int) -> Pairs:
    """Two options of several tokens after a premise."""
    items = [
        as_lm_eval(row, "it", row["question"]) for row in itertools.islice(_rows("xcopa", "it", "test.jsonl"), number)
    ]
    return [[(item["prompt"], " " + choice) for choice in item["choices"]] for item in items]


def xwinograd(number: int) -> Pairs:
    """Two contexts that differ in the middle, and one continuation."""
    options = []
    for row in itertools.islice(_rows("xwinograd", "en", "test.jsonl"), number):
        before, after = row["sentence"].split("_", 1)
        options.append([(before + row[option], " " + after.strip()) for option in ("option1", "option2")])
    return options


def _question(row: dict[str, Any], passage: bool) -> str:
    answers = "\n".join(f"{letter}: {row[f'mc_answer{number}']}" for number, letter in enumerate("ABCD", 1))
    return (f"P: {row['flores_passage']}\n" if passage else "") + f"Q: {row['question']}\n{answers}\nAnswer:"


def _belebele(number: int) -> Iterator[dict[str, Any]]:
    return itertools.islice(_rows("belebele", "eng_Latn", "test.jsonl"), number)


def belebele(number: int) -> Pairs:
    """A long context and four letters."""
    return [[(_question(row, True), f" {letter}") for letter in "ABCD"] for row in _belebele(number)]


def include(number: int) -> Pairs:
    """A question of an exam, with four letters."""
    return [[(_question(row, False), f" {letter}") for letter in "ABCD"] for row in _belebele(number)]


def options(number: int) -> Pairs:
    """A long context and four options of several tokens."""
    return [
        [(f"P: {row['flores_passage']}\nQ: {row['question']}\nA:", f" {row[f'mc_answer{i}']}") for i in range(1, 5)]
        for row in _belebele(number)
    ]


def lss(number: int) -> Pairs:
    """A short prompt and one object in two languages."""
    rows = (row for row in _rows("wikidata_triples", "triples.jsonl") if {"en", "fr"} <= row["labels"].keys())
    return [
        [(f"{row['relation'].capitalize()} of {row['labels']['en']['sub']}:", f" {row['labels'][code]['obj']}")
         for code in ("en", "fr")]
        for row in itertools.islice(rows, number)
    ]  # fmt: skip


def xnli(number: int) -> Pairs:
    """Three whole sentences without a context, which differ in one word, as lm-eval asks XNLI."""
    rows = itertools.islice(_rows("xnli", "en", "validation.jsonl"), number)
    return [
        [("", f"{row['premise']}, right? {word}, {row['hypothesis']}") for word in ("Yes", "Also", "No")]
        for row in rows
    ]  # fmt: skip


def perplexity(number: int) -> Pairs:
    """Whole sentences without a context, as our perplexity tasks score them."""
    return [[("", text)] for text in sentences(number)]


def sentences(number: int) -> list[str]:
    """Of FLORES, in languages that the demo model knows."""
    rows = itertools.chain.from_iterable(_rows("flores200", f"{code}.devtest.jsonl") for code in LANGUAGES)
    chosen = [row["sentence"] for row in itertools.islice(rows, number)]
    if len(chosen) < number:
        raise ValueError(f"{number} sentences requested, {', '.join(LANGUAGES)} have {len(chosen)}")
    return chosen


def texts(number: int) -> list[str]:
    """Paragraphs of five sentences."""
    lines = sentences(5 * number)
    return [" ".join(lines[5 * index : 5 * index + 5]) for index in range(number)]


SHAPES: dict[str, Callable[[int], Pairs]] = {
    "xcopa": xcopa, "xwinograd": xwinograd, "belebele": belebele, "include": include, "options": options, "lss": lss,
    "xnli": xnli, "perplexity": perplexity,
}  # fmt: skip


def requests_of(items: Pairs, twice: bool = False) -> list[Instance]:
    """lm-eval's requests; scored with and without the intervention if they are LSS pairs."""
    doc = {NEEDS_UNSTEERED_SCORE: True} if twice else {}
    return [Instance("loglikelihood", doc, pair, index) for item in items for index, pair in enumerate(item)]


def rolling_of(paragraphs: list[str]) -> list[Instance]:
    """lm-eval's requests for rolling likelihood."""
    return [Instance("loglikelihood_rolling", {}, (text,), 0) for text in paragraphs]


def demo_model() -> Any:
    """The demo model, in float32."""
    return LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def large_vocabulary_model() -> Any:
    """A random Llama of about 150 million parameters, most of them in embedding and head."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LARGE_VOCABULARY).eval()


def checkpoint(folder: Path | str, dtype: str = "float32") -> Callable[[], Any]:
    """Loads a checkpoint, onto a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()


def rivals(
    build: Callable[[], Any], batch_size: int = 16, only: str = "", folder: Path | str = DEMO, **arguments: Any
) -> tuple[Any, Any]:
    """lm-eval's `hf`, and ours steered, each on a copy of one model; None for the other where `only` names one.

    Args:
        build: makes the model.
        batch_size: of both.
        only: `hf` or `ours`.
        folder: with the tokenizer.
        **arguments: of ours.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = ours = None
    if only != "ours":
        plain = HFLM(build(), tokenizer=tokenizer, batch_size=batch_size)
    if only != "hf":
        ours = SteeredHFLM(build(), tokenizer=tokenizer, batch_size=batch_size, **arguments)
        ours.intervene(random_set(ours.model), language="fra_Latn", op="scale", factor=1.5)
    return plain, ours
