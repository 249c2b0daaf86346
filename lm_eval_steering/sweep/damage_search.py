"""Factors at which an intervention does a given damage: a walk from the factor that changes nothing, then bisection.

Damage is the rise over the unsteered model in nats per token. Interventions are compared at equal damage, since a
factor means something else for each operation, site, language and model.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

MOST_EVALUATIONS = 12  # of one intervention on one language, shared by its targets
TOLERANCE = 0.1  # a target is reached where the damage is within this share of it
FIRST, RATIO = 0.25, 2.0  # of the walk: its first distance from the factor that changes nothing, and their ratio
LONGEST = 64.0  # the distance at which a walk ends by default; one that ends later begins later
_MARGIN = 0.1  # of a bracket's width in logarithms, from its ends to what is interpolated
_SHARE = 8.0  # an interpolated point next to the identity is at least this part of the nearest evaluated one


@dataclass(frozen=True)
class Line:
    """The factors of a search: from the one that changes nothing towards the last.

    Attributes:
        identity: 1 for `scale`, 0 for `add`.
        last: factor at which the search ends; it lies on one side of the identity.
    """

    identity: float
    last: float

    @property
    def length(self) -> float:
        """Distance from the identity to the last factor."""
        return abs(self.last - self.identity)

    def factor(self, distance: float) -> float:
        """The factor at a distance, to three significant digits."""
        sign = math.copysign(1.0, self.last - self.identity)
        return float(f"{self.identity + sign * min(distance, self.length):.3g}")

    def distance(self, factor: float) -> float:
        """Of a factor from the identity."""
        return abs(factor - self.identity)


@dataclass(frozen=True)
class Reached:
    """What a search found for one target.

    Attributes:
        target: damage that was asked for, in nats per token.
        factor: at the first crossing of the target from below; None where there is none.
        damage: at that factor; where there is none, the largest that was measured.
        within: whether the damage is within 10 % of the target.
        why: why there is no factor, or why the damage is not within 10 %; else empty.
    """

    target: float
    factor: float | None
    damage: float
    within: bool
    why: str = ""


@dataclass
class Curve:
    """Damage by factor, as far as it was measured.

    Attributes:
        line: the factors.
        points: factor -> damage in nats per token; inf where the activations overflowed.
    """

    line: Line
    points: dict[float, float] = field(default_factory=dict)

    def bracket(self, target: float) -> tuple[float, float] | None:
        """Distances between which the damage first rises from below the target to it or above; None if it never does.

        The identity, whose damage is 0, is one of the points.
        """
        before = 0.0
        for factor in sorted(self.points, key=self.line.distance):
            if self.points[factor] >= target:
                return before, self.line.distance(factor)
            before = self.line.distance(factor)
        return None

    def at(self, distance: float) -> float:
        """Damage at an evaluated distance, or at the identity."""
        return 0.0 if distance == 0 else self.points[self.line.factor(distance)]

    def best(self, target: float) -> float | None:
        """The evaluated factor at the ends of the target's bracket whose damage is nearest to it."""
        bracket = self.bracket(target)
        if bracket is None:
            return None
        ends = [self.line.factor(distance) for distance in bracket if distance > 0]
        return min(ends, key=lambda factor: abs(self.points[factor] - target))

    def error(self, target: float) -> float:
        """Of `best`: the difference from the target, as a share of it; inf where the target is not crossed."""
        best = self.best(target)
        return math.inf if best is None else abs(self.points[best] - target) / target

    def between(self, target: float, halve: bool) -> float | None:
        """The factor to evaluate next for a target that is crossed; None where three digits leave none in its bracket.

        Args:
            target: a damage.
            halve: take the middle of the bracket, not the point that its ends suggest.
        """
        bracket = self.bracket(target)
        if bracket is None:
            return None
        low, high = bracket
        for distance in (self._guess(target, low, high, halve), _middle(low, high)):
            factor = self.line.factor(distance)
            if low < self.line.distance(factor) < high and factor not in self.points:
                return factor
        return None

    def _guess(self, target: float, low: float, high: float, halve: bool) -> float:
        below, above = self.at(low), self.at(high)
        if halve or not math.isfinite(above):
            return _middle(low, high)
        if low == 0:  # damage grows like a power of the distance, between the first and the second
            return high * min(max((target / above) ** (1 / 1.5), 1 / _SHARE), 1 - _MARGIN)
        logs = below > 0
        share = math.log(target / below) / math.log(above / below) if logs else (target - below) / (above - below)
        return low * (high / low) ** min(max(share, _MARGIN), 1 - _MARGIN)


