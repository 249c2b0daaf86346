"""Families in eager engines: tiny GPT-2 and Gemma 3 always, all of them and Gemma-3-270m by `make check-vllm`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lm_eval_steering.architectures import shape_of
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.vllm.conftest import (
    MODES,
    TINY,
    furthest,
    generating,
    made_up_set,
    right,
    running,
    save_tiny,
    scoring,
    tiny_set,
    words,
)

EVERYTHING = os.environ.get("CHECK_VLLM") == "1"
FAMILIES = sorted(TINY) if EVERYTHING else ["gemma3_text", "gpt2"]
STRONG: list[dict[str, Any]] = [
    {"language": "fra_Latn", "op": "add", "value": 2.0, "factor": 2.0},
    {"language": "fra_Latn+deu_Latn", "op": "scale", "factor": -3, "site": "product"},
    {"language": "deu_Latn", "op": "set", "value": "mean", "factor": 3, "deactivate": "others"},
    {"language": "fra_Latn", "op": "add", "value": "diffmean", "factor": 0.5, "site": "residual", "layers": "0-2"},
    {"language": "deu_Latn", "op": "scale", "factor": -0.7, "site": "residual", "layers": "1", "dimensions": 9},
    {"language": "fra_Latn", "op": "set", "value": "mean", "site": "residual", "layers": "2", "dimensions": 20},
]


def test_every_family_of_the_table_is_tried() -> None:
    from lm_eval_steering.vllm.layers import FAMILIES as TABLE

    assert sorted(TINY) == sorted(TABLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_steered_as_by_hooks(vllm: None, family: str, tmp_path: Path, record_property: Any) -> None:
    pretrained, tokenizer = save_tiny(tmp_path, family)
    neurons = tiny_set(pretrained, family)
    lm: Any = SteeredHFLM(pretrained, tokenizer=tokenizer, dtype="float32", batch_size=2)
    expected = [lm.loglikelihood(words(), disable_tqdm=True)]
    for arguments in STRONG:  # all before the engine: vLLM decorates classes of transformers where it runs them
        lm.intervene(neurons, **arguments)
        expected.append(lm.loglikelihood(words(), disable_tqdm=True))
    with running("steered", MODES["eager"], pretrained, tokenizer=tokenizer, max_model_len=64) as lm:
        found = [lm.loglikelihood(words(), disable_tqdm=True)]
        for arguments in STRONG:
            lm.intervene(neurons, **arguments)
            found.append(lm.loglikelihood(words(), disable_tqdm=True))
            assert lm.steering.evidence().positions >= lm.steering.evidence().asked > 0
    distances = [furthest(one, other) for one, other in zip(found, expected, strict=True)]
    record_property("furthest", max(distances))
    assert max(distances) < 1e-4
    moved = [max(abs(a[0] - b[0]) for a, b in zip(one, expected[0], strict=True)) for one in expected[1:]]
    assert min(moved) > 0.01, "each intervention does something"


if EVERYTHING:
    # A folder with google/gemma-3-270m. It is not asked for in every run: its weights have terms of their own.
    GEMMA = os.environ.get("GEMMA_3_270M", "")

    @pytest.mark.parametrize("mode", ["eager", "compiled"])
    def test_gemma_3_270m_is_steered_as_by_hooks(vllm: None, mode: str, record_property: Any) -> None:
        assert (Path(GEMMA) / "config.json").exists(), "GEMMA_3_270M=FOLDER says where google/gemma-3-270m is"
        neurons = gemma_set(GEMMA)
        lm: Any = SteeredHFLM(GEMMA, dtype="float32", max_length=512, batch_size=4)
        expected = []
        for arguments in [None, *STRONG]:
            lm.intervene(neurons if arguments else None, **arguments or {})
            expected.append(lm.loglikelihood(scoring(3), disable_tqdm=True))
        texts = lm.generate_until(generating(3), disable_tqdm=True)
        del lm
        with running("steered", MODES[mode], GEMMA) as lm:
            found = []
            for arguments in [None, *STRONG]:
                lm.intervene(neurons if arguments else None, **arguments or {})
                found.append(lm.loglikelihood(scoring(3), disable_tqdm=True))
            own = lm.generate_until(generating(3), disable_tqdm=True)
        distances = [furthest(one, other) for one, other in zip(found, expected, strict=True)]
        record_property("furthest", max(distances))
        print(f"\nGemma-3-270m {mode}: {distances}, equal texts: {[a == b for a, b in zip(own, texts, strict=True)]}")
        assert max(distances) < 1e-4
        assert [right(one, 3) for one in found] == [right(one, 3) for one in expected]


def gemma_set(pretrained: str) -> NeuronSet:
    """A made-up set: 40 neurons a language, over all layers and units."""
    shape = shape_of(AutoConfig.from_pretrained(pretrained))
    codes = ("fra_Latn", "deu_Latn", "eng_Latn")
    return made_up_set(
        pretrained,
        "gemma3_text",
        {
            code: sorted({(number % shape.layers, (number * 97 + 31 * place) % shape.units) for number in range(40)})
            for place, code in enumerate(codes)
        },
    )
