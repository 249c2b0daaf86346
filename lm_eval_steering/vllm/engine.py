"""The process of lm-eval's side of a steered engine: plans are written to all workers, and their counters read back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lm_eval_steering.architectures import Shape
from lm_eval_steering.errors import ArchitectureError, DidNotHappenError, InterventionError
from lm_eval_steering.steering.compiled import CompiledIntervention, Edit
from lm_eval_steering.steering.intervention import RESIDUAL
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.activation import LAYOUT
from lm_eval_steering.vllm.arguments import CAPACITY, HIDDEN_STATES


@dataclass(frozen=True)
class EngineEvidence:
    """What happened since the plan was written.

    Attributes:
        forwards: forward passes that the workers ran for requests, unsteered twins left out.
        modules: number of (layer, site) that the plan edits.
        positions: tokens edited, of the module and worker that edited the fewest; padding and warm-up left out.
        asked: tokens that the requests needed: prompts without what the prefix cache held, and all but the last
            generated token.
        neurons: (site, layer, unit) edited at each position, over all workers, dimensions of hidden states among them.
        largest_change: largest |a' - a| over finite a, in units of the activation; infinite where a' overflowed.
        finite: whether it is not infinite.
        workers: for each, its ranks, its layers and the tokens that it edited.
    """

    forwards: int
    modules: int
    positions: int
    asked: int
    neurons: int
    largest_change: float
    finite: bool
    workers: tuple[dict[str, Any], ...]


@dataclass
class _Tally:
    """Sums over the requests since the plan was written."""

    asked: int = 0
    forwards: int = 0
    largest: float = 0.0
    edited: Counter[tuple[int, int, str]] = field(default_factory=Counter)  # (worker, layer, what is edited) -> tokens


class SteeredEngine:
    """A running `vllm.LLM` whose workers are `SteeredWorker`s."""

    def __init__(self, llm: Any, shape: Shape) -> None:
        """Ask the workers what they hold; nothing is edited yet.

        Args:
            llm: of vLLM.
            shape: of the model, from its config.

        Raises:
            ArchitectureError: if a worker found other modules than the table says.
            DidNotHappenError: if the workers together do not hold each unit once in each tensor-parallel group, or not
                all hidden states of their layers.
        """
        self._llm = llm
        self.plan: CompiledIntervention | None = None
        self._suspended, self._tally = False, _Tally()
        self._layouts: list[dict[str, Any]] = sorted(
            compat.call_workers(llm, "steering_layout"), key=lambda one: one["rank"]
        )
        try:
            self._check(shape)
        except Exception:
            compat.shut_down(llm)
            raise
        self._latest = self._read()

    def _check(self, shape: Shape) -> None:
        for layout in self._layouts:
            if layout["problem"]:
                raise ArchitectureError(layout["problem"])
            if layout["layout"] != LAYOUT:
                raise DidNotHappenError(f"worker {layout['rank']} runs another release of lm-eval-steering")
        for layer in range(shape.layers):
            slices = sorted(
                tuple(layout["layers"][str(layer)]) for layout in self._layouts if str(layer) in layout["layers"]
            )
            # A layer that is not split is held whole by each worker.
            ends = [first + width for first, width, _ in dict.fromkeys(slices)]
            firsts = [first for first, _, _ in dict.fromkeys(slices)]
            if not slices or firsts != [0, *ends[:-1]] or ends[-1] != shape.units:
                raise DidNotHappenError(
                    f"layer {layer}: the workers hold the units {slices or 'nowhere'} (first, number, of), expected "
                    f"all {shape.units}"
                )
        for layout in self._layouts:
            missing = layout["layers"].keys() - layout["dimensions"].keys()
            if layout["dimensions"] and missing:
                raise DidNotHappenError(f"worker {layout['rank']} holds no hidden states of layer {min(missing)}")

    # --- the intervention ---------------------------------------------------------------------------------------

    def write(self, plan: CompiledIntervention | None) -> None:
        """Replace the numbers on all workers; None is the unsteered model. The evidence starts anew.

        Raises:
            InterventionError: if a layer has no room for its units or hidden states, or these have another number of
                dimensions; the intervention that was on stays on.
            DidNotHappenError: if the workers do not hold what was sent, or the prefix cache could not be emptied.
        """
        self._refuse_too_many(plan)
        self._refuse_hidden_states(plan)
        self._send(plan)
        self.plan, self._tally, self._latest = plan, _Tally(), self._read()

    def _refuse_too_many(self, plan: CompiledIntervention | None) -> None:
        units: dict[int, Any] = {}
        for edit in plan.edits if plan else ():
            if edit.site == RESIDUAL:
                continue
            units[edit.layer] = np.union1d(units.get(edit.layer, []), edit.units)
        for layer, of_layer in units.items():
            for layout in self._layouts:
                first, width, _ = layout["layers"].get(str(layer), (0, 0, 0))
                number = int(((of_layer >= first) & (of_layer < first + width)).sum())
                if number > min(layout["capacity"], width):
                    raise InterventionError(
                        f"{number} units of layer {layer} are to be edited, this engine was started with room for "
                        f"{layout['capacity']} on each worker; start it with {CAPACITY}={len(of_layer)}"
                    )

    def _refuse_hidden_states(self, plan: CompiledIntervention | None) -> None:
        for edit in plan.edits if plan else ():
            if edit.site != RESIDUAL:
                continue
            widths = {layout["dimensions"].get(str(edit.layer)) for layout in self._layouts_of(edit.layer)}
            if None in widths:
                raise InterventionError(
                    f"site=residual: this engine was started without room for hidden states; start it with "
                    f"{HIDDEN_STATES}=True"
                )
            if widths != {edit.dimensions}:
                raise InterventionError(
                    f"site=residual: layer {edit.layer} returns {widths.pop()} dimensions, the neuron set has "
                    f"statistics of {edit.dimensions}: it was calibrated on another model; calibrate it on this one"
                )

    def _layouts_of(self, layer: int) -> list[dict[str, Any]]:
        """Of the workers that hold a layer."""
        return [layout for layout in self._layouts if str(layer) in layout["layers"]]

    def _send(self, plan: CompiledIntervention | None) -> None:
        edits = plan.edits if plan else ()
        expected = sum(map(self._held, edits))
        written = sum(compat.call_workers(self._llm, "steering_write", ([message_of(edit) for edit in edits],)))
        if written != expected:
            raise DidNotHappenError(f"the workers edit {written} units, {expected} were sent to them")
        # The cache of keys and values knows requests by their tokens alone.
        if not compat.reset_prefix_cache(self._llm):
            raise DidNotHappenError(
                "vLLM did not empty its prefix cache, so another intervention would be read from it"
            )

    def _held(self, edit: Edit) -> int:
        """Number of units of an edit that workers hold, each as often as it is held: all dimensions by each worker."""
        if edit.site == RESIDUAL:
            return len(edit.units) * len(self._layouts_of(edit.layer))
        slices = [layout["layers"].get(str(edit.layer), (0, 0, 0)) for layout in self._layouts]
        return sum(int(((edit.units >= first) & (edit.units < first + width)).sum()) for first, width, _ in slices)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The unsteered model for a while; nothing is counted."""
        self._send(None)
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False
            self._send(self.plan)
            self._latest = self._read()

    # --- evidence -----------------------------------------------------------------------------------------------

    def _read(self) -> list[dict[str, Any]]:
        return sorted(compat.call_workers(self._llm, "steering_evidence"), key=lambda one: one["rank"])

    def prove(self, outputs: Sequence[Any]) -> None:
        """Compare what was edited for some requests with what they needed; called after they are done.

        Args:
            outputs: of `vllm.LLM.generate`.

        Raises:
            DidNotHappenError: naming the worker and the layer that edited less.
        """
        if self._suspended or self.plan is None:
            return
        asked = sum(_tokens_needed(output) for output in outputs)
        before, self._latest = self._latest, self._read()
        self._tally.asked += asked
        self._tally.forwards += max(
            now["forwards"] - was["forwards"] for was, now in zip(before, self._latest, strict=True)
        )
        for was, now in zip(before, self._latest, strict=True):
            self._tally.largest = max(self._tally.largest, now["largest"])
            for earlier, later in zip(was["modules"], now["modules"], strict=True):
                if later["touched"]:
                    self._count(now["rank"], later["layer"], later["edits"], later["tokens"] - earlier["tokens"], asked)

    def _count(self, rank: int, layer: int, edits: str, tokens: int, asked: int) -> None:
        self._tally.edited[rank, layer, edits] += tokens
        if tokens < asked:
            raise DidNotHappenError(
                f"{edits} of layer {layer} of worker {rank} edited {tokens} tokens where the requests needed {asked}: "
                "something bypasses the steered module, and no score can be trusted"
            )

    def evidence(self) -> EngineEvidence:
        """What happened since the plan was written, as read after the last requests."""
        tally = self._tally
        workers = []
        for layout in self._layouts:
            edited = {key: tokens for key, tokens in tally.edited.items() if key[0] == layout["rank"]}
            layers = sorted(map(int, layout["layers"]))
            ranks = ("rank", "tensor_rank", "tensor_size", "pipeline_rank", "pipeline_size")
            workers.append(
                {name: layout[name] for name in ranks}
                | {
                    "layers": f"{layers[0]}-{layers[-1]}" if layers else "none",
                    "edited_layers": len({layer for _, layer, _ in edited}),
                    "fewest_tokens": min(edited.values(), default=0),
                    "most_tokens": max(edited.values(), default=0),
                }
            )
        return EngineEvidence(
            forwards=tally.forwards,
            modules=len(self.plan.edits) if self.plan else 0,
            positions=min(tally.edited.values(), default=0),
            asked=tally.asked,
            neurons=self.plan.neurons if self.plan else 0,
            largest_change=tally.largest,
            finite=not math.isinf(tally.largest),
            workers=tuple(workers),
        )

    def overflowed(self) -> bool:
        """Whether an activation was not finite after an edit, as read after the last requests."""
        return math.isinf(self._tally.largest)

    def report(self) -> dict[str, Any]:
        """Release, parallel sizes and compilation: what stands beside a score's identity."""
        return compat.engine_report(self._llm)

    def compilations(self) -> list[dict[str, int]]:
        """vLLM's counters of compiling and capturing, of each worker."""
        return compat.call_workers(self._llm, "steering_compilations")


def message_of(edit: Edit) -> dict[str, Any]:
    """An edit as plain data, which `SteeredWorker.steering_write` takes."""
    (map_,) = edit.maps  # static steps at all positions fold into one
    numbers: dict[str, tuple[Any, Any]] = {"units": (edit.units, np.int64), "scale": (map_.scale, np.float32)}
    numbers |= {"shift": (map_.shift, np.float32), "written": (map_.written, np.bool_)}
    data = {name: np.ascontiguousarray(values, kind).tobytes() for name, (values, kind) in numbers.items()}
    return {"layer": edit.layer, "site": edit.site, **data}


def _tokens_needed(output: Any) -> int:
    """Tokens that went through the model for one request; the last token of each text is never read."""
    cached = output.num_cached_tokens or 0
    return len(output.prompt_token_ids) - cached + sum(max(len(one.token_ids) - 1, 0) for one in output.outputs)
