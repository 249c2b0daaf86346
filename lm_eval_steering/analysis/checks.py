"""The checks of `doctor`: the architecture, the edits, invariance to batch, padding and KV cache, and restoration.

A check is a function that takes a bench and returns a result. Its interventions are of moderate strength and use
numbers as values, so that they are defined for every neuron set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from lm_eval_steering.architectures import ModelSites, Shape, hidden_states, text_config_of
from lm_eval_steering.architectures.compat import number_of_hooks
from lm_eval_steering.architectures.weights import weights_digest
from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.neurons.neuron_set import NeuronSet, Provenance
from lm_eval_steering.progress import Log
from lm_eval_steering.steering.attach import Steering, steer
from lm_eval_steering.steering.intervention import RESIDUAL, SITES

# --- A loaded model, rows of tokens, and forward passes with and without padding and cache

ROW_LENGTHS = (12, 9, 7, 12)  # tokens; two rows of equal length make a batch without padding
_SHARE = 0.01  # of each layer's units in a random set, LAPE's default rate; and of its hidden states' dimensions


@dataclass
class Bench:
    """A model, a neuron set that fits it, and the modules of its units.

    Attributes:
        model: a causal language model of transformers in evaluation mode.
        neurons: a set in which at least one language has neurons; with statistics of the hidden states, random ones
            where it came without.
        sites: of the model.
        override: the user's `sites=`, if given.
        seed: of the token rows.
    """

    model: Any
    neurons: NeuronSet
    sites: ModelSites
    override: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.neurons.residual:
            with self.watching(RESIDUAL) as seen:
                self.logits(self.row)
            shape = (len(seen), seen[0].shape[-1], len(self.neurons.languages))
            means = np.random.default_rng(self.seed).normal(size=shape).astype(np.float32)
            self.neurons = replace(self.neurons, residual={"mean": means})

    @cached_property
    def languages(self) -> tuple[str, str]:
        """The two languages with most neurons; the same one twice where only one has any.

        Raises:
            NeuronSetError: if none has.
        """
        sizes = {code: len(self.neurons.neurons(code)) for code in self.neurons.languages}
        ordered = [code for code in sorted(sizes, key=lambda code: (-sizes[code], code)) if sizes[code]]
        if not ordered:
            raise NeuronSetError("no language of the neuron set has neurons, so there is nothing to check")
        return ordered[0], ordered[min(1, len(ordered) - 1)]

    def steer(self, language: str | None = None, **arguments: Any) -> Steering:
        """The public `steer`, for the first language by default; the set has been compared with the model already."""
        if arguments.get("site") == RESIDUAL:
            arguments = self.few_dimensions | arguments
        return steer(
            self.model, self.neurons, language or self.languages[0], force=True, sites=self.override, **arguments
        )

    @property
    def few_dimensions(self) -> dict[str, Any]:
        """Arguments of `residual` that are as moderate as a neuron set: 1 % of the dimensions of every layer.

        All of them where the set has one language, whose dimensions differ from no other's.
        """
        several = len(self.neurons.languages) > 1
        count = max(1, round(_SHARE * self.neurons.dimensions)) if several else None
        return {"layers": f"0-{self.sites.shape.layers - 1}", "dimensions": count}

    @cached_property
    def device(self) -> torch.device:
        """Device of the token ids."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """Seeded rows (token,) of ordinary tokens, ROW_LENGTHS long."""
        text = text_config_of(self.model.config)
        special = {
            number
            for config in (self.model.config, text)
            for name, number in vars(config).items()
            if name.endswith("_token_id") and isinstance(number, int)
        }
        size = min(int(text.vocab_size), len(self.model.get_input_embeddings().weight))
        usual = np.array([number for number in range(size) if number not in special])
        generator = np.random.default_rng(self.seed)
        return tuple(
            torch.from_numpy(generator.choice(usual, length)).to(self.device) for length in ROW_LENGTHS
        )  # fmt: skip

    @property
    def row(self) -> torch.Tensor:
        """The first row as a batch (1, token)."""
        return self.rows[0][None]

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        """The model's output; with a mask (row, position) position ids are passed too.

        Args:
            ids: (row, token).
            mask: 1 for real tokens, over the cached ones as well.
            inputs: further arguments of the model.
        """
        if mask is not None:
            inputs["attention_mask"] = mask
            # BLOOM and MPT (ALiBi) take no position ids.
            if "position_ids" in self._parameters:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(ids, **inputs)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        """(row, position, vocabulary)."""
        return self.forward(ids, mask, **inputs).logits

    def padded(self, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows as one batch, (ids, mask) of shape (row, position), padded on one side."""
        longest = max(ROW_LENGTHS) + 3  # the first row is padded too
        ids = self.rows[0].new_full((len(self.rows), longest), int(self.rows[0][0]))
        mask = torch.zeros_like(ids)
        for number, row in enumerate(self.rows):
            columns = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[number, columns], mask[number, columns] = row, 1
        return ids, mask

    def prefill_and_decode(self, ids: torch.Tensor, mask: torch.Tensor, decoded: int) -> torch.Tensor:
        """Logits (row, position, vocabulary) of a prompt at once, and of its last tokens one at a time."""
        start = ids.shape[1] - decoded
        cache = "cache" if "cache" in self._parameters else "past_key_values"  # its name before transformers 5.24
        output = self.forward(ids[:, :start], mask[:, :start], use_cache=True)
        parts = [output.logits]
        for position in range(start, ids.shape[1]):
            later = {cache: getattr(output, cache), "use_cache": True}
            output = self.forward(ids[:, position : position + 1], mask[:, : position + 1], **later)
            parts.append(output.logits)
        return torch.cat(parts, 1)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(signature(self.model.forward).parameters)

    def path(self, module: nn.Module) -> str:
        """Name of a module, as `model.named_modules()` has it."""
        return next((path for path, other in self.model.named_modules() if other is module), type(module).__name__)

    @contextmanager
    def watching(self, site: str, first: bool = False) -> Iterator[list[torch.Tensor]]:
        """The units, or dimensions, of every layer at this site as these hooks see them, [(..., unit)] by layer.

        Args:
            site: `activation`, `product` or `residual`.
            first: before the hooks that are there already, rather than after them.
        """
        seen: list[torch.Tensor] = []
        with ExitStack() as stack:
            for layer in self.sites.layers:
                if site == "activation":
                    handle = layer.activation.register_forward_hook(
                        lambda _m, _i, out: seen.append(out.clone()), prepend=first
                    )
                elif site == RESIDUAL:
                    handle = layer.block.register_forward_hook(
                        lambda _m, _i, out: seen.append(hidden_states(out).clone()), prepend=first
                    )
                else:
                    handle = layer.down.register_forward_pre_hook(
                        lambda _m, inputs: seen.append(inputs[0].clone()), prepend=first
                    )
                stack.enter_context(handle)
            yield seen

    def hooks(self) -> int:
        """Number of hooks on all modules."""
        return sum(map(number_of_hooks, self.model.modules()))


