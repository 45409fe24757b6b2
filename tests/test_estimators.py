"""Win rates from samples against the enumeration of every subset that a procedure could draw; KL where it is known."""

from itertools import combinations, permutations

import numpy as np
import pytest

from iapo.calibrate import place
from iapo.closed_form import solve, win_rate_of_cdf
from iapo.errors import UserError
from iapo.estimators import draws, kl_estimate, mean_over_prompts, order_weights, prompt_win_rate
from iapo.procedures import Functional, early_stop, parse_procedure

SMALL = {
    "untied": ([0.3, 1.5, -2.0, 0.9, 4.0], [0.1, 0.2, 1.0, -3.0, 2.0, 0.5]),
    "tied": ([1.0, 1.0, 0.0, 2.0, 2.0], [1.0, 0.0, 1.0, 2.0, 2.0, 2.0]),
    "binary": ([1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]),
    "all equal": ([1.0] * 5, [1.0] * 6),
    "as one": ([1.0, 2.0, 2.0, 3.0, 5.0], [1.0, 2.0, 2.0, 3.0, 5.0]),
}
PICK = {
    "sample": (1, lambda subset: subset[0]),
    "best_of(2)": (2, max),
    "best_of(4)": (4, max),
    "worst_of(3)": (3, min),
    "kth(2, 3)": (3, lambda subset: sorted(subset)[1]),
    "kth(1, 4)": (4, min),
}


def outcomes(procedure: str, rewards: list[float]) -> list[float]:
    """What the procedure returns on each of the equally likely subsets."""
    size, pick = PICK[procedure]
    return [pick(subset) for subset in combinations(rewards, size)]


def enumerated(mine: list[float], theirs: list[float]) -> float:
    return float(np.mean([(a > b) + (a == b) / 2 for a in mine for b in theirs]))


@pytest.mark.parametrize("data", SMALL)
@pytest.mark.parametrize("opponent", PICK)
@pytest.mark.parametrize("procedure", PICK)
def test_win_rate_equals_enumeration(procedure, opponent, data):
    mine, theirs = (np.array(part) for part in SMALL[data])
    weights = (order_weights(parse_procedure(procedure), mine), order_weights(parse_procedure(opponent), theirs))
    expected = enumerated(outcomes(procedure, SMALL[data][0]), outcomes(opponent, SMALL[data][1]))
    assert prompt_win_rate(mine, theirs, *weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("procedure", [*PICK, "best_of_poisson(3)"])
def test_weights_are_a_distribution_and_give_one_half_against_themselves(procedure):
    weights = order_weights(parse_procedure(procedure), np.linspace(0, 1, 7))
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1)
    rewards = np.random.default_rng(0).normal(size=7)
    assert prompt_win_rate(rewards, rewards, weights, weights) == pytest.approx(0.5)
    assert prompt_win_rate(rewards + 100, rewards, weights, weights) == pytest.approx(1)


def test_unbiased_over_draws_of_the_samples():
    """best_of(3) of N(0.5, 1) against best_of(3) of N(0, 1): U-statistics of 5 samples against direct play.

    Both are means of 20,000 independent numbers of standard deviation at most 1/2: within 5 standard errors of
    0.005, odds of a false alarm below 1e-6.
    """
    generator, weights = np.random.default_rng(1), order_weights(parse_procedure("best_of(3)"), np.zeros(5))
    mine, theirs = generator.normal(0.5, 1, (20_000, 5)), generator.normal(0, 1, (20_000, 5))
    estimated = np.mean([prompt_win_rate(a, b, weights, weights) for a, b in zip(mine, theirs, strict=True)])
    games = generator.normal(0.5, 1, (20_000, 3)).max(1) > generator.normal(0, 1, (20_000, 3)).max(1)
    assert estimated == pytest.approx(games.mean(), abs=0.025)


@pytest.mark.parametrize(("n", "tau"), [(1, 0.5), (3, 0.5), (3, 0.9), (3, 0.05), (5, 0.5)])
def test_early_stop_against_every_order_of_draws(n, tau):
    places = np.array([0.55, 0.1, 0.3, 0.8, 0.95])
    came_out = []
    for drawn in permutations(places, n):
        hits = [place for place in drawn if place >= tau]
        came_out.append(hits[0] if hits else max(drawn))
    expected = [np.mean(np.isclose(came_out, place)) for place in np.sort(places)]
    np.testing.assert_allclose(order_weights(early_stop(n, tau), places), expected, atol=1e-14)


