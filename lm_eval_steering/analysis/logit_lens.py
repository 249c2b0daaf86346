"""Logit lens by language: how much probability each layer's hidden state gives to each language's tokens.

The hidden state after each layer, at the chosen positions, goes through the model's head (`ModelHead`): final norm
once, head, soft-cap and scales. Its most probable tokens are read one by one, and their probabilities are added up by
language and by script, never renormalised. Source: Gurgurov et al. 2025, `logit_lens.py`, which normalises the last
state twice, leaves out soft-cap and scale, and knows no steered run. Every run here checks that the last layer's lens
is the model's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import nn

from lm_eval_steering.analysis.checks import tolerance
from lm_eval_steering.analysis.prompts import PromptBatch, Prompts, batches, placed
from lm_eval_steering.analysis.run_record import fingerprint_of, made_with, signature_of, write_csv
from lm_eval_steering.analysis.style import BLUE, GREEN, PAGE, VERMILION, new_figure, write_figure
from lm_eval_steering.architectures import ModelSites, sites_of, text_config_of
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import ArchitectureError, DidNotHappenError, SteeringError
from lm_eval_steering.files import write_json
from lm_eval_steering.metrics.language_id import UNKNOWN, LanguageIdentifier, in_language
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.progress import Log
from lm_eval_steering.steering.attach import fitting_sites, steer

# --- Language and script of single tokens, and the probability mass of each
#
# A token is a short text: fastText is often unsure of it, and below the identifier's threshold it is `unknown`, which
# is a separate class. The script of its letters needs no identifier, and is more certain where scripts differ.


class TokenLabels:
    """Labels of a tokenizer's tokens; each token is looked up once, when it is first asked for.

    Attributes:
        languages: names that the numbers of `language` stand for, in the order in which they were met.
        scripts: the same for `script`: ISO 15924 codes, `Zyyy` for tokens without letters.
    """

    def __init__(self, tokenizer: Any, identifier: LanguageIdentifier, vocabulary: int) -> None:
        """Start without labels.

        Args:
            tokenizer: decodes tokens.
            identifier: of their languages.
            vocabulary: width of the model's head, often larger than the tokenizer's vocabulary.
        """
        self._tokenizer, self._identifier = tokenizer, identifier
        self.languages: list[str] = []
        self.scripts: list[str] = []
        self.language = np.full(vocabulary, -1)  # (token,) number in `languages`, -1 for not looked up
        self.script = np.full(vocabulary, -1)

    def learn(self, tokens: NDArray[np.int64]) -> None:
        """Look up those of the tokens, (token,) ids, that are not known yet."""
        new = np.unique(tokens[self.language[tokens] < 0])
        texts = [self._text(int(token)) for token in new]
        for token, text, identified in zip(new, texts, self._identifier.identify(texts), strict=True):
            # A text without a letter has no language, whatever the identifier guesses.
            language = identified.language if any(map(str.isalpha, text)) else UNKNOWN
            self.language[token] = _number(self.languages, language)
            self.script[token] = _number(self.scripts, identified.script)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def _text(self, token: int) -> str:
        """Empty for special tokens, ids beyond the tokenizer's vocabulary, and pieces of a character."""
        if token in self._special or token >= len(self._tokenizer):
            return ""
        text = self._tokenizer.decode([token])
        return "" if "\ufffd" in text else text


def _number(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)


