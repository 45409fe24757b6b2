"""The density that maximizes W - beta KL: the boundary value problem (6), solved by collocation.

In t = u + F, from 0 to 2, policy and reference stand on the same footing and nothing overflows. With u = t - F and
L = log f, (6) reads

    F' = 1 / (1 + e^-L)                             F(0) = 0, F(2) = 1
    L' = k(F, u) / (beta (1 + e^L))                 k = sum of weight h_a'(F) h_b'(u)

and KL = integral of L / (1 + e^-L) dt. Gauss collocation on panels, Newton for (F, L, log beta) together with the
condition on the KL, and continuation from the small-KL limit (7). A fixed point iteration of (5) oscillates instead
(best_of at small beta), and shooting loses digits at one end or the other.

Where f is zero to double precision F is zero, and (5) is an integral: such a tail at small u is left out of the panels.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded
from scipy.special import expit, log_expit, logit, logsumexp

from iapo.procedures import Pairing, Procedure
from iapo.quadrature import INTEGRALS, NODES, ORDER, WEIGHTS, cumulative, nodes, partial_integrals, weights

Floats = NDArray[np.float64]

_STEEPEST = 30.0  # log of the largest L' kept: steeper than e^30 only where f is zero to double precision
_DEEP = -60.0  # log f below which a tail is left out of the panels
_LOWEST = 340.0  # log of the largest -log f given, whose square is still a number
_ROUNDING = 1e-14  # of F and of L in a panel's polynomials, with the amplification of their derivative
_STEP = 1e-6  # of the central differences of k
_RESOLUTION = 0.24  # panel size in the units of `_position`
_MOST_PANELS = 20_000  # the hardest of benchmarks/closed_form.py takes 3,300
_ROUGHLY = 1e-4  # of Newton's last step on the way
_WORST = 1e-6  # of `residual`, where rounding leaves no more to be had
_BENDS = 1e4  # L' above the inverse of this is resolved by its logarithm
_TOLERANCE = 1e-9  # of `residual`
_POINTS = np.r_[0, NODES]  # of a panel's polynomials
_BARYCENTRIC = 1 / np.array([np.prod(x - np.delete(_POINTS, i)) for i, x in enumerate(_POINTS)])
_BETWEEN = np.array([0.06, 0.5, 0.94])  # places in a panel, not at its nodes, where `residual` looks
# SLOPES[i, j]: the derivative at BETWEEN[i] of the j-th Lagrange polynomial of POINTS
_SLOPES = np.linalg.solve(
    np.vander(_POINTS, increasing=True).T,
    (np.arange(ORDER + 1) * _BETWEEN[:, None] ** np.maximum(np.arange(ORDER + 1) - 1, 0)).T,
).T


@dataclass(frozen=True, eq=False)
class Optimum:
    """A stationary point of W - beta KL.

    edges: (n + 1,) panel edges in t = u + F; below the first F = 0. state: (n + 1, 2) and stages: (n, ORDER, 2) hold
    (F, L) at the edges and at the Gauss nodes.
    """

    edges: Floats
    state: Floats
    stages: Floats
    log_beta: float

    @property
    def kl(self) -> float:
        """(2), in nats."""
        log_f = self.stages[..., 1]
        return float(np.sum(weights(self.edges) * log_f * expit(log_f)))

    def points(self, between: int = 2) -> tuple[Floats, Floats, Floats]:
        """u, F and L, increasing, at every edge and node, with `between` steps from one to the next."""
        places = _places(between)
        width = np.diff(self.edges)[:, None]
        t = np.append(self.edges[:-1, None] + width * places, 2)
        cdf, log_f = np.moveaxis(_interpolate(self, t), -1, 0)
        # 1 - u, summed up from u = 1: its digits are lost in t - F where f is large
        share = expit(-self.stages[..., 1])
        above = np.append(np.cumsum(np.sum(weights(self.edges) * share, axis=1)[::-1])[-2::-1], 0)
        rest = above[:, None] + width * (share @ (WEIGHTS - partial_integrals(places)).T)
        return np.where(t > 1, 1 - np.append(rest, 0), t - cdf), cdf, log_f

    def tail(self, pairs: tuple[Pairing, ...], u: Floats) -> Floats:
        """L at u below the first edge, where F = 0: (5) integrated."""
        exponent = np.minimum(_log_tail_rise(pairs, u, float(self.edges[0])) - self.log_beta, _LOWEST)
        return self.state[0, 1] - np.exp(exponent)

    def slopes(self, pairs: tuple[Pairing, ...], u: Floats, cdf: Floats, log_f: Floats) -> Floats:
        """dL / du at points."""
        return _slope(pairs, u + cdf, np.stack([cdf, log_f], axis=-1), self.log_beta) / expit(-log_f)


def _places(between: int) -> Floats:
    """A panel's left edge and nodes, with `between` steps from one to the next."""
    places = np.r_[_POINTS, 1]
    return np.interp(np.arange((len(places) - 1) * between) / between, np.arange(len(places)), places)


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


