"""Objectives: pure functions that fit the log-ratio Δ = log π(y|x) − log π_ref(y|x) to its closed form."""

from torch import Tensor


def pointwise(log_ratio: Tensor, target: Tensor) -> Tensor:
    """mean (Δ − log f(C))² over responses: least squares to equation (3), exact because Z is known.

    log_ratio [B], target [B], in nats -> scalar. QRPO (arXiv 2507.08068) is the case of its identity transform.
    """
    return (log_ratio - target).square().mean()
