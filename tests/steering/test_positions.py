"""Positions count real tokens under any padding; live statistics are over valid tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering import steer
from lm_eval_steering.errors import InterventionError
from lm_eval_steering.steering.live import statistic
from lm_eval_steering.steering.positions import parse_positions
from tests.conftest import make_set, tiny_model

IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
SET = make_set({"fra_Latn": [(0, 1), (0, 5), (2, 3)]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("prompt", [0, 1, 2, 3]),
        ("generated", [4, 5]),
        ("last", [3]),
        ("1:3", [1, 2]),
        (":2", [0, 1]),
        ("2:", [2, 3, 4, 5]),
        ("3:10", [3, 4, 5]),
        ("-2:", [2, 3, 4, 5]),  # from two before the end of the prompt, and on
        ("-9:1", [0]),
        (":-1", [0, 1, 2]),
        ("-3:-1", [1, 2]),
        ("prompt[-2:]", [2, 3]),
        ("prompt[1:]", [1, 2, 3]),
        ("generated[:1]", [4]),
        ("generated[1:9]", [5]),
        ("all[1:3]", [1, 2]),
        (":", [0, 1, 2, 3, 4, 5]),
        ("5:-3", []),  # five of a row is beyond three before the end of a prompt of four
    ],
)
def test_each_form_chooses_what_it_says(text: str, expected: list[int]) -> None:
    index, prompt = torch.arange(6).unsqueeze(0), torch.tensor([[4]])
    assert parse_positions(text).mask(index, prompt)[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    "text",
    ["", "first", "3", "3:1", "1:1", "-1:-3", "prompt[1:", "1:2]", "generated[-1:]", "1:2:3", "-:", "a:b"],
)
def test_what_is_no_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="positions="):
        parse_positions(text)


def counted(**arguments: object) -> int:
    with steer(tiny_model("llama"), SET, "fra", op="set", value=4.0, **arguments) as steering, torch.no_grad():
        tiny = steering._sites.decoder
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        tiny(IDS.repeat(2, 1), attention_mask=mask)
        return steering.evidence().positions


def test_evidence_counts_chosen_real_positions() -> None:
    found = {text: counted(positions=text) for text in ("all", "prompt", "generated", "last", "1:3", "prompt[-2:]")}
    assert found == {"all": 10, "prompt": 10, "generated": 0, "last": 2, "1:3": 4, "prompt[-2:]": 4}


def test_steps_at_different_positions_compose_in_their_order() -> None:
    steps = [
        {"language": "fra", "op": "set", "value": 4.0, "positions": "prompt"},
        {"language": "fra", "op": "scale", "factor": 2.0},
        {"language": "fra", "op": "add", "value": 1.0, "positions": "last"},
    ]
    found: list[torch.Tensor] = []
    model = tiny_model("llama")
    before: list[torch.Tensor] = []
    act = model.model.layers[0].mlp.act_fn
    act.register_forward_hook(lambda _m, _i, out: before.append(out.clone()))
    with steer(model, SET, intervention=steps) as steering, torch.no_grad():
        act.register_forward_hook(lambda _m, _i, out: found.append(out.clone()))
        with steering.rows(torch.ones_like(IDS), torch.tensor([4])):
            model(IDS)
    expected = torch.where(torch.tensor([[1.0], [1], [1], [1], [0], [0]]).bool(), 8.0, 2 * before[0][0, :, [1, 5]])
    expected[3] += 1
    assert torch.allclose(found[0][0, :, [1, 5]], expected)


def test_a_batch_that_is_not_the_declared_one_is_refused() -> None:
    model = tiny_model("llama")
    with steer(model, SET, "fra", op="set", value=4.0) as steering:
        with steering.rows(torch.ones(2, 6)), pytest.raises(InterventionError, match="declared as 2 by 6"):
            model(IDS.repeat(3, 1))
        with steering.rows(torch.ones(1, 9)), pytest.raises(InterventionError, match="declared as 1 by 9"):
            model(IDS)


def test_positions_and_sequences_need_to_know_the_padding() -> None:
    model = tiny_model("llama")
    four = torch.zeros(1, 1, 6, 6)
    for arguments in ({"positions": "last"}, {"value": "live_max", "scope": "sequence"}):
        with (
            steer(model, SET, "fra", **({"op": "set", "value": 4.0} | arguments)),
            pytest.raises(InterventionError, match=r"real tokens cannot be told from padding"),
        ):
            model(IDS, attention_mask=four)
    with steer(model, SET, "fra", op="set", value=4.0):
        model(IDS, attention_mask=four)  # every position alike: no need to know


def test_a_prompt_that_was_read_before_is_not_guessed() -> None:
    model = tiny_model("llama")
    past = model(IDS, use_cache=True).past_key_values
    with (
        steer(model, SET, "fra", op="set", value=4.0, positions="generated"),
        pytest.raises(InterventionError, match="whose prompt is not known"),
    ):
        model(IDS[:, :1], past_key_values=past)


# --- generation from Python

PROMPTS = torch.tensor([[1, 1, 0, 5, 6, 7, 8, 5, 6, 7], [0, 9, 8, 5, 6, 7, 8, 5, 6, 7]])
MASK = (PROMPTS != 1).long()
FORMS = ("prompt", "generated", "last", "prompt[-3:]", "-2:", "generated[:2]", "2:11")
METHODS: dict[str, dict[str, Any]] = {
    "chunked prefill": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},
    "an assistant": {"assistant_model": True},
}


def by_hand(model: torch.nn.Module, ids: torch.Tensor, form: str, new: int) -> list[int]:
    """Greedy tokens by one whole forward pass for each, with the prompt's length given."""
    for _ in range(new):
        steering = steer(model, SET, "fra", op="add", value=6.0, positions=form)
        rows = steering.rows(torch.ones_like(ids), torch.tensor([PROMPTS.shape[1]]))
        with steering, rows, torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, PROMPTS.shape[1] :].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_generation_uses_the_true_length_of_the_prompt_whatever_it_reads_at_once(method: str, form: str) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    options = dict(METHODS[method])
    if "assistant_model" in options:
        options["assistant_model"] = tiny_model("llama")
    row = PROMPTS[1:]
    expected = by_hand(model, row, form, 8)
    with steer(model, SET, "fra", op="add", value=6.0, positions=form):
        # A static cache makes a mask of four dimensions, which needs that of the call (else an error).
        for given in ({"attention_mask": torch.ones_like(row)}, {})[: 1 if method == "static cache" else 2]:
            found = model.generate(row, do_sample=False, max_new_tokens=8, pad_token_id=1, **given, **options)
            assert found[0, row.shape[1] :].tolist() == expected


