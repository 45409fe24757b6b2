"""Extreme pairs of different procedures: against another solver, simpler policies, and along the path."""

import re
import warnings

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp
from scipy.stats import beta as beta_law
from shooting import assert_between

from iapo import paths
from iapo.closed_form import optimal_transform, optimal_win_rate, solve, win_rate_of_cdf
from iapo.curves import residual
from iapo.errors import UserError
from iapo.optimum import Collocation
from iapo.paths import along
from iapo.procedures import pairings, parse_procedure

HARD = [
    ("sample", "kth(512, 1024)", 2.0),
    ("worst_of(8)", "kth(512, 1024)", 10.0),
    ("worst_of(8)", "kth(1000, 1024)", 10.0),
    ("worst_of(1024)", "best_of(1024)", 2.0),
    ("worst_of(1024)", "kth(512, 1024)", 2.0),
    ("worst_of(1024)", "kth(1000, 1024)", 0.5),
    ("kth(512, 1024)", "worst_of(8)", 0.5),
    ("kth(1000, 1024)", "kth(512, 1024)", 2.0),
    ("best_of_poisson(100)", "kth(512, 1024)", 10.0),
    ("best_of_poisson(100)", "kth(1000, 1024)", 10.0),
    ("best_of_poisson(100)", "kth(16, 32)", 10.0),
    ("best_of(8)", "kth(512, 1024)", 10.0),
]


@pytest.mark.parametrize(("procedure", "opponent", "kl"), HARD)
def test_extreme_pairs_are_solved(procedure, opponent, kl):
    pairs = pairings(parse_procedure(procedure), parse_procedure(opponent))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = along(Collocation(pairs), [kl])[0]
        form = solve(procedure, opponent, target_kl=kl)
        log_f = form.log_density(np.linspace(0, 1, 101))
        edges = np.arange(33) / 32
        mean = np.exp(form.log_mean_density(edges[:-1], edges[1:])).mean()
    assert residual(pairs, curve) < 1e-9 and curve.kl == pytest.approx(kl, rel=1e-10)
    assert np.all(np.isfinite(log_f)) and mean == pytest.approx(1, abs=1e-8) and 0 <= form.win_rate <= 1
    start = -np.expm1(-kl)  # the policy of this KL that never answers below, and is the reference above
    truncated = win_rate_of_cdf(lambda u: np.maximum(0, (u - start) / (1 - start)), procedure, opponent, [start])
    assert form.win_rate >= max(truncated, solve(procedure, opponent, "identity", target_kl=kl).win_rate) - 1e-10


