"""What is in a neuron set: the numbers behind `lm-eval-steering inspect`, and the text that it prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.languages import english_name
from lm_eval_steering.neurons.neuron_set import NeuronSet

_MOST_ALIKE = 5  # pairs of languages that the text names
_TOLD_ELSEWHERE = {"entropy_histogram", "entropy_threshold", "languages_without_neurons", "of"}
_LABEL = 16  # characters that a label takes: with a SHA-256 a line still has 80


@dataclass(frozen=True)
class LanguageRow:
    """One language of a set.

    Attributes:
        neurons: how many belong to it.
        share: of all units of the model, 0 to 1.
        exclusive: how many belong to no other language of the set.
        shared: how many belong to at least one other.
        tokens: that were read of it to find the neurons, None where the set does not say.
    """

    code: str
    name: str
    neurons: int
    share: float
    exclusive: int
    shared: int
    tokens: int | None


@dataclass(frozen=True)
class EntropyDistribution:
    """Entropies of the activation probabilities (LAPE), over the neurons that were eligible.

    Attributes:
        edges: (bin + 1,) of the histogram, in nats, from 0 to ln(languages).
        counts: (bin,) eligible neurons.
        threshold: largest entropy that was selected, in nats; None where nothing was.
        selected: neurons that were selected; some of them may belong to no language.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    threshold: float | None
    selected: int


def layer_counts(neuron_set: NeuronSet) -> NDArray[np.int64]:
    """Neurons of each language in each layer, (language, layer), in the order of the set's languages."""
    layers = neuron_set.provenance.layers
    rows = [np.bincount(neuron_set.assignments[code][:, 0], minlength=layers) for code in neuron_set.languages]
    return np.array(rows, dtype=np.int64).reshape(-1, layers)


def distinct_by_layer(neuron_set: NeuronSet) -> NDArray[np.int64]:
    """Distinct neurons in each layer, (layer,): one that several languages share counts once."""
    return np.bincount(neuron_set.union()[:, 0], minlength=neuron_set.provenance.layers)


def multiplicity(neuron_set: NeuronSet) -> NDArray[np.int64]:
    """In how many languages each neuron of `neuron_set.union()` lies, (neuron,)."""
    rows = [neuron_set.assignments[code] for code in neuron_set.languages]
    return np.unique(np.concatenate([np.zeros((0, 2), dtype=np.int64), *rows]), axis=0, return_counts=True)[1]