def random_neurons(shape: Shape, architecture: str, seed: int, weights: Sequence[float] = ()) -> NeuronSet:
    """A seeded random set of two languages: 1 % of the units of every layer, and of every other layer.

    Args:
        shape: of the model.
        architecture: its `model_type`.
        seed: of the draw.
        weights: a sketch of the model's weights, where it is loaded.
    """
    generator = np.random.default_rng(seed)
    count = max(1, round(_SHARE * shape.units))
    every = {"eng_Latn": range(shape.layers), "fra_Latn": range(0, shape.layers, 2)}
    assignments = {
        code: np.array(
            [
                (layer, unit)
                for layer in layers
                for unit in sorted(generator.choice(shape.width(layer), count, replace=False))
            ],
            dtype=np.int64,
        )
        for code, layers in every.items()
    }
    provenance = Provenance(
        "random", "", architecture, shape.layers, shape.units, widths=shape.widths, weights=weights,
        selection={"method": "random", "seed": seed},
    )  # fmt: skip
    return NeuronSet(tuple(assignments), assignments, provenance)


STRONG: dict[str, Any] = {"op": "add", "value": 1.0, "factor": 1.5}
LIVE: dict[str, Any] = {"op": "add", "value": "live_max", "factor": 0.5, "scope": "token"}
_OPERATIONS: tuple[dict[str, Any], ...] = (
    {"op": "scale", "factor": -1.5},
    {"op": "add", "value": 0.5, "factor": 3.0},
    {"op": "set", "value": 0.25, "factor": 2.0},
)
# Largest difference of logits that counts as rounding, relative to the largest |logit|. That of float32 is guaranteed
# (docs/guarantees.md), and holds for float64 too, since many families compute the softmax in float32; half precision
# rounds after every module, and eight such roundings are allowed.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5}


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: what must hold.
        passed: whether it does.
        found: the measured value.
        expected: the value it was compared with.
        detail: why it fails: the module's name, or the error.
    """

    name: str
    passed: bool
    found: str
    expected: str
    detail: str = ""


Finding = tuple[bool, str, str, str]  # passed, found, expected, detail of a Check
PlannedCheck = tuple[str, Callable[[], Finding]]  # what must hold, how to find out


def results_of(planned: Sequence[PlannedCheck], log: Log) -> list[Check]:
    """The results of checks, in their order; an error inside one is a failure and does not end the others."""
    results = []
    with log.bar("checking", len(planned), "check") as bar:
        for name, check in planned:
            try:
                results.append(Check(name, *check()))
            except Exception as error:
                detail = (str(error) or "no message").splitlines()[0]
                results.append(Check(name, False, type(error).__name__, "no error", detail))
            bar.update(1)
    return results


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits that counts as rounding, relative to the largest |logit|."""
    return _TOLERANCES.get(dtype, 8 * torch.finfo(dtype).eps)


