"""Functionals of F: early_stop, and one made here, against simulation, exact equations, brute force and collocation."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize

from iapo import functionals
from iapo.closed_form import frontier, solve, win_rate_of_cdf
from iapo.errors import UserError
from iapo.functionals import Variation, law, output_of
from iapo.paths import along
from iapo.procedures import Functional, best_of, early_stop, pairings, parse_procedure, worst_of
from iapo.quadrature import nodes, weights

U = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Redraw(Functional):
    """The example of docs/closed_form.md: draw, and if the calibrated reward is below tau draw once more."""

    tau: float

    @property
    def corners(self):
        return (self.tau,)

    def output_cdf(self, cdf, u):
        q, p = cdf(self.tau), cdf(u)
        return q * p + torch.relu(p - q)

    def __str__(self):
        return f"redraw({self.tau:g})"


@dataclass(frozen=True)
class BestOfFour(Functional):
    """best_of(4), as if its h were not known."""

    def output_cdf(self, cdf, u):
        return cdf(u) ** 4


@dataclass(frozen=True)
class AgainstItsMean(Functional):
    """Its Hessian is dense: the output at u depends on F at all nodes."""

    def output_cdf(self, cdf, u):
        p = cdf(u)
        return p * (1 + 0.3 * (1 - p) * p.mean())


def draw_early_stop(n, tau, policy, generator, count):
    """Outputs, by doing it; policy maps uniform numbers to calibrated rewards."""
    drawn = policy(generator.random((count, n)))
    hit = drawn >= tau
    first = np.take_along_axis(drawn, hit.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(hit.any(axis=1), first, drawn.max(axis=1))


def test_early_stop_is_what_it_says():
    """Shares of 400,000 simulated outputs are within 5 standard errors, 0.004; odds of a false alarm about 1e-5."""
    drawn = draw_early_stop(4, 0.7, lambda v: v**0.5, np.random.default_rng(0), 400_000)
    found = output_of(early_stop(4, 0.7), lambda u: np.asarray(u) ** 2, U)  # the CDF of the square root is u^2
    np.testing.assert_allclose([np.mean(drawn <= u) for u in U], found, atol=0.004)


def test_its_law_under_the_reference_by_hand_and_by_automatic_differentiation():
    one = early_stop(2, 0.5)
    np.testing.assert_allclose(one.cdf([0, 0.25, 0.5, 0.75, 1]), [0, 0.0625, 0.25, 1 - 0.25 * 1.5, 1])
    np.testing.assert_allclose(one.density([0.25, 0.75]), [0.5, 1.5])
    u = U[(U != 0.5) & (U > 0)]
    cdf, density = law(one, u)
    np.testing.assert_allclose(cdf, one.cdf(u), atol=1e-15)
    np.testing.assert_allclose(density, one.density(u), atol=1e-14)
    redraw = Redraw(0.4)
    np.testing.assert_allclose(redraw.cdf([0.2, 0.4, 0.7]), [0.08, 0.16, 0.4 * 0.7 + 0.3])
    np.testing.assert_allclose(redraw.density([0.2, 0.7]), [0.4, 1.4])


@pytest.mark.parametrize("kl", [1e-3, 0.5, 3.0])
def test_automatic_differentiation_finds_what_collocation_does(kl):
    """The same optimum without h; and h' and its differences in place of it, where there is another functional."""
    exact = solve("best_of(4)", target_kl=kl)
    found = solve(BestOfFour(), best_of(4), target_kl=kl)
    assert found.win_rate == pytest.approx(exact.win_rate, abs=1e-10)
    assert found.beta == pytest.approx(exact.beta, rel=1e-7)
    np.testing.assert_allclose(found.log_density(U), exact.log_density(U), atol=1e-6)
    pairs = pairings(worst_of(3))
    solver = Variation(pairs)  # which treats pointwise procedures too
    point, exact = along(solver, [kl])[0], solve("worst_of(3)", target_kl=kl)
    assert solver.win_rate(point) == pytest.approx(exact.win_rate, abs=1e-10)
    inside = U[exact.log_density(U) > -30]
    np.testing.assert_allclose(point(inside), exact.log_density(inside), atol=1e-6)


