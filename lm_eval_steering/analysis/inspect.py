"""The contents of a neuron set: the numbers of `lm-eval-steering inspect`, and the text that it prints."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.languages import english_name
from lm_eval_steering.neurons.neuron_set import NeuronSet

_MOST_SIMILAR = 5  # pairs of languages in the text
# Above these a set gets a warning. The sets of Gemma-3-270m: no neuron in every language, entropies up to 96 % of ln K,
# 37 % of the eligible neurons; a Falcon with random weights: 48 %, 100 % and 79 %.
_MANY_SHARED, _NEAR_EQUAL, _MOST_ELIGIBLE = 0.25, 0.98, 0.75
_IN_OTHER_LINES = {"entropy_histogram", "entropy_threshold", "languages_without_neurons", "of"}
_LABEL = 16  # width of a label in characters: a line with a SHA-256 has 80


@dataclass(frozen=True)
class LanguageRow:
    """One language of a set.

    Attributes:
        neurons: number of its neurons.
        share: of all units of the model, 0 to 1.
        exclusive: number of neurons that belong to no other language of the set.
        shared: number of neurons that belong to at least one other language.
        tokens: number of its tokens in the recording, None if the set does not hold it.
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
        threshold: largest entropy of a selected neuron, in nats; None if none was selected.
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


def distinct_by_layer(neuron_set: NeuronSet, languages: Sequence[str] | None = None) -> NDArray[np.int64]:
    """Distinct neurons of some languages, by default all, in each layer, (layer,): a shared one counts once."""
    return np.bincount(neuron_set.union(languages)[:, 0], minlength=neuron_set.provenance.layers)


def multiplicity(neuron_set: NeuronSet) -> NDArray[np.int64]:
    """Number of languages that each neuron of `neuron_set.union()` belongs to, (neuron,)."""
    rows = [neuron_set.assignments[code] for code in neuron_set.languages]
    return np.unique(np.concatenate([np.zeros((0, 2), dtype=np.int64), *rows]), axis=0, return_counts=True)[1]


