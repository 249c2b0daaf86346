"""The processes of one job: whole batches are dealt to them in turn, and what they count is added up."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from lm_eval_steering.errors import SteeringError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them; one process alone needs no communication.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def deal(self, batches: Sequence[T]) -> list[T]:
        """This process's share, in turn with the others."""
        return list(batches[self.rank :: self.size])

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, on all of them."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def after_first(self, work: Callable[[], None]) -> None:
        """Let the first process do something that the others wait for; if it fails there, all of them fail alike."""
        failure: Exception | None = None
        if self.first:
            try:
                work()
            except SteeringError as error:
                failure = error
        failure = self.gather(failure)[0]
        if failure is not None:
            raise failure


def launched() -> tuple[Ranks, torch.device | None]:
    """This process among those that `accelerate launch` (or torchrun) started, and its device.

    Without a launcher: one process, and no device prescribed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), None
    from accelerate import PartialState

    # gloo on processors. The first process may read text for hours while the others wait.
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    state = PartialState(cpu=cpu, timeout=timedelta(days=2))
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise SteeringError(
            f"{os.environ['WORLD_SIZE']} processes were launched, and {state.num_processes} found each other: all of "
            "them would do the whole work"
        )
    return Ranks(state.process_index, state.num_processes), state.device
