"""`doctor --engine vllm`: is steering right in the user's vLLM, with the user's model and arguments?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lm_eval_steering.analysis.checks import ROW_LENGTHS, Check, Finding, PlannedCheck, random_neurons, results_of
from lm_eval_steering.architectures import model_type_of, shape_of
from lm_eval_steering.lmeval.arguments import read_config
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.progress import Log
from lm_eval_steering.provenance import versions
from lm_eval_steering.steering.intervention import RESIDUAL

if TYPE_CHECKING:
    from lm_eval_steering.vllm.model import SteeredVLLM

# At each site, written in plain numbers, so that they are defined for every neuron set.
_STEPS: list[dict[str, Any]] = [
    {"op": "add", "value": 1.0, "factor": 0.5},
    {"op": "scale", "factor": -1.5, "site": "product"},
    {"op": "scale", "factor": 0.5, "site": RESIDUAL},
]
_SHARE = 0.01  # of the dimensions of each layer's hidden states
_TOKENS = 8  # that are generated
_EXACT, _HALF = 1e-4, 8  # of max(1, |log-likelihood|): in float32, and in steps of a shorter type's rounding


def examine_engine(
    pretrained: str,
    arguments: Mapping[str, Any],
    neurons: NeuronSet | None = None,
    *,
    seed: int = 0,
    log: Log | None = None,
) -> list[Check]:
    """Try out every guarantee of `steered-vllm`.

    Two engines start one after another: an eager one, in which a module's input and output can be seen, and the one
    that the arguments describe. Where that is eager, there is one.

    Args:
        pretrained: hub id or folder.
        arguments: of `steered-vllm`.
        neurons: of the model; a seeded random set of its shape by default.
        seed: of the random set and of the token rows.
        log: shows progress.

    Returns:
        One check for each guarantee.

    Raises:
        SteeringError: as `steered-vllm`, before an engine starts.
    """
    from lm_eval_steering.vllm import compat
    from lm_eval_steering.vllm.model import SteeredVLLM

    log = log or Log(show=False)
    config = read_config(pretrained, dict(arguments))
    made_up = neurons is None
    neurons = neurons or random_neurons(shape_of(config), model_type_of(config), seed)
    given = dict(arguments) | {"force": made_up or bool(arguments.get("force"))}
    results: list[Check] = []
    eager: _Scores | None = None
    for is_eager in [True] if given.get("enforce_eager") else [True, False]:
        lm = SteeredVLLM(pretrained, **given | {"enforce_eager": is_eager, "batch_size": 1})
        try:
            bench = _EngineBench(lm, neurons, seed, bool(given["force"]))
            planned = list(_eager_checks(bench)) if is_eager else []
            if not is_eager or given.get("enforce_eager"):
                planned += _checks(bench, eager)
            results += results_of(planned, log)
            if is_eager:
                eager = bench.steered_scores()
        finally:
            compat.shut_down(lm.model)
            compat.release_memory()
    return results


_Scores = list[float]


def engine_report(
    results: Sequence[Check], pretrained: str, arguments: Mapping[str, Any], neurons: NeuronSet | None, seed: int
) -> dict[str, Any]:
    """All results and what they are of, in values that JSON can hold."""
    from lm_eval_steering.vllm import compat

    return {
        "passed": all(check.passed for check in results),
        "checks": [vars(check) for check in results],
        "model": pretrained,
        "engine": {"name": "vllm", "release": compat.release(), "arguments": dict(arguments)},
        "neurons": neurons.content_hash() if neurons else {"random": True, "seed": seed},
        "versions": versions(),
    }


class _EngineBench:
    """A running engine, a neuron set that fits its model, and token rows."""

    def __init__(self, lm: SteeredVLLM, neurons: NeuronSet, seed: int, force: bool) -> None:
        from lm_eval_steering.vllm import compat

        if not neurons.residual:  # random statistics, which say which dimensions are edited
            dimensions = compat.hidden_size(compat.model_config(lm.model))
            shape = (neurons.provenance.layers, dimensions, len(neurons.languages))
            means = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
            neurons = replace(neurons, residual={"mean": means})
        self.lm, self.neurons, self._force = lm, neurons, force
        special = {number for number in lm.tokenizer.all_special_ids if number is not None}
        usual = np.array([number for number in range(lm.tokenizer.vocab_size) if number not in special])
        generator = np.random.default_rng(seed)
        self.rows = [generator.choice(usual, length).tolist() for length in ROW_LENGTHS]
        sizes = {code: len(neurons.neurons(code)) for code in neurons.languages}
        self.language = max(sizes, key=lambda code: sizes[code])

    def steer(self, *steps: dict[str, Any]) -> None:
        """Put steps in force for the language with most neurons; none is the unsteered model.

        Those at `residual` are about every layer, and a few of its dimensions unless they say `dimensions`.
        """
        several = len(self.neurons.languages) > 1  # the dimensions of one differ from no other's
        few = max(1, round(_SHARE * self.neurons.dimensions)) if several else None
        hidden = {"layers": f"0-{self.neurons.provenance.layers - 1}", "dimensions": few}
        of_site = [hidden if step.get("site") == RESIDUAL else {} for step in steps]
        whole = [{"language": self.language, **more, **step} for more, step in zip(of_site, steps, strict=True)]
        self.lm.intervene(self.neurons if steps else None, force=self._force, intervention=whole or None)

    def scores(self) -> _Scores:
        """Log-likelihood of each row after its first token, in nats."""
        return [score[0] for score in self.lm.log_likelihoods([(None, row[:1], row[1:]) for row in self.rows])]

    def steered_scores(self) -> _Scores:
        """The same under an intervention at every site."""
        self.steer(*_STEPS)
        return self.scores()

    def texts(self) -> list[list[int]]:
        """Tokens that follow each row, greedily."""
        from vllm import SamplingParams

        sampling = [SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True) for _ in self.rows]
        outputs = self.lm.outputs(self.rows, sampling)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _eager_checks(bench: _EngineBench) -> Iterator[PlannedCheck]:
    """Of an eager engine, in the order of the table."""
    layers = sorted({int(layer) for layer in np.unique(bench.neurons.neurons(bench.language)[:, 0])})
    for layer in dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])):
        yield f"layer {layer} follows the definition", partial(_definition, bench, layer, "mlp")
        yield f"hidden states of layer {layer} follow the definition", partial(_definition, bench, layer, RESIDUAL)


def _checks(bench: _EngineBench, eager: _Scores | None) -> Iterator[PlannedCheck]:
    yield "each unit of each layer is held by a worker", partial(_held, bench)
    yield "scale by 1 is bit-equal to no intervention", partial(_identity, bench, {"op": "scale", "factor": 1})
    yield (
        "add of 0 is bit-equal to no intervention",
        partial(_identity, bench, {"op": "add", "value": 1.0, "factor": 0}),
    )
    yield "a real intervention changes the scores", partial(_takes_place, bench)
    if eager is not None:
        yield "compiled scores are the eager ones", partial(_as_eager, bench, eager)
    yield "every token is edited once in every layer", partial(_counted, bench)
    yield "the model is restored, cached prefixes too", partial(_restored, bench)
    yield "nothing is compiled when the intervention changes", partial(_compiles_nothing, bench)
    yield "compiled graphs are kept apart from a plain engine's", partial(_apart, bench)


def _definition(bench: _EngineBench, layer: int, edits: str) -> Finding:
    """Of the units of an MLP, or of the hidden states (`residual`)."""
    from lm_eval_steering.vllm.engine import message_of

    bench.steer(*_STEPS)
    plan, llm = bench.lm.plan, bench.lm.model
    assert plan is not None
    of_layer = [edit for edit in plan.edits if edit.layer == layer and (edit.site == RESIDUAL) == (edits == RESIDUAL)]
    llm.collective_rpc("steering_watch", args=(layer, edits))
    bench.scores()
    answers = llm.collective_rpc("steering_compare", args=(layer, edits, list(map(message_of, of_layer))))
    workers = [worker for worker in answers if worker["calls"]]
    edited, furthest = sum(worker["edited"] for worker in workers), max(worker["furthest"] for worker in workers)
    expected = sum(len(edit.units) for edit in of_layer if edit.site in ("activation", RESIDUAL))
    tolerance = 4 * float(torch.finfo(_dtype(bench)).eps)
    holds = edited >= expected > 0 and furthest <= tolerance and all(worker["others"] for worker in workers)
    detail = "" if all(worker["others"] for worker in workers) else "what no step touches has changed"
    kind = "dimensions" if edits == RESIDUAL else "units"
    return holds, f"{edited} {kind} within {furthest:.1e}", f"{expected} within {tolerance:.1e}", detail


def _held(bench: _EngineBench) -> Finding:
    workers = bench.lm.steering.evidence().workers
    layers = ", ".join(f"{worker['rank']}: layers {worker['layers']}" for worker in workers)
    return True, f"{len(workers)} workers ({layers})", "each unit once in each tensor-parallel group", ""


def _identity(bench: _EngineBench, step: dict[str, Any]) -> Finding:
    bench.steer()
    before = bench.scores(), bench.texts()
    bench.steer(step, {**step, "site": "product"}, {**step, "site": RESIDUAL, "dimensions": None})
    after = bench.scores(), bench.texts()
    return after == before, f"{_furthest(after[0], before[0]):.1e}", "bit-equal", ""


def _takes_place(bench: _EngineBench) -> Finding:
    """At each site by itself."""
    bench.steer()
    before, moved, finite = bench.scores(), np.inf, True
    for step in _STEPS:
        bench.steer(step)
        after = bench.scores()
        moved = min(moved, *(abs(one - other) for one, other in zip(after, before, strict=True)))
        finite &= bool(np.isfinite(after).all())
    return moved > 0 and finite, f"by {moved:.2g} nats or more", "more than 0, and finite", ""


def _as_eager(bench: _EngineBench, eager: _Scores) -> Finding:
    furthest = _furthest(bench.steered_scores(), eager)
    tolerance = max(_EXACT, _HALF * float(torch.finfo(_dtype(bench)).eps))
    return furthest <= tolerance, f"{furthest:.1e}", f"{tolerance:.1e} x max(1, |log-likelihood|)", ""


def _counted(bench: _EngineBench) -> Finding:
    bench.steered_scores()
    evidence, tokens = bench.lm.steering.evidence(), sum(ROW_LENGTHS)
    counts = {
        int(worker[name])
        for worker in evidence.workers
        if worker["edited_layers"]
        for name in ("fewest_tokens", "most_tokens")
    }
    return counts == {tokens}, f"{sorted(counts)} tokens", f"{tokens}", ""


def _restored(bench: _EngineBench) -> Finding:
    bench.steer()
    before = bench.scores(), bench.texts(), bench.texts()
    bench.steer(*_STEPS)
    steered = bench.scores(), bench.texts(), bench.texts()
    bench.steer()
    after = bench.scores(), bench.texts(), bench.texts()
    same = before == after and steered[1] == steered[2]
    return same, f"{_furthest(after[0], before[0]):.1e}", "bit-equal", ""


def _compiles_nothing(bench: _EngineBench) -> Finding:
    before = bench.lm.steering.compilations()
    for factor in (2.0, 3.0):
        bench.steer({"op": "scale", "factor": factor}, {"op": "scale", "factor": 1 / factor, "site": RESIDUAL})
        bench.scores()
    after = bench.lm.steering.compilations()
    number = sum(sum(each.values()) for each in after) - sum(sum(each.values()) for each in before)
    return after == before, f"{number} compilations and captures", "0", ""


def _apart(bench: _EngineBench) -> Finding:
    from lm_eval_steering.vllm import compat

    steered, plain = compat.cache_keys(bench.lm.model)
    return steered != plain, f"{steered[:8]} and {plain[:8]}", "two keys", ""


def _dtype(bench: _EngineBench) -> torch.dtype:
    kind = getattr(torch, bench.lm.activation_dtype.removeprefix("torch."))
    assert isinstance(kind, torch.dtype)
    return kind


def _furthest(scores: _Scores, expected: _Scores) -> float:
    """Largest difference, of max(1, |log-likelihood|)."""
    return max(abs(one - other) / max(1.0, abs(other)) for one, other in zip(scores, expected, strict=True))