def masses(labels: NDArray[np.int64], probabilities: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """(class,) sums of the probabilities of the tokens of each class; not renormalised.

    Args:
        labels: (token,) number of each token's class.
        probabilities: (token,).
        classes: their number.
    """
    return np.bincount(labels, weights=probabilities, minlength=classes).astype(np.float64)


def by_class(languages: Mapping[str, float], targets: Sequence[str]) -> dict[str, float]:
    """Mass of the target languages, of English, of other languages and of `unknown`.

    Languages are compared at the identifier's grain (`language_id.in_language`). Where English is a target it has
    no separate class.

    Args:
        languages: code, or `unknown`, -> mass.
        targets: codes.
    """

    def is_one_of(code: str, codes: Sequence[str]) -> bool:
        return any(in_language(code, other) for other in codes)

    english = not is_one_of("eng_Latn", targets)
    by_name = {"target": 0.0, **({"English": 0.0} if english else {}), "other": 0.0, "unknown": 0.0}
    for code, mass in languages.items():
        if code == UNKNOWN:
            by_name["unknown"] += mass
        elif is_one_of(code, targets):
            by_name["target"] += mass
        elif english and is_one_of(code, ["eng_Latn"]):
            by_name["English"] += mass
        else:
            by_name["other"] += mass
    return by_name


# --- The end of a model, from hidden states to logits, computed by the model itself
#
# Final norm, head, and what a family does to its logits (Gemma's soft-cap, Cohere's and Granite's scales) are not
# written again here. The model runs on rows of one token, and its last layer's output is replaced by the hidden states
# in question; all of what follows a layer works on each position by itself. The cost is one token a hidden state.


class ModelHead:
    """Reads the hidden state after each layer, and computes the logits of any hidden state."""

    def __init__(self, model: Any, sites: ModelSites) -> None:
        """Find the layers.

        Args:
            model: a causal language model of transformers.
            sites: of it.

        Raises:
            ArchitectureError: if no list of modules holds the layers.
        """
        self._model = model
        self.layers = _layers_of(sites)

    @contextmanager
    def states(self) -> Iterator[list[torch.Tensor]]:
        """Outputs (row, position, hidden) of every layer in the forward pass that follows, in the order of layers."""
        seen: list[torch.Tensor] = []
        with ExitStack() as stack:
            for layer in self.layers:
                hook = layer.register_forward_hook(lambda _m, _i, output: seen.append(_hidden(output).detach()))
                stack.enter_context(hook)
            yield seen

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(state, vocabulary) logits of hidden states (state, hidden), as the model would give them.

        Raises:
            ArchitectureError: if the last layer returns something else than one hidden state a token.
        """
        device = self._model.get_input_embeddings().weight.device
        # The layers' output for these tokens is not used.
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=device)
        with self.layers[-1].register_forward_hook(_replaced_by(states[:, None])):
            return self._model(ids, use_cache=False).logits[:, -1]


def _layers_of(sites: ModelSites) -> Sequence[nn.Module]:
    """The decoder's layers: the list whose members hold one activation module each."""
    for module in sites.decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(sites.layers):
            pairs = zip(module, sites.layers, strict=True)
            if all(any(part is site.activation for part in layer.modules()) for layer, site in pairs):
                return list(module)
    raise ArchitectureError("the decoder's list of layers is not found, so no hidden state can be read")


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _replaced_by(states: torch.Tensor) -> Callable[..., Any]:
    """A hook that replaces a layer's output by hidden states (row, 1, hidden)."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        before = _hidden(output)
        if before.shape != states.shape:
            raise ArchitectureError(
                f"the last layer returned {tuple(before.shape)}, expected hidden states of {tuple(states.shape)}"
            )
        new = states.to(before.device)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


_STATES = 64  # hidden states that go through the head at a time: 64 x vocabulary floats


@dataclass(frozen=True)
class LensSettings:
    """Positions and tokens that are read.

    Attributes:
        positions: `last` of each prompt, or `all` (a prompt's mean over its tokens, BOS among them, counts once).
        top_k: most probable tokens that are read, 5 as in the paper; None with `top_p`.
        top_p: the fewest most probable tokens that hold this mass; 1 reads the whole vocabulary.
        batch_size: prompts a batch.
    """

    positions: str = "last"
    top_k: int | None = 5
    top_p: float | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.positions not in {"last", "all"}:
            raise SteeringError(f"positions={self.positions!r}: expected last or all")
        if (self.top_k is None) == (self.top_p is None):
            raise SteeringError("top_k and top_p: expected one of them")
        if self.top_k is not None and self.top_k < 1:
            raise SteeringError(f"top_k={self.top_k}: expected a number above 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SteeringError(f"top_p={self.top_p}: expected a share of the mass, above 0 and at most 1")


@dataclass(frozen=True)
class LensPass:
    """One pass over the prompts, unsteered or steered.

    Attributes:
        name: `unsteered` or `steered`.
        languages: for each layer, language -> mass of its tokens among those read, mean over prompts.
        scripts: the same by script.
        off_by: largest |difference| between the last layer's lens and the model's own logits at the prompts' last
            positions, as a share of the largest |logit|.
        signature: of the intervention.
        fingerprint: over everything that decides the numbers.
        evidence: what the hooks did; None in the unsteered run.
    """

    name: str
    languages: tuple[Mapping[str, float], ...]
    scripts: tuple[Mapping[str, float], ...]
    off_by: float
    signature: str
    fingerprint: str
    evidence: Mapping[str, Any] | None


@dataclass(frozen=True)
class Lens:
    """The runs, the languages whose mass is of interest, and what they were made with."""

    runs: tuple[LensPass, ...]
    targets: tuple[str, ...]
    provenance: Mapping[str, Any]


def run_lens(
    model: LazyModel,
    prompts: Prompts,
    targets: Sequence[str],
    neurons: NeuronSet | None = None,
    intervention: Mapping[str, Any] | None = None,
    settings: LensSettings | None = None,
    identifier: LanguageIdentifier | None = None,
    log: Log | None = None,
    force: bool = False,
) -> Lens:
    """The lens of the unsteered model and, where an intervention is given, of the steered one.

    Args:
        model: loaded when the first prompt is read.
        prompts: given to the model as they are, with the special tokens that its tokenizer adds.
        targets: languages whose mass is of interest.
        neurons: of the model; needed for an intervention.
        intervention: arguments of `steer`.
        settings: positions and tokens.
        identifier: of the tokens' languages.
        log: shows progress.
        force: accept a set that was found in other weights.

    Raises:
        SteeringError: if an intervention has no neurons, the set belongs to another model, or a prompt is too long.
        DidNotHappenError: if the intervention did not take place, or the last layer's lens is not the model's output.
    """
    if intervention and neurons is None:
        raise SteeringError("an intervention without neurons: pass the model's neuron set")
    settings, identifier, log = settings or LensSettings(), identifier or LanguageIdentifier(), log or Log(show=False)
    override = model.override or (neurons.provenance.sites if neurons else None) or None
    if neurons is None:
        sites = sites_of(model.model, override)
    else:
        sites = fitting_sites(model.model, neurons, sites=override, force=force, sketch=model.sketch, name=model.name)
    head = ModelHead(model.model, sites)
    labels = TokenLabels(model.tokenizer, identifier, int(text_config_of(model.config).vocab_size))
    rows = list(batches(model, prompts.texts, settings.batch_size))
    provenance = made_with(model, neurons, prompts, identifier, **asdict(settings))
    planned: dict[str, Mapping[str, Any]] = {"unsteered": {}, **({"steered": intervention} if intervention else {})}
    runs = []
    with log.bar("reading", len(planned) * len(prompts.texts), "prompt") as bar:
        for name, arguments in planned.items():
            reader = _Reader(head, labels, settings, len(prompts.texts))
            steering = None
            if arguments and neurons is not None:
                # The set has been compared with the model above.
                steering = steer(model.model, neurons, force=True, sites=override, **arguments)
            for batch in rows:
                with steering or nullcontext():
                    states, output = _forward(model.model, head, batch)
                reader.read(batch, states, output)  # unsteered, as there is no unit behind the last layer
                bar.update(len(batch.ids))
            evidence = None if steering is None else asdict(steering.evidence())
            if evidence is not None and not evidence["fired"]:
                raise DidNotHappenError("the intervention never took place: no hook fired")
            reader.check(tolerance(model.model.dtype))
            written = signature_of(arguments, neurons)
            made = fingerprint_of(provenance, written)
            runs.append(LensPass(name, *reader.means(), reader.off_by, written, made, evidence))
    return Lens(tuple(runs), tuple(targets), provenance)


@torch.no_grad()
def _forward(model: Any, head: ModelHead, batch: PromptBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer, row, position, hidden) states, and the model's own logits (row, vocabulary) at the last position."""
    kept = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    with head.states() as seen:
        output = model(**placed(model, batch), use_cache=False, **kept).logits[:, -1]
    if len(seen) != len(head.layers):
        raise DidNotHappenError(f"{len(seen)} layers ran in one forward pass, expected {len(head.layers)}")
    return torch.stack([state.to(output.device) for state in seen]), output


class _Reader:
    """Adds up the masses of all prompts, for each layer."""

    def __init__(self, head: ModelHead, labels: TokenLabels, settings: LensSettings, prompts: int) -> None:
        self.head, self.labels, self.settings, self.prompts = head, labels, settings, prompts
        self.off_by = 0.0
        self._sums: dict[str, dict[tuple[int, str], float]] = {"language": {}, "script": {}}

    def read(self, batch: PromptBatch, states: torch.Tensor, output: torch.Tensor) -> None:
        """One batch.

        Args:
            batch: padded on the left.
            states: (layer, row, position, hidden).
            output: (row, vocabulary) logits of the model at the last position.
        """
        last = batch.mask.clone()
        last[:, :-1] = 0
        chosen = (last if self.settings.positions == "last" else batch.mask).bool()
        # (state,) share of a prompt that this position stands for; a prompt counts once.
        share = (chosen / chosen.sum(1, keepdim=True))[chosen].cpu().double().numpy()
        for layer, own_states in enumerate(states[:, chosen.to(states.device)]):
            for start in range(0, len(own_states), _STATES):
                logits = self.head.logits(own_states[start : start + _STATES])
                self._add(layer, logits, share[start : start + _STATES])
        self._compare(self.head.logits(states[-1, :, -1]), output)

    def _add(self, layer: int, logits: torch.Tensor, share: NDArray[np.float64]) -> None:
        probabilities, tokens = _most_probable(logits, self.settings)
        for row, weight in enumerate(share):
            kept = probabilities[row] > 0
            ids = tokens[row][kept]
            self.labels.learn(ids)
            for kind, codes, names in (
                ("language", self.labels.language, self.labels.languages),
                ("script", self.labels.script, self.labels.scripts),
            ):
                sums = masses(codes[ids], probabilities[row][kept], len(names))
                for name, mass in zip(names, sums, strict=True):
                    key = layer, name
                    self._sums[kind][key] = self._sums[kind].get(key, 0.0) + float(weight * mass)

    def _compare(self, lens: torch.Tensor, output: torch.Tensor) -> None:
        one, other = lens.cpu().double(), output.cpu().double()
        difference = (one - other).abs().nan_to_num(nan=torch.inf).max() / other.abs().max()
        self.off_by = max(self.off_by, float(difference))

    def check(self, limit: float) -> None:
        """Refuse a lens whose last layer is not the model's output.

        Raises:
            DidNotHappenError: naming the difference.
        """
        if not self.off_by <= limit:
            raise DidNotHappenError(
                f"the lens of the last layer differs from the model's own logits by {self.off_by:.2g} of the largest "
                f"one, expected at most {limit:.2g}: this model does more to its output than its last layer, norm and "
                "head; no number can be trusted"
            )

    def means(self) -> tuple[tuple[dict[str, float], ...], tuple[dict[str, float], ...]]:
        """(languages, scripts): for each layer, name -> mass, the largest first."""
        return self._mean("language"), self._mean("script")

    def _mean(self, kind: str) -> tuple[dict[str, float], ...]:
        means: list[dict[str, float]] = [{} for _ in self.head.layers]
        for (layer, name), mass in sorted(self._sums[kind].items(), key=lambda item: (-item[1], item[0])):
            if mass:
                means[layer][name] = mass / self.prompts
        return tuple(means)


def _most_probable(logits: torch.Tensor, settings: LensSettings) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(row, token) probabilities, the largest first and 0 for tokens that are not read, and the tokens' ids."""
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    if settings.top_p is None:
        values, tokens = probabilities.topk(min(settings.top_k or 1, probabilities.shape[-1]))
        return values.cpu().double().numpy(), tokens.cpu().numpy()
    values, tokens = probabilities.sort(descending=True)
    numbers = values.cpu().double().numpy()
    before = numbers.cumsum(-1) - numbers  # a token is read as long as those before it do not hold the mass
    return np.where((before < settings.top_p) | (settings.top_p == 1), numbers, 0.0), tokens.cpu().numpy()


# --- what is written ------------------------------------------------------------------------------------------------


def table(lens: Lens) -> str:
    """One line a layer: mass of the target languages, English, others and unknown, unsteered and steered."""
    runs = [[by_class(masses, lens.targets) for masses in run.languages] for run in lens.runs]
    kinds = list(runs[0][0])
    head = "".join(f"  {run.name:<{8 * len(kinds) - 2}}" for run in lens.runs)
    names = "".join(f"{name:>8}" for name in kinds) * len(runs)
    lines = [f"       {head}".rstrip(), f"  layer{names}"]
    for layer in range(len(runs[0])):
        numbers = "".join(f"{run[layer][kind]:>8.3f}" for run in runs for kind in kinds)
        lines.append(f"{layer:>7}{numbers}")
    return "\n".join(lines)


def write(lens: Lens, folder: Path) -> list[Path]:
    """`lens.csv` (classes), `lens-labels.csv` (every language and script), `logit-lens.json` and the figure.

    Returns:
        The files.
    """
    classes = {run.name: [by_class(masses, lens.targets) for masses in run.languages] for run in lens.runs}
    kinds = list(classes["unsteered"][0])
    wide = [
        (run.name, layer, *classes[run.name][layer].values(), sum(languages.values()), run.fingerprint[:8])
        for run in lens.runs
        for layer, languages in enumerate(run.languages)
    ]
    write_csv(folder / "lens.csv", ("run", "layer", *map(str.lower, kinds), "read", "fingerprint"), wide)
    long = [
        (run.name, layer, kind, name, mass)
        for run in lens.runs
        for kind, layers in (("language", run.languages), ("script", run.scripts))
        for layer, labels in enumerate(layers)
        for name, mass in labels.items()
    ]
    write_csv(folder / "lens-labels.csv", ("run", "layer", "by", "label", "mass"), long)
    content = {"made_with": lens.provenance, "targets": lens.targets, "runs": [asdict(run) for run in lens.runs]}
    write_json(folder / "logit-lens.json", content)
    panels = {run.name: {kind: [layer[kind] for layer in classes[run.name]] for kind in kinds} for run in lens.runs}
    names = {"target": "+".join(lens.targets), "English": "eng_Latn", "other": "other languages", "unknown": "unknown"}
    what = _axis(lens.provenance["settings"])
    signed = "" if len(lens.runs) == 1 else f"steered: {lens.runs[-1].signature}"
    figures = write_figure(folder, "logit-lens", lambda: lens_lines(panels, names, what, signed))
    return [folder / "lens.csv", folder / "lens-labels.csv", folder / "logit-lens.json", *figures]


def _axis(settings: Mapping[str, Any]) -> str:
    if settings["top_p"] is None:
        return f"probability of the top {settings['top_k']} tokens"
    return (
        "probability of all tokens"
        if settings["top_p"] == 1
        else f"probability of the top-{settings['top_p']:g} tokens"
    )


# --- the figure -----------------------------------------------------------------------------------------------------

_LINES = {  # of each line: dashes, mark
    "target": ("-", "o"), "English": ("--", "s"), "other": ("-.", "^"), "unknown": (":", "x"),
}  # fmt: skip
_LINE_COLOURS = {"target": VERMILION, "English": BLUE, "other": GREEN, "unknown": "0.45"}


def lens_lines(
    panels: Mapping[str, Mapping[str, Sequence[float]]], names: Mapping[str, str], what: str, signed: str = ""
) -> Figure:
    """One panel a run, one line a class of languages over the layers, on one scale.

    Args:
        panels: title -> class -> mass after each layer.
        names: class -> what the legend calls it.
        what: the axis' label: which mass.
        signed: the intervention, above the panels.
    """
    layers = max(len(line) for lines in panels.values() for line in lines.values())
    figure = new_figure(PAGE if len(panels) > 1 else 4.4, 3.0)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for kind, line in lines.items():
            dashes, mark = _LINES[kind]
            axes.plot(
                range(len(line)), line, dashes, marker=mark, markersize=3.2, markevery=max(1, layers // 16),
                color=_LINE_COLOURS[kind], linewidth=1.5, label=names[kind], clip_on=False,
            )  # fmt: skip
        axes.set_title(title, loc="left")
        axes.set_xlabel("after layer")
        axes.set_xlim(-0.02 * layers, layers - 1 + 0.02 * layers)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.grid(axis="y", color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if signed:
        figure.suptitle("\n".join(wrap(signed, 115)), fontsize=6.5, x=0.01, ha="left", color="0.3")
    highest = max(max(line) for lines in panels.values() for line in lines.values())
    all_axes[0].set_ylim(0, min(1.0, 1.08 * highest) or 1.0)
    all_axes[0].set_ylabel(what)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3)
    return figure
