"""Robustness to another n than the one trained for, against the closed form of each pair."""

import numpy as np
import pytest

from iapo.closed_form import optimal_win_rate, solve, win_rate_of_cdf
from iapo.deployment import robustness
from iapo.errors import UserError


def test_every_pair_is_what_solve_and_equation_4_give():
    found = robustness("0.5 sample + 0.5 best_of(n)", 0.4, [8, 2, 2])
    assert found.sizes == (2, 8)
    for i, trained in enumerate(found.sizes):
        form = solve(f"0.5 sample + 0.5 best_of({trained})", target_kl=0.4)
        assert found.win_rates[i, i] == pytest.approx(form.win_rate, abs=1e-10)
        for j, deployed in enumerate(found.sizes):
            expected = win_rate_of_cdf(form.cdf, f"0.5 sample + 0.5 best_of({deployed})")
            assert found.win_rates[i, j] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("family", ["worst_of(n)", "kth(1, n)", "early_stop(n, 0.8)"])
def test_nobody_gains_by_training_for_something_else(family):
    found = robustness(family, 0.3, (1, 2, 4))
    assert np.all(found.losses >= -1e-9) and np.all(np.diag(found.losses) == 0)
    np.testing.assert_allclose(found.identity, found.win_rates[0], atol=1e-9)  # one sample: the identity is optimal
    assert found.win_rates[2, 2] == pytest.approx(optimal_win_rate(family.replace("n", "4"), None, 0.3), abs=1e-10)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("best_of(4)", (1, 2), "no n in it"),
        ("best_of(n)", (0, 2), "whole numbers of at least 1"),
        ("best_of(n)", (), "whole numbers of at least 1"),
        ("kth(3, n)", (2, 4), "k must be at most n"),
    ],
)
def test_errors(family, sizes, message):
    with pytest.raises(UserError, match=message):
        robustness(family, 0.5, sizes)
