"""The closed form (arXiv 2412.19792): the calibrated reward's density f under the trained policy, its KL and win rate.

The calibrated reward is uniform under the reference, whatever prompt, model and reward, so that the solution of the
KL-regularized problem is one density on [0, 1]:

    f(u) = exp(Phi(u) / beta) / Z                                           (1)
    KL = integral of f log f                                                (2)
    W = 1 - integral of h_a(F(u)) h_b'(u) du                                (4)

with procedure a for the policy and b for its opponent, the reference. Everything is in nats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.optimize import brentq
from scipy.special import logit, logsumexp

from iapo import optimum as optima
from iapo.curves import Curve, log_kernel
from iapo.densities import Density, cells, log_integral
from iapo.errors import UserError
from iapo.functionals import Profile, Variation, first_order_of, output_of
from iapo.functionals import corners as corners_of
from iapo.paths import along, at_beta
from iapo.procedures import Functional, Pairing, Procedure, as_procedure, has_functional, pairings
from iapo.quadrature import cumulative, nodes, weights
from iapo.transforms import AnyTransform, FirstOrder, Optimal, as_transform

Floats = NDArray[np.float64]
Function = Callable[[ArrayLike], Floats]
_APART = 1e-11  # between values of u that tell a slope of log f to five digits
_STEEPEST = 300.0  # log of the largest d log f / du that is looked at
_NOTHING = -700.0  # log of a density that has no part in a win rate
_DEEPEST = -1e9  # log f below which nothing is resolved
LEAST_KL = 1e-8  # nats that can be asked for; below, rounding of log f is a part of it


@dataclass(frozen=True)
class ClosedForm:
    """The density of the calibrated reward under the policy trained with a transform at a KL.

    beta, kl (nats) and win_rate belong together; log_partition is log Z of (1), with Phi(0) = 0 for the transforms that
    are defined by Phi' (optimal and first_order). All methods take arrays of u in [0, 1] and return their shape.
    """

    procedure: Procedure
    opponent: Procedure
    transform: AnyTransform
    beta: float
    kl: float
    win_rate: float
    log_partition: float
    _density: Density = field(repr=False, compare=False)
    _transform: Function = field(repr=False, compare=False)

    def log_density(self, u: ArrayLike) -> Floats:
        """log f(u): the target of the log-ratio of a response with calibrated reward u, (3)."""
        return self._density.log_f(np.asarray(u, float))

    def density(self, u: ArrayLike) -> Floats:
        """f(u)."""
        return np.exp(self.log_density(u))

    def cdf(self, u: ArrayLike) -> Floats:
        """F(u)."""
        return self._density.cdf(u)

    def log_mean_density(self, low: ArrayLike, high: ArrayLike) -> Floats:
        """The log of the mean of f over [low, high]: the target of a response known to lie between the two.

        Over a partition of [0, 1] the means, weighted by width, sum to 1. Where low = high it is the log density.
        """
        return self._density.log_mean(low, high)

    def win_rate_under(self, procedure: str | Procedure, opponent: str | Procedure | None = None) -> float:
        """(4) of this policy deployed with another procedure than the one it was trained for."""
        policy = as_procedure(procedure)
        pairs = pairings(policy, policy if opponent is None else as_procedure(opponent))
        return _win_rate(pairs, self.cdf, self._density.edges)

    def transform_values(self, u: ArrayLike) -> Floats:
        """Phi(u)."""
        return self._transform(np.asarray(u, float))


@dataclass(frozen=True, eq=False)
class Frontier:
    """Win rate against KL: `kls` (nats) increasing, and `win_rates[transform]`, each of the same shape."""

    procedure: Procedure
    opponent: Procedure
    kls: Floats
    win_rates: dict[str, Floats]


def solve(
    procedure: str | Procedure,
    opponent: str | Procedure | None = None,
    transform: str | AnyTransform = "optimal",
    *,
    beta: float | None = None,
    target_kl: float | None = None,
    target_win_rate: float | None = None,
) -> ClosedForm:
    """The closed form for a procedure, an opponent (by default the same procedure) and a transform.

    Exactly one of `target_kl` (nats), `beta` and `target_win_rate` fixes how far the policy may go. Raises UserError
    when it cannot.
    """
    policy = as_procedure(procedure)
    against = policy if opponent is None else as_procedure(opponent)
    phi = as_transform(transform)
    options = {"beta": beta, "target_kl": target_kl, "target_win_rate": target_win_rate}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        raise UserError(
            f"{given or 'nothing'} given; exactly one of target_kl (nats), beta and target_win_rate expected"
        )
    for name, value in given.items():
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} = {value} given, a finite number above 0 expected")
    if target_kl is not None and target_kl < LEAST_KL:
        raise UserError(f"target_kl = {target_kl} given, at least {LEAST_KL:g} nats expected")
    if target_win_rate is not None:
        return _solve(policy, against, phi, None, _kl_at(policy, against, phi, target_win_rate))
    return _solve(policy, against, phi, beta, target_kl)


def optimal_transform(
    procedure: str | Procedure,
    opponent: str | Procedure | None = None,
    *,
    beta: float | None = None,
    target_kl: float | None = None,
    target_win_rate: float | None = None,
) -> ClosedForm:
    """The optimum of (4): `solve` with the transform "optimal"."""
    return solve(procedure, opponent, beta=beta, target_kl=target_kl, target_win_rate=target_win_rate)


def optimal_win_rate(procedure: str | Procedure, opponent: str | Procedure | None, kl: float) -> float:
    """The largest win rate (4) of any policy at this KL (nats); at a KL of 0 or less, that of the reference.

    In the small-KL limit (7) its gain grows with the square root of the KL, which is used below `LEAST_KL`.
    """
    policy = as_procedure(procedure)
    against = policy if opponent is None else as_procedure(opponent)
    if not kl < LEAST_KL:
        return solve(policy, against, target_kl=float(kl)).win_rate
    start = win_rate_of_cdf(lambda u: np.asarray(u, float), policy, against)
    if kl <= 0:
        return start
    return start + (optimal_win_rate(policy, against, LEAST_KL) - start) * float(np.sqrt(kl / LEAST_KL))


def frontier(
    procedure: str | Procedure,
    opponent: str | Procedure | None = None,
    transforms: Sequence[str | AnyTransform] = ("optimal", "identity"),
    kls: ArrayLike | None = None,
) -> Frontier:
    """Win rate against KL for several transforms; by default at 25 KLs from 0.001 to 5 nats."""
    policy = as_procedure(procedure)
    against = policy if opponent is None else as_procedure(opponent)
    grid = np.geomspace(1e-3, 5, 25) if kls is None else np.unique(np.asarray(kls, float))
    if not (grid.size and np.all(np.isfinite(grid)) and grid[0] >= LEAST_KL):
        raise UserError(f"kls = {grid.tolist()} given; finite KLs of at least {LEAST_KL:g} nats expected")
    rates = {str(form): _win_rates(policy, against, form, grid) for form in map(as_transform, transforms)}
    return Frontier(policy, against, grid, rates)


def _win_rates(procedure: Procedure, opponent: Procedure, transform: AnyTransform, kls: Floats) -> Floats:
    """The win rates of a transform at increasing KLs."""
    if isinstance(transform, Optimal):
        solver = _solver(pairings(procedure, opponent))
        return np.array([solver.win_rate(best) for best in along(solver, [float(kl) for kl in kls])])
    return np.array([solve(procedure, opponent, transform, target_kl=float(kl)).win_rate for kl in kls])


def win_rate_of_cdf(
    cdf: Function, procedure: str | Procedure, opponent: str | Procedure | None = None, corners: ArrayLike = ()
) -> float:
    """(4) for any policy, given the CDF of its calibrated reward; `corners` are the u where the CDF is not smooth."""
    policy = as_procedure(procedure)
    pairs = pairings(policy, policy if opponent is None else as_procedure(opponent))
    return _win_rate(pairs, cdf, np.asarray(corners, float))


def _win_rate(pairs: tuple[Pairing, ...], cdf: Function, corners: Floats) -> float:
    """(4), by quadrature on cells that resolve the opponents' densities and break at the corners."""

    def log_opponents(u: Floats) -> Floats:
        logs = [np.log(w) + b.log_density(u) for w, _, b in pairs]
        return np.maximum(np.logaddexp.reduce(logs), _NOTHING)

    edges = cells(log_opponents, np.r_[corners, corners_of(pairs)])
    return float(np.clip(1 - np.sum(weights(edges) * _loss(pairs, cdf, nodes(edges))), 0, 1))


