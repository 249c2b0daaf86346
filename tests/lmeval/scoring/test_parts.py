"""The parts: trees of tokens, masks, batches, log-probabilities."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.packing import (
    BLOCK,
    LOGITS,
    POSITIONS_PER_ROW,
    BatchBudget,
    Cost,
    DeviceLimits,
    Masks,
    PackedRow,
    attention,
    batches,
    log_probabilities,
    pack,
    rows_of,
    scored_requests,
)
from lm_eval_steering.lmeval.packing import (
    TOKENS as MOST_TOKENS,
)

CHEAP = Cost(token=1.0, pair=0.0)  # every common token pays
DEAR = Cost(token=1.0, pair=1e9)  # none does
TOKENS = st.lists(st.integers(0, 2), min_size=2, max_size=9)


def above(row: PackedRow, node: int) -> list[int]:
    """The nodes from the root of a row down to one of its nodes."""
    return [place for place in range(node + 1) if node < row.ends[place]]


@given(lists=st.lists(TOKENS, min_size=1, max_size=12), length=st.integers(4, 9), data=st.data())
def test_every_request_is_a_path_in_its_row(lists: list[list[int]], length: int, data: st.DataObject) -> None:
    cuts = [data.draw(st.integers(max(1, len(tokens) - length), len(tokens) - 1)) for tokens in lists]
    requests = [(("", ""), tokens[:cut], tokens[cut:]) for tokens, cut in zip(lists, cuts, strict=True)]
    for cost in (CHEAP, DEAR, None):
        rows = rows_of(scored_requests(requests, length), cost)
        assert sorted(number for row in rows for number, *_ in row.scored) == list(range(len(lists)))
        for row in rows:
            assert row.branches is (row.ends != [len(row.tokens)] * len(row.tokens))
            for number, nodes, targets in row.scored:
                path = above(row, nodes[-1])
                assert [row.tokens[node] for node in path] == lists[number][-length - 1 : -1]
                assert [row.depths[node] for node in path] == list(range(len(path)))
                assert nodes == path[-len(nodes) :]
                assert list(targets) == requests[number][2]


def test_common_prefixes_are_shared_where_they_pay() -> None:
    requests = [(("", ""), [1, 2, 3], [4, 5, 6]), (("", ""), [1, 2, 3], [4, 7]), (("", ""), [1, 9], [8])]
    entries = scored_requests(requests, 64)
    assert [row.tokens for row in rows_of(entries, CHEAP)] == [[1, 2, 3, 4, 5, 9]]
    assert [row.tokens for row in rows_of(entries, DEAR)] == [[1, 2, 3, 4, 5], [1, 9]]  # a prefix costs nothing
    assert [row.tokens for row in rows_of(entries, None)] == [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 9]]


def test_requests_of_equal_tokens_share_a_plain_row_where_their_contexts_are_equally_long() -> None:
    requests = [(("", ""), [1, 2], [3]), (("", ""), [1, 2], [4]), (("", ""), [1], [2, 5]), (None, [1], [2, 5])]
    rows = rows_of(scored_requests(requests, 64), None)
    assert [(row.prompt, sorted(number for number, *_ in row.scored)) for row in rows] == [(1, [2]), (2, [0, 1, 3])]


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [2] * 9)])
def test_what_cannot_be_scored_is_named(context: list[int], continuation: list[int]) -> None:
    with pytest.raises(SteeringError, match=r"request ' x': .* continuation of at most 8"):
        scored_requests([(("", " x"), context, continuation)], 8)


@given(lists=st.lists(TOKENS, min_size=1, max_size=6), window=st.sampled_from([None, 1, 3]))
def test_a_node_sees_what_is_above_it_in_its_window(lists: list[list[int]], window: int | None) -> None:
    rows = rows_of(scored_requests([(("", ""), each[:-1], each[-1:]) for each in lists], 64), CHEAP)
    config = SimpleNamespace(sliding_window=window)
    packed = pack(rows, Masks.LAYERS, config, torch.bool, torch.device("cpu"))
    if not packed.inputs:
        assert not any(row.branches for row in rows)
        return
    masks, depths = packed.inputs["attention_mask"], packed.inputs["position_ids"]
    for number, row in enumerate(rows):
        assert depths[number, : len(row.tokens)].tolist() == row.depths
        for node in range(len(row.tokens)):
            path = above(row, node)
            near = path if window is None else path[-window:]
            assert masks["full_attention"][number, 0, node].nonzero().flatten().tolist() == path
            assert masks["sliding_attention"][number, 0, node].nonzero().flatten().tolist() == near


def test_masks_that_are_added_hide_by_the_smallest_number() -> None:
    depths, ends = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[3, 2, 3, 0]])  # two branches and a pad
    for kind in (Masks.FULL, Masks.WINDOW):
        mask = attention(depths, ends, kind, SimpleNamespace(sliding_window=None), torch.float16)
        assert isinstance(mask, torch.Tensor) and mask.dtype == torch.float16
        seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
        assert mask[0, 0].tolist() == torch.where(seen, 0.0, torch.finfo(torch.float16).min).tolist()


@given(
    lists=st.lists(TOKENS, min_size=1, max_size=12),
    tokens=st.integers(1, 40),
    positions=st.integers(1, 12),
    pads=st.integers(0, 9),
)
def test_batches_hold_every_row_once_and_keep_to_the_budget(
    lists: list[list[int]], tokens: int, positions: int, pads: int
) -> None:
    rows = rows_of(scored_requests([(("", ""), each[:1], each[1:]) for each in lists], 64), CHEAP)
    found = batches(rows, BatchBudget(tokens, positions, pads))
    assert sorted(id(row) for batch in found for row in batch) == sorted(map(id, rows))
    for batch in found:
        assert len({row.branches for row in batch}) == 1
        if len(batch) > 1:
            assert len(batch) * max(len(row.tokens) for row in batch) <= tokens
            assert sum(row.positions for row in batch) <= positions
            assert sum(len(batch[0].tokens) - len(row.tokens) for row in batch) <= pads
    longest = [len(batch[0].tokens) for batch in found if not batch[0].branches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probabilities_are_those_of_a_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 40)  # several blocks
    torch.manual_seed(0)
    logits = (torch.randn(7, 19) * 30).to(dtype)
    logits[2, 4] = logits[2, 9] = logits[2].max() + 5  # a tie: the first of them is the most likely token
    logits[3, 0] = math.inf
    logits[5, :7] = -math.inf
    place = torch.tensor([0, 0, 1, 2, 2, 3, 4, 5, 6])
    targets = torch.tensor([1, 5, 2, 4, 9, 3, int(logits[4].argmax()), 0, 18])
    found, greedy = log_probabilities(logits, place, targets)
    wide = torch.promote_types(dtype, torch.float32)
    expected = logits.to(wide).log_softmax(-1)[place, targets]
    assert found.dtype == wide
    assert torch.allclose(found, expected, atol=1e-5, equal_nan=True)
    assert greedy.tolist() == (logits.argmax(-1)[place] == targets).tolist()
    assert greedy[3] and not greedy[4] and greedy[6]


def test_log_probabilities_at_a_vocabulary_of_262k() -> None:
    """PyTorch's log-softmax in float32 is off by ten times as much."""
    torch.manual_seed(0)
    logits = torch.randn(24, 262_144) * 5
    place = torch.arange(24)
    targets = torch.randint(0, logits.shape[1], (24,))
    expected = logits.double().log_softmax(-1)[place, targets]
    found, _ = log_probabilities(logits, place, targets)
    theirs = logits.log_softmax(-1)[place, targets]
    ours = (found - expected).abs().max()
    assert ours < 3e-6 and ours < (theirs - expected).abs().max() / 3


