"""A batch of rows as tensors, and the attention mask under which the branches of a row do not see each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.lmeval.compat import fed_to_model
from lm_eval_steering.lmeval.requests import Request, ScoringRows

# --- Requests as rows of a forward pass, in which what begins alike is read once
#
# A row is a tree of tokens written depth first: the requests `a b c` and `a b d e` are the row `a b c d e`, and `d`
# stands at depth 2 below `b`. Equal requests, and those that are a prefix of another, add no token at all.

# A row of several requests is no longer than this, since its attention mask grows with the square.
LONGEST_SHARED = 2048


class ScoredRequest(NamedTuple):
    """One request as the model reads it.

    Attributes:
        tokens: context and continuation without its last token, cut on the left to the model's length.
        prompt: number of those tokens that are context.
        targets: the continuation; target i is predicted at position `len(tokens) - len(targets) + i`.
        number: of the request.
    """

    tokens: tuple[int, ...]
    prompt: int
    targets: tuple[int, ...]
    number: int


def scored_requests(requests: Sequence[Request], max_length: int) -> list[ScoredRequest]:
    """The requests as lm-eval feeds them to the model (`compat.fed_to_model`).

    Args:
        requests: (key, context tokens, continuation tokens); without a key, as in rolling, every token is prompt.
        max_length: of the model, in tokens.

    Raises:
        SteeringError: for a request that cannot be scored: no context, no continuation, or one longer than the model.
    """
    scored = []
    for number, (key, context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise SteeringError(
                f"request {key[1] if key else number!r}: {len(context)} context and {len(continuation)} continuation "
                f"tokens; expected at least one of each, and a continuation of at most {max_length}"
            )
        tokens = fed_to_model(context, continuation, max_length)
        prompt = len(tokens) if key is None else len(tokens) - len(continuation) + 1
        scored.append(ScoredRequest(tuple(tokens), prompt, tuple(continuation), number))
    return scored


@dataclass(frozen=True)
class Cost:
    """What a row costs: multiplications in one layer.

    Attributes:
        token: of one token outside of attention.
        pair: of one pair of positions in attention.
    """

    token: float
    pair: float

    def of(self, length: int) -> float:
        """Cost of a row of this many tokens."""
        return length * (self.token + length * self.pair)


@dataclass
class PackedRow:
    """A tree of tokens, in depth-first order.

    Attributes:
        tokens: (node,) token ids.
        depths: (node,) place of each token in its request, from 0.
        ends: (node,) one past the last node below each; node q sees node k where k <= q < ends[k].
        prompt: number of prompt tokens of the row's first request.
        scored: (request number, nodes that predict its targets, targets).
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    prompt: int = 0
    scored: list[tuple[int, list[int], tuple[int, ...]]] = field(default_factory=list)
    _path: list[int] = field(default_factory=list)  # nodes of the request that was added last

    @property
    def branches(self) -> bool:
        """Whether it is more than one plain sequence."""
        return len(self._path) < len(self.tokens)

    @property
    def positions(self) -> int:
        """Number of distinct nodes that predict a target."""
        return len({node for _, nodes, _ in self.scored for node in nodes})

    def add(self, entry: ScoredRequest, shared: int) -> None:
        """Append a request whose first `shared` tokens are those of the one before it."""
        new = range(len(self.tokens), len(self.tokens) + len(entry.tokens) - shared)
        self._path = [*self._path[:shared], *new]
        self.tokens += entry.tokens[shared:]
        self.depths += range(shared, len(entry.tokens))
        self.ends += [0] * len(new)
        for node in self._path:
            self.ends[node] = len(self.tokens)
        self.scored.append((entry.number, self._path[len(entry.tokens) - len(entry.targets) :], entry.targets))