def log_kernel(pairs: tuple[Pairing, ...], cdf: Floats, u: Floats) -> Floats:
    """log k, k = sum of weight h_a'(F) h_b'(u): the right-hand side of (5)."""
    cdf, u = np.clip(cdf, 0, 1), np.clip(u, 0, 1)
    terms = [np.log(weight) + a.log_density(cdf) + b.log_density(u) for weight, a, b in pairs]
    return terms[0] if len(terms) == 1 else np.logaddexp.reduce(terms)


def win_rate(pairs: tuple[Pairing, ...], optimum: Optimum) -> float:
    """(4) for this policy."""
    cdf, log_f = optimum.stages[..., 0], optimum.stages[..., 1]
    t = nodes(optimum.edges)
    cdf, u = np.clip(cdf, 0, 1), np.clip(t - cdf, 0, 1)
    loss = sum(weight * a.cdf(cdf) * b.density(u) for weight, a, b in pairs)
    return float(1 - np.sum(weights(optimum.edges) * expit(-log_f) * loss))


@dataclass(frozen=True)
class Collocation:
    """The solver of `iapo.paths` for pairs of pointwise procedures."""

    pairs: tuple[Pairing, ...]

    def start(self, kl: float, log_beta: float | None = None) -> Optimum:
        return _start(self.pairs, kl, log_beta)

    def advance(self, optimum: Optimum, kl: float, before: Optimum | None) -> tuple[Optimum, int] | None:
        guess = _extrapolated(self.pairs, optimum, before, kl) if before else None
        mesh = _remesh(self.pairs, guess or _squeezed(optimum, before, kl), 2 * _RESOLUTION)
        return _newton(self.pairs, mesh, kl=kl, tolerance=_ROUGHLY) if mesh else None

    def refine(self, optimum: Optimum, kl: float | None = None, log_beta: float | None = None) -> Optimum | None:
        """On panels halved until the equations hold between the nodes, or rounding keeps them from it."""
        resolution, previous = _RESOLUTION, np.inf
        for _ in range(5):
            mesh = _remesh(self.pairs, optimum, resolution)
            found = _newton(self.pairs, mesh, kl, log_beta) if mesh else None
            if found is None:
                return None
            optimum = found[0]
            if optimum.edges[0] > 0 and optimum.state[0, 1] > 0.75 * _DEEP:
                continue  # the tail that was left out has come up
            defect = residual(self.pairs, optimum)
            if defect < _TOLERANCE or previous / 2 < defect < 1e-8:
                break
            resolution, previous = resolution / 2, defect
        return optimum if residual(self.pairs, optimum) < _WORST else None

    def win_rate(self, optimum: Optimum) -> float:
        return win_rate(self.pairs, optimum)