# --- The architecture

Key = TypeVar("Key")


@contextmanager
def _counting(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, int]]:
    """How often each module runs inside."""
    calls = dict.fromkeys(modules, 0)

    def count(key: Key) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[key] += 1

        return hook

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(module.register_forward_hook(count(key)))
        yield calls


def runs_once(bench: Bench) -> Finding:
    """Every layer, its activation module and its last linear layer are called once in a forward pass."""
    modules = dict(
        enumerate(module for layer in bench.sites.layers for module in (layer.activation, layer.down, layer.block))
    )
    with _counting(modules) as calls:
        bench.logits(bench.row)
    wrong = [f"{bench.path(modules[number])} ran {times} times" for number, times in calls.items() if times != 1]
    return not wrong, f"{len(modules) - len(wrong)} of {len(modules)} modules", "all", listed(wrong)


def output_is_used(bench: Bench) -> Finding:
    """The output of the activation module reaches the last linear layer, whose input is 0 where it is 0."""
    with ExitStack() as stack:
        for layer in bench.sites.layers:
            stack.enter_context(layer.activation.register_forward_hook(lambda _m, _i, out: out * 0))
        inputs = stack.enter_context(bench.watching("product"))
        bench.logits(bench.row)
    if len(inputs) != len(bench.sites.layers):
        return False, f"{len(inputs)} layers", f"{len(bench.sites.layers)}", "a last linear layer did not run once"
    bypassed = [
        f"{bench.path(layer.activation)} is bypassed: zeroing its output leaves up to {float(seen.abs().max()):.3g} "
        f"at the input of {bench.path(layer.down)}"
        for layer, seen in zip(bench.sites.layers, inputs, strict=True)
        if bool((seen != 0).any())
    ]
    return not bypassed, f"{len(inputs) - len(bypassed)} of {len(inputs)} layers", "all", listed(bypassed)


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


# --- The edits


def identity(bench: Bench, arguments: dict[str, Any]) -> Finding:
    """An identity intervention leaves the logits bit-equal, at all sites; at `residual` on every dimension."""
    plain = bench.logits(bench.row)
    worst = 0.0
    for site in SITES:
        every = {"dimensions": None} if site == RESIDUAL else {}
        with bench.steer(site=site, **arguments, **every):
            worst = max(worst, difference(bench.logits(bench.row), plain))
    return worst == 0, f"{worst:.3g}", "0", ""


def empty_set(bench: Bench) -> Finding:
    """Steering a language without neurons leaves the logits bit-equal."""
    plain, code = bench.logits(bench.row), bench.languages[0]
    none = {code: np.zeros((0, 2), dtype=np.int64)}
    empty = replace(bench.neurons, languages=(code,), assignments=none, calibrated=None, residual={})
    with steer(bench.model, empty, code, allow_empty=True, force=True, sites=bench.override, **STRONG):
        worst = difference(bench.logits(bench.row), plain)
    return worst == 0, f"{worst:.3g}", "0", ""


def takes_place(bench: Bench) -> Finding:
    """An intervention changes the logits at all sites; otherwise the other checks would mean nothing."""
    plain = bench.logits(bench.row)
    changes = []
    for site in SITES:
        with bench.steer(site=site, **STRONG):
            changes.append(difference(bench.logits(bench.row), plain))
    return min(changes) > 0, f"{min(changes):.3g}", "> 0", ""


def edits_by_definition(bench: Bench, site: str) -> Finding:
    """Chosen units follow the definition, computed in float64 from the captured activations."""
    worst, limit = 0.0, 2 * max(torch.finfo(bench.model.dtype).eps, torch.finfo(torch.float32).eps)
    for arguments in _operations(bench, site):
        before, after = _around(bench, site, arguments)
        for layer, unit, value in _chosen(bench, site, arguments):
            old, new = (seen[layer][..., unit].cpu().double() for seen in (before, after))
            expected = _by_definition(old, value, **arguments)
            # The rounding error of a sum is relative to its summands, which may cancel.
            size = old.abs() + expected.abs() + abs(value * arguments["factor"])
            worst = max(worst, float(((new - expected).abs() / size.clamp(min=1e-30)).max()))
    return worst <= limit, f"{worst:.3g}", f"<= {limit:.2g} relative", ""