def test_early_stop_win_rate_is_consistent():
    """Policy of density 2u against the uniform reference, 400 samples a side and 40 prompts: within 5 standard errors.

    The threshold is the reference samples' own, so that the estimate is biased by O(1/400), 0.003 here.
    """
    procedure, generator = early_stop(4, 0.7), np.random.default_rng(0)
    values = []
    for _ in range(40):
        mine, theirs = generator.random(400) ** 0.5, generator.random(400)
        places = [
            place(np.sort(theirs), np.sort(mine), among=False),
            place(np.sort(theirs), np.sort(theirs), among=True),
        ]
        weights = [order_weights(procedure, one.calibrated) for one in places]
        values.append(prompt_win_rate(mine, theirs, *weights))
    exact = win_rate_of_cdf(lambda u: np.asarray(u) ** 2, procedure)
    assert np.mean(values) == pytest.approx(exact, abs=5 * np.std(values) / 40**0.5 + 0.003)


def test_a_functional_without_an_estimator_is_refused():
    class Other(Functional):
        def __str__(self):
            return "other"

    with pytest.raises(UserError, match="other: no estimator of its win rate"):
        order_weights(Other(), np.zeros(4))


def test_too_few_samples():
    with pytest.raises(UserError, match=r"best_of\(8\) draws 8 and there are 4 samples.*evaluate\.samples_per_prompt"):
        order_weights(parse_procedure("best_of(8)"), np.zeros(4))


@pytest.mark.parametrize(
    "procedure, expected",
    [
        ("sample", 1),
        ("best_of(8)", 8),
        ("worst_of(3)", 3),
        ("kth(2, 5)", 5),
        ("best_of_poisson(2)", None),
        ("early_stop(6, 0.5)", 6),
    ],
)
def test_draws(procedure, expected):
    assert draws(parse_procedure(procedure)) == expected


def test_mean_over_prompts_by_hand():
    estimate = mean_over_prompts(np.array([0.0, 1.0, 2.0, 5.0]))
    assert estimate.value == 2
    assert estimate.se == pytest.approx((14 / 3 / 4) ** 0.5)  # squared deviations 4 + 1 + 0 + 9
    assert 0 <= estimate.low < 2 < estimate.high <= 5


def test_bootstrap_interval_agrees_with_the_normal_one_and_covers():
    """Of 200 intervals of a mean of 60 about 190 cover it (at 60 values slightly fewer): 170 or fewer is p < 1e-6."""
    generator = np.random.default_rng(0)
    estimates = [mean_over_prompts(generator.normal(0.6, 0.2, 60), seed) for seed in range(200)]
    widths = [(e.high - e.low) / (2 * 1.96 * e.se) for e in estimates]
    assert np.mean(widths) == pytest.approx(1, abs=0.05)
    assert sum(e.low <= 0.6 <= e.high for e in estimates) > 170


def test_equal_values_have_no_spread_and_the_seed_decides():
    estimate = mean_over_prompts(np.full(5, 0.5))
    assert (estimate.value, estimate.se, estimate.low, estimate.high) == (0.5, 0, 0.5, 0.5)
    values = np.random.default_rng(0).random(30)
    assert mean_over_prompts(values, 1) == mean_over_prompts(values, 1) != mean_over_prompts(values, 2)


def test_one_prompt_alone_has_no_standard_error():
    assert mean_over_prompts(np.array([0.7])).se == float("inf")


def test_control_variate_is_unbiased_and_tighter():
    """Δ ~ N(κ, 2κ) under the policy has E[e^−Δ] = 1, as log-ratios have, and KL κ."""
    kl = 0.5
    draws = np.random.default_rng(0).normal(kl, np.sqrt(2 * kl), (400, 96, 16))
    estimates = np.array([kl_estimate(one) for one in draws])
    assert abs(estimates[:, 0].mean() - kl) < 0.005  # of which three standard errors are 0.003
    assert estimates[:, 0].std() < 0.8 * draws.mean(axis=(1, 2)).std()
    assert estimates[:, 1].mean() == pytest.approx(estimates[:, 0].std(), rel=0.15)


