"""What K samples cost: targets for the ranks of K samples, and the win rate and KL of a policy that is fitted to them.

The model. A response of calibrated reward u is known by its rank among K samples of its prompt, itself included:
i = 1 + Binomial(K - 1, u). Its target is the t_i of that rank. A policy is a function of prompt and response and cannot
know the chance in a rank, so that the fit, with no other error, is the mean of the targets, a polynomial with the t_i
as its Bernstein coefficients:

    log f_K(u) = sum of t_i B_i(u),   B_i(u) = C(K - 1, i - 1) u^(i - 1) (1 - u)^(K - i),   integral of f_K = 1     (9)

That is (1) with a transform of its own, so that (2) and (4) give its KL and win rate without any simulation.

The targets are those for which f_K comes closest to the f of the closed form while chance stays small: the minimum of

    KL(f || f_K) / KL + c (integral of the variance of t_i at u) / (variance of log f),                            (10)

the share of the KL that is lost and, at a price, the share of chance in the targets: a convex problem. At c = 0 its
solution gives a response of the policy the same probability of each rank among K as one of the optimum has, and
KL(f || f_K) is exactly what is missing from the KL that was asked for. The log of the mean of f over
[(i - 1)/K, i/K], the obvious choice, and both expectations of f over U ~ Beta(i, K + 1 - i), which is what is known of
u, are smoothed by (9) once more and fall far short of the KL; docs/calibration.md has the figures.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from scipy.stats import binom

from iapo.closed_form import ClosedForm, optimal_win_rate, solve
from iapo.errors import UserError
from iapo.functionals import corners as corners_of
from iapo.procedures import pairings
from iapo.quadrature import nodes, weights
from iapo.transforms import Transform

Floats = NDArray[np.float64]

NOISE_PRICE = 0.1
"""c of (10). Chance costs a fit of d parameters to N responses d/N of its variance; measured: docs/calibration.md."""
ENOUGH, MOST_NOISE = 0.8, 0.5
"""K is enough where the fit keeps that share of the KL of the closed form and chance is at most this share of variance:
a rule of thumb in place of K = 4n, with which it roughly agrees at moderate KL."""
MOST_RANKS = 4096
"""Ranks of more samples are taken together, for (10) takes K^3: 10 s for so many. Twice as many move the targets of
best_of(4) at half a nat by 0.004 nats (root mean square under f, from 2048 to 4096)."""
MOST_SAMPLES = 1024
_half = np.concatenate([[0.0], 0.5 ** np.arange(30, 4, -1.0), np.arange(2, 17) / 32])
_EDGES: Floats = np.unique(np.concatenate([_half, 1 - _half]))
_U: Floats = nodes(_EDGES).ravel()
_DU: Floats = weights(_EDGES).ravel()


@dataclass(frozen=True)
class FewSamples:
    """The policy that is fitted to the ranks of K samples.

    kl (nats) and win_rate are its own; optimal_win_rate is the largest at that KL. noise: the share of the variance of
    the targets that is chance in the ranks, which no policy can explain.
    """

    samples: int
    kl: float
    win_rate: float
    optimal_win_rate: float
    noise: float


@dataclass(frozen=True)
class RankMean(Transform):
    """The mean target of a response of calibrated reward u, whose rank among K is random: (9)."""

    targets: tuple[float, ...]

    def __call__(self, u: ArrayLike) -> Floats:
        return rank_probabilities(u, len(self.targets)) @ np.asarray(self.targets)

    def __str__(self) -> str:
        return f"the ranks of {len(self.targets)} samples"


def rank_probabilities(u: ArrayLike, samples: int) -> Floats:
    """B_i(u), the probability of each rank of K: shape u.shape + (K,)."""
    return np.asarray(binom.pmf(np.arange(samples), samples - 1, np.asarray(u, float)[..., None]))


@lru_cache(maxsize=256)
def rank_targets(form: ClosedForm, samples: int) -> Floats:
    """The target of the log-ratio, in nats, of each rank of K samples without ties, from the lowest: the t_i of (10).

    Raises UserError for fewer than 2 samples.
    """
    if samples < 2:
        raise UserError(f"samples = {samples} given, a whole number of at least 2 expected")
    breaks = [corners_of(pairings(form.procedure, form.opponent)), getattr(form.transform, "corners", [])]
    edges = np.unique(np.concatenate([_EDGES, *breaks]))  # f may jump at these
    u, du = nodes(edges).ravel(), weights(edges).ravel()
    ranks = rank_probabilities(u, samples)
    log_f = form.log_density(u)
    wanted = ranks.T @ np.exp(log_f + np.log(du) - logsumexp(log_f, b=du))  # of each rank, under f
    price = 2 * NOISE_PRICE * form.kl / (du @ log_f**2 - (du @ log_f) ** 2)
    chance = price * (np.diag(ranks.T @ du) - ranks.T @ (ranks * du[:, None]))  # (10) is quadratic in t
    level = np.full((samples, samples), 1 / samples)  # adding a constant to t changes nothing

    def normalized(t: Floats) -> Floats:
        return t - logsumexp(ranks @ t, b=du)

    def loss(t: Floats) -> float:
        return float(-wanted @ t + t @ chance @ t / 2)

    targets = normalized(np.zeros(samples))
    for _ in range(100):  # Newton, damped
        mass = du * np.exp(ranks @ targets)
        found = ranks.T @ mass
        gradient = found - wanted + chance @ targets
        curvature = ranks.T @ (ranks * mass[:, None]) - np.outer(found, found) + chance + level
        step = -np.linalg.solve(curvature, gradient)
        decrease = float(-gradient @ step)
        if decrease < 1e-13:
            break
        size = 1.0
        while loss(normalized(targets + size * step)) > loss(targets) - size * decrease / 4 and size > 1e-6:
            size /= 2
        targets = normalized(targets + size * step)
    targets.flags.writeable = False
    return targets


def interval_targets(form: ClosedForm, low: ArrayLike, high: ArrayLike, samples: int) -> Floats:
    """The mean of `rank_targets` over intervals of quantiles, of which rank i of K has [(i - 1)/K, i/K]; low < high."""
    ranks = min(samples, MOST_RANKS)
    low, high = np.asarray(low, float) * ranks, np.asarray(high, float) * ranks
    below = np.concatenate([[0.0], np.cumsum(rank_targets(form, ranks))])
    total = np.interp(high, np.arange(ranks + 1), below) - np.interp(low, np.arange(ranks + 1), below)
    return np.asarray(total / (high - low))


def few_samples(form: ClosedForm, samples: int) -> FewSamples:
    """What becomes of a closed form when calibrated rewards are ranks among K samples, by quadrature of (9)."""
    ranks = min(samples, MOST_RANKS)
    targets = rank_targets(form, ranks)
    fitted = solve(form.procedure, form.opponent, RankMean(tuple(targets)), beta=1.0)
    return FewSamples(
        samples=samples,
        kl=fitted.kl,
        win_rate=fitted.win_rate,
        optimal_win_rate=optimal_win_rate(form.procedure, form.opponent, fitted.kl),
        noise=_noise(targets, rank_probabilities(_U, ranks) @ targets),
    )


def _noise(targets: Floats, log_f: Floats) -> float:
    """The share of the variance of the targets that is not that of their mean, log f_K at the nodes."""
    return float(1 - (_DU @ log_f**2 - targets.mean() ** 2) / targets.var())


def samples_needed(form: ClosedForm) -> int:
    """The smallest K that is enough for a closed form; MOST_SAMPLES where none below it is."""

    def enough(samples: int) -> bool:
        targets = rank_targets(form, samples)
        log_f = rank_probabilities(_U, samples) @ targets
        kept = _DU @ (np.exp(log_f) * log_f) >= ENOUGH * form.kl
        return bool(kept and _noise(targets, log_f) <= MOST_NOISE)

    low, high = 1, 2
    while high < MOST_SAMPLES and not enough(high):
        low, high = high, 2 * high
    candidates = range(low + 1, min(high, MOST_SAMPLES) + 1)
    return candidates[min(bisect_left(candidates, True, key=enough), len(candidates) - 1)]
