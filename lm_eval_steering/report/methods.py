"""The methods paragraph of a paper, from what was run: model, neurons, interventions, tasks, statistics, versions.

Nothing in it is assumed: a sentence is left out where the results do not say its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_steering.metrics.statistics import CORPUS_TEST, MCNEMAR, T_TEST
from lm_eval_steering.report.effects import ALPHA
from lm_eval_steering.report.naming import counted, is_lss, is_prompt, language_name, listed, readable_metric
from lm_eval_steering.report.table_files import escaped_for_latex
from lm_eval_steering.report.tables import Results, damages_of

if TYPE_CHECKING:
    import pandas as pd

LAPE, KOJIMA = "tang-etal-2024-language", "kojima-etal-2024-multilingual"
AMPLIFICATION, ARITHMETICS = "rahmanisa-etal-2025-unveiling", "gurgurov-etal-2025-arithmetics"
CLAS, CONFUSION = "gurgurov-etal-2026-clas", "marchisio-etal-2024-understanding"
HARNESS, FASTTEXT = "gao-etal-2024-harness", "joulin-etal-2017-bag"
BOOTSTRAP, EXACT_TEST, HOLM = "hesterberg-2015-bootstrap", "mcnemar-1947-note", "holm-1979-simple"
SACREBLEU, CHRF = "post-2018-call", "popovic-2017-chrf"
_SOURCE_OF_METHOD = {"lape": LAPE, "activated": AMPLIFICATION, "average-precision": KOJIMA}
_SOURCE_OF_PRESET = {
    "p_max": AMPLIFICATION, "p_median": AMPLIFICATION, "=max": AMPLIFICATION, "+max": AMPLIFICATION,
    "additive": ARITHMETICS, "replacement": ARITHMETICS,
}  # fmt: skip
_SOURCE_OF_METRIC = {"lpr": CONFUSION, "wpr": CONFUSION, "clas_language": CLAS, "bleu": SACREBLEU, "chrf++": CHRF}
_RESIDUAL = " at residual"  # in a kind (`naming.kind_of`) that edits hidden states
_CITATION = re.compile(r" ?\[@([\w-]+)\]")


@dataclass(frozen=True)
class Methods:
    """A paragraph with citations.

    Attributes:
        text: with citations as pandoc writes them, `[@key]`.
        bibtex: the entries that it cites.
    """

    text: str
    bibtex: str

    @property
    def latex(self) -> str:
        """The paragraph with `\\citep`."""
        parts = _CITATION.split(self.text)
        texts = [escaped_for_latex(part) for part in parts[::2]]
        cited = [f"~\\citep{{{key}}}" for key in parts[1::2]]
        return "".join(text + cite for text, cite in zip(texts, [*cited, ""], strict=True)) + "\n"

    @property
    def plain(self) -> str:
        """The paragraph with names and years."""
        return _CITATION.sub(lambda match: f" ({_name_and_year(match[1])})", self.text)

    def write(self, folder: Path) -> list[Path]:
        """Write `methods.md`, `methods.tex` and `references.bib`."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {"methods.md": self.text + "\n", "methods.tex": self.latex, "references.bib": self.bibtex}
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
        return [folder / name for name in contents]


def methods(results: Results) -> Methods:
    """The methods paragraph of a report."""
    config = results.sweep.facts.config
    sentences = [
        _model(results, config),
        *_neurons(config.get("steering", {}).get("neuron_set", {})),
        _interventions(results),
        _hidden_states(results, config.get("steering", {}).get("neuron_set", {})),
        _tasks(results),
        *_metrics(results, config.get("steering", {})),
        *_choice(results),
        *_statistics(results),
    ]
    text = " ".join(sentence for sentence in sentences if sentence)
    entries = references()
    keys = dict.fromkeys(_CITATION.findall(text))
    return Methods(text, "\n\n".join(entries[key] for key in keys) + "\n")


def references() -> dict[str, str]:
    """Key -> BibTeX entry."""
    text = (Path(__file__).parent / "references.bib").read_text(encoding="utf-8")
    entries = [entry.strip() for entry in re.split(r"\n\n(?=@)", text)]
    return {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}


def _in_brackets(details: Sequence[str]) -> str:
    """` (a, b)`; nothing for none."""
    return f" ({', '.join(details)})" if details else ""


