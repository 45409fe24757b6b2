"""The density that maximizes W - beta KL: the boundary value problem (6), followed from the small-KL limit (7).

The solver of `iapo.paths` where every procedure is a map h of F. What is solved is in `iapo.curves`, how in
`iapo.collocation`. A fixed point iteration of (5) oscillates instead (best_of at small beta), and shooting loses digits at
one end or the other.

Where the path goes next is foretold by the tangent of the curve, which Newton gives, moved along the curve so that its
bends stay at their places in the mesh: as the KL grows they wander, and straight stretches between them grow.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded

from iapo.collocation import newton
from iapo.curves import (
    LOWEST_LOG_CDF,
    LOWEST_LOG_REST,
    Curve,
    defect,
    interpolate,
    kernel_slopes,
    log_kernel,
    shares,
    win_rate,
)
from iapo.procedures import Pairing, Procedure
from iapo.quadrature import ORDER, nodes

Floats = NDArray[np.float64]

_TOLERANCE = 2e-11  # of `defect`
_ROUGHLY = 3e-4  # of `defect` on the way
_AWRY = 0.02  # of `defect`, where the panels are too coarse for the step
_ROUGH_STEP = 1e-3  # of Newton's last step on the way
_LONGEST = 6.0  # panel, in s
_MOST_PANELS = 3000  # the hardest of benchmarks/closed_form.py takes 250
_MOST_CHANGED = 0.5  # log k where the path begins, by F not being u
_FINER = 8  # places a panel where `_motion` looks
_STIFFNESS = 0.002  # of the movement along the curve, against what its bends ask for
_LOWEST = 340.0  # log of the largest -log f given, whose square is still a number
_APART_FROM_ZERO = 1e-11  # u from which on a curve's beginning counts as the end of a tail


@dataclass(frozen=True)
class Collocation:
    """The solver of `iapo.paths` for pairs of pointwise procedures."""

    pairs: tuple[Pairing, ...]

    def start(self, kl: float, log_beta: float | None = None) -> Curve:
        return _start(self.pairs, kl, log_beta)

    def advance(self, curve: Curve, kl: float, before: Curve | None) -> tuple[Curve, int] | None:
        guess = _ahead(self.pairs, _remesh(self.pairs, curve, _ROUGHLY), before, kl)
        found = newton(self.pairs, guess, kl=kl, tolerance=_ROUGH_STEP) if guess else None
        if found is None:
            return None
        iterations = found[1]
        for _ in range(3):
            if np.max(defect(self.pairs, found[0])) < _AWRY:
                return found[0], iterations
            found = newton(self.pairs, _remesh(self.pairs, found[0], _ROUGHLY), kl=kl, tolerance=_ROUGH_STEP)
            if found is None:
                return None
        return None

    def refine(self, curve: Curve, kl: float | None = None, log_beta: float | None = None) -> Curve | None:
        """On panels made anew until the equations hold between the nodes."""
        for _ in range(8):
            mesh = _remesh(self.pairs, curve, _TOLERANCE / 4)
            found = newton(self.pairs, mesh, kl, log_beta) if len(mesh.edges) <= _MOST_PANELS else None
            if found is None:
                return None
            curve = found[0]
            if np.max(defect(self.pairs, curve)) < _TOLERANCE:
                return curve
        return None

    def win_rate(self, curve: Curve) -> float:
        return win_rate(self.pairs, curve)


# --- The small-KL limit -----------------------------------------------------------------------------------------------


def _start(pairs: tuple[Pairing, ...], kl: float, log_beta: float | None = None) -> Curve:
    """(7), log f = (Phi - mean) / beta, at `kl` or above `log_beta`, or at less KL if that is large."""
    far, near = np.linspace(0, 1, 400, endpoint=False), np.linspace(0, 1, 2000, endpoint=False)
    low = np.r_[LOWEST_LOG_CDF + far * (-LOWEST_LOG_CDF - 8), -8 + near * (8 + np.log(0.5))]
    high = np.r_[np.log(0.5) - near * (8 + np.log(0.5)), -8 + far * (LOWEST_LOG_REST + 8), LOWEST_LOG_REST]
    log_u = np.r_[low, np.log1p(-np.exp(high))]
    log_rest = np.r_[np.log1p(-np.exp(low)), high]
    width = np.diff(np.exp(log_u))
    width[len(low) :] = -np.diff(np.exp(high))
    log_k = log_kernel(pairs, log_u, log_rest)
    scale = np.max(log_k)
    phi = _cumulative(width, np.exp(log_k - scale))
    middle = (phi[1:] + phi[:-1]) / 2
    mean = np.sum(width * middle)
    spread = np.sqrt(np.sum(width * (middle - mean) ** 2))
    phi = (phi - mean) / spread
    size = min(np.sqrt(2 * kl), 0.2 / np.max(np.abs(phi)))
    if log_beta is not None:
        size = min(size, np.exp(np.log(spread) + scale - log_beta) / 2)

    def log_cdf_at(size: float) -> Floats:
        cdf = np.exp(LOWEST_LOG_CDF) + _cumulative(width, np.exp(size * phi))
        return np.minimum(np.log(cdf / cdf[-1]), 0)

    changed = np.abs(log_kernel(pairs, log_cdf_at(size), log_rest) - log_k)[log_k > scale - 5]
    size *= min(1, _MOST_CHANGED / max(np.max(changed), _MOST_CHANGED))  # so that F = u makes a good first guess of k
    log_f, log_cdf = size * phi, log_cdf_at(size)
    s = log_cdf - log_rest + log_f
    place = (s - s[0]) / (s[-1] - s[0])
    inside = np.where((log_u > -8) & (log_rest > -8), 1.0, 0.2)
    steps = inside[1:] * np.diff(s) + 8 * np.diff(phi) / np.ptp(phi)
    steps += 0.15 * np.abs(np.diff(np.maximum(log_k - scale, -40)))
    position = np.r_[0, np.cumsum(steps)]
    edges = np.interp(np.linspace(0, position[-1], int(position[-1]) + 2), position, place)
    edges[0], edges[-1] = 0, 1

    def at(places: Floats) -> Floats:
        return np.stack([np.interp(places, place, one) for one in (log_cdf, log_f)], axis=-1)

    guess = Curve(edges, at(edges), at(nodes(edges)), s[0], s[-1] - s[0], float(np.log(spread / size) + scale))
    found = newton(pairs, guess, kl=size**2 / 2)
    assert found is not None
    return found[0]


def _cumulative(width: Floats, values: Floats) -> Floats:
    """The integral by trapezoids."""
    return np.r_[0, np.cumsum(width * (values[1:] + values[:-1]) / 2)]


# --- Meshes -----------------------------------------------------------------------------------------------------------


def _remesh(pairs: tuple[Pairing, ...], curve: Curve, tolerance: float) -> Curve:
    """The same functions on panels that have equal defects, by the order of the collocation, of about a tolerance."""
    needed = np.clip((defect(pairs, curve) / tolerance) ** (1 / ORDER), 0.5, 4)
    for _ in range(2):  # the next panel is not very different
        needed[:-1] = np.maximum(needed[:-1], 0.3 * needed[1:])
        needed[1:] = np.maximum(needed[1:], 0.3 * needed[:-1])
    needed = np.maximum(needed, np.diff(curve.edges) * curve.length / _LONGEST)
    position = np.r_[0, np.cumsum(needed)]
    edges = np.interp(np.linspace(0, position[-1], int(np.ceil(position[-1])) + 1), position, curve.edges)
    edges[0], edges[-1] = 0, 1

    def on(state: Floats, stages: Floats) -> tuple[Floats, Floats]:
        at_edges = interpolate(curve.edges, state, stages, edges)
        at_edges[-1] = state[-1]
        return at_edges, interpolate(curve.edges, state, stages, nodes(edges))

    state, stages = on(curve.state, curve.stages)
    tangent = curve.tangent
    if tangent is not None:
        ahead = on(tangent.state, tangent.stages)
        tangent = replace(tangent, state=ahead[0], stages=ahead[1])
    return replace(curve, edges=edges, state=state, stages=stages, tangent=tangent)


@dataclass(frozen=True, eq=False)
class _Motion:
    """How a curve moves as the KL grows, by place, (m,): of (log F, L), (m, 2), and of s."""

    place: Floats
    values: Floats
    s: Floats
    pace: float


def _motion(pairs: tuple[Pairing, ...], curve: Curve) -> _Motion:
    """The tangent, moved along the curve so that the shares of its three logarithms change little at equal places.

    Least squares, with a price on the slope of the movement, which is none at both ends.
    """
    assert curve.tangent is not None
    tangent, edges = curve.tangent, curve.edges
    inside = np.arange(_FINER) / _FINER
    place = np.append(edges[:-1, None] + np.diff(edges)[:, None] * inside, 1)
    values, change = curve.at(place), interpolate(edges, tangent.state, tangent.stages, place)
    log_cdf, log_f = values.T
    log_rest = curve.log_rest(place, values)
    log_k, by_cdf, by_rest = kernel_slopes(pairs, log_cdf, log_rest)
    share, _ = shares(log_cdf, log_f, log_rest, log_k - curve.log_beta)
    of_s = tangent.first + tangent.length * place
    of_cdf, of_f = change.T
    of_rest = of_cdf + of_f - of_s
    rest, cdf, f = share

    def of_shares(by_rest_of: Floats, by_cdf_of: Floats, by_f_of: Floats, by_beta: float) -> Floats:
        logs = np.stack([-by_rest_of, by_f_of - by_cdf_of, by_cdf * by_cdf_of + by_rest * by_rest_of - by_beta])
        return share * (logs - np.sum(share * logs, axis=0))

    as_kl_grows, along = of_shares(of_rest, of_cdf, of_f, tangent.log_beta), of_shares(-rest, cdf, f, 0.0)
    step = np.diff(place) * curve.length
    mass = np.r_[step, 0] / 2 + np.r_[0, step] / 2
    banded = np.zeros((3, len(place)))
    banded[0, 1:] = banded[2, :-1] = -_STIFFNESS / step
    banded[1] = mass * np.sum(along**2, axis=0) - banded[0] - banded[2]
    right = -mass * np.sum(along * as_kl_grows, axis=0)
    banded[1, [0, -1]], banded[0, 1], banded[2, -2], right[[0, -1]] = 1, 0, 0, 0
    moved = solve_banded((1, 1), banded, right, check_finite=False)
    movement = np.stack([of_rest - moved * rest, of_cdf + moved * cdf, of_f + moved * f])
    pace = float(np.sqrt(np.sum(mass * np.sum(movement**2, axis=0))))
    return _Motion(place, movement[1:].T, of_s + moved, pace)


def _ahead(pairs: tuple[Pairing, ...], curve: Curve, before: Curve | None, kl: float) -> Curve | None:
    """A guess at a larger KL; None if it is no curve. The pace is a power of the KL, by the last two curves."""
    motion = _motion(pairs, curve)
    assert curve.tangent is not None
    power = -0.5
    if before is not None and before.tangent is not None and before.kl < curve.kl:
        pace = _motion(pairs, before).pace
        power = float(np.clip(np.log(motion.pace / pace) / np.log(curve.kl / before.kl), -1.5, 1.5))
    log_ratio = np.log(kl / curve.kl)
    more = curve.kl * (log_ratio if abs(power + 1) < 1e-3 else np.expm1((power + 1) * log_ratio) / (power + 1))
    values = curve.at(motion.place) + more * motion.values
    s = np.maximum.accumulate(curve.first + curve.length * motion.place + more * motion.s)
    length = s[-1] - s[0]
    if not (np.all(np.isfinite(s)) and np.all(np.isfinite(values)) and length > 0):
        return None
    place = (s - s[0]) / length
    edges = place[::_FINER]
    apart = np.append(np.diff(edges) > 1e-6, True)  # of those that have met, one is left
    edges = edges[apart]
    edges[0] = 0

    def at(places: Floats) -> Floats:
        """Values at places of the guess: smooth in the place they come from, and that nearly linear in a panel."""
        source = np.interp(places, place, motion.place)
        ahead = [np.interp(source, motion.place, one) for one in motion.values.T]
        return curve.at(source) + more * np.stack(ahead, axis=-1)

    log_beta = curve.log_beta + more * curve.tangent.log_beta
    return Curve(edges, at(edges), at(nodes(edges)), float(s[0]), float(length), float(log_beta))


# --- What is read off a curve -----------------------------------------------------------------------------------------


def points(curve: Curve, count: int = 48) -> tuple[Floats, Floats, Floats, Floats]:
    """Increasing u, F and L at `count` places a panel, and log(1 - u)."""
    inside = np.arange(count) / count
    place = np.append(curve.edges[:-1, None] + np.diff(curve.edges)[:, None] * inside, 1)
    values = curve.at(place)
    log_rest = np.minimum(curve.log_rest(place, values), 0)
    return -np.expm1(log_rest), np.exp(np.minimum(values[:, 0], 0)), values[:, 1], log_rest


def tail_end(curve: Curve) -> float:
    """The u below which f is negligible, where the curve begins; 0 if there is no such tail."""
    u = float(-np.expm1(curve.log_rest(np.zeros(()), curve.state[0])))
    return u if u > _APART_FROM_ZERO else 0.0


def tail(pairs: tuple[Pairing, ...], curve: Curve, u: Floats) -> Floats:
    """L at u below `tail_end`: (5) integrated with F = 0, or, where k is 0 there, F and f falling together.

    With k in proportion to F^p and f / F nearly constant, p log F + log h_b'(u) is: log f, which is next to log F, changes
    by 1 / p of log h_b', as long as that falls with u. It is exact to some nats, of more than fifty.
    """
    end, log_f = tail_end(curve), curve.state[0, 1]
    exponent = np.minimum(_log_tail_rise(pairs, u, end) - curve.log_beta, _LOWEST)
    integrated = log_f - np.exp(exponent)
    at = np.linspace(0, end, 513)
    log_k, power, _ = kernel_slopes(pairs, np.full(at.shape, LOWEST_LOG_CDF), np.log1p(-at))
    if power[-1] < 1e-3:
        return integrated
    falls = (np.maximum.accumulate(log_k[::-1])[::-1] - log_k[-1]) / power[-1]
    return np.minimum(integrated, log_f - np.interp(u, at, falls))


def tail_transform(pairs: tuple[Pairing, ...], u: Floats) -> Floats:
    """Phi(u) where F = 0, with Phi(0) = 0: sum of weight h_a'(0) h_b(u)."""
    return np.asarray(sum(weight * a.density(0.0) * b.cdf(u) for weight, a, b in pairs))


def _log_tail_rise(pairs: tuple[Pairing, ...], low: Floats, high: float) -> Floats:
    """log(Phi(high) - Phi(low)) where F = 0: of the sum of weight h_a'(0) (h_b(high) - h_b(low))."""

    def log_mass(b: Procedure) -> Floats:
        below, above = b.log_survival(low), b.log_survival(high)
        if above < np.log(0.5):
            return below + np.log(-np.expm1(np.minimum(above - below, 0)))
        return np.log(np.maximum(b.cdf(high) - b.cdf(low), 0))

    with np.errstate(divide="ignore"):
        terms = [np.log(weight) + a.log_density(0.0) + log_mass(b) for weight, a, b in pairs]
    return np.logaddexp.reduce(terms)
