"""The closed form by other routes: golden values, exact formulas, brute-force optimization, and its own equations."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq, minimize
from scipy.special import betaln
from shooting import assert_between

from iapo.closed_form import frontier, optimal_transform, optimal_win_rate, solve, win_rate_of_cdf
from iapo.curves import residual
from iapo.errors import UserError
from iapo.optimum import Collocation
from iapo.paths import along
from iapo.procedures import best_of, kth, pairings, parse_procedure
from iapo.quadrature import nodes, weights
from iapo.transforms import table

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "closed_form.json"
U = np.linspace(0, 1, 201)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden file is not part of the repository")
def test_golden_values():
    for case in json.loads(GOLDEN.read_text())["cases"]:
        procedure, _, opponent = case["procedure"].partition(" against ")
        form = solve(procedure, opponent or None, beta=case["beta"])
        found = [form.win_rate, form.kl, *(form.log_density(float(u)) for u in case["log_density"])]
        expected = [case["win_rate"], case["kl"], *case["log_density"].values()]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=str(case))
        plain = solve(procedure, opponent or None, "identity", target_kl=case["kl"])
        assert plain.win_rate == pytest.approx(case["identity_win_rate_at_same_kl"], abs=1e-4)


@pytest.mark.parametrize("beta", [2.0, 0.3, 0.02])
@pytest.mark.parametrize("procedure", ["best_of(4)", "worst_of(3)", "kth(2, 4)", "sample"])
def test_against_one_sample_the_optimum_is_a_quadrature(procedure, beta):
    """With h_b' = 1, (6) integrates to F' = c + h_a(F) / beta, whose c makes the integral of dF / F' equal to 1."""
    h = parse_procedure(procedure).cdf

    def passage(log_c):
        steps = (
            quad(lambda x: np.exp(x) / (np.exp(log_c) + h(np.exp(x)) / beta), k - 10, k)[0] for k in range(-190, 1, 10)
        )
        return sum(steps) - 1

    c = np.exp(brentq(passage, -160, 0, xtol=1e-13))
    form = solve(procedure, "sample", beta=beta)
    assert form.log_density(0) == pytest.approx(np.log(c), abs=1e-7)
    assert form.log_density(1) == pytest.approx(np.log(c + 1 / beta), abs=1e-8)
    p = form.cdf(U)
    np.testing.assert_allclose(form.density(U), c + h(p) / beta, rtol=1e-7)


def test_identity_against_the_truncated_exponential():
    """f = e^(u/beta) / (beta (e^(1/beta) - 1)), and its mean in closed form."""
    form = solve("sample", transform="identity", beta=0.2)
    z = 0.2 * np.expm1(5)
    np.testing.assert_allclose(form.density(U), np.exp(U / 0.2) / z, rtol=1e-12)
    mean = 1 - 0.2 + 1 / np.expm1(5)
    assert form.kl == pytest.approx(mean / 0.2 - np.log(z), abs=1e-12)
    assert form.win_rate == pytest.approx(mean, abs=1e-12)
    assert form.log_partition == pytest.approx(np.log(z), abs=1e-12)


@pytest.mark.parametrize("beta", [3.0, 0.5, 0.01])
def test_log_against_the_power_law(beta):
    """f = (1 + g) u^g with g = 1/beta: against best_of(n), W = 1 - n / (n (1 + g) + n) = (1 + g) / (2 + g)."""
    form = solve("best_of(6)", transform="log", beta=beta)
    g = 1 / beta
    assert form.kl == pytest.approx(np.log(1 + g) - g / (1 + g), abs=1e-11)
    assert form.win_rate == pytest.approx((1 + g) / (2 + g), abs=1e-12)
    np.testing.assert_allclose(form.cdf(U), U ** (1 + g), atol=1e-12)


def test_optimum_for_one_sample_is_the_identity():
    best, plain = solve("sample", target_kl=1.0), solve("sample", transform="identity", target_kl=1.0)
    assert best.win_rate == pytest.approx(plain.win_rate, abs=1e-11)
    assert best.beta == pytest.approx(plain.beta, rel=1e-9)
    np.testing.assert_allclose(best.log_density(U), plain.log_density(U), atol=1e-8)


