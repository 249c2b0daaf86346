"""Commands that look at a model: record, select, calibrate, and all three in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_steering.cli import options

if TYPE_CHECKING:
    from lm_eval_steering.neurons.find import Method
    from lm_eval_steering.neurons.neuron_set import NeuronSet
    from lm_eval_steering.neurons.running import ModelRunner


@options.expanded
def find(
    model: options.ModelOptions,
    text: options.TextOptions,
    out: options.Out,
    selection: options.SelectionOptions,
    percentiles: options.Percentiles = options.NINE,
    residual: options.Residual = False,
    recording: Annotated[Path | None, typer.Option(help="Folder of the recording; by default OUT.recording.")] = None,
    batch_size: options.BatchSize = "auto",
    bos: options.Bos = options.BosKind.AUTO,
) -> None:
    """Find the language neurons of a model: record, select, calibrate. Run again, it does what is missing."""
    from lm_eval_steering.neurons.find import check_languages, find_with
    from lm_eval_steering.neurons.recorder import Recorder
    from lm_eval_steering.neurons.recording import RecordingFolder

    options.check_out(out, ".safetensors")
    method = selection.read(out)
    search = text.read(percentiles, residual)
    check_languages(search.languages)
    folder = recording or out.with_name(out.name.replace("-{rate}", "").replace("{rate}", "")).with_suffix(".recording")
    options.check_folder(folder, "--recording")
    runner = options.runner_of(model, batch_size, text.context, bos)
    neuron_sets = find_with(Recorder(runner, search, RecordingFolder(folder)), method)
    if runner.ranks.first:
        _write(neuron_sets, method, out, runner)


@options.expanded
def record(
    model: options.ModelOptions,
    text: options.TextOptions,
    out: Annotated[Path, typer.Option(help="Folder of the recording; a second run does what is missing.")],
    sentence_means: Annotated[
        bool, typer.Option(help="Keep what the methods activated and average-precision need.")
    ] = False,
    text_only: Annotated[bool, typer.Option(help="Read the text and stop: for a machine with internet.")] = False,
    batch_size: options.BatchSize = "auto",
    bos: options.Bos = options.BosKind.AUTO,
) -> None:
    """Count how often each unit is active in each language; several GPUs by accelerate launch -m lm_eval_steering."""
    from lm_eval_steering.neurons.recorder import Recorder
    from lm_eval_steering.neurons.recording import RecordingFolder

    options.check_folder(out)
    search = text.read()
    runner = options.runner_of(model, batch_size, text.context, bos)
    recorder = Recorder(runner, search, RecordingFolder(out))
    if text_only:
        recorder.prepare()
    else:
        recorder.record(sentence_means)
    if runner.ranks.first:
        runner.log.write(out / "record")
        typer.echo(f"wrote {out}")


@options.expanded
def select(
    recording: Annotated[Path, typer.Option(help="Folder of a recording.")],
    out: options.Out,
    selection: options.SelectionOptions,
    languages: Annotated[str | None, typer.Option(help="Codes joined by commas; all recorded ones by default.")] = None,
) -> None:
    """Select language neurons from a recording; no model is loaded. `calibrate` adds their statistics."""
    from lm_eval_steering.neurons import find
    from lm_eval_steering.neurons.recording import RecordingFolder

    options.check_out(out, ".safetensors")
    method = selection.read(out)
    codes = options.read_languages(languages) if languages else ()
    loaded = RecordingFolder(recording).load(codes, method.needs_sentences)
    _write(find.select(loaded, method), method, out)


@options.expanded
def calibrate(
    neurons: Annotated[Path, typer.Argument(help="Neuron set without statistics, or with others.")],
    model: options.ModelOptions,
    corpus: options.Corpus,
    out: options.OutFile,
    sentences: options.Sentences = 100,
    percentiles: options.Percentiles = options.NINE,
    residual: options.Residual = False,
    context: options.Context = None,
    batch_size: options.BatchSize = "auto",
    bos: options.Bos = options.BosKind.AUTO,
) -> None:
    """Measure the activations of a set's neurons, so that `value=mean`, `max`, `p90`, ... can be used.

    With --residual the hidden states too, so that site=residual can be used.
    """
    from lm_eval_steering.neurons.calibrate import calibrated
    from lm_eval_steering.neurons.neuron_set import NeuronSet
    from lm_eval_steering.neurons.recorder import Search

    options.check_out(out, ".safetensors")
    neuron_set = NeuronSet.load(neurons)
    kept = options.read_percentiles(percentiles)
    search = Search(corpus, neuron_set.languages, context=context, sentences=sentences, percentiles=kept)
    runner = options.runner_of(model, batch_size, context, bos)
    texts = search.calibration_texts(runner.model)
    (done,) = calibrated([neuron_set], runner, texts, search.corpora()[1].name, kept, residual)
    if runner.ranks.first:
        _report(done, out, runner, instead_of=neurons)


def _write(neuron_sets: Sequence[NeuronSet], method: Method, out: Path, runner: ModelRunner | None = None) -> None:
    for number, neuron_set in enumerate(neuron_sets):
        rate = str(method.rates[number]) if method.name == "lape" else method.name
        _report(neuron_set, out.with_name(out.name.replace("{rate}", rate)), runner)


def _report(neuron_set: NeuronSet, out: Path, runner: ModelRunner | None, instead_of: Path | None = None) -> None:
    """Write a set and its log, and print how many neurons each language has, and how well they tell them apart."""
    from lm_eval_steering.analysis.inspect import warning_of

    options.save_set(neuron_set, out, instead_of=instead_of)
    if runner is not None:
        runner.log.write(out)
    for code in neuron_set.languages:
        typer.echo(f"{code}  {len(neuron_set.neurons(code))} neurons")
    if warning := warning_of(neuron_set):
        typer.echo(warning, err=True)
    typer.echo(f"wrote {out}")