# --- limits by device -----------------------------------------------------------------------------------------------

GEMMA = SimpleNamespace(hidden_size=640, intermediate_size=2048)
LARGE = SimpleNamespace(hidden_size=4096, intermediate_size=14336)


@pytest.mark.parametrize("vocabulary", [100, 8_192, 128_256, 262_144])
@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
def test_the_batch_size_counts_at_every_vocabulary(vocabulary: int, batch_size: int) -> None:
    limits = DeviceLimits.of(torch.device("cpu"), torch.float32, None)
    budget = BatchBudget.like(batch_size, 40, vocabulary, limits)
    assert budget.tokens == min(batch_size * 40, MOST_TOKENS)
    assert budget.positions == max(LOGITS // vocabulary, batch_size * POSITIONS_PER_ROW)
    # So many rows of an LSS or XCOPA shape, 20 tokens of which 6 are scored, make one batch.
    rows = rows_of(
        scored_requests([(("", ""), [n + 1] * 14, [n + 1] * 6) for n in range(batch_size)], 64), CHEAP
    )  # fmt: skip
    made = batches(rows, budget)
    assert max(map(len, made)) == min(batch_size, budget.tokens // 19)
    # Never more logits than `hf` makes in its batch of the same size, beyond what the cache holds.
    assert budget.positions <= max(LOGITS // vocabulary, batch_size * 40)


@given(free=st.integers(2**28, 2**38), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_on_an_accelerator_limits_follow_the_free_memory_and_the_models_sizes(free: int, dtype: torch.dtype) -> None:
    small, large = (DeviceLimits.of_memory(free, dtype, config) for config in (GEMMA, LARGE))
    assert small.logits == large.logits and free / 16 < small.logits * dtype.itemsize <= free / 8
    assert small.tokens >= 4 * large.tokens
    for limits, config in ((small, GEMMA), (large, LARGE)):
        activations = limits.tokens * dtype.itemsize * (8 * config.hidden_size + 4 * config.intermediate_size)
        assert activations <= free / 4
        assert limits.block <= limits.logits
        assert all(number & (number - 1) == 0 for number in (limits.logits, limits.tokens, limits.block))
    more = DeviceLimits.of_memory(2 * free, dtype, LARGE)
    assert more.tokens == 2 * large.tokens and more.logits == 2 * large.logits
    assert BatchBudget.like(16, 100, 262_144, large).tokens == min(1600, large.tokens)


def test_where_the_free_memory_is_not_known_the_batch_size_decides() -> None:
    limits = DeviceLimits.of_memory(None, torch.bfloat16, GEMMA)
    assert BatchBudget.like(8, 50, 32_000, limits).tokens == 400
    widths = SimpleNamespace(hidden_size=64, intermediate_size=[64, 4096])
    assert DeviceLimits.of_memory(2**30, torch.float32, widths).tokens < 2**30 / 4096
    assert BatchBudget(10, 20, 30).within(BatchBudget(20, 5, 30)) == BatchBudget(10, 5, 30)
    assert BatchBudget(10, 20, 30).within(None) == BatchBudget(10, 20, 30)
