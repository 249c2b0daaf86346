"""The numbers of a row depend on the row and the intervention alone, in every architecture."""

from __future__ import annotations

import math
import statistics
from inspect import signature
from typing import Any

import pytest
import torch

from lm_eval_steering import steer
from lm_eval_steering.architectures import sites_of
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import from_arguments
from lm_eval_steering.steering.live import normal
from tests.conftest import UNITS, hidden_size, make_set, tiny_model, with_hidden_states

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "cohere", "gpt2", "gpt_neox",
    "bloom", "opt", "falcon",
)  # fmt: skip
ROW = torch.tensor([[0, 5, 6, 7, 8, 9]])
LONGER = torch.tensor([[0, 10, 11, 12, 13, 14, 15, 16, 17]])
PROMPT = 4  # tokens of ROW that are prompt; LONGER has two more
FRENCH = {"language": "fra_Latn"}
# One of a kind: static, live at each position, random, and every form of positions.
TOKEN: list[dict[str, Any]] = [
    FRENCH | {"op": "add", "value": 3.0, "factor": 2.0},
    FRENCH | {"op": "add", "value": "live_max", "factor": -1.5, "site": "product"},
    FRENCH | {"op": "set", "value": "live_p90", "deactivate": "deu", "deactivate_to": "live_mean"},
    FRENCH | {"op": "scale", "value": "live_std", "factor": 3.0},
    {"deactivate": "fra+deu", "deactivate_to": "noise", "seed": 7},
    FRENCH | {"op": "set", "value": 4.0, "positions": "prompt"},
    FRENCH | {"op": "set", "value": 4.0, "positions": "generated"},
    FRENCH | {"op": "set", "value": 4.0, "positions": "generated[:1]"},
    FRENCH | {"op": "add", "value": "live_max", "positions": "last"},
    FRENCH | {"op": "set", "value": 4.0, "positions": "1:"},
    FRENCH | {"op": "set", "value": 4.0, "positions": "prompt[-2:]"},
    FRENCH | {"op": "set", "value": 4.0, "positions": "-1:"},
    FRENCH | {"op": "add", "value": "diffmean", "factor": 2.0, "site": "residual", "layers": "0-2"},
    FRENCH | {"op": "add", "value": "live_max", "site": "residual", "layers": 1, "dimensions": 3, "positions": "1:"},
]
SEQUENCE: list[dict[str, Any]] = [
    FRENCH | {"preset": "=max"},
    FRENCH | {"preset": "=P10", "site": "product"},
    FRENCH | {"preset": "+mad"},
    FRENCH | {"op": "add", "value": "live_std", "factor": 2.0, "scope": "sequence", "positions": "prompt"},
]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def neuron_set(family: str, neuron_set: NeuronSet) -> NeuronSet:
    return with_hidden_states(neuron_set, hidden_size(family))


def batched(model: torch.nn.Module, rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Token ids padded to one length, with the mask, and the positions where the model takes them."""
    length = max(row.shape[1] for row in rows)
    ids, mask = torch.ones(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, row.shape[1]) if side == "right" else slice(length - row.shape[1], length)
        ids[number, place], mask[number, place] = row[0], 1
    inputs: dict[str, Any] = {"attention_mask": mask}
    # BLOOM places tokens by distance and takes no positions.
    if "position_ids" in signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, inputs


@torch.no_grad()
def in_batch(model: torch.nn.Module, steering: Any, rows: list[torch.Tensor], side: str) -> torch.Tensor:
    """(position, token) logits of the first row's real positions."""
    ids, inputs = batched(model, rows, side)
    prompts = torch.tensor([PROMPT if row is ROW else PROMPT + 2 for row in rows])
    with steering.rows(inputs["attention_mask"], prompts):
        logits = model(ids, **inputs).logits[0]
    return logits[inputs["attention_mask"][0].bool()]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_its_size_or_the_padding_side(family: str, neuron_set: NeuronSet) -> None:
    model = tiny_model(family)
    for arguments in [*TOKEN, *SEQUENCE]:
        with steer(model, neuron_set, **arguments) as steering:
            alone = in_batch(model, steering, [ROW], "right")
            for rows in ([ROW, LONGER], [ROW, LONGER, LONGER[:, :7], ROW]):
                for side in ("right", "left"):
                    assert close(in_batch(model, steering, rows, side), alone), (arguments, len(rows), side)


def test_prefill_and_decode_equal_one_forward(family: str, neuron_set: NeuronSet) -> None:
    model = tiny_model(family)
    for arguments in TOKEN:
        with steer(model, neuron_set, **arguments) as steering:
            whole = in_batch(model, steering, [ROW], "right")
            ids, inputs = batched(model, [ROW[:, :PROMPT], LONGER[:, : PROMPT + 2]], "left")
            rest = torch.cat([ROW[:, PROMPT:], LONGER[:, PROMPT + 2 : PROMPT + 4]])
            with steering.rows(inputs["attention_mask"]):
                found = [prefill := forward(model, ids, inputs, None)]
                for step in range(2):
                    mask = torch.cat([inputs["attention_mask"], torch.ones(2, step + 1, dtype=torch.long)], 1)
                    later = {"attention_mask": mask}
                    if "position_ids" in inputs:
                        later["position_ids"] = mask.cumsum(1)[:, -1:] - 1
                    found.append(forward(model, rest[:, step : step + 1], later, prefill.past_key_values))
        cached = torch.cat([output.logits[0] for output in found])[2:]  # two pads on the left
        assert close(cached, whole), arguments


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor, inputs: dict[str, Any], past: Any) -> Any:
    return model(ids, **inputs, past_key_values=past, use_cache=True)


