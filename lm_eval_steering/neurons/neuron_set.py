"""The neuron set: for each language its neurons, with the statistics and the provenance that belong to them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering import files, languages
from lm_eval_steering.architectures import shape_text
from lm_eval_steering.architectures.weights import difference, same_weights
from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.resources import find_neuron_set

SITES = ("activation", "product")  # of MLP units
_KIND = "neuron set"
# Median relative difference of the sampled weights that differ: 0.06 to 0.07 for weights of 4 to 8 bits (Q4_K_M of
# Gemma-3-270m) against values drawn within their rounding error; above 0.9 for two unrelated models.
_QUANTISED = 0.25
_NEWEST = 3  # format version; 1 has neither widths by layer nor a residual stream, 3 keeps neurons as uint16 or uint32
_log = logging.getLogger("lm_eval.steering")

Neurons = NDArray[np.int64]  # (neuron, 2): sorted rows of (layer, unit)


@dataclass(frozen=True)
class Provenance:
    """Which model the neurons belong to, and how they were found.

    Attributes:
        model: hub id, or the name of the folder that it was loaded from.
        revision: commit of the hub, empty for a folder.
        architecture: `model_type` of transformers.
        layers: number of decoder layers.
        units: MLP units per layer, of the widest where they differ.
        widths: units of each layer where they differ, else empty; kept by format version 2.
        activation_function: its name in the model's config; empty where the config has none.
        sites: where the units are, if that was given (`architectures.sites_of`); usually empty.
        dtype: that the activations were recorded in.
        tokenizer: SHA-256 over the tokenizer.
        weights: a sketch of the weights (`architectures.weights.weights_sketch`); empty where it is unknown.
        selection: the method's name and its numbers.
        corpus: what was read: source, hash of the text, tokens per language.
        versions: of the libraries.
    """

    model: str
    revision: str
    architecture: str
    layers: int
    units: int
    activation_function: str = ""
    sites: str = ""
    dtype: str = ""
    tokenizer: str = ""
    weights: Sequence[float] = ()
    selection: Mapping[str, Any] = field(default_factory=dict)
    corpus: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    widths: Sequence[int] = ()


@dataclass(frozen=True)
class Statistics:
    """Calibrated activations of some neurons, for every language, at both sites.

    Attributes:
        neurons: (neuron, 2) sorted rows of (layer, unit): the union over languages.
        languages: order of the last axis of `values`.
        values: site -> statistic -> (neuron, language) float32, in units of the activation.
    """

    neurons: Neurons
    languages: tuple[str, ...]
    values: Mapping[str, Mapping[str, NDArray[np.float32]]]

    def lookup(self, neurons: Neurons, language: str, site: str, name: str) -> NDArray[np.float32]:
        """One statistic of one language for the given neurons, (neuron,).

        `diffmean` is the language's mean minus the average of the other languages' means (Gurgurov et al. 2025).

        Raises:
            NeuronSetError: if the statistic, the language or a neuron is absent.
        """
        table = self.values.get(site, {})
        source = "mean" if name == "diffmean" else name
        if source not in table:
            known = [*table, *(["diffmean"] if "mean" in table else [])]
            raise NeuronSetError(
                f"statistic {name!r} at site {site!r} is not in the neuron set; known: {', '.join(known) or 'none'}; "
                "`lm-eval-steering calibrate` measures it"
            )
        if language not in self.languages:
            raise NeuronSetError(f"the neuron set has statistics of {'+'.join(self.languages)}, not of {language}")
        values = table[source][self._rows(neurons)].astype(np.float64)
        column = self.languages.index(language)
        if name != "diffmean":
            return values[:, column].astype(np.float32)
        if len(self.languages) < 2:
            raise NeuronSetError("diffmean needs at least two languages in the neuron set")
        others = np.delete(values, column, axis=1).mean(axis=1)
        difference: NDArray[np.float32] = (values[:, column] - others).astype(np.float32)
        return difference

    def restrict(self, neurons: Neurons) -> Statistics:
        """The same statistics for a subset of the neurons."""
        rows = self._rows(neurons)
        values = {site: {name: table[rows] for name, table in tables.items()} for site, tables in self.values.items()}
        return replace(self, neurons=neurons, values=values)

    def _rows(self, neurons: Neurons) -> NDArray[np.intp]:
        width = 1 + max(_largest_unit(self.neurons), _largest_unit(neurons))
        known, wanted = _keys(self.neurons, width), _keys(neurons, width)
        if not len(wanted):
            return np.zeros(0, dtype=np.intp)
        rows = np.searchsorted(known, wanted)
        if not len(known) or (known[np.minimum(rows, len(known) - 1)] != wanted).any():
            raise NeuronSetError("a neuron has no calibrated statistics in this set")
        return rows


@dataclass(frozen=True)
class NeuronSet:
    """Neurons of each language in one model.

    Attributes:
        languages: codes in the order of selection; languages without neurons included.
        assignments: language -> (neuron, 2) sorted rows of (layer, unit).
        provenance: model, selection, corpus.
        calibrated: activation statistics of the chosen neurons, or None.
        residual: `mean` and `std` over all tokens -> (layer, dimension, language) float32 of the hidden states that
            each decoder layer returns, in the order of `languages`; empty where none were measured.
    """

    languages: tuple[str, ...]
    assignments: Mapping[str, Neurons]
    provenance: Provenance
    calibrated: Statistics | None = None
    residual: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.languages) != set(self.assignments) or len(set(self.languages)) != len(self.languages):
            raise NeuronSetError("the languages and the lists of neurons do not match one to one")
        for language in self.languages:
            if languages.normalise(language) != language:
                raise NeuronSetError(f"language {language!r} is not a code of the form fra_Latn")
            self._check(language, self.assignments[language])
        for name, table in self.residual.items():
            if table.ndim != 3 or (table.shape[0], table.shape[2]) != (self.provenance.layers, len(self.languages)):
                raise NeuronSetError(
                    f"residual {name!r} of shape {table.shape}, expected ({self.provenance.layers} layers, dimension, "
                    f"{len(self.languages)} languages)"
                )

    def _check(self, language: str, neurons: Neurons) -> None:
        if neurons.ndim != 2 or neurons.shape[1] != 2:
            raise NeuronSetError(f"{language}: neurons of shape {neurons.shape}, expected (neuron, 2)")
        layers, units, widths = self.provenance.layers, self.provenance.units, self.provenance.widths
        limits = np.asarray(widths or [units] * layers)[np.clip(neurons[:, 0], 0, layers - 1)]
        outside = (neurons < 0).any(axis=1) | (neurons[:, 0] >= layers) | (neurons[:, 1] >= limits)
        if outside.any():
            layer, unit = neurons[outside][0]
            raise NeuronSetError(
                f"{language}: neuron (layer {layer}, unit {unit}) is out of range for "
                f"{shape_text(layers, units, widths)}"
            )
        keys = _keys(neurons, units)
        if (np.diff(keys) <= 0).any():
            raise NeuronSetError(f"{language}: neurons must be sorted by (layer, unit) and distinct")

    def neurons(self, language: str) -> Neurons:
        """Sorted rows (layer, unit) of one language; any code that names it will do."""
        return self.assignments[languages.choose(language, self.languages, "the neuron set")]

    def statistics(self, language: str, name: str = "mean", site: str = "activation") -> NDArray[np.float32]:
        """One calibrated statistic of a language's neurons, (neuron,), in the order of `neurons(language)`.

        Args:
            language: any code that names it.
            name: `mean`, `token_max` (over all tokens), `sentence_mean`, `median`, `max`, `p10` ... (over the
                sentences' means), or `diffmean`.
            site: `activation` or `product`.

        Raises:
            NeuronSetError: if the set holds no statistics, or not this one.
        """
        code = languages.choose(language, self.languages, "the neuron set")
        if self.calibrated is None:
            raise NeuronSetError("the neuron set holds no statistics; `lm-eval-steering calibrate` adds them")
        return self.calibrated.lookup(self.assignments[code], code, site, name)

    def hidden_states(self, language: str, name: str = "mean", source: str | None = None) -> NDArray[np.float64]:
        """One statistic of a language's hidden states, (layer, dimension), as each decoder layer returns them.

        `diffmean` is the language's mean minus the average of the other languages' means. `clas_diffmean` is its mean
        minus the mean of the source language, of unit norm in each layer (CLaS-Bench, Gurgurov et al. 2026,
        arXiv 2601.08331; its script adds 1e-8 to the norm).

        Args:
            language: any code that names it.
            name: `mean`, `std`, `diffmean` or `clas_diffmean`.
            source: of `clas_diffmean`.

        Raises:
            NeuronSetError: if the set holds no statistics of hidden states, or not this one.
        """
        column = self._column(language)
        _ = self.dimensions  # raises where there are none
        table = "mean" if name in {"diffmean", "clas_diffmean"} else name
        if table not in self.residual:
            known = [*self.residual, *(["diffmean", "clas_diffmean"] if "mean" in self.residual else [])]
            raise NeuronSetError(
                f"statistic {name!r} at site 'residual' is not in the neuron set; known: {', '.join(known)}; of hidden "
                "states no other is measured"
            )
        values: NDArray[np.float64] = self.residual[table].astype(np.float64)
        result: NDArray[np.float64] = values[:, :, column]
        if name == "diffmean":
            if len(self.languages) < 2:
                raise NeuronSetError("diffmean needs at least two languages in the neuron set")
            result = result - np.delete(values, column, axis=2).mean(axis=2)
        if name == "clas_diffmean":
            if source is None:
                raise NeuronSetError("clas_diffmean without a source language: expected a code such as eng_Latn")
            result = result - values[:, :, self._column(source)]
            norms = np.linalg.norm(result, axis=1, keepdims=True)
            if not norms.all():
                raise NeuronSetError(
                    f"clas_diffmean: the mean hidden states of {language} and {source} are equal, so there is no "
                    "direction from one to the other; give another source="
                )
            result = result / norms
        return result

    def _column(self, language: str) -> int:
        return self.languages.index(languages.choose(language, self.languages, "the neuron set"))

    @property
    def dimensions(self) -> int:
        """Number of dimensions of the hidden states, which only their statistics know.

        Raises:
            NeuronSetError: if the set holds none.
        """
        for table in self.residual.values():
            return int(table.shape[1])
        raise NeuronSetError(
            "site=residual: the neuron set holds no statistics of hidden states; add them with "
            "`lm-eval-steering calibrate SET --residual --model MODEL --corpus CORPUS --out SET`"
        )

    def union(self, chosen: Sequence[str] | None = None) -> Neurons:
        """Distinct neurons of the given languages, all by default."""
        return union_of([self.neurons(language) for language in (self.languages if chosen is None else chosen)])

    def overlap(self) -> NDArray[np.int64]:
        """Number of neurons that two languages share, (language, language); the diagonal holds the sizes."""
        keys = [_keys(self.assignments[language], self.provenance.units) for language in self.languages]
        return np.array([[np.intersect1d(a, b).size for b in keys] for a in keys], dtype=np.int64)

    def content_hash(self) -> str:
        """SHA-256 over the languages, neurons and statistics: what decides a score, and nothing else."""
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        columns = self.calibrated.languages if self.calibrated else ()
        shape = [*self.shape, *([list(self.provenance.widths)] if self.provenance.widths else [])]
        digest = hashlib.sha256(json.dumps([self.languages, shape, columns]).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor).tobytes())
        return digest.hexdigest()

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, units per layer) of the model."""
        return self.provenance.layers, self.provenance.units

    # --- the file ---------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {f"neurons/{k}": self.assignments[k] for k in self.languages}
        if self.calibrated is not None:
            tensors["statistics/neurons"] = self.calibrated.neurons
            for site, tables in self.calibrated.values.items():
                tensors |= {f"statistics/{site}/{name}": table for name, table in tables.items()}
        return tensors | {f"residual/{name}": table for name, table in self.residual.items()}

    def save(self, path: str | Path, compact: bool = False) -> None:
        """Write the file in one step: whole, or the file of that name stays as it was.

        Format version 1 wherever it can hold the set, so that older releases read it too.

        Args:
            path: of the file.
            compact: neurons as uint16 (uint32 for layers of more units), a quarter of the bytes, in format version 3.
                The content and its checksum are the same.
        """
        provenance = asdict(self.provenance)
        if not self.provenance.widths:
            del provenance["widths"]
        metadata = {
            "languages": list(self.languages),
            "provenance": provenance,
            "statistics_languages": list(self.calibrated.languages) if self.calibrated else None,
            "content_sha256": self.content_hash(),
        }
        version = 3 if compact else 2 if self.provenance.widths or self.residual else 1
        tensors = self._tensors()
        if compact:
            tensors = {name: _narrowed(tensor) for name, tensor in tensors.items()}
        files.write_tensors(Path(path), _KIND, metadata, tensors, version)

    @classmethod
    def load(cls, name: str | Path) -> NeuronSet:
        """Read and check a file: its path, or the name of one that ships (`demo`).

        Raises:
            NeuronSetError: if it is missing, cut short, not a neuron set, or its content is not what it says.
        """
        path = find_neuron_set(name)
        metadata, tensors = files.read_tensors(path, _KIND, NeuronSetError, _NEWEST)
        if metadata["format_version"] == _NEWEST:
            tensors = {
                name: tensor.astype(np.int64) if tensor.dtype in _COMPACT else tensor
                for name, tensor in tensors.items()
            }
        try:
            sequences = {name: tuple(metadata["provenance"].get(name, ())) for name in ("weights", "widths")}
            provenance = Provenance(**metadata["provenance"] | sequences)
            codes = tuple(metadata["languages"])
            loaded = cls(
                codes,
                {code: tensors[f"neurons/{code}"] for code in codes},
                provenance,
                _statistics(metadata["statistics_languages"], tensors),
                {name.removeprefix("residual/"): tensors[name] for name in tensors if name.startswith("residual/")},
            )
        except (KeyError, TypeError) as error:
            raise NeuronSetError(f"{path}: not a complete neuron set ({error})") from None
        if loaded.content_hash() != metadata["content_sha256"]:
            raise NeuronSetError(f"{path}: the content does not match its own checksum; the file was damaged or edited")
        return loaded

    def check_model(
        self, layers: int, units: int, architecture: str, force: bool = False, widths: Sequence[int] = ()
    ) -> None:
        """Refuse to be used with a model of another architecture or shape.

        Args:
            layers: of the model.
            units: of the model, per layer.
            architecture: `model_type` of the model's language part.
            force: accept any model that has all of the neurons.
            widths: units of each layer of the model where they differ.

        Raises:
            NeuronSetError: naming both.
        """
        provenance = self.provenance
        same = (provenance.architecture, *self.shape, tuple(provenance.widths)) == (
            architecture,
            layers,
            units,
            tuple(widths),
        )
        if same or (force and self._fits_into(widths or [units] * layers)):
            return
        way_out = "force=true needs at least as many" if force else "find its neurons with `lm-eval-steering find`"
        raise NeuronSetError(
            f"the neuron set is for {provenance.model} ({provenance.architecture}, "
            f"{shape_text(*self.shape, provenance.widths)}), the model is {architecture} with "
            f"{shape_text(layers, units, widths)}; {way_out}"
        )

    def _fits_into(self, widths: Sequence[int]) -> bool:
        """Whether a model with these numbers of units has all layers and units of this set's model."""
        own = self.provenance.widths or [self.provenance.units] * self.provenance.layers
        return len(widths) >= len(own) and all(other >= width for width, other in zip(own, widths, strict=False))

    def check_weights(self, sketch: Sequence[float], name: str) -> None:
        """Refuse to be used with another checkpoint of the same shape, where both sketches are known.

        Args:
            sketch: of the model's weights (`architectures.weights.weights_sketch`).
            name: of the model, for the message.

        Raises:
            NeuronSetError: naming both.
        """
        weights = self.provenance.weights
        if not weights:
            _warn_of_unknown_weights(self.provenance.model, shape_text(*self.shape, self.provenance.widths))
        if not weights or not sketch or same_weights(weights, sketch):
            return
        message = f"the neuron set was found in {self.provenance.model}, whose weights are not those of {name}"
        if len(weights) == len(sketch):
            share, apart = difference(weights, sketch)
            message += f" ({share:.0%} of {len(sketch)} sampled values differ, by {apart:.0%} in the median"
            if apart <= _QUANTISED:
                message += (
                    ": so little that one may be a quantised copy of the other; if it is, force=true is reasonable, "
                    "for the units are the same and their statistics nearly so"
                )
            message += ")"
        raise NeuronSetError(
            f"{message}; an adapter, a fine-tuned or a quantised model has other weights; force=true (--force of "
            "doctor, stepwise, logit-lens and export) uses the set all the same"
        )


def neuron_set_of(neurons: NeuronSet | str | Path) -> NeuronSet:
    """A neuron set as it is, or the one in a file: its path, or the name of one that ships (`demo`).

    Raises:
        NeuronSetError: if there is no such file, it is damaged, or the value is something else.
    """
    if isinstance(neurons, str | Path):
        return NeuronSet.load(neurons)
    if not isinstance(neurons, NeuronSet):
        raise NeuronSetError(f"neurons: got {type(neurons).__name__}, expected a NeuronSet, or the path or name of one")
    return neurons


@cache
def _warn_of_unknown_weights(model: str, shape: str) -> None:
    """Once for each model in a process: a sweep attaches a set many times."""
    _log.warning(
        "the neuron set of %s holds no sketch of the weights it was found in, as imported sets do not: another "
        "checkpoint of %s would not be noticed; check that this one is meant (`calibrate` and `find` store the sketch)",
        model,
        shape,
    )


_COMPACT = (np.uint16, np.uint32)


def _narrowed(tensor: NDArray[Any]) -> NDArray[Any]:
    """Neurons in the smallest of the compact types; statistics as they are."""
    if tensor.dtype != np.int64:
        return tensor
    return tensor.astype(_COMPACT[int(tensor.size > 0 and tensor.max() >= 2**16)])


def union_of(lists: Sequence[Neurons]) -> Neurons:
    """Distinct rows of several lists of neurons, sorted by (layer, unit)."""
    rows = np.concatenate([np.zeros((0, 2), dtype=np.int64), *lists])
    return np.unique(rows, axis=0)


def _keys(neurons: Neurons, units: int) -> NDArray[np.int64]:
    return neurons[:, 0] * units + neurons[:, 1]


def _largest_unit(neurons: Neurons) -> int:
    return int(neurons[:, 1].max()) if len(neurons) else 0


def _statistics(codes: list[str] | None, tensors: Mapping[str, NDArray[Any]]) -> Statistics | None:
    if codes is None:
        return None
    values: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key in sorted(tensors):
        parts = key.split("/")
        if parts[0] == "statistics" and len(parts) == 3:
            values.setdefault(parts[1], {})[parts[2]] = tensors[key]
    return Statistics(tensors["statistics/neurons"], tuple(codes), values)