def residual(pairs: tuple[Pairing, ...], optimum: Optimum) -> float:
    """The largest defect of the two differential equations between the nodes, relative to 1 + |L'|.

    What the rounding of F and L can do to a slope is taken off.
    """
    width = np.diff(optimum.edges)[:, None]
    t = optimum.edges[:-1, None] + width * _BETWEEN
    values = np.concatenate([optimum.state[:-1, None], optimum.stages], axis=1)
    slope = _SLOPES @ values / width[..., None]
    state = _interpolate(optimum, t)
    expected = np.stack([expit(state[..., 1]), _slope(pairs, t, state, optimum.log_beta)], axis=-1)
    rounding = _ROUNDING * (1 + np.abs(state)) / width[..., None]
    return float(np.max(np.maximum(np.abs(slope - expected) - rounding, 0) / (1 + np.abs(expected))))


def _slope(
    pairs: tuple[Pairing, ...],
    t: Floats,
    state: Floats,
    log_beta: float,
    du: Floats | float = 0,
    dcdf: Floats | float = 0,
) -> Floats:
    """L' at t, with u and F moved by du and dcdf."""
    cdf, log_f = state[..., 0], state[..., 1]
    exponent = log_kernel(pairs, cdf + dcdf, t - cdf + du) - log_beta + log_expit(-log_f)
    return np.exp(np.minimum(exponent, _STEEPEST))


def _start(pairs: tuple[Pairing, ...], kl: float, log_beta: float | None = None) -> Optimum:
    """The small-KL limit (7), log f = (Phi - mean) / beta, at `kl` or above `log_beta`, or less if that is large."""
    half = np.concatenate([[0.0], 0.5 ** np.arange(14, 0.5, -0.5), [1.0]])
    edges = np.concatenate([half, 2 - half[-2::-1]])
    u = nodes(edges) / 2
    log_k = log_kernel(pairs, u, u)
    scale = np.max(log_k)
    at_edges, at_nodes = cumulative(edges, np.exp(log_k - scale) / 2)
    average = weights(edges) / 2
    mean = np.sum(average * at_nodes)
    spread = np.sqrt(np.sum(average * (at_nodes - mean) ** 2))
    at_edges, at_nodes = (at_edges - mean) / spread, (at_nodes - mean) / spread
    size = min(np.sqrt(2 * kl), 0.2 / np.max(np.abs(at_edges)))
    if log_beta is not None:
        size = min(size, np.exp(np.log(spread) + scale - log_beta) / 2)
    log_f = size * at_edges, size * at_nodes
    cdf = cumulative(edges, expit(log_f[1]))
    state, stages = (np.stack([cdf[i], log_f[i]], axis=-1) for i in range(2))
    guess = Optimum(edges, state, stages, float(np.log(spread / size) + scale))
    found = _newton(pairs, guess, kl=size**2 / 2)
    assert found is not None
    return found[0]


def _squeezed(optimum: Optimum, before: Optimum | None, kl: float) -> Optimum:
    """A guess at a larger KL where f has a tail that is left out: mass squeezed towards u = 1, exactly so for worst_of.

    1 - u shrinks as exp(-KL), log beta goes on as it came from the optimum before. Without a tail, the optimum itself.
    """
    if optimum.edges[0] == 0:
        return optimum
    more = kl - optimum.kl
    rate = (optimum.log_beta - before.log_beta) / (optimum.kl - before.kl) if before else 0.0
    u, cdf, _ = optimum.points()
    t, moved = u + cdf, 1 - (1 - u) * np.exp(-more) + cdf
    edges = np.interp(optimum.edges, t, moved)

    def at(there: Floats) -> Floats:
        here = np.interp(there, moved, t)
        return _interpolate(optimum, here) + np.array([0, more])

    return Optimum(edges, at(edges), at(nodes(edges)), optimum.log_beta + rate * more)