def _middle(low: float, high: float) -> float:
    return math.sqrt(low * high) if low > 0 else high / 4


def search(line: Line, targets: Sequence[float]) -> Generator[float, float, Curve]:
    """Yields the factors to evaluate, one after another, is sent the damage of each, and returns all that was measured.

    The walk goes on in equal ratios of distance until the largest target is crossed. Then the targets take turns: each
    is refined within the bracket of its first crossing from below, until all are within 10 %, no factor of three digits
    is left, or 12 evaluations were made. The factors depend on the damages alone, so that a search that is begun anew
    over stored evaluations goes on where it was.

    Args:
        line: the factors.
        targets: damages above 0.
    """
    curve = Curve(line)
    halve: dict[float, bool] = dict.fromkeys(targets, False)
    turns: dict[float, int] = dict.fromkeys(targets, 0)
    distance = FIRST * max(1.0, line.length / LONGEST)
    while len(curve.points) < MOST_EVALUATIONS:
        factor = line.factor(distance)
        if factor not in curve.points:
            curve.points[factor] = yield factor
        if curve.bracket(max(targets)) or distance >= line.length:
            break
        distance *= RATIO
    while len(curve.points) < MOST_EVALUATIONS:
        missed = [target for target in targets if TOLERANCE < curve.error(target) < math.inf]
        following = [(turns[target], target, curve.between(target, halve[target])) for target in missed]
        turn, target, between = min((each for each in following if each[2] is not None), default=(0, 0.0, None))
        if between is None:
            break
        before = curve.bracket(target)
        curve.points[between] = yield between
        turns[target] = turn + 1
        # Where the ends suggest a point that leaves most of the bracket, the next one halves it.
        halve[target] = not halve[target] and _width(curve.bracket(target)) > _width(before) / 2
    return curve


def _width(bracket: tuple[float, float] | None) -> float:
    assert bracket is not None
    low, high = bracket
    return math.log(high / low) if low > 0 else math.inf


def reached(curve: Curve, targets: Sequence[float]) -> list[Reached]:
    """What a finished search found for each target."""
    return [_reached(curve, target) for target in targets]


def _reached(curve: Curve, target: float) -> Reached:
    line, factor = curve.line, curve.best(target)
    if factor is None:
        farthest = max(curve.points, key=line.distance)
        most = max(curve.points.values())
        why = f"none up to {farthest:g}: the damage there is {curve.points[farthest]:.3g}, and {most:.3g} at most"
        return Reached(target, None, most, False, why)
    damage = curve.points[factor]
    within = curve.error(target) <= TOLERANCE
    why = ""
    if not within:
        below, above = (curve.at(distance) for distance in curve.bracket(target) or (0.0, 0.0))
        left = "no factor of three digits is left between them"
        if len(curve.points) >= MOST_EVALUATIONS:
            left = f"{MOST_EVALUATIONS} evaluations were made"
        why = f"not within {TOLERANCE:.0%}: it rises from {below:.3g} to {above:.3g}, and {left}"
    return Reached(target, factor, damage, within, why)


def replayed(line: Line, targets: Sequence[float], known: Mapping[float, float]) -> tuple[Curve, float | None]:
    """A search over known evaluations: its curve so far, and the factor that it needs next; None at its end."""
    steps = search(line, targets)
    curve = Curve(line)
    try:
        factor = next(steps)
        while factor in known:
            curve.points[factor] = known[factor]
            factor = steps.send(known[factor])
    except StopIteration as end:
        return end.value, None
    return curve, factor
