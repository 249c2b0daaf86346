"""Commands that work on files of neurons: import, inspect, and `neurons export`, `intersect`, `union`, ..."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_steering.cli import options
from lm_eval_steering.errors import SteeringError

if TYPE_CHECKING:
    from lm_eval_steering.neurons.neuron_set import NeuronSet

neurons = typer.Typer(no_args_is_help=True, help="Set algebra, random controls, and export for other people's scripts.")

Set = Annotated[Path, typer.Argument(help="Neuron set, a path or the name of one that ships.")]
Sets = Annotated[list[Path], typer.Argument(help="Neuron sets of one model.")]


def import_(
    files: Annotated[list[Path], typer.Argument(help="list[language][layer] of indices, or recordings of counts.")],
    languages: Annotated[str, typer.Option(help="Codes joined by commas, in the order of the file.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of the model that the indices belong to.")],
    out: Annotated[Path, typer.Option(help="Neuron set to write, or the folder of a recording.")],
    dictionary: Annotated[Path | None, typer.Option(help="Language dictionary of lang-task-neuron, to check.")] = None,
    revision: options.Revision = "main",
    source: Annotated[str | None, typer.Option(help="Where the file is from; kept in the set.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="Of the file; kept in the set.")] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="A quarter of the bytes, in format version 3 (docs/neuron-sets.md).")
    ] = False,
    model_name: Annotated[
        str | None, typer.Option(help="Hub id of the model, where --model is a folder with its config.")
    ] = None,
) -> None:
    """Turn other people's files into ours. Only the model's config is read; nothing in a file is executed."""
    from lm_eval_steering.architectures.loading import LazyModel
    from lm_eval_steering.neurons.convert import holds_recording, import_lists, import_recordings
    from lm_eval_steering.neurons.neuron_set import Provenance
    from lm_eval_steering.neurons.recording import RecordingFolder
    from lm_eval_steering.provenance import versions

    options.check_out(out)
    codes = languages.split(",")
    maker = LazyModel(model, revision).maker() | ({"model": model_name} if model_name else {})
    if holds_recording(files[0]):
        if dictionary is not None:
            raise SteeringError("--dictionary belongs to lists of neurons; a recording names its languages itself")
        import_recordings(files, codes, maker, RecordingFolder(out))
        typer.echo(f"wrote {out}; `lm-eval-steering select --recording {out}` selects from it")
        return
    if len(files) > 1:
        raise SteeringError("one file holds the lists of all languages; several are for recordings alone")
    given = {"source": source, "license": license_}
    selection = {
        "method": "imported",
        "file": files[0].name,
        "sha256": hashlib.sha256(files[0].read_bytes()).hexdigest() if files[0].is_file() else "",
        **{name: value for name, value in given.items() if value},
    }
    provenance = Provenance(**maker, selection=selection, versions=versions(evaluation=False))
    imported = import_lists(files[0], codes, provenance, dictionary)
    options.save_set(imported, out, compact)
    for code in imported.languages:
        typer.echo(f"{code}  {len(imported.neurons(code))} neurons")
    typer.echo(f"wrote {out}; it holds no statistics, so value= takes numbers only until `calibrate` adds them")


def inspect(
    neuron_set: Set,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; none are drawn without it.")] = None,
) -> None:
    """Print where a neuron set comes from and what is in it; draw its layers, overlaps and entropies."""
    from lm_eval_steering.analysis.inspect import describe
    from lm_eval_steering.analysis.neuron_figures import draw
    from lm_eval_steering.neurons.neuron_set import NeuronSet

    loaded = NeuronSet.load(neuron_set)
    typer.echo(describe(loaded), nl=False)
    for path in draw(loaded, out) if out is not None else []:
        typer.echo(f"wrote {path}")


@neurons.command()
def export(neuron_set: Set, out: options.OutFile) -> None:
    """Write list[language][layer] of indices with torch.save, the layout of the published scripts."""
    from lm_eval_steering.neurons.convert import export_lists

    options.check_out(out)
    loaded = _load(neuron_set)
    export_lists(loaded, out)
    typer.echo(f"wrote {out}; its languages, in order: {','.join(loaded.languages)}")


@neurons.command()
def intersect(sets: Sets, out: options.OutFile) -> None:
    """Neurons that a language has in all sets."""
    from lm_eval_steering.neurons import set_algebra as algebra

    _save(algebra.intersect([_load(path) for path in sets]), out)


@neurons.command()
def union(sets: Sets, out: options.OutFile) -> None:
    """Neurons that a language has in any set."""
    from lm_eval_steering.neurons import set_algebra as algebra

    _save(algebra.union([_load(path) for path in sets]), out)


@neurons.command()
def subtract(neuron_set: Set, others: Sets, out: options.OutFile) -> None:
    """Neurons that a language has in the first set and in none of the others."""
    from lm_eval_steering.neurons import set_algebra as algebra

    _save(algebra.subtract(_load(neuron_set), [_load(path) for path in others]), out)


@neurons.command()
def random(
    neuron_set: Set,
    out: options.OutFile,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    disjoint: Annotated[bool, typer.Option(help="Leave out the set's neurons.")] = True,
) -> None:
    """A matched random control: as many neurons in each layer for each language. `calibrate` adds statistics."""
    from lm_eval_steering.neurons.find import random_set

    _save(random_set(_load(neuron_set), seed, disjoint), out)


def _load(path: Path) -> NeuronSet:
    from lm_eval_steering.neurons.neuron_set import NeuronSet

    return NeuronSet.load(path)


def _save(result: NeuronSet, out: Path) -> None:
    options.check_out(out)
    options.save_set(result, out)
    for code in result.languages:
        typer.echo(f"{code}  {len(result.neurons(code))} neurons")
    statistics = "with statistics" if result.calibrated is not None else "without statistics (`calibrate` adds them)"
    typer.echo(f"wrote {out}, {statistics}")
