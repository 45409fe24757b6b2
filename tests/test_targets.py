"""Targets: those of ranks where rewards differ, equation (8) where most of them tie."""

import numpy as np
import pandas as pd
import pytest

from iapo.atoms import atom_log_density
from iapo.calibrate import calibrate
from iapo.closed_form import solve
from iapo.config import ObjectiveConfig
from iapo.errors import UserError
from iapo.few_samples import rank_targets
from iapo.prompts import GIVEN_FIRST_ID
from iapo.targets import log_density_targets, solve_objective


def calibrated(given: dict[str, list[float]] | None = None, **prompts: list[float]) -> pd.DataFrame:
    rows = [
        {"prompt_id": name, "sample_id": number + first, "source": source, "reward": reward}
        for source, first, group in (("reference", 0, prompts), ("given", GIVEN_FIRST_ID, given or {}))
        for name, rewards in group.items()
        for number, reward in enumerate(rewards)
    ]
    return calibrate(pd.DataFrame(rows).sort_values(["prompt_id", "sample_id"], ignore_index=True))[1]


def test_binary_verifier_gives_pass_at_n():
    # pass rate 0.2, best_of(4), beta 0.2: f = (0.639590, 2.441641), as solved by hand for two atoms
    frame = calibrated(x=[0, 1, 0, 0, 0], given={"x": [1, 0, 0.5]})
    targets = log_density_targets(frame, solve("best_of(4)", beta=0.2))
    low, high = np.log(0.639590), np.log(2.441641)
    assert targets[:7] == pytest.approx([low, high, low, low, low, high, low], abs=1e-5)
    assert low < targets[7] < high  # a given reward that no sample had


def test_without_ties_a_rank_has_its_target():
    form = solve("best_of(4)", target_kl=0.5)
    targets = log_density_targets(calibrated(x=[30.0, 10.0, 20.0, 40.0], y=[1.0, 2.0]), form)
    assert targets == pytest.approx([*rank_targets(form, 4)[[2, 0, 1, 3]], *rank_targets(form, 2)])


@pytest.mark.parametrize("knob", ["target_kl", "target_win_rate", "beta"])
def test_each_knob_of_the_configuration_fixes_the_same_closed_form(knob):
    form = solve("best_of(4)", "sample", target_win_rate=0.85)
    value = {"target_kl": form.kl, "target_win_rate": 0.85, "beta": form.beta}[knob]
    found = solve_objective(ObjectiveConfig(procedure="best_of(4)", opponent="sample", **{knob: value}))
    assert found.win_rate == pytest.approx(0.85, abs=1e-9) and found.kl == pytest.approx(form.kl, rel=1e-7)


def test_a_win_rate_that_cannot_be_reached_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"target_win_rate = 0\.6 given; more than the reference's own 0\.8") as caught:
        solve_objective(ObjectiveConfig(procedure="best_of(4)", opponent="sample", target_win_rate=0.6))
    assert "\n" not in str(caught.value)


def test_given_responses_are_one_more():
    form = solve("best_of(2)", target_kl=0.2)
    targets = log_density_targets(calibrated(x=[1.0, 2.0, 3.0], given={"x": [2.5, 9.0, 2.0]}), form)
    four = rank_targets(form, 4)
    assert targets[3:] == pytest.approx([four[2], four[3], (four[1] + four[2]) / 2])  # the last ties with a sample


@pytest.mark.parametrize("transform", ["optimal", "identity"])
def test_a_few_ties_share_the_mean_of_their_ranks_and_many_are_atoms(transform):
    form = solve("best_of(2)", None, transform, target_kl=0.4)
    few, many = [1.0, 1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0, 4.0]
    targets = log_density_targets(calibrated(few=few, many=many), form)
    five = rank_targets(form, 5)
    assert targets[:5] == pytest.approx([five[:2].mean(), five[:2].mean(), *five[2:]])
    assert targets[[5, 7, 9]] == pytest.approx(atom_log_density([[2, 2, 1]], form)[0])
    assert np.exp(targets[5:]).mean() == pytest.approx(1, abs=1e-9)


def test_targets_of_a_functional_are_finite_and_ties_share_the_mean_of_f():
    form = solve("early_stop(8, 0.8)", target_kl=0.4)
    targets = log_density_targets(calibrated(a=[3.0, 1.0, 2.0, 0.5], b=[1.0, 1.0, 2.0, 2.0]), form)
    assert targets[:4] == pytest.approx(rank_targets(form, 4)[[3, 1, 2, 0]])
    halves = form.log_mean_density([0, 0.5], [0.5, 1])
    assert targets[4:] == pytest.approx(halves[[0, 0, 1, 1]], abs=1e-12)


def test_many_prompts_at_once_are_as_one_by_one():
    generator = np.random.default_rng(3)
    prompts = {
        f"p{n}": list(generator.integers(0, 1 + n % 7, size=4 + n % 3) + (n % 2) * generator.random(4 + n % 3))
        for n in range(60)
    }
    form = solve("worst_of(3)", target_kl=0.3)
    at_once = log_density_targets(calibrated(**prompts), form)
    one_by_one = [log_density_targets(calibrated(**{name: rewards}), form) for name, rewards in sorted(prompts.items())]
    assert at_once == pytest.approx(np.concatenate(one_by_one))


def test_a_place_between_ranks_has_a_target_between_theirs():
    form = solve("best_of(4)", target_kl=0.5)
    frame = calibrated(x=[1.0, 2.0, 3.0]).assign(tie_low=[0.0, 0.3, 0.875], tie_high=[0.125, 0.425, 1.0], samples=8)
    eight = rank_targets(form, 8)
    assert log_density_targets(frame, form) == pytest.approx([eight[0], 0.6 * eight[2] + 0.4 * eight[3], eight[7]])
