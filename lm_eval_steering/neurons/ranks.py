"""The processes of one job: whole batches are dealt to them in turn, and what they count is added up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

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

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()


def launched() -> tuple[Ranks, torch.device | None]:
    """This process among those that `accelerate launch` (or torchrun) started, and its device.

    Without a launcher: one process, and no device prescribed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), None
    from accelerate import PartialState

    state = PartialState()
    return Ranks(state.process_index, state.num_processes), state.device
