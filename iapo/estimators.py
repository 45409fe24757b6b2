"""Estimators of win rates under a procedure and of KL, from samples; design: U-statistics, never a single draw."""

from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

from iapo.errors import UserError
from iapo.procedures import BestOf, EarlyStop, Functional, Kth, Mixture, Procedure, Sample, WorstOf

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its standard error and 95 % bootstrap interval."""

    value: float
    se: float
    low: float
    high: float


def draws(procedure: Procedure) -> int | None:
    """How many samples a procedure draws (the most, for a mixture); None where that is not a fixed number."""
    match procedure:
        case Sample():
            return 1
        case BestOf(n=n) | WorstOf(n=n) | Kth(n=n) | EarlyStop(n=n):
            return n
        case Mixture(parts=parts):
            return max((draws(part) or 0 for _, part in parts), default=0) or None
    return None


def order_weights(procedure: Procedure, places: Floats) -> Floats:
    """P(the procedure returns the i-th smallest of m samples), [m], for a random subset of the samples it draws.

    places [m]: their calibrated rewards, in any order; only early_stop looks at more than their number.

    The i-th smallest of m is the k-th smallest of a random n-subset with probability
    C(i − 1, k − 1)·C(m − i, n − k)/C(m, n), so statistics with these weights are unbiased U-statistics.
    early_stop draws such a subset in random order: where all n are below tau the best of them comes out, else the
    first that is not, which is any of those at tau or above. A procedure that draws no fixed number is taken over the
    samples as they are: h(i/m) − h((i − 1)/m). UserError for other functionals of F, which have no h.
    """
    samples = len(places)
    match procedure:
        case Sample():
            return np.full(samples, 1 / samples)
        case BestOf(n=n):
            return _kth_weights(n, n, samples, procedure)
        case WorstOf(n=n):
            return _kth_weights(1, n, samples, procedure)
        case Kth(k=k, n=n):
            return _kth_weights(k, n, samples, procedure)
        case EarlyStop(n=n, tau=tau):
            _require_samples(n, samples, procedure)
            below = int(np.sum(places < tau))
            weights = np.array([comb(i, n - 1) / comb(samples, n) if i < below else 0.0 for i in range(samples)])
            weights[below:] = (1 - comb(below, n) / comb(samples, n)) / max(samples - below, 1)
            return weights
        case Functional():
            raise UserError(f"{procedure}: no estimator of its win rate from samples; add a case to order_weights")
    return np.diff(procedure.cdf(np.linspace(0, 1, samples + 1)))


def prompt_win_rate(policy: Floats, opponent: Floats, policy_weights: Floats, opponent_weights: Floats) -> float:
    """P(the policy's draw has the larger reward) + ½ P(equal), for one prompt.

    policy [m] and opponent [k] are rewards in any order; the weights are those of their order statistics.
    """
    policy, opponent = np.sort(policy), np.sort(opponent)
    cumulative = np.concatenate([[0.0], np.cumsum(opponent_weights)])
    below = cumulative[np.searchsorted(opponent, policy, side="left")]
    up_to = cumulative[np.searchsorted(opponent, policy, side="right")]
    return float(policy_weights @ (below + up_to) / 2)


def mean_over_prompts(values: Floats, seed: int = 0) -> Estimate:
    """The mean of per-prompt values [P], with its standard error and the 95 % percentile bootstrap over prompts."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    se = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")
    return Estimate(float(values.mean()), se, float(low), float(high))


def _kth_weights(k: int, n: int, samples: int, procedure: Procedure) -> Floats:
    _require_samples(n, samples, procedure)
    subsets = comb(samples, n)
    return np.array([comb(i - 1, k - 1) * comb(samples - i, n - k) / subsets for i in range(1, samples + 1)])


def _require_samples(n: int, samples: int, procedure: Procedure) -> None:
    if samples < n:
        raise UserError(
            f"{procedure} draws {n} and there are {samples} samples a prompt; expected at least {n}: "
            "raise sample.samples_per_prompt and evaluate.samples_per_prompt"
        )