@pytest.mark.parametrize("procedure", ["best_of(4)", "worst_of(4)", "0.5 worst_of(3) + 0.5 best_of(6)"])
def test_against_brute_force_optimization_of_a_discretized_density(procedure):
    """Maximize W - beta KL over densities constant on 200 cells, from a random start, without (5)."""
    beta, cells = 0.4, 200
    pairs = pairings(parse_procedure(procedure))
    edges = np.linspace(0, 1, cells + 1)
    middles = (edges[1:] + edges[:-1]) / 2

    def loss(logits):
        mass = np.exp(logits - logits.max())
        mass /= mass.sum()
        cdf = np.concatenate([[0], np.cumsum(mass)])
        log_f = np.log(mass * cells)
        # W by the middle of each cell; its derivative by the CDF, then by the mass
        inner = (cdf[1:] + cdf[:-1]) / 2
        lost = sum(w * a.cdf(inner) * b.density(middles) for w, a, b in pairs).sum() / cells
        by_cdf = sum(w * a.density(inner) * b.density(middles) for w, a, b in pairs) / cells
        after = np.concatenate([np.cumsum(by_cdf[::-1])[::-1][1:], [0]])
        gradient = after + by_cdf / 2 + beta * (log_f + 1)
        return lost + beta * np.sum(mass * log_f), mass * (gradient - np.sum(mass * gradient))

    start = np.random.default_rng(0).normal(size=cells)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 20000, "ftol": 1e-15, "gtol": 1e-10})
    form = solve(procedure, beta=beta)
    assert 1 - found.fun == pytest.approx(form.win_rate - beta * form.kl, abs=5e-5)


@pytest.mark.parametrize(
    ("procedure", "opponent", "target_kl"),
    [
        ("best_of(4)", None, 0.5),
        ("best_of(64)", None, 2.0),
        ("worst_of(4)", None, 1.5),
        ("worst_of(32)", None, 0.08),
        ("kth(3, 5)", "best_of(3)", 3.0),
        ("best_of_poisson(3)", None, 1e-3),
        ("0.5 worst_of(8) + 0.5 best_of(8)", None, 0.5),
    ],
)
def test_the_optimum_satisfies_its_equations(procedure, opponent, target_kl):
    form = solve(procedure, opponent, target_kl=target_kl)
    pairs = pairings(form.procedure, form.opponent)

    def slope(u):
        """(5): beta d log f / du."""
        return sum(w * a.density(form.cdf(u)) * b.density(u) for w, a, b in pairs)

    for low, high in [(0, 0.3), (0.3, 0.9), (0.9, 0.99), (0.99, 1)]:
        integral = quad(slope, low, high, epsabs=1e-12, epsrel=1e-12, limit=200)[0]
        change = form.beta * (form.log_density(high) - form.log_density(low))
        assert change == pytest.approx(integral, abs=1e-8)
    assert form.kl == pytest.approx(target_kl, rel=1e-10)
    kl = sum(
        quad(lambda u: form.density(u) * form.log_density(u), low, high, epsabs=1e-12, limit=200)[0]
        for low, high in [(0, 0.5), (0.5, 0.97), (0.97, 0.999)]
    )
    # to u = 1 with many nodes on halving intervals: log f(1) is 17 there for best_of(64), and u has few digits to tell
    x, weight = np.polynomial.legendre.leggauss(200)
    edges = np.append(1 - 1e-3 * 0.5 ** np.arange(40), 1)
    width = np.diff(edges)[:, None]
    u = edges[:-1, None] + width * (1 + x) / 2
    kl += np.sum(width * weight / 2 * form.density(u) * form.log_density(u))
    assert kl == pytest.approx(target_kl, abs=1e-8)
    assert win_rate_of_cdf(form.cdf, procedure, opponent) == pytest.approx(form.win_rate, abs=1e-8)