def _kl_at(procedure: Procedure, opponent: Procedure, transform: AnyTransform, target: float) -> float:
    """The KL at which a transform has this win rate."""

    def excess(log_kl: float) -> float:
        return float(
            logit(_solve(procedure, opponent, transform, None, float(np.exp(log_kl))).win_rate) - logit(target)
        )

    asked = f"target_win_rate = {target} given"
    start = optimal_win_rate(procedure, opponent, 0)
    if not start < target < 1:
        raise UserError(f"{asked}; more than the reference's own {start:.6g} and less than 1 expected")
    low = high = np.log(0.1)
    try:
        while excess(low) > 0 and low > np.log(LEAST_KL):
            low = max(low - np.log(10), np.log(LEAST_KL))
        while excess(high) < 0:
            low, high = high, high + np.log(3)
    except UserError:
        raise UserError(f"{asked}, not reached by {transform} at {np.exp(low):.3g} nats; ask for less") from None
    if excess(low) > 0:
        raise UserError(f"{asked}, which takes less than {LEAST_KL:g} nats; ask for more")
    return float(np.exp(brentq(excess, low, high, xtol=1e-12, rtol=1e-14)))


@lru_cache(maxsize=1024)
def _solve(
    procedure: Procedure, opponent: Procedure, transform: AnyTransform, beta: float | None, target_kl: float | None
) -> ClosedForm:
    pairs = pairings(procedure, opponent)
    if isinstance(transform, Optimal):
        solver = _solver(pairs)
        best = at_beta(solver, beta) if beta is not None else along(solver, [float(target_kl or 0)])[0]
        density = _profile_density(best) if isinstance(best, Profile) else _density_of(pairs, best)
        scale = float(np.exp(best.log_beta)) if beta is None else beta
        start = 0.0 if isinstance(best, Profile) else optima.tail_end(best)  # of Phi below, in the tail, f is no record
        top = density.log_f(np.array(start))

        def values(u: ArrayLike) -> Floats:
            above = scale * (density.log_f(np.maximum(u, start)) - top)
            return above + (optima.tail_transform(pairs, np.minimum(u, start)) if start else 0)

        return ClosedForm(
            procedure,
            opponent,
            transform,
            beta=scale,
            kl=best.kl,
            win_rate=solver.win_rate(best),
            log_partition=-float(density.log_f(np.zeros(()))),
            _density=density,
            _transform=values,
        )
    phi = _first_order(pairs) if isinstance(transform, FirstOrder) else transform
    breaks = np.r_[getattr(phi, "corners", np.empty(0)), corners_of(pairs)]
    scale = beta if beta is not None else _beta_at(phi, breaks, str(transform), float(target_kl or 0))
    density, log_partition, kl = _given(phi, breaks, scale)
    return ClosedForm(
        procedure,
        opponent,
        transform,
        beta=scale,
        kl=kl,
        win_rate=_win_rate(pairs, density.cdf, density.edges),
        log_partition=log_partition,
        _density=density,
        _transform=phi,
    )


