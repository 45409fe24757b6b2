"""One beta for all prompts where rewards tie: by hand, by brute force, by the targets it leads to, and in a run."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from iapo.atoms import (
    Aim,
    atom_kl,
    atom_log_density,
    atom_win_rate,
    beta_at_kl,
    kl_at,
    means_of,
    most_win_rate,
    prompts_with,
    win_rate_at,
)
from iapo.calibrate import calibrate
from iapo.closed_form import solve
from iapo.config import ObjectiveConfig, load_config
from iapo.errors import UserError
from iapo.goal import MOST_KL, solve_goal, training_goal, untied_form
from iapo.levels import level_counts, share_at_the_top, tied_levels, which_tie
from iapo.procedures import pairings, parse_procedure
from iapo.store import read_manifest
from iapo.targets import log_density_targets, solve_objective
from iapo.transforms import Optimal

MIXED = [
    np.repeat([0.0, 1.0], [6, 2]),
    np.repeat([0.0, 1.0], [3, 5]),
    np.repeat([0.0, 2.0, 3.0], [4, 3, 1]),
    np.array([0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    np.array([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    np.ones(8),
]
"""Three prompts that mostly tie, two that do not, and one that teaches nothing."""


def goal(rewards, **objective):
    return solve_goal(ObjectiveConfig(**{"procedure": "best_of(4)"} | objective), rewards)


def targets(rewards, form):
    """Targets of the reference samples, (prompts, K), by the way that training takes."""
    rows = [
        {"prompt_id": f"p{prompt}", "sample_id": number, "source": "reference", "reward": reward}
        for prompt, of_prompt in enumerate(rewards)
        for number, reward in enumerate(of_prompt)
    ]
    return log_density_targets(calibrate(pd.DataFrame(rows))[1], form).reshape(len(rewards), -1)


def test_pass_at_4_by_hand():
    """Pass rate 0.2 at 0.207235 nats: beta is 0.2, and 0.670528 is won (test_atoms)."""
    found = goal([np.repeat([0.0, 1.0], [4, 1])] * 400, target_kl=0.207235)
    assert found.form.beta == pytest.approx(0.2, rel=1e-4)
    assert (found.kl, found.tied_prompts) == (0.207235, 400)
    assert found.win_rate == pytest.approx(0.670528, abs=0.005)
    assert np.exp(targets([[0, 0, 0, 0, 1]], found.form)[0, [0, 4]]) == pytest.approx([0.639590, 2.441641], abs=1e-4)


@pytest.mark.parametrize("kl", [0.05, 0.4])
@pytest.mark.parametrize(("procedure", "opponent"), [("best_of(8)", None), ("best_of(4)", "sample")])
def test_targets_are_the_best_policy_of_that_mean_kl(procedure, opponent, kl):
    """Of all policies on the levels of three prompts: the one that SLSQP finds has the same log-ratios."""
    form = goal(MIXED[:3], procedure=procedure, opponent=opponent, target_kl=kl).form
    masses = level_counts(MIXED[:3])
    pairs, some = pairings(form.procedure, form.opponent), masses > 0
    shares = masses / masses.sum(axis=1, keepdims=True)

    def log_f(x):
        logits = np.zeros(masses.shape)
        logits[some] = x
        return logits - logsumexp(logits, b=shares, axis=1, keepdims=True)

    best = minimize(
        lambda x: -atom_win_rate(masses, log_f(x), pairs).mean(),
        np.tile([0.0, 0.5, 0.9], 3)[: some.sum()],
        constraints=[{"type": "eq", "fun": lambda x: atom_kl(masses, log_f(x)).mean() - kl}],
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-13},
    )
    assert atom_kl(masses, log_f(best.x)).mean() == pytest.approx(kl, abs=1e-7)
    assert atom_log_density(masses, form)[some] == pytest.approx(log_f(best.x)[some], abs=2e-3)


@pytest.mark.parametrize("transform", ["optimal", "identity", "exp_tilt(10)"])
@pytest.mark.parametrize(("procedure", "kl"), [("best_of(4)", 0.4), ("worst_of(3)", 0.1), ("early_stop(4, 0.8)", 0.4)])
def test_the_targets_have_the_kl_that_was_asked_for(procedure, kl, transform):
    """The mean over prompts of sum of e^t t / K; those without ties count with the closed form that they have."""
    found = goal(MIXED, procedure=procedure, transform=transform, target_kl=kl)
    t = targets(MIXED[:3], found.form)
    assert np.exp(t).mean(axis=1) == pytest.approx(1)
    mean = (np.sum(np.exp(t) * t, axis=1).sum() / 8 + 2 * found.form.kl) / 5
    assert mean == pytest.approx(kl, rel=1e-4) and (found.kl, found.tied_prompts) == (kl, 3)
    continuous = solve(procedure, None, transform, target_kl=kl)
    naive = targets(MIXED[:3], continuous)
    assert np.sum(np.exp(naive) * naive, axis=1).mean() / 8 < 0.85 * kl  # what the beta of the closed form gives


@pytest.mark.parametrize("knob", [{"target_kl": 0.3}, {"beta": 0.2}, {"target_win_rate": 0.7}])
def test_without_ties_the_goal_is_the_closed_form(knob):
    found, form = goal(MIXED[3:], **knob), solve_objective(ObjectiveConfig(procedure="best_of(4)", **knob))
    assert (found.form, found.kl, found.win_rate, found.tied_prompts) == (form, form.kl, form.win_rate, 0)
    assert untied_form(ObjectiveConfig(procedure="best_of(4)", **knob), found.record()) == form


def test_a_configured_beta_stays_what_it_is():
    found, masses = goal(MIXED, beta=0.2), level_counts(MIXED[:3])
    assert found.form == solve("best_of(4)", beta=0.2)
    tied = atom_kl(masses, atom_log_density(masses, found.form)).sum()
    assert found.kl == pytest.approx((tied + 2 * found.form.kl) / 5)


def test_win_rates_are_those_that_evaluate_compares_with():
    """By the levels that prompts have, of which eight samples do not show all: more than by those that they show."""
    generator = np.random.default_rng(0)
    rewards = [np.sort(generator.binomial(4, rate, 8)).astype(float) for rate in generator.beta(2, 4, 300)]
    by_kl, best = goal(rewards, target_kl=0.3), parse_procedure("best_of(4)")
    levels, untied = tied_levels(rewards, 0)
    assert by_kl.win_rate == pytest.approx(most_win_rate(levels, untied, best, best, 0.3), abs=1e-4)
    teaching = [one for one in rewards if one[0] < one[-1]]
    tied = [one for one, ties in zip(teaching, which_tie(teaching), strict=True) if ties]
    shown = prompts_with(level_counts(tied), len(teaching) - len(tied))
    by_samples = means_of(shown, Aim(best, best, Optimal()), by_kl.form.beta)
    assert by_samples.kl == pytest.approx(0.3, rel=1e-4) and by_samples.win_rate < by_kl.win_rate - 0.02
    by_win_rate = goal(rewards, target_win_rate=by_kl.win_rate)
    assert by_win_rate.kl == pytest.approx(0.3, rel=1e-3)
    assert by_win_rate.form.beta == pytest.approx(by_kl.form.beta, rel=1e-2)


def test_more_kl_than_there_is_is_lowered_with_a_warning(caplog):
    """Half pass: always passing takes log 2. Prompts of equal rewards do not count."""
    rewards = [np.repeat([0.0, 1.0], [4, 4])] * 3 + [np.zeros(8)] * 2
    with caplog.at_level(logging.WARNING):
        within = goal(rewards, target_kl=0.6)
        assert not caplog.records
        beyond = goal(rewards, target_kl=2.0)
    (record,) = caplog.records
    assert "2 nats asked for" in record.getMessage() and "little more than 0.658" in record.getMessage()
    assert within.kl == 0.6 and beyond.kl == pytest.approx(MOST_KL * np.log(2))
    t = targets(rewards[:1], beyond.form)
    assert np.mean(np.exp(t) * t) == pytest.approx(beyond.kl, rel=1e-3) and t.min() > -6


def test_prompts_without_ties_can_spend_what_others_cannot(caplog):
    """A tied prompt among three that are not: 2 nats are had."""
    rewards = [MIXED[0], *[MIXED[3]] * 3]
    found = goal(rewards, target_kl=2.0)
    assert found.kl == 2 and not caplog.records
    t = targets(rewards[:1], found.form)
    assert (np.mean(np.exp(t) * t) + 3 * found.form.kl) / 4 == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("win_rate", [0.45, 0.85])
def test_a_win_rate_out_of_reach_is_refused_in_one_line(win_rate):
    """Half pass: who always does under best_of(4) wins (1 + 1/16)/2."""
    with pytest.raises(UserError, match=r"target_win_rate = 0\.\d5 given; .* own 0\.5 and less than 0\.5") as caught:
        goal([np.repeat([0.0, 1.0], [400, 400])] * 3, target_win_rate=win_rate)
    assert "\n" not in str(caught.value)


def test_where_the_kl_jumps_the_side_of_more_is_taken():
    """worst_of is not concave: with 6 of 8 that fail no beta gives 0.3 nats; the optimum jumps from none to log 4."""
    worst = parse_procedure("worst_of(8)")
    prompts, aim = prompts_with([[6, 2]], 0), Aim(worst, worst, Optimal())
    kls = np.array([means_of(prompts, aim, beta).kl for beta in np.geomspace(0.02, 5, 60)])
    assert not np.any((kls > 1e-3) & (kls < 1.38))
    beta = beta_at_kl(prompts, aim, 0.3)
    assert means_of(prompts, aim, beta).kl == pytest.approx(np.log(4), abs=1e-3)
    assert means_of(prompts, aim, 1.001 * beta).kl < 1e-3
    masses, untied = np.array([[6.0, 2.0]]), 0
    bound = win_rate_at(prompts, aim, 0.3)
    assert bound == most_win_rate(masses, untied, worst, worst, 0.3)
    assert kl_at(prompts, aim, bound) == pytest.approx(0.3, rel=1e-4)
    found = goal([np.repeat([0.0, 1.0], [6, 2])] * 50, procedure="worst_of(8)", target_kl=0.3)
    assert found.kl == 0.3 and found.form.beta == pytest.approx(beta)


def test_levels_by_hand():
    rewards = [np.array([0.0, 0.0, 2.0]), np.array([1.0, 2.0, 3.0, 3.0]), np.ones(2)]
    assert level_counts(rewards).tolist() == [[2, 1, 0], [1, 1, 2], [2, 0, 0]]
    assert share_at_the_top(rewards) == pytest.approx([1 / 3, 1 / 2, 1])
    assert which_tie(rewards).tolist() == [True, False, True] and which_tie([]).tolist() == []


def test_a_run_with_a_verifier(tiny_run, letters_model, iapo):
    """The manifest has the one beta, training meets the KL, and the report tells both."""
    path = tiny_run(
        model={"base": str(letters_model), "quantization": "none"},
        reward={"function": "tiny_rewards:begins_with_ascii"},
        train={"epochs": 1, "learning_rate": 3e-3},
        objective={"target_kl": 0.15},
    )
    stages = ("prompts", "sample", "score", "calibrate", "train", "evaluate", "report")
    assert [iapo(stage, path).code for stage in stages] == [0] * 7
    config = load_config(path)
    record = read_manifest(config.run, "train")
    assert record is not None
    found = training_goal(config)
    assert record["closed_form"] == json.loads(json.dumps(found.record()))
    assert found.tied_prompts > 10 and found.kl == 0.15
    assert found.form.beta < 0.9 * solve("best_of(4)", target_kl=0.15).beta
    assert record["scale"]["kl"] == pytest.approx(0.15, rel=0.1)
    page = (config.run / "report.html").read_text()
    assert f"Most rewards tie on {found.tied_prompts} training prompts" in page
    assert f"<td>{found.form.beta:.4f}</td>" in page and f"<td>{found.win_rate:.3f}</td>" in page