def test_generating_equals_feeding_back_by_hand(family: str, neuron_set: NeuronSet) -> None:
    """The model's `generate`, of which the intervention sees the attention mask alone."""
    model = tiny_model(family)
    ids, inputs = batched(model, [ROW, LONGER], "left")
    for arguments in (TOKEN[2], TOKEN[5], TOKEN[6], TOKEN[7], TOKEN[-1]):
        with steer(model, neuron_set, **arguments) as steering, torch.no_grad():
            made = model.generate(ids, attention_mask=inputs["attention_mask"], max_new_tokens=3, do_sample=False)
            own = torch.cat([ROW, made[:1, ids.shape[1] :]], 1)
            with steering.rows(torch.ones_like(own), torch.tensor([ROW.shape[1]])):
                again = model(own).logits[0, ROW.shape[1] - 1 : -1].argmax(-1)
        ends = (again == model.generation_config.eos_token_id).nonzero()
        until = int(ends[0]) + 1 if len(ends) else len(again)
        assert torch.equal(made[0, ids.shape[1] :][:until], again[:until]), arguments


# --- the definition, in plain Python on captured tensors ----------------------------------------------------------


def quantile(values: list[float], share: float) -> float:
    ordered, place = sorted(values), share * (len(values) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def by_hand(name: str, values: list[float], chosen: list[float]) -> float:
    """A live statistic of one position or one row."""
    if name == "mad":
        centre = statistics.median_low(values)
        return statistics.median_low([abs(value - centre) for value in chosen])
    if name.startswith("p"):
        return quantile(values, int(name[1:]) / 100)
    return {
        "max": max,
        "min": min,
        "mean": statistics.fmean,
        "median": statistics.median_low,
        "std": statistics.stdev,
        "iqr": lambda values: quantile(values, 0.75) - quantile(values, 0.25),
    }[name](values)


def edited(
    step: Any, row: list[list[float]], owners: dict[int, list[float]], positions: list[int]
) -> list[list[float]]:
    """One row of one layer after one step: owners are unit -> values of the languages that it belongs to."""
    after = [list(values) for values in row]
    for position in positions:
        here = [row[position]] if step.scope == "token" else row
        for unit, values in owners.items():
            value = sum(values) / len(values)
            if isinstance(step.value, str) and step.value.startswith("live_"):
                flat = [number for each in here for number in each]
                own = [each[other] for each in here for other in owners]
                value = by_hand(step.value.removeprefix("live_"), flat, own)
            a, f = row[position][unit], step.factor
            after[position][unit] = {"scale": f * value * a, "add": a + f * value, "set": f * value}[step.op]
    return after


@pytest.mark.parametrize("site", ["activation", "product"])
def test_edited_activations_equal_a_computation_by_hand(family: str, neuron_set: NeuronSet, site: str) -> None:
    """Only chosen units, layers and positions change; the others are bit-identical. Two rows, one of them padded."""
    model = tiny_model(family)
    live = ["live_max", "live_min", "live_mean", "live_median", "live_std", "live_iqr", "live_mad", "live_p10"]
    cases: list[dict[str, Any]] = [
        {"op": "scale", "factor": -2.5},
        {"op": "add", "value": "mean", "factor": 1.5, "positions": "prompt"},
        {"op": "set", "value": "median", "layers": "0"},
        {"op": "set", "value": "live_max", "positions": "generated"},
        {"op": "scale", "value": "live_std", "factor": 2, "scope": "sequence", "positions": "last"},
        *(
            {"op": "add", "value": name, "factor": 2, "scope": scope}
            for name in live
            for scope in ("token", "sequence")
        ),
    ]
    for case in cases if family in {"llama", "opt"} else cases[:5]:
        step = from_arguments({"language": "fra+deu", "site": site} | case).steps[0]
        with steer(model, neuron_set, "fra+deu", site=site, **case) as steering:
            captured = capture(model, steering, site)
        for layer, (before, after) in enumerate(captured):
            owners = owned(neuron_set, step, layer)
            # The first row has three pads on the left; the longer one's prompt has two more tokens.
            for row, (start, count, prompt) in enumerate(((3, 6, PROMPT), (0, 9, PROMPT + 2))):
                where = {
                    "all": list(range(count)),
                    "prompt": list(range(prompt)),
                    "generated": list(range(prompt, count)),
                    "last": [prompt - 1],
                }[step.positions]
                real = before[row, start:].tolist()
                expected = torch.tensor(edited(step, real, owners, where if owners else []), dtype=torch.float64)
                found = after[row, start:].double()
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), (case, layer, row)
                keep = torch.ones(count, UNITS, dtype=torch.bool)
                if owners:
                    keep[torch.tensor(where).unsqueeze(1), torch.tensor(list(owners))] = False
                assert torch.equal(after[row, start:][keep], before[row, start:][keep]), (case, layer, row)
                assert torch.equal(after[row, :start], before[row, :start]), "a pad was edited"


