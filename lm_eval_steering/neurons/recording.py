"""How often each unit is active in each language: the counts that LAPE is computed from, and sentences' means."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.architectures import ModelSites
from lm_eval_steering.errors import CorpusError, DidNotHappenError
from lm_eval_steering.neurons.neuron_set import Provenance
from lm_eval_steering.neurons.observe import Batch, Batches, observing
from lm_eval_steering.neurons.ranks import Ranks

Progress = Callable[[int], None]  # called with the number of tokens that were counted

# Elements compared at a time: what stays in a processor's cache, or keeps an accelerator busy.
_BLOCK = {"cpu": 1 << 19}
_LARGE_BLOCK = 1 << 26


@dataclass(frozen=True)
class Recording:
    """What one model did with a corpus.

    Attributes:
        languages: order of the last axis.
        counts: (layer, unit, language) int64, tokens with activation > 0.
        n_tokens: (language,) int64, tokens counted: no padding, no special tokens.
        provenance: of the model and the text.
        sentence_means: one (sentence, layer, unit) float32 array a language, empty where they were not recorded.
    """

    languages: tuple[str, ...]
    counts: NDArray[np.int64]
    n_tokens: NDArray[np.int64]
    provenance: Provenance
    sentence_means: Sequence[NDArray[np.float32]] = ()


class _Counter:
    """Counts on the device, without synchronisation and without a loop over units.

    A comparison written as 0 and 1 into float32, multiplied with the mask of counted positions: exact, because a block
    has far fewer positions than float32 has integers, and several times faster than summing booleans.
    """

    def __init__(self, sites: ModelSites) -> None:
        self.sites = sites
        self.totals: list[torch.Tensor | None] = [None] * sites.shape.layers
        self.buffers: dict[torch.device, torch.Tensor] = {}
        self.batch_counted = torch.zeros(0, 0, dtype=torch.bool)
        self.counted = torch.zeros(0)
        self.finite: torch.Tensor | None = None

    def start(self, batch: Batch) -> None:
        self.batch_counted = batch.counted
        self.counted = batch.counted.reshape(-1).float()

    def see(self, layer: int, units: torch.Tensor) -> None:
        block = self._block(units)
        counted = self.counted.to(units.device)
        total = self.totals[layer]
        if total is None:
            total = self.totals[layer] = torch.zeros(units.shape[-1], dtype=torch.int64, device=units.device)
        for start in range(0, len(units), len(block)):
            part = units[start : start + len(block)]
            active = torch.gt(part, 0, out=block[: len(part)])
            total += (counted[start : start + len(part)] @ active).long()

    def end(self, hidden: torch.Tensor) -> None:
        # Some families leave NaN in padding, which nothing real looks at.
        finite = (hidden.isfinite().all(-1) | ~self.batch_counted.to(hidden.device)).all()
        self.finite = finite if self.finite is None else self.finite & finite

    def _block(self, units: torch.Tensor) -> torch.Tensor:
        if units.device not in self.buffers:
            positions = max(1, _BLOCK.get(units.device.type, _LARGE_BLOCK) // units.shape[-1])
            self.buffers[units.device] = torch.empty(positions, units.shape[-1], device=units.device)
        return self.buffers[units.device]

    def result(self) -> torch.Tensor:
        """(layer, unit) int64 on the CPU; zeros where this process had no batch."""
        shape = self.sites.shape
        zeros = torch.zeros(shape.units, dtype=torch.int64)
        return torch.stack([zeros if total is None else total.cpu() for total in self.totals])


@torch.inference_mode()
def count_active(
    sites: ModelSites, batches: Batches, ranks: Ranks | None = None, progress: Progress | None = None
) -> NDArray[np.int64]:
    """(layer, unit) number of counted tokens on which each unit's activation is above 0.

    The model runs without its language-model head and without a KV cache.

    Args:
        sites: of the model.
        batches: rows of one language; several processes are dealt different ones.
        ranks: those processes; the counts are of all of them, in each.
        progress: told the number of tokens after each batch.

    Raises:
        CorpusError: if there is nothing to count.
        DidNotHappenError: if a layer was not seen exactly once a forward pass, or the model's states overflow.
    """
    if not sum(map(len, batches.rows)):
        raise CorpusError("no tokens to record")
    ranks = ranks or Ranks()
    counter = _Counter(sites)
    with observing(sites, at_activation=counter.see) as run:
        for batch in batches:
            counter.start(batch)
            counter.end(run(batch))
            if progress is not None:
                progress(batch.tokens)
    if not all(ranks.gather(counter.finite is None or bool(counter.finite))):
        raise DidNotHappenError(
            "the model's hidden states hold infinities or NaN, so its activations cannot be counted; load it in "
            "bfloat16 or float32"
        )
    # Added up on the device that the processes talk over.
    return ranks.add_up(counter.result().to(batches.device)).cpu().numpy()


@torch.inference_mode()
def sentence_means(sites: ModelSites, batches: Batches, ranks: Ranks | None = None) -> NDArray[np.float32]:
    """(sentence, layer, unit) float32 mean activation over each row's tokens, in the order of the rows."""
    own: dict[int, NDArray[np.float32]] = {}
    layers: dict[int, torch.Tensor] = {}
    counted = torch.zeros(0, 0, dtype=torch.bool)

    def see(layer: int, units: torch.Tensor) -> None:
        mask = counted.to(units.device).unsqueeze(-1)
        by_row = torch.where(mask, units.reshape(*counted.shape, -1).float(), 0)
        layers[layer] = (by_row.sum(1) / mask.sum(1)).cpu()

    with observing(sites, at_activation=see) as run:
        for batch in batches:
            counted = batch.counted
            run(batch)
            means = torch.stack([layers[layer] for layer in range(sites.shape.layers)], dim=1).numpy()
            own |= dict(zip(batch.rows.tolist(), means, strict=True))
    everyone = {number: means for part in (ranks or Ranks()).gather(own) for number, means in part.items()}
    return np.stack([everyone[number] for number in range(len(everyone))])


@torch.inference_mode()
def tokens_per_second(sites: ModelSites, batches: Batches) -> float:
    """Speed of the recording, from a short warm-up: one batch, the second time that it runs."""
    counter = _Counter(sites)
    batch = batches.build(batches.plan[0])
    seconds = 0.0
    with observing(sites, at_activation=counter.see) as run:
        for _ in range(2):
            start = time.perf_counter()
            counter.start(batch)
            counter.end(run(batch))
            counter.result()  # waits for the device
            seconds = time.perf_counter() - start
    return batch.tokens / seconds


def batch_size_that_fits(sites: ModelSites, build: Callable[[int], Batches]) -> int:
    """Largest power of two up to 256 at which a batch can be recorded; 16 on a CPU, which more rows do not speed up.

    Args:
        sites: of the model.
        build: batches of the longest rows, for a batch size.
    """
    if next(sites.decoder.parameters()).device.type == "cpu":
        return 16
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    for batch_size in (256, 128, 64, 32, 16, 8, 4, 2):
        try:
            tokens_per_second(sites, build(batch_size))
            return batch_size
        except Exception as error:  # the library knows the texts of every backend's out-of-memory error
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
    return 1
