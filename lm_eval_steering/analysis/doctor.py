"""`doctor`: is steering right in this model? Every guarantee that can be tried out on one, tried out on it."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from lm_eval_steering.analysis import checks
from lm_eval_steering.analysis.checks import Bench, Check, Finding, random_neurons
from lm_eval_steering.architectures import model_type_of, sites_of
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.architectures.weights import weights_digest
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.progress import Log
from lm_eval_steering.provenance import versions
from lm_eval_steering.steering.attach import fitting_sites

_WIDTH = 100  # columns of plain text


def examine(
    model: Any,
    neurons: NeuronSet | None = None,
    *,
    sites: str | None = None,
    seed: int = 0,
    name: str = "this model",
    log: Log | None = None,
) -> list[Check]:
    """Try out every guarantee on a loaded model.

    Args:
        model: a causal language model of transformers.
        neurons: of the model; a seeded random set of its shape by default.
        sites: where the units are in a family that is not known.
        seed: of the random set and of the token rows.
        name: of the model, for messages.
        log: shows progress.

    Returns:
        One check a guarantee, the architecture's first. A model whose units are not found has that one alone.

    Raises:
        NeuronSetError: if the set belongs to another model, or no language of it has neurons.
    """
    log = log or Log(show=False)
    model.eval()
    try:
        found = sites_of(model, sites)
    except ArchitectureError as error:
        return [Check("the units are found", False, "not found", "one site in each layer", str(error))]
    neurons = neurons or random_neurons(found.shape, model_type_of(model.config), seed)
    found = fitting_sites(model, neurons, sites=sites, name=name)
    bench = Bench(model, neurons, found, sites or neurons.provenance.sites or None, seed)
    where = f"{bench.path(found.layers[0].activation)}, {bench.path(found.layers[0].down)}, ..."
    kind = "gated" if found.gated else "plain"
    result = [Check("the units are found", True, f"{found.shape.layers} x {found.shape.units:,}", f"{kind} MLP", where)]
    wanted = list(_checks(bench))
    with log.bar("checking", len(wanted), "check") as bar:
        for title, check in wanted:
            result.append(_try(title, check))
            bar.update(1)
    return result


def _checks(bench: Bench) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """(what must hold, how to find out) in the order of the table."""
    digest = weights_digest(bench.model)
    _ = bench.languages  # says so at once where no language has neurons
    yield "activation and down modules run once a forward", partial(checks.runs_once, bench)
    yield "the MLP uses what its activation module returns", partial(checks.output_is_used, bench)
    yield "hooks fire once a forward, prefill and decode", partial(checks.fires_as_often, bench)
    yield "scale by 1 is bit-equal to no intervention", partial(checks.identity, bench, {"op": "scale", "factor": 1})
    yield "add of 0 is bit-equal to no intervention", partial(checks.identity, bench, {"op": "add", "factor": 0})
    yield "an empty set is bit-equal to no intervention", partial(checks.empty_set, bench)
    yield "a real intervention changes the logits", partial(checks.takes_place, bench)
    yield "activations follow the definition", partial(checks.edits_by_definition, bench, "activation")
    yield "products follow the definition", partial(checks.edits_by_definition, bench, "product")
    yield "only chosen units and layers change", partial(checks.nothing_else_changes, bench)
    for suffix, arguments in (("", checks.STRONG), (", live statistic", checks.LIVE)):
        yield f"a row beside other rows{suffix}", partial(checks.batch_composition, bench, arguments)
        yield f"a row in a larger batch{suffix}", partial(checks.batch_size, bench, arguments)
        yield f"left padding{suffix}", partial(checks.padding, bench, arguments, "left")
        yield f"right padding{suffix}", partial(checks.padding, bench, arguments, "right")
        yield f"prefill and decode equal one forward{suffix}", partial(checks.cache, bench, arguments)
    yield "detaching restores the model", partial(checks.detaching, bench)
    yield "two steerings one after another", partial(checks.one_after_another, bench)
    yield "hooks of others survive", partial(checks.foreign_hooks, bench)
    yield "the weights are untouched", partial(checks.weights_untouched, bench, digest)


def _try(title: str, check: Callable[[], Finding]) -> Check:
    """What a check finds; an error inside it, ours or the model's, is a failure and not the end of the table."""
    try:
        return Check(title, *check())
    except Exception as error:
        return Check(title, False, type(error).__name__, "no error", (str(error) or "no message").splitlines()[0])


def passed(found: Sequence[Check]) -> bool:
    """Whether every check did."""
    return all(check.passed for check in found)


# --- for people -----------------------------------------------------------------------------------------------------


def plain_text(found: Sequence[Check]) -> str:
    """Aligned columns without colours or lines, for a pipe; what explains a finding stands below it."""
    names = max(len(check.name) for check in found)
    numbers = max(len(check.found) for check in found)
    lines = []
    for check, detail in _said_once(found):
        mark = "pass" if check.passed else "FAIL"
        lines.append(f"{mark}  {check.name:<{names}}  {check.found:<{numbers}}  {check.expected}".rstrip())
        lines += textwrap.wrap(
            detail, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False
        )
    return "\n".join([*lines, summary(found)])


def _said_once(found: Sequence[Check]) -> Iterator[tuple[Check, str]]:
    """Each check with its detail; one broken module makes many fail with the same words, which are said once."""
    said = set()
    for check in found:
        yield check, "the same error as above" if check.detail in said else check.detail
        said.add(check.detail or None)


def rich_table(found: Sequence[Check]) -> Any:
    """The same as a table of rich, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "check", "found", "expected"):
        table.add_column(title, overflow="fold")
    for check, detail in _said_once(found):
        colour = "dim" if check.passed else "red"
        mark = "[green]pass[/green]" if check.passed else "[bold red]FAIL[/bold red]"
        below = f"\n[{colour}]{escape(detail)}[/{colour}]" if detail else ""
        table.add_row(mark, escape(check.name) + below, escape(check.found), escape(check.expected))
    return table


def summary(found: Sequence[Check]) -> str:
    """`25 checks passed`, or how many failed."""
    failed = sum(not check.passed for check in found)
    return f"{failed} of {len(found)} checks failed" if failed else f"{len(found)} checks passed"


def report(found: Sequence[Check], model: LazyModel, neurons: NeuronSet | None, seed: int) -> dict[str, Any]:
    """Everything that was found and on what, in values that JSON can hold."""
    return {
        "passed": passed(found),
        "checks": [vars(check) for check in found],
        "model": model.maker() | {"dtype": str(model.model.dtype), "device": str(model.model.device)},
        "neurons": neurons.content_hash() if neurons else {"random": True, "seed": seed},
        "versions": versions(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
    }
