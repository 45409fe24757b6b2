"""Win rates from samples against the enumeration of every subset that a procedure could draw; KL where it is known."""

from itertools import combinations, permutations

import numpy as np
import pytest

from iapo.calibrate import place
from iapo.closed_form import win_rate_of_cdf
from iapo.errors import UserError
from iapo.estimators import draws, mean_over_prompts, order_weights, prompt_win_rate
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
