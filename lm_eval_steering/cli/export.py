"""The command export: a static intervention written into weights that any engine runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lm_eval_steering.cli import options
from lm_eval_steering.errors import SteeringError


class Form(StrEnum):
    """What is written."""

    CHECKPOINT = "checkpoint"
    LORA = "lora"


def export(
    model: options.Model,
    neurons: options.Neurons,
    as_: Annotated[Form, typer.Option("--as", help="A plain checkpoint, or a LoRA (op=scale only).")],
    out: Annotated[Path, typer.Option(help="Folder to write; it is renamed from OUT.partial when it is complete.")],
    language: Annotated[str | None, typer.Option(help="Language to steer; several joined by +.")] = None,
    op: Annotated[str | None, typer.Option(help="scale, add or set.")] = None,
    value: Annotated[str | None, typer.Option(help="A number, or a calibrated statistic of the neuron set.")] = None,
    factor: Annotated[float | None, typer.Option(help="Any finite number; 1 by default.")] = None,
    preset: Annotated[str | None, typer.Option(help="A paper's name for op and value.")] = None,
    deactivate: Annotated[str | None, typer.Option(help="Languages to deactivate, joined by +, or others.")] = None,
    deactivate_to: Annotated[str | None, typer.Option(help="Value for them; 0 by default.")] = None,
    keep_shared: Annotated[str | None, typer.Option(help="false: deactivate also neurons that are steered.")] = None,
    site: Annotated[str | None, typer.Option(help="activation or product.")] = None,
    layers: Annotated[str | None, typer.Option(help="Ranges such as 0-3+28-31.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Only all can be exported: weights treat every token alike.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="Of a live statistic, which cannot be exported.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random numbers, which cannot be exported.")] = None,
    intervention: Annotated[
        Path | None, typer.Option(help="YAML file of steps, instead of the arguments above.")
    ] = None,
    factors: Annotated[str | None, typer.Option(help="LoRA: one adapter per factor, such as 0.5,1.5,2,3.")] = None,
    max_rank: Annotated[
        int, typer.Option(min=1, help="LoRA: largest number of units per layer; vLLM's limit is 512.")
    ] = 512,
    width_multiple: Annotated[
        int, typer.Option(min=1, help="Checkpoint: if the number of units grows, it is a multiple of this.")
    ] = 128,
    shard_size: Annotated[float, typer.Option(help="Checkpoint: largest size of a file, in GB.")] = 1.0,
    verify: Annotated[int, typer.Option(min=0, help="Compare hooks and export on this many prompts of --text.")] = 0,
    text: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None,
    allow_empty: Annotated[bool, typer.Option(help="Accept a language without neurons.")] = False,
    force: options.Force = False,
    revision: options.Revision = "main",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    model_args: options.ModelArguments = None,
) -> None:
    """Write the steered model as a plain checkpoint, or a scaling as a LoRA, for vLLM and any other engine."""
    from lm_eval_steering.export.job import Job, export_checkpoint, export_lora
    from lm_eval_steering.export.verify import Loader, read_prompts
    from lm_eval_steering.neurons.neuron_set import NeuronSet

    options.check_folder(out)
    if factors is not None and as_ is not Form.LORA:
        raise SteeringError("--factors conflicts with --as checkpoint, which has one factor: use --as lora")
    if shard_size <= 0:
        raise SteeringError(f"--shard-size {shard_size:g}: expected GB above 0")
    arguments = {
        "language": language, "op": op, "value": value, "factor": factor, "preset": preset, "deactivate": deactivate,
        "deactivate_to": deactivate_to, "keep_shared": keep_shared, "site": site, "layers": layers,
        "positions": positions, "scope": scope, "seed": seed, "intervention": intervention,
    }  # fmt: skip
    loading = options.read_model_arguments(model_args)
    job = Job(
        Loader(model, revision, dtype, device, device_map, trust_remote_code, loading),
        NeuronSet.load(neurons), arguments, out, allow_empty, force,
        read_prompts(text, verify) if verify else (),
    )  # fmt: skip
    if as_ is Form.CHECKPOINT:
        lines = export_checkpoint(job, width_multiple, int(shard_size * 1e9))
    else:
        lines = export_lora(job, read_factors(factors), max_rank)
    typer.echo("\n".join(lines))


def read_factors(text: str | None) -> tuple[float, ...]:
    """Numbers from `0.5,1.5,2,3`, each once.

    Raises:
        SteeringError: if one is not a number.
    """
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(","))) if text is not None else ()
    except ValueError:
        raise SteeringError(f"--factors {text}: expected numbers joined by commas, such as 0.5,1.5,2,3") from None
