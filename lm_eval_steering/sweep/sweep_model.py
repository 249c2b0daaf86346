"""The model of a sweep: it keeps what cells share and counts its tokens; `steered-hf` is one model on several ranks."""

from __future__ import annotations

import traceback
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from lm_eval_steering.architectures.weights import weights_digest
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.aggregation import values_of
from lm_eval_steering.lmeval.compat import GATHERED
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.requests import ScoringRows
from lm_eval_steering.lmeval.steered_lm import SteeredLM

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class RankError(RuntimeError):
    """An error on another process of the job, raised on all of them.

    Attributes:
        out_of_memory: whether it was memory that ran out.
    """

    def __init__(self, message: str, out_of_memory: bool) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    if isinstance(error, RankError):
        return error.out_of_memory
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY)


class SweepLM(SteeredLM):
    """A steered model for many evaluations in one process, whatever runs it.

    Attributes:
        tokens: token positions that went through the model on this process.
        calls: forward passes and generations on this process, in the evaluation in hand.
        batch_size: as the model class of lm-eval has it.
    """

    tokens = 0
    calls = 0
    batch_size: Any
    draws_per_rank = False  # a sweep draws the examples of each document (`lmeval.fewshot`)

    # --- kept between cells -----------------------------------------------------------------------------------------

    @cached_property
    def _pairs(self) -> dict[tuple[str, str, str], tuple[list[int], list[int]]]:
        return {}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair = (self.prompting.key, context, continuation)
        if pair not in self._pairs:
            self._pairs[pair] = super()._encode_pair(context, continuation)
        return self._pairs[pair]

    def forget_requests(self) -> None:
        """Let go of tokenised requests, when other tasks come."""
        self._pairs.clear()

    # --- what runs it -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def weights_hash(self) -> str:
        """Of the weights that were loaded."""

    @property
    def device_name(self) -> str:
        """Where it runs."""
        return str(getattr(self, "device", ""))

    @property
    def can_halve(self) -> bool:
        """Whether a forward pass can have fewer rows."""
        return False

    def halve_batch(self) -> str:
        """Half the rows a forward pass from now on.

        Raises:
            SteeringError: where the engine makes its batches itself.
        """
        raise SteeringError("the engine makes its own batches; give it smaller ones with max_num_batched_tokens=")

    @contextmanager
    def together(self) -> Iterator[None]:
        """One evaluation."""
        self.calls = 0
        self.template_notes.clear()
        yield

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be evaluated any more, because a process that it needs has died."""
        return False

    def close(self) -> None:
        """Let go of what would outlive the object."""


class SweepModel(SweepLM, SteeredHFLM):
    """`SteeredHFLM` for many evaluations in one process."""

    batch_size_per_gpu: int | str
    batch_sizes: dict[float, int]
    max_batch_size: int

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        """As `SteeredHFLM`; processes that `accelerate launch` started share the items, GPUs or not."""
        self.shared_evidence: dict[str, Any] | None = None
        super().__init__(pretrained, **arguments)
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._exchanges: Iterator[str] = iter(())

    @property
    def weights_hash(self) -> str:
        """Of the loaded weights."""
        return weights_digest(self.model)

    # --- memory -----------------------------------------------------------------------------------------------------

    @property
    def can_halve(self) -> bool:
        """Whether a forward pass has more than one row."""
        return self._rows > 1

    def halve_batch(self) -> str:
        """Half the rows a forward pass from now on."""
        torch.cuda.empty_cache()
        half = self._rows // 2
        if self.batch_size == "auto":
            self.max_batch_size, self.batch_sizes = half, {}
            return f"at most {half}"
        self.batch_size_per_gpu = half
        return str(half)

    @property
    def _rows(self) -> int:
        if self.batch_size == "auto":
            return min(self.batch_sizes.values(), default=self.max_batch_size)
        return int(self.batch_size_per_gpu)

    # --- counting ---------------------------------------------------------------------------------------------------

    def forward_pass(self, tokens: torch.Tensor, rows: ScoringRows | None, inputs: dict[str, Any]) -> torch.Tensor:
        """As `SteeredHFLM`, counted."""
        self._count(tokens)
        return super().forward_pass(tokens, rows, inputs)

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._count(inps)
        return super()._model_call(inps, attn_mask, labels)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        texts = super()._model_generate(context, max_length, stop, **generation_kwargs)
        self._count(texts)
        return texts

    def _count(self, tokens: torch.Tensor) -> None:
        self.tokens, self.calls = self.tokens + tokens.numel(), self.calls + 1

    # --- several processes ------------------------------------------------------------------------------------------

    # `hf` asks accelerate with more than one GPU alone; on CPU every process would do all the work.

    @property
    def rank(self) -> int:
        """Index of this process."""
        accelerator = getattr(self, "accelerator", None)
        return super().rank if accelerator is None or super().world_size > 1 else int(accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes that share the items."""
        accelerator = getattr(self, "accelerator", None)
        return super().world_size if accelerator is None else int(accelerator.num_processes)

    @contextmanager
    def together(self) -> Iterator[None]:
        """An evaluation by all processes, with `log_samples=True`: where one fails, all do, and none waits for ever.

        Raises:
            RankError: on all of them, for an error on any.
        """
        self.calls, self._exchanges = 0, iter(GATHERED)
        self.template_notes.clear()
        try:
            yield
            self._agree()
        except RankError:
            raise
        except Exception as error:
            self._agree(error)
            raise

    def _agree(self, error: Exception | None = None) -> None:
        """Wait for the other processes, learn of their errors, and add up everyone's counters.

        Each exchange between processes begins with this one, so that a process that failed is met at the next.
        """
        if self.world_size == 1:
            return
        trace = "".join(traceback.format_exception(error)) if error else ""
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(
            everyone, (trace, error is not None and is_out_of_memory(error), self._own_evidence())
        )
        if wrong := [process for process in everyone if process[0]]:
            raise RankError(wrong[0][0], any(process[1] for process in wrong))
        self.shared_evidence = _summed([process[2] for process in everyone])

    def all_gather(self, tensor: torch.Tensor) -> Any:
        """As lm-eval's, once all processes are here."""
        self._agree()
        return super().all_gather(tensor)

    def barrier(self) -> None:
        """As lm-eval's, once all processes are here."""
        self._agree()
        super().barrier()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """As `SteeredHFLM`, without a bar; the processes' counters are added up at the end."""
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self._agree()
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As `SteeredHFLM`, without a bar; the processes' counters are added up at the end."""
        answers = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._agree()
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As `SteeredHFLM`, without a bar; the processes' counters are added up at the end."""
        answers = super().generate_until(requests, disable_tqdm=True)
        self._agree()
        return answers

    def _own_evidence(self) -> dict[str, Any]:
        counters: dict[str, Any] = {"calls": self.calls, **self.prompting.evidence()}
        if self.steering is not None:
            evidence = self.steering.evidence()
            counters |= {name: getattr(evidence, name) for name in ("forwards", "fired", "positions", "largest_change")}
        return counters

    def steering_report(self) -> dict[str, Any]:
        """As `SteeredHFLM`, with the counters of all processes added up; the first one alone asks for it."""
        report = super().steering_report()
        if self.world_size > 1 and self.shared_evidence is not None:
            calls = self.shared_evidence.get("calls")
            report["processes"] = {"number": self.world_size, "calls": calls}
            if "evidence" in report:
                summed = {key: value for key, value in self.shared_evidence.items() if key != "calls"}
                report["evidence"] = report["evidence"] | summed | {"rank": f"all of {self.world_size}"}
        return report

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """lm-eval's gathering of samples and metric values, put back into the order that one process has.

        lm-eval deals documents in turn and strings the processes' shares together. Sums of floating-point numbers
        depend on their order, so the scores would differ in the last digits. Which exchange of an evaluation this is,
        is known from their order (`compat.GATHERED`).
        """
        self._agree()
        gathered = super().gather_object(obj, dst)
        exchange = next(self._exchanges, "")
        if self.world_size == 1 or gathered is None:
            return gathered
        if exchange == "samples":
            self._samples = {task: in_order([part[task] for part in gathered]) for task in gathered[0]}
            return [self._samples]
        if exchange != "values":
            return gathered
        values = {task: values_of(self._samples[task]) for task in obj}
        for task, of_all in values.items():
            if unseen := of_all.keys() - obj[task].keys():
                # lm-eval looks for the metrics of its first process alone, and would leave this one out.
                raise SteeringError(f"{task}: no item of the first process has {min(unseen)[0]}; run one process")
        return [values]


def _summed(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counters of all processes, added up, and the largest change; calls one by one."""
    total: dict[str, Any] = {"calls": [part["calls"] for part in parts]}
    for name in ("forwards", "fired", "positions", "prompts"):
        if name in parts[0]:
            total[name] = sum(part[name] for part in parts)
    if "largest_change" in parts[0]:
        total["largest_change"] = max(part["largest_change"] for part in parts)
    return total


def in_order(parts: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Samples of several processes, filter by filter and document by document."""
    samples = [sample for part in parts for sample in part]
    repeats = min((len(answers) for sample in samples for answers in sample["resps"]), default=1)
    for sample in samples:
        # lm-eval evens out the shares by asking for the last request of a shorter one again.
        sample["resps"] = [answers[:repeats] for answers in sample["resps"]]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    return sorted(samples, key=lambda sample: (filters.index(sample["filter"]), sample["doc_id"]))
