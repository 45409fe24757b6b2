"""Curves of the closed form against solutions of an initial value solver that bracket them."""

from typing import Any

import numpy as np

from iapo.curves import Curve

PLACES = np.linspace(0, 1, 20_001)


def assert_between(curve: Curve, bounds: tuple[Any, Any], down_to: float, atol: float) -> None:
    """log f and log(1 - u) of the curve are those of both solutions where these still agree, in log F to `down_to`.

    bounds: of scipy's solve_ivp, with dense output, by x = log F: of y = log(1 - u) and log f.
    """
    x = np.linspace(-0.01, max(one.t[-1] for one in bounds), 200)
    both = np.stack([one.sol(x) for one in bounds])
    agree = np.all(np.abs(both[0] - both[1]) < 1e-7, axis=0)
    assert x[agree].min() < down_to
    place = np.interp(x[agree], curve.at(PLACES)[:, 0], PLACES)
    for _ in range(3):  # to the place of this log F, by the polynomials
        step = 1e-7
        rate = (curve.at(place + step)[:, 0] - curve.at(place - step)[:, 0]) / (2 * step)
        place = place - (curve.at(place)[:, 0] - x[agree]) / rate
    values = curve.at(place)
    np.testing.assert_allclose(values[:, 1], both[0, 1, agree], atol=atol)
    np.testing.assert_allclose(curve.log_rest(place, values), both[0, 0, agree], atol=atol)
