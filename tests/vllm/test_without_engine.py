"""What needs no engine: the module's arithmetic, the table of modules, arguments; some of it needs no vLLM either."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lm_eval_steering.errors import ArchitectureError, DidNotHappenError, InterventionError, SteeringError
from lm_eval_steering.neurons.neuron_set import NeuronSet, Provenance
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import from_arguments
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.activation import LAYOUT, SiteEdit, SteeredActivation
from lm_eval_steering.vllm.arguments import capacity_of, edits_hidden_states, for_vllm, with_worker
from lm_eval_steering.vllm.engine import SteeredEngine
from lm_eval_steering.vllm.hidden_states import Returns, SteeredHiddenStates
from lm_eval_steering.vllm.layers import refuse_unknown, steer_what_it_returns

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
    arguments = with_worker(
        {"additional_config": {"mine": 1}, "dtype": "float32", "steered_units": 64}, "worker", 64, True
    )
    assert arguments["additional_config"] == {
        "mine": 1,
        "lm_eval_steering_layout": LAYOUT,
        "lm_eval_steering_units": 64,
        "lm_eval_steering_residual": True,
    }
    assert "steered_units" not in arguments
    assert with_worker({"steered_residual": True}, "worker", 64, True).keys() == {"worker_cls", "additional_config"}


def test_hidden_states_are_edited_unless_the_set_has_no_statistics_of_them() -> None:
    without = made_up_set_of(layers=3, units=40, pairs={"fra_Latn": [(0, 1)]})
    having = replace(without, residual={"mean": np.zeros((3, 8, 1), np.float32)})
    assert [edits_hidden_states(None, neurons) for neurons in (None, having, without)] == [True, True, False]
    assert edits_hidden_states(True, without) and not edits_hidden_states(False, having)
    with pytest.raises(SteeringError, match="steered_residual=1: expected True or False"):
        edits_hidden_states(1, None)


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


# --- what layers return ------------------------------------------------------------------------------------------

DIMENSIONS = 8


def hidden_states(returns: Returns, tokens: int = 3) -> SteeredHiddenStates:
    return SteeredHiddenStates(returns, DIMENSIONS, torch.full((1,), tokens, dtype=torch.int64))


def returned(returns: Returns, dtype: torch.dtype = torch.float32) -> Any:
    """What a layer may give: for the next one it is the sum of two parts, or the first."""
    torch.manual_seed(1)
    first, second = torch.randn(2, 3, DIMENSIONS, dtype=dtype)
    return first if returns is Returns.HIDDEN_STATES else (first, second)


def parts(output: Any) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def read(returns: Returns, output: Any) -> torch.Tensor:
    """Hidden states that the next layer reads."""
    if returns is Returns.PARTS:
        return output[0] + output[1]
    return parts(output)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("returns", Returns)
def test_the_next_layer_reads_exactly_the_edited_hidden_states(returns: Returns, dtype: torch.dtype) -> None:
    output, module = returned(returns, dtype), hidden_states(returns)
    before = read(returns, output)
    for one in (edit(0, [1, 4], -1.5, 0.25, False), edit(0, list(range(DIMENSIONS)), 2.0, 0.5, False)):
        module.write([one])
        after = module(output)
        expected = before.clone()
        expected[:, one.units] = (before[:, one.units].float() * one.scale + one.shift).to(dtype)
        assert torch.equal(read(returns, after), expected)
        untouched = [number for number in range(DIMENSIONS) if number not in one.units]
        for part, was in zip(
            *((each if isinstance(each, tuple) else (each,)) for each in (after, output)), strict=True
        ):
            assert torch.equal(part[:, untouched], was[:, untouched])
        change = (expected.float() - before.float()).abs().max()
        assert float(module.largest) == pytest.approx(float(change), rel=1e-6)
    assert int(module.tokens) == 6


@pytest.mark.parametrize("returns", Returns)
def test_identities_of_hidden_states_are_counted_and_leave_every_part_as_it_is(returns: Returns) -> None:
    output, module = returned(returns), hidden_states(returns)
    module.write([edit(0, list(range(DIMENSIONS)), 1.0, 0.0, False)])
    for part, was in zip(parts(module(output)), parts(output), strict=True):
        assert torch.equal(part, was)
    assert (module.touched(), int(module.tokens), float(module.largest)) == (DIMENSIONS, 3, 0.0)
    module.write([])
    module(output)
    assert int(module.tokens) == 3, "nothing was edited since"


def test_a_wider_second_part_keeps_its_type_and_takes_what_the_narrow_one_cannot_hold() -> None:
    """In half precision Gemma's hidden states are float32 and what a layer adds to them is float16."""
    module = hidden_states(Returns.PARTS)
    module.write([edit(0, [2], 1.0, 1e5, False)])
    first, second = torch.ones(3, DIMENSIONS, dtype=torch.float16), torch.ones(3, DIMENSIONS)
    after = module((first, second))
    assert (after[0].dtype, after[1].dtype) == (torch.float16, torch.float32)
    assert (after[0] + after[1])[:, 2].tolist() == [1e5 + 2] * 3


