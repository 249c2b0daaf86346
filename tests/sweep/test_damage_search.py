"""The search for factors of equal damage, on curves that are known: what is found is the first crossing from below."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_steering.sweep.damage_search import (
    FIRST,
    LONGEST,
    MOST_EVALUATIONS,
    RATIO,
    TOLERANCE,
    Curve,
    Line,
    Reached,
    reached,
    replayed,
    search,
)

ADD, SCALE, DOWN = Line(0.0, 64.0), Line(1.0, 65.0), Line(1.0, -8.0)
TARGETS = (0.1, 0.3, 1.0)


def run(line: Line, damage: Callable[[float], float], targets: tuple[float, ...] = TARGETS) -> Curve:
    """A search on a curve of damage by distance from the identity."""
    known: dict[float, float] = {}
    while True:
        curve, factor = replayed(line, targets, known)
        if factor is None:
            return curve
        assert factor not in known and factor != line.identity
        assert float(f"{factor:.3g}") == factor
        assert (factor - line.identity) * (line.last - line.identity) > 0 and line.distance(factor) <= line.length
        known[factor] = damage(line.distance(factor))
        assert len(known) <= MOST_EVALUATIONS


def check(line: Line, damage: Callable[[float], float], curve: Curve, targets: tuple[float, ...] = TARGETS) -> None:
    """What holds for every curve."""
    walked = [FIRST * max(1.0, line.length / LONGEST) * RATIO**step for step in range(40)]
    for target, result in zip(targets, reached(curve, targets), strict=True):
        if result.factor is None:
            assert all(value < target for value in curve.points.values())
            assert "none up to" in result.why and not result.within
            continue
        assert result.damage == curve.points[result.factor] == damage(line.distance(result.factor))
        assert result.within == (abs(result.damage - target) <= TOLERANCE * target)
        assert result.within or "not within 10%" in result.why
        # The first crossing among the steps of the walk: below, every step of the walk is below the target.
        low, high = curve.bracket(target) or (0.0, 0.0)
        assert all(damage(line.distance(line.factor(step))) < target for step in walked if step <= low)
        assert damage(high) >= target or result.damage >= target
        assert low == 0 or damage(low) < target


@settings(deadline=None)
@given(scale=st.floats(100, 2000), power=st.floats(0.7, 3))
def test_a_vector_of_unit_norm_needs_factors_in_thousands(scale: float, power: float) -> None:
    """CLaS-Bench's direction among hidden states of norm 10,000: a longer walk begins later, in as many steps."""
    line = Line(0.0, 8192.0)
    curve = run(line, lambda distance: (distance / scale) ** power)
    check(line, lambda distance: (distance / scale) ** power, curve)
    assert all(result.within for result in reached(curve, TARGETS))


@settings(max_examples=300, deadline=None)
@given(
    scale=st.floats(0.02, 20),
    power=st.floats(0.7, 3),
    line=st.sampled_from([ADD, SCALE, Line(0.0, -64.0)]),
)
def test_a_rising_curve_is_met_within_a_tenth(scale: float, power: float, line: Line) -> None:
    def damage(distance: float) -> float:
        return (distance / scale) ** power

    curve = run(line, damage)
    check(line, damage, curve)
    for result in reached(curve, TARGETS):
        # A scale near 1 has steps of 0.01, which can be too coarse: 10 % off at one, and more than 10 % at the next.
        step = math.floor(100 * scale * result.target ** (1 / power)) / 100
        coarse = damage(0.02) > result.target / 3 or (
            damage(step) < (1 - TOLERANCE) * result.target and damage(step + 0.01) > (1 + TOLERANCE) * result.target
        )
        assert result.factor is None or result.within or (line is SCALE and coarse) or "12 evaluations" in result.why
    within = sum(result.within or result.factor is None for result in reached(curve, TARGETS))
    assert within >= 2 or line is SCALE


