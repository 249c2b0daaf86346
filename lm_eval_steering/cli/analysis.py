"""Verbs that try a model out: doctor, stepwise, logit-lens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_steering.cli import options
from lm_eval_steering.errors import SteeringError

if TYPE_CHECKING:
    from lm_eval_steering.architectures.loading import LazyModel
    from lm_eval_steering.metrics.language_id import LanguageIdentifier
    from lm_eval_steering.neurons.neuron_set import NeuronSet


class PositionKind(StrEnum):
    """Which positions of a prompt the logit lens looks at."""

    LAST = "last"
    ALL = "all"


class EngineName(StrEnum):
    """What runs the model."""

    HF = "hf"
    VLLM = "vllm"


Prompts = Annotated[
    Path | None,
    typer.Option(help="Text file, one prompt per line; for the demo model the demo's sentences."),
]
Folder = Annotated[Path, typer.Option(help="Folder for tables, pictures and provenance.")]
Rows = Annotated[int, typer.Option(min=1, help="Prompts a batch.")]
Lid = Annotated[
    str, typer.Option(help="Language identifier: lid.176, glotlid, openlid-v2, lid218e, or a fastText file.")
]
Threshold = Annotated[float, typer.Option(help="Smallest probability of a language; less is `unknown`.")]
Letters = Annotated[int, typer.Option(help="Smallest number of letters of a text; less is `unknown`.")]


@options.expanded
def doctor(
    model: options.ModelOptions,
    neurons: Annotated[
        Path | None, typer.Option(help="Neuron set of the model; a seeded random one by default.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="`vllm` tries out steered-vllm; its arguments are those of --model-args.")
    ] = EngineName.HF,
    json: Annotated[Path | None, typer.Option(help="File for the checks as JSON.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random set and of the tokens.")] = 0,
    force: options.Force = False,
) -> None:
    """Check on your model every guarantee that can be checked. Exit code 1 if one does not hold."""
    from lm_eval_steering.analysis.doctor import examine, passed, plain_text, report, rich_table, summary
    from lm_eval_steering.files import write_json
    from lm_eval_steering.progress import Log

    if json is not None:
        options.check_out(json)
    neuron_set = _neurons(neurons)
    if engine is EngineName.VLLM:
        from lm_eval_steering.analysis.doctor_vllm import engine_report, examine_engine

        arguments = {"revision": model.revision, "trust_remote_code": model.trust_remote_code, "dtype": model.dtype}
        arguments |= ({"force": True} if force else {}) | options.read_model_arguments(model.model_args)
        checks = examine_engine(model.model, arguments, neuron_set, seed=seed, log=Log())
        record = partial(engine_report, checks, model.model, arguments, neuron_set, seed)
    else:
        lazy = _model(model, neuron_set, force)
        checks = examine(lazy.model, neuron_set, sites=model.sites, seed=seed, name=lazy.name, force=force, log=Log())
        record = partial(report, checks, lazy, neuron_set, seed)
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        console.print(rich_table(checks))
        console.print(summary(checks), style="green" if passed(checks) else "bold red", highlight=False)
    else:
        typer.echo(plain_text(checks))
    if json is not None:
        write_json(json, record())
    if not passed(checks):
        raise typer.Exit(1)


@options.expanded
def stepwise(
    model: options.ModelOptions,
    neurons: options.Neurons,
    out: Folder,
    prompts: Prompts = None,
    order: Annotated[
        str | None, typer.Option(help="Codes joined by commas, first to go first; the set's order by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate a prompt at most.")] = 64,
    batch_size: Rows = 16,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="The model may not end before so many.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text before which an output is cut; repeatable.")] = None,
    lid: Lid = "lid.176",
    lid_threshold: Threshold = 0.5,
    lid_letters: Letters = 3,
    force: options.Force = False,
) -> None:
    """Deactivate languages one after another, and see which language the model answers in after each step."""
    from lm_eval_steering.analysis.prompts import read_prompts
    from lm_eval_steering.analysis.run_record import signature_of
    from lm_eval_steering.analysis.stepwise import Decoding, deactivate_stepwise, order_of, table, write
    from lm_eval_steering.progress import Log

    options.check_folder(out)
    neuron_set = _load(neurons)
    languages, left_out = order_of(neuron_set, order)
    signature_of({"deactivate": "+".join(languages)}, neuron_set)
    texts = read_prompts(prompts, model.model, languages)
    identifier = _identifier(lid, lid_threshold, lid_letters, languages)
    lazy, log = _model(model, neuron_set, force), Log()
    if left_out:
        log.say(f"left out, as they have no neurons: {', '.join(left_out)}")
    decoding = Decoding(max_new_tokens, batch_size, tuple(stop or ()), min_new_tokens)
    steps = deactivate_stepwise(lazy, neuron_set, texts, languages, decoding, identifier, log, force)
    typer.echo(table(steps))
    for path in write(steps, out):
        typer.echo(f"wrote {path}")
    log.write(out / "stepwise")


@options.expanded
def logit_lens(
    model: options.ModelOptions,
    out: Folder,
    neurons: Annotated[
        Path | None, typer.Option(help="Neuron set, to steer with; a path or the name of one that ships.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Steer to it; several joined by +.")] = None,
    op: Annotated[str | None, typer.Option(help="scale, add or set.")] = None,
    value: Annotated[str | None, typer.Option(help="A number, or a statistic of the set.")] = None,
    factor: Annotated[float | None, typer.Option(help="How much.")] = None,
    site: Annotated[str | None, typer.Option(help="activation, product or residual.")] = None,
    layers: Annotated[str | None, typer.Option(help="Ranges such as 0-3+28-31.")] = None,
    deactivate: Annotated[str | None, typer.Option(help="Languages to set to 0, joined by +, or others.")] = None,
    target: Annotated[str | None, typer.Option(help="Whose mass to draw; the steered languages by default.")] = None,
    prompts: Prompts = None,
    positions: Annotated[PositionKind, typer.Option(help="The last of each prompt, or all.")] = PositionKind.LAST,
    top_k: Annotated[int | None, typer.Option(min=1, help="Most probable tokens to read; 5 by default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Or the fewest that hold this mass; 1 is all of them.")] = None,
    batch_size: Rows = 16,
    lid: Lid = "lid.176",
    lid_threshold: Threshold = 0.5,
    lid_letters: Letters = 3,
    force: options.Force = False,
) -> None:
    """How much probability each layer gives to each language, unsteered and, with an intervention, steered."""
    from lm_eval_steering.analysis.logit_lens import LensSettings, run_lens, table, write
    from lm_eval_steering.analysis.prompts import read_prompts
    from lm_eval_steering.analysis.run_record import signature_of
    from lm_eval_steering.progress import Log

    options.check_folder(out)
    given = {
        "language": language, "op": op, "value": value, "factor": factor, "site": site, "layers": layers,
        "deactivate": deactivate,
    }  # fmt: skip
    intervention = {name: text for name, text in given.items() if text is not None}
    neuron_set = _neurons(neurons)
    if intervention and neuron_set is None:
        raise SteeringError(f"--{next(iter(intervention))} without --neurons: whose neurons? name the model's set")
    signature_of(intervention, neuron_set)
    targets = _targets(target or language, neuron_set)
    settings = LensSettings(positions.value, top_k if top_k or top_p else 5, top_p, batch_size)
    # Prompts in the target itself would give it mass without any steering.
    texts = read_prompts(prompts, model.model, ["deu_Latn" if "eng_Latn" in targets else "eng_Latn"], clauses=True)
    identifier = _identifier(lid, lid_threshold, lid_letters, targets)
    lazy, log = _model(model, neuron_set, force), Log()
    lens = run_lens(lazy, texts, targets, neuron_set, intervention, settings, identifier, log, force)
    typer.echo(table(lens))
    for path in write(lens, out):
        typer.echo(f"wrote {path}")
    log.write(out / "logit-lens")


# --- Shared by the commands


def _load(path: Path) -> NeuronSet:
    from lm_eval_steering.neurons.neuron_set import NeuronSet

    return NeuronSet.load(path)


def _neurons(path: Path | None) -> NeuronSet | None:
    return None if path is None else _load(path)


def _model(options_of_model: options.ModelOptions, neurons: NeuronSet | None, force: bool = False) -> LazyModel:
    """The model's config is read here and compared with the set; its weights are not read.

    Raises:
        SteeringError: if there is no such model, or the set is of another one.
    """
    lazy = options_of_model.load()
    if neurons is not None:
        neurons.check_model(lazy.shape.layers, lazy.shape.units, lazy.architecture, force, lazy.shape.widths)
    return lazy


def _identifier(name: str, threshold: float, letters: int, languages: Sequence[str]) -> LanguageIdentifier:
    """Loaded, so that what is wrong with it is said before the model is loaded.

    Raises:
        SteeringError: if there is none of this name, or it cannot answer one of the languages.
    """
    from lm_eval_steering.metrics.language_id import LanguageIdentifier

    identifier = LanguageIdentifier.named(name, threshold, letters)
    identifier.refuse_unknown(languages)
    return identifier


def _targets(text: str | None, neurons: NeuronSet | None) -> tuple[str, ...]:
    """Codes from `fra_Latn+ita_Latn`.

    Raises:
        SteeringError: if there is none.
    """
    from lm_eval_steering.languages import normalise

    if not text:
        known = f"; the set has {', '.join(neurons.languages)}" if neurons else ""
        raise SteeringError(f"--target is missing: say whose mass to draw, such as fra_Latn{known}")
    return tuple(dict.fromkeys(normalise(code) for code in text.split("+")))
