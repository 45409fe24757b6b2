"""Panels for the curves of `iapo.curves`, and where a curve goes as the KL grows.

Where the path goes next is foretold by the tangent of the curve, which Newton gives, moved along the curve so that its
bends stay at their places in the mesh: as the KL grows they wander, and the straight stretches between them grow.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded

from iapo.curves import LOWEST_LOG_CDF, Curve, defect, interpolate, kernel_slopes, log_kernel, shares
from iapo.procedures import Pairing
from iapo.quadrature import ORDER, nodes

Floats = NDArray[np.float64]

ROUGHLY = 3e-5  # of `defect`, on the way
_LONGEST = 6.0  # panel, in s
_FINER = 8  # places a panel where `_motion` looks
_STIFFNESS = 0.002  # of the movement along the curve, against what its bends ask for
_DEEPER = -140.0  # log F where curves begin instead while a flat log f falls past `LOWEST_LOG_CDF`
_NEAR, _RISEN = 25.0, 20.0  # above `LOWEST_LOG_CDF`, where that begins; of log f there above the flat, where it ends
_COUNTS = 1e-9  # the least weight of a place in log beta; where k is nothing log k may be anything
_GROWTH = 1.0  # of the width of panels with the distance from a narrower one
_HIGHEST_POWER = 100.0  # of the KL, that the pace may be
_FLAT = np.log(0.1)  # of the log of k / beta u, the change of log f up to u


def remesh(pairs: tuple[Pairing, ...], curve: Curve, tolerance: float, fewest: float = 0.5) -> Curve:
    """The same functions on panels that have equal defects, by the order of the collocation, of about a tolerance.

    A panel gives way to at least `fewest`: 1 where defects may be no more than rounding, which tells nothing. Panels
    grow gradually, for what has come by in a narrow one may be in the next when they are laid out anew.
    """
    needed = np.clip((defect(pairs, curve) / tolerance) ** (1 / ORDER), fewest, 4)
    low, high = curve.edges[:-1], curve.edges[1:]
    wide = np.minimum((high - low) / needed, _LONGEST / curve.length)
    place = low[:, None] + (high - low)[:, None] * (np.arange(_FINER + 1) / _FINER)
    after = np.r_[np.inf, np.minimum.accumulate(wide - _GROWTH * high)[:-1]][:, None] + _GROWTH * place
    before = np.r_[np.minimum.accumulate((wide + _GROWTH * low)[::-1])[-2::-1], np.inf][:, None] - _GROWTH * place
    density = 1 / np.minimum(np.minimum(after, before), wide[:, None])
    steps = np.diff(place, axis=1) * (density[:, 1:] + density[:, :-1]) / 2
    position, place = np.r_[0, np.cumsum(steps)], np.append(place[:, :-1], 1)
    edges = np.interp(np.linspace(0, position[-1], int(np.ceil(position[-1])) + 1), position, place)
    edges[0], edges[-1] = 0, 1

    def on(state: Floats, stages: Floats) -> tuple[Floats, Floats]:
        at_edges = interpolate(curve.edges, state, stages, edges)
        at_edges[-1] = state[-1]
        return at_edges, interpolate(curve.edges, state, stages, nodes(edges))

    state, stages = on(curve.state, curve.stages)
    tangent = curve.tangent
    if tangent is not None:
        state_ahead, stages_ahead = on(tangent.state, tangent.stages)
        tangent = replace(tangent, state=state_ahead, stages=stages_ahead)
    return replace(curve, edges=edges, state=state, stages=stages, tangent=tangent)


def begun(pairs: tuple[Pairing, ...], curve: Curve) -> Curve | None:
    """The curve from where it should begin as the KL grows; None if that is where it does.

    Where f is flat below its rise, F = f u, and this log f falls as the KL grows, by thousands for a nat. As it passes
    the log F where curves begin, they would begin no longer at u next to 0 but in the rise, from one step to the next.
    So they begin much lower before it comes there, and once it is far below, in the rise, without the flat.
    """
    log_cdf, log_f = curve.state[0]
    if log_cdf < LOWEST_LOG_CDF - 1:
        at = _place_of(curve, LOWEST_LOG_CDF)
        return _cut(curve, at) if curve.at(at)[1] > log_f + _RISEN else None
    log_rest = curve.log_rest(np.zeros(()), curve.state[0])
    log_slope = log_kernel(pairs, log_cdf, log_rest) - curve.log_beta
    if log_f < LOWEST_LOG_CDF + _NEAR and log_slope + log_cdf - log_f < _FLAT:
        return _extended(curve)
    return None


def _place_of(curve: Curve, log_cdf: float) -> Floats:
    """The place of this log F."""
    place = np.append(curve.edges[:-1, None] + np.diff(curve.edges)[:, None] * (np.arange(_FINER) / _FINER), 1)
    values = np.maximum.accumulate(curve.at(place)[:, 0])
    return np.asarray(np.interp(log_cdf, values, place))


def _cut(curve: Curve, at: Floats) -> Curve:
    """The curve from a place on."""
    edges = np.append(at, curve.edges[curve.edges > at + 1e-6])
    rest = 1 - float(at)
    return Curve(
        (edges - at) / rest,
        np.concatenate([curve.at(edges[:-1]), curve.state[-1:]]),
        curve.at(nodes(edges)),
        curve.first + curve.length * float(at),
        curve.length * rest,
        curve.log_beta,
        curve.kl,
    )


def _extended(curve: Curve) -> Curve:
    """The curve from `_DEEPER` in log F on, with F = f u there."""
    length = LOWEST_LOG_CDF - _DEEPER
    more = np.linspace(0, length, int(np.ceil(length / _LONGEST)) + 1)

    def flat(at: Floats) -> Floats:
        return np.stack([curve.state[0, 0] - length + at, np.full(at.shape, curve.state[0, 1])], axis=-1)

    edges = np.append(more[:-1], length + curve.edges * curve.length)
    total = length + curve.length
    return Curve(
        edges / total,
        np.concatenate([flat(more[:-1]), curve.state]),
        np.concatenate([flat(nodes(more)), curve.stages]),
        curve.first - length,
        total,
        curve.log_beta,
        curve.kl,
    )


@dataclass(frozen=True, eq=False)
class _Motion:
    """How a curve moves as the KL grows, by place, (m,): of (log F, L, s), (m, 3), and of log k; and what counts there.

    weight: of places, by how log k changes what the curve does there; it sums to 1.
    """

    place: Floats
    values: Floats
    pace: float
    log_k: Floats
    of_log_k: Floats
    weight: Floats


@lru_cache(maxsize=4)  # a step that fails is tried again, and the next one asks for the pace of the last curve
def _motion(pairs: tuple[Pairing, ...], rough: Curve) -> tuple[Curve, _Motion]:
    """A curve on the panels it needs on the way, and its tangent, moved along it.

    So moved that the shares of its three logarithms change little at equal places: least squares, with a price on the
    slope of the movement, which is none at both ends.
    """
    curve = remesh(pairs, rough, ROUGHLY)
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
    motion = np.stack([*movement[1:], of_s + moved], axis=-1)
    of_log_k = by_cdf * movement[1] + by_rest * movement[0]
    weight = mass * f * (1 - f)
    return curve, _Motion(place, motion, pace, log_k, of_log_k, weight / (np.sum(weight) or 1))


def ahead(pairs: tuple[Pairing, ...], curve: Curve, before: Curve | None, kl: float) -> Curve | None:
    """A guess at a larger KL; None if it is no curve.

    The pace is a power of the KL, by the last two curves. log beta follows what log k comes to, which where k is a high
    power is far from its tangent.
    """
    curve, motion = _motion(pairs, curve)
    assert curve.tangent is not None
    power = -0.5
    if before is not None and before.tangent is not None and before.kl < curve.kl:
        faster = motion.pace / _motion(pairs, before)[1].pace
        power = float(np.clip(np.log(faster) / np.log(curve.kl / before.kl), -1.5, _HIGHEST_POWER))
    log_ratio = np.log(kl / curve.kl)
    more = curve.kl * (log_ratio if abs(power + 1) < 1e-3 else np.expm1((power + 1) * log_ratio) / (power + 1))
    values = curve.at(motion.place) + more * motion.values[:, :2]
    s = np.maximum.accumulate(curve.first + curve.length * motion.place + more * motion.values[:, 2])
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
        moved = [np.interp(source, motion.place, one) for one in motion.values[:, :2].T]
        return curve.at(source) + more * np.stack(moved, axis=-1)

    counts = motion.weight > _COUNTS
    log_k = log_kernel(pairs, values[counts, 0], np.sum(values[counts], axis=-1) - s[counts])
    bent = motion.weight[counts] @ (log_k - motion.log_k[counts] - more * motion.of_log_k[counts])
    log_beta = float(curve.log_beta + more * curve.tangent.log_beta + bent)
    return Curve(edges, at(edges), at(nodes(edges)), float(s[0]), float(length), log_beta)