@pytest.mark.parametrize(
    ("procedure", "opponent", "kl", "down_to"),
    [
        ("sample", "kth(512, 1024)", 0.755, -9),
        ("worst_of(8)", "kth(512, 1024)", 2.0, -9),
        ("worst_of(8)", "kth(1000, 1024)", 10.0, -9),
        ("worst_of(1024)", "best_of(1024)", 2.0, -20),
        ("worst_of(1024)", "kth(512, 1024)", 0.5, -20),
        ("kth(512, 1024)", "worst_of(8)", 0.5, -15),
        ("kth(1000, 1024)", "kth(512, 1024)", 2.0, -0.5),
        ("best_of_poisson(100)", "kth(16, 32)", 2.0, -0.6),
    ],
)
def test_against_shooting_from_the_top(procedure, opponent, kl, down_to):
    """(6) by an integrator of initial values in log F, from F = 1 down, at the log beta found.

    There is one f(1) for which F and u come to 0 together: on one side of it F, on the other u does so first. It is
    bracketed by bisection; where both ends of the bracket still agree, they are the solution.
    """
    a, b = parse_procedure(procedure), parse_procedure(opponent)
    curve = along(Collocation(pairings(a, b)), [kl])[0]

    def slopes(x, state):
        """By x = log F: of y = log(1 - u) and L."""
        y, log_f = state
        log_1_f, log_u = np.log(-np.expm1(min(x, -1e-300))), np.log(-np.expm1(min(y, -1e-300)))
        log_k = float(a.log_density_of_logs(np.float64(x), log_1_f) + b.log_density_of_logs(log_u, np.float64(y)))
        return [-np.exp(min(x - log_f - y, 300)), np.exp(min(log_k - curve.log_beta + x - log_f, 300))]

    def near_zero(x, state):
        return state[0] + 1e-8

    near_zero.terminal = True

    def shoot(top):
        first = 1e-6  # of 1 - F, where f is f(1) to first order
        x, y = np.log1p(-first), np.log(first) - top
        with np.errstate(all="ignore"):
            return solve_ivp(
                slopes, (x, -60), [y, top], "DOP853", rtol=1e-11, atol=1e-12, dense_output=True, events=near_zero
            )

    def cdf_is_first(found):
        return found.status == 0 or (found.status == 1 and found.t[-1] - found.y[1, -1] < np.log(1e-8))

    top = curve.state[-1, 1]
    low, high = top - 1e-3, top + 1e-3
    side = cdf_is_first(shoot(low))
    assert cdf_is_first(shoot(high)) != side
    for _ in range(28):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf_is_first(shoot(middle)) == side else (low, middle)
    assert (low + high) / 2 == pytest.approx(top, abs=1e-8)
    assert_between(curve, (shoot(low), shoot(high)), down_to, 1e-6)


def test_a_flat_falls_past_the_beginning_of_the_curve():
    """sample against kth(512, 1024): below u = 0.4 log f is flat, and falls by thousands of nats for each nat of KL.

    By (5) log f(0) = log f - Phi / beta, with Phi there a constant, and log beta nearly linear in the KL.
    """
    kls = 0.745 + 0.0025 * np.arange(12)
    forms = [optimal_transform("sample", "kth(512, 1024)", target_kl=float(kl)) for kl in kls]
    flat = np.array([form.log_density([0.0, 0.2, 0.4]) for form in forms])
    assert flat[0, 0] > -35 and flat[-1, 0] < -200  # it passes -70 and -140
    np.testing.assert_allclose(flat, flat[:, :1] * np.ones(3), rtol=1e-6)
    beta = np.array([form.beta for form in forms])
    above = np.array([form.log_density(0.9) for form in forms])
    np.testing.assert_allclose((above - flat[:, 1]) * beta, 1, rtol=2e-6)  # h_a' = 1, and all of h_b lies between


def test_a_refusal_tells_the_win_rate_that_was_reached(monkeypatch):
    monkeypatch.setattr(paths, "_MOST_STEPS", 12)
    with pytest.raises(UserError) as caught:
        solve("worst_of(1024)", "kth(512, 1024)", target_kl=0.51)
    found = re.search(r"beyond (\S+) nats, where the win rate is ([^;,]+)", str(caught.value))
    assert found is not None
    monkeypatch.undo()
    reached, win_rate = map(float, found.groups())
    assert win_rate == pytest.approx(optimal_win_rate("worst_of(1024)", "kth(512, 1024)", reached), rel=0.1, abs=1e-12)


def test_win_rates_against_a_narrow_opponent():
    """The identity at beta: F = (e^(u / beta) - 1) / (e^(1 / beta) - 1), and u of kth(512, 1024) has a Beta law."""
    form = solve("sample", "kth(512, 1024)", "identity", beta=0.2)
    law = beta_law(512, 513)
    expected = quad(lambda u: law.pdf(u) * np.expm1(u / 0.2) / np.expm1(5), 0.3, 0.7, epsabs=1e-14, limit=200)[0]
    assert form.win_rate == pytest.approx(1 - expected, abs=1e-12)
    assert form.win_rate_under("sample", "kth(512, 1024)") == pytest.approx(1 - expected, abs=1e-12)