def _extrapolated(pairs: tuple[Pairing, ...], optimum: Optimum, before: Optimum, kl: float) -> Optimum | None:
    """A guess at a larger KL where f has no tail, by two optima: None where it is no density.

    Panels follow what is steep, so that log(1 - u), the logit of F and L change smoothly at equal places in the mesh:
    with the root of the KL where that is small, in proportion to it where it is large. log beta is what fits these.
    """
    if optimum.edges[0] > 0:
        return None

    def root(kl: float) -> float:
        return float(np.sqrt(kl * (1 + kl)))

    ratio = (root(kl) - root(optimum.kl)) / (root(optimum.kl) - root(before.kl))

    def curve(one: Optimum) -> list[Floats]:
        u, cdf, log_f = one.points()
        place = _position(pairs, u + cdf, np.stack([cdf, log_f], axis=-1), one.log_beta)
        return [place / place[-1], u, np.clip(cdf, 0, 1), log_f]

    (place, u, cdf, log_f), (place_before, *values) = curve(optimum), curve(before)
    u_before, cdf_before, log_f_before = (np.interp(place, place_before, one) for one in values)
    with np.errstate(all="ignore"):  # at the ends the logarithms are infinite, and nothing moves
        pull = ratio * (np.log(1 - u) - np.log(1 - u_before))
        push = ratio * (logit(cdf) - logit(cdf_before))
        further = expit(logit(cdf) + np.where(np.isfinite(push), push, 0))
        moved = np.maximum.accumulate(1 - (1 - u) * np.exp(np.where(np.isfinite(pull), pull, 0)) + further)
        state = np.stack([further, log_f + ratio * (log_f - log_f_before)], axis=-1)
        edges = np.interp(optimum.edges, u + cdf, moved)
        edges[-1] = 2

        def at(t: Floats) -> Floats:
            return np.stack([np.interp(t, moved, one) for one in state.T], axis=-1)

        guess = Optimum(edges, at(edges), at(nodes(edges)), 0.0)
        cdf, log_f = np.moveaxis(guess.stages, -1, 0)
        log_k = log_kernel(pairs, cdf, nodes(edges) - cdf) + log_expit(-log_f)
        log_beta = logsumexp(log_k, b=weights(edges)) - np.log(np.ptp(guess.state[:, 1]))
    sound = np.isfinite(log_beta) and np.all(np.isfinite(guess.stages)) and np.all(np.diff(edges) > 0)
    return replace(guess, log_beta=float(log_beta)) if sound else None


