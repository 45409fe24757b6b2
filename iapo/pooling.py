"""Calibrated rewards from few samples a prompt, with strength shared across prompts.

A prompt's K samples say where its rewards lie and how far they spread; all prompts together say what shape they have.
Rewards are first replaced by normal scores of their pooled ranks, so that only their order matters. Then, for prompt x,

    y = m_x + s_x e,    e ~ G, the same G for every prompt                                                  (11)

m_x and s_x are the prompt's mean and deviation, shrunk towards the pooled ones by as much as the prompts are alike
(empirical Bayes: m_x normal, s_x^2 inverse chi-squared, hyperparameters by moments; Smyth 2004, doi
10.2202/1544-6115.1027). G is the distribution of the leave-one-out errors (y - m_x) / s_x of all samples, so that it
contains what is uncertain about m_x and s_x. Where (11) is wrong the prompt's own ranks are right on average, so the
two are mixed,

    C = (1 - w) rank + w G((y - m_x) / s_x)                                                                  (12)

and w minimizes the squared error: take two samples i and j of a prompt out; C of i is then a forecast of [r_j < r_i],
and the mean squared error of such forecasts is that of C and a constant. So w is one least-squares coefficient, and
how much smaller the error is than that of ranks alone, less two standard errors, says how many samples (12) is worth.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri, polygamma
from scipy.stats import rankdata

Floats = NDArray[np.float64]

FORECASTS = 8
"""Pairs (i, j) a sample that w is fitted to; more change nothing (P K of them are many)."""
LEAST_SAMPLES = 4
MOST_WORTH = 1024


@dataclass(frozen=True, eq=False)
class Pool:
    """What all prompts together say about rewards.

    rewards: all of them, sorted. center, strength: the pooled m_x and how many samples it counts for. scale, freedom:
    the pooled s_x^2 and its degrees of freedom. errors: G, sorted. weight: w of (12). worth: the number of samples a
    prompt whose ranks alone are as exact as (12).
    """

    rewards: Floats
    center: float
    strength: float
    scale: float
    freedom: float
    errors: Floats
    weight: float
    worth: int


def fit_pool(rewards: Floats) -> Pool:
    """The pool of rewards (prompts, K), K at least LEAST_SAMPLES, in the order in which they were drawn."""
    prompts, samples = rewards.shape
    ordered = np.sort(rewards, axis=None)
    y = normal_scores(ordered, rewards)
    variance = float(np.mean(np.var(y, axis=1, ddof=1)))
    between = max(float(np.var(y.mean(axis=1), ddof=1)) - variance / samples, 1e-6 * variance)
    pool = Pool(
        rewards=ordered,
        center=float(y.mean()),
        strength=variance / between,
        scale=variance,
        freedom=_freedom(y),
        errors=np.empty(0),
        weight=0.0,
        worth=samples,
    )
    total, squares = y.sum(axis=1, keepdims=True), (y**2).sum(axis=1, keepdims=True)
    errors = np.sort(_standardized(pool, y, samples - 1, total - y, squares - y**2), axis=None)
    below = (rankdata(rewards, axis=1) - 1) / (samples - 1)
    excess: list[Floats] = []
    residual: list[Floats] = []
    for shift in range(1, min(FORECASTS, samples - 1) + 1):
        other, z = np.roll(rewards, shift, axis=1), np.roll(y, shift, axis=1)
        outcome = (other < rewards) + (other == rewards) / 2
        ranks = (below * (samples - 1) - outcome) / (samples - 2)
        model = _distribution(errors, _standardized(pool, y, samples - 2, total - y - z, squares - y**2 - z**2))
        excess.append(model - ranks)
        residual.append(outcome - ranks)
    difference, missing = np.concatenate(excess, axis=None), np.concatenate(residual, axis=None)
    weight = float(np.clip(difference @ missing / (difference @ difference), 0, 1))
    gains = np.mean((missing**2 - (missing - weight * difference) ** 2).reshape(-1, prompts, samples), axis=(0, 2))
    gained = float(gains.mean() - 2 * gains.std(ddof=1) / np.sqrt(prompts))  # what is sure of it
    error = max(1 / (6 * (samples - 2)) - max(gained, 0), 1 / (6 * MOST_WORTH))  # of ranks: E[u (1 - u)] / (K - 2)
    return Pool(
        **{**pool.__dict__, "errors": errors, "weight": weight, "worth": max(int(1 / (6 * error)) + 1, samples)}
    )


def pooled_places(pool: Pool, reference: Floats, ranks: Floats) -> Floats:
    """(12) for the reference samples (prompts, K) themselves, each left out of its own comparison.

    ranks: of the same shape, the share of the other samples of its prompt below each, ties counting half.
    """
    y = normal_scores(pool.rewards, reference)
    total, squares = y.sum(axis=1, keepdims=True), (y**2).sum(axis=1, keepdims=True)
    error = _standardized(pool, y, reference.shape[1] - 1, total - y, squares - y**2)
    return (1 - pool.weight) * ranks + pool.weight * _distribution(pool.errors, error)


def pooled_places_beside(
    pool: Pool, reference: Floats, prompt: NDArray[np.int64], rewards: Floats, ranks: Floats
) -> Floats:
    """(12) for other rewards [N], each of the prompt that is row prompt[N] of the reference (prompts, K).

    ranks: [N], the share of the samples of its prompt below each, ties counting half.
    """
    y = normal_scores(pool.rewards, reference)
    total, squares = y.sum(axis=1)[prompt], (y**2).sum(axis=1)[prompt]
    error = _standardized(pool, normal_scores(pool.rewards, rewards), reference.shape[1], total, squares)
    return (1 - pool.weight) * ranks + pool.weight * _distribution(pool.errors, error)


def normal_scores(ordered: Floats, rewards: Floats) -> Floats:
    """The normal quantile of each reward's mid-rank among all rewards, `ordered`; finite for every reward."""
    return ndtri(np.clip(_distribution(ordered, rewards), 0.5 / len(ordered), 1 - 0.5 / len(ordered)))


def _distribution(ordered: Floats, values: Floats) -> Floats:
    """The share of `ordered` below each value, ties counting half."""
    left, right = np.searchsorted(ordered, values, side="left"), np.searchsorted(ordered, values, side="right")
    return (left + right) / (2 * len(ordered))


def _standardized(pool: Pool, y: Floats, samples: int, total: Floats, squares: Floats) -> Floats:
    """(y - m_x) / s_x, from the number, the sum and the sum of squares of the scores that m_x and s_x come from."""
    mean = (total + pool.strength * pool.center) / (samples + pool.strength)
    spread = np.maximum(squares - total**2 / samples, 0)
    degrees = samples - 1
    if np.isinf(pool.freedom):
        return (y - mean) / np.sqrt(pool.scale)
    return (y - mean) / np.sqrt((pool.freedom * pool.scale + spread) / (pool.freedom + degrees))


def _freedom(y: Floats) -> float:
    """Degrees of freedom of the prior of s_x^2, from how alike the deviations of two halves of a prompt are."""
    half = y.shape[1] // 2
    first, second = (np.log(np.var(part, axis=1, ddof=1) + 1e-12) for part in (y[:, :half], y[:, half:]))
    shared = float(np.cov(first, second)[0, 1])  # the variance of log s_x^2: trigamma(freedom / 2)
    if not shared > 1e-3:
        return np.inf
    if shared > 40:
        return 0.3
    return float(brentq(lambda d: polygamma(1, d / 2) - shared, 1e-1, 1e5))
