"""What needs no engine: the module's arithmetic, the table of modules, arguments; some of it needs no vLLM either."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lm_eval_steering.errors import ArchitectureError, DidNotHappenError, InterventionError, SteeringError
from lm_eval_steering.neurons.neuron_set import NeuronSet, Provenance
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.activation import LAYOUT, SiteEdit, SteeredActivation
from lm_eval_steering.vllm.arguments import capacity_of, for_vllm, with_worker
from lm_eval_steering.vllm.engine import SteeredEngine
from lm_eval_steering.vllm.layers import refuse_unknown

WIDTH = 32  # whole vectors, in which torch computes an activation function to the same bit wherever a unit stands


class SiluAndMul(nn.Module):
    """vLLM's, without vLLM."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        half = inputs.shape[-1] // 2
        return functional.silu(inputs[..., :half]) * inputs[..., half:]


def steered(gated: bool = True, tokens: int = 5, capacity: int = WIDTH) -> SteeredActivation:
    real = torch.full((1,), tokens, dtype=torch.int64)
    original = SiluAndMul() if gated else nn.ReLU()
    return SteeredActivation(original, WIDTH, capacity, functional.silu if gated else None, real)


def edit(site: int, units: list[int], scale: float, shift: float, written: bool) -> SiteEdit:
    count = len(units)
    numbers = torch.full((count,), scale), torch.full((count,), shift), torch.full((count,), written)
    return SiteEdit(site, torch.tensor(units), *numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_mlp_is_edited_at_both_sites(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 2 * WIDTH, dtype=dtype)
    gate, up = functional.silu(inputs[:, :WIDTH]), inputs[:, WIDTH:]
    module = steered()
    module.write([edit(0, [1, 2], 3.0, 0.5, False), edit(1, [2, 4], -1.0, 0.25, False)])
    expected = (gate * up).clone()
    edited = (gate.float() * 3 + 0.5).to(dtype) * up
    expected[:, 1], expected[:, 2] = edited[:, 1], edited[:, 2]
    expected[:, [2, 4]] = (expected[:, [2, 4]].float() * -1 + 0.25).to(dtype)
    found = module(inputs)
    assert torch.equal(found, expected)
    untouched = [0, 3, *range(5, WIDTH)]
    assert torch.equal(found[:, untouched], module.original(inputs)[:, untouched])
    assert int(module.tokens) == 5 and module.touched() == 4
    changes = (edited.float() - (gate * up).float())[:, [1, 2]]
    assert float(module.largest) > 0 and torch.isfinite(changes).all()


def test_a_plain_mlp_is_edited_at_both_sites() -> None:
    inputs = torch.arange(2.0 * WIDTH).reshape(2, WIDTH) - 4
    module = steered(gated=False, tokens=2)
    module.write([edit(0, [1, 7], 2.0, 1.0, False), edit(1, [7], 0.0, 9.0, True)])
    expected = inputs.relu()
    expected[:, 1] = expected[:, 1] * 2 + 1
    expected[:, 7] = 9
    assert torch.equal(module(inputs), expected)


def test_an_identity_is_touched_and_the_modules_own_output() -> None:
    inputs = torch.randn(5, 2 * WIDTH)
    module = steered()
    module.write([edit(0, [0, 3], 1.0, 0.0, False)])
    assert torch.equal(module(inputs), module.original(inputs))
    assert (module.touched(), int(module.tokens), float(module.largest)) == (2, 5, 0.0)


def test_set_is_written_where_the_activation_is_infinite() -> None:
    inputs = torch.zeros(1, 2 * WIDTH)
    inputs[0, 1], inputs[0, WIDTH:] = torch.inf, 1.0
    module = steered(tokens=1)
    module.write([edit(0, [1], 0.0, 2.0, True)])
    assert module(inputs)[0, 1] == 2
    assert float(module.largest) == 0.0, "what was infinite before is no change of ours"


def test_an_overflow_shows_in_the_largest_change() -> None:
    module = steered(tokens=1)
    module.write([edit(1, [0], 1e5, 0.0, False)])
    assert torch.isinf(module(torch.full((1, 2 * WIDTH), 100.0, dtype=torch.float16))).any()
    assert float(module.largest) == torch.inf


def test_padding_and_warm_up_count_for_nothing() -> None:
    module = steered(tokens=2)
    module.write([edit(1, [0], 1.0, 1.0, False)])
    inputs = torch.zeros(5, 2 * WIDTH)
    inputs[2:] = torch.nan  # rows that pad a captured graph hold anything
    module(inputs)
    assert (int(module.tokens), float(module.largest)) == (2, 1.0)
    module.real.zero_()
    module(torch.full((5, 2 * WIDTH), 7.0))
    assert (int(module.tokens), float(module.largest)) == (2, 1.0)


def test_numbers_are_written_into_the_same_memory() -> None:
    module = steered()
    before = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}
    module.write([edit(0, [1], 2.0, 0.0, False)])
    module.write([edit(1, [2, 5], 3.0, 1.0, True)])
    assert {name: buffer.data_ptr() for name, buffer in module.named_buffers()} == before
    assert module.touched() == 2 and int(module.active) == 1