@pytest.mark.parametrize(
    ("procedure", "most"), [("kth(512, 1024)", 100), ("best_of(1024)", 30), ("kth(2, 32)", 40), ("worst_of(1024)", 70)]
)
def test_a_high_kl_is_a_short_path(procedure, most):
    """To 10 nats, where log beta has fallen to -5,000 for kth(512, 1024) and to -10,000 for worst_of(1024)."""

    class Counting(Collocation):
        steps = 0

        def advance(self, *arguments):
            Counting.steps += 1
            return super().advance(*arguments)

    pairs = pairings(parse_procedure(procedure))
    optimum = along(Counting(pairs), [10.0])[0]
    assert Counting.steps < most and residual(pairs, optimum) < 1e-10
    assert optimum.kl == pytest.approx(10, rel=1e-10) and Counting(pairs).win_rate(optimum) == pytest.approx(1)


@pytest.mark.parametrize(
    ("k", "n", "kl", "down_to"),
    [(2, 32, 10.0, -6), (2, 1024, 0.5, -6), (1000, 1024, 10.0, -0.08), (512, 1024, 5.0, -1)],
)
def test_where_the_win_rate_is_one_against_shooting_from_the_top(k, n, kl, down_to):
    """(6) by an integrator of initial values in log F, from F = 1 down, at the log beta found.

    There is one f(1) for which F and u come to 0 together. With more, F is 0 first and f is left over; with less, f
    falls to 0 where F is not. It is bracketed by bisection; where both sides of the bracket still agree they are the
    solution: log f and 1 - u there are ours. The policy is a step that u cannot resolve; 1 - W is down to e^-5000.
    """
    pairs = pairings(kth(k, n))
    curve = along(Collocation(pairs), [kl])[0]
    constant = 2 * betaln(k, n - k + 1) + curve.log_beta

    def slopes(x, state):
        """By x = log F: of y = log(1 - u) and L."""
        y, log_f = state
        log_1_f, log_u = np.log(-np.expm1(min(x, -1e-300))), np.log(-np.expm1(min(y, -1e-300)))
        log_k = (k - 1) * (x + log_u) + (n - k) * (log_1_f + y) - constant
        return [-np.exp(min(x - log_f - y, 300)), np.exp(min(log_k + x - log_f, 300))]

    def shoot(top):
        first = 1e-6  # of 1 - F, where f is f(1) to first order
        x, y = np.log1p(-first), np.log(first) - top
        return solve_ivp(slopes, (x, -60), [y, top], "DOP853", rtol=1e-11, atol=1e-12, dense_output=True)

    top = curve.state[-1, 1]
    low, high = top - 1e-3, top + 1e-3
    for _ in range(28):
        middle = (low + high) / 2
        low, high = (low, middle) if shoot(middle).status == 0 else (middle, high)  # 0: F is, before u
    assert (low + high) / 2 == pytest.approx(top, abs=1e-7)
    assert_between(curve, (shoot(low), shoot(high)), down_to, 1e-5)


def test_facts_stated_in_the_design():
    """At n = 32 and 0.095 nats: exp_tilt(10) 0.792, exp_tilt(90) 0.894, the optimum 0.897."""
    rates = [
        solve("best_of(32)", None, t, target_kl=0.095).win_rate for t in ("exp_tilt(10)", "exp_tilt(90)", "optimal")
    ]
    np.testing.assert_allclose(rates, [0.792, 0.894, 0.897], atol=6e-4)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_first_order_is_a_power(n):
    """(7): Phi = n^2 / (2n - 1) u^(2n - 1)."""
    form = solve(best_of(n), transform="first_order", beta=0.7)
    np.testing.assert_allclose(form.transform_values(U), n**2 / (2 * n - 1) * U ** (2 * n - 1), atol=1e-9)


@pytest.mark.parametrize("procedure", ["best_of(16)", "worst_of(5)", "kth(2, 3)"])
def test_the_optimum_tends_to_first_order_at_small_kl(procedure):
    best = solve(procedure, target_kl=1e-4)
    small = solve(procedure, transform="first_order", target_kl=1e-4)
    np.testing.assert_allclose(best.log_density(U), small.log_density(U), atol=0.02)
    assert 0 <= best.win_rate - small.win_rate < 1e-4


