"""The boundary value problem (6) as a curve whose three logarithms change by 1 in all per unit of length.

With L = log f and

    s = log F - log(1 - u) + L

policy, reference and density stand on the same footing. Per unit of u these three change by f / F, 1 / (1 - u) and, by
(5), k / beta, where k = sum of weight h_a'(F) h_b'(u). So per unit of s they change by the shares of the three in their
sum, a softmax of logarithms, in which nothing overflows, nothing is steep, and log F and log(1 - u), whose multiples k
consists of, keep their digits where F and 1 - u are 1e-30 or e^-1000:

    (-d log(1 - u), d log F, dL) / ds = softmax(-log(1 - u), L - log F, log k - log beta) = (a, b, c)
    du = (1 - u) a ds,    dF = F b ds,    KL = integral of L dF

The curve begins at log F = -70, or lower while a flat log f falls past that (`iapo.meshes`), and ends where the mass
above u is e^-45. At both ends it goes on in a straight line:
below, F = f u where F is too small to matter or, where f falls with F, f / F = k / beta + 1 / u; above,
1 - F = f (1 - u).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iapo.procedures import Pairing
from iapo.quadrature import NODES, ORDER, WEIGHTS, nodes, weights

Floats = NDArray[np.float64]

LOWEST_LOG_CDF = -70.0  # log F where curves begin, most of them
LOWEST_LOG_REST = -45.0  # log of the mass above u where they end
_STEP = 1e-5  # of the central differences of log k, relative to F and to 1 - F, to u and to 1 - u
_RANGE = (-1e250, -1e-300)  # of log F and log(1 - u), whose multiples and log(1 - F) are still numbers
_POINTS = np.r_[0, NODES]  # of a panel's polynomials
_BARYCENTRIC = 1 / np.array([np.prod(x - np.delete(_POINTS, i)) for i, x in enumerate(_POINTS)])
_BETWEEN = np.array([0.06, 0.5, 0.94])  # places in a panel, not at its nodes, where `defect` looks
# _SLOPES[i, j]: the derivative at _BETWEEN[i] of the j-th Lagrange polynomial of _POINTS
_SLOPES = np.linalg.solve(
    np.vander(_POINTS, increasing=True).T,
    (np.arange(ORDER + 1) * _BETWEEN[:, None] ** np.maximum(np.arange(ORDER + 1) - 1, 0)).T,
).T
_MOST_HALVINGS, _LEAST_LOSS = 8, 1e-13  # of panels, and the least error of a panel's loss that asks for one
_EPSILON = 2.0**-53  # relative rounding of log F, L and s
_AMPLIFIED = np.max(np.sum(np.abs(_SLOPES), axis=1))  # by the slope of a panel of length 1


@dataclass(frozen=True, eq=False)
class Tangent:
    """The derivatives of a curve by the KL (nats), each under its name in `Curve`, at equal places."""

    state: Floats
    stages: Floats
    first: float
    length: float
    log_beta: float


@dataclass(frozen=True, eq=False)
class Curve:
    """A stationary point of W - beta KL, or a guess at one.

    edges: (n + 1,) panel edges as places from 0 to 1, where s = first + length * place. state: (n + 1, 2) and stages:
    (n, ORDER, 2) hold (log F, L) at the edges and at the Gauss nodes. kl: (2), in nats. tangent: by the KL, for a
    solution at a KL.
    """

    edges: Floats
    state: Floats
    stages: Floats
    first: float
    length: float
    log_beta: float
    kl: float = np.nan
    tangent: Tangent | None = None

    def log_rest(self, place: Floats, values: Floats) -> Floats:
        """log(1 - u) of values (log F, L) at places."""
        return values[..., 0] + values[..., 1] - self.first - self.length * place

    def at(self, place: Floats) -> Floats:
        """(log F, L) at any places, by the polynomials of the panels: shape place.shape + (2,)."""
        return interpolate(self.edges, self.state, self.stages, place)


def interpolate(edges: Floats, state: Floats, stages: Floats, place: Floats) -> Floats:
    """Values at any places, by the polynomial through a panel's left edge and its nodes."""
    panel = np.clip(np.searchsorted(edges, place, side="right") - 1, 0, len(edges) - 2)
    difference = ((place - edges[panel]) / np.diff(edges)[panel])[..., None] - _POINTS
    pull = _BARYCENTRIC / np.where(difference == 0, 1e-30, difference)
    values = np.concatenate([state[:-1, None], stages], axis=1)[panel]
    return np.einsum("...i,...ia->...a", pull, values) / np.sum(pull, axis=-1, keepdims=True)


def log_kernel(pairs: tuple[Pairing, ...], log_cdf: Floats, log_rest: Floats) -> Floats:
    """log k at log F and log(1 - u): the right-hand side of (5)."""
    log_cdf, log_rest = np.clip(log_cdf, *_RANGE), np.clip(log_rest, *_RANGE)
    by_cdf, by_u = (log_cdf, _other(log_cdf)), (_other(log_rest), log_rest)
    terms = [np.log(w) + a.log_density_of_logs(*by_cdf) + b.log_density_of_logs(*by_u) for w, a, b in pairs]
    return terms[0] if len(terms) == 1 else np.logaddexp.reduce(terms)


