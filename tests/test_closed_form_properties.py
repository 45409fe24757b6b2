"""What holds for every procedure, opponent, transform and budget: properties, by hypothesis and by multi-start."""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from iapo.closed_form import optimal_win_rate, solve
from iapo.errors import UserError
from iapo.optimum import Collocation
from iapo.paths import along
from iapo.procedures import (
    best_of,
    best_of_poisson,
    early_stop,
    kth,
    mixture,
    pairings,
    parse_procedure,
    sample,
    worst_of,
)
from iapo.quadrature import nodes, weights
from iapo.transforms import exp_tilt, first_order, identity, log, table

few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

counts = st.integers(1, 16)
pointwise = st.one_of(
    st.just(sample()),
    counts.map(best_of),
    counts.map(worst_of),
    st.tuples(counts, counts).map(lambda pair: kth(min(pair), max(pair))),
    st.floats(0, 16).map(best_of_poisson),
)
functional = st.builds(early_stop, st.integers(1, 8), st.floats(0.2, 0.9))
mixed = st.tuples(st.floats(0.05, 0.95), pointwise, pointwise).map(
    lambda parts: mixture((parts[0], parts[1]), (1 - parts[0], parts[2]))
)
procedures = st.one_of(pointwise, mixed)
kls = st.floats(np.log(1e-4), np.log(5)).map(lambda x: float(np.exp(x)))
transforms = st.one_of(
    st.just(identity()),
    st.just(log()),
    st.just(first_order()),
    st.floats(0.5, 60).map(exp_tilt),
    st.floats(-60, -0.5).map(exp_tilt),
    st.lists(st.floats(-3, 3), min_size=3, max_size=6).filter(lambda v: max(v) - min(v) > 0.1).map(table),
)


@few
@given(st.one_of(procedures, functional))
def test_at_a_kl_of_zero_nobody_wins(procedure):
    assert optimal_win_rate(procedure, None, 0) == pytest.approx(0.5, abs=1e-12)


@settings(few, max_examples=150)
@given(procedures, st.one_of(st.none(), procedures), transforms, kls)
def test_optimal_is_never_below_another_transform_at_equal_kl(procedure, opponent, transform, kl):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = solve(procedure, opponent, target_kl=kl)
        try:
            other = solve(procedure, opponent, transform, target_kl=kl)
        except UserError as error:  # a table whose maximum is flat
            assert "more than" in str(error)
            return
    assert best.kl == pytest.approx(kl, rel=1e-10) and other.kl == pytest.approx(kl, rel=1e-10)
    assert best.win_rate >= other.win_rate - 1e-8


@settings(few, max_examples=10)
@given(functional, transforms, st.floats(np.log(1e-3), np.log(1.0)).map(lambda x: float(np.exp(x))))
def test_the_same_where_there_is_no_h(procedure, transform, kl):
    best = solve(procedure, target_kl=kl)
    try:
        other = solve(procedure, None, transform, target_kl=kl)
    except UserError as error:
        assert "more than" in str(error)
        return
    assert best.win_rate >= other.win_rate - 1e-8


@settings(few, max_examples=20)
@given(pointwise, st.one_of(st.none(), pointwise), st.floats(0.3, 3), st.floats(0.05, 1.5))
def test_win_rate_and_kl_do_not_depend_on_the_scale_of_rewards(procedure, opponent, power, kl):
    """(2) and (4) again in x = u^power, where the reference is not uniform: R(x) = x^(1/power)."""
    form = solve(procedure, opponent, target_kl=kl)
    pairs = pairings(procedure, opponent)

    edges = np.unique(np.concatenate([form._density.edges, np.linspace(0, 1, 65)])) ** power
    edges = np.unique(np.concatenate([edges, 0.5 ** np.arange(60.0)]))
    x = nodes(edges)
    u, density = x ** (1 / power), x ** (1 / power - 1) / power  # the reference's CDF and its density
    policy = form.density(u) * density
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.where(policy > 0, policy * np.log(policy / density), 0)
    loss = sum(w * a.cdf(form.cdf(u)) * b.density(u) for w, a, b in pairs) * density
    assert np.sum(weights(edges) * information) == pytest.approx(kl, abs=1e-6)
    assert 1 - np.sum(weights(edges) * loss) == pytest.approx(form.win_rate, abs=1e-6)


@few
@given(pointwise, pointwise, pointwise, st.floats(0.05, 0.95), kls)
def test_mixtures_interpolate(first, second, opponent, weight, kl):
    """(4) is linear in the policy's and in the opponent's procedure; its optimum is convex in the mixture."""
    both = mixture((weight, first), (1 - weight, second))
    form = solve("best_of(3)", target_kl=kl)
    one, other = (form.win_rate_under(part, opponent) for part in (first, second))
    assert form.win_rate_under(both, opponent) == pytest.approx(weight * one + (1 - weight) * other, abs=1e-12)
    one, other = (form.win_rate_under(opponent, part) for part in (first, second))
    assert form.win_rate_under(opponent, both) == pytest.approx(weight * one + (1 - weight) * other, abs=1e-12)
    best = solve(both, target_kl=kl).win_rate
    ends = [solve(part, target_kl=kl).win_rate for part in (first, second)]
    assert best <= weight * ends[0] + (1 - weight) * ends[1] + 1e-8