def nothing_else_changes(bench: Bench) -> Finding:
    """Units that were not chosen stay bit-equal in every layer, and so does every layer below the first edit."""
    wrong = 0
    for site in SITES:
        with bench.watching(site) as plain:
            bench.logits(bench.row)
        for arguments in _operations(bench, site):
            before, after = _around(bench, site, arguments)
            chosen = np.array([(layer, unit) for layer, unit, _ in _chosen(bench, site, arguments)])
            for layer, (old, new) in enumerate(zip(before, after, strict=True)):
                keep = torch.ones(old.shape[-1], dtype=torch.bool)
                keep[chosen[chosen[:, 0] == layer, 1]] = False
                wrong += int((old[..., keep] != new[..., keep]).sum())
                if layer < chosen[0, 0]:
                    wrong += int((plain[layer] != new).sum())
    return wrong == 0, f"{wrong} values changed", "0", ""


def _operations(bench: Bench, site: str) -> list[dict[str, Any]]:
    """Scale, add and set by numbers, and add of the calibrated mean where the set holds it."""
    statistics = bench.neurons.calibrated
    calibrated = site == RESIDUAL or (statistics is not None and "mean" in statistics.values.get(site, {}))
    return [*_OPERATIONS, *([{"op": "add", "value": "mean", "factor": 2.0}] if calibrated else [])]


