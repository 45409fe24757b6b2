"""The most that can be won at a mean KL where rewards tie: by hand, by brute force, and where none tie."""

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.special import logsumexp

from iapo.atoms import atom_kl, atom_win_rate, most_win_rate, mostly_tied
from iapo.closed_form import optimal_win_rate, solve
from iapo.evaluate import closed_form_win_rate, tied_levels
from iapo.levels import draw_masses
from iapo.procedures import pairings, parse_procedure

BEST = parse_procedure("best_of(4)")


def test_binary_rewards_by_hand():
    """pass@4 at a pass rate of 0.2: the numbers of test_atoms at beta = 0.2; then all prompts at the top."""
    alone = [[0.8, 0.2]]
    assert most_win_rate(alone, 0, BEST, BEST, 0.207235) == pytest.approx(0.670528, abs=2e-6)
    with_equal_rewards = [[8, 2], [10, 0], [8, 2], [0, 10]]
    assert most_win_rate(with_equal_rewards, 0, BEST, BEST, 0.207235 / 2) == pytest.approx(
        (0.670528 + 0.5) / 2, abs=2e-6
    )
    always = 0.8**4 + (1 - 0.8**4) / 2
    for kl in (np.log(5), 2.0, 10.0):
        assert most_win_rate(alone, 0, BEST, BEST, kl) == pytest.approx(always, abs=2e-6)


@pytest.mark.parametrize("kl", [1e-3, 0.1, 0.6])
def test_one_binary_prompt_has_one_policy_at_each_kl(kl):
    passes = brentq(lambda q: q * np.log(q / 0.2) + (1 - q) * np.log((1 - q) / 0.8) - kl, 0.2, 1 - 1e-12)
    won, tied = 0.8**4 * (1 - (1 - passes) ** 4), 0.8**4 * (1 - passes) ** 4 + (1 - 0.8**4) * (1 - (1 - passes) ** 4)
    assert most_win_rate([[0.8, 0.2]], 0, BEST, BEST, kl) == pytest.approx(won + tied / 2, abs=1e-9)


def test_the_reference_itself_against_another_opponent_by_hand():
    """The best of 2 against one sample, pass rate 0.2: it passes 0.36 of the time; and the same without ties, 2/3."""
    two, one = parse_procedure("best_of(2)"), parse_procedure("sample")
    tied = 0.36 * 0.8 + (0.36 * 0.2 + 0.64 * 0.8) / 2
    assert most_win_rate([[4, 1]], 0, two, one, 0) == pytest.approx(tied)
    assert most_win_rate([[4, 1]], 3, two, one, 0) == pytest.approx((tied + 3 * 2 / 3) / 4)
    assert most_win_rate([[4, 1], [0, 7]], 0, BEST, BEST, 0) == pytest.approx(0.5)


