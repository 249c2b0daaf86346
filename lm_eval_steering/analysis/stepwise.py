"""Languages deactivated step by step: which does the model fall back to? (Gurgurov et al. 2025, `fallbacks.py`)

Step 0 is the unsteered model; in step k the neurons of the first k languages of the order are set to 0. After each step
the same prompts are continued greedily, and the language of every continuation is identified.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lm_eval_steering import languages
from lm_eval_steering.analysis.prompts import PromptBatch, Prompts, batches, pad_token
from lm_eval_steering.analysis.run_record import fingerprint_of, made_with, signature_of, write_csv
from lm_eval_steering.analysis.style import CYCLE, PAGE, ink_on, new_figure, write_figure
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import DidNotHappenError, NeuronSetError, SteeringError
from lm_eval_steering.files import write_json
from lm_eval_steering.metrics.language_id import UNKNOWN, Identified, LanguageIdentifier, in_language
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.progress import Log
from lm_eval_steering.steering.attach import fitting_sites, steer

# --- A step of a stepwise deactivation, as it is computed and drawn

EMPTY = "empty"


@dataclass(frozen=True)
class DeactivationStep:
    """The outputs of the model after one more language is deactivated.

    Attributes:
        deactivated: languages, in the order in which they were; empty in step 0.
        neurons: distinct neurons that are set to 0.
        outputs: continuation of each prompt.
        identified: language and confidence of each.
        signature: of the intervention.
        fingerprint: over everything that decides the outputs.
        evidence: what the hooks did (`steering.attach.Evidence`); None in step 0.
        seconds: wall time of the step.
    """

    deactivated: tuple[str, ...]
    neurons: int
    outputs: tuple[str, ...]
    identified: tuple[Identified, ...]
    signature: str
    fingerprint: str
    evidence: Mapping[str, Any] | None
    seconds: float

    @property
    def name(self) -> str:
        """`+ fra_Latn`, the language that was deactivated last, or `nothing`."""
        return f"+ {self.deactivated[-1]}" if self.deactivated else "nothing"

    @property
    def counts(self) -> dict[str, int]:
        """Language -> number of outputs, most frequent first, codes in alphabetical order where equal.

        Outputs without text, where the model ended at once, are `empty` and not `unknown`.
        """
        labels = zip(self.outputs, self.identified, strict=True)
        counted = Counter(one.language if text.strip() else EMPTY for text, one in labels)
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))

    @property
    def shares(self) -> dict[str, float]:
        """Language -> share of all outputs, in the same order; they add up to 1, `unknown` and `empty` among them."""
        return {code: count / len(self.identified) for code, count in self.counts.items()}

    @property
    def in_off(self) -> float:
        """Share of the outputs in languages that are deactivated."""
        return sum(
            share
            for code, share in self.shares.items()
            if code != EMPTY and any(in_language(code, off) for off in self.deactivated)
        )


@dataclass(frozen=True)
class Decoding:
    """How texts are generated: greedily, without the sampling and penalties of its generation config.

    Attributes:
        max_new_tokens: largest number per prompt.
        batch_size: prompts per batch.
        stop: a continuation is cut before the first of these texts.
        min_new_tokens: smallest number before the model may end.
    """

    max_new_tokens: int = 64
    batch_size: int = 16
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0


@dataclass(frozen=True)
class Fallback:
    """All steps, and what they were made with."""

    steps: tuple[DeactivationStep, ...]
    provenance: Mapping[str, Any]


def order_of(neurons: NeuronSet, text: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(languages to deactivate in their order, languages of the set left out because they have no neurons).

    Args:
        neurons: the set.
        text: codes joined by commas; by default the set's order.

    Raises:
        UnknownLanguageError: if a named language is not in the set.
        NeuronSetError: if a named language has no neurons, or none of the set has.
        SteeringError: if a language is named twice.
    """
    if text is None:
        order = tuple(code for code in neurons.languages if len(neurons.neurons(code)))
        if not order:
            raise NeuronSetError("no language of the neuron set has neurons, so there is nothing to deactivate")
        return order, tuple(code for code in neurons.languages if code not in order)
    order = tuple(languages.choose(code, neurons.languages, "the neuron set") for code in text.split(","))
    if len(set(order)) != len(order):
        raise SteeringError(f"--order {text}: a language is named twice")
    for code in order:
        if not len(neurons.neurons(code)):
            raise NeuronSetError(f"--order {text}: {code} has no neurons in the set, so its step would do nothing")
    return order, ()


