"""The algebra: composed maps against the definitions, applied one after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering.errors import InterventionError, NeuronSetError
from lm_eval_steering.steering.attach import AttachedEdit, LargestChange
from lm_eval_steering.steering.compiled import CompiledIntervention, compile_intervention
from lm_eval_steering.steering.intervention import Intervention, Step, build, from_arguments
from lm_eval_steering.steering.live import statistic
from lm_eval_steering.steering.positions import ForwardRows
from tests.conftest import make_set

SET = make_set(
    {"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5), (1, 7)], "eng_Latn": [(2, 20)], "tur_Latn": []}
)
numbers = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 3))
steps = st.builds(
    lambda op, languages, value, factor: Step(
        op=op, languages=tuple(languages), value=None if op == "scale" else value, factor=factor
    ),
    st.sampled_from(["scale", "add", "set"]),
    st.lists(st.sampled_from(["fra_Latn", "deu_Latn", "eng_Latn"]), min_size=1, max_size=3, unique=True),
    st.one_of(numbers, st.sampled_from(["mean", "median", "max", "diffmean"])),
    numbers,
)


def apply(plan: CompiledIntervention, activations: np.ndarray, site: str = "activation") -> np.ndarray:
    """The plan on (layer, unit) activations."""
    result = activations.copy()
    for edit in plan.edits:
        if edit.site == site:
            for each in edit.maps:
                before = result[edit.layer, edit.units]
                result[edit.layer, edit.units] = np.where(each.written, each.shift, before * each.scale + each.shift)
    return result


def one_step(step: Step, activations: np.ndarray) -> np.ndarray:
    """One step by its definition, a neuron at a time; a shared neuron uses the mean of its languages' values."""
    result = activations.copy()
    owners: dict[tuple[int, int], list[float]] = {}
    for code in step.languages:
        rows = SET.neurons(code)
        values = (
            SET.calibrated.lookup(rows, code, step.site, step.amount)
            if isinstance(step.amount, str)
            else np.full(len(rows), step.amount)
        )
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            owners.setdefault(tuple(row), []).append(value)
    for (layer, unit), values in owners.items():
        a, v = activations[layer, unit], sum(values) / len(values)
        result[layer, unit] = {"scale": step.factor * a, "add": a + step.factor * v, "set": step.factor * v}[step.op]
    return result


@given(st.lists(steps, max_size=4), st.integers(0, 1000))
def test_composition_equals_one_step_after_another(chosen: list[Step], seed: int) -> None:
    activations = np.random.default_rng(seed).normal(size=(3, 24))
    expected = activations
    for step in chosen:
        expected = one_step(step, expected)
    found = apply(compile_intervention(Intervention(steps=tuple(chosen)), SET), activations)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


live_steps = st.builds(
    lambda step, value, scope, positions: (
        Step(**step.model_dump() | {"value": value, "scope": scope, "positions": positions})
        if value
        else Step(**step.model_dump() | {"positions": positions})
    ),
    steps,
    st.none() | st.sampled_from(["live_max", "live_mean", "live_mad", "live_p25", "live_std"]),
    st.sampled_from(["token", "sequence"]),
    st.sampled_from(["all", "prompt", "generated", "last", "1:-1", "prompt[-2:]"]),
)
ROWS = ForwardRows(
    (2, 5),
    torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(),
    torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]),
    torch.tensor([[2], [4]]),
    torch.arange(10).reshape(2, 5),
)


def at_work(intervention: Intervention, units: torch.Tensor) -> torch.Tensor:
    """(layer, row, position, unit) of every layer at site activation, each edited by itself."""
    result = units.clone()
    for edit in compile_intervention(intervention, SET).edits:
        result[edit.layer] = AttachedEdit(edit, 24)(units[edit.layer], ROWS, LargestChange())
    return result


def step_at_work(step: Step, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """One step by its definition on what the steps before it left; statistics are of the tensor before all of them."""
    result = now.clone()
    mask = ROWS.mask(step.positions, torch.device("cpu"))
    assert mask is not None
    for layer in range(3):
        owners: dict[int, list[float]] = {}
        for code in step.languages:
            rows = SET.neurons(code)
            named = isinstance(step.value, str) and not step.value.startswith("live_")
            values = SET.calibrated.lookup(rows, code, step.site, step.value) if named else np.ones(len(rows))
            for (own, unit), value in zip(rows.tolist(), values.tolist(), strict=True):
                if own == layer:
                    owners.setdefault(unit, []).append(value)
        for unit, values in owners.items():
            value = torch.tensor(sum(values) / len(values))
            if isinstance(step.value, float):
                value = torch.tensor(step.value)
            elif isinstance(step.value, str) and step.value.startswith("live_"):
                chosen = torch.tensor(sorted(owners))
                name, sequence = step.value.removeprefix("live_"), step.scope == "sequence"
                value = statistic(name, before[layer], ROWS.real, sequence, chosen)[..., 0]
            a = now[layer, ..., unit]
            after = {
                "scale": step.factor * value * a,
                "add": a + step.factor * value,
                "set": step.factor * value + 0 * a,
            }
            result[layer, ..., unit] = torch.where(mask, after[step.op], a)
    return result


@given(st.lists(live_steps, max_size=4), st.integers(0, 1000))
def test_live_steps_at_any_positions_compose_one_after_another(chosen: list[Step], seed: int) -> None:
    before = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 2, 5, 24)))
    expected = before
    for step in chosen:
        expected = step_at_work(step, before, expected)
    assert torch.allclose(at_work(Intervention(steps=tuple(chosen)), before), expected, rtol=1e-4, atol=1e-4)