@pytest.mark.parametrize("form", FORMS)
def test_a_padded_prompt_in_chunks_is_that_prompt(form: str) -> None:
    model = tiny_model("llama")
    with steer(model, SET, "fra", op="add", value=6.0, positions=form):
        rows = [
            model.generate(PROMPTS, attention_mask=MASK, do_sample=False, max_new_tokens=6, pad_token_id=1, **options)
            for options in ({}, {"prefill_chunk_size": 3}, {"use_cache": False})
        ]
        beams = model.generate(PROMPTS, attention_mask=MASK, num_beams=2, max_new_tokens=2, pad_token_id=1)
    assert rows[0].tolist() == rows[1].tolist() == rows[2].tolist()
    assert beams.shape == (2, PROMPTS.shape[1] + 2)


def test_a_prompt_that_goes_on_from_a_cache_needs_its_mask() -> None:
    model = tiny_model("llama")
    row = PROMPTS[1:]
    with steer(model, SET, "fra", op="add", value=6.0, positions="last"):
        with torch.no_grad():
            past = model(row[:, :6], use_cache=True).past_key_values
        with pytest.raises(InterventionError, match="attention_mask"):
            model.generate(row[:, 6:7], past_key_values=past, max_new_tokens=2)


def test_a_loop_from_python_gives_the_prompt_or_is_refused() -> None:
    model = tiny_model("llama")
    row = PROMPTS[1:]
    with steer(model, SET, "fra", op="add", value=6.0, positions="last") as steering, torch.no_grad():
        first = model(row[:, :6], use_cache=True)  # may be all of a prompt, or a chunk of it
        with pytest.raises(InterventionError, match=r"Steering.rows\(\)"):
            model(row[:, 6:], past_key_values=first.past_key_values)
        with steering.rows(torch.ones(1, 6), torch.tensor([row.shape[1]])):
            chunk = model(row[:, :6], use_cache=True)
            logits = model(row[:, 6:], past_key_values=chunk.past_key_values).logits
        whole = model(row).logits[:, 6:]
    assert torch.allclose(logits, whole, rtol=1e-5, atol=1e-5)


