"""Kinds of models and of runs: compiled, quantised, sharded, changed while attached, with hooks of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from lm_eval_steering import steer
from lm_eval_steering.architectures import sites_of
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.steering.attach import LargestChange, Steering
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import from_arguments
from tests.conftest import make_set, tiny_model

IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14]])
SET = make_set({"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5), (1, 7)]})
KINDS: list[dict[str, Any]] = [
    {"language": "fra", "op": "add", "value": 3.0, "factor": 2.0},
    {"language": "fra", "op": "set", "value": "live_max", "site": "product"},
    {"language": "fra", "preset": "+mad", "positions": "1:"},
    {"deactivate": "fra+deu", "deactivate_to": "noise"},
]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


def test_a_compiled_model_is_steered_as_the_eager_one() -> None:
    """Compiled before the hooks came, and used after they went: torch.compile alone would notice neither."""
    model = tiny_model("llama")
    plain = logits(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), plain, atol=1e-6)
    steering = steer(model, SET, **KINDS[2])
    with steering:
        for arguments in (KINDS[2], KINDS[1]):
            steering.change(compile_intervention(from_arguments(arguments), SET))
            eager, found = logits(model), logits(compiled)
            assert torch.allclose(found, eager, rtol=1e-5, atol=1e-5) and not torch.allclose(found, plain, atol=1e-3)
            assert steering.evidence().forwards == 2
    assert torch.allclose(logits(compiled), plain, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("arguments", KINDS, ids=str)
def test_values_are_computed_wide_and_rounded_once(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """In the layer that is edited first: half precision gives the float32 result of the same units, rounded."""
    model = tiny_model("llama").to(dtype)
    site = sites_of(model).layers[0]
    seen: list[torch.Tensor] = []

    def watch() -> Any:
        if arguments.get("site") == "product":
            return site.down.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        return site.activation.register_forward_hook(lambda _m, _i, out: seen.append(out))

    watch()
    with steer(model, SET, **arguments) as steering:
        watch()
        assert logits(model).dtype == dtype
        before, after = seen
        wide = before if dtype == torch.float64 else before.float()
        edit = next(iter(steering._edits.values()))
        steering._before_forward(model, (IDS,), {})
        assert torch.equal(edit(wide, steering._rows, LargestChange()).to(dtype), after)


@pytest.mark.parametrize(
    "arguments",
    [
        {"language": "fra", "op": "scale", "factor": 1},
        {"language": "fra", "op": "add", "value": "live_std", "factor": 0},
        {"language": "fra", "op": "add", "value": "normal", "factor": 0},
        {"language": "fra", "op": "add", "value": 0, "positions": "prompt"},
        {"language": "tur", "op": "set", "value": 9, "allow_empty": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identities_are_bit_equal(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    plain = logits(model)
    neurons = make_set({"fra_Latn": [(0, 1), (0, 5)], "tur_Latn": []})
    with steer(model, neurons, **arguments) as steering:
        assert torch.equal(logits(model), plain)
        assert steering.evidence().largest_change == 0


def test_a_changed_plan_equals_a_new_one_and_keeps_the_order_of_hooks() -> None:
    model, calls = tiny_model("llama"), []
    sites = sites_of(model)
    plans = [compile_intervention(from_arguments(arguments), SET) for arguments in KINDS]
    expected = []
    for plan in plans:
        with Steering(sites, plan):
            expected.append(logits(model))
    steering = Steering(sites, plans[0]).attach()
    foreign = sites.layers[0].activation.register_forward_hook(lambda *_: calls.append(1))
    for plan, found in zip([*plans, *plans[::-1]], [*expected, *expected[::-1]], strict=True):
        steering.change(plan)
        assert torch.equal(logits(model), found)
        assert steering.evidence().forwards == 1
    steering.detach()
    foreign.remove()
    assert len(calls) == 8
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_gradients_of_the_model_are_unchanged() -> None:
    model = tiny_model("llama")
    with steer(model, SET, "fra", op="add", value="live_mean"):
        out = model(IDS).logits
    assert out.requires_grad and torch.is_grad_enabled()
    out.sum().backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None


def test_units_that_are_split_over_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class DTensor(torch.nn.Parameter):
        pass

    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp.down_proj
    mlp.weight = DTensor(mlp.weight.detach())
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is split over devices"):
        steer(model, SET, "fra", op="add")


def test_tensors_follow_the_device_of_their_layer() -> None:
    """As with device_map: the mask is where the tokens are, each layer's tensors where the layer is."""
    model = tiny_model("llama")
    plan = compile_intervention(from_arguments(KINDS[2]), SET)
    steering = Steering(sites_of(model), plan)
    edit = next(iter(steering._edits.values()))
    with steering:
        steering._before_forward(model, (IDS,), {})
        rows = steering._rows
    assert rows is not None
    on_meta = edit(torch.empty(2, 6, 24, device="meta"), rows, LargestChange())
    assert on_meta.device.type == "meta" and on_meta.shape == (2, 6, 24)
    assert {device.type for device in edit._index} == {"meta"}


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_an_adapter_that_adds_positions_is_refused(kind: Any) -> None:
    adapted = get_peft_model(tiny_model("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ArchitectureError, match="adds positions of its own to every request"):
        steer(adapted, SET, "fra", op="add")
