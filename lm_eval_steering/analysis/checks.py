"""The checks of `doctor` on the architecture and on the edits: does an intervention do what it says, and nothing else?

A check is one function that takes a bench and returns what was found. Interventions are moderate and written in plain
numbers, so that they are defined for every neuron set. `invariance` holds the other half of the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lm_eval_steering.analysis.bench import Bench
from lm_eval_steering.neurons.neuron_set import SITES
from lm_eval_steering.steering.attach import steer

STRONG: dict[str, Any] = {"op": "add", "value": 1.0, "factor": 1.5}
LIVE: dict[str, Any] = {"op": "add", "value": "live_max", "factor": 0.5, "scope": "token"}
_OPERATIONS: tuple[dict[str, Any], ...] = (
    {"op": "scale", "factor": -1.5},
    {"op": "add", "value": 0.5, "factor": 3.0},
    {"op": "set", "value": 0.25, "factor": 2.0},
)
# Largest difference of logits that is rounding, as a share of the largest |logit|. float32 is the promise of the
# guarantees, and for float64 too, since many families compute their softmax in float32 all the same; half precision
# rounds after every module, and eight roundings of its own are allowed.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: what must hold.
        passed: whether it does.
        found: the number.
        expected: what it was compared with.
        detail: what to know where it fails: the module's name, or the error.
    """

    name: str
    passed: bool
    found: str
    expected: str
    detail: str = ""


Finding = tuple[bool, str, str, str]  # passed, found, expected, detail


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits that counts as rounding, as a share of the largest |logit|."""
    return _TOLERANCES.get(dtype, 8 * torch.finfo(dtype).eps)


# --- the architecture -----------------------------------------------------------------------------------------------


def runs_once(bench: Bench) -> Finding:
    """Every layer's activation module and last linear layer are called once in a forward pass, steered or not."""
    modules = [module for layer in bench.sites.layers for module in (layer.activation, layer.down)]
    counts = dict.fromkeys(range(len(modules)), 0)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    handles = [module.register_forward_hook(count(number)) for number, module in enumerate(modules)]
    try:
        bench.logits(bench.row)
    finally:
        for handle in handles:
            handle.remove()
    wrong = [f"{bench.path(modules[number])} ran {times} times" for number, times in counts.items() if times != 1]
    return not wrong, f"{len(modules) - len(wrong)} of {len(modules)} modules", "all", listed(wrong)


def output_is_used(bench: Bench) -> Finding:
    """What the activation module returns is what reaches the last linear layer: zeros in, zeros there."""
    handles = [layer.activation.register_forward_hook(lambda _m, _i, out: out * 0) for layer in bench.sites.layers]
    try:
        with bench.watching("product") as inputs:
            bench.logits(bench.row)
    finally:
        for handle in handles:
            handle.remove()
    if len(inputs) != len(bench.sites.layers):
        return False, f"{len(inputs)} layers", f"{len(bench.sites.layers)}", "a last linear layer did not run once"
    passed_by = [
        f"{bench.path(layer.activation)} is bypassed: zeroing its output leaves up to {float(seen.abs().max()):.3g} "
        f"at the input of {bench.path(layer.down)}"
        for layer, seen in zip(bench.sites.layers, inputs, strict=True)
        if bool((seen != 0).any())
    ]
    return not passed_by, f"{len(inputs) - len(passed_by)} of {len(inputs)} layers", "all", listed(passed_by)


def fires_as_often(bench: Bench) -> Finding:
    """In prefill and in each step of decoding, every steered layer's hook fires exactly once."""
    decoded = 4
    with bench.steer(**STRONG) as steering:
        ids = bench.row
        bench.prefill_and_decode(ids, torch.ones_like(ids), decoded)
        evidence = steering.evidence()
    layers = len(set(bench.neurons.neurons(bench.languages[0])[:, 0].tolist()))
    expected = (1 + decoded) * layers
    right = evidence.fired == expected and evidence.forwards == 1 + decoded and evidence.positions == ids.numel()
    return right, f"{evidence.fired} hooks in {evidence.forwards} forwards", f"{expected} in {1 + decoded}", ""


# --- what is edited -------------------------------------------------------------------------------------------------


def identity(bench: Bench, arguments: dict[str, Any]) -> Finding:
    """An intervention that changes nothing gives the same bits, at both sites."""
    plain = bench.logits(bench.row)
    worst = 0.0
    for site in SITES:
        with bench.steer(site=site, **arguments):
            worst = max(worst, difference(bench.logits(bench.row), plain))
    return worst == 0, f"{worst:.3g}", "0", ""


