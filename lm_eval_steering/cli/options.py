"""Options that several verbs share, and how their texts are read."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lm_eval_steering.errors import CorpusError, SteeringError


class RowKind(StrEnum):
    """How text is cut into rows."""

    PACKED = "packed"
    SENTENCES = "sentences"


class MethodName(StrEnum):
    """How neurons are selected."""

    LAPE = "lape"
    ACTIVATED = "activated"
    AVERAGE_PRECISION = "average-precision"


Model = Annotated[str, typer.Option(help="Hub id or folder of a causal language model.")]
Text = Annotated[
    str, typer.Option(help="Folder, path with {lang} in it, or hf:DATASET?config=...&column=... (docs/corpora.md).")
]
Languages = Annotated[str, typer.Option(help="Codes joined by commas, such as fra_Latn,ind_Latn.")]
Out = Annotated[Path, typer.Option(help="Neuron set to write, a .safetensors file; {rate} in it for several rates.")]
OutFile = Annotated[Path, typer.Option(help="File to write.")]
Budget = Annotated[str | None, typer.Option(help="Budget for each language, such as 10M; all of the text by default.")]
Rows = Annotated[RowKind, typer.Option(help="Packed windows of the context length, or one row a line.")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens a row; at most 2048 by default.")]
Calibration = Annotated[str | None, typer.Option(help="Text to calibrate with; the lines of --corpus by default.")]
Sentences = Annotated[int, typer.Option(help="Calibration sentences a language.")]
BatchSize = Annotated[str, typer.Option(help="Rows a forward pass, or auto.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, ...; a GPU by default where there is one.")]
Dtype = Annotated[str, typer.Option(help="Of the weights; auto takes the checkpoint's.")]
DeviceMap = Annotated[str | None, typer.Option(help="Such as auto: spread a model that one device cannot hold.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's repository.")]
Percentiles = Annotated[str, typer.Option(help="Which pNN to keep, joined by commas, or all.")]
NINE = "1,5,10,25,50,75,90,95,99"
Sites = Annotated[
    str | None, typer.Option(help="Where the units are in a family that is not known (docs/architectures.md).")
]
SelectionMethod = Annotated[MethodName, typer.Option(help="How neurons are selected.")]
Rate = Annotated[str, typer.Option(help="LAPE: share of all neurons; several joined by commas.")]
FilterRate = Annotated[float, typer.Option(help="LAPE: which smallest probability a neuron must exceed.")]
BarRate = Annotated[float, typer.Option(help="LAPE: which smallest probability makes it a language's.")]
TopK = Annotated[int | None, typer.Option(help="activated, average-precision: neurons a language.")]
BottomK = Annotated[int | None, typer.Option(help="average-precision: neurons a language from the other end.")]
Threshold = Annotated[float | None, typer.Option(help="average-precision: in place of --top-k.")]
SentenceMeans = Annotated[bool, typer.Option(help="Keep what activated and average-precision need.")]

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def read_budget(text: str | None) -> int | None:
    """Number of tokens from `10M`, `500k` or `1000000`.

    Raises:
        CorpusError: if it is no number above 0.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmb]?)", text.replace("_", "").lower())
    number = int(float(found[1]) * _FACTORS[found[2]]) if found else 0
    if number <= 0:
        raise CorpusError(f"--tokens {text}: expected a number above 0, such as 10M")
    return number


def read_batch_size(text: str) -> int | None:
    """Rows a forward pass; None for auto.

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


def check_folder(path: Path) -> None:
    """Refuse a folder that could not be made or written.

    Raises:
        SteeringError: naming it.
    """
    if (path.exists() and not path.is_dir()) or not _writable(path):
        raise SteeringError(f"{path}: expected a folder that can be written")


def _writable(path: Path) -> bool:
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    return os.access(place, os.W_OK) and (place.is_dir() or place == path)