def test_a_module_with_little_room_edits_what_one_with_much_does() -> None:
    inputs = torch.randn(5, 2 * WIDTH)
    edits = [edit(0, [0, 3], 2.0, 1.0, False), edit(1, [3, 7], -1.0, 0.5, False)]
    little, much = steered(capacity=3), steered()
    for module in (little, much):
        module.write(edits)
    assert torch.equal(little(inputs), much(inputs))
    with pytest.raises(InterventionError, match="4 units are to be edited, there is room for 3"):
        little.write([*edits, edit(0, [5], 2.0, 0.0, False)])
    assert torch.equal(little(inputs), much(inputs)), "what was on stays on"
    little.write([])
    assert torch.equal(little(inputs), little.original(inputs))
    assert (little.touched(), int(little.active)) == (0, 0)


def test_room_is_what_the_neuron_set_needs_rounded_up() -> None:
    neurons = made_up_set_of(layers=3, units=4000, pairs={"fra_Latn": [(0, u) for u in range(70)] + [(2, 5)]})
    assert capacity_of(None, neurons, 4000) == 128
    assert capacity_of(None, None, 4000) == 512
    assert capacity_of(None, None, 48) == 48
    assert capacity_of(300, neurons, 4000) == 300
    for wrong in (0, 4001, True, "many"):
        with pytest.raises(SteeringError, match=f"steered_units={wrong!r}: expected a number of units per layer, 1 to"):
            capacity_of(wrong, None, 4000)


def made_up_set_of(layers: int, units: int, pairs: dict[str, list[tuple[int, int]]]) -> NeuronSet:
    rows = {code: np.array(own, dtype=np.int64) for code, own in pairs.items()}
    return NeuronSet(tuple(rows), rows, Provenance("made-up", "", "llama", layers, units), None)


def test_the_layout_and_the_room_are_in_the_key_of_the_cache() -> None:
    arguments = with_worker({"additional_config": {"mine": 1}, "dtype": "float32", "steered_units": 64}, "worker", 64)
    assert arguments["additional_config"] == {
        "mine": 1,
        "lm_eval_steering_layout": LAYOUT,
        "lm_eval_steering_units": 64,
    }
    assert "steered_units" not in arguments


def test_compiled_and_with_two_leading_dimensions() -> None:
    module = steered(tokens=3)
    module.write([edit(0, [1, 2], 3.0, 0.5, False)])
    inputs = torch.randn(1, 3, 2 * WIDTH)  # what vLLM's modules of transformers give
    expected = module(inputs)
    found = torch.compile(module, backend="eager", fullgraph=True)(inputs)
    assert torch.equal(found, expected)
    assert int(module.tokens) == 6


def test_a_quantised_output_is_refused_by_name() -> None:
    class QuantisedSilu(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.to(torch.int8)

    module = SteeredActivation(QuantisedSilu(), WIDTH, WIDTH, None, torch.ones(1, dtype=torch.int64))
    with pytest.raises(ArchitectureError, match=r"QuantisedSilu gave .* torch.int8"):
        module(torch.zeros(1, WIDTH))


def test_generation_arguments() -> None:
    known = {"min_tokens", "temperature", "repetition_penalty"}
    given = {"until": ["x"], "do_sample": False, "min_new_tokens": 3, "num_beams": 1, "no_repeat_ngram_size": 0}
    assert for_vllm(given, known) == {"until": ["x"], "do_sample": False, "min_tokens": 3}
    with pytest.raises(SteeringError, match="no_repeat_ngram_size=2: vLLM has no such thing"):
        for_vllm({"no_repeat_ngram_size": 2}, known)


def test_a_family_outside_the_table_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"'gptj': steered-vllm knows bloom, cohere.*use --model steered-hf"):
        refuse_unknown("gptj")