@pytest.mark.parametrize(("n", "tau", "kl"), [(8, 0.8, 0.5), (2, 0.5, 2.0), (32, 0.3, 0.2)])
def test_early_stop_against_its_exact_variation(n, tau, kl):
    """-dW/dF by hand: k below and above tau as in (5), and at tau a jump of -S'(q) times the integral of (1 - F) g_b.

    With q = F(tau) and S(q) = 1 + q + ... + q^(n-1), the output's CDF is F^n below and 1 - S(q)(1 - F) above.
    """
    form = solve(early_stop(n, tau), target_kl=kl)
    q, opponent = float(form.cdf(tau)), early_stop(n, tau)
    s = sum(q**i for i in range(n))
    slope = sum(i * q ** (i - 1) for i in range(1, n))

    def kernel(u):
        return (n * form.cdf(u) ** (n - 1) if u < tau else s) * opponent.density(u)

    just_below = tau - 1e-12
    for low, high in [(0.01, tau / 2), (tau / 2, just_below), (tau, (1 + tau) / 2), ((1 + tau) / 2, 1)]:
        change = form.beta * (form.log_density(high) - form.log_density(low))
        assert change == pytest.approx(quad(kernel, low, high, epsabs=1e-12, limit=200)[0], abs=1e-7)
    jump = form.beta * (form.log_density(tau) - form.log_density(just_below))
    above = quad(lambda u: (1 - form.cdf(u)) * opponent.density(u), tau, 1, epsabs=1e-12, limit=200)[0]
    assert jump == pytest.approx(-slope * above, abs=1e-7)
    assert form.kl == pytest.approx(kl, rel=1e-10)
    assert win_rate_of_cdf(form.cdf, early_stop(n, tau), corners=[tau]) == pytest.approx(form.win_rate, abs=1e-8)
    assert np.exp(form.log_mean_density(np.arange(7) / 7, np.arange(1, 8) / 7)).mean() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("procedure", [early_stop(4, 0.6), Redraw(0.5), parse_procedure("early_stop(1, 0.3)")])
def test_against_brute_force_over_densities_constant_on_cells(procedure):
    beta, count = 0.2, 240
    edges = np.linspace(0, 1, count + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    play = torch.as_tensor(procedure.density(middles)) / count

    def loss(logits):
        x = torch.tensor(logits, requires_grad=True)
        mass = torch.softmax(x, 0)
        total = torch.cat([torch.zeros(1), torch.cumsum(mass, 0)])

        def cdf(points):
            points = np.atleast_1d(np.asarray(points, float))
            cell = np.clip((points * count).astype(int), 0, count - 1)
            found = total[cell] + mass[cell] * torch.as_tensor(points * count - cell)
            return found if len(found) > 1 else found[0]

        value = (play * procedure.output_cdf(cdf, torch.as_tensor(middles))).sum()
        value = value + beta * (mass * torch.log(mass * count)).sum()
        value.backward()
        return value.item(), x.grad.numpy()

    start = np.random.default_rng(0).normal(size=count)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9})
    form = solve(procedure, beta=beta)
    assert 1 - found.fun == pytest.approx(form.win_rate - beta * form.kl, abs=2e-4)


@pytest.mark.parametrize("functional", [early_stop(5, 0.6), AgainstItsMean(), Redraw(0.3)])
def test_gradient_and_curvature_against_differences_of_the_win_rate(functional):
    edges = np.array([0, 0.2, 0.4, 0.7, 1.0])  # of 1 - u
    generator = np.random.default_rng(1)
    log_f = generator.normal(size=(4, functionals.ORDER)) * 0.2
    pairs = pairings(functional, best_of(2))

    def win_rate(f):
        return functionals._Discrete(pairs, functionals.Profile(edges, np.log(f).reshape(log_f.shape), 0.0)).win_rate()

    def phi(f):
        profile = functionals.Profile(edges, np.log(f).reshape(log_f.shape), 0.0)
        return functionals._Discrete(pairs, profile).transform().ravel()

    f = np.exp(log_f).ravel()
    f /= np.sum(weights(edges).ravel() * f) * 1.01  # F stays below 1
    discrete = functionals._Discrete(pairs, functionals.Profile(edges, np.log(f).reshape(log_f.shape), 0.0))
    direction = generator.normal(size=len(f))
    step = 1e-5
    slope = (win_rate(f + step * direction) - win_rate(f - step * direction)) / (2 * step)
    weight = weights(edges).ravel()
    gradient = weight * phi(f)
    centred = direction - np.sum(weight * direction)  # Phi is known up to a constant
    slope_of_constant = (win_rate(f + step) - win_rate(f - step)) / (2 * step)
    assert np.sum(gradient * centred) == pytest.approx(slope - np.sum(weight * direction) * slope_of_constant, abs=1e-8)
    change = (phi(f + step * direction) - phi(f - step * direction)) / (2 * step)
    expected = discrete.curvature() @ direction
    np.testing.assert_allclose(expected - np.sum(weight * expected), change, atol=1e-6)


@pytest.mark.parametrize("transform", ["identity", "exp_tilt(10)", "log", "first_order", "table(0, 1, 0, 3)"])
@pytest.mark.parametrize("procedure", ["early_stop(4, 0.7)", "0.5 early_stop(4, 0.7) + 0.5 worst_of(2)"])
def test_no_transform_beats_the_optimum(procedure, transform):
    best, other = solve(procedure, target_kl=0.3), solve(procedure, None, transform, target_kl=0.3)
    assert other.kl == pytest.approx(0.3, rel=1e-10)
    assert other.win_rate <= best.win_rate + 1e-10
    expected = win_rate_of_cdf(other.cdf, procedure, corners=[1 / 3, 2 / 3])
    assert other.win_rate == pytest.approx(expected, abs=1e-8)