def test_a_mixture_tends_to_its_parts():
    for weight in (1e-6, 1 - 1e-6):
        both = solve(mixture((weight, best_of(8)), (1 - weight, worst_of(3))), target_kl=0.4)
        part = solve(best_of(8) if weight > 0.5 else worst_of(3), target_kl=0.4)
        assert both.win_rate == pytest.approx(part.win_rate, abs=5e-6)


@few
@given(kls)
def test_one_draw_is_a_sample(kl):
    plain = solve(sample(), target_kl=kl)
    u = np.linspace(0, 1, 21)
    for one in (best_of(1), worst_of(1), kth(1, 1), best_of_poisson(0), mixture((0.5, sample()), (0.5, best_of(1)))):
        form = solve(one, target_kl=kl)
        assert form.win_rate == pytest.approx(plain.win_rate, abs=1e-10)
        np.testing.assert_allclose(form.log_density(u), plain.log_density(u), rtol=1e-8, atol=1e-8)


@few
@given(procedures, transforms, kls)
def test_a_target_win_rate_is_met(procedure, transform, kl):
    try:
        form = solve(procedure, None, transform, target_kl=kl)
    except UserError:
        return
    if not 0.5 + 1e-6 < form.win_rate < 1 - 1e-6:
        return
    again = solve(procedure, None, transform, target_win_rate=form.win_rate)
    assert again.win_rate == pytest.approx(form.win_rate, abs=1e-10)


@pytest.mark.parametrize("n", [1, 2, 31, 256, 1024])
@pytest.mark.parametrize("name", ["best_of", "worst_of"])
def test_every_n_and_kl_in_range_without_a_warning(name, n):
    procedure = parse_procedure(f"{name}({n})")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kl in (1e-4, 0.03, 1.0, 10.0):
            form = solve(procedure, target_kl=kl)
            assert form.kl == pytest.approx(kl, rel=1e-10)
            assert 0.5 < form.win_rate <= 1
            values = [form.log_density([0, 0.3, 0.9, 1]), form.transform_values([0, 0.5, 1])]
            assert all(np.all(np.isfinite(part)) for part in values)
            edges = np.arange(33) / 32
            assert np.exp(form.log_mean_density(edges[:-1], edges[1:])).mean() == pytest.approx(1, abs=1e-8)
            assert form.transform_values(0) == 0
            if 1 - form.win_rate > 1e-9:
                assert form.win_rate_under(procedure) == pytest.approx(form.win_rate, abs=1e-8)


def multi_start(pairs, beta, starts, count=150):
    """The largest W - beta KL over densities constant on cells, from random starts of every concentration."""
    edges = 1 - np.linspace(1, 0, count + 1) ** 2  # finer where policies of high KL are
    widths, middles = np.diff(edges), (edges[1:] + edges[:-1]) / 2
    play = [(w * np.diff(b.cdf(edges)), a) for w, a, b in pairs]

    def loss(logits):
        mass = np.exp(logits - logits.max())
        mass /= mass.sum()
        total = np.cumsum(mass)
        inner = np.clip(total - mass / 2, 0, 1)
        log_f = np.log(np.maximum(mass, 1e-300) / widths)
        value = sum(np.sum(weight * a.cdf(inner)) for weight, a in play)
        by_cdf = sum(weight * a.density(inner) for weight, a in play)
        after = np.append(np.cumsum(by_cdf[::-1])[::-1][1:], 0)
        gradient = after + by_cdf / 2 + beta * (log_f + 1)
        return value + beta * np.sum(mass * log_f), mass * (gradient - np.sum(mass * gradient))

    generator = np.random.default_rng(0)
    best = -np.inf
    for start in range(starts):
        slope = generator.normal() * 10 ** generator.uniform(-1, 1.5)
        bumps = np.interp(middles, np.linspace(0, 1, 8), generator.normal(size=8)) * 10 ** generator.uniform(-1, 1)
        first = np.log(widths) + (slope * middles + bumps if start else 0)
        done = minimize(
            loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-8}
        )
        best = max(best, 1 - done.fun)
    return best


@pytest.mark.parametrize(
    ("procedure", "opponent", "beta", "several"),
    [
        ("worst_of(8)", "best_of(4)", 0.109, True),
        ("worst_of(4)", "best_of(4)", 0.29, True),
        ("worst_of(4)", "best_of(4)", 0.35, True),
        ("worst_of(4)", None, 0.3, False),
        ("kth(2, 16)", "best_of(4)", 0.088, True),
    ],
)
def test_of_several_stationary_points_the_best_is_found(procedure, opponent, beta, several):
    """Of local maxima from 40 starts none is better than ours and one is as good, to the width of the cells.

    That there are several stationary points is seen on the path of all: beta comes by more than once.
    """
    pairs = pairings(parse_procedure(procedure), parse_procedure(opponent) if opponent else None)
    form = solve(procedure, opponent, beta=beta)
    assert multi_start(pairs, beta, 40) == pytest.approx(form.win_rate - beta * form.kl, abs=5e-4)
    path = along(Collocation(pairs), list(np.geomspace(1e-3, 5, 60)))
    crossings = np.diff(np.sign([point.log_beta - np.log(beta) for point in path])) != 0
    assert (crossings.sum() > 1) == several