def largest_by_brute_force(masses, pairs, kl):
    """max of mean W under mean KL = kl over every policy on the atoms, from many starts."""
    random = np.random.default_rng(3)

    def log_f(x):
        logits = np.reshape(x, masses.shape)
        return logits - logsumexp(logits, b=masses, axis=1, keepdims=True)

    constraint = {"type": "eq", "fun": lambda x: atom_kl(masses, log_f(x)).mean() - kl}
    found = []
    for scale in (0.3, 1, 1, 2, 2, 3):
        start = scale * random.normal(size=masses.size)
        result = minimize(
            lambda x: -atom_win_rate(masses, log_f(x), pairs).mean(),
            start,
            constraints=[constraint],
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        if abs(constraint["fun"](result.x)) < 1e-7:
            found.append(-result.fun)
    return max(found)


@pytest.mark.parametrize("kl", [0.05, 0.4])
@pytest.mark.parametrize(("procedure", "opponent"), [("best_of(8)", "best_of(8)"), ("best_of(4)", "sample")])
def test_against_every_policy_on_a_few_prompts(procedure, opponent, kl):
    masses = np.array([[0.5, 0.3, 0.2], [0.85, 0.1, 0.05], [0.1, 0.2, 0.7]])
    policy, against = parse_procedure(procedure), parse_procedure(opponent)
    most = most_win_rate(masses, 0, policy, against, kl)
    assert most == pytest.approx(largest_by_brute_force(masses, pairings(policy, against), kl), abs=1e-6)


@pytest.mark.parametrize("kl", [0.05, 0.4])
def test_a_bound_where_no_beta_gives_the_kl(kl):
    """worst_of is not concave: nothing wins more, and what the two optima of one beta mix to is not far."""
    masses = np.array([[0.5, 0.3, 0.2], [0.85, 0.1, 0.05]])
    worst = parse_procedure("worst_of(4)")
    best = largest_by_brute_force(masses, pairings(worst), kl)
    assert best - 1e-6 <= most_win_rate(masses, 0, worst, worst, kl) < best + 0.02


def test_prompts_with_and_without_ties_share_one_beta():
    masses, beta = np.array([[0.8, 0.2]]), 0.2
    form = solve("best_of(4)", beta=beta)
    kl, win_rate = (0.207235 + 3 * form.kl) / 4, (0.670528 + 3 * form.win_rate) / 4
    assert most_win_rate(masses, 3, BEST, BEST, kl) == pytest.approx(win_rate, abs=2e-6)


@pytest.mark.parametrize("kl", [0.1, 1.0])
def test_fine_atoms_tend_to_the_closed_form(kl):
    errors = [
        abs(most_win_rate(np.ones((1, n)), 0, BEST, BEST, kl) - optimal_win_rate(BEST, None, kl)) for n in (25, 100)
    ]
    assert errors[1] < 0.3 * errors[0] and errors[1] < 5e-3


def test_which_prompts_are_tied():
    assert mostly_tied([0, 0, 1, 1, 1, 2, 2], [1, 0, 1, 1, 0, 0, 0]).tolist() == [False, True, False]
    masses, untied = tied_levels([np.repeat([0.0, 1.0], [80_000, 20_000]), np.arange(4.0), np.zeros(3), np.arange(3.0)])
    assert len(masses) == 2 and untied == 2
    np.testing.assert_allclose(masses[0], [0.8, 0.2], atol=0.01)  # with many samples, their shares


def test_evaluate_compares_with_what_the_prompts_allow():
    """No ties: equation (4). All tied: much less. Functionals of F, to which (8) does not apply: (4)."""
    none, binary = tied_levels([np.arange(8.0)]), (np.array([[0.8, 0.2]]), 0)
    assert closed_form_win_rate(BEST, BEST, 0.3, none) == optimal_win_rate(BEST, BEST, 0.3)
    assert closed_form_win_rate(BEST, BEST, 0.207235, binary) == pytest.approx(0.670528, abs=2e-6)
    early = parse_procedure("early_stop(4, 0.8)")
    assert closed_form_win_rate(early, early, 0.3, binary) == optimal_win_rate(early, early, 0.3)


def test_levels_that_few_samples_did_not_show():
    """Known masses, 16 samples a prompt, best_of(8): drawn masses allow what the true ones do, shares do not."""
    generator = np.random.default_rng(0)
    best = parse_procedure("best_of(8)")
    true = generator.dirichlet([4, 3, 2, 0.7, 0.3], size=80)
    rewards = [generator.choice(5.0 + np.arange(5), size=16, p=masses) for masses in true]
    shares = np.array([[np.mean(one == level) for level in 5.0 + np.arange(5)] for one in rewards])
    shares = np.take_along_axis(shares, np.argsort(shares == 0, axis=1, kind="stable"), axis=1)
    possible, drawn, sampled = (
        most_win_rate(masses, 0, best, best, 0.25) for masses in (true, draw_masses(rewards, 0), shares)
    )
    assert drawn == pytest.approx(possible, abs=0.03) and sampled < possible - 0.08


def test_prompts_with_nothing_in_common_keep_their_own_shares():
    rewards = [np.repeat([0.0, 1.0], [300, 100]), np.repeat([2.0, 3.0], [100, 300])]
    masses = draw_masses(rewards, 0)
    np.testing.assert_allclose(masses[masses > 1e-3], [0.75, 0.25, 0.25, 0.75], atol=0.08)
    assert masses[masses < 1e-3].sum() < 1e-3