def _newton(
    pairs: tuple[Pairing, ...],
    optimum: Optimum,
    kl: float | None = None,
    log_beta: float | None = None,
    tolerance: float = 1e-9,
) -> tuple[Optimum, int] | None:
    """Solve the collocation equations at a KL or a log beta: the solution and its iterations, None if there is none.

    In every panel the stages are linear in (F, L) of its left edge and in log beta; eliminating them leaves a banded
    system for the edges, bordered by the condition on the KL.
    """
    edges, state, stages, current = optimum.edges, optimum.state, optimum.stages, optimum.log_beta
    panels = len(edges) - 1
    t, weight = nodes(edges), weights(edges)
    inner = np.diff(edges)[:, None, None] * INTEGRALS
    previous = np.inf
    for iteration in range(1, 13):
        log_f = stages[..., 1]
        share = expit(log_f)
        slope = _slope(pairs, t, stages, current)
        free = slope < 0.999 * np.exp(_STEEPEST)
        # steps in proportion to F and to 1 - u, whose powers k may consist of
        cdf = stages[..., 0]
        up = _STEP * np.maximum(cdf, 1e-10)
        down = np.minimum(up, np.maximum(cdf, 0))
        du = _STEP * np.maximum(1 - t + stages[..., 0], 1e-5)
        by_cdf = _slope(pairs, t, stages, current, dcdf=up) - _slope(pairs, t, stages, current, dcdf=-down)
        by_u = _slope(pairs, t, stages, current, du=du) - _slope(pairs, t, stages, current, du=-du)
        derivative = np.stack([share, slope], axis=-1)
        jacobian = np.zeros((panels, ORDER, 2, 2))
        jacobian[..., 0, 1] = share * (1 - share)
        jacobian[..., 1, 0] = by_cdf / (up + down) - by_u / (2 * du)
        jacobian[..., 1, 1] = -slope * share * free
        by_log_beta = np.stack([np.zeros_like(slope), -slope * free], axis=-1)

        # the stages: their change is local @ (change of F, change of L, change of log beta, 1)
        system = np.eye(2 * ORDER) - np.einsum("pij,pjab->piajb", inner, jacobian).reshape(panels, 2 * ORDER, -1)
        right = np.zeros((panels, ORDER, 2, 4))
        right[..., 0, 0] = right[..., 1, 1] = 1
        right[..., 2] = inner @ by_log_beta
        right[..., 3] = state[:-1, None] + inner @ derivative - stages
        try:
            local = np.linalg.solve(system, right.reshape(panels, 2 * ORDER, 4)).reshape(right.shape)
        except np.linalg.LinAlgError:
            return None

        # the edges: next edge - transfer @ this edge = constant + by_log_beta
        gain = np.einsum("pi,piab,pibc->pac", weight, jacobian, local)
        transfer = np.eye(2) + gain[..., :2]
        constant = gain[..., 3] + np.einsum("pi,pia->pa", weight, derivative) - np.diff(state, axis=0)
        sensitivity = gain[..., 2] + np.einsum("pi,pia->pa", weight, by_log_beta)
        solution = _solve_edges(transfer, constant, sensitivity, -state[0, 0], 1 - state[-1, 0])
        at_edges, by_beta_at_edges = solution[..., 0], solution[..., 1]
        at_stages = local[..., 3] + np.einsum("piab,pb->pia", local[..., :2], at_edges[:-1])
        by_beta_at_stages = local[..., 2] + np.einsum("piab,pb->pia", local[..., :2], by_beta_at_edges[:-1])

        if log_beta is not None:
            change = log_beta - current
        elif kl is not None:
            gradient = weight * share * (1 + log_f * (1 - share))
            missing = kl - np.sum(weight * log_f * share) - np.sum(gradient * at_stages[..., 1])
            kl_by_log_beta = np.sum(gradient * by_beta_at_stages[..., 1])
            if kl_by_log_beta == 0:
                return None
            change = missing / kl_by_log_beta
        at_stages = at_stages + change * by_beta_at_stages
        at_edges = at_edges + change * by_beta_at_edges
        size = max(np.max(np.abs(at_stages[..., 1]) / (1 + np.abs(log_f))), abs(change) / 2)
        if not np.isfinite(size):
            return None
        damping = min(1, 1 / size)
        state, stages, current = state + damping * at_edges, stages + damping * at_stages, current + damping * change
        if size < tolerance or previous < size < 1e-6:  # or as close as rounding lets it come
            return Optimum(edges, state, stages, float(current)), iteration
        previous = size
    return None


def _solve_edges(transfer: Floats, constant: Floats, sensitivity: Floats, first: float, last: float) -> Floats:
    """The banded system of the edges for two right-hand sides, (constant, sensitivity): shape (n + 1, 2, 2).

    Row 0 sets F at the first edge, the last row F at t = 2, and rows 2p + 1, 2p + 2 cross panel p. A banded LU with
    pivoting is stable where multiplying the transfer matrices (shooting) is not.
    """
    panels = len(transfer)
    size = 2 * panels + 2
    banded = np.zeros((5, size))  # banded[2 + row - column, column]
    panel = 2 * np.arange(panels)
    banded[2, 0] = 1
    banded[3, size - 2] = 1
    for row in range(2):
        for column in range(2):
            banded[3 + row - column, panel + column] = -transfer[:, row, column]
        banded[1, panel + 2 + row] = 1
    right = np.zeros((size, 2))
    right[0, 0], right[-1, 0] = first, last
    right[1:-1, 0], right[1:-1, 1] = constant.ravel(), sensitivity.ravel()
    return solve_banded((2, 2), banded, right, check_finite=False).reshape(panels + 1, 2, 2)


