"""The items of a task as lm-eval will ask an engine about them, known here without the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lm_eval_steering.lmeval.compat import release_requests
from lm_eval_steering.metrics.likelihood import UNSTEERED_TWIN
from lm_eval_steering.sweep.cells import Cell, Grid

_SEED = 1234  # of lm_eval's command, for examples in the prompt

Template = Callable[..., str]


@dataclass(frozen=True)
class Item:
    """One document, and what the model is asked about it.

    Attributes:
        document: hash, as lm-eval has it.
        target: hash of the right answer.
        texts: of each request: context and continuation, prompt, or whole text.
        generation: arguments of generation; None for likelihoods.
    """

    document: str
    target: str
    texts: tuple[tuple[str, ...], ...]
    generation: dict[str, Any] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, sample: Mapping[str, Any]) -> Item:
        """An item from lm-eval's sample."""
        asked = tuple(_texts(tuple(found.values())) for found in sample["arguments"].values())
        return cls(sample["doc_hash"], sample["target_hash"], asked)


def _texts(arguments: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(part for part in arguments if isinstance(part, str))


def prepared(grid: Grid, cell: Cell) -> Any:
    """The cell's task, set as lm-eval sets it for the plan."""
    task, plan = grid.book.task(cell.task, cell.target), grid.plan
    own = task.get_config("num_fewshot")
    if own is None or (plan.num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=plan.num_fewshot or 0)
    if plan.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(plan.gen_kwargs), update=True)
    task.set_fewshot_seed(seed=_SEED)
    return task


def positions(grid: Grid, cell: Cell) -> list[int] | None:
    """Positions of the cell's documents where they are not the first `limit`, or all."""
    return grid.positions(cell.task, cell.target, cell.items)


def items_of(grid: Grid, cell: Cell, template: Template | None) -> dict[int, Item]:
    """doc_id -> item, in lm-eval's order.

    Args:
        grid: of the cell.
        cell: one that has the task and its documents.
        template: puts messages into the tokenizer's chat template; None where the plan asks for none.
    """
    from lm_eval.utils import handle_non_serializable, hash_string

    task, plan, chosen = prepared(grid, cell), grid.plan, positions(grid, cell)
    task.build_all_requests(
        limit=None if chosen else plan.limit,
        samples=chosen,
        system_instruction=plan.system_instruction,
        apply_chat_template=template is not None,
        chat_template=template,
    )
    found: dict[int, Item] = {}
    asked: dict[int, list[tuple[str, ...]]] = {}
    for instance in sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx)):
        number = chosen[instance.doc_id] if chosen else instance.doc_id
        asked.setdefault(number, []).append(_texts(instance.args))
        document = json.dumps(instance.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
        found[number] = Item(
            hash_string(document), hash_string(str(task.doc_to_target(instance.doc))), tuple(asked[number]),
            task.config.generation_kwargs if task.OUTPUT_TYPE == "generate_until" else None,
        )  # fmt: skip
    release_requests(task)
    return found


def wants_hooks(grid: Grid, cell: Cell) -> bool:
    """Whether the task needs steered and unsteered scores of the same rows, which hooks alone give."""
    first = next(iter(grid.book.task(cell.task, cell.target).eval_docs), None)
    return isinstance(first, dict) and bool(first.get(UNSTEERED_TWIN))
