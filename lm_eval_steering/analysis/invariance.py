"""The checks of `doctor` on rows and on what is left behind.

A row's result must not depend on its batch, its padding or the KV cache; and after steering the model must be the one
that it was before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lm_eval_steering.analysis.bench import Bench
from lm_eval_steering.analysis.checks import STRONG, Finding, difference, listed, share_of_largest, tolerance
from lm_eval_steering.fingerprint import weights_digest
from lm_eval_steering.neurons.neuron_set import SITES

# --- rows, padding, cache -------------------------------------------------------------------------------------------


def batch_composition(bench: Bench, arguments: dict[str, Any]) -> Finding:
    """A row beside another row is what it is alone."""

    def compare() -> float:
        alone = bench.logits(bench.row)
        pair = torch.stack([bench.rows[3], bench.rows[0]])
        return share_of_largest(bench.logits(pair)[1:], alone)

    return _invariant(bench, arguments, compare)


def batch_size(bench: Bench, arguments: dict[str, Any]) -> Finding:
    """A row in a batch of eight is what it is alone."""

    def compare() -> float:
        alone = bench.logits(bench.row)
        return share_of_largest(bench.logits(bench.row.repeat(8, 1))[-1:], alone)

    return _invariant(bench, arguments, compare)


def padding(bench: Bench, arguments: dict[str, Any], side: str) -> Finding:
    """Rows of a padded batch are what they are alone."""

    def compare() -> float:
        ids, mask = bench.padded(side)
        together = bench.logits(ids, mask)
        return max(
            share_of_largest(together[number, mask[number].bool()], bench.logits(row[None])[0])
            for number, row in enumerate(bench.rows)
        )

    return _invariant(bench, arguments, compare)


def cache(bench: Bench, arguments: dict[str, Any]) -> Finding:
    """Prefill and decoding with a KV cache give what one forward pass gives, alone and in a left-padded batch."""

    def compare() -> float:
        ids, mask = bench.padded("left")
        whole, alone = bench.logits(ids, mask), torch.ones_like(bench.row)
        stepwise = bench.prefill_and_decode(ids, mask, decoded=4)
        return max(
            share_of_largest(stepwise[mask.bool()], whole[mask.bool()]),
            share_of_largest(bench.prefill_and_decode(bench.row, alone, decoded=4), bench.logits(bench.row)),
        )

    return _invariant(bench, arguments, compare)


# --- leaving the model as it was ------------------------------------------------------------------------------------


def detaching(bench: Bench) -> Finding:
    """After steering, and after an error inside it, the model computes the same bits and carries no hook of ours."""
    plain, hooks = bench.logits(bench.row), bench.hooks()
    with bench.steer(**STRONG):
        bench.logits(bench.row)
    worst = difference(bench.logits(bench.row), plain)
    try:
        with bench.steer(**STRONG):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        worst = max(worst, difference(bench.logits(bench.row), plain))
    left = bench.hooks() - hooks
    return worst == 0 and left == 0, f"{worst:.3g}, {left} hooks left", "0, 0", ""


def one_after_another(bench: Bench) -> Finding:
    """Steering to one language, to another, and to the first again gives the first result again, bit by bit."""
    first, second = bench.languages

    def steered(code: str, **arguments: Any) -> torch.Tensor:
        with bench.steer(code, **arguments):
            return bench.logits(bench.row)

    before = steered(first, **STRONG)
    steered(second, op="set", value=2.0)
    worst = difference(steered(first, **STRONG), before)
    return worst == 0, f"{worst:.3g}", "0", ""


def foreign_hooks(bench: Bench) -> Finding:
    """Hooks of others on the same modules run before, while and after the model is steered."""
    calls = {"activation": 0, "down": 0, "decoder": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    layer = bench.sites.layers[int(bench.neurons.neurons(bench.languages[0])[0, 0])]
    modules = {"activation": layer.activation, "down": layer.down, "decoder": bench.sites.decoder}
    handles = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    try:
        bench.logits(bench.row)
        for site in SITES:
            with bench.steer(site=site, **STRONG):
                bench.logits(bench.row)
        bench.logits(bench.row)
    finally:
        for handle in handles:
            handle.remove()
    missing = [
        f"a hook on {bench.path(modules[name])} ran {found} times" for name, found in calls.items() if found != 4
    ]
    return not missing, "/".join(map(str, calls.values())), "4/4/4 calls", listed(missing)


def weights_untouched(bench: Bench, before: str) -> Finding:
    """The digest of the weights is what it was before the checks."""
    after = weights_digest(bench.model)
    return after == before, after[:8], before[:8], ""


def _invariant(bench: Bench, arguments: dict[str, Any], compare: Callable[[], float]) -> Finding:
    limit = tolerance(bench.model.dtype)
    worst = 0.0
    for site in SITES:
        with bench.steer(site=site, **arguments):
            worst = max(worst, compare())
    passed = worst <= limit
    # A model may depend on its batch by itself; that is worth knowing, and no fault of the intervention.
    detail = "" if passed else f"the unsteered model: {compare():.3g}"
    return passed, f"{worst:.2g}", f"<= {limit:.2g} of the largest logit", detail