def _solver(pairs: tuple[Pairing, ...]) -> Any:
    """What solves (5) for these procedures."""
    return Variation(pairs) if has_functional(pairs) else optima.Collocation(pairs)


def _loss(pairs: tuple[Pairing, ...], cdf: Function, u: Floats) -> Floats:
    """The integrand of (4): sum of weight h_a(F(u)) h_b'(u), or what takes the place of h_a(F(u))."""

    def inside(u: ArrayLike) -> Floats:
        return np.clip(cdf(u), 0, 1)

    at = inside(u)
    outputs = (output_of(a, inside, u) if isinstance(a, Functional) else a.cdf(at) for _, a, _ in pairs)
    return np.asarray(sum(w * output * b.density(u) for output, (w, _, b) in zip(outputs, pairs, strict=True)))


def _profile_density(profile: Profile) -> Density:
    """The density of the optimum for functionals."""
    log_mass = logsumexp(profile.log_f + np.log(weights(profile.edges)), axis=1)[::-1]
    edges, cell = np.unique(1 - profile.edges[::-1], return_inverse=True)  # cells that u can tell apart
    log_mass = np.array([logsumexp(log_mass[cell[1:] == i]) for i in range(1, len(edges))])
    return Density(profile, edges, log_mass - logsumexp(log_mass))