def _around(
    bench: Bench, site: str, arguments: dict[str, Any]
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Units of every layer in one forward pass, before and after the intervention's hooks."""
    steering = bench.steer(site=site, **arguments)
    with steering, bench.watching(site, first=True) as before, bench.watching(site) as after:
        bench.logits(bench.row)
    return before, after


def _chosen(bench: Bench, site: str, arguments: dict[str, Any]) -> list[tuple[int, int, float]]:
    """(layer, unit, value) of each neuron of the first language; at `residual` of each of its dimensions."""
    if site == RESIDUAL:
        return _chosen_dimensions(bench, arguments.get("value", 1.0))
    neurons, value = bench.neurons.neurons(bench.languages[0]), arguments.get("value", 1.0)
    if isinstance(value, str) and bench.neurons.calibrated is not None:
        values = bench.neurons.calibrated.lookup(neurons, bench.languages[0], site, value).tolist()
    else:
        values = [float(value)] * len(neurons)
    return [(int(layer), int(unit), v) for (layer, unit), v in zip(neurons.tolist(), values, strict=True)]


def _chosen_dimensions(bench: Bench, value: float | str) -> list[tuple[int, int, float]]:
    """(layer, dimension, value) by the definition: in each layer the first language's largest |diffmean|."""
    means = bench.neurons.residual["mean"].astype(np.float64)
    of_language = means[:, :, bench.neurons.languages.index(bench.languages[0])]
    # As large as the distance from the average of the others, but for a factor that is the same everywhere.
    distances = np.abs(of_language - means.mean(axis=2))
    ordered = np.argsort(-distances, axis=1, kind="stable")[:, : bench.few_dimensions["dimensions"]]
    return [
        (layer, dimension, float(of_language[layer, dimension] if value == "mean" else value))
        for layer, of_layer in enumerate(ordered)
        for dimension in sorted(of_layer.tolist())
    ]


def _by_definition(old: torch.Tensor, amount: float, op: str, factor: float, **_: Any) -> torch.Tensor:
    """The definition of docs/interventions.md, in float64."""
    if op == "scale":
        return factor * old
    return old + factor * amount if op == "add" else torch.full_like(old, factor * amount)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest |difference| of two tensors of one shape; 0 where all values are equal, infinite where one is NaN."""
    if torch.equal(one, other):
        return 0.0
    return float((one.cpu().double() - other.cpu().double()).abs().nan_to_num(nan=torch.inf).max())


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest |difference| of two tensors of one shape, over the largest |value| of the other; infinite for a NaN."""
    one, other = one.cpu().double(), other.cpu().double()
    largest = (one - other).abs().nan_to_num(nan=torch.inf).max()
    return float(largest / other.abs().max().clamp(min=1e-30))


def listed(problems: list[str]) -> str:
    """The first three, and the number of further ones."""
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


# --- Invariance: a row's logits do not depend on its batch, its padding or the KV cache


def batch_composition(bench: Bench, arguments: dict[str, Any]) -> Finding:
    """A row in a batch of two gives the logits that it gives alone."""

    def compare() -> float:
        alone = bench.logits(bench.row)
        pair = torch.stack([bench.rows[3], bench.rows[0]])
        return relative_difference(bench.logits(pair)[1:], alone)

    return _invariant(bench, arguments, compare)


def batch_size(bench: Bench, arguments: dict[str, Any]) -> Finding:
    """A row in a batch of eight gives the logits that it gives alone."""

    def compare() -> float:
        alone = bench.logits(bench.row)
        return relative_difference(bench.logits(bench.row.repeat(8, 1))[-1:], alone)

    return _invariant(bench, arguments, compare)


def padding(bench: Bench, arguments: dict[str, Any], side: str) -> Finding:
    """Rows of a padded batch give the logits that they give alone."""

    def compare() -> float:
        ids, mask = bench.padded(side)
        together = bench.logits(ids, mask)
        return max(
            relative_difference(together[number, mask[number].bool()], bench.logits(row[None])[0])
            for number, row in enumerate(bench.rows)
        )

    return _invariant(bench, arguments, compare)


def cache(bench: Bench, arguments: dict[str, Any]) -> Finding:
    """Prefill and decoding with a KV cache give the logits of one forward pass, alone and in a left-padded batch."""

    def compare() -> float:
        ids, mask = bench.padded("left")
        whole, alone = bench.logits(ids, mask), torch.ones_like(bench.row)
        stepwise = bench.prefill_and_decode(ids, mask, decoded=4)
        return max(
            relative_difference(stepwise[mask.bool()], whole[mask.bool()]),
            relative_difference(bench.prefill_and_decode(bench.row, alone, decoded=4), bench.logits(bench.row)),
        )

    return _invariant(bench, arguments, compare)


# --- Restoration: after steering the model is as before


def detaching(bench: Bench) -> Finding:
    """After steering, and after an error inside it, logits are bit-equal and no hook of ours is left."""
    plain, hooks = bench.logits(bench.row), bench.hooks()
    with bench.steer(**STRONG):
        bench.logits(bench.row)
    worst = difference(bench.logits(bench.row), plain)
    try:
        with bench.steer(**STRONG):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        worst = max(worst, difference(bench.logits(bench.row), plain))
    remaining = bench.hooks() - hooks
    return worst == 0 and remaining == 0, f"{worst:.3g}, {remaining} hooks left", "0, 0", ""


def one_after_another(bench: Bench) -> Finding:
    """Steering to one language, to another, and to the first again gives bit-equal logits for the first."""
    first, second = bench.languages

    def steered(code: str, **arguments: Any) -> torch.Tensor:
        with bench.steer(code, **arguments):
            return bench.logits(bench.row)

    before = steered(first, **STRONG)
    steered(second, op="set", value=2.0)
    worst = difference(steered(first, **STRONG), before)
    return worst == 0, f"{worst:.3g}", "0", ""


def foreign_hooks(bench: Bench) -> Finding:
    """Hooks of other libraries on the same modules run before, during and after steering."""
    layer = bench.sites.layers[int(bench.neurons.neurons(bench.languages[0])[0, 0])]
    modules = {
        "activation": layer.activation, "down": layer.down, "block": layer.block, "decoder": bench.sites.decoder,
    }  # fmt: skip
    with _counting(modules) as calls:
        bench.logits(bench.row)
        for site in SITES:
            with bench.steer(site=site, **STRONG):
                bench.logits(bench.row)
        bench.logits(bench.row)
    expected = 2 + len(SITES)
    missing = [
        f"a hook on {bench.path(modules[name])} ran {number} times"
        for name, number in calls.items()
        if number != expected
    ]
    return not missing, "/".join(map(str, calls.values())), f"{expected} calls of each", listed(missing)


def weights_untouched(bench: Bench, before: str) -> Finding:
    """The digest of the weights has not changed during the checks."""
    after = weights_digest(bench.model)
    return after == before, after[:8], before[:8], ""


def _invariant(bench: Bench, arguments: dict[str, Any], compare: Callable[[], float]) -> Finding:
    limit = tolerance(bench.model.dtype)
    worst = 0.0
    for site in SITES:
        with bench.steer(site=site, **arguments):
            worst = max(worst, compare())
    passed = worst <= limit
    # The model itself may depend on the batch, which is no fault of the intervention.
    detail = "" if passed else f"the unsteered model: {compare():.3g}"
    return passed, f"{worst:.2g}", f"<= {limit:.2g} of the largest logit", detail
