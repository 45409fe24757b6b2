"""Objectives by hand."""

import math

import pytest
import torch

from iapo.objectives import FLOOR, floored, pointwise


def test_what_is_far_below_the_floor_counts_as_alike():
    above, at, below, far = floored(torch.tensor([5.0, FLOOR, FLOOR - 3, -7600.0], dtype=torch.float64)).tolist()
    assert above == pytest.approx(math.log(math.exp(5) + math.exp(-2)), abs=1e-12)
    assert at == pytest.approx(-2 + math.log(2), abs=1e-12)
    assert below == pytest.approx(-2 + math.log(1 + math.exp(-3)), abs=1e-12)
    assert far == -2


def test_pointwise_by_hand():
    # with e = exp(-2): log((e^2 + e)/(e^1 + e)), log((e^-1 + e)/(e^1 + e)) and 0
    e = math.exp(-2)
    errors = [math.log((math.exp(x) + e) / (math.exp(1) + e)) for x in (2, -1)]
    loss = pointwise(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.5]))
    assert loss.item() == pytest.approx((errors[0] ** 2 + errors[1] ** 2) / 3)
    assert pointwise(torch.tensor([-9.0]), torch.tensor([-7600.0])).item() < 1e-5


def test_pointwise_pulls_the_log_ratio_to_its_target():
    log_ratio = torch.tensor([2.0, -1.0, 1.0, -3.0, -math.inf], requires_grad=True)
    pointwise(log_ratio[:4], torch.tensor([1.0, 1.0, 1.0, -7600.0])).backward()
    slopes = log_ratio.grad.tolist()
    assert slopes[0] > 0 > slopes[1] and slopes[2] == 0 and slopes[3] > 0
    # d/dΔ (s − t)² / 4 = (s − t)/2 · e^Δ / (e^Δ + e^-2)
    e = math.exp(-2)
    by_hand = math.log((math.exp(2) + e) / (math.exp(1) + e)) / 2 * math.exp(2) / (math.exp(2) + e)
    assert slopes[0] == pytest.approx(by_hand)
