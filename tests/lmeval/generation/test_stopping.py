"""Texts are those of lm-eval's `hf`, byte for byte, in fewer forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lm_eval_steering.lmeval.generation import StopStrings, against_early_ends, independent
from lm_eval_steering.lmeval.model import SteeredHFLM
from tests.conftest import tiny_model, tiny_tokenizer

PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7", "w9 w8", "w20", "w30 w31 w2"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_gen_toks": 24}


def requests(until: list[str], **changes: Any) -> list[Instance]:
    arguments = GREEDY | {"until": until} | changes
    return [Instance("generate_until", {}, (text, arguments), i) for i, text in enumerate(PROMPTS)]


def counted(lm: HFLM, asked: list[Instance]) -> tuple[list[str], int]:
    """Texts, and the number of forward passes."""
    passes: list[Any] = []
    handle = lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    texts = list(map(str, lm.generate_until(asked, disable_tqdm=True)))
    handle.remove()
    return texts, len(passes)


@pytest.fixture(scope="module")
def rivals() -> tuple[HFLM, SteeredHFLM]:
    plain, ours = (kind(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=4) for kind in (HFLM, SteeredHFLM))
    return plain, ours


@pytest.fixture(scope="module")
def words(rivals: tuple[HFLM, SteeredHFLM]) -> list[list[str]]:
    """What comes after each prompt."""
    return [text.split() for text in rivals[0].generate_until(requests([]))]


def test_rows_end_one_by_one_with_the_same_texts(rivals: Any, words: list[list[str]]) -> None:
    plain, ours = rivals
    until = sorted({word for each in words for word in each[2:3]})  # of each row that does not end by itself
    expected, slow = counted(plain, requests(until))
    found, fast = counted(ours, requests(until))
    assert found == expected and any(expected)
    assert fast < slow / 2


@settings(max_examples=25)
@given(picked=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 23), st.integers(1, 9)), min_size=1, max_size=3))
def test_texts_are_equal_for_any_stop_strings(rivals: Any, words: list[list[str]], picked: Any) -> None:
    plain, ours = rivals
    texts = [" ".join(each) for each in words]
    until = [piece for row, start, length in picked if (piece := texts[row][start : start + length])]
    expected, slow = counted(plain, requests(list(until)))
    found, fast = counted(ours, requests(list(until)))
    assert found == expected and fast <= slow


def test_sampling_and_what_is_not_known_is_left_to_lm_eval(rivals: Any) -> None:
    ours = rivals[1]
    assert not against_early_ends(ours._generation_context(), ["w1"], {"do_sample": False, "temperature": 0.0})
    for arguments in ({"do_sample": True}, {"do_sample": False, "num_beams": 2}, {"do_sample": False, "x": 1}, {}):
        assert against_early_ends(ours._generation_context(), ["w1"], arguments)
    for changes in ({"do_sample": True, "temperature": 0.9}, {"num_beams": 2}):
        texts = []
        for lm in rivals:
            torch.manual_seed(0)
            texts.append(list(map(str, lm.generate_until(requests(["w5"], **changes)))))
        assert texts[0] == texts[1]


PIECES = ["a", "b", "ab", "\n", "x", ", ", "é", "</s>", "<0x0A>", "<0xC3>", "<0xA9>"]


def pieces_tokenizer(decoder: Any) -> PreTrainedTokenizerFast:
    """Each piece is a token."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="x"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


FUSED = pieces_tokenizer(decoders.Fuse())
BYTES = pieces_tokenizer(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]))
STOP = ["\n", "\n\n", "ab", "b\n", "xa", "é", ", ", "a, b", "x", "bab"]


@given(
    tokenizer=st.sampled_from([FUSED, BYTES]),
    tokens=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=10),
    stop=st.lists(st.sampled_from(STOP), min_size=1, max_size=3).filter(independent),
)
def test_a_row_ends_as_soon_as_it_has_a_string_and_its_text_is_certain(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: list[str]
) -> None:
    def text(number: int) -> str:
        return tokenizer.decode(tokens[:number], skip_special_tokens=True)

    criteria = StopStrings(tokenizer, stop, 1, 0)
    for number in range(1, len(tokens) + 1):
        done = bool(criteria(torch.tensor([tokens[:number]]), None)[0])
        assert done is any(each in text(number) for each in stop)
        if done:
            # Bytes that make no character take others along: what lm-eval makes of those depends on other rows.
            if "\N{REPLACEMENT CHARACTER}" not in text(len(tokens)):
                cut = [postprocess_generated_text(text(length), stop, None) for length in (number, len(tokens))]
                assert cut[0] == cut[1]
            break


def test_what_is_in_the_prompt_ends_nothing() -> None:
    a, b, ab, _, x, *_ = range(len(PIECES))
    assert StopStrings(FUSED, ["ab"], 1, 2)(torch.tensor([[ab, x, ab]]), None).tolist() == [True]
    assert StopStrings(FUSED, ["ab"], 1, 1)(torch.tensor([[a, b]]), None).tolist() == [False]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["\n", "</s>"], True), (["\n", "\n\n"], True), (["ab", "ab"], True), (["Q:"], True),
        (["\n\n", "\nQ:"], False), (["b", "abc"], False), (["ab", "bc"], False),
    ],
)  # fmt: skip
def test_strings_that_may_overlap(stop: list[str], expected: bool) -> None:
    assert independent(stop) is independent(stop[::-1]) is expected


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Sequence([decoders.Strip(" ", 0, 1)])])
def test_tokenizers_of_which_the_text_may_change_are_left_to_lm_eval(decoder: Any) -> None:
    lm = SteeredHFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=1)
    lm.tokenizer = pieces_tokenizer(decoder)
    lm.model.generation_config.eos_token_id = lm.eot_token_id
    assert against_early_ends(lm._generation_context(), ["\n"], {"do_sample": False})
    lm.tokenizer = FUSED
    assert not against_early_ends(lm._generation_context(), ["\n"], {"do_sample": False})
    assert against_early_ends(lm._generation_context(), ["/s"], {"do_sample": False})  # found in the end token
    assert against_early_ends(lm._generation_context(), [">\n"], {"do_sample": False})  # or at its end
    assert against_early_ends(
        lm._generation_context(), ["", "\n"], {"do_sample": False}
    )  # lm-eval stops after one token
    lm.tokenizer.add_tokens([AddedToken("<turn>", special=True)])
    assert against_early_ends(lm._generation_context(), ["<turn>"], {"do_sample": False})  # special, and without a name
    lm.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert "longest batch" in against_early_ends(lm._generation_context(), ["\n"], {"do_sample": False})
    lm.model.config.rope_parameters = {"rope_type": "default"}
    assert not against_early_ends(lm._generation_context(), ["\n"], {"do_sample": False})
    lm.model.generation_config.eos_token_id = [0]
    assert against_early_ends(lm._generation_context(), ["\n"], {"do_sample": False})  # no end of a row