def _name_and_year(key: str) -> str:
    """`Tang et al., 2024`."""
    entry = references()[key]
    authors = re.search(r"author = \{(.+)\},?$", entry, re.MULTILINE)
    year = re.search(r"year = \{(\d+)\}", entry)
    assert authors and year, f"references.bib: {key} has no author or no year"
    names = [author.partition(",")[0] for author in authors[1].split(" and ")]
    several = " et al." if len(names) > 2 else "".join(f" and {name}" for name in names[1:])
    return f"{names[0]}{several}, {year[1]}"


def _model(results: Results, config: Mapping[str, Any]) -> str:
    releases = config.get("steering", {}).get("versions") or results.sweep.facts.versions
    details = [f"revision {config['model_sha']}" if config.get("model_sha") else ""]
    details.append(str(config.get("model_dtype", "")).removeprefix("torch."))
    exact = _in_brackets([detail for detail in details if detail])
    tools = [f"{name} {releases[name]}" for name in ("lm-eval-steering", "transformers", "torch") if name in releases]
    cells = results.sweep.steered_cells()
    neurons = cells.empty or cells["kind"].map(_changes_neurons).any()
    changed = ", while the activations of language-specific neurons in its MLP layers were changed" if neurons else ""
    harness = f"lm-evaluation-harness {releases.get('lm-eval', '')}".strip()
    return (
        f"We evaluated {listed(sorted(results.sweep.cells['model'].unique()))}"
        f"{exact} with {harness} [@{HARNESS}] and {listed(tools)}{changed}."
    )


def _changes_neurons(kind: str) -> bool:
    return not is_prompt(kind) and _RESIDUAL not in kind


def _neurons(neuron_set: Mapping[str, Any]) -> list[str]:
    selection, corpus = neuron_set.get("selection", {}), neuron_set.get("corpus", {})
    method = selection.get("method")
    if not method:
        return []
    numbers = {"rate": "rate", "filter_rate": "filter rate", "bar_rate": "bar rate", "top_k": "top k",
               "bottom_k": "bottom k", "threshold": "threshold"}  # fmt: skip
    given = [f"{name} {selection[key]:g}" for key, name in numbers.items() if selection.get(key) is not None]
    cited = f" [@{_SOURCE_OF_METHOD[method]}]" if method in _SOURCE_OF_METHOD else ""
    sentences = [
        f"The neurons ({neuron_set['layers']} layers of {neuron_set['units']:,} units) were selected by "
        f"{'LAPE' if method == 'lape' else method}{cited}{_in_brackets(given)} over "
        f"{len(neuron_set['languages'])} languages."
    ]
    if tokens := corpus.get("tokens"):
        fewest, most = min(tokens.values()), max(tokens.values())
        amount = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        source = f" from {corpus['source']}" if corpus.get("source") else ""
        sentences.append(f"Activations were recorded on {amount} tokens{source} for each language.")
    if sentences_of := corpus.get("calibration", {}).get("sentences"):
        counts = sorted(set(sentences_of.values()))
        amount = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        sentences.append(f"Their statistics were measured on {amount} sentences of each language.")
    return sentences


def _interventions(results: Results) -> str:
    cells = results.sweep.steered_cells()
    languages = [code for code in sorted(cells["steered"].unique()) if code]
    if not languages:
        return ""
    named = listed([language_name(code) for code in languages])
    kinds: list[str] = []
    prompts: list[str] = []
    for kind, rows in cells[cells["kind"] != ""].groupby("kind", sort=False):
        cited = f" [@{_SOURCE_OF_PRESET[kind]}]" if kind in _SOURCE_OF_PRESET else ""
        (prompts if is_prompt(kind) else kinds).append(f"{kind}{cited}{_at(rows)}")
    text = ""
    if kinds:
        where = "on the neurons of" if any(map(_changes_neurons, kinds)) else "for"
        text = f"Interventions {where} {named}, one language at a time: {'; '.join(kinds)}."
    if prompts:
        text += f"{' ' if kinds else ''}Prompting for {named}, in front of every prompt: {'; '.join(prompts)}."
    all_kinds = results.sweep.cells["kind"]
    chosen = (all_kinds.map(_changes_neurons), all_kinds.map(is_prompt))
    controls, naming = (int(results.sweep.cells.loc[these, "control"].nunique()) for these in chosen)
    if naming:
        text += f" As control of an instruction the same one named {counted(naming, 'other language')} instead."
    if controls:
        text += (
            f" As controls the same was done to {counted(controls, 'random neuron set')} for each language, matched "
            "in the number of neurons of each layer and drawn from neurons that belong to no language."
        )
    return text


