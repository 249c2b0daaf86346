"""Summed log-probabilities do not depend on the tokenizer's padding side.

The published scripts slice by the unpadded prompt length, and are wrong on the left (Rahmanisa et al. 2025's Gemma).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from lm_eval_steering.lmeval.model import SteeredHFLM

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "tau_logprob_padding.json").read_text())


SIZE = len(GOLDEN["vocab"])


class Bigrams(LlamaForCausalLM):
    """A language model whose next character depends on the last one alone; of the Llama the head alone is used."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head.weight = torch.nn.Parameter(torch.tensor(GOLDEN["bigram_logits"]).T.contiguous())

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(torch.nn.functional.one_hot(input_ids, SIZE).float()))


def tokenizer(side: str) -> PreTrainedTokenizerFast:
    vocabulary = {character: number for number, character in enumerate(GOLDEN["vocab"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="_", bos_token="^", eos_token="^", padding_side=side
    )


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("scoring", ["plain", "auto"])
def test_one_number_for_either_side_and_any_batch(side: str, bos: bool, batch_size: int, scoring: str) -> None:
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=SIZE, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    model = SteeredHFLM(
        Bigrams(config).eval(), tokenizer=tokenizer(side), batch_size=batch_size, add_bos_token=bos, scoring=scoring
    )
    requests = [
        Instance("loglikelihood", {}, (prompt, f" {continuation}"), number)
        for number, (prompt, continuation) in enumerate(GOLDEN["pairs"])
    ]
    scores = [score[0] for score in model.loglikelihood(requests, disable_tqdm=True)]
    assert scores == pytest.approx(GOLDEN["calculate_logprob_bosFalse"], abs=1e-4)
    assert GOLDEN["calculate_logprob_batch_bosFalse_left"][0] != pytest.approx(scores[0], abs=1)