@pytest.mark.parametrize(
    "transform", ["optimal", "identity", "exp_tilt(20)", "exp_tilt(-20)", "log", "table(0, 1, 0, 2)"]
)
@pytest.mark.parametrize("procedure", ["best_of(4)", "worst_of(4)"])
def test_kl_and_beta_are_two_names_of_one_knob(procedure, transform):
    form = solve(procedure, transform=transform, target_kl=0.7)
    again = solve(procedure, transform=transform, beta=form.beta)
    assert form.kl == pytest.approx(0.7, rel=1e-10)
    assert again.kl == pytest.approx(0.7, rel=1e-7)
    assert again.win_rate == pytest.approx(form.win_rate, abs=1e-8)


@pytest.mark.parametrize(
    "transform", ["optimal", "identity", "exp_tilt(20)", "log", "first_order", "table(0, 1, 0, 2)"]
)
@pytest.mark.parametrize("samples", [1, 2, 7, 1000])
def test_mean_densities_are_normalized_for_every_number_of_samples(transform, samples):
    form = solve("worst_of(4)", transform=transform, target_kl=0.7)
    edges = np.arange(samples + 1) / samples
    mean = np.exp(form.log_mean_density(edges[:-1], edges[1:]))
    assert mean.mean() == pytest.approx(1, abs=1e-9)


def test_mean_density_of_an_interval_by_quadrature_and_in_the_far_tail():
    form = solve("worst_of(4)", beta=0.05)
    for low, high in [(0, 0.25), (0.1, 0.35), (0.7, 0.70001), (0.9, 1)]:
        top = form.log_density(high)
        mean = quad(lambda u, top=top: np.exp(form.log_density(u) - top), low, high, epsabs=0, epsrel=1e-11)[0] / (
            high - low
        )
        assert form.log_mean_density(low, high) == pytest.approx(top + np.log(mean), abs=1e-8)
    assert form.log_mean_density(0.3, 0.3) == form.log_density(0.3)
    assert form.log_density(0) < -78  # below exp(-78), where the mass is zero to double precision beside 1


def test_no_density_beats_the_optimum():
    """Random perturbations of log f, brought back to the same KL by a power of f, have a lower win rate."""
    random = np.random.default_rng(1)
    best = solve("best_of(4)", target_kl=0.5)
    for _ in range(10):
        bumps = random.normal(size=9) * 0.1
        values = best.log_density(np.linspace(0, 1, 401)) + np.interp(
            np.linspace(0, 1, 401), np.linspace(0, 1, 9), bumps
        )
        other = solve("best_of(4)", transform=table(values), target_kl=0.5)
        assert other.win_rate < best.win_rate


@pytest.mark.parametrize("transform", ["optimal", "identity", "exp_tilt(600)", "log"])
def test_a_win_rate_is_a_third_name_of_the_knob(transform):
    form = solve("best_of(4)", transform=transform, target_kl=0.7)
    again = solve("best_of(4)", transform=transform, target_win_rate=form.win_rate)
    assert again.kl == pytest.approx(0.7, rel=1e-9)


@pytest.mark.parametrize(
    ("procedure", "target_kl"), [("worst_of(4)", 2.0), ("worst_of(256)", 5.0), ("best_of(64)", 2.0)]
)
def test_the_transform_is_the_integral_of_its_equation(procedure, target_kl):
    """Where beta underflows and log f is no finite number to speak of, Phi is still the integral of h_a'(F) h_b'."""
    form = solve(procedure, target_kl=target_kl)
    edges = form._density.edges
    kernel = form.procedure.density(form.cdf(nodes(edges))) * form.procedure.density(nodes(edges))
    phi = np.concatenate([[0], np.cumsum(np.sum(weights(edges) * kernel, axis=1))])
    np.testing.assert_allclose(form.transform_values(edges), phi, atol=1e-7 * phi[-1])


