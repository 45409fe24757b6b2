"""Objectives by hand."""

import pytest
import torch

from iapo.objectives import pointwise


def test_pointwise_by_hand():
    # errors 1, -2 and 0: (1 + 4 + 0) / 3
    loss = pointwise(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.5]))
    assert loss.item() == pytest.approx(5 / 3)


def test_pointwise_pulls_the_log_ratio_to_its_target():
    log_ratio = torch.tensor([2.0, -1.0], requires_grad=True)
    pointwise(log_ratio, torch.tensor([1.0, 1.0])).backward()
    assert log_ratio.grad.tolist() == [1.0, -2.0]  # 2 (Δ − target) / 2