@settings(max_examples=300, deadline=None)
@given(
    dip=st.floats(0.01, 2), width=st.floats(0.5, 8), scale=st.floats(0.5, 10), power=st.floats(1, 3),
    line=st.sampled_from([ADD, SCALE]),
)  # fmt: skip
def test_a_curve_that_dips_first_is_met_after_the_dip(
    dip: float, width: float, scale: float, power: float, line: Line
) -> None:
    def damage(distance: float) -> float:
        return (distance / scale) ** power - dip * (distance / width) * math.exp(1 - distance / width)

    curve = run(line, damage)
    check(line, damage, curve)


@settings(max_examples=200, deadline=None)
@given(at=st.floats(0.02, 60), before=st.floats(0, 0.09), after=st.floats(1.2, 50), line=st.sampled_from([ADD, SCALE]))
def test_a_jump_is_marked(at: float, before: float, after: float, line: Line) -> None:
    def damage(distance: float) -> float:
        return before if distance < at else after

    curve = run(line, damage)
    check(line, damage, curve)
    for result in reached(curve, TARGETS):
        if result.factor is not None:
            assert not result.within and "rises from" in result.why


@pytest.mark.parametrize("level", [0.05, 0.25, 0.9999])
@pytest.mark.parametrize("line", [ADD, SCALE, DOWN])
def test_a_plateau_below_a_target_is_no_crossing(level: float, line: Line) -> None:
    def damage(distance: float) -> float:
        return level * (1 - math.exp(-distance / 2))

    curve = run(line, damage)
    check(line, damage, curve)
    results = {result.target: result for result in reached(curve, TARGETS)}
    assert results[1.0].factor is None and f"none up to {line.factor(99):g}" in results[1.0].why
    assert (results[0.3].factor is None) == (level < 0.3)


def test_what_never_rises_has_no_factor() -> None:
    for damage in (lambda _: 0.0, lambda distance: -distance):
        curve = run(ADD, damage)
        assert {result.factor for result in reached(curve, TARGETS)} == {None}
        assert max(curve.points) == 64


def test_the_first_crossing_counts_where_there_are_several() -> None:
    def damage(distance: float) -> float:  # up to 0.5 at 4, back to 0 at 16, up again
        return 0.5 * math.sin(math.pi * distance / 8) ** 2 if distance < 16 else (distance - 16) / 8

    targets = (0.3, 1.0)
    first = {result.target: result for result in reached(run(ADD, damage, targets), targets)}
    assert first[0.3].factor is not None and first[0.3].factor < 4 and first[0.3].within
    assert first[1.0].factor is not None and first[1.0].factor > 16 and first[1.0].within


def test_what_overflows_is_above_every_target() -> None:
    def damage(distance: float) -> float:
        return distance / 4 if distance < 3 else math.inf

    results = {result.target: result for result in reached(run(ADD, damage), TARGETS)}
    assert results[0.3].within and results[1.0].factor is not None and not results[1.0].within


def test_the_walk_ends_at_the_last_factor() -> None:
    short = Line(0.0, 3.0)
    curve = run(short, lambda distance: distance)
    assert max(curve.points) <= 3
    assert [result.within for result in reached(curve, TARGETS)] == [True, True, True]
    assert reached(run(short, lambda distance: distance / 100), (1.0,)) == [
        Reached(1.0, None, 0.03, False, "none up to 3: the damage there is 0.03, and 0.03 at most")
    ]
    down = run(Line(1.0, 0.0), lambda distance: distance**2)
    assert all(0 <= factor < 1 for factor in down.points)


@settings(max_examples=100, deadline=None)
@given(scale=st.floats(0.1, 10), stop=st.integers(0, MOST_EVALUATIONS))
def test_a_search_that_is_begun_anew_takes_the_same_factors(scale: float, stop: int) -> None:
    def damage(distance: float) -> float:
        return (distance / scale) ** 2 - distance / 50

    whole = list(run(ADD, damage).points)
    known = {factor: damage(factor) for factor in whole[:stop]}
    _, following = replayed(ADD, TARGETS, known)
    assert following == (whole[stop] if stop < len(whole) else None)
    steps = search(ADD, TARGETS)
    assert next(steps) == whole[0]