@given(live_steps, st.integers(0, 1000))
def test_the_order_of_languages_does_not_matter_to_live_steps(step: Step, seed: int) -> None:
    units = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 2, 5, 24)))
    turned = step.model_copy(update={"languages": step.languages[::-1]})
    first, second = (at_work(Intervention(steps=(each,)), units) for each in (step, turned))
    assert torch.allclose(first, second, rtol=1e-6, atol=1e-6)


@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_activations_scaled_and_scaled_back_are_restored(factor: float, seed: int) -> None:
    units = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 2, 5, 24))).float()
    there, back = (from_arguments({"language": "fra", "op": "scale", "factor": f}) for f in (factor, 1 / factor))
    assert torch.allclose(at_work(back, at_work(there, units)), units, rtol=1e-6)


@given(steps)
def test_the_order_of_languages_in_a_step_does_not_matter(step: Step) -> None:
    turned = step.model_copy(update={"languages": step.languages[::-1]})
    first, second = (compile_intervention(Intervention(steps=(s,)), SET) for s in (step, turned))
    for one, other in zip(first.edits, second.edits, strict=True):
        for first_map, second_map in zip(one.maps, other.maps, strict=True):
            assert np.array_equal(first_map.scale, second_map.scale)
            assert np.allclose(first_map.shift, second_map.shift, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [{"op": "scale", "factor": 1}, {"op": "add", "value": "mean", "factor": 0}, {"op": "add", "value": 0}],
)
def test_identity_interventions_are_exact_identities(arguments: dict) -> None:
    plan = compile_intervention(from_arguments({"language": "fra_Latn", **arguments}), SET)
    for edit in plan.edits:
        (only,) = edit.maps
        assert (only.scale == 1).all() and (only.shift == 0).all() and not only.written.any()


@given(st.floats(0.01, 100))
def test_scaling_and_scaling_back_restores(factor: float) -> None:
    both = [{"op": "scale", "languages": ["fra_Latn"], "factor": f} for f in (factor, 1 / factor)]
    for edit in compile_intervention(build({"steps": both}), SET).edits:
        assert np.allclose(edit.maps[0].scale, 1, rtol=1e-6)


def test_a_shared_neuron_is_scaled_once() -> None:
    plan = compile_intervention(from_arguments({"language": "fra_Latn+deu_Latn", "op": "scale", "factor": 3}), SET)
    assert all((edit.maps[0].scale == 3).all() for edit in plan.edits)
    assert (plan.neurons, plan.shared) == (4, 1)


def test_deactivation_leaves_out_steered_neurons_unless_keep_shared_is_false() -> None:
    arguments = {"language": "fra_Latn", "op": "scale", "factor": 3, "deactivate": "deu_Latn"}
    kept, literal = from_arguments(arguments), from_arguments({**arguments, "keep_shared": False})
    activations = np.ones((3, 24))
    assert apply(compile_intervention(kept, SET), activations)[0, 5] == 3
    assert apply(compile_intervention(literal, SET), activations)[0, 5] == 0
    assert apply(compile_intervention(kept, SET), activations)[1, 7] == 0


def test_layers_and_sites_are_kept_apart() -> None:
    plan = compile_intervention(from_arguments({"language": "fra", "op": "add", "site": "product", "layers": "2"}), SET)
    assert [(edit.layer, edit.site, edit.units.tolist()) for edit in plan.edits] == [(2, "product", [3])]


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InterventionError, match="tur_Latn has no neurons in the neuron set; allow_empty=true"):
        compile_intervention(from_arguments({"language": "tur", "op": "scale"}), SET)
    assert compile_intervention(from_arguments({"language": "tur", "op": "scale"}), SET, allow_empty=True).neurons == 0
    with pytest.raises(InterventionError, match="fra_Latn has no neurons in layers 1"):
        compile_intervention(from_arguments({"language": "fra", "op": "scale", "layers": "1"}), SET)
    with pytest.raises(InterventionError, match="overflow float32"):
        compile_intervention(from_arguments({"language": "fra", "op": "add", "value": 1e30, "factor": 1e30}), SET)
    nothing = {"language": "fra+deu", "op": "scale", "deactivate": "deu"}
    with pytest.raises(InterventionError, match="deactivating deu_Latn would do nothing"):
        compile_intervention(from_arguments(nothing), SET)
    alone = make_set({"fra_Latn": [(0, 1)]})
    with pytest.raises(NeuronSetError, match="diffmean needs at least two languages"):
        compile_intervention(from_arguments({"language": "fra", "op": "add", "value": "diffmean"}), alone)
    bare = make_set({"fra_Latn": [(0, 1)]}, calibrated=False)
    with pytest.raises(InterventionError, match="value=mean: the neuron set holds no calibrated statistics"):
        compile_intervention(from_arguments({"language": "fra", "op": "add", "value": "mean"}), bare)
    with pytest.raises(NeuronSetError, match="statistic 'p75' at site 'activation' is not in the neuron set"):
        compile_intervention(from_arguments({"language": "fra", "op": "add", "value": "p75"}), SET)
