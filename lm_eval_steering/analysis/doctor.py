"""`doctor`: checks every guarantee that can be checked on one model."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lm_eval_steering.analysis import checks
from lm_eval_steering.analysis.checks import Bench, Check, PlannedCheck, random_neurons, results_of
from lm_eval_steering.architectures import model_type_of, sites_of
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.architectures.weights import weights_digest, weights_sketch
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.neurons.neuron_set import NeuronSet, neuron_set_of
from lm_eval_steering.progress import Log
from lm_eval_steering.provenance import versions
from lm_eval_steering.steering.attach import fitting_sites
from lm_eval_steering.steering.intervention import RESIDUAL

_WIDTH = 100  # columns of plain text


def examine(
    model: Any,
    neurons: NeuronSet | str | Path | None = None,
    *,
    sites: str | None = None,
    seed: int = 0,
    name: str = "this model",
    force: bool = False,
    log: Log | None = None,
) -> list[Check]:
    """Check every guarantee on a loaded model.

    Args:
        model: a causal language model of transformers.
        neurons: of the model, or its file; a seeded random set of its shape by default.
        sites: the modules of the units, for a family that is not in the table (`docs/architectures.md`).
        seed: of the random set and of the token rows.
        name: of the model, for messages.
        force: accept a set that was found in other weights.
        log: of progress.

    Returns:
        One check per guarantee, the architecture's first; that one alone if the model's units are not found.

    Raises:
        NeuronSetError: if the set belongs to another model, or no language of it has neurons.
    """
    log = log or Log(show=False)
    model.eval()
    try:
        model_sites = sites_of(model, sites)
    except ArchitectureError as error:
        return [Check("the units are found", False, "not found", "one site in each layer", str(error))]
    if neurons is None:
        neurons = random_neurons(model_sites.shape, model_type_of(model.config), seed, weights_sketch(model))
    neurons = neuron_set_of(neurons)
    model_sites = fitting_sites(model, neurons, sites=sites, force=force, name=name)
    bench = Bench(model, neurons, model_sites, sites or neurons.provenance.sites or None, seed)
    first, shape = model_sites.layers[0], model_sites.shape
    kind = "gated MLP" if model_sites.gated else "plain MLP"
    paths = f"{bench.path(first.activation)}, {bench.path(first.down)}, ..."
    units = Check("the units are found", True, f"{shape.layers} x {shape.units:,}", kind, paths)
    return [units, *results_of(list(_checks(bench)), log)]


def _checks(bench: Bench) -> Iterator[PlannedCheck]:
    """In the order of the table."""
    digest = weights_digest(bench.model)
    _ = bench.languages  # raises if no language has neurons
    yield "layers and their modules run once a forward", partial(checks.runs_once, bench)
    yield "the MLP uses what its activation module returns", partial(checks.output_is_used, bench)
    yield "hooks fire once a forward, prefill and decode", partial(checks.fires_as_often, bench)
    yield "scale by 1 is bit-equal to no intervention", partial(checks.identity, bench, {"op": "scale", "factor": 1})
    yield "add of 0 is bit-equal to no intervention", partial(checks.identity, bench, {"op": "add", "factor": 0})
    yield "an empty set is bit-equal to no intervention", partial(checks.empty_set, bench)
    yield "a real intervention changes the logits", partial(checks.takes_place, bench)
    yield "activations follow the definition", partial(checks.edits_by_definition, bench, "activation")
    yield "products follow the definition", partial(checks.edits_by_definition, bench, "product")
    yield "hidden states follow the definition", partial(checks.edits_by_definition, bench, RESIDUAL)
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


def passed(results: Sequence[Check]) -> bool:
    """Whether every check passed."""
    return all(check.passed for check in results)


# --- Results as text, as a table and as JSON


def plain_text(results: Sequence[Check]) -> str:
    """Aligned columns without colours, for a pipe; each detail is below its check."""
    names = max(len(check.name) for check in results)
    numbers = max(len(check.found) for check in results)
    lines = []
    for check, detail in _with_details(results):
        mark = "pass" if check.passed else "FAIL"
        lines.append(f"{mark}  {check.name:<{names}}  {check.found:<{numbers}}  {check.expected}".rstrip())
        lines += textwrap.wrap(
            detail, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False
        )
    return "\n".join([*lines, summary(results)])


def _with_details(results: Sequence[Check]) -> Iterator[tuple[Check, str]]:
    """Each check with its detail, which is shown once if one cause makes several checks fail."""
    shown = set()
    for check in results:
        yield check, "the same error as above" if check.detail in shown else check.detail
        shown.add(check.detail or None)


def rich_table(results: Sequence[Check]) -> Any:
    """The same as a table of rich, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "check", "found", "expected"):
        table.add_column(title, overflow="fold")
    for check, detail in _with_details(results):
        colour = "dim" if check.passed else "red"
        mark = "[green]pass[/green]" if check.passed else "[bold red]FAIL[/bold red]"
        below = f"\n[{colour}]{escape(detail)}[/{colour}]" if detail else ""
        table.add_row(mark, escape(check.name) + below, escape(check.found), escape(check.expected))
    return table


def summary(results: Sequence[Check]) -> str:
    """`25 checks passed`, or how many failed."""
    failed = sum(not check.passed for check in results)
    return f"{failed} of {len(results)} checks failed" if failed else f"{len(results)} checks passed"


def report(results: Sequence[Check], model: LazyModel, neurons: NeuronSet | None, seed: int) -> dict[str, Any]:
    """All results with model, neuron set, versions and machine, in values that JSON can hold."""
    return {
        "passed": passed(results),
        "checks": [vars(check) for check in results],
        "model": model.maker() | {"dtype": str(model.model.dtype), "device": str(model.model.device)},
        "neurons": neurons.content_hash() if neurons else {"random": True, "seed": seed},
        "versions": versions(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
    }