def _density_of(pairs: tuple[Pairing, ...], curve: Curve) -> Density:
    """The density of an optimum as a function of u: a cubic spline of log f with the slopes of (5), and its tail."""
    u, cdf, log_f, log_rest = optima.points(curve)
    with np.errstate(divide="ignore"):
        log_slope = log_kernel(pairs, np.log(cdf), log_rest) - curve.log_beta
    slope = np.exp(np.minimum(log_slope, _STEEPEST))
    start = u[0] = optima.tail_end(curve)
    if start == 1:
        raise UserError(
            f"the optimum at {curve.kl:.4g} nats is where u cannot be told from 1; ask for less KL or a larger beta"
        )
    u[-1], cdf[0], cdf[-1] = 1, 0, 1
    u, cdf, log_f = (np.maximum.accumulate(one) for one in (np.minimum(u, 1), cdf, log_f))
    # near u = 1 points may be closer than u can tell well: those are kept that are apart in u or in log f
    steps = np.floor(np.cumsum(np.r_[0, np.diff(u) / _APART + np.diff(log_f) / 0.01]))
    kept = np.append((np.diff(steps) > 0) & (np.diff(u) > 0), True)
    kept[0] = True
    u, cdf, log_f, slope = u[kept], cdf[kept], log_f[kept], slope[kept]
    secant = np.diff(log_f) / np.diff(u)  # the slope is held to what u can resolve, which near 1 may be little
    slope = np.minimum(slope, 3 * np.minimum(np.r_[secant, np.inf], np.r_[np.inf, secant]))
    spline = CubicHermiteSpline(u, log_f, slope)
    log_mass = np.where(
        np.diff(u) > 1e-12, log_integral(spline, u[:-1], u[1:]), np.log(np.maximum(np.diff(cdf), 1e-300))
    )
    log_mass -= logsumexp(log_mass)
    if start == 0:
        return Density(spline, u, log_mass)

    def log_density(u: Floats) -> Floats:
        return np.where(u < start, optima.tail(pairs, curve, np.minimum(u, start)), spline(np.maximum(u, start)))

    below = start * cells(lambda x: np.maximum(optima.tail(pairs, curve, start * x), _DEEPEST), np.empty(0))
    below[-1] = start
    return Density(log_density, np.r_[below[:-1], u], np.r_[log_integral(log_density, below[:-1], below[1:]), log_mass])


def _first_order(pairs: tuple[Pairing, ...]) -> Function:
    """Phi of (7), with Phi(0) = 0."""
    if has_functional(pairs):
        return first_order_of(pairs)

    def log_slope(u: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            return log_kernel(pairs, np.log(u), np.log1p(-u))

    edges = cells(log_slope, np.empty(0))
    edges = np.interp(np.arange(0, len(edges) - 0.875, 0.125), np.arange(len(edges)), edges)
    at_edges, at_nodes = cumulative(edges, np.exp(log_slope(nodes(edges))))
    if not at_edges[-1] > 0:
        raise UserError("first_order: the win rate does not change near the reference for this opponent; use optimal")
    u = np.append(np.c_[edges[:-1], nodes(edges)].ravel(), 1.0)
    phi = np.append(np.c_[at_edges[:-1], at_nodes].ravel(), at_edges[-1])
    distinct = np.append(np.diff(u) > 0, True)
    return CubicHermiteSpline(u[distinct], phi[distinct], np.exp(log_slope(u[distinct])))


def _given(phi: Function, breaks: Floats, beta: float) -> tuple[Density, float, float]:
    """(1) and (2) for a plain transform, not smooth at the breaks: the density, log Z and the KL.

    Exponents are taken from the highest down, for Phi / beta itself may be 1e9, of which 1e-7 is rounded off.
    """
    edges = cells(lambda u: phi(u) / beta, breaks)
    u = nodes(edges)
    peak = float(np.max(phi(u)))
    exponent = (phi(u) - peak) / beta
    log_weight = np.log(weights(edges)) + exponent
    below_peak = float(logsumexp(log_weight))
    kl = float(np.sum(np.exp(log_weight - below_peak) * (exponent - below_peak)))

    def log_f(u: Floats) -> Floats:
        return (phi(u) - peak) / beta - below_peak

    return Density(log_f, edges, logsumexp(log_weight, axis=1) - below_peak), peak / beta + below_peak, kl


def _beta_at(phi: Function, breaks: Floats, name: str, target_kl: float) -> float:
    """The beta of a plain transform at a KL: the KL decreases with beta."""

    def excess(log_beta: float) -> float:
        return float(np.log(max(_given(phi, breaks, np.exp(log_beta))[2], 1e-300) / target_kl))

    u = nodes(cells(lambda u: np.zeros_like(u), np.empty(0)))
    scale = np.max(np.abs(phi(u)))
    middle = np.log(scale) + np.log(np.std(phi(u) / scale))
    low = high = float(middle)
    while excess(high) > 0:
        high += 1.5
    while excess(low) < 0:
        low -= 1.5
        if low < middle - 600 or excess(low) - excess(low + 1.5) < 1e-9:
            raise UserError(f"target_kl = {target_kl} given, more than {name} can reach; ask for less or use optimal")
    return float(np.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-14)))
