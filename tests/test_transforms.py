"""Transforms: values by hand, and the text form."""

import numpy as np
import pytest

from iapo.errors import UserError
from iapo.transforms import exp_tilt, first_order, identity, log, optimal, parse_transform, table


def test_values_by_hand():
    u = np.array([0.25, 0.5, 1.0])
    np.testing.assert_allclose(identity()(u), u)
    np.testing.assert_allclose(exp_tilt(2)(u), [np.e**0.5, np.e, np.e**2])
    np.testing.assert_allclose(exp_tilt(-2)(u), [-(np.e**-0.5), -1 / np.e, -(np.e**-2)])
    np.testing.assert_allclose(log()(u), [-np.log(4), -np.log(2), 0])
    np.testing.assert_allclose(table([0, 1, 5])(u), [0.5, 1, 5])
    np.testing.assert_allclose(table([0, 1, 5, 3, 2]).corners, [0.25, 0.5, 0.75])
    assert log()(0) == -np.inf


@pytest.mark.parametrize(
    ("text", "transform"),
    [
        ("optimal", optimal()),
        ("identity", identity()),
        ("log", log()),
        ("first_order", first_order()),
        ("exp_tilt(10)", exp_tilt(10)),
        ("exp_tilt(-2.5)", exp_tilt(-2.5)),
        ("table(0, 0.25, 1)", table([0, 0.25, 1])),
    ],
)
def test_text_and_transform_are_the_same_thing(text, transform):
    assert parse_transform(text) == transform
    assert str(transform) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exptilt(3)", "unknown transform 'exptilt', did you mean exp_tilt?"),
        ("exp_tilt", "exp_tilt needs exp_tilt(t), 0 given"),
        ("exp_tilt(0)", "t must be between -700 and 700 and not 0"),
        ("exp_tilt(1e4)", "t must be between -700 and 700 and not 0"),
        ("identity(2)", "identity takes no arguments"),
        ("log + log", "character 5: unexpected '+'"),
        ("table(1)", "at least two finite values"),
        ("table(1, 1)", "all values are equal"),
    ],
)
def test_errors(text, message):
    with pytest.raises(UserError) as caught:
        parse_transform(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
