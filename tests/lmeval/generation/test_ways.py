"""Whatever way generates: the texts are those of lm-eval's `hf`, or of the plain way where the model is steered."""

from __future__ import annotations

from shutil import which
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.lmeval.model import SteeredHFLM
from tests.conftest import make_set, tiny_model, tiny_tokenizer
from tests.lmeval.scoring.conftest import FRENCH, HIDDEN, neurons

# Of 1 to 44 tokens, so that there are many pads.
PROMPTS = [" ".join(f"w{(7 * place + i) % 50}" for i in range(place)) for place in (1, 2, 44, 3, 40, 9, 8, 30, 31, 2)]
GROWING = {"gpt_neo", "mpt", "falcon_h1"}  # take no cache of fixed size


def requests(until: list[str], prompts: list[str] = PROMPTS, **changes: Any) -> list[Instance]:
    arguments = {"do_sample": False, "max_gen_toks": 12, "until": until} | changes
    return [Instance("generate_until", {}, (text, arguments), place) for place, text in enumerate(prompts)]


def loaded(kind: type[HFLM] = SteeredHFLM, family: str = "llama", batch_size: int = 4, **arguments: Any) -> Any:
    model = tiny_model(family).to(arguments.pop("dtype", torch.float32))
    return kind(model, tokenizer=tiny_tokenizer(), batch_size=batch_size, max_length=64, **arguments)


def texts(lm: HFLM, asked: list[Instance]) -> list[str]:
    return list(map(str, lm.generate_until(asked, disable_tqdm=True)))


def ends(found: list[str]) -> list[str]:
    """Words at which these texts would end early."""
    return sorted({word for text in found for word in text.split()[3:4]})


@pytest.fixture(scope="module")
def rivals() -> tuple[HFLM, SteeredHFLM]:
    return loaded(HFLM), loaded()


def test_every_family_writes_what_it_writes_in_hf(family: str) -> None:
    plain, ours = loaded(HFLM, family), loaded(family=family)
    for stop in ([], ends(texts(plain, requests([])))):
        expected = texts(plain, requests(stop))
        assert texts(ours, requests(stop)) == expected
        assert any(expected) or (stop and family == "arcee")  # which repeats the word that its texts begin with
    assert ours.steering_report()["generation"]["prompts"] == {"dynamic": 2 * len(PROMPTS)}


@pytest.mark.parametrize("arguments", [
    FRENCH, {"op": "add", "value": "live_max"}, {"preset": "+max"}, FRENCH | {"positions": "prompt"},
    FRENCH | {"positions": "generated"}, FRENCH | {"positions": "last"}, FRENCH | {"positions": "prompt[-2:]"},
    FRENCH | {"site": "product"}, {"op": "add", "value": "mean", "deactivate": "deu", "deactivate_to": "noise"},
    HIDDEN, HIDDEN | {"dimensions": 3, "positions": "generated"}, HIDDEN | {"value": "live_max"},
], ids=str)  # fmt: skip
def test_every_kind_of_intervention_writes_what_it_writes_in_the_plain_way(arguments: dict[str, Any]) -> None:
    found = []
    for way in ("plain", "auto"):
        lm = loaded(generation=way)
        lm.intervene(neurons(), **({"language": "fra_Latn"} | arguments))
        whole = texts(lm, requests([]))
        found.append((whole, texts(lm, requests(ends(whole)))))
    assert found[0] == found[1]


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=7),
    picked=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 11)), max_size=4),
    batch_size=st.integers(1, 8),
    more=st.sampled_from([{}, {"min_new_tokens": 3}, {"repetition_penalty": 1.3}, {"min_length": 20}]),
)
def test_any_prompts_stop_strings_and_batch_size(
    rivals: tuple[HFLM, SteeredHFLM],
    lengths: list[int],
    picked: list[tuple[int, int]],
    batch_size: int,
    more: dict[str, Any],
) -> None:
    prompts = [" ".join(f"w{(5 * place + i) % 50}" for i in range(length)) for place, length in enumerate(lengths)]
    for lm in rivals:
        lm.batch_size_per_gpu = batch_size
    words = [text.split() for text in texts(rivals[0], requests([], prompts))]
    until = sorted({word for row, place in picked for word in words[row % len(words)][place : place + 1]})
    asked = requests(until, prompts, **more)
    assert texts(rivals[1], asked) == texts(rivals[0], asked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_writes_what_it_writes_in_hf(dtype: torch.dtype) -> None:
    ours = loaded(dtype=dtype)
    assert texts(ours, requests([])) == texts(loaded(HFLM, dtype=dtype), requests([]))
    assert ours.steering_report()["generation"]["prompts"] == {"dynamic": len(PROMPTS)}


def test_other_settings_adapters_and_rotary_embeddings_write_what_they_write_in_hf() -> None:
    def asking_for(name: str, value: Any) -> tuple[HFLM, ...]:
        found = loaded(HFLM), loaded()
        for lm in found:
            setattr(lm.model.generation_config, name, value)
        return found

    adapter = LoraConfig(target_modules=["gate_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = []
    for kind in (HFLM, SteeredHFLM):
        torch.manual_seed(1)
        adapted.append(
            kind(get_peft_model(tiny_model("llama"), adapter), tokenizer=tiny_tokenizer(), batch_size=4, max_length=64)
        )
    longrope = [loaded(HFLM), loaded()]
    for lm in longrope:
        lm.model.config.rope_parameters["rope_type"] = "longrope"  # only said, so that texts stay what they are
    for plain, ours in (
        asking_for("encoder_repetition_penalty", 1.5), asking_for("prefill_chunk_size", 8), adapted, longrope,
    ):  # fmt: skip
        assert texts(ours, requests([])) == texts(plain, requests([]))
        assert ours.steering_report()["generation"]["prompts"] == {"dynamic": len(PROMPTS)}


def test_every_family_writes_the_same_with_a_cache_of_fixed_size(family: str) -> None:
    if family in GROWING:
        with pytest.raises(InterventionError, match="takes no cache of fixed size"):
            loaded(family=family, generation="static")
        return
    lm = loaded(family=family, generation="static")
    assert texts(lm, requests([])) == texts(loaded(HFLM, family), requests([]))
    report = lm.steering_report()["generation"]
    assert report == {"setting": "static", "prompts": {"static": len(PROMPTS)}, "why": "generation=static"}


@pytest.mark.skipif(not which("g++"), reason="no compiler")
def test_a_compiled_forward_pass_is_steered() -> None:
    found = []
    for way in ("plain", "compiled"):
        lm = loaded(generation=way, batch_size=2)
        lm.intervene(make_set({"fra_Latn": [(1, 5)]}), **FRENCH)  # a single break of what is compiled
        found.append(texts(lm, requests([], PROMPTS[:2])))
    assert found[0] == found[1]
    report = lm.steering_report()
    assert report["generation"]["prompts"] == {"compiled": 2} and report["evidence"]["forwards"] == 12


def test_another_setting_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InterventionError, match=r"generation='statc'.*did you mean 'static'"):
        SteeredHFLM(tiny_model("llama"), generation="statc")