def jaccard(overlap: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shared neurons over distinct neurons of each pair, (language, language), 0 to 1.

    Args:
        overlap: (language, language) numbers of shared neurons, the sizes on the diagonal (`NeuronSet.overlap`).

    Returns:
        0 if one of the sets is empty, nan if both are; tables and figures leave nan blank.
    """
    sizes = np.diag(overlap)
    distinct = sizes[:, None] + sizes[None, :] - overlap
    return np.divide(overlap, distinct, out=np.full(overlap.shape, np.nan), where=distinct > 0)


def language_rows(neuron_set: NeuronSet) -> list[LanguageRow]:
    """One row per language, in the order of the set."""
    union, times = neuron_set.union(), multiplicity(neuron_set)
    units = neuron_set.provenance.units
    alone = union[times == 1] @ [units, 1]  # one number per neuron: layer * units + unit
    tokens = neuron_set.provenance.corpus.get("tokens") or {}
    rows = []
    for code in neuron_set.languages:
        neurons = neuron_set.assignments[code] @ [units, 1]
        exclusive = int(np.isin(neurons, alone).sum())
        share = len(neurons) / (neuron_set.provenance.layers * units)
        shared = len(neurons) - exclusive
        rows.append(LanguageRow(code, english_name(code), len(neurons), share, exclusive, shared, tokens.get(code)))
    return rows


def entropy_distribution(neuron_set: NeuronSet) -> EntropyDistribution | None:
    """The entropies of the selection; None if the set does not hold them.

    Raises:
        NeuronSetError: if the set's histogram is damaged.
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


def warning_of(neuron_set: NeuronSet) -> str | None:
    """One line where a set that LAPE selected hardly tells its languages apart, as in a model without training.

    That is: more than a quarter of its neurons belong to every language, the entropy of one is above 98 % of ln K
    (equally active in all), or more than three quarters of the eligible neurons were selected.
    """
    entropies, languages = entropy_distribution(neuron_set), len(neuron_set.languages)
    if entropies is None or entropies.threshold is None:
        return None
    signs = []
    shared = float(np.mean(multiplicity(neuron_set) == languages))
    if shared > _MANY_SHARED:
        signs.append(f"{shared:.0%} of the neurons belong to every language")
    if entropies.threshold > _NEAR_EQUAL * math.log(languages):
        signs.append(f"their entropy reaches {entropies.threshold:.4f} of at most {math.log(languages):.4f} nats")
    eligible = int(entropies.counts.sum())
    if entropies.selected > _MOST_ELIGIBLE * eligible:
        signs.append(f"{entropies.selected:,} of {eligible:,} eligible neurons were selected")
    if not signs:
        return None
    return (
        f"warning: {'; '.join(signs)}: these neurons hardly tell the languages apart; a smaller --rate takes the most "
        "specific ones, and more text (--tokens) makes their probabilities more exact (docs/find.md)"
    )


def describe(neuron_set: NeuronSet) -> str:
    """Neurons of each language, shared neurons, layers, calibrated statistics, and last the provenance with its hashes.

    Plain text without colours, the same on a terminal, in a pipe and in a file; no line is cut.
    """
    warning = textwrap.wrap(warning_of(neuron_set) or "", 80)
    parts = (
        _languages(neuron_set), _sharing(neuron_set), _contents(neuron_set), warning, _provenance(neuron_set),
    )  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


# --- Parts of the text


def _line(label: str, text: str) -> str:
    """Label and text, wrapped at 80 characters; no word, and so no hash, is broken."""
    wrapped = textwrap.wrap(text, 80 - _LABEL, break_long_words=False, break_on_hyphens=False)
    return f"{label:<{_LABEL}}" + f"\n{'':<{_LABEL}}".join(wrapped)


def _provenance(neuron_set: NeuronSet) -> list[str]:
    made = neuron_set.provenance
    return [
        _line("model", made.model),
        _line("architecture", made.architecture),
        *([_line("activation", made.activation_function)] if made.activation_function else []),
        *([_line("sites", made.sites)] if made.sites else []),
        _line("weights", "sketch known" if made.weights else "not known: another checkpoint cannot be detected"),
        *_selection(made.selection),
        *([_line("recorded in", made.dtype)] if made.dtype else []),
        *_corpus(made.corpus),
        _line("versions", _pairs(made.versions) or "not known"),
        _line("revision", made.revision or "not known"),
        *([_line("tokenizer", made.tokenizer)] if made.tokenizer else []),
        *_text_hashes(made.corpus),
        _line("content sha256", neuron_set.content_hash()),
    ]


def _selection(selection: Mapping[str, Any]) -> list[str]:
    """The method and its numbers; for a set made from other sets their hashes, methods and numbers."""
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
    if calibration := corpus.get("calibration"):
        sentences = _range(calibration["sentences"].values())
        lines += [_line("calibration", f"{sentences} sentences per language from {calibration['source']}")]
    return lines


def _text_hashes(corpus: Mapping[str, Any]) -> list[str]:
    lines = _one_or_each("text sha256", corpus["sha256"]) if "sha256" in corpus else []
    if calibration := corpus.get("calibration"):
        lines += _one_or_each("calibr. sha256", calibration["sha256"])
    return lines


def _one_or_each(label: str, value: Any) -> list[str]:
    """One value for the whole corpus, or one for each language below the label."""
    if not isinstance(value, Mapping):
        return [_line(label, str(value))]
    return [label, *(_line(f"  {code}", str(each)) for code, each in value.items())]


def _range(values: Iterable[int]) -> str:
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _pairs(numbers: Mapping[str, Any], first: str = "") -> str:
    """`lape, rate 0.05, ...`: the value of `first`, then names with values; what other lines show is left out."""
    names = sorted(set(numbers) - {first} - _IN_OTHER_LINES)
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
        [f"{cell:<{width}}" if number < texts else f"{cell:>{width}}" for cell in column]
        for number, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return ["  ".join(cells).rstrip() for cells in zip(*aligned, strict=True)]


def _sharing(neuron_set: NeuronSet) -> list[str]:
    times, made = multiplicity(neuron_set), neuron_set.provenance
    total = made.layers * made.units
    by_layer = " ".join(f"{neurons:,}" for neurons in distinct_by_layer(neuron_set))
    lines = [
        _line("layers x units", f"{made.layers} x {made.units:,} = {total:,}"),
        _line("distinct", f"{len(times):,} neurons ({len(times) / total:.3%} of all)"),
        _line("by layer", by_layer),
    ]
    for languages, neurons in enumerate(np.bincount(times)):
        if neurons:
            label = f"in {languages} language{'s' if languages > 1 else ''}"
            lines.append(_line(label, f"{neurons:,} ({neurons / len(times):.1%})"))
    return lines + [_line("most similar" if i == 0 else "", text) for i, text in enumerate(_most_similar(neuron_set))]


def _most_similar(neuron_set: NeuronSet) -> list[str]:
    overlap = neuron_set.overlap()
    similarity = jaccard(overlap)
    pairs = [(i, j) for i in range(len(overlap)) for j in range(i) if overlap[i, j]]
    pairs.sort(key=lambda pair: (-similarity[pair], pair))
    return [
        f"{neuron_set.languages[j]} {neuron_set.languages[i]}  {overlap[i, j]:,} shared, Jaccard {similarity[i, j]:.3f}"
        for i, j in pairs[:_MOST_SIMILAR]
    ]


def _contents(neuron_set: NeuronSet) -> list[str]:
    return [*_statistics(neuron_set), *_hidden_states(neuron_set), _entropy(neuron_set)]


def _statistics(neuron_set: NeuronSet) -> list[str]:
    if neuron_set.calibrated is None:
        return [_line("statistics", "none, so value= takes numbers only")]
    calibrated = neuron_set.calibrated
    sites: dict[str, list[str]] = {}
    for site, tables in calibrated.values.items():
        sites.setdefault(" ".join(sorted(tables)), []).append(site)
    lines = [_line("statistics", f"of {len(calibrated.neurons):,} neurons in {len(calibrated.languages)} languages")]
    return lines + [_line("", f"{' and '.join(each)}: {names}") for names, each in sites.items()]


def _hidden_states(neuron_set: NeuronSet) -> list[str]:
    if not neuron_set.residual:
        return []
    text = f"{neuron_set.provenance.layers} x {neuron_set.dimensions:,} dimensions in {len(neuron_set.languages)}"
    return [_line("hidden states", f"{text} languages: {' '.join(sorted(neuron_set.residual))}")]


def _entropy(neuron_set: NeuronSet) -> str:
    entropies = entropy_distribution(neuron_set)
    if entropies is None:
        method = neuron_set.provenance.selection.get("method", "not known")
        return _line("entropy", f"not in this set (method {method}), so it is not drawn")
    limit = "" if entropies.threshold is None else f", up to {entropies.threshold:.4f} nats"
    return _line("entropy", f"{entropies.selected:,} of {entropies.counts.sum():,} eligible neurons selected{limit}")
