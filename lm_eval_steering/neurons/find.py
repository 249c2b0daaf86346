"""From a recording to neuron sets, and from text to neuron sets in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.languages import normalise
from lm_eval_steering.neurons.calibrate import PERCENTILES, calibrated
from lm_eval_steering.neurons.neuron_set import Neurons, NeuronSet
from lm_eval_steering.neurons.recorder import Recorder, Search
from lm_eval_steering.neurons.recording import Recording, RecordingFolder
from lm_eval_steering.neurons.rows import SENTENCES
from lm_eval_steering.neurons.running import CONTEXT, ModelRunner
from lm_eval_steering.neurons.select import Selection, activated, average_precision, check_rate, lape_rates
from lm_eval_steering.neurons.set_algebra import random_control, random_directions
from lm_eval_steering.progress import Log
from lm_eval_steering.provenance import versions


@dataclass(frozen=True)
class Method:
    """How neurons are chosen from a recording, and its numbers.

    Attributes:
        name: `lape`, `activated` or `average-precision`.
        rates: of LAPE, shares of all neurons; one neuron set per rate.
        filter_rate: of LAPE, which smallest probability is the threshold of eligibility.
        bar_rate: of LAPE, the same for membership.
        top_k: of the other methods, neurons per language.
        bottom_k: of average precision, neurons per language from the other end.
        threshold: of average precision, instead of `top_k`.
    """

    name: Literal["lape", "activated", "average-precision"] = "lape"
    rates: tuple[float, ...] = (0.01,)
    filter_rate: float = 0.95
    bar_rate: float = 0.95
    top_k: int | None = None
    bottom_k: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        for rate in self.rates:
            check_rate("rate", rate)
        if len(set(self.rates)) != len(self.rates):
            raise SteeringError(f"rates {', '.join(map(str, self.rates))}: expected each rate once")
        self._check_method()
        check_rate("filter_rate", self.filter_rate)
        check_rate("bar_rate", self.bar_rate)

    def _check_method(self) -> None:
        if self.name == "lape" and (self.top_k, self.bottom_k, self.threshold) != (None, None, None):
            raise SteeringError("method lape takes rate; top-k, bottom-k and threshold belong to the other methods")
        if self.name == "activated" and (self.bottom_k, self.threshold) != (None, None):
            raise SteeringError("method activated takes top-k; bottom-k and threshold belong to average-precision")
        ks = [k for k in (self.top_k, self.bottom_k) if k is not None]
        if self.name == "average-precision" and bool(ks) == (self.threshold is not None):
            raise SteeringError("method average-precision takes top-k, bottom-k, both, or threshold alone")
        if any(k < 1 for k in ks):
            raise SteeringError(f"top-k and bottom-k are numbers of neurons, expected 1 at least, got {min(ks)}")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise SteeringError(f"threshold={self.threshold}: expected a number from 0 to below 1")

    @property
    def needs_sentences(self) -> bool:
        """Whether it needs the means of each calibration sentence."""
        return self.name != "lape"

    def __call__(self, recording: Recording) -> list[Selection]:
        """What it selects; for LAPE one selection per rate."""
        if self.name == "lape":
            return lape_rates(recording.counts, recording.n_tokens, self.rates, self.filter_rate, self.bar_rate)
        if self.name == "activated":
            return [activated(recording.sentence_means, self.top_k)]
        return [
            average_precision(
                recording.sentence_means, top_k=self.top_k, bottom_k=self.bottom_k, threshold=self.threshold
            )
        ]


def select(recording: Recording | Path | str, method: Method | None = None) -> list[NeuronSet]:
    """Neuron sets from a recording, without statistics yet: one for each rate of LAPE, else one.

    Args:
        recording: as it was loaded, or its folder.
        method: LAPE at rate 0.01 by default.

    Raises:
        SteeringError: if there are fewer than two languages, or the method's numbers do not fit.
        RecordingError: if the folder holds no recording, or one that is not whole.
    """
    method = method or Method()
    if not isinstance(recording, Recording):
        recording = RecordingFolder(recording).load((), method.needs_sentences)
    check_languages(recording.languages)
    widths = recording.provenance.widths
    return [
        NeuronSet(
            recording.languages,
            dict(zip(recording.languages, _by_layer(selection.neurons, widths), strict=True)),
            replace(
                recording.provenance,
                selection=_with_codes(selection.numbers, recording.languages),
                versions=versions(evaluation=False),
            ),
        )
        for selection in method(_as_one_layer(recording) if widths else recording)
    ]


def _as_one_layer(recording: Recording) -> Recording:
    """The recording of layers that differ in width with all of their units one after another, in one layer.

    Selection ranks neurons and breaks ties by (layer, unit), which is their order here; what is no unit is left out.
    """
    units = recording.provenance.units
    real = np.concatenate([np.arange(width) + layer * units for layer, width in enumerate(recording.provenance.widths)])
    counts = recording.counts.reshape(-1, len(recording.languages))[real]
    means = [table.reshape(len(table), 1, -1)[:, :, real] for table in recording.sentence_means]
    return replace(recording, counts=counts[np.newaxis], sentence_means=means)


def _by_layer(lists: Sequence[Neurons], widths: Sequence[int]) -> Sequence[Neurons]:
    """Neurons of `_as_one_layer` as rows (layer, unit)."""
    if not widths:
        return lists
    begins = np.cumsum([0, *widths])
    layers = [np.searchsorted(begins, neurons[:, 1], side="right") - 1 for neurons in lists]
    return [
        np.column_stack([layer, neurons[:, 1] - begins[layer]]).astype(np.int64)
        for layer, neurons in zip(layers, lists, strict=True)
    ]


def _with_codes(numbers: Mapping[str, Any], languages: Sequence[str]) -> dict[str, Any]:
    """Selection numbers the languages; a set names their codes."""
    return {**numbers, "languages_without_neurons": [languages[k] for k in numbers["languages_without_neurons"]]}


def check_languages(languages: Sequence[str]) -> None:
    """Raise SteeringError for fewer than two languages."""
    if len(languages) < 2:
        raise SteeringError("language neurons differ between languages: name at least two languages")


def find_neurons(
    model: str | Path,
    corpus: str | Path,
    languages: Sequence[str],
    recording: str | Path,
    method: Method | None = None,
    *,
    tokens: int | None = None,
    rows: Literal["packed", "sentences"] = "packed",
    context: int | None = None,
    calibration_corpus: str | None = None,
    sentences: int = SENTENCES,
    percentiles: Sequence[int] = PERCENTILES,
    residual: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    batch_size: int | None = None,
    show_progress: bool = True,
) -> list[NeuronSet]:
    """Find the language neurons of a model, as the command `find` does: record, select, calibrate at both sites.

    Args:
        model: hub id or folder.
        corpus: folder with text in `fra_Latn.txt`, ..., or a dataset of the hub (docs/corpora.md).
        languages: codes, two at least.
        recording: folder; a second call with the same settings does what is missing in it.
        method: LAPE at rate 0.01 by default.
        tokens: budget per language; all of the text by default.
        rows: `packed` windows of the context length, or one row per line (`sentences`).
        context: tokens per row; the smaller of 2,048 and the model's own length by default.
        calibration_corpus: where the sentences to calibrate with are; by default the lines of `corpus`.
        sentences: their number per language.
        percentiles: which `pNN` to keep.
        residual: whether the hidden states are measured too, for site=residual.
        dtype: of the weights; the checkpoint's by default.
        device: a GPU by default where there is one.
        batch_size: rows per forward pass; None takes what suits the device.
        show_progress: whether bars and times are printed.

    Returns:
        One neuron set for each rate of LAPE, else one; `NeuronSet.save` writes it.

    Raises:
        CorpusError: if the text of a language is missing or empty.
        RecordingError: if the folder holds a recording with other settings.
        SteeringError: if the model, a language or a number is not what is expected.
    """
    search = Search(
        str(corpus), tuple(map(normalise, languages)), tokens, rows, context, calibration_corpus, sentences,
        tuple(percentiles), residual,
    )  # fmt: skip
    check_languages(search.languages)
    loaded = LazyModel(str(model), dtype=dtype, device=device)
    runner = ModelRunner(loaded, batch_size, log=Log(show=show_progress), longest=context or CONTEXT)
    return find_with(Recorder(runner, search, RecordingFolder(recording)), method)


def find_with(recorder: Recorder, method: Method | None = None) -> list[NeuronSet]:
    """Record what is missing, select, and calibrate the chosen neurons at both sites.

    Raises:
        CorpusError: if the text of a language is missing or empty.
        RecordingError: if the folder holds a recording with other settings.
    """
    method = method or Method()
    check_languages(recorder.search.languages)
    recorded = recorder.record(method.needs_sentences)
    with recorder.log.timed("select", method=method.name):
        neuron_sets = select(recorded, method)
    return _calibrated(neuron_sets, recorder, recorder.search.residual)


def control_sets(neuron_set: NeuronSet, recorder: Recorder, seeds: Sequence[int]) -> list[NeuronSet]:
    """Matched random sets: as many neurons in each layer for each language, calibrated on the same sentences.

    Args:
        neuron_set: the set to match.
        recorder: of its model and text.
        seeds: one per control.
    """
    draws = [random_set(neuron_set, seed) for seed in seeds]
    return _calibrated(draws, recorder, residual=False)


def _calibrated(neuron_sets: Sequence[NeuronSet], recorder: Recorder, residual: bool) -> list[NeuronSet]:
    search = recorder.search
    source = search.corpora()[1].name
    texts = recorder.sentences()
    return calibrated(neuron_sets, recorder.runner, texts, source, search.percentiles, residual)


def random_set(neuron_set: NeuronSet, seed: int, disjoint: bool = True) -> NeuronSet:
    """A random set that matches another in size, layer by layer, without statistics of its neurons yet.

    Its mean hidden states are the set's with random directions between the languages (`random_directions`): they need
    no measurement.

    Args:
        neuron_set: the set to match.
        seed: of the draw.
        disjoint: whether the set's own neurons, of all languages, are left out.
    """
    widths = neuron_set.provenance.widths or [neuron_set.provenance.units] * neuron_set.provenance.layers
    return replace(
        neuron_set,
        assignments=random_control(neuron_set.assignments, widths, seed, disjoint),
        calibrated=None,
        residual=random_directions(neuron_set.residual, seed),
        provenance=replace(
            neuron_set.provenance,
            corpus={key: value for key, value in neuron_set.provenance.corpus.items() if key != "calibration"},
            selection={
                "method": "random",
                "seed": seed,
                "disjoint": disjoint,
                "matched_to": neuron_set.content_hash(),
            },
        ),
    )
