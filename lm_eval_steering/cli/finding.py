"""Verbs that look at a model: record, select, calibrate, and all three in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_steering.cli import options

if TYPE_CHECKING:
    from lm_eval_steering.architectures.loading import LazyModel
    from lm_eval_steering.neurons.find import Method
    from lm_eval_steering.neurons.neuron_set import NeuronSet
    from lm_eval_steering.neurons.recorder import Recorder, Search
    from lm_eval_steering.neurons.runner import ModelRunner

Recording = Annotated[Path, typer.Option(help="Folder of a recording.")]


def find(
    model: options.Model,
    corpus: options.Text,
    languages: options.Languages,
    out: options.Out,
    method: options.SelectionMethod = options.MethodName.LAPE,
    rate: options.Rate = "0.01",
    filter_rate: options.FilterRate = 0.95,
    bar_rate: options.BarRate = 0.95,
    top_k: options.TopK = None,
    bottom_k: options.BottomK = None,
    threshold: options.Threshold = None,
    tokens: options.Budget = None,
    rows: options.Rows = options.RowKind.PACKED,
    context: options.Context = None,
    calibration_corpus: options.Calibration = None,
    sentences: options.Sentences = 100,
    percentiles: options.Percentiles = options.NINE,
    recording: Annotated[Path | None, typer.Option(help="Folder of the recording; by default OUT.recording.")] = None,
    batch_size: options.BatchSize = "16",
    revision: options.Revision = "main",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    sites: options.Sites = None,
) -> None:
    """Find the language neurons of a model: record, select, calibrate. Run again, it does what is missing."""
    from lm_eval_steering.neurons.find import check_languages, find_neurons

    options.check_out(out, ".safetensors")
    chosen = _method(method, rate, out, filter_rate, bar_rate, top_k, bottom_k, threshold)
    search = _search(corpus, languages, tokens, rows, context, calibration_corpus, sentences, percentiles)
    check_languages(search.languages)
    folder = recording or out.with_name(out.name.replace("-{rate}", "").replace("{rate}", "")).with_suffix(".recording")
    options.check_folder(folder)
    lazy = _model(model, revision, device, device_map, dtype, trust_remote_code, sites)
    recorder = _recorder(_runner(lazy, batch_size, context), search, folder)
    found = find_neurons(recorder, chosen)
    if recorder.ranks.first:
        _write(found, chosen, out, recorder.runner)


def record(
    model: options.Model,
    corpus: options.Text,
    languages: options.Languages,
    out: Annotated[Path, typer.Option(help="Folder of the recording; a second run does what is missing.")],
    tokens: options.Budget = None,
    rows: options.Rows = options.RowKind.PACKED,
    context: options.Context = None,
    calibration_corpus: options.Calibration = None,
    sentences: options.Sentences = 100,
    sentence_means: options.SentenceMeans = False,
    text_only: Annotated[bool, typer.Option(help="Read the text and stop: for a machine with internet.")] = False,
    batch_size: options.BatchSize = "16",
    revision: options.Revision = "main",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    sites: options.Sites = None,
) -> None:
    """Count how often each unit is active in each language; several GPUs by accelerate launch -m lm_eval_steering."""
    options.check_folder(out)
    search = _search(corpus, languages, tokens, rows, context, calibration_corpus, sentences)
    lazy = _model(model, revision, device, device_map, dtype, trust_remote_code, sites)
    recorder = _recorder(_runner(lazy, batch_size, context), search, out)
    if text_only:
        recorder.prepare()
    else:
        recorder.record(sentence_means)
    if recorder.ranks.first:
        recorder.log.write(out / "record")
        typer.echo(f"wrote {out}")


def select(
    recording: Recording,
    out: options.Out,
    languages: Annotated[str | None, typer.Option(help="Codes joined by commas; all recorded ones by default.")] = None,
    method: options.SelectionMethod = options.MethodName.LAPE,
    rate: options.Rate = "0.01",
    filter_rate: options.FilterRate = 0.95,
    bar_rate: options.BarRate = 0.95,
    top_k: options.TopK = None,
    bottom_k: options.BottomK = None,
    threshold: options.Threshold = None,
) -> None:
    """Select language neurons from a recording; no model is loaded. `calibrate` adds their statistics."""
    from lm_eval_steering.neurons.find import select_neurons
    from lm_eval_steering.neurons.recording import RecordingFolder

    options.check_out(out, ".safetensors")
    chosen = _method(method, rate, out, filter_rate, bar_rate, top_k, bottom_k, threshold)
    codes = options.read_languages(languages) if languages else ()
    loaded = RecordingFolder(recording).load(codes, chosen.needs_sentences)
    _write(select_neurons(loaded, chosen), chosen, out)


def calibrate(
    neurons: Annotated[Path, typer.Argument(help="Neuron set without statistics, or with others.")],
    model: options.Model,
    corpus: options.Text,
    out: options.OutFile,
    sentences: options.Sentences = 100,
    percentiles: options.Percentiles = options.NINE,
    context: options.Context = None,
    batch_size: options.BatchSize = "16",
    revision: options.Revision = "main",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    sites: options.Sites = None,
) -> None:
    """Measure the activations of a set's neurons, so that `value=mean`, `max`, `p90`, ... can be used."""
    from lm_eval_steering.neurons.calibrate import calibrated
    from lm_eval_steering.neurons.neuron_set import NeuronSet
    from lm_eval_steering.neurons.recorder import Search
    from lm_eval_steering.resources import find_neuron_set

    options.check_out(out, ".safetensors")
    found = NeuronSet.load(find_neuron_set(neurons))
    kept = options.read_percentiles(percentiles)
    search = Search(corpus, found.languages, context=context, sentences=sentences, percentiles=kept)
    lazy = _model(model, revision, device, device_map, dtype, trust_remote_code, sites)
    runner = _runner(lazy, batch_size, context)
    texts = search.calibration_texts(runner.model)
    (done,) = calibrated([found], runner, texts, search.corpora()[1].name, kept)
    if runner.ranks.first:
        _report(done, out, runner)