def _position(pairs: tuple[Pairing, ...], t: Floats, state: Floats, log_beta: float) -> Floats:
    """Places of points in a good mesh, of equal steps in t, in L where f > 1, in log |L| where f < 1, and in log L'."""
    log_f = state[:, 1]
    bend = np.arcsinh(_BENDS * _slope(pairs, t, state, log_beta))
    middle = (log_f[1:] + log_f[:-1]) / 2
    rate = np.maximum(1 / np.hypot(1, middle), 0.15 * (middle > 0))
    steps = np.diff(t) + rate * np.abs(np.diff(log_f)) + 0.5 * np.abs(np.diff(bend))
    return np.concatenate([[0.0], np.cumsum(steps)])


def _remesh(pairs: tuple[Pairing, ...], optimum: Optimum, resolution: float) -> Optimum | None:
    """The same functions on panels of equal size by `_position`; None if they would be too many."""
    t = np.append(optimum.edges[:-1, None] + np.diff(optimum.edges)[:, None] * _places(2), 2)
    state = _interpolate(optimum, t)
    if optimum.edges[0] > 0:
        below = optimum.edges[0] * (1 - np.geomspace(1, 1e-4, 60))
        t, state = np.r_[below, t], np.concatenate([_extend(pairs, optimum, below), state])
    start = _tail_end(pairs, optimum.log_beta, t, state)
    t, state = t[start:], state[start:]
    position = _position(pairs, t, state, optimum.log_beta)
    if not position[-1] < resolution * _MOST_PANELS:
        return None
    panels = int(np.ceil(position[-1] / resolution))
    edges = np.interp(np.linspace(0, position[-1], panels + 1), position, t)
    edges[0], edges[-1] = t[0], 2
    states, stages = _extend(pairs, optimum, edges), _extend(pairs, optimum, nodes(edges))
    return Optimum(edges, states, stages, optimum.log_beta)


def _tail_end(pairs: tuple[Pairing, ...], log_beta: float, t: Floats, state: Floats) -> int:
    """The last of these points up to which f is negligible, and F too on the right-hand side of (5); 0 if none is.

    Nor is there a tail where (5) is zero at F = 0: f then stays where it is, and F is all that tells when it rises.
    """
    u, log_f = t - state[:, 0], state[:, 1]
    cdf = np.minimum(state[:, 0], u * np.exp(log_f))  # f increases
    at_zero = log_kernel(pairs, np.zeros_like(u), u) - log_beta
    change = np.exp(np.minimum(log_kernel(pairs, cdf, u) - log_beta, _STEEPEST)) - np.exp(
        np.minimum(at_zero, _STEEPEST)
    )
    empty = (log_f < _DEEP) & (np.abs(change) * u < 1e-12) & (at_zero > -np.inf)
    return max(int(np.argmin(empty)) - 1, 0)


def _extend(pairs: tuple[Pairing, ...], optimum: Optimum, t: Floats) -> Floats:
    """(F, L) at any t, in the tail too: shape t.shape + (2,)."""
    first = optimum.edges[0]
    inside = _interpolate(optimum, np.maximum(t, first))
    if first == 0:
        return inside
    outside = np.stack([np.zeros_like(t), optimum.tail(pairs, np.minimum(t, first))], axis=-1)
    return np.where((t < first)[..., None], outside, inside)


def _interpolate(optimum: Optimum, t: Floats) -> Floats:
    """(F, L) at any t, by the polynomial through a panel's left edge and its nodes: shape t.shape + (2,)."""
    edges = optimum.edges
    panel = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, len(edges) - 2)
    where = (t - edges[panel]) / np.diff(edges)[panel]
    difference = where[..., None] - _POINTS
    pull = _BARYCENTRIC / np.where(difference == 0, 1e-30, difference)
    values = np.concatenate([optimum.state[:-1, None], optimum.stages], axis=1)[panel]
    return np.einsum("...i,...ia->...a", pull, values) / np.sum(pull, axis=-1, keepdims=True)
