"""Gauss-Legendre quadrature on panels: nodes, weights and cumulative integrals within a panel."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ORDER = 8
_x, _w = np.polynomial.legendre.leggauss(ORDER)
NODES: Floats = (_x + 1) / 2  # in [0, 1], shape (ORDER,)
WEIGHTS: Floats = _w / 2
_powers = np.arange(1, ORDER + 1)
# INTEGRALS[i, j]: integral from 0 to NODES[i] of the j-th Lagrange polynomial; exact for polynomials of degree < ORDER.
INTEGRALS: Floats = np.linalg.solve(
    np.vander(NODES, ORDER, increasing=True).T, (NODES[:, None] ** _powers / _powers).T
).T


def nodes(edges: Floats) -> Floats:
    """The Gauss nodes of the panels between `edges` (n + 1,): shape (n, ORDER)."""
    return edges[:-1, None] + np.diff(edges)[:, None] * NODES


def weights(edges: Floats) -> Floats:
    """The weights that go with `nodes`: shape (n, ORDER), summing to the length of the whole."""
    return np.diff(edges)[:, None] * WEIGHTS