def _method(
    name: options.MethodName,
    rate: str,
    out: Path,
    filter_rate: float,
    bar_rate: float,
    top_k: int | None,
    bottom_k: int | None,
    threshold: float | None,
) -> Method:
    from lm_eval_steering.neurons.find import Method

    rates = options.read_rates(rate, out)
    return Method(name.value, rates, filter_rate, bar_rate, top_k, bottom_k, threshold)


def _search(
    corpus: str,
    languages: str,
    tokens: str | None,
    rows: options.RowKind,
    context: int | None,
    calibration_corpus: str | None,
    sentences: int,
    percentiles: str = options.NINE,
) -> Search:
    from lm_eval_steering.neurons.recorder import Search

    codes = options.read_languages(languages)
    budget = options.read_budget(tokens)
    return Search(
        corpus, codes, budget, rows.value, context, calibration_corpus, sentences, options.read_percentiles(percentiles)
    )


def _model(
    name: str,
    revision: str,
    device: str | None,
    device_map: str | None,
    dtype: str,
    trust_remote_code: bool,
    sites: str | None,
) -> LazyModel:
    """The model's config is read here; its weights are not."""
    from lm_eval_steering.architectures.loading import LazyModel
    from lm_eval_steering.neurons.running import launched

    return LazyModel(name, revision, dtype, device or launched()[1], sites, device_map, trust_remote_code)


def _runner(model: LazyModel, batch_size: str, context: int | None) -> ModelRunner:
    from lm_eval_steering.neurons.runner import CONTEXT, ModelRunner
    from lm_eval_steering.neurons.running import launched
    from lm_eval_steering.progress import Log

    ranks = launched()[0]
    return ModelRunner(model, options.read_batch_size(batch_size), ranks, Log(show=ranks.first), context or CONTEXT)


def _recorder(runner: ModelRunner, search: Search, folder: Path) -> Recorder:
    from lm_eval_steering.neurons.recorder import Recorder
    from lm_eval_steering.neurons.recording import RecordingFolder

    return Recorder(runner, search, RecordingFolder(folder))


def _write(found: Sequence[NeuronSet], method: Method, out: Path, runner: ModelRunner | None = None) -> None:
    for number, neuron_set in enumerate(found):
        rate = str(method.rates[number]) if method.name == "lape" else method.name
        _report(neuron_set, out.with_name(out.name.replace("{rate}", rate)), runner)


def _report(neuron_set: NeuronSet, out: Path, runner: ModelRunner | None) -> None:
    """Write a set and its log, and say how many neurons each language has."""
    neuron_set.save(out)
    if runner is not None:
        runner.log.write(out)
    for code in neuron_set.languages:
        typer.echo(f"{code}  {len(neuron_set.neurons(code))} neurons")
    typer.echo(f"wrote {out}")
