"""Errors that a user can cause. Each message names the argument, what was given, what was expected, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SteeringError(ValueError):
    """A mistake in what was asked for; the command line prints its one line without a traceback."""


class UndefinedForLanguageError(SteeringError):
    """A task that has no documents for the steered language, such as LSS towards its own base; no data are missing."""


class UnknownLanguageError(SteeringError):
    """A language code that is not known, or not in the neuron set."""


class NeuronSetError(SteeringError):
    """A neuron-set file that is missing, cut short, not what it says, or made for another model."""


class CorpusError(SteeringError):
    """Text that cannot be read or is missing for a language."""


class RecordingError(SteeringError):
    """A recording that is missing, damaged, or was made with other settings."""


class InterventionError(SteeringError):
    """An intervention that is not defined: unknown operation or argument, factor not finite, statistic absent."""


class ArchitectureError(SteeringError):
    """A model whose MLP activations we do not know how to reach."""


class DidNotHappenError(RuntimeError):
    """The intervention was asked for and did not take place as the architecture says it must: never a score."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'scale'?"` for the nearest known name, or the list of all where none is near."""
    choices = [str(choice) for choice in known]
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(choice) for choice in near)}?"
    return f"; known: {', '.join(choices)}" if choices else ""
