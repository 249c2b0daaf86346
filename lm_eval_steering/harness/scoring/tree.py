"""Requests as rows of a forward pass, in which what begins alike is read once.

A row is a tree of tokens written depth first: the requests `a b c` and `a b d e` are the row `a b c d e`, and `d`
stands at depth 2 below `b`. Equal requests, and those that are a prefix of another, add no token at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.harness.batches import Request

# A row of several requests is no longer than this, since its attention mask grows with the square.
LONGEST_SHARED = 2048


class Entry(NamedTuple):
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


def entries_of(requests: Sequence[Request], max_length: int) -> list[Entry]:
    """The requests as `HFLM._loglikelihood_tokens` of lm-eval 0.4.13 feeds them to the model.

    Args:
        requests: (key, context tokens, continuation tokens); without a key, as in rolling, every token is prompt.
        max_length: of the model, in tokens.

    Raises:
        SteeringError: for a request that cannot be scored: no context, no continuation, or one longer than the model.
    """
    found = []
    for number, (key, context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise SteeringError(
                f"request {key[1] if key else number!r}: {len(context)} context and {len(continuation)} continuation "
                f"tokens; expected at least one of each, and a continuation of at most {max_length}"
            )
        tokens = (context + continuation)[-(max_length + 1) : -1]
        prompt = len(tokens) if key is None else len(tokens) - len(continuation) + 1
        found.append(Entry(tuple(tokens), prompt, tuple(continuation), number))
    return found


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
class Row:
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

    def add(self, entry: Entry, shared: int) -> None:
        """Append a request whose first `shared` tokens are those of the one before it."""
        new = range(len(self.tokens), len(self.tokens) + len(entry.tokens) - shared)
        self._path = [*self._path[:shared], *new]
        self.tokens += entry.tokens[shared:]
        self.depths += range(shared, len(entry.tokens))
        self.ends += [0] * len(new)
        for node in self._path:
            self.ends[node] = len(self.tokens)
        self.scored.append((entry.number, self._path[len(entry.tokens) - len(entry.targets) :], entry.targets))


def rows_of(entries: Iterable[Entry], cost: Cost | None) -> list[Row]:
    """All requests in rows.

    Args:
        entries: in any order.
        cost: by which it is decided whether two requests share a row; None where only requests of equal tokens and
            equal context lengths do, so that every row is a plain sequence.
    """
    rows: list[Row] = []
    last: Entry | None = None
    for entry in sorted(entries):
        if last is None:
            shared = 0
        elif cost is None:
            shared = len(entry.tokens) if entry[:2] == last[:2] else 0
        else:
            shared = _worth_sharing(rows[-1], last, entry, cost)
        if not shared:
            rows.append(Row(prompt=entry.prompt))
        rows[-1].add(entry, shared)
        last = entry
    return rows


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that two requests begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _worth_sharing(row: Row, last: Entry, entry: Entry, cost: Cost) -> int:
    """Length of the common prefix, or 0 where a row of its own is cheaper."""
    shared = common_prefix(last.tokens, entry.tokens)
    length = len(row.tokens) + len(entry.tokens) - shared
    if shared == len(entry.tokens):
        return shared
    if length > max(LONGEST_SHARED, len(row.tokens)):
        return 0
    return shared if cost.of(length) < cost.of(len(row.tokens)) + cost.of(len(entry.tokens)) else 0
