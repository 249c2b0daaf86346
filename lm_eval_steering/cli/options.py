"""Options that several commands share, each declared once, and how their texts are read."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lm_eval_steering.errors import CorpusError, NeuronSetError, SteeringError

if TYPE_CHECKING:
    import torch

    from lm_eval_steering.architectures.loading import LazyModel
    from lm_eval_steering.neurons.find import Method
    from lm_eval_steering.neurons.neuron_set import NeuronSet
    from lm_eval_steering.neurons.recorder import Search
    from lm_eval_steering.neurons.running import ModelRunner


class RowKind(StrEnum):
    """How text is cut into rows."""

    PACKED = "packed"
    SENTENCES = "sentences"


class MethodName(StrEnum):
    """How neurons are selected."""

    LAPE = "lape"
    ACTIVATED = "activated"
    AVERAGE_PRECISION = "average-precision"


# --- Single options

Corpus = Annotated[
    str, typer.Option(help="Folder, path with {lang} in it, or hf:DATASET?config=...&column=... (docs/corpora.md).")
]
Languages = Annotated[str, typer.Option(help="Codes joined by commas, such as fra_Latn,ind_Latn.")]
Out = Annotated[Path, typer.Option(help="Neuron set to write, a .safetensors file; {rate} in it for several rates.")]
OutFile = Annotated[Path, typer.Option(help="File to write.")]
Neurons = Annotated[Path, typer.Option(help="Neuron set, a path or the name of one that ships.")]
Model = Annotated[str, typer.Option(help="Hub id or folder of a causal language model.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, ...; a GPU by default where there is one.")]
DeviceMap = Annotated[str | None, typer.Option(help="Such as auto: spread a model that one device cannot hold.")]
Dtype = Annotated[str, typer.Option(help="Of the weights; auto takes the checkpoint's.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's repository.")]
Sites = Annotated[
    str | None, typer.Option(help="Where the units are in a family that is not known (docs/architectures.md).")
]
ModelArguments = Annotated[
    str | None,
    typer.Option(help="As steered-hf takes them: gguf_file=..., peft=..., load_in_8bit=True, or a JSON object."),
]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens per row; at most 2048 by default.")]
Sentences = Annotated[int, typer.Option(help="Calibration sentences per language.")]
Percentiles = Annotated[str, typer.Option(help="Which pNN to keep, joined by commas, or all.")]
Residual = Annotated[
    bool, typer.Option("--residual", help="Measure the hidden states of every layer too, for site=residual.")
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Use a neuron set that was found in other weights, such as the unquantised ones."),
]
NINE = "1,5,10,25,50,75,90,95,99"
BatchSize = Annotated[str, typer.Option(help="Rows per forward pass, or auto: what suits the device.")]


class BosKind(StrEnum):
    """What the model sees before each row."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


Bos = Annotated[
    BosKind, typer.Option(help="Prefix of each row: what evaluation shows (auto), BOS (always), or nothing (never).")
]