def test_frontier_is_what_solve_gives():
    found = frontier("best_of(4)", transforms=("optimal", "exp_tilt(12)"), kls=[0.5, 0.1])
    np.testing.assert_array_equal(found.kls, [0.1, 0.5])
    for name, rates in found.win_rates.items():
        np.testing.assert_allclose(
            rates, [solve("best_of(4)", transform=name, target_kl=k).win_rate for k in found.kls]
        )
    everywhere = frontier("worst_of(8)", "sample")
    assert set(everywhere.win_rates) == {"optimal", "identity"}
    assert np.all(np.diff(everywhere.win_rates["optimal"]) > 0)
    assert np.all(everywhere.win_rates["optimal"] >= everywhere.win_rates["identity"])


def test_optimal_win_rate_at_no_kl_is_the_references():
    assert optimal_win_rate("best_of(4)", None, 0) == pytest.approx(0.5, abs=1e-12)
    assert optimal_win_rate("best_of(3)", "sample", 0) == pytest.approx(0.75, abs=1e-12)
    assert optimal_win_rate("best_of(4)", "best_of(4)", 0.5) == optimal_transform("best_of(4)", target_kl=0.5).win_rate


@pytest.mark.parametrize(("procedure", "opponent"), [("best_of(4)", None), ("worst_of(32)", "sample")])
def test_below_the_least_kl_the_gain_is_that_of_first_order(procedure, opponent):
    """(7): the gain is the deviation of Phi under the reference times the root of 2 KL."""
    phi = solve(procedure, opponent, "first_order", target_kl=0.1).transform_values
    x, weight = np.polynomial.legendre.leggauss(400)
    values = phi((1 + x) / 2)
    spread = np.sqrt(np.average((values - np.average(values, weights=weight)) ** 2, weights=weight))
    start = optimal_win_rate(procedure, opponent, 0)
    for kl in (1e-7, 1e-8, 5e-9, 1e-12):
        gain = optimal_win_rate(procedure, opponent, kl) - start
        assert gain == pytest.approx(spread * np.sqrt(2 * kl), rel=2e-3, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of target_kl (nats), beta and target_win_rate expected"),
        ({"beta": 1.0, "target_kl": 1.0}, "exactly one of target_kl (nats), beta and target_win_rate expected"),
        ({"target_kl": 0.0}, "target_kl = 0.0 given"),
        ({"target_kl": 1e-12}, "at least 1e-08 nats expected"),
        ({"beta": -1.0}, "beta = -1.0 given"),
        ({"beta": 1e9}, "no optimum was found near the reference"),
        ({"beta": 1e-200}, "where u cannot be told from 1"),
        ({"target_win_rate": 0.5 + 1e-9}, "takes less than 1e-08 nats"),
        ({"transform": "identity", "target_win_rate": 0.5 + 1e-9}, "takes less than 1e-08 nats"),
        ({"target_kl": float("nan")}, "target_kl = nan given"),
        ({"transform": "table(0, 1, 1)", "target_kl": 1.0}, "more than table(0, 1, 1) can reach"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError) as caught:
        solve("best_of(4)", **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kls", [[], [0, 1], [-1.0], [np.inf], [1e-12, 1]])
def test_a_frontier_is_of_kls_that_can_be_asked_for(kls):
    with pytest.raises(UserError, match="finite KLs of at least 1e-08 nats expected"):
        frontier("best_of(4)", kls=kls)


def test_a_tail_that_only_its_logarithm_can_tell_from_zero():
    """Below u = 0.99 the opponent's 1 - h_b is down to e^-741, and beta is e^-822."""
    procedure, opponent = parse_procedure("0.06 sample + 0.94 kth(18, 196)"), kth(1, 161)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_f = solve(procedure, opponent, target_kl=5.084).log_density([0, 0.5, 0.99, 0.999])
    assert np.all(np.isfinite(log_f)) and np.all(np.diff(log_f) >= 0)
    log_beta = along(Collocation(pairings(procedure, opponent)), [5.084])[0].log_beta
    rise = np.log(0.06) + 161 * np.log(0.01)  # (5) with F = 0, which leaves the sample's part
    assert np.log(-log_f[2]) == pytest.approx(rise - log_beta, abs=1e-3)
