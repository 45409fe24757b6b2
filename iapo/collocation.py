"""Newton for the curves of `iapo.curves`, by Gauss collocation on panels.

Unknown are (log F, L) at edges and nodes, where s begins, its length, and log beta; given is the KL or log beta. In
every panel the stages are linear in what is unknown at its left edge; eliminating them leaves a banded system for the
edges, to which the three numbers and the KL up to an edge belong as well.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dgbsv

from iapo.curves import (
    LOWEST_LOG_REST,
    Curve,
    Tangent,
    kernel_slopes,
    kl_of,
    shares,
)
from iapo.procedures import Pairing
from iapo.quadrature import INTEGRALS, ORDER, nodes, weights

Floats = NDArray[np.float64]

_MOST_ITERATIONS = 12
_HOPELESS = 2.0  # size of a first step from which Newton does not come back; of the fourth, half of it
_AT_AN_EDGE = 6  # unknown: log F, L, first, length, log beta, KL so far
_BAND = 8  # of the system of edges, on either side of its diagonal
_ROWS, _COLUMNS = np.indices((_AT_AN_EDGE, _AT_AN_EDGE))


def newton(
    pairs: tuple[Pairing, ...],
    curve: Curve,
    kl: float | None = None,
    log_beta: float | None = None,
    tolerance: float = 1e-9,
) -> tuple[Curve, int] | None:
    """The solution at a KL, with its tangent, or at a log beta, and the iterations it took; None if there is none."""
    edges, state, stages = curve.edges, curve.state, curve.stages
    first, length, current = curve.first, curve.length, curve.log_beta
    so_far = np.zeros(len(edges))
    previous = np.inf
    for iteration in range(1, _MOST_ITERATIONS + 1):
        curve = Curve(edges, state, stages, first, length, current)
        rates, by_all = _rates(pairs, curve)
        try:
            local = _stages(curve, rates, by_all)
            transfer, constant = _across(curve, rates, by_all, local, so_far)
            target = (4, log_beta - current) if log_beta is not None else (5, (kl or 0.0) - so_far[-1])
            at_edges, ahead = _solve_edges(transfer, constant, _left(pairs, curve), _right(curve), so_far[0], target)
        except np.linalg.LinAlgError:
            return None
        at_stages = _of_edges(local, at_edges) + local[..., 5]
        step = at_edges[0, 2:5]
        size = max(
            np.max(np.abs(at_stages) / (1 + 0.2 * np.abs(stages))),
            abs(step[2]) / (2 + 0.05 * abs(current)),
            2 * abs(step[1]) / length,
        )
        if not np.isfinite(size) or (iteration == 1 and size > _HOPELESS) or (iteration > 3 and size > _HOPELESS / 2):
            return None
        damping = min(1, 1 / size)
        state, stages = state + damping * at_edges[:, :2], stages + damping * at_stages
        first, length, current = (float(x + damping * dx) for x, dx in zip((first, length, current), step, strict=True))
        so_far = so_far + damping * at_edges[:, 5]
        if size < tolerance or previous < size < 1e-6:  # or as close as rounding lets it come
            found = Curve(edges, state, stages, first, length, current)
            by_kl = Tangent(ahead[:, :2], _of_edges(local, ahead), *map(float, ahead[0, 2:5]))
            tangent = by_kl if log_beta is None else None
            return replace(found, kl=kl_of(pairs, found), tangent=tangent), iteration
        previous = size
    return None


def _rates(pairs: tuple[Pairing, ...], curve: Curve) -> tuple[Floats, Floats]:
    """d(log F, L, KL) / d place at the nodes, (n, ORDER, 3), and by log F, L, first, length, log beta, (..., 3, 5)."""
    place = nodes(curve.edges)
    log_cdf, log_f = np.moveaxis(curve.stages, -1, 0)
    log_rest = curve.log_rest(place, curve.stages)
    log_k, by_cdf, by_rest = kernel_slopes(pairs, log_cdf, log_rest)
    share, total = shares(log_cdf, log_f, log_rest, log_k - curve.log_beta)
    one, zero = np.ones_like(place), np.zeros_like(place)
    # the three logarithms by log F, L, s and log beta
    logs = np.stack(
        [
            np.stack([-one, -one, one, zero]),
            np.stack([-one, one, zero, zero]),
            np.stack([by_cdf + by_rest, by_rest, -by_rest, -one]),
        ]
    )
    relative = logs - np.sum(share[:, None] * logs, axis=0)
    changes = share[:, None] * relative
    mass = np.exp(log_f - total)  # dF / ds
    kl_changes = log_f * mass * relative[1]
    kl_changes[0] += log_f * mass
    kl_changes[1] += mass
    rates = np.stack([share[1], share[2], log_f * mass], axis=-1)
    by_s = np.moveaxis(np.stack([changes[1], changes[2], kl_changes]), (0, 1), (-2, -1))
    by_all = curve.length * by_s[..., [0, 1, 2, 2, 3]]
    by_all[..., 3] = by_all[..., 3] * place[..., None] + rates
    return curve.length * rates, by_all


def _stages(curve: Curve, rates: Floats, by_all: Floats) -> Floats:
    """The change of the stages, (n, ORDER, 2, 6): by log F, L, first, length, log beta at the left edge, by itself."""
    panels = len(curve.edges) - 1
    inner = np.diff(curve.edges)[:, None, None] * INTEGRALS
    by_state = np.swapaxes(by_all[..., :2, :2], 1, 2)[:, None]  # (n, 1, 2, ORDER, 2)
    system = np.eye(2 * ORDER) - (inner[:, :, None, :, None] * by_state).reshape(panels, 2 * ORDER, -1)
    right = np.zeros((panels, ORDER, 2, 6))
    right[..., 0, 0] = right[..., 1, 1] = 1
    right[..., 2:5] = (inner @ by_all[..., :2, 2:].reshape(panels, ORDER, 6)).reshape(panels, ORDER, 2, 3)
    right[..., 5] = curve.state[:-1, None] + inner @ rates[..., :2] - curve.stages
    return np.asarray(np.linalg.solve(system, right.reshape(panels, 2 * ORDER, 6)).reshape(right.shape), float)


def _across(curve: Curve, rates: Floats, by_all: Floats, local: Floats, so_far: Floats) -> tuple[Floats, Floats]:
    """What crosses a panel: next edge = transfer @ this edge + constant, of the six unknown."""
    weight = weights(curve.edges)
    panels = len(weight)
    weighted = weight[..., None, None] * by_all
    through = np.swapaxes(weighted[..., :2], 1, 2).reshape(panels, 3, -1) @ local.reshape(panels, 2 * ORDER, 6)
    through[..., 2:5] += np.sum(weighted[..., 2:], axis=1)
    moving = [0, 1, 5]
    transfer = np.tile(np.eye(_AT_AN_EDGE), (panels, 1, 1))
    transfer[:, moving, :5] += through[..., :5]
    constant = np.zeros((panels, _AT_AN_EDGE))
    constant[:, moving] = through[..., 5] + np.sum(weight[..., None] * rates, axis=1)
    constant[:, moving] -= np.diff(np.c_[curve.state, so_far], axis=0)
    return transfer, constant


def _of_edges(local: Floats, at_edges: Floats) -> Floats:
    """The change of the stages that goes with one of the edges."""
    return (local[..., :5] @ at_edges[:-1, None, :5, None])[..., 0]


Row = tuple[dict[int, float], float]
"""A condition at one edge: coefficients of the unknown, and what their sum shall be."""


def _left(pairs: tuple[Pairing, ...], curve: Curve) -> list[Row]:
    """log F is as it is, and f / F = k / beta + 1 / u, u from (6) where F is a power of u, or f itself falls with F."""
    log_cdf, log_f = curve.state[0]
    log_rest = curve.log_rest(np.zeros(()), curve.state[0])
    log_k, by_cdf, by_rest = (float(one) for one in kernel_slopes(pairs, log_cdf, log_rest))
    rest = float(np.exp(np.minimum(log_rest, 0)))
    u = max(float(-np.expm1(log_rest)), 1e-300)
    log_slope = log_k - curve.log_beta
    total = np.logaddexp(log_slope, -np.log(u))
    share = float(np.exp(log_slope - total))
    begins = ({0: 1.0}, 0.0)
    if share > 0.5:  # in logarithms: L - log F = log(k / beta + 1 / u)
        by_y = share * by_rest + (1 - share) * rest / u
        row = {0: -1 - share * by_cdf - by_y, 1: 1 - by_y, 2: by_y, 4: share}
        return [begins, (row, float(total - log_f + log_cdf))]
    ratio, slope = (float(np.exp(min(one, 700.0))) for one in (log_cdf - log_f, log_slope + log_cdf - log_f))
    by_y = -(1 - slope) * rest - u * slope * by_rest
    row = {0: by_y - ratio - u * slope * (by_cdf + 1), 1: by_y + ratio + u * slope, 2: -by_y, 4: u * slope}
    return [begins, (row, ratio + float(np.expm1(log_rest)) * (1 - slope))]


def _right(curve: Curve) -> list[Row]:
    """log F = 0, and L + log(1 - u) = -45."""
    log_cdf, log_f = curve.state[-1]
    log_mass = log_f + float(curve.log_rest(np.ones(()), curve.state[-1]))
    return [({0: 1.0}, -log_cdf), ({0: 1.0, 1: 2.0, 2: -1.0, 3: -1.0}, LOWEST_LOG_REST - log_mass)]


def _solve_edges(
    transfer: Floats, constant: Floats, left: list[Row], right: list[Row], first_kl: float, target: tuple[int, float]
) -> tuple[Floats, Floats]:
    """The banded system of the edges: their change, and its derivative by the target (KL or log beta), (n + 1, 6) each.

    A banded LU with pivoting is stable where multiplying the transfer matrices (shooting) is not.
    """
    panels = len(transfer)
    by_edge = np.zeros((panels + 1, _AT_AN_EDGE, 3 * _BAND + 1))  # [column, 2 _BAND + row - column], as in LAPACK
    by_edge[:-1, _COLUMNS, 2 * _BAND + 3 + _ROWS - _COLUMNS] = -transfer
    by_edge[1:, :, 2 * _BAND - 3] = 1
    at_left = [*left, ({5: 1.0}, -first_kl)]
    at_right = [*right, ({target[0]: 1.0}, target[1])]
    for edge, first, conditions in ((0, 0, at_left), (-1, 3, at_right)):
        for row, (coefficients, _) in enumerate(conditions, first):
            for column, coefficient in coefficients.items():
                by_edge[edge, column, 2 * _BAND + row - column] = coefficient
    rights = np.zeros((2, _AT_AN_EDGE * (panels + 1)))
    rights[0] = np.r_[[value for _, value in at_left], constant.ravel(), [value for _, value in at_right]]
    rights[1, -1] = 1
    banded = by_edge.reshape(-1, 3 * _BAND + 1).T
    _, _, solution, failed = dgbsv(_BAND, _BAND, banded, rights.T, overwrite_ab=True, overwrite_b=True)
    if failed:
        raise np.linalg.LinAlgError
    change, ahead = solution.T.reshape(2, panels + 1, _AT_AN_EDGE)
    return change, ahead