def deactivate_stepwise(
    model: LazyModel,
    neurons: NeuronSet,
    prompts: Prompts,
    order: Sequence[str],
    decoding: Decoding | None = None,
    identifier: LanguageIdentifier | None = None,
    log: Log | None = None,
    force: bool = False,
) -> Fallback:
    """Run all steps.

    Args:
        model: loaded when the first step begins.
        neurons: of the model.
        prompts: given to the model as they are, with the special tokens that its tokenizer adds.
        order: languages with neurons, each once (`order_of`).
        decoding: greedy.
        identifier: of the outputs' languages.
        log: shows progress, and keeps times.
        force: accept a set that was found in other weights.

    Raises:
        SteeringError: if the set belongs to another model, or a prompt is too long.
        DidNotHappenError: if a deactivation did not take place in every forward pass.
    """
    decoding, identifier, log = decoding or Decoding(), identifier or LanguageIdentifier(), log or Log(show=False)
    sites = model.override or neurons.provenance.sites or None
    fitting_sites(model.model, neurons, sites=sites, force=force, sketch=model.sketch, name=model.name)
    rows = list(batches(model, prompts.texts, decoding.batch_size, decoding.max_new_tokens))
    provenance = made_with(model, neurons, prompts, identifier, order=list(order), **asdict(decoding))
    steps = []
    with log.bar("generating", (len(order) + 1) * len(prompts.texts), "prompt") as bar:
        for number in range(len(order) + 1):
            off, start = tuple(order[:number]), time.perf_counter()
            arguments: dict[str, Any] = {"deactivate": "+".join(off)} if off else {}
            signature = signature_of(arguments, neurons)
            # The set has been compared with the model above.
            context = steer(model.model, neurons, force=True, sites=sites, **arguments) if off else nullcontext()
            outputs: list[str] = []
            with context as steering:
                for batch in rows:
                    outputs += _continue(model, batch, decoding)
                    bar.update(len(batch.ids))
                evidence = None if steering is None else asdict(steering.evidence())
            if evidence is not None and not evidence["fired"]:
                raise DidNotHappenError(f"deactivating {'+'.join(off)} never took place: no hook fired")
            steps.append(
                DeactivationStep(
                    off, len(neurons.union(off)), tuple(outputs), tuple(identifier.identify(outputs)), signature,
                    fingerprint_of(provenance, signature), evidence, round(time.perf_counter() - start, 3),
                )
            )  # fmt: skip
            log.note("step", number=number, deactivated=list(off), seconds=steps[-1].seconds)
    return Fallback(tuple(steps), provenance)


@torch.no_grad()
def _continue(model: LazyModel, batch: PromptBatch, decoding: Decoding) -> list[str]:
    """Greedy continuations of a left-padded batch, without special tokens."""
    settings = model.model.generation_config
    ids = model.model.generate(
        input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=decoding.max_new_tokens,
        pad_token_id=pad_token(model), eos_token_id=settings.eos_token_id,
        # A checkpoint's own settings may sample, search or penalise; penalties also count the padding of a row.
        do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0,
        no_repeat_ngram_size=0, min_new_tokens=decoding.min_new_tokens, use_cache=True,
    )  # fmt: skip
    texts = model.tokenizer.batch_decode(ids[:, batch.ids.shape[1] :], skip_special_tokens=True)
    return [_cut(text, decoding.stop) for text in texts]


def _cut(text: str, stop: Sequence[str]) -> str:
    starts = [start for start in (text.find(mark) for mark in stop) if start >= 0]
    return text[: min(starts, default=len(text))]


# --- Results as text and files


def table(fallback: Fallback) -> str:
    """One line per step: the language deactivated last, neurons, and the outputs' languages.

    `in off` is the share of the outputs in languages that are deactivated; the most frequent languages follow.
    """
    width = max(len(step.name) for step in fallback.steps)
    lines = [f"step  {'off':<{width}}  neurons  in off  unknown  empty  most frequent"]
    for number, step in enumerate(fallback.steps):
        shares = [f"{code} {share:.2f}" for code, share in step.shares.items() if code not in {UNKNOWN, EMPTY}]
        more = f"  and {len(shares) - 4} more" if len(shares) > 4 else ""
        unknown, empty = (step.shares.get(label, 0.0) for label in (UNKNOWN, EMPTY))
        numbers = f"{step.neurons:>7,}  {step.in_off:>6.2f}  {unknown:>7.2f}  {empty:>5.2f}"
        lines.append(f"{number:>4}  {step.name:<{width}}  {numbers}  {'  '.join(shares[:4])}{more}")
    return "\n".join(lines)


def write(fallback: Fallback, folder: Path) -> list[Path]:
    """`steps.csv` (one row per step and language), `stepwise.json` (outputs, evidence, provenance) and the figure.

    Returns:
        The files.
    """
    header = ("step", "deactivated_last", "languages_off", "neurons", "language", "outputs", "share", "fingerprint")
    rows = [
        (
            number, step.deactivated[-1] if step.deactivated else "", len(step.deactivated), step.neurons,
            code, count, count / len(step.identified), step.fingerprint[:8],
        )
        for number, step in enumerate(fallback.steps)
        for code, count in step.counts.items()
    ]  # fmt: skip
    write_csv(folder / "steps.csv", header, rows)
    steps = [
        {
            "step": number,
            **{key: value for key, value in asdict(step).items() if key not in {"outputs", "identified", "seconds"}},
            "most_common": next(iter(step.counts)),
            "shares": step.shares,
            "in_off": step.in_off,
            "outputs": [{"text": text, **asdict(one)} for text, one in zip(step.outputs, step.identified, strict=True)],
        }
        for number, step in enumerate(fallback.steps)
    ]
    write_json(folder / "stepwise.json", {"made_with": fallback.provenance, "steps": steps})
    figures = write_figure(folder, "stepwise", lambda: stacked_steps(fallback.steps))
    return [folder / "steps.csv", folder / "stepwise.json", *figures]