def _hidden_states(results: Results, neuron_set: Mapping[str, Any]) -> str:
    """What those interventions do that change no neurons."""
    cells = results.sweep.cells
    here = cells[cells["kind"].str.contains(_RESIDUAL)]
    if here.empty:
        return ""
    text = "Interventions at residual change no neurons but the hidden states that the named layers (from 0) return"
    if sentences := set(neuron_set.get("corpus", {}).get("residual", {}).get("sentences", {}).values()):
        fewest, most = min(sentences), max(sentences)
        amount = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        text += f", whose means are over the tokens of {amount} sentences of each language"
    if here["kind"].str.startswith("clas_diffmean").any():
        text += f"; clas_diffmean is DiffMean of CLaS-Bench [@{CLAS}]"
    if here["control"].notna().any():
        text += (
            "; as controls the deviations of the languages from their common mean have their dimensions permuted and "
            "their signs flipped at random, which gives random directions of the same norm"
        )
    return f"{text}."


def _at(rows: pd.DataFrame) -> str:
    """At which factors one kind of intervention was run, or at which damages where factors were searched for."""
    parts = []
    if damages := sorted({damage for asked in rows["damage_asked"] for damage in damages_of(asked)}):
        raised = listed([f"{damage:g}" for damage in damages])
        parts.append(
            "at the factors that raise the nats per token of held-out text in the steered language by "
            f"{raised} (found for each language by search)"
        )
    if factors := sorted(rows.loc[rows["damage_asked"] == "", "factor"].dropna().unique()):
        parts.append(f"at {'factor' if len(factors) == 1 else 'factors'} {listed([f'{f:g}' for f in factors])}")
    return f" {' and '.join(parts)}" if parts else ""


def _tasks(results: Results) -> str:
    frame = results.effects.frame
    sizes = frame.groupby("family", sort=False)["n"].max()
    tasks = [f"{family} (n = {int(n)})" if n > 0 else str(family) for family, n in sizes.items()]
    return f"Tasks, with items for each language: {listed(tasks)}." if tasks else ""


def _metrics(results: Results, steering: Mapping[str, Any]) -> list[str]:
    metrics = {str(name).partition("@")[0] for name in results.effects.frame["metric"].unique()}
    sentences = []
    if any(map(is_lss, metrics)):
        sentences.append(
            f"LSS [@{AMPLIFICATION}] is the share of items on which steering shifts the log-likelihood from the "
            "object in the base language to the one in the steered language."
        )
    if "lfs_clean" in metrics:
        identifier = str(steering.get("language_identifier", ""))
        sentences.append(
            "Clean LFS is the share of outputs that are identified as the steered language and are not degenerate"
            f"{f'; languages were identified by fastText [@{FASTTEXT}] with {identifier}' if identifier else ''}."
        )
    if "nats_per_token" in metrics:
        sentences.append("Damage is the rise in nats per token of a text given BOS over the unsteered model.")
    cited = [f"{readable_metric(name)} [@{key}]" for name, key in _SOURCE_OF_METRIC.items() if name in metrics]
    if cited:
        sentences.append(f"We also report {listed(cited)}.")
    return sentences


def _choice(results: Results) -> list[str]:
    choices = results.sweep.facts.choices
    if not choices:
        return []
    metrics = sorted({readable_metric(choice["metric"]) for choice in choices})
    halves = any(choice.get("split") == "half" for choice in choices)
    items = "one half of the items and reported on the other half" if halves else "other items than those reported"
    return [f"Factors were chosen by {listed(metrics)} on {items}."]


def _statistics(results: Results) -> list[str]:
    frame = results.effects.frame
    tests = set(frame["test"].unique())
    sentences = []
    if frame["low"].notna().any():
        sentences.append(
            "Intervals (95 %) are of differences on the same items, by the expanded percentile bootstrap with 2,000 "
            f"resamples [@{BOOTSTRAP}]."
        )
    named = []
    if MCNEMAR in tests:
        named.append(f"the exact McNemar test [@{EXACT_TEST}]")
    if T_TEST in tests:
        named.append("the paired t test")
    if CORPUS_TEST in tests:
        named.append(f"the paired bootstrap of sacreBLEU [@{SACREBLEU}]")
    if named:
        sentences.append(
            f"p values are of {listed(named)}, corrected by Holm's method [@{HOLM}] within metric, task family and "
            f"intervention, at level {ALPHA:g}."
        )
    return sentences