def test_first_order_is_the_limit_of_small_kl():
    best = solve("early_stop(4, 0.7)", target_kl=1e-6)
    small = solve("early_stop(4, 0.7)", transform="first_order", target_kl=1e-6)
    np.testing.assert_allclose(best.log_density(U), small.log_density(U), atol=2e-5)


def test_one_draw_is_a_sample_and_the_knobs_agree():
    one, sample = solve("early_stop(1, 0.5)", target_kl=0.5), solve("sample", target_kl=0.5)
    assert one.win_rate == pytest.approx(sample.win_rate, abs=1e-10)
    form = solve("early_stop(8, 0.8)", target_kl=0.5)
    assert solve("early_stop(8, 0.8)", beta=form.beta).kl == pytest.approx(0.5, rel=1e-8)
    assert solve("early_stop(8, 0.8)", target_win_rate=form.win_rate).kl == pytest.approx(0.5, rel=1e-9)
    rates = frontier("early_stop(8, 0.8)", kls=[0.1, 0.5]).win_rates["optimal"]
    assert rates[1] == pytest.approx(form.win_rate, abs=1e-10)


def test_an_opponent_may_stop_early_too():
    form = solve("best_of(4)", "early_stop(8, 0.8)", target_kl=0.5)
    expected = win_rate_of_cdf(form.cdf, "best_of(4)", "early_stop(8, 0.8)")
    assert form.win_rate == pytest.approx(expected, abs=1e-8)


def test_the_residual_is_that_of_the_equation_on_a_grid_of_its_own():
    pairs = pairings(early_stop(8, 0.8))
    point = along(Variation(pairs), [0.5])[0]
    assert functionals.residual(pairs, point) < 1e-9
    log_f = point.log_f + 1e-4 * np.sin(7 * nodes(point.edges))
    assert functionals.residual(pairs, functionals.Profile(point.edges, log_f, point.log_beta)) > 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("early_stop(8)", "character 1: early_stop needs early_stop(n, tau), 1 given"),
        ("early_stop(0, 0.5)", "early_stop: n = 0 given"),
        ("early_stop(4, 1)", "tau must be a quantile between 0 and 1"),
    ],
)
def test_errors(text, message):
    with pytest.raises(UserError) as caught:
        parse_procedure(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_policy_that_never_reaches_the_threshold_has_the_best_of_n():
    """Its F(tau) is 1 to double precision: (1 - q^n) / (1 - q) is n."""
    form = solve("early_stop(8, 0.9)", transform="table(1, 0, 0)", target_kl=20)
    assert form.cdf(0.9) == 1
    below = float(form.win_rate_under("best_of(8)", "early_stop(8, 0.9)"))
    assert form.win_rate == pytest.approx(below, abs=1e-15)


def test_a_given_transform_keeps_its_digits_at_high_kl():
    """Phi / beta is 7e8 there, of which 1e-7 is rounded off; the KL is summed anew from log f."""
    form = solve("best_of(4)", transform="table(1, 0, 0)", target_kl=20)
    assert form.kl == pytest.approx(20, abs=1e-11)
    edges = np.concatenate([[0.0], np.geomspace(1e-14, 1e-7, 4001)])
    middle = (edges[:-1] + edges[1:]) / 2
    mass = np.diff(edges) * np.exp(form.log_density(middle))
    assert mass.sum() == pytest.approx(1, abs=1e-5) and form.cdf([0, 0.9, 1]).tolist() == [0, 1, 1]


def test_a_kl_where_the_win_rate_is_next_to_one_is_refused():
    with pytest.raises(UserError, match=r"no optimum was found beyond .* nats, where the win rate is 0\.99999"):
        solve("early_stop(64, 0.95)", target_kl=10)


def test_curvature_where_the_threshold_is_above_all_that_the_policy_does():
    """At 10 nats F(0.8) is e^-83, to rounding 0, of which every power has a second derivative."""
    form = solve("0.5 early_stop(8, 0.8) + 0.5 worst_of(4)", target_kl=10)
    assert form.kl == pytest.approx(10, abs=1e-9) and form.cdf(0.8) < 1e-30
    assert solve(form.procedure, target_kl=9.99).win_rate < form.win_rate < 1
    at_zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    output = (
        early_stop(4, 0.5).output_cdf(lambda u: at_zero, torch.tensor([0.75])).sum()
    )  # 1 - (1 - q)(1 + q + ...) = q^4
    (slope,) = torch.autograd.grad(output, at_zero, create_graph=True)
    assert slope.item() == 0 and torch.autograd.grad(slope, at_zero)[0].item() == 0