# --- The figure

_OTHER_GREY, _UNKNOWN_GREY = "0.62", "0.88"


def stacked_steps(steps: Sequence[DeactivationStep]) -> Figure:
    """One bar per step: shares of the outputs' languages, stacked in the order in which they are deactivated.

    Up to fourteen languages have their own colour, seven of them hatched; the rest are `other`, and
    `unknown` and `empty` are on top. A black line in a bar parts the languages that are off, below it, from the others.
    """
    bars = _stacked_bars(steps)
    width = min(PAGE, 2.4 + 0.5 * len(steps))
    figure = new_figure(width, 3.5)
    axes = figure.subplots()
    bottoms, off = np.zeros(len(steps)), np.zeros(len(steps))
    letters = min(6.5, 72 * (width - 1.8) / len(steps) / 2.3)  # three of them fit in a bar
    for part in bars:
        axes.bar(
            range(len(steps)), part.shares, bottom=bottoms, width=0.86, color=part.colour, hatch=part.hatch,
            label=part.name, edgecolor="white" if part.colour != "white" else "0.75", linewidth=0.4,
        )  # fmt: skip
        for column, (share, bottom) in enumerate(zip(part.shares, bottoms, strict=True)):
            if share >= 0.055:
                _code(axes, column, bottom + share / 2, part, letters)
        bottoms += part.shares
        off += [share * _is_off(part.name, step) for share, step in zip(part.shares, steps, strict=True)]
    columns = np.arange(len(steps))[1:]
    axes.hlines(off[1:], columns - 0.47, columns + 0.47, color="black", linewidth=1.6, label="off below the line")
    axes.set_xticks(range(len(steps)), [step.name for step in steps], rotation=60, ha="right", fontsize=6.5)
    for tick in axes.get_xticklabels():
        tick.set_rotation_mode("anchor")
    axes.set_xlabel("deactivated, one language more at each step")
    axes.set_ylabel("share of the outputs")
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.5, len(steps) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Language of the outputs after each step", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    # In the order in which they are stacked.
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=6.5, handlelength=1.4)
    return figure


@dataclass(frozen=True)
class _Bars:
    """One language's part of the bars: (step,) shares."""

    name: str
    shares: NDArray[np.float64]
    colour: str
    hatch: str = ""


def _stacked_bars(steps: Sequence[DeactivationStep]) -> list[_Bars]:
    """Bottom to top: languages that are deactivated, in their order, languages that are not, other, unknown, empty."""
    totals: dict[str, float] = {}
    for step in steps:
        for code, share in step.shares.items():
            totals[code] = totals.get(code, 0.0) + share
    frequent = sorted(totals.keys() - {UNKNOWN, EMPTY}, key=lambda code: (-totals[code], code))[: 2 * len(CYCLE)]
    order = steps[-1].deactivated
    named = [code for code in order if code in frequent] + [code for code in frequent if code not in order]
    bars = [
        _Bars(code, _shares(steps, [code]), CYCLE[n % len(CYCLE)], "" if n < len(CYCLE) else "//////")
        for n, code in enumerate(named)
    ]
    bars.append(_Bars("other", _shares(steps, totals.keys() - {UNKNOWN, EMPTY, *named}), _OTHER_GREY))
    bars.append(_Bars(UNKNOWN, _shares(steps, [UNKNOWN]), _UNKNOWN_GREY))
    bars.append(_Bars(EMPTY, _shares(steps, [EMPTY]), "white"))
    return [part for part in bars if part.shares.any()]


def _shares(steps: Sequence[DeactivationStep], codes: Collection[str]) -> NDArray[np.float64]:
    return np.array([sum(step.shares.get(code, 0.0) for code in codes) for step in steps], dtype=np.float64)


def _code(axes: mpl.axes.Axes, column: float, height: float, part: _Bars, size: float) -> None:
    text = {UNKNOWN: "?", EMPTY: "–"}.get(part.name, part.name.split("_", maxsplit=1)[0])
    # A patch of the colour behind it, so that it can be read on hatching.
    patch = {"facecolor": part.colour, "edgecolor": "none", "pad": 0.6} if part.hatch else None
    colour = ink_on(mpl.colors.to_rgb(part.colour))
    axes.text(column, height, text, ha="center", va="center", fontsize=size, color=colour, bbox=patch)


def _is_off(name: str, step: DeactivationStep) -> bool:
    return "_" in name and any(in_language(name, code) for code in step.deactivated)