def owned(neuron_set: NeuronSet, step: Any, layer: int) -> dict[int, list[float]]:
    """Unit -> calibrated or plain values of the languages that it belongs to, in one layer."""
    found: dict[int, list[float]] = {}
    if layer not in step.chosen_layers(3):
        return found
    for code in ("fra_Latn", "deu_Latn"):
        rows = neuron_set.neurons(code)
        named = isinstance(step.value, str) and not step.value.startswith("live_")
        assert neuron_set.calibrated is not None
        values = neuron_set.calibrated.lookup(rows, code, step.site, step.value) if named else [1.0] * len(rows)
        for (own, unit), value in zip(rows.tolist(), values, strict=True):
            if own == layer:
                found.setdefault(unit, []).append(float(value) if step.value is not None else 1.0)
    return found


@torch.no_grad()
def capture(model: torch.nn.Module, steering: Any, site: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(row, position, unit) of each layer as the intervention's hook gets it, and as the rest of the model does."""
    ids, inputs = batched(model, [ROW, LONGER], "left")
    steering.detach()
    before, after = watch(model, site), None
    steering.attach()
    after = watch(model, site)
    with steering.rows(inputs["attention_mask"], torch.tensor([PROMPT, PROMPT + 2])):
        model(ids, **inputs)
    for _, hooks in (before, after):
        for hook in hooks:
            hook.remove()
    shape = (*ids.shape, UNITS)
    return [(one.reshape(shape), two.reshape(shape)) for one, two in zip(before[0], after[0], strict=True)]


def watch(model: torch.nn.Module, site: str) -> tuple[list[torch.Tensor], list[Any]]:
    found: list[torch.Tensor] = []
    hooks = []
    for layer in sites_of(model).layers:
        if site == "activation":
            hooks.append(layer.activation.register_forward_hook(lambda _m, _i, out: found.append(out.clone())))
        else:
            hooks.append(layer.down.register_forward_pre_hook(lambda _m, given: found.append(given[0].clone())))
    return found, hooks


# --- random numbers -----------------------------------------------------------------------------------------------


def test_random_numbers_are_normal_and_depend_on_nothing_but_their_arguments() -> None:
    index = torch.arange(200).expand(4, 200)
    tokens = torch.arange(800).reshape(4, 200) % 97
    units = torch.arange(64)
    drawn = normal(3, (0, 0, 1), units, index, tokens)
    assert drawn.shape == (4, 200, 64) and torch.equal(drawn, normal(3, (0, 0, 1), units, index, tokens))
    assert abs(float(drawn.mean())) < 0.02 and float(drawn.std()) == pytest.approx(1, abs=0.02)
    assert float(drawn.pow(4).mean()) == pytest.approx(3, abs=0.2)  # the kurtosis of a normal distribution
    assert torch.equal(drawn[1:2, 50:60, 5:9], normal(3, (0, 0, 1), units[5:9], index[1:2, 50:60], tokens[1:2, 50:60]))
    changed = [(4, (0, 0, 1), (0, 0, 0)), (3, (1, 0, 1), (0, 0, 0)), (3, (0, 0, 2), (0, 0, 0))]
    changed += [(3, (0, 0, 1), shift) for shift in ((64, 0, 0), (0, 1, 0), (0, 0, 1))]
    for seed, stream, shift in changed:
        other = normal(seed, stream, units + shift[0], index + shift[1], tokens + shift[2])
        assert abs(float(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1])) < 0.02


def test_the_seed_decides_and_is_in_the_signature() -> None:
    neuron_set = make_set({"fra_Latn": [(0, 1), (2, 3)]})
    model = tiny_model("llama")
    found = []
    for seed in (1, 1, 2):
        with steer(model, neuron_set, deactivate="fra", deactivate_to="random", seed=seed), torch.no_grad():
            found.append(model(ROW).logits)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    plan = compile_intervention(from_arguments({"deactivate": "fra", "deactivate_to": "noise", "seed": 2}), neuron_set)
    assert "value:normal|factor:5|deactivate:fra_Latn" in plan.intervention.signature()
    assert "seed:2" in plan.intervention.signature()