def jaccard(overlap: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shared neurons over distinct neurons of each pair, (language, language), 0 to 1.

    Args:
        overlap: (language, language) numbers of shared neurons, the sizes on the diagonal (`NeuronSet.overlap`).

    Returns:
        nan where both sets are empty, for nothing over nothing is no number; tables and pictures leave it blank. An
        empty set and one that is not have 0.
    """
    sizes = np.diag(overlap)
    distinct = sizes[:, None] + sizes[None, :] - overlap
    return np.divide(overlap, distinct, out=np.full(overlap.shape, np.nan), where=distinct > 0)


def language_rows(neuron_set: NeuronSet) -> list[LanguageRow]:
    """One row a language, in the order of the set."""
    union, times = neuron_set.union(), multiplicity(neuron_set)
    units = neuron_set.provenance.units
    alone = union[times == 1] @ [units, 1]  # one number a neuron: layer * units + unit
    tokens = neuron_set.provenance.corpus.get("tokens") or {}
    found = []
    for code in neuron_set.languages:
        own = neuron_set.assignments[code] @ [units, 1]
        exclusive = int(np.isin(own, alone).sum())
        share = len(own) / (neuron_set.provenance.layers * units)
        row = LanguageRow(
            code, english_name(code), len(own), share, exclusive, len(own) - exclusive, tokens.get(code)
        )  # fmt: skip
        found.append(row)
    return found


def entropy_distribution(neuron_set: NeuronSet) -> EntropyDistribution | None:
    """The entropies that the selection looked at, or None for a set that does not hold them.

    Raises:
        NeuronSetError: if the histogram of the set is not one.
    """
    selection = neuron_set.provenance.selection
    histogram = selection.get("entropy_histogram")
    if histogram is None:
        return None
    try:
        edges = np.array(histogram["edges"], dtype=np.float64)
        counts = np.array(histogram["counts"], dtype=np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise NeuronSetError(f"entropy_histogram: expected edges and counts ({error!r})") from None
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,):
        raise NeuronSetError(f"entropy_histogram: {edges.shape} edges for {counts.shape} counts, expected one more")
    threshold = selection.get("entropy_threshold")
    return EntropyDistribution(
        edges,
        counts,
        None if threshold is None else float(threshold),
        int(selection.get("selected", len(neuron_set.union()))),
    )  # fmt: skip


def describe(neuron_set: NeuronSet) -> str:
    """Provenance, neurons of each language, what they share, and which statistics there are.

    Plain text without colours, so that it is the same on a terminal, in a pipe and in a file; no line of it is cut.
    """
    parts = (_provenance(neuron_set), _languages(neuron_set), _sharing(neuron_set), _contents(neuron_set))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


# --- the parts of the text ------------------------------------------------------------------------------------------


def _line(label: str, text: str) -> str:
    """Label and text; what is longer than a terminal goes on below, but no word, so no hash, is broken."""
    wrapped = textwrap.wrap(text, 80 - _LABEL, break_long_words=False, break_on_hyphens=False)
    return f"{label:<{_LABEL}}" + f"\n{'':<{_LABEL}}".join(wrapped)


def _provenance(neuron_set: NeuronSet) -> list[str]:
    own = neuron_set.provenance
    return [
        _line("model", own.model),
        _line("revision", own.revision or "not known"),
        _line("architecture", own.architecture),
        *([_line("activation", own.activation_function)] if own.activation_function else []),
        *([_line("sites", own.sites)] if own.sites else []),
        _line("layers x units", f"{own.layers} x {own.units:,} = {own.layers * own.units:,}"),
        _line("weights", "sketch known" if own.weights else "not known: another checkpoint cannot be told apart"),
        *_selection(own.selection),
        *([_line("recorded in", own.dtype)] if own.dtype else []),
        *([_line("tokenizer", own.tokenizer)] if own.tokenizer else []),
        *_corpus(own.corpus),
        _line("versions", _pairs(own.versions) or "not known"),
        _line("content sha256", neuron_set.content_hash()),
    ]


def _selection(selection: Mapping[str, Any]) -> list[str]:
    """The method with its numbers, and for a set that was made of others their hashes and the same of each."""
    lines = [_line("selection", _pairs(selection, first="method") or "not known")]
    for source in selection.get("of") or ():
        lines += [_line("  of", str(source["sha256"])), _line("", _pairs(source["selection"], first="method"))]
    return lines


def _corpus(corpus: Mapping[str, Any]) -> list[str]:
    if not corpus:
        return [_line("corpus", "not known")]
    lines = [_line("corpus", str(corpus["source"]))] if "source" in corpus else []
    read = {name: corpus[name] for name in ("rows", "context", "budget") if corpus.get(name) is not None}
    lines += [_line("read as", _pairs(read, first="rows"))] if read else []
    lines += _one_or_each("text sha256", corpus["sha256"]) if "sha256" in corpus else []
    if calibration := corpus.get("calibration"):
        sentences = _range(calibration["sentences"].values())
        lines += [_line("calibration", f"{sentences} sentences a language from {calibration['source']}")]
        lines += _one_or_each("calibr. sha256", calibration["sha256"])
    return lines


def _one_or_each(label: str, value: Any) -> list[str]:
    """One value for the whole corpus, or one for each language below the label."""
    if not isinstance(value, Mapping):
        return [_line(label, str(value))]
    return [label, *(_line(f"  {code}", str(own)) for code, own in value.items())]


def _range(values: Iterable[int]) -> str:
    found = sorted(values)
    low, high = found[0], found[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _pairs(numbers: Mapping[str, Any], first: str = "") -> str:
    """`lape, rate 0.05, ...`: the value of `first`, then names with values; what is told elsewhere is left out."""
    names = sorted(set(numbers) - {first} - _TOLD_ELSEWHERE)
    rest = [f"{name} {_short(numbers[name])}" for name in names]
    return ", ".join([*([str(numbers[first])] if first in numbers else []), *rest])


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _languages(neuron_set: NeuronSet) -> list[str]:
    rows = [
        (
            row.code, row.name, f"{row.neurons:,}", f"{row.share:.3%}", f"{row.exclusive:,}", f"{row.shared:,}",
            "" if row.tokens is None else f"{row.tokens:,}",
        )
        for row in language_rows(neuron_set)
    ]  # fmt: skip
    return _table(("code", "language", "neurons", "of all", "exclusive", "shared", "tokens read"), rows, texts=2)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Aligned columns: the first `texts` to the left, the numbers to the right; a column without values is left out."""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:]) or not rows]
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [f"{cell:<{width}}" if place < texts else f"{cell:>{width}}" for cell in column]
        for place, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return ["  ".join(cells).rstrip() for cells in zip(*aligned, strict=True)]


def _sharing(neuron_set: NeuronSet) -> list[str]:
    times = multiplicity(neuron_set)
    total = neuron_set.provenance.layers * neuron_set.provenance.units
    lines = [_line("distinct", f"{len(times):,} neurons ({len(times) / total:.3%} of all)")]
    for languages, neurons in enumerate(np.bincount(times)):
        if neurons:
            own = f"in {languages} language{'s' if languages > 1 else ''}"
            lines.append(_line(own, f"{neurons:,} ({neurons / len(times):.1%})"))
    return lines + [_line("most alike" if i == 0 else "", text) for i, text in enumerate(_most_alike(neuron_set))]


def _most_alike(neuron_set: NeuronSet) -> list[str]:
    overlap = neuron_set.overlap()
    likeness = jaccard(overlap)
    pairs = [(i, j) for i in range(len(overlap)) for j in range(i) if overlap[i, j]]
    pairs.sort(key=lambda pair: (-likeness[pair], pair))
    return [
        f"{neuron_set.languages[j]} {neuron_set.languages[i]}  {overlap[i, j]:,} shared, Jaccard {likeness[i, j]:.3f}"
        for i, j in pairs[:_MOST_ALIKE]
    ]


def _contents(neuron_set: NeuronSet) -> list[str]:
    return [*_statistics(neuron_set), _entropy(neuron_set)]


def _statistics(neuron_set: NeuronSet) -> list[str]:
    if neuron_set.calibrated is None:
        return [_line("statistics", "none, so value= takes numbers only")]
    found = neuron_set.calibrated
    sites: dict[str, list[str]] = {}
    for site, tables in found.values.items():
        sites.setdefault(" ".join(sorted(tables)), []).append(site)
    lines = [_line("statistics", f"of {len(found.neurons):,} neurons in {len(found.languages)} languages")]
    return lines + [_line("", f"{' and '.join(own)}: {names}") for names, own in sites.items()]


def _entropy(neuron_set: NeuronSet) -> str:
    found = entropy_distribution(neuron_set)
    if found is None:
        method = neuron_set.provenance.selection.get("method", "not known")
        return _line("entropy", f"not in this set (method {method}), so it is not drawn")
    limit = "" if found.threshold is None else f", up to {found.threshold:.4f} nats"
    return _line("entropy", f"{found.selected:,} of {found.counts.sum():,} eligible neurons selected{limit}")