def kernel_slopes(pairs: tuple[Pairing, ...], log_cdf: Floats, log_rest: Floats) -> tuple[Floats, Floats, Floats]:
    """log k and its derivatives by log F and by log(1 - u), 0 where k is 0."""
    x, y = np.clip(log_cdf, *_RANGE), np.clip(log_rest, *_RANGE)
    dx, dy = -_STEP * np.expm1(x), -_STEP * np.expm1(y)
    xs, ys = np.stack([x, x + dx, x - dx]), np.stack([y, y + dy, y - dy])
    by_cdf, by_u = (xs, _other(xs)), (_other(ys), ys)
    terms = []
    for weight, a, b in pairs:
        of_cdf, of_u = a.log_density_of_logs(*by_cdf), b.log_density_of_logs(*by_u)
        terms.append(np.log(weight) + np.concatenate([of_cdf + of_u[:1], of_cdf[:1] + of_u[1:]]))
    log_k, x_up, x_down, y_up, y_down = terms[0] if len(terms) == 1 else np.logaddexp.reduce(terms)
    with np.errstate(invalid="ignore"):
        slopes = (x_up - x_down) / (2 * dx), (y_up - y_down) / (2 * dy)
    by_x, by_y = (np.where(np.isfinite(slope), slope, 0) for slope in slopes)
    return log_k, by_x, by_y


def _other(log_p: Floats) -> Floats:
    """log(1 - p)."""
    return np.log(-np.expm1(log_p))


def shares(log_cdf: Floats, log_f: Floats, log_rest: Floats, log_slope: Floats) -> tuple[Floats, Floats]:
    """(a, b, c), stacked, of these and log(k / beta), and the log of the length of s per u."""
    logs = np.stack([-log_rest, log_f - log_cdf, log_slope])
    total = np.logaddexp(np.logaddexp(logs[0], logs[1]), logs[2])
    return np.exp(logs - total), total


def shares_at(pairs: tuple[Pairing, ...], curve: Curve, place: Floats, values: Floats) -> tuple[Floats, Floats]:
    """`shares` at places where (log F, L) has these values."""
    log_rest = curve.log_rest(place, values)
    log_cdf, log_f = values[..., 0], values[..., 1]
    return shares(log_cdf, log_f, log_rest, log_kernel(pairs, log_cdf, log_rest) - curve.log_beta)


def kl_of(pairs: tuple[Pairing, ...], curve: Curve) -> float:
    """(2), in nats."""
    _, total = shares_at(pairs, curve, nodes(curve.edges), curve.stages)
    log_f = curve.stages[..., 1]
    return float(curve.length * np.sum(weights(curve.edges) * log_f * np.exp(log_f - total)))


def win_rate(pairs: tuple[Pairing, ...], curve: Curve) -> float:
    """(4), on panels halved until they agree, for h_b' may be steep where the curve is not."""

    def losses(low: Floats, high: Floats) -> Floats:
        width = (high - low)[:, None]
        place = low[:, None] + width * NODES
        values = curve.at(place)
        log_rest = np.clip(curve.log_rest(place, values), *_RANGE)
        _, total = shares_at(pairs, curve, place, values)
        cdf, log_u = np.exp(np.minimum(values[..., 0], 0)), _other(log_rest)
        loss = sum(w * a.cdf(cdf) * np.exp(b.log_density_of_logs(log_u, log_rest) - total) for w, a, b in pairs)
        return curve.length * np.sum(width * WEIGHTS * loss, axis=1)

    low, high = curve.edges[:-1], curve.edges[1:]
    coarse, lost = losses(low, high), 0.0
    for _ in range(_MOST_HALVINGS):
        middle = (low + high) / 2
        low, high = np.r_[low, middle], np.r_[middle, high]
        fine = losses(low, high)
        both = fine.reshape(2, -1).sum(axis=0)
        apart = np.abs(both - coarse) > _LEAST_LOSS
        lost += float(np.sum(both[~apart]))
        low, high, coarse = (one[np.tile(apart, 2)] for one in (low, high, fine))
        if not len(low):
            break
    return float(np.clip(1 - lost - np.sum(coarse), 0, 1))


def residual(pairs: tuple[Pairing, ...], curve: Curve) -> float:
    """The largest defect of d log F / ds = b and dL / ds = c between the nodes."""
    return float(np.max(defect(pairs, curve)))


def defect(pairs: tuple[Pairing, ...], curve: Curve) -> Floats:
    """The same by panel, (n,), without what the rounding of log F, L and s can do to a slope and to its share."""
    place, values, slope = between_nodes(curve)
    log_cdf, log_f = values[..., 0], values[..., 1]
    log_rest = curve.log_rest(place, values)
    shift = _EPSILON * (np.abs(log_cdf) + np.abs(log_f) + np.abs(curve.first + curve.length * place))
    expected, moved = (
        np.moveaxis(shares(log_cdf, log_f, at, log_kernel(pairs, log_cdf, at) - curve.log_beta)[0][1:], 0, -1)
        for at in (log_rest, log_rest - shift)
    )
    width = np.diff(curve.edges)[:, None, None] * curve.length
    rounding = _EPSILON * _AMPLIFIED * (1 + np.abs(values)) / width + np.abs(moved - expected)
    return np.max(np.maximum(np.abs(slope - expected) - rounding, 0), axis=(1, 2))


def between_nodes(curve: Curve) -> tuple[Floats, Floats, Floats]:
    """Places in every panel, (n, 3), and there (log F, L) and its slope by s, (n, 3, 2)."""
    width = np.diff(curve.edges)[:, None]
    place = curve.edges[:-1, None] + width * _BETWEEN
    values = np.concatenate([curve.state[:-1, None], curve.stages], axis=1)
    return place, curve.at(place), _SLOPES @ values / (width[..., None] * curve.length)