def rows_of(entries: Iterable[ScoredRequest], cost: Cost | None) -> list[PackedRow]:
    """All requests in rows.

    Args:
        entries: in any order.
        cost: by which it is decided whether two requests share a row; None where only requests of equal tokens and
            equal context lengths do, so that every row is a plain sequence.
    """
    rows: list[PackedRow] = []
    last: ScoredRequest | None = None
    for entry in sorted(entries):
        if last is None:
            shared = 0
        elif cost is None:
            shared = len(entry.tokens) if entry[:2] == last[:2] else 0
        else:
            shared = _worth_sharing(rows[-1], last, entry, cost)
        if not shared:
            rows.append(PackedRow(prompt=entry.prompt))
        rows[-1].add(entry, shared)
        last = entry
    return rows


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that two requests begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _worth_sharing(row: PackedRow, last: ScoredRequest, entry: ScoredRequest, cost: Cost) -> int:
    """Length of the common prefix, or 0 where a row of its own is cheaper."""
    shared = common_prefix(last.tokens, entry.tokens)
    length = len(row.tokens) + len(entry.tokens) - shared
    if shared == len(entry.tokens):
        return shared
    if length > max(LONGEST_SHARED, len(row.tokens)):
        return 0
    return shared if cost.of(length) < cost.of(len(row.tokens)) + cost.of(len(entry.tokens)) else 0


# --- Rows in batches: sorted by length, as many as fit a budget of tokens and of scored positions

# On CPU: logits in hand at once, in numbers (32 MB in float32), tokens beyond which a batch's activations leave the
# cache (`benchmarks.rolling`), and pads, in tokens, at which a forward pass more costs less.
LOGITS, TOKENS, PADS = 2**23, 768, 48
# Elsewhere, in parts of the free memory: logits in hand at once, and the activations of a batch.
_LOGITS_PART, _ACTIVATIONS_PART = 8, 4
LOGITS_ELSEWHERE, PADS_ELSEWHERE = 2**27, 1024  # where the device does not say what is free
# However large the vocabulary, logits of so many positions for each row of the batch size: with fewer the head reads
# its weights oftener than it computes, and the batch size means nothing. `hf` makes them at every position.
POSITIONS_PER_ROW = 16
Item = TypeVar("Item")