def test_generate_is_restored_after_any_order_of_detaching() -> None:
    model = tiny_model("llama")
    one = steer(model, SET, "fra", op="add", value=6.0, positions="last", layers="0").attach()
    other = steer(model, SET, "fra", op="add", value=6.0, positions="last", layers="2").attach()
    assert "generate" in vars(model)
    one.detach()
    assert "generate" in vars(model)
    other.detach()
    assert "generate" not in vars(model)


# --- live statistics ----------------------------------------------------------------------------------------------

NUMPY = {
    "max": np.max,
    "min": np.min,
    "mean": np.mean,
    "std": lambda x: np.std(x, ddof=1),
    "median": lambda x: np.sort(x)[(len(x) - 1) // 2],
    "iqr": lambda x: np.percentile(x, 75) - np.percentile(x, 25),
    "p07": lambda x: np.percentile(x, 7),
    "p50": lambda x: np.percentile(x, 50),
    "p99": lambda x: np.percentile(x, 99),
}


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**31), st.sampled_from(sorted(NUMPY)))
def test_statistics_equal_numpy_over_valid_tokens(length: int, width: int, seed: int, name: str) -> None:
    generator = np.random.default_rng(seed)
    units = torch.from_numpy(generator.normal(size=(3, length, width)))
    real = torch.from_numpy(generator.random((3, length)) < 0.7)
    real[:, -1] = True
    whole, each = statistic(name, units, real, True), statistic(name, units, real, False)
    for row in range(3):
        valid = units[row][real[row]].numpy().ravel()
        assert float(whole[row]) == pytest.approx(NUMPY[name](valid), abs=1e-9)
        for position in range(length):
            assert float(each[row, position]) == pytest.approx(NUMPY[name](units[row, position].numpy()), abs=1e-9)


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**31))
def test_mad_is_taken_over_the_chosen_units(length: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    units = torch.from_numpy(generator.normal(size=(2, length, width)))
    chosen = torch.from_numpy(np.sort(generator.choice(width, size=generator.integers(1, width + 1), replace=False)))
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, 0] = length == 1
    found = statistic("mad", units, real, True, chosen)
    for row in range(2):
        valid = units[row][real[row]].numpy()
        lower = NUMPY["median"]
        expected = lower(np.abs(valid[:, chosen.numpy()] - lower(valid.ravel())).ravel())
        assert float(found[row]) == pytest.approx(expected, abs=1e-9)


def test_a_sequence_beyond_the_limit_of_torch_quantile_is_no_problem() -> None:
    units = torch.arange(2**24 + 2, dtype=torch.float32).reshape(1, 2, -1)
    with pytest.raises(RuntimeError, match="too large"):
        units.flatten().quantile(0.5)
    assert float(statistic("p50", units, None, True)) == pytest.approx(2**23, rel=1e-6)
