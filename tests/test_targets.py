"""Targets: intervals where rewards differ, equation (8) where they tie."""

import numpy as np
import pandas as pd
import pytest

from iapo.calibrate import calibrate
from iapo.closed_form import solve
from iapo.prompts import GIVEN_FIRST_ID
from iapo.targets import log_density_targets


def calibrated(**prompts: list[float]) -> pd.DataFrame:
    rows = [
        {"prompt_id": name, "sample_id": number, "source": "reference", "reward": reward}
        for name, rewards in prompts.items()
        for number, reward in enumerate(rewards)
    ]
    return calibrate(pd.DataFrame(rows))[1]


def test_binary_verifier_gives_pass_at_n():
    # pass rate 0.2, best_of(4), beta 0.2: f = (0.639590, 2.441641), as solved by hand for two atoms
    frame = calibrated(x=[0, 1, 0, 0, 0])
    targets = log_density_targets(frame, solve("best_of(4)", beta=0.2))
    low, high = np.log(0.639590), np.log(2.441641)
    assert targets == pytest.approx([low, high, low, low, low], abs=1e-5)


@pytest.mark.parametrize("transform", ["optimal", "identity"])
def test_targets_are_normalized_with_and_without_ties(transform):
    frame = calibrated(
        none=[3.0, 1.0, 2.0, 0.5, 9.0, 4.0], some=[1.0, 1.0, 2.0, 2.0, 2.0, 5.0], binary=[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    )
    frame["f"] = np.exp(log_density_targets(frame, solve("best_of(2)", None, transform, target_kl=0.4)))
    assert frame.groupby("prompt_id")["f"].mean().to_numpy() == pytest.approx(np.ones(3), abs=1e-8)
    for _, group in frame.groupby("prompt_id"):
        ordered = group.sort_values("calibrated_reward")["f"].to_numpy()
        assert np.all(np.diff(ordered) >= -1e-12)


def test_targets_of_a_functional_are_means_over_intervals_with_and_without_ties():
    frame = calibrated(none=[3.0, 1.0, 2.0, 0.5], some=[1.0, 1.0, 2.0, 5.0])
    form = solve("early_stop(8, 0.8)", target_kl=0.4)
    quarter = form.log_mean_density(np.arange(4) / 4, np.arange(1, 5) / 4)
    expected = [quarter[3], quarter[1], quarter[2], quarter[0]]
    half = form.log_mean_density(0, 0.5)
    expected += [half, half, quarter[2], quarter[3]]
    assert log_density_targets(frame, form) == pytest.approx(expected, abs=1e-12)


def test_without_ties_a_rank_is_the_mean_over_its_interval():
    form = solve("best_of(4)", target_kl=0.5)
    targets = log_density_targets(calibrated(x=[30.0, 10.0, 20.0, 40.0]), form)
    grid = (np.arange(40_000) + 0.5) / 40_000
    means = np.log(form.density(grid).reshape(4, -1).mean(axis=1))
    assert targets == pytest.approx(means[[2, 0, 1, 3]], abs=1e-6)


def test_given_response_between_tied_ones_takes_its_interval():
    frame = calibrated(x=[0.0, 0.0, 1.0, 1.0])
    given = pd.DataFrame(
        [{"prompt_id": "x", "sample_id": GIVEN_FIRST_ID, "calibrated_reward": 0.5, "tie_low": 0.4, "tie_high": 0.6}]
    )
    form = solve("best_of(2)", target_kl=0.2)
    targets = log_density_targets(pd.concat([frame, given], ignore_index=True), form)
    assert targets[-1] == pytest.approx(float(form.log_mean_density(0.4, 0.6)))
    assert targets[0] == targets[1] < targets[-1] < targets[2] == targets[3]
