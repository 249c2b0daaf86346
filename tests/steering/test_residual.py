"""site=residual: the hidden states that a decoder layer returns, in every family of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lm_eval_steering import steer
from lm_eval_steering.architectures import sites_of
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import ArchitectureError, DidNotHappenError, InterventionError, NeuronSetError
from lm_eval_steering.neurons.calibrate import calibrate_hidden_states, calibrated
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.neurons.rows import TokenRows
from lm_eval_steering.neurons.running import ModelRunner
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import from_arguments, parse
from tests.conftest import LAYERS, hidden_size, make_set, tiny_model, tiny_tokenizer, with_hidden_states

IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14]])
RESIDUAL = {"language": "fra_Latn", "site": "residual", "layers": "1-2"}
ROWS = {
    "fra_Latn": [[5, 6, 7], [8, 9, 10, 11, 12, 13], [5, 5, 5, 5, 5], [9, 9, 3, 4, 4]],
    "deu_Latn": [[20, 21, 22, 20, 21], [22, 23, 24, 25, 26], [30] * 9],
    "eng_Latn": [[40, 41, 42, 43, 44, 45], [46, 47, 48, 49, 50]],
}


def a_set(family: str = "llama") -> NeuronSet:
    neurons = {"fra_Latn": [(0, 1), (2, 3)], "deu_Latn": [(0, 5), (1, 7)], "eng_Latn": [(2, 20)]}
    return with_hidden_states(make_set(neurons, family), hidden_size(family))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    return model(ids, **inputs).logits


def hooked(model: nn.Module, edits: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    """Logits with the hidden states of some layers edited by plain hooks."""

    def hook(edit: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return lambda _m, _i, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    handles = [sites_of(model).layers[layer].block.register_forward_hook(hook(edit)) for layer, edit in edits.items()]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def captured(model: nn.Module, row: list[int], bos: int = 0) -> np.ndarray:
    """(layer, position, dimension) float64 of one row after BOS, without padding or batching."""
    found: list[torch.Tensor] = []
    handles = [
        layer.block.register_forward_hook(
            lambda _m, _i, out: found.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for layer in sites_of(model).layers
    ]
    logits(model, torch.tensor([[bos, *row]]))
    for handle in handles:
        handle.remove()
    return torch.stack(found)[:, 1:].double().numpy()


def diffmean(neuron_set: NeuronSet, code: str = "fra_Latn") -> np.ndarray:
    means = neuron_set.residual["mean"].astype(np.float64)
    column = neuron_set.languages.index(code)
    others = [number for number in range(means.shape[2]) if number != column]
    return means[:, :, column] - means[:, :, others].mean(axis=2)


# --- what it does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [None, 3])
def test_each_operation_equals_plain_hooks(family: str, model: nn.Module, dimensions: int | None) -> None:
    neuron_set = a_set(family)
    vectors = torch.from_numpy(2.0 * diffmean(neuron_set)).float()
    chosen = [sorted(np.argsort(-np.abs(of_layer))[:dimensions].tolist()) for of_layer in diffmean(neuron_set)]

    def at(layer: int, edit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
        def edited(hidden: torch.Tensor) -> torch.Tensor:
            streams = hidden.dim() == 4  # of Gemma 3n: (stream, row, position, 16)
            flat = torch.cat(list(hidden), -1) if streams else hidden
            after = flat.clone()
            after[..., chosen[layer]] = edit(flat, vectors[layer].expand_as(flat))[..., chosen[layer]]
            return torch.stack(after.split(hidden.shape[-1], -1)) if streams else after

        return edited

    operations: list[tuple[dict[str, Any], Any]] = [
        ({"op": "add", "value": "diffmean", "factor": 2}, lambda hidden, vector: hidden + vector),
        ({"op": "set", "value": "diffmean", "factor": 2}, lambda _, vector: vector),
        ({"op": "scale", "factor": -0.5}, lambda hidden, _: -0.5 * hidden),
        ({"op": "add", "value": 0.5}, lambda hidden, _: hidden + 0.5),
    ]
    for arguments, edit in operations:
        with steer(model, neuron_set, **RESIDUAL, **arguments, dimensions=dimensions) as steering:
            found = logits(model)
            evidence = steering.evidence()
        expected = hooked(model, {1: at(1, edit), 2: at(2, edit)})
        assert torch.equal(found, expected), arguments
        assert (evidence.forwards, evidence.modules, evidence.fired, evidence.positions) == (1, 2, 2, IDS.numel())
        assert evidence.neurons == 2 * (dimensions or hidden_size(family))
        assert evidence.largest_change > 0
    assert not any(layer.block._forward_hooks for layer in sites_of(model).layers)


def test_identities_are_bit_equal_and_detaching_restores(family: str, model: nn.Module) -> None:
    plain, neuron_set = logits(model), a_set(family)
    for arguments in ({"op": "scale", "factor": 1}, {"op": "add", "value": "diffmean", "factor": 0}):
        for dimensions in (None, 2):
            with steer(model, neuron_set, **RESIDUAL, **arguments, dimensions=dimensions) as steering:
                assert torch.equal(logits(model), plain)
                assert steering.evidence().largest_change == 0
    assert torch.equal(logits(model), plain)


def test_all_sites_of_one_intervention_equal_hooks_in_the_order_of_a_forward_pass() -> None:
    """Written the other way round: what is done to hidden states has no order with what is done to units."""
    model: Any = tiny_model("llama")
    neuron_set = a_set()
    steps = [
        {"language": "fra", "op": "add", "value": 2.0, "site": "residual", "layers": 0},
        {"language": "fra", "op": "scale", "factor": 3.0, "site": "activation"},
        {"language": "deu", "op": "add", "value": "mean", "site": "product"},
    ]
    units = {code: neuron_set.neurons(code) for code in ("fra_Latn", "deu_Latn")}
    means = neuron_set.statistics("deu", "mean", "product")

    def scaled(layer: int) -> Any:
        def hook(_m: nn.Module, _i: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            for _, unit in units["fra_Latn"][units["fra_Latn"][:, 0] == layer]:
                out[..., unit] *= 3.0
            return out

        return hook

    def added(layer: int) -> Any:
        def hook(_m: nn.Module, inputs: Any) -> Any:
            product = inputs[0].clone()
            for (at, unit), mean in zip(units["deu_Latn"], means, strict=True):
                if at == layer:
                    product[..., unit] += float(mean)
            return (product,)

        return hook

    handles = []
    for number, layer in enumerate(model.model.layers):
        handles += [layer.mlp.act_fn.register_forward_hook(scaled(number))]
        handles += [layer.mlp.down_proj.register_forward_pre_hook(added(number))]
    expected = hooked(model, {0: lambda hidden: hidden + 2.0})
    for handle in handles:
        handle.remove()
    for order in (steps, steps[::-1]):
        with steer(model, neuron_set, intervention=order) as steering:
            assert torch.allclose(logits(model), expected, rtol=1e-6, atol=1e-6)
            assert steering.evidence().modules == 1 + 2 + 2


def test_live_and_random_values_and_positions_are_those_of_the_other_sites() -> None:
    model, neuron_set = tiny_model("llama"), a_set()
    one_layer = {**RESIDUAL, "layers": 1}
    with steer(model, neuron_set, **one_layer, op="add", value="live_max", factor=2):
        found = logits(model)
    assert torch.equal(found, hooked(model, {1: lambda hidden: hidden + 2 * hidden.amax(-1, keepdim=True)}))

    def first_two(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden[:, :2] + 1, hidden[:, 2:]], 1)

    with steer(model, neuron_set, **one_layer, op="add", value=1, positions=":2"):
        found = logits(model)
    assert torch.equal(found, hooked(model, {1: first_two}))
    with steer(model, neuron_set, **one_layer, op="add", value="normal", seed=1):
        one = logits(model)
        assert torch.equal(logits(model), one)
    with steer(model, neuron_set, **one_layer, op="add", value="normal", seed=2):
        assert not torch.equal(logits(model), one)


def test_pads_are_not_edited() -> None:
    model, neuron_set = tiny_model("llama"), a_set()
    ids, mask = torch.tensor([[1, 1, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1, 1]])
    seen: list[torch.Tensor] = []
    layer = sites_of(model).layers[1].block
    with steer(model, neuron_set, **{**RESIDUAL, "layers": 1}, op="set", value=7) as steering:
        handle = layer.register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
        logits(model, ids, attention_mask=mask)
        handle.remove()
        assert steering.evidence().positions == 3
    assert (seen[0][0, 2:] == 7).all() and (seen[0][0, :2] != 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    model, neuron_set = tiny_model("llama").to(dtype), a_set()
    wide = torch.promote_types(dtype, torch.float32)
    vectors = torch.from_numpy(0.7 * diffmean(neuron_set)).float()
    with steer(model, neuron_set, **RESIDUAL, op="add", value="diffmean", factor=0.7):
        found = logits(model)
    assert found.dtype == dtype
    edits = {n: lambda hidden, n=n: (hidden.to(wide) + vectors[n]).to(dtype) for n in (1, 2)}
    assert torch.equal(found, hooked(model, edits))


def test_hidden_states_that_a_model_returns_are_the_edited_ones_and_its_input_is_not_written_to() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        plain = model(IDS, output_hidden_states=True).hidden_states
        with steer(model, a_set(), **{**RESIDUAL, "layers": 0}, op="add", value=2):
            steered = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(steered[0], plain[0])
    assert torch.equal(steered[1], plain[1] + 2)


def test_a_model_that_writes_into_hidden_states_does_not_change_the_evidence() -> None:
    """Small edits wait to be measured; what the model does to the tensor meanwhile is not ours."""
    model = tiny_model("llama")
    with steer(model, a_set(), **{**RESIDUAL, "layers": 1}, op="add", value=2) as steering:
        handle = sites_of(model).layers[1].block.register_forward_hook(lambda _m, _i, out: out.mul_(100))
        logits(model)
        handle.remove()
        assert steering.evidence().largest_change == pytest.approx(2, rel=1e-6)


def test_a_layer_that_runs_twice_and_one_that_returns_something_else_are_errors() -> None:
    model: Any = tiny_model("llama")
    layer, real = model.model.layers[1], model.model.layers[1].forward
    with steer(model, a_set(), **RESIDUAL, op="add", value=2):
        layer.forward = lambda *inputs, **named: {"hidden": real(*inputs, **named)}
        with pytest.raises(ArchitectureError, match="a decoder layer returned dict, expected hidden states"):
            logits(model)
    layer.forward = real
    with steer(model, a_set(), **RESIDUAL, op="add", value=2):
        last = model.model.layers[2]
        once = last.forward
        last.forward = lambda hidden, **named: once(layer(hidden, **named), **named)
        with pytest.raises(DidNotHappenError, match="residual of layer 1 took place 2 times"):
            logits(model)


def test_statistics_of_another_width_are_refused() -> None:
    with (
        steer(tiny_model("llama"), with_hidden_states(a_set(), 8), **RESIDUAL, op="add", value=2) as steering,
        pytest.raises(InterventionError, match=r"layer 1 returns 16 dimensions, the neuron set has statistics of 8"),
    ):
        logits(steering._model)


# --- its values ---------------------------------------------------------------------------------------------------


def runner(model: nn.Module, batch_size: int = 2) -> ModelRunner:
    return ModelRunner(LazyModel.of(model, tiny_tokenizer()), batch_size)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_mean_and_spread_are_over_all_counted_tokens(batch_size: int) -> None:
    for family in ("llama", "gpt2", "bloom", "falcon_h1"):
        model = tiny_model(family)
        found = calibrate_hidden_states(
            runner(model, batch_size), {code: TokenRows.of(rows) for code, rows in ROWS.items()}
        )
        for code, rows in ROWS.items():
            tokens = np.concatenate([captured(model, row) for row in rows], axis=1)
            assert found[code]["mean"].dtype == np.float32
            assert np.allclose(found[code]["mean"], tokens.mean(axis=1), rtol=1e-5, atol=1e-6), family
            assert np.allclose(found[code]["std"], tokens.std(axis=1), rtol=1e-4, atol=1e-6), family


def test_clas_diffmean_equals_the_published_definition_on_the_same_hidden_states() -> None:
    """CLaS-Bench, identification/diffmean.py and 2-diffmean_generate.py, written anew.

    A language's vector in a layer is the mean, over its tokens, of the layer's residual stream; an edit adds
    strength * d / (|d| + 1e-8) to that stream at every token, with d = vector of the target - vector of the source.
    """
    model = tiny_model("llama")
    rows = {code: TokenRows.of(rows) for code, rows in ROWS.items()}
    (neuron_set,) = calibrated([a_set()], runner(model), rows, "text", residual=True)
    vectors = {
        code: np.concatenate([captured(model, row) for row in rows], axis=1).mean(axis=1) for code, rows in ROWS.items()
    }
    edits = {}
    for layer in (1, 2):
        apart = torch.from_numpy(vectors["fra_Latn"][layer] - vectors["eng_Latn"][layer]).float()
        unit = apart / (apart.norm(p=2) + 1e-8)
        edits[layer] = lambda hidden, unit=unit: hidden + 5.0 * unit
    arguments = {"language": "fra", "source": "eng", "preset": "clas_diffmean", "factor": 5, "layers": "1-2"}
    with steer(model, neuron_set, **arguments) as steering:
        found = logits(model)
        signature = steering.plan.intervention.signature()
    assert torch.allclose(found, hooked(model, edits), rtol=1e-5, atol=1e-5)
    assert signature == ("op:add|value:clas_diffmean|factor:5|lang:fra_Latn|source:eng_Latn|site:residual|layers:1-2")
    assert np.allclose(np.linalg.norm(neuron_set.hidden_states("fra", "clas_diffmean", "eng"), axis=1), 1)


def test_diffmean_is_what_it_is_at_the_other_sites() -> None:
    neuron_set = a_set()
    assert np.allclose(neuron_set.hidden_states("fr", "diffmean"), diffmean(neuron_set))
    assert np.array_equal(neuron_set.hidden_states("deu"), neuron_set.residual["mean"][:, :, 1])
    two = replace(
        neuron_set, languages=("fra_Latn",), calibrated=None,
        assignments={"fra_Latn": neuron_set.neurons("fra")},
        residual={"mean": neuron_set.residual["mean"][:, :, :1]},
    )  # fmt: skip
    with pytest.raises(NeuronSetError, match="diffmean needs at least two languages"):
        two.hidden_states("fra", "diffmean")


def test_the_top_dimensions_are_each_layers_and_ties_go_to_the_lower_number() -> None:
    means = np.zeros((LAYERS, 16, 2), dtype=np.float32)
    means[1, [3, 9], 0] = (-5, 4)
    means[2, :, 0] = 1
    neuron_set = replace(make_set({"fra_Latn": [(0, 1)], "deu_Latn": [(0, 2)]}), residual={"mean": means})
    arguments = {**RESIDUAL, "op": "add", "value": "diffmean", "dimensions": 2}
    plan = compile_intervention(from_arguments(arguments), neuron_set)
    assert [(edit.layer, edit.site, edit.units.tolist()) for edit in plan.edits] == [
        (1, "residual", [3, 9]), (2, "residual", [0, 1]),
    ]  # fmt: skip
    assert plan.edits[0].maps[0].shift.tolist() == [-5, 4]
    assert (plan.neurons, plan.shared, plan.edits[0].dimensions) == (4, 0, 16)


def test_languages_of_one_step_share_dimensions_as_they_share_neurons() -> None:
    neuron_set = a_set()
    plan = compile_intervention(
        from_arguments({**RESIDUAL, "language": "fra+deu", "op": "add", "value": "diffmean"}), neuron_set
    )
    both = (diffmean(neuron_set) + diffmean(neuron_set, "deu_Latn")) / 2
    assert np.allclose(plan.edits[0].maps[0].shift, both[1], rtol=1e-6)
    assert plan.shared == plan.neurons == 32
    few = compile_intervention(
        from_arguments({**RESIDUAL, "language": "fra+deu", "op": "add", "value": "diffmean", "dimensions": 4}),
        neuron_set,
    )
    assert few.neurons + few.shared == 2 * 2 * 4


def test_dimensions_of_a_later_step_are_not_taken_for_neurons_that_are_kept() -> None:
    """A deactivation leaves out neurons of later steps; dimensions 1 and 5 are none."""
    steps = [
        {"deactivate": "fra"},
        {"language": "fra", "op": "add", "value": "diffmean", "site": "residual", "layers": "0-2"},
    ]
    plan = compile_intervention(from_arguments({"intervention": steps}), a_set())
    assert [edit.units.tolist() for edit in plan.edits if edit.site == "activation"] == [[1], [3]]


# --- how it is written --------------------------------------------------------------------------------------------


def test_the_signature_names_source_and_dimensions_and_is_read_back() -> None:
    made = from_arguments({**RESIDUAL, "op": "add", "value": "diffmean", "dimensions": 400})
    assert made.signature() == ("op:add|value:diffmean|factor:1|lang:fra_Latn|site:residual|dims:400|layers:1-2")
    assert parse(made.signature()) == made
    clas = from_arguments({"language": "fr", "source": "en", "preset": "clas_diffmean", "layers": 14})
    assert parse(clas.signature()) == clas and clas.steps[0].source == "eng_Latn"


def test_what_is_hashed_of_other_interventions_is_what_it_was() -> None:
    step = from_arguments({"language": "fra", "op": "add", "value": "mean", "factor": 4}).model_dump(mode="json")
    assert step == {
        "steps": [
            {
                "op": "add", "languages": ["fra_Latn"], "value": "mean", "factor": 4.0, "site": "activation",
                "layers": None, "positions": "all", "scope": "token", "seed": 0, "deactivation": False,
                "keep_shared": True,
            }
        ]
    }  # fmt: skip
    residual = from_arguments({**RESIDUAL, "op": "add", "value": "diffmean", "dimensions": 3}).model_dump(mode="json")
    assert residual["steps"][0]["dimensions"] == 3 and "source" not in residual["steps"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "add", "layers": None}, "site=residual without layers=: .* such as layers=14"),
        ({"op": "add", "dimensions": 0}, "dimensions=0: expected a whole number from 1"),
        ({"op": "add", "dimensions": 17}, "dimensions=17: the hidden states have 16"),
        ({"op": "add", "dimensions": 3, "site": "product"}, "dimensions=3: only site=residual has dimensions"),
        ({"op": "add", "layers": "1-3"}, "1-3 is not a range within 0-2"),
        ({"op": "add", "value": "max"}, "statistic 'max' at site 'residual' is not in the neuron set; .*mean"),
        ({"deactivate": "deu", "op": "add"}, "deactivate= at site=residual: .*factor=-1"),
        ({"op": "add", "source": "eng"}, "source='eng': it applies to preset=clas_diffmean"),
        ({"preset": "clas_diffmean", "site": None}, "value=clas_diffmean without source="),
        ({"preset": "clas_diffmean", "source": "eng"}, "site= conflicts with preset=clas_diffmean"),
        ({"preset": "clas_diffmean", "site": None, "source": "eng+deu"}, "source='eng.deu': expected one language"),
        ({"preset": "clas_diffmean", "site": None, "source": "tur"}, "'tur_Latn' .* is not in the neuron set"),
        ({"preset": "clas_diffmean", "site": None, "source": "fra"}, "fra_Latn and fra_Latn are equal"),
        ({"op": "set", "value": "clas_diffmean", "source": "eng"}, "op=set conflicts with value=clas_diffmean"),
        (
            {"preset": "clas_diffmean", "site": None, "source": "eng", "dimensions": 3},
            "dimensions=3 conflicts with value=clas_diffmean",
        ),
        ({"op": "add", "value": "clas_diffmean", "site": "product", "source": "eng"}, "only site=residual has it"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {key: value for key, value in {**RESIDUAL, **arguments}.items() if value is not None}
    with pytest.raises((InterventionError, NeuronSetError, Exception), match=message) as error:
        compile_intervention(from_arguments(given), a_set())
    assert "\n" not in str(error.value)


def test_a_set_without_statistics_of_hidden_states_says_how_to_add_them() -> None:
    with pytest.raises(NeuronSetError, match=r"lm-eval-steering calibrate SET --residual"):
        compile_intervention(from_arguments({**RESIDUAL, "op": "add"}), make_set({"fra_Latn": [(0, 1)]}))