def test_hidden_states_are_set_where_a_part_is_infinite() -> None:
    module = hidden_states(Returns.PARTS)
    module.write([edit(0, [0], 0.0, 3.0, True)])
    first = torch.zeros(3, DIMENSIONS)
    first[:, 0] = torch.inf
    assert sum(module((first, torch.zeros(3, DIMENSIONS))))[:, 0].tolist() == [3.0] * 3
    assert float(module.largest) == 0.0


@pytest.mark.parametrize(
    ("returns", "output"),
    [
        (Returns.PARTS, torch.zeros(3, DIMENSIONS)),
        (Returns.HIDDEN_STATES, (torch.zeros(3, DIMENSIONS), torch.zeros(3, DIMENSIONS))),
        (Returns.HIDDEN_STATES, torch.zeros(3, DIMENSIONS // 2)),
        (Returns.PARTS, (torch.zeros(3, DIMENSIONS), None)),
    ],
)
def test_a_layer_that_returns_something_else_is_refused(returns: Returns, output: Any) -> None:
    with pytest.raises(ArchitectureError, match=r"a decoder layer returned .* expected .* of 8 dimensions"):
        hidden_states(returns)(output)


def test_a_layer_with_a_hook_compiles_whole() -> None:
    class Layer(nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            whole = first + second
            return whole.tanh(), whole

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                first, second = layer(first, second)
            return first + second

    model, real = Model(), torch.full((1,), 3, dtype=torch.int64)
    modules = [steer_what_it_returns(layer, Returns.PARTS, DIMENSIONS, real) for layer in model.layers]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    output = returned(Returns.PARTS)
    for scale in (1.0, 2.0, -3.0):
        modules[0].write([edit(0, [1, 5], scale, 0.5, False)])
        first, second = output
        whole = (first + second).tanh() + (first + second)
        whole[:, [1, 5]] = whole[:, [1, 5]] * scale + 0.5
        assert torch.equal(compiled(*output), whole.tanh() + whole)
    assert int(modules[0].tokens) == 9 and int(modules[1].tokens) == 0


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
        modules = [{"layer": 0, "edits": "mlp", "touched": 1, "tokens": self.tokens}]
        modules += [{"layer": 0, "edits": "residual", "touched": 0, "tokens": 0}]
        return [{"rank": rank, "forwards": 1, "modules": modules, "largest": 0.5} for rank in range(len(self.layouts))]

    def reset_prefix_cache(self) -> bool:
        return True


def layout(rank: int, first: int, width: int, **changed: Any) -> dict[str, Any]:
    own = {"rank": rank, "tensor_rank": rank, "tensor_size": 2, "pipeline_rank": 0, "pipeline_size": 1}
    held = {"layers": {"0": [first, width, 8]}, "dimensions": {"0": DIMENSIONS}}
    return {**own, "layout": LAYOUT, "capacity": 8, "problem": "", **held, **changed}


SHAPE = SimpleNamespace(layers=1, units=8)


def test_workers_must_hold_each_unit_once() -> None:
    SteeredEngine(Workers(layout(0, 0, 4), layout(1, 4, 4)), SHAPE)
    SteeredEngine(Workers(layout(0, 0, 8), layout(1, 0, 8)), SHAPE)
    for wrong in ([layout(0, 0, 4)], [layout(0, 0, 4), layout(1, 2, 4)], [layout(0, 0, 8, layers={})]):
        workers = Workers(*wrong)
        with pytest.raises(DidNotHappenError, match="layer 0: the workers hold the units"):
            SteeredEngine(workers, SHAPE)
        assert workers.ended, "the engine does not stay behind"


def test_hidden_states_are_written_where_there_is_room_of_their_size() -> None:
    neurons = made_up_set_of(layers=1, units=8, pairs={"fra_Latn": [(0, 1)]})
    residual = {"language": "fra_Latn", "op": "scale", "factor": 2, "site": "residual", "layers": "0"}

    def plan(dimensions: int) -> Any:
        with_states = replace(neurons, residual={"mean": np.zeros((1, dimensions, 1), np.float32)})
        return compile_intervention(from_arguments(residual), with_states)

    two = SteeredEngine(Workers(layout(0, 0, 4), layout(1, 4, 4)), SHAPE)
    with pytest.raises(DidNotHappenError, match="the workers edit 8 units, 16 were sent"):
        two.write(plan(DIMENSIONS))  # these workers count each edit once: of hidden states each writes all
    one = SteeredEngine(Workers(layout(0, 0, 8)), SHAPE)
    one.write(plan(DIMENSIONS))
    with pytest.raises(InterventionError, match="layer 0 returns 8 dimensions, the neuron set has statistics of 9"):
        one.write(plan(9))
    without = SteeredEngine(Workers(layout(0, 0, 8, dimensions={})), SHAPE)
    with pytest.raises(InterventionError, match="start it with steered_residual=True"):
        without.write(plan(DIMENSIONS))
    with pytest.raises(DidNotHappenError, match="worker 0 holds no hidden states of layer 0"):
        SteeredEngine(Workers(layout(0, 0, 8, dimensions={"1": 8})), SHAPE)


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
    with pytest.raises(DidNotHappenError, match=r"mlp of layer 0 of worker 0 edited 7 tokens .* needed 8"):
        engine.prove([output])
