"""A density on [0, 1] known by its logarithm: masses of intervals and CDF, accurate in both tails."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from iapo import quadrature

Floats = NDArray[np.float64]
_NARROW = 1e-9  # an interval narrower than this has the density of its middle


@dataclass(frozen=True, eq=False)
class Density:
    """A density f on [0, 1], by cells on each of which log f is smooth.

    log_f: log f of an array of u.
    edges: (n + 1,) increasing from 0 to 1.
    log_mass: (n,) log of the mass of each cell; the masses sum to 1.
    """

    log_f: Callable[[Floats], Floats]
    edges: Floats
    log_mass: Floats

    def cdf(self, u: ArrayLike) -> Floats:
        """F(u), from the smaller of both tails: 1 where nothing is above u, whatever the rounding of all below it."""
        u = np.asarray(u, float)
        below = self._log_mass_between(np.zeros_like(u), u)
        above = self._log_mass_between(u, np.ones_like(u))
        return np.where(below < above, np.exp(np.minimum(below, 0)), -np.expm1(np.minimum(above, 0)))

    def log_mean(self, low: ArrayLike, high: ArrayLike) -> Floats:
        """The log of the mean of f over [low, high]: arrays in [0, 1], broadcast together, low <= high."""
        low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
        width = high - low
        narrow = width < _NARROW
        safe = np.where(narrow, 1.0, width)
        mass = self._log_mass_between(np.where(narrow, 0.0, low), np.where(narrow, 1.0, high))
        return np.where(narrow, self.log_f((low + high) / 2), mass - np.log(safe))

    def _log_mass_between(self, low: Floats, high: Floats) -> Floats:
        """The log of the mass of [low, high]: whole cells from the smaller tail, the rest by quadrature."""
        last = len(self.edges) - 2
        first_cell = np.clip(np.searchsorted(self.edges, low, side="right") - 1, 0, last)
        last_cell = np.clip(np.searchsorted(self.edges, high, side="left") - 1, first_cell, last)
        same = first_cell == last_cell
        below = np.concatenate([[-np.inf], np.logaddexp.accumulate(self.log_mass)])
        above = np.concatenate([np.logaddexp.accumulate(self.log_mass[::-1])[::-1], [-np.inf]])
        start, stop = first_cell + 1, np.maximum(last_cell, first_cell + 1)
        from_below = below[stop] < above[start]
        larger = np.where(from_below, below[stop], above[start])
        smaller = np.where(from_below, below[start], above[stop])
        with np.errstate(invalid="ignore", divide="ignore"):
            whole = np.where(stop > start, larger + np.log1p(-np.exp(smaller - larger)), -np.inf)
        left = self._log_mass_within(first_cell, low, np.where(same, high, self.edges[start]))
        right = np.where(same, -np.inf, self._log_mass_within(last_cell, self.edges[last_cell], high))
        return np.logaddexp(np.logaddexp(left, whole), right)

    def _log_mass_within(self, cell: NDArray[np.intp], low: Floats, high: Floats) -> Floats:
        """The log of the mass of [low, high], inside one cell."""
        full = (low <= self.edges[cell]) & (high >= self.edges[cell + 1])
        return np.where(full, self.log_mass[cell], log_integral(self.log_f, low, high))


def log_integral(log_f: Callable[[Floats], Floats], low: Floats, high: Floats) -> Floats:
    """log of the integral of exp(log_f) over [low, high] by one Gauss rule; minus infinity where it is empty."""
    u = low[..., None] + (high - low)[..., None] * quadrature.NODES
    with np.errstate(divide="ignore"):
        width = np.log(np.maximum(high - low, 0))
    return width + logsumexp(log_f(u) + np.log(quadrature.WEIGHTS), axis=-1)


def cells(log_f: Callable[[Floats], Floats], breaks: Floats) -> Floats:
    """Edges on [0, 1] fine enough for `log_integral` in each cell, given the breakpoints of log_f.

    Cells shrink geometrically towards both ends, and are halved where log f changes by more than half a nat (or by more
    than a tenth of its depth below the maximum, where there is no mass to resolve).
    """
    half = np.concatenate([[0.0], 0.5 ** np.arange(48, 3, -1.0), np.arange(2, 9) / 16])
    edges = np.unique(np.concatenate([half, 1 - half, breaks]))
    for _ in range(60):
        inner = log_f(quadrature.nodes(edges))
        top = np.max(inner)
        change = inner.max(axis=1) - inner.min(axis=1)
        steep = change > 0.5 + 0.1 * (top - inner.max(axis=1))
        steep &= np.diff(edges) > 1e-15
        if not steep.any():
            break
        edges = np.sort(np.concatenate([edges, (edges[:-1] + edges[1:])[steep] / 2]))
    return edges
