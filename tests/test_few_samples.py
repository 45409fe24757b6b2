"""What K samples cost: against simulation and a generic optimizer, and in the limits that are known exactly."""

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import beta as beta_distribution
from scipy.stats import binom

from iapo import few_samples as module
from iapo.closed_form import solve
from iapo.errors import UserError
from iapo.few_samples import (
    MOST_SAMPLES,
    NOISE_PRICE,
    RankMean,
    few_samples,
    interval_targets,
    rank_targets,
    samples_needed,
)

GRID, STEP = (np.arange(4000) + 0.5) / 4000, 1 / 4000


def exactly(monkeypatch, price: float) -> None:
    monkeypatch.setattr(module, "NOISE_PRICE", price)
    rank_targets.cache_clear()


@pytest.fixture(autouse=True)
def _fresh():
    rank_targets.cache_clear()
    yield
    rank_targets.cache_clear()


def test_the_fit_is_the_mean_target_of_simulated_ranks():
    """Responses of known u ranked among 6 others, 100,000 times each; within 5 standard errors."""
    targets = rank_targets(solve("best_of(4)", target_kl=0.5), 7)
    generator = np.random.default_rng(0)
    for u in (0.05, 0.5, 0.97):
        rank = (generator.random((100_000, 6)) < u).sum(axis=1)
        drawn = targets[rank]
        assert abs(drawn.mean() - float(RankMean(tuple(targets))(u))) < 5 * drawn.std() / np.sqrt(len(drawn))


def test_what_is_reported_is_that_of_the_simulated_policy():
    """(2), (4) and the noise by a plain sum over a fine grid."""
    form = solve("worst_of(3)", "best_of(2)", target_kl=0.3)
    found = few_samples(form, 12)
    targets = rank_targets(form, 12)
    ranks = binom.pmf(np.arange(12), 11, GRID[:, None])
    log_f = ranks @ targets
    f = np.exp(log_f)
    assert f.mean() == pytest.approx(1, abs=1e-6)
    assert found.kl == pytest.approx((f * log_f).mean(), abs=1e-5)
    cdf = np.cumsum(f) * STEP - f * STEP / 2
    win_rate = 1 - np.mean((1 - (1 - cdf) ** 3) * 2 * GRID)
    assert found.win_rate == pytest.approx(win_rate, abs=1e-5)
    chance = np.mean(ranks @ targets**2 - log_f**2)
    assert found.noise == pytest.approx(chance / targets.var(), abs=1e-5)
    assert found.win_rate < found.optimal_win_rate


@pytest.mark.parametrize("procedure", ["best_of(4)", "worst_of(4)", "kth(3, 5)"])
def test_targets_minimize_what_they_are_said_to_minimize(procedure):
    form, samples = solve(procedure, target_kl=0.5), 6
    f, ranks = form.density(GRID), binom.pmf(np.arange(samples), samples - 1, GRID[:, None])

    def loss(t):
        mean = ranks @ t
        log_f = mean - logsumexp(mean, b=STEP)
        chance = np.mean(ranks @ t**2 - mean**2) / np.var(np.log(f))
        return np.mean(f * (np.log(f) - log_f)) / form.kl + module.NOISE_PRICE * chance

    found = rank_targets(form, samples)
    best = minimize(loss, np.zeros(samples), method="BFGS", options={"gtol": 1e-9})
    assert loss(found) <= best.fun + 1e-9
    assert found == pytest.approx(best.x - logsumexp(ranks @ best.x, b=STEP), abs=2e-4)


def test_without_a_price_on_chance_the_policy_has_the_ranks_of_the_optimum(monkeypatch):
    exactly(monkeypatch, 1e-9)
    form, samples = solve("best_of(4)", target_kl=0.5), 8
    ranks = binom.pmf(np.arange(samples), samples - 1, GRID[:, None])
    f, fitted = form.density(GRID), np.exp(ranks @ rank_targets(form, samples))
    assert ranks.T @ fitted * STEP == pytest.approx(ranks.T @ f * STEP, abs=1e-5)
    missing = STEP * f @ np.log(f / fitted)
    assert few_samples(form, samples).kl == pytest.approx(form.kl - missing, abs=1e-5)


def test_two_samples_are_exact_for_a_linear_log_density(monkeypatch):
    """sample: log f = u / beta - log Z, whose Bernstein coefficients of degree 1 are its values at 0 and 1."""
    exactly(monkeypatch, 1e-9)
    form = solve("sample", target_kl=0.5)
    assert rank_targets(form, 2) == pytest.approx(form.log_density([0, 1]), abs=1e-5)
    assert few_samples(form, 2).win_rate == pytest.approx(form.win_rate, abs=1e-6)


@pytest.mark.parametrize("procedure", ["sample", "best_of(4)", "worst_of(4)", "0.5 sample + 0.5 best_of(8)"])
def test_more_samples_bring_the_closed_form_nearer_and_never_beyond(procedure):
    form = solve(procedure, target_kl=0.4)
    found = [few_samples(form, samples) for samples in (4, 16, 64, 256)]
    kls = [one.kl for one in found]
    assert kls == sorted(kls) and kls[-1] < form.kl
    assert [one.noise for one in found] == sorted((one.noise for one in found), reverse=True)
    assert found[-1].win_rate == pytest.approx(form.win_rate, abs=0.02)
    assert all(one.win_rate <= one.optimal_win_rate + 1e-9 for one in found)


