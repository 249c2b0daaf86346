"""Positions over real tokens, whatever the padding, and live statistics over valid ones."""

from __future__ import annotations

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
        pytest.raises(InterventionError, match="whose prompt was not seen"),
    ):
        model(IDS[:, :1], past_key_values=past)


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