# --- Groups of options: a command takes one parameter for each


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass replaced by one option per field.

    typer reads a command's signature; the one that it gets here is that of all the options, and what the user gave is
    put together again before the command is called.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and is_dataclass(kind):
            groups[parameter.name] = kind
            options = get_type_hints(kind, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.default is MISSING else field.default,
                    annotation=options[field.name],
                )
                for field in fields(kind)
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind) if field.name in given})
        command(**given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Model
    revision: Revision = "main"
    device: Device = None
    device_map: DeviceMap = None
    dtype: Dtype = "auto"
    trust_remote_code: RemoteCode = False
    sites: Sites = None
    model_args: ModelArguments = None

    def load(self, device: torch.device | None = None) -> LazyModel:
        """The model's config is read here; its weights are not.

        Args:
            device: where a launcher puts this process, unless --device says otherwise.

        Raises:
            SteeringError: if there is no such model, or an argument is unknown.
        """
        from lm_eval_steering.architectures.loading import LazyModel

        return LazyModel(
            self.model, self.revision, self.dtype, self.device or device, self.sites, self.device_map,
            self.trust_remote_code, read_model_arguments(self.model_args),
        )  # fmt: skip


@dataclass(frozen=True)
class SelectionOptions:
    """How neurons are selected from a recording."""

    method: Annotated[MethodName, typer.Option(help="How neurons are selected.")] = MethodName.LAPE
    rate: Annotated[str, typer.Option(help="LAPE: share of all neurons; several joined by commas.")] = "0.01"
    filter_rate: Annotated[
        float, typer.Option(help="LAPE: a neuron is eligible if one of its probabilities is above this share of all.")
    ] = 0.95
    bar_rate: Annotated[
        float, typer.Option(help="LAPE: it belongs to the languages whose probability is above this share of all.")
    ] = 0.95
    top_k: Annotated[int | None, typer.Option(help="activated, average-precision: neurons per language.")] = None
    bottom_k: Annotated[
        int | None, typer.Option(help="average-precision: neurons per language from the other end.")
    ] = None
    threshold: Annotated[float | None, typer.Option(help="average-precision: instead of --top-k.")] = None

    def read(self, out: Path) -> Method:
        """The method; `out` must have room for each rate."""
        from lm_eval_steering.neurons.find import Method

        rates = read_rates(self.rate, out)
        return Method(
            self.method.value, rates, self.filter_rate, self.bar_rate, self.top_k, self.bottom_k, self.threshold
        )


@dataclass(frozen=True)
class TextOptions:
    """What text is recorded and calibrated with."""

    corpus: Corpus
    languages: Languages
    tokens: Annotated[
        str | None, typer.Option(help="Budget per language, such as 10M; all of the text by default.")
    ] = None
    rows: Annotated[RowKind, typer.Option(help="Packed windows of the context length, or one row per line.")] = (
        RowKind.PACKED
    )
    context: Context = None
    calibration_corpus: Annotated[
        str | None, typer.Option(help="Text to calibrate with; the lines of --corpus by default.")
    ] = None
    sentences: Sentences = 100

    def read(self, percentiles: str = NINE, residual: bool = False) -> Search:
        """What is asked for, checked."""
        from lm_eval_steering.neurons.recorder import Search

        return Search(
            self.corpus, read_languages(self.languages), read_budget(self.tokens), self.rows.value, self.context,
            self.calibration_corpus, self.sentences, read_percentiles(percentiles), residual,
        )  # fmt: skip


def runner_of(model: ModelOptions, batch_size: str, context: int | None, bos: BosKind) -> ModelRunner:
    """A model and how it is run, on the device of this process where several were launched."""
    from lm_eval_steering.neurons.running import CONTEXT, ModelRunner, launched
    from lm_eval_steering.progress import Log

    ranks, device = launched()
    log = Log(show=ranks.first)
    size = read_batch_size(batch_size)
    return ModelRunner(model.load(device), size, ranks, log, context or CONTEXT, bos.value)


# --- Reading the texts

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def read_model_arguments(text: str | None) -> dict[str, Any]:
    """Arguments from `gguf_file=m.gguf,load_in_8bit=True`, or from a JSON object.

    Raises:
        SteeringError: if it is neither.
    """
    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise SteeringError(f"--model-args {text}: not a JSON object ({error})") from None
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if wrong := [name for name, equals, _ in pairs if not equals or not name.strip()]:
        raise SteeringError(f"--model-args {text}: expected key=value joined by commas, got {wrong[0]!r}")
    return {name.strip(): _plain_value(value) for name, _, value in pairs}


def _plain_value(text: str) -> Any:
    """`True`, `None` and numbers as such, anything else as text: as lm-eval reads --model_args."""
    if text.lower() in {"true", "false", "none"}:
        return {"true": True, "false": False, "none": None}[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def read_budget(text: str | None) -> int | None:
    """Number of tokens from `10M`, `500k` or `1000000`.

    Raises:
        CorpusError: if it is no number above 0.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmb]?)", text.replace("_", "").lower())
    number = int(float(match[1]) * _FACTORS[match[2]]) if match else 0
    if number <= 0:
        raise CorpusError(f"--tokens {text}: expected a number above 0, such as 10M")
    return number


def read_batch_size(text: str) -> int | None:
    """Rows per forward pass; None for auto.

    Raises:
        SteeringError: if it is neither auto nor a number above 0.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise SteeringError(f"--batch-size {text}: expected auto, or a number above 0")
    return int(text)


def read_languages(text: str) -> tuple[str, ...]:
    """Codes of the form fra_Latn, each once."""
    from lm_eval_steering.languages import normalise

    return tuple(dict.fromkeys(normalise(code) for code in text.split(",") if code.strip()))


def read_rates(text: str, out: Path) -> tuple[float, ...]:
    """Rates from `0.01,0.05`.

    Raises:
        SteeringError: if one is no number, or several would be written to one file.
    """
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise SteeringError(f"--rate {text}: expected numbers in (0, 1], joined by commas") from None
    if len(rates) > 1 and "{rate}" not in out.name:
        raise SteeringError(f"--out {out}: several rates need {{rate}} in the name, as in set-{{rate}}.safetensors")
    return rates


def read_percentiles(text: str) -> tuple[int, ...]:
    """Percentiles from `5,95`, or all of 1 to 99.

    Raises:
        SteeringError: if one is no whole number.
    """
    if text == "all":
        return tuple(range(1, 100))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise SteeringError(f"--percentiles {text}: expected whole numbers joined by commas, or all")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def check_out(path: Path, suffix: str = "") -> None:
    """Refuse a file that could not be written after the work is done.

    Raises:
        SteeringError: naming it.
    """
    if path.is_dir() or not _writable(path):
        raise SteeringError(f"--out {path}: expected a file in a folder that can be written")
    if not path.name.endswith(suffix):
        raise SteeringError(f"--out {path}: a neuron set's name ends in {suffix}")


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that could not be made or written, naming the option that it is of.

    Raises:
        SteeringError: naming it.
    """
    if (path.exists() and not path.is_dir()) or not _writable(path):
        raise SteeringError(f"{option} {path}: expected a folder that can be written")


def save_set(neuron_set: NeuronSet, out: Path, compact: bool = False, instead_of: Path | None = None) -> None:
    """Write a neuron set; another set that the file held is kept beside it, so that nothing computed is lost.

    Args:
        neuron_set: to write.
        out: its file.
        compact: as in `NeuronSet.save`.
        instead_of: file of the set that this one is made of, which may be replaced.
    """
    if out.is_file() and not (instead_of and instead_of.exists() and out.samefile(instead_of)):
        _keep_earlier(neuron_set, out)
    neuron_set.save(out, compact)


def _keep_earlier(neuron_set: NeuronSet, out: Path) -> None:
    """Rename the file, and its log, unless it holds the same content; the name tells its bytes from others."""
    from lm_eval_steering.neurons.neuron_set import NeuronSet

    with suppress(NeuronSetError):  # damaged, or something else: kept too
        if NeuronSet.load(out).content_hash() == neuron_set.content_hash():
            return
    kept = out.with_stem(f"{out.stem}.{hashlib.sha256(out.read_bytes()).hexdigest()[:8]}")
    out.rename(kept)
    log = out.with_suffix(".log.json")
    if log.is_file():
        log.rename(kept.with_suffix(".log.json"))
    typer.echo(f"{out} held another neuron set, which is kept as {kept}")


def _writable(path: Path) -> bool:
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return os.access(nearest, os.W_OK) and (nearest.is_dir() or nearest == path)