@dataclass(frozen=True)
class DeviceLimits:
    """What a device takes in one forward pass.

    Attributes:
        logits: in numbers, in hand at once.
        tokens: of a batch.
        pads: among them.
        block: logits in numbers, of which the log-sum-exp is taken at once.
    """

    logits: int
    tokens: int
    pads: int
    block: int

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, config: Any) -> DeviceLimits:
        """Of a device: on CPU what its cache holds, elsewhere what the free memory does.

        Args:
            device: of the model.
            dtype: of its logits.
            config: of the model, for its sizes.
        """
        if device.type == "cpu":
            return cls(LOGITS, TOKENS, PADS, BLOCK["cpu"])
        return cls.of_memory(free_memory(device), dtype, config.get_text_config())

    @classmethod
    def of_memory(cls, free: int | None, dtype: torch.dtype, config: Any) -> DeviceLimits:
        """Of an accelerator with this much free memory, in bytes; None where it is not known.

        Limits are powers of two, so that a little memory more or less changes no batch.
        """
        if free is None:
            return cls(LOGITS_ELSEWHERE, sys.maxsize, PADS_ELSEWHERE, BLOCK_ELSEWHERE)
        # A decoder layer at work holds hidden states, queries, keys and values, and three tensors of its MLP.
        units = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        widest = max(units) if isinstance(units, list | tuple) else units
        per_token = dtype.itemsize * (8 * config.hidden_size + 4 * widest)
        logits = _power_of_two(free // _LOGITS_PART // dtype.itemsize)
        tokens = _power_of_two(free // _ACTIVATIONS_PART // per_token)
        return cls(logits, tokens, PADS_ELSEWHERE, min(BLOCK_ELSEWHERE, max(2**19, logits // 16)))


def free_memory(device: torch.device) -> int | None:
    """Free bytes of an accelerator, those included that PyTorch keeps for itself; None where nobody says."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _power_of_two(number: int) -> int:
    """The largest that is not above a number, 1 at least."""
    return 1 << max(0, number.bit_length() - 1)


@dataclass(frozen=True)
class BatchBudget:
    """What one forward pass may hold; a single row may be more.

    Attributes:
        tokens: padded ones.
        positions: at which logits are made.
        pads: among the tokens.
    """

    tokens: int
    positions: int
    pads: int

    @classmethod
    def like(cls, batch_size: int, longest: int, vocabulary: int, limits: DeviceLimits) -> BatchBudget:
        """The tokens that lm-eval's own first batch would hold, `batch_size` rows of the longest request, or fewer."""
        positions = max(limits.logits // vocabulary, batch_size * min(longest, POSITIONS_PER_ROW))
        return cls(min(batch_size * longest, limits.tokens), positions, limits.pads)

    def within(self, other: BatchBudget | None) -> BatchBudget:
        """What both allow."""
        if other is None:
            return self
        pairs = zip((self.tokens, self.positions, self.pads), (other.tokens, other.positions, other.pads), strict=True)
        return BatchBudget(*(min(pair) for pair in pairs))

    @classmethod
    def unlimited(cls) -> BatchBudget:
        """For requests that are few."""
        return cls(sys.maxsize, sys.maxsize, sys.maxsize)

    @classmethod
    def half_of(cls, batch: Sequence[PackedRow]) -> BatchBudget:
        """Half of what a batch holds."""
        tokens = len(batch) * max(len(row.tokens) for row in batch) // 2
        return cls(tokens, max(1, sum(row.positions for row in batch) // 2), tokens)


def batches(rows: Iterable[PackedRow], budget: BatchBudget) -> list[list[PackedRow]]:
    """Batches of rows of similar length, longest first; rows that branch, and need a mask, are kept apart."""
    apart: dict[bool, list[PackedRow]] = {False: [], True: []}
    for row in rows:
        apart[row.branches].append(row)
    return [batch for kind in apart.values() for batch in alike(kind, _length, lambda row: row.positions, budget)]


def _length(row: PackedRow) -> int:
    return len(row.tokens)


def alike(
    items: Iterable[Item], length: Callable[[Item], int], positions: Callable[[Item], int], budget: BatchBudget
) -> list[list[Item]]:
    """Groups of items of similar length within a budget, longest first.

    Args:
        items: of any kind.
        length: of one, in tokens.
        positions: of one, at which logits are made.
        budget: of each group.
    """
    groups: list[list[Item]] = []
    logits = pads = 0
    for item in sorted(items, key=lambda item: -length(item)):
        if groups:
            longest = length(groups[-1][0])
            tokens = (len(groups[-1]) + 1) * longest
            logits, pads = logits + positions(item), pads + longest - length(item)
            if tokens <= budget.tokens and logits <= budget.positions and pads <= budget.pads:
                groups[-1].append(item)
                continue
        groups.append([item])
        logits, pads = positions(item), 0
    return groups


class Masks(Enum):
    """Which attention masks a family's layers take."""

    FULL = "full"  # one mask; every layer sees all that precedes
    WINDOW = "window"  # one mask; every layer sees the config's sliding window, if it has one
    LAYERS = "layers"  # a mask for each kind of layer in the config


@dataclass(frozen=True)
class Packed:
    """One forward pass.

    Attributes:
        tokens: (row, position) token ids, padded on the right.
        rows: their lengths, which the intervention needs.
        inputs: attention masks and position ids, if any row branches.
        nodes: (2, node) row and position of each distinct place at which logits are needed.
        node: (target,) index into `nodes`.
        targets: (target,) token ids.
        requests: (number, number of targets), in the order of `targets`.
    """

    tokens: torch.Tensor
    rows: ScoringRows
    inputs: dict[str, Any]
    nodes: torch.Tensor
    node: torch.Tensor
    targets: torch.Tensor
    requests: tuple[tuple[int, int], ...]


def pack(rows: Sequence[PackedRow], masks: Masks, config: Any, dtype: torch.dtype, device: torch.device) -> Packed:
    """Tensors of a batch.

    Args:
        rows: of `batches.batches`.
        masks: of the model's family.
        config: of the model, for its sliding window.
        dtype: of the masks, which are added to attention scores; bool where they choose.
        device: of the model.
    """
    width = max(len(row.tokens) for row in rows)
    tokens = _padded([row.tokens for row in rows], width)
    real = torch.arange(width) < torch.tensor([[len(row.tokens)] for row in rows])
    inputs: dict[str, Any] = {}
    if any(row.branches for row in rows):
        depths = _padded([row.depths for row in rows], width).to(device)
        ends = _padded([row.ends for row in rows], width).to(device)
        inputs = {"position_ids": depths, "attention_mask": attention(depths, ends, masks, config, dtype)}
    indices: dict[tuple[int, int], int] = {}
    node_of: list[int] = []
    targets: list[int] = []
    requests: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        for request, nodes, continuation in row.scored:
            node_of += [indices.setdefault((number, node), len(indices)) for node in nodes]
            targets += continuation
            requests.append((request, len(continuation)))
    return Packed(
        tokens.to(device),
        ScoringRows(real, torch.tensor([row.prompt for row in rows])),
        inputs,
        torch.tensor(list(indices), device=device).T,
        torch.tensor(node_of, device=device),
        torch.tensor(targets, device=device),
        tuple(requests),
    )


def attention(
    depths: torch.Tensor, ends: torch.Tensor, masks: Masks, config: Any, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """(row, 1, query, key) masks of a family.

    Args:
        depths: (row, node) place of each token in its request.
        ends: (row, node) one past the last node below each; 0 for pads.
        masks: the kind.
        config: of the model.
        dtype: see `pack`.
    """
    node = torch.arange(depths.shape[1], device=depths.device)
    query, key = node[:, None], node[None, :]
    # A pad sees itself, so that its softmax is of something.
    full = ((key <= query) & (query < ends[:, None, :])) | (key == query)
    window = getattr(config, "sliding_window", None)
    if masks is Masks.FULL or (masks is Masks.WINDOW and window is None):
        return _as(full, dtype)
    near = full if window is None else full & (depths[:, :, None] - depths[:, None, :] < window)
    if masks is Masks.WINDOW:
        return _as(near, dtype)
    return {"full_attention": _as(full, dtype), "sliding_attention": _as(near, dtype)}


def _as(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    seen = seen[:, None]
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _padded(lists: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    return torch.tensor([[*each, *[0] * (width - len(each))] for each in lists])


# --- Logits only where they are needed, and log-probabilities of the targets without a softmax over all of them

# Logits of a block in which log-sum-exp is taken: 2 MB of them stay in the CPU's cache; elsewhere 64 MB at most.
BLOCK = {"cpu": 2**19}
BLOCK_ELSEWHERE = 2**24


@contextmanager
def head_at(head: nn.Module, nodes: torch.Tensor) -> Iterator[None]:
    """Inside, the head sees the hidden states of some places alone, as one row.

    The model's own forward pass goes on from there, with whatever it does to logits (scaling, soft caps).

    Args:
        head: the module that makes logits of hidden states (row, position, feature).
        nodes: (2, node) row and position of each.

    Raises:
        DidNotHappenError: if the head did not run exactly once, so that logits are not of those places.
    """
    calls = 0

    def gather(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        row, position = nodes.to(args[0].device)
        return (args[0][row, position].unsqueeze(0), *args[1:])

    with head.register_forward_pre_hook(torch.compiler.disable(gather)):
        yield
    if calls != 1:
        raise DidNotHappenError(f"the head ran {calls} times in a forward pass, expected once")


def log_probabilities(
    logits: torch.Tensor, node: torch.Tensor, targets: torch.Tensor, block: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and whether it is the most likely token.

    Args:
        logits: (node, vocabulary).
        node: (target,) the node that predicts it.
        targets: (target,) token ids.
        block: number of logits of which the log-sum-exp is taken at once; by default what suits the device.

    Returns:
        (target,) float32 (float64 for logits in float64), by gather and log-sum-exp in that precision; and (target,)
        bool: of equally likely tokens the first counts, as in argmax.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, (block or BLOCK.get(logits.device.type, BLOCK_ELSEWHERE)) // logits.shape[1])
    total = torch.empty(len(logits), dtype=wide, device=logits.device)
    peak = torch.empty_like(total)
    for start in range(0, len(logits), size):
        part = logits[start : start + size].to(wide)
        top = part.amax(-1, keepdim=True)
        peak[start : start + size] = top[:, 0]
        # At a vocabulary of 262k this is off by 1e-6 in float32; PyTorch's log-softmax is off by 2e-5 and takes longer.
        total[start : start + size] = (part - top).exp_().sum(-1).log_() + top[:, 0]
    target = logits[node, targets].to(wide)
    greedy = target == peak[node]
    # Ties are rare, and argmax is slow: it is asked only where the target is a maximum.
    first = logits[node[greedy]].argmax(-1)
    greedy[greedy.clone()] = first == targets[greedy]
    return target - total[node], greedy
