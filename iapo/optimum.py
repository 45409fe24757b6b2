"""The density that maximizes W - beta KL: the boundary value problem (6), followed from the small-KL limit (7).

The solver of `iapo.paths` where every procedure is a map h of F. What is solved is in `iapo.curves`, how in
`iapo.collocation`, on what panels in `iapo.meshes`. A fixed point iteration of (5) oscillates instead (best_of at small
beta), and shooting loses digits at one end or the other.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from iapo.collocation import newton
from iapo.curves import LOWEST_LOG_CDF, LOWEST_LOG_REST, Curve, defect, kernel_slopes, log_kernel, win_rate
from iapo.errors import UserError
from iapo.meshes import ROUGHLY, ahead, begun, remesh
from iapo.procedures import Pairing, Procedure
from iapo.quadrature import nodes

Floats = NDArray[np.float64]

_TOLERANCE = 2e-11  # of `defect`
_WORST = 1e-9  # of `defect`, where rounding leaves no more to be had
_AWRY, _BAD = 0.002, 0.02  # of `defect`: new panels are asked for, and after two of them are not enough
_ROUGH_STEP = 1e-3  # of Newton's last step on the way
_MOST_PANELS = 1000  # the hardest of benchmarks/closed_form.py takes 250
_MOST_CHANGED = 0.5  # log k where the path begins, by F not being u
_LOWEST = 340.0  # log of the largest -log f given, whose square is still a number
_APART_FROM_ZERO = 1e-11  # u from which on a curve's beginning counts as the end of a tail


@dataclass(frozen=True)
class Collocation:
    """The solver of `iapo.paths` for pairs of pointwise procedures."""

    pairs: tuple[Pairing, ...]
    quick: ClassVar[int] = 3

    def start(self, kl: float, log_beta: float | None = None) -> Curve:
        return _start(self.pairs, kl, log_beta)

    def advance(self, curve: Curve, kl: float, before: Curve | None) -> tuple[Curve, int] | None:
        guess = ahead(self.pairs, curve, before, kl)
        found = newton(self.pairs, guess, kl=kl, tolerance=_ROUGH_STEP) if guess else None
        if found is None or len(found[0].edges) > _MOST_PANELS:
            return None
        iterations = found[1]
        for enough in (_AWRY, _AWRY, _BAD):
            if np.max(defect(self.pairs, found[0])) < enough:
                return self._begun(found[0]), iterations
            found = newton(self.pairs, remesh(self.pairs, found[0], ROUGHLY), kl=kl, tolerance=_ROUGH_STEP)
            if found is None:
                return None
        return None

    def _begun(self, curve: Curve) -> Curve:
        """From where it should begin as the KL grows."""
        guess = begun(self.pairs, curve)
        found = newton(self.pairs, guess, kl=curve.kl, tolerance=_ROUGH_STEP) if guess else None
        return found[0] if found else curve

    def refine(self, curve: Curve, kl: float | None = None, log_beta: float | None = None) -> Curve | None:
        """On panels made anew until the equations hold between the nodes."""
        target = _kl_near(curve, log_beta) if kl is None else kl
        if not np.isclose(target, curve.kl, rtol=1e-9, atol=0):
            guess = ahead(self.pairs, curve, None, target)
            found = newton(self.pairs, guess, kl, log_beta, _ROUGH_STEP) if guess else None
            if found is None:
                return None
            curve = found[0]
        for _ in range(8):
            mesh = remesh(self.pairs, curve, _TOLERANCE / 4, fewest=1)
            found = newton(self.pairs, mesh, kl, log_beta) if len(mesh.edges) <= _MOST_PANELS else None
            if found is None:
                return None
            curve = found[0]
            left = np.max(defect(self.pairs, curve))
            if left < _TOLERANCE:
                return curve
        return curve if left < _WORST else None

    def win_rate(self, curve: Curve) -> float:
        return win_rate(self.pairs, curve)

    def reached(self, curve: Curve) -> float | None:
        exact = self.refine(curve, curve.kl)  # a rough curve may be far off where few points see the opponent's density
        return None if exact is None else self.win_rate(exact)


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

    large = log_k > scale - 5
    changed = np.abs(log_kernel(pairs, log_cdf_at(size)[large], log_rest[large]) - log_k[large])
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
    if found is None:
        raise UserError(
            f"no optimum was found near the reference, at {size**2 / 2:.4g} nats; ask for a larger KL or a smaller beta"
        )
    return found[0]


def _cumulative(width: Floats, values: Floats) -> Floats:
    """The integral by trapezoids."""
    return np.r_[0, np.cumsum(width * (values[1:] + values[:-1]) / 2)]


def _kl_near(curve: Curve, log_beta: float | None) -> float:
    """The KL at a log beta, by the tangent."""
    assert curve.tangent is not None and log_beta is not None
    more = (log_beta - curve.log_beta) / (curve.tangent.log_beta or np.inf)
    return curve.kl + float(np.clip(more, -curve.kl / 2, curve.kl))


# --- What is read off a curve -----------------------------------------------------------------------------------------


def points(curve: Curve, count: int = 96) -> tuple[Floats, Floats, Floats, Floats]:
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

    With k in proportion to F^p and f / F nearly constant, p log F + log h_b'(u) is: log f, which is next to log F,
    changes by 1 / p of log h_b', as long as that falls with u. It is exact to some nats, of more than fifty.
    """
    end, log_f = tail_end(curve), curve.state[0, 1]
    exponent = np.minimum(_log_tail_rise(pairs, u, end) - curve.log_beta, _LOWEST)
    integrated = log_f - np.exp(exponent)
    at = np.linspace(0, end, 513)
    log_k, power, _ = kernel_slopes(pairs, np.full(at.shape, curve.state[0, 0]), np.log1p(-at))
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

    at_zero = [(np.log(weight) + a.log_density(0.0), b) for weight, a, b in pairs]
    with np.errstate(divide="ignore"):
        terms = [log_density + log_mass(b) for log_density, b in at_zero if log_density > -np.inf]
    return np.logaddexp.reduce([np.full(np.shape(low), -np.inf), *terms])