def empty_set(bench: Bench) -> Finding:
    """A language without neurons gives the same bits."""
    plain, code = bench.logits(bench.row), bench.languages[0]
    nothing = replace(
        bench.neurons, languages=(code,), assignments={code: np.zeros((0, 2), dtype=np.int64)}, calibrated=None
    )
    with steer(bench.model, nothing, code, allow_empty=True, force=True, sites=bench.override, **STRONG):
        worst = difference(bench.logits(bench.row), plain)
    return worst == 0, f"{worst:.3g}", "0", ""


def takes_place(bench: Bench) -> Finding:
    """A real intervention changes the logits, so that the other checks do not compare nothing with nothing."""
    plain = bench.logits(bench.row)
    found = []
    for site in SITES:
        with bench.steer(site=site, **STRONG):
            found.append(difference(bench.logits(bench.row), plain))
    return min(found) > 0, f"{min(found):.3g}", "> 0", ""


def edits_by_definition(bench: Bench, site: str) -> Finding:
    """Chosen units become what the definition says, computed here in double precision from the captured tensors."""
    worst, limit = 0.0, 2 * max(torch.finfo(bench.model.dtype).eps, torch.finfo(torch.float32).eps)
    for arguments in _operations(bench):
        before, after = _around(bench, site, arguments)
        for layer, unit, value in _chosen(bench, site, arguments):
            old, new = (seen[layer][..., unit].cpu().double() for seen in (before, after))
            expected = _by_hand(old, value, **arguments)
            # Rounding of a sum is as large as its parts, which may cancel.
            size = old.abs() + expected.abs() + abs(value * arguments.get("factor", 1.0))
            worst = max(worst, float(((new - expected).abs() / size.clamp(min=1e-30)).max()))
    return worst <= limit, f"{worst:.3g}", f"<= {limit:.2g} relative", ""


def nothing_else_changes(bench: Bench) -> Finding:
    """Units that were not chosen keep their bits in every layer, and layers below the first edit see no difference."""
    wrong = 0
    for site in SITES:
        with bench.watching(site) as plain:
            bench.logits(bench.row)
        for arguments in _operations(bench):
            before, after = _around(bench, site, arguments)
            chosen = bench.neurons.neurons(bench.languages[0])
            for layer, (old, new) in enumerate(zip(before, after, strict=True)):
                keep = torch.ones(old.shape[-1], dtype=torch.bool)
                keep[chosen[chosen[:, 0] == layer, 1]] = False
                wrong += int((old[..., keep] != new[..., keep]).sum())
                if layer < chosen[0, 0]:
                    wrong += int((plain[layer] != new).sum())
    return wrong == 0, f"{wrong} values changed", "0", ""


# --- parts ----------------------------------------------------------------------------------------------------------


def _operations(bench: Bench) -> list[dict[str, Any]]:
    """Scale, add and set by numbers, and add of the calibrated mean where the set holds it."""
    statistics = bench.neurons.calibrated
    calibrated = statistics is not None and all("mean" in statistics.values.get(site, {}) for site in SITES)
    return [*_OPERATIONS, *([{"op": "add", "value": "mean", "factor": 2.0}] if calibrated else [])]


def _around(
    bench: Bench, site: str, arguments: dict[str, Any]
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Units of every layer in one forward pass, just before the intervention and just after it."""
    # Hooks run in the order of registration, so the first to be put there sees what the intervention gets.
    with bench.watching(site) as before, bench.steer(site=site, **arguments), bench.watching(site) as after:
        bench.logits(bench.row)
    return before, after


def _chosen(bench: Bench, site: str, arguments: dict[str, Any]) -> list[tuple[int, int, float]]:
    """(layer, unit, value) of each neuron of the first language."""
    neurons, value = bench.neurons.neurons(bench.languages[0]), arguments.get("value", 1.0)
    if isinstance(value, str) and bench.neurons.calibrated is not None:
        values = bench.neurons.calibrated.lookup(neurons, bench.languages[0], site, value).tolist()
    else:
        values = [float(value)] * len(neurons)
    return [(int(layer), int(unit), v) for (layer, unit), v in zip(neurons.tolist(), values, strict=True)]


def _by_hand(old: torch.Tensor, amount: float, op: str, factor: float, **_: Any) -> torch.Tensor:
    """The definition of docs/interventions.md, in double precision."""
    if op == "scale":
        return factor * old
    return old + factor * amount if op == "add" else torch.full_like(old, factor * amount)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest |difference|; 0 where all values are equal, infinite where one is NaN."""
    if torch.equal(one, other):
        return 0.0
    return float((one.cpu().double() - other.cpu().double()).abs().nan_to_num(nan=torch.inf).max())


def share_of_largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest |difference| as a share of the largest |value| of the other; infinite where one is not finite."""
    one, other = one.cpu().double(), other.cpu().double()
    largest = (one - other).abs().nan_to_num(nan=torch.inf).max()
    return float(largest / other.abs().max().clamp(min=1e-30))


def listed(found: list[str]) -> str:
    """The first three, and how many more there are."""
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more