def policy_of(procedure: str, kl: float, prompts: int, samples: int, generator) -> np.ndarray:
    """Δ = log f(u), u ~ f, of the optimum: its KL is known exactly."""
    form = solve(procedure, target_kl=kl)
    u = np.unique(np.r_[0, np.geomspace(1e-14, 0.5, 20_000), 1 - np.geomspace(1e-14, 0.5, 20_000)])
    return form.log_density(np.interp(generator.random((prompts, samples)), form.cdf(u), u))


@pytest.mark.parametrize(
    ("procedure", "kl", "tighter"),
    [("best_of(4)", 0.5, 0.5), ("best_of(16)", 1.0, 0.5), ("worst_of(4)", 0.5, 1.05), ("worst_of(16)", 0.5, 1.05)],
)
def test_intervals_of_the_kl_cover_it(procedure, kl, tighter):
    """95 % intervals of 400 evaluations: 360 or fewer by chance is p < 1e-5. best_of has half the plain error or less;
    worst_of, whose e^−Δ are rare and huge, is left alone: with it as a control variate these cover 40 % and 5 %."""
    generator = np.random.default_rng(1)
    draws = policy_of(procedure, kl, 400 * 128, 32, generator).reshape(400, 128, 32)
    values, errors = np.array([kl_estimate(one) for one in draws]).T
    assert np.sum(np.abs(values - kl) < 1.96 * errors) > 360
    assert values.std() < tighter * draws.mean(axis=(1, 2)).std()


@pytest.mark.parametrize(("kl", "prompts"), [(0.1, 128), (0.5, 128), (2.0, 64)])
def test_intervals_cover_where_prompts_differ_in_kl(kl, prompts):
    """Prompts are a sample too: their own KLs scatter by a factor of two about the mean."""
    generator = np.random.default_rng(2)
    own = kl * np.exp(0.7 * generator.normal(size=(400, prompts, 1)) - 0.7**2 / 2)
    draws = own + np.sqrt(2 * own) * generator.normal(size=(400, prompts, 32))
    values, errors = np.array([kl_estimate(one) for one in draws]).T
    assert np.sum(np.abs(values - kl) < 1.96 * errors) > 350  # of a skew mean of 64, plain intervals cover 370


def test_responses_that_are_cut_are_events_of_their_own():
    """E[e^−Δ] = 1 over the responses of two Markov chains of which most are cut at a length, by enumeration; the KL by
    the control variate, from samples, is theirs."""
    generator = np.random.default_rng(3)
    reference, policy = (generator.dirichlet([3, 3, 1], size=3) for _ in range(2))  # next token, by token; 2 ends
    longest, events = 5, []

    def extend(tokens: tuple[int, ...], p: float, q: float) -> None:
        if len(tokens) == longest or (tokens and tokens[-1] == 2):
            events.append((p, q))
            return
        for token in range(3):
            last = tokens[-1] if tokens else 0
            extend((*tokens, token), p * policy[last, token], q * reference[last, token])

    extend((), 1.0, 1.0)
    p, q = np.array(events).T
    assert p.sum() == pytest.approx(1) and (p * (q / p)).sum() == pytest.approx(1)
    kl = float(p @ np.log(p / q))
    drawn = generator.choice(len(p), p=p, size=(128, 64))
    value, error = kl_estimate(np.log(p / q)[drawn])
    plain = np.log(p / q)[drawn].mean(axis=1).std() / 128**0.5
    assert error < 0.8 * plain and abs(value - kl) < 4 * error


def test_a_policy_that_is_the_reference_has_no_kl():
    assert kl_estimate(np.zeros((4, 8))) == (0.0, 0.0)


def test_far_from_the_reference_the_log_ratios_speak_for_themselves():
    """No sample of Δ ~ N(κ, 2κ) shows the e^−Δ that its mean of 1 consists of: it would be noise as a control."""
    draws = np.random.default_rng(0).normal(80, np.sqrt(160), (96, 16))
    value, error = kl_estimate(draws)
    assert value == pytest.approx(draws.mean()) and error == pytest.approx(mean_over_prompts(draws.mean(axis=1)).se)
