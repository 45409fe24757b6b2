"""Objectives: pure functions that fit the log-ratio Δ = log π(y|x) − log π_ref(y|x) to its closed form."""

import torch
from torch import Tensor

FLOOR = -2.0
"""Log-ratios far below it, in nats, count as alike: such responses have next to no mass (measured: docs/log.md)."""


def floored(log_ratio: Tensor) -> Tensor:
    """log(e^x + e^FLOOR) in nats, by element: x above the floor, the floor far below it, increasing throughout."""
    return torch.logaddexp(log_ratio, torch.full_like(log_ratio, FLOOR))


def pointwise(log_ratio: Tensor, target: Tensor) -> Tensor:
    """mean (floored Δ − floored log f(C))² over responses: least squares to equation (3), exact because Z is known.

    log_ratio [B], target [B], in nats -> scalar. Its only minimum is Δ = log f. Without the floor, and for
    identity, it is QRPO (arXiv 2507.08068); then how unlikely the worst responses are, on which no win rate depends,
    outweighs all else where log f is steep (worst_of(16) at half a nat: −7,600 nats).
    """
    return (floored(log_ratio) - floored(target)).square().mean()