@pytest.mark.parametrize("samples", [8, 32])
def test_obvious_targets_lose_more(samples):
    """The mean of f over a rank's interval, and both expectations over Beta(i, K + 1 - i): less KL, and less win rate
    at equal KL than the targets of (10)."""
    form = solve("best_of(4)", target_kl=0.5)
    edges, rank = np.arange(samples + 1) / samples, np.arange(1, samples + 1)[:, None]
    posterior = beta_distribution.pdf(GRID, rank, samples + 1 - rank) * STEP
    others = (
        form.log_mean_density(edges[:-1], edges[1:]),
        posterior @ form.log_density(GRID),
        np.log(posterior @ form.density(GRID)),
    )
    ours = rank_targets(form, samples)
    best = solve("best_of(4)", None, RankMean(tuple(ours)), target_kl=form.kl)
    for targets in others:
        assert solve("best_of(4)", None, RankMean(tuple(targets)), beta=1).kl < few_samples(form, samples).kl
        at_equal_kl = solve("best_of(4)", None, RankMean(tuple(targets)), target_kl=form.kl)
        assert at_equal_kl.win_rate < best.win_rate


@pytest.mark.parametrize(
    ("procedure", "transform", "corners"),
    [("early_stop(8, 0.83)", "optimal", [0.83]), ("best_of(4)", "table(0, 3, 1, 2)", [1 / 3, 2 / 3])],
)
def test_targets_of_a_density_that_is_not_smooth_by_adaptive_quadrature(procedure, transform, corners):
    """(10) is stationary at the targets, with every integral of it by scipy, interval by interval."""
    samples, form = 5, solve(procedure, None, transform, target_kl=0.5)
    targets = rank_targets(form, samples)

    def integral(function):
        ends = [0, *corners, 1]
        return sum(quad(function, low, high, epsabs=1e-12, limit=200)[0] for low, high in pairwise(ends))

    def rank(u, i):
        return float(binom.pmf(i, samples - 1, u))

    def mean(u):
        return sum(t * rank(u, i) for i, t in enumerate(targets))

    assert integral(lambda u: np.exp(mean(u))) == pytest.approx(1, abs=1e-9)
    log_f_squared, log_f = (integral(lambda u, k=k: float(form.log_density(u)) ** k) for k in (2, 1))
    price = 2 * NOISE_PRICE * form.kl / (log_f_squared - log_f**2)
    for i, target in enumerate(targets):
        missing = integral(lambda u, i=i: rank(u, i) * (np.exp(mean(u)) - float(form.density(u))))
        chance = integral(lambda u, i=i, target=target: rank(u, i) * (target - mean(u)))
        assert missing + price * chance == pytest.approx(0, abs=1e-7)


def test_ranks_of_very_many_samples_are_taken_together(monkeypatch):
    """They would take K^3: more samples than MOST_RANKS have the targets of so many ranks."""
    form = solve("best_of(4)", target_kl=0.5)
    monkeypatch.setattr(module, "MOST_RANKS", 64)
    places = np.arange(64_000) / 64_000
    found = interval_targets(form, places, places + 1 / 64_000, 64_000)
    assert np.allclose(found, np.repeat(rank_targets(form, 64), 1000))
    assert few_samples(form, 64_000).kl == few_samples(form, 64).kl


def test_interval_targets_are_means_over_ranks():
    form = solve("best_of(2)", target_kl=0.2)
    four = rank_targets(form, 4)
    found = interval_targets(form, [0, 0.25, 0.5, 0.6], [0.25, 0.75, 1, 0.85], 4)
    assert found == pytest.approx([four[0], four[1:3].mean(), four[2:].mean(), 0.6 * four[2] + 0.4 * four[3]])


def test_samples_needed_grow_with_n_and_are_the_fewest(monkeypatch):
    needed = [samples_needed(solve(f"best_of({n})", target_kl=0.5)) for n in (1, 2, 4, 16)]
    assert needed == sorted(needed) and needed[-1] < MOST_SAMPLES
    form = solve("best_of(4)", target_kl=0.5)
    enough, fewer = (few_samples(form, samples) for samples in (needed[2], needed[2] - 1))
    assert enough.kl >= module.ENOUGH * form.kl and enough.noise <= module.MOST_NOISE
    assert fewer.kl < module.ENOUGH * form.kl or fewer.noise > module.MOST_NOISE
    monkeypatch.setattr(module, "MOST_SAMPLES", 40)
    assert samples_needed(form) == needed[2] and samples_needed(solve("best_of(128)", target_kl=1.0)) == 40


def test_one_sample_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        rank_targets(solve("best_of(4)", target_kl=0.5), 1)


def test_command_line(iapo):
    outcome = iapo("transform", "best_of(4)", "--target-kl", "0.5", "--samples", "16", "--json")
    found = json.loads(outcome.out)["few_samples"]
    expected = few_samples(solve("best_of(4)", target_kl=0.5), 16)
    assert (found["samples"], found["kl"], found["win_rate"]) == (16, expected.kl, expected.win_rate)
    assert len(found["targets"]) == 16 and found["samples_needed"] <= 16
    table = iapo("transform", "best_of(4)", "--target-kl", "0.5", "--samples", "16").out
    assert f"{expected.win_rate:.6f}" in table and "among 16 samples" in table
    assert "few_samples" not in json.loads(iapo("transform", "best_of(4)", "--target-kl", "0.5", "--json").out)
    assert iapo("transform", "best_of(4)", "--target-kl", "0.5", "--samples", "1").code == 2
