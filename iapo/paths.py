"""Following the stationary points of W - beta KL from the small-KL limit (7) to a KL or a beta.

Both solvers, of the pointwise procedures (`iapo.optimum`) and of functionals (`iapo.functionals`), step along the same
path, on which the KL increases and beta need not decrease.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol, TypeVar

import numpy as np

from iapo.errors import UserError


class Stationary(Protocol):
    """A stationary point: its KL in nats and log beta."""

    log_beta: float

    @property
    def kl(self) -> float: ...


_MOST_STEPS = 300  # that a path may try; the hardest of benchmarks/closed_form.py takes 66
_NEXT_TO_ONE = 1 - 1e-6  # win rate, from which on that is why a path ends

S = TypeVar("S", bound=Stationary)


class Solver(Protocol[S]):
    """What a path needs to know of the equations."""

    quick: ClassVar[int]
    """The iterations of a step after which the next one may be longer."""

    def start(self, kl: float, log_beta: float | None = None) -> S:
        """The small-KL limit, at `kl` or above `log_beta`, or at less KL if that is large."""

    def advance(self, point: S, kl: float, before: S | None) -> tuple[S, int] | None:
        """Nearly the stationary point at a larger KL, and the iterations it took; `before` came before `point`."""

    def refine(self, point: S, kl: float | None = None, log_beta: float | None = None) -> S | None:
        """The point at exactly this KL or log beta, to full accuracy."""

    def win_rate(self, point: S) -> float:
        """(4)."""

    def reached(self, point: S) -> float | None:
        """The win rate of a point of the path, good enough to be told; None if it is not."""


def along(solver: Solver[S], kls: Sequence[float]) -> list[S]:
    """The optima at these KLs (nats), increasing, in one pass."""
    found = []
    for kl, point in _follow(solver, solver.start(kls[0]), kls):
        if kl in kls:
            refined = solver.refine(point, kl=kl)
            if refined is None:
                raise _lost(solver, point)
            found.append(refined)
    return found


def at_beta(solver: Solver[S], beta: float) -> S:
    """The stationary point at this beta with the largest W - beta KL.

    The path of increasing KL crosses beta at each of them, and ends once 1 - beta KL, a bound, is below the best: that
    is, once the KL alone costs more than all that the best still loses, which may be less than 1 - W can tell from 0.
    """
    log_beta = float(np.log(beta))
    point = solver.start(np.inf, log_beta)
    best, best_value = None, -np.inf
    try:
        for kl, following in _follow(solver, point, longest=1.5):  # two crossings within a step would not be seen
            if best is not None and beta * (kl - best.kl) > 1 - solver.win_rate(best):
                break
            if (point.log_beta - log_beta) * (following.log_beta - log_beta) <= 0:
                crossing = _crossing(solver, point, following, log_beta)
                value = solver.win_rate(crossing) - beta * crossing.kl
                if value > best_value:
                    best, best_value = crossing, value
            point = following
    except UserError:  # the path cannot be followed to its end, where the win rate is next to 1
        if best is None:
            raise
    assert best is not None
    return best


def _crossing(solver: Solver[S], low: S, high: S, log_beta: float) -> S:
    """The optimum at log_beta between two optima on either side: Newton, or else halve the interval of KLs."""
    near, far = sorted((low, high), key=lambda point: abs(point.log_beta - log_beta))
    found = solver.refine(near, log_beta=log_beta) or solver.refine(far, log_beta=log_beta)
    if found:
        return found
    middle_kl = float(np.sqrt(low.kl * high.kl))
    middle = solver.refine(near, kl=middle_kl) or solver.refine(far, kl=middle_kl)
    if middle is None:
        raise UserError(f"no optimum was found near {middle_kl:.4g} nats; ask for a smaller KL or a larger beta")
    on_the_near_side = (middle.log_beta - log_beta) * (near.log_beta - log_beta) > 0
    return _crossing(solver, middle, far if on_the_near_side else near, log_beta)


def _follow(
    solver: Solver[S], point: S, stops: Sequence[float] = (), longest: float = 8.0
) -> Iterator[tuple[float, S]]:
    """(KL, optimum) from `point` to the last of the increasing stops, or for ever, in steps that Newton can take.

    The KL grows by factors of at most `longest`.
    """
    kl = point.kl
    ahead = [stop for stop in stops if not np.isclose(stop, kl, rtol=1e-12, atol=0)]
    if len(ahead) < len(stops):
        yield stops[0], point
    factor, before, failed = longest, None, False
    for _ in range(_MOST_STEPS):
        if stops and not ahead:
            return
        target = min(kl * factor, ahead[0]) if ahead else kl * factor
        found = solver.advance(point, target, before)
        if found is None:
            factor, failed = factor**0.5, True
            if factor < 1.0001:
                raise _lost(solver, point)
            continue
        before, (point, iterations) = point, found
        kl = target
        yield kl, point
        if ahead and kl == ahead[0]:
            ahead.pop(0)
        slow, quick = iterations > 1.7 * solver.quick, iterations <= solver.quick
        growth = 0.7 if slow else 1 if not quick else 1.15 if failed else 1.5  # or it fails again
        factor, failed = min(factor**growth, longest), False
    raise _lost(solver, point)


def _lost(solver: Solver[S], point: S) -> UserError:
    win_rate = solver.reached(point)
    reason = ", as near 1 as double precision can tell its optimum" if (win_rate or 0) > _NEXT_TO_ONE else ""
    there = "" if win_rate is None else f", where the win rate is {win_rate:.10g}{reason}"
    return UserError(f"no optimum was found beyond {point.kl:.4g} nats{there}; ask for a smaller KL or a larger beta")
