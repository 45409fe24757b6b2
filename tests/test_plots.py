"""Figures of the closed form: what is drawn is what was computed."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from iapo.closed_form import frontier, solve
from iapo.deployment import robustness
from iapo.errors import UserError
from iapo.plots import draw_density, draw_frontier, draw_losses, draw_transform, draw_win_rates, save_closed_form


def test_curves_are_the_computed_values():
    form = solve("best_of(4)", target_kl=0.5)
    left, middle, right = Figure().subplots(1, 3)
    draw_transform(left, form)
    u, phi = left.lines[0].get_data()
    np.testing.assert_array_equal(phi, form.transform_values(u))
    draw_density(middle, form)
    u, f = middle.lines[-1].get_data()
    np.testing.assert_array_equal(f, form.density(u))
    found = frontier("best_of(4)", transforms=("optimal", "log"), kls=[0.1, 1])
    draw_frontier(right, found)
    assert [line.get_label() for line in right.lines] == ["optimal", "log"]
    for line, rates in zip(right.lines, found.win_rates.values(), strict=True):
        np.testing.assert_array_equal(line.get_data(), [found.kls, rates])
    assert "nats" in right.get_xlabel()


def test_robustness_is_drawn_as_computed():
    found = robustness("best_of(n)", 0.5, (1, 4, 16))
    left, right = Figure().subplots(1, 2)
    draw_win_rates(left, found)
    np.testing.assert_array_equal(left.lines[0].get_data(), [(1, 4, 16), np.diag(found.win_rates)])
    np.testing.assert_array_equal(left.lines[1].get_data(), [(1, 4, 16), found.identity])
    draw_losses(right, found)
    np.testing.assert_array_equal(right.images[0].get_array(), 100 * found.losses)
    assert [text.get_text() for text in right.texts[:2]] == ["0", f"{100 * found.losses[0, 1]:.2g}"]


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"ending in \.png, \.svg or \.pdf"):
        save_closed_form(solve("best_of(4)", target_kl=0.5), tmp_path / "new" / "figure.xyz")
    assert not (tmp_path / "new").exists()