def test_without_vllm_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SteeringError, match=r"steered-vllm needs vLLM .*pip install 'lm-eval-steering\[vllm\]'"):
        compat.release()


def test_releases_outside_the_range_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setattr(compat, "version", lambda _: "0.11.2")
    with pytest.raises(SteeringError, match=r"vLLM 0.11.2 is older than 0.32.0"):
        compat.release()
    assert compat.tested("0.32.4") and compat.tested("0.32.0+cpu") and not compat.tested("0.33.0")
    compat.warn_if_untested("0.32.1")
    assert caplog.text == ""
    compat.warn_if_untested("0.33.0")
    assert "vLLM 0.33.0 is outside the range" in caplog.text


# --- the driver's checks, on workers that are made up ------------------------------------------------------------


class Workers:
    """An `LLM` whose workers say what they are told to."""

    def __init__(self, *layouts: dict[str, Any]) -> None:
        self.layouts, self.tokens, self.ended = layouts, 0, False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.end))

    def end(self) -> None:
        self.ended = True

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if name == "steering_layout":
            return list(self.layouts)
        if name == "steering_write":
            edits = args[0]
            return [sum(len(np.frombuffer(edit["units"], np.int64)) for edit in edits), *[0] * (len(self.layouts) - 1)]
        touched = {"0": 1}
        return [
            {"rank": rank, "forwards": 1, "touched": touched, "tokens": {"0": self.tokens}, "largest": 0.5}
            for rank in range(len(self.layouts))
        ]

    def reset_prefix_cache(self) -> bool:
        return True


def layout(rank: int, first: int, width: int, **changed: Any) -> dict[str, Any]:
    own = {"rank": rank, "tensor_rank": rank, "tensor_size": 2, "pipeline_rank": 0, "pipeline_size": 1}
    return {**own, "layout": LAYOUT, "capacity": 8, "layers": {"0": [first, width, 8]}, "problem": "", **changed}


SHAPE = SimpleNamespace(layers=1, units=8)


def test_workers_must_hold_each_unit_once() -> None:
    SteeredEngine(Workers(layout(0, 0, 4), layout(1, 4, 4)), SHAPE)
    SteeredEngine(Workers(layout(0, 0, 8), layout(1, 0, 8)), SHAPE)
    for wrong in ([layout(0, 0, 4)], [layout(0, 0, 4), layout(1, 2, 4)], [layout(0, 0, 8, layers={})]):
        workers = Workers(*wrong)
        with pytest.raises(DidNotHappenError, match="layer 0: the workers hold the units"):
            SteeredEngine(workers, SHAPE)
        assert workers.ended, "the engine does not stay behind"


def test_what_a_worker_did_not_find_is_the_users_line() -> None:
    workers = Workers(layout(0, 0, 8, problem="layer 0 (X): mlp.act_fn is a Y"))
    with pytest.raises(ArchitectureError, match=r"^layer 0 \(X\): mlp.act_fn is a Y$"):
        SteeredEngine(workers, SHAPE)


def test_a_layer_that_edited_less_than_was_asked_is_an_error() -> None:
    workers = Workers(layout(0, 0, 8))
    engine = SteeredEngine(workers, SHAPE)
    engine.plan = SimpleNamespace(edits=(1,), neurons=1)  # type: ignore[assignment]
    output = SimpleNamespace(
        prompt_token_ids=[1] * 10, num_cached_tokens=4, outputs=[SimpleNamespace(token_ids=[1, 2, 3])]
    )
    workers.tokens += 8
    engine.prove([output])
    assert engine.evidence().positions == engine.evidence().asked == 8
    workers.tokens += 7
    with pytest.raises(DidNotHappenError, match="layer 0 of worker 0 edited 7 tokens where the requests needed 8"):
        engine.prove([output])
