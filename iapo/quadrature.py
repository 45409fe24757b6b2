"""Gauss-Legendre quadrature on panels: nodes, weights and cumulative integrals within a panel."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ORDER = 8
_x, _w = np.polynomial.legendre.leggauss(ORDER)
NODES: Floats = np.asarray((_x + 1) / 2, float)  # in [0, 1], shape (ORDER,)
WEIGHTS: Floats = np.asarray(_w / 2, float)


def partial_integrals(x: Floats) -> Floats:
    """Integral from 0 to x of each Lagrange polynomial of the nodes, (..., ORDER); exact for degrees < ORDER."""
    powers = np.arange(1.0, ORDER + 1)
    moments = np.asarray(x, float)[..., None] ** powers / powers
    return moments @ np.linalg.inv(np.vander(NODES, ORDER, increasing=True))


INTEGRALS: Floats = partial_integrals(NODES)


def nodes(edges: Floats) -> Floats:
    """The Gauss nodes of the panels between `edges` (n + 1,): shape (n, ORDER)."""
    return edges[:-1, None] + np.diff(edges)[:, None] * NODES


def weights(edges: Floats) -> Floats:
    """The weights that go with `nodes`: shape (n, ORDER), summing to the length of the whole."""
    return np.diff(edges)[:, None] * WEIGHTS


def cumulative(edges: Floats, values: Floats) -> tuple[Floats, Floats]:
    """The integral from the first edge of values at the nodes: at the edges (n + 1,) and at the nodes (n, ORDER)."""
    at_edges = np.concatenate([[0.0], np.cumsum(np.sum(weights(edges) * values, axis=1))])
    return at_edges, at_edges[:-1, None] + np.diff(edges)[:, None] * (values @ INTEGRALS.T)
