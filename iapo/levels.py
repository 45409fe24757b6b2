"""Reward levels of prompts whose rewards tie: which there are, and how likely each is, from few samples.

The share of K samples at each level (the plug-in) is no substitute for its mass where a procedure looks at the rare
ones: what no sample had is taken to be impossible, and equation (8) then allows far too little (docs/log.md). Verifiers
and short scales have the same levels for every prompt. So the masses of a prompt are taken from a Dirichlet
distribution around the mean over prompts, its concentration by maximum likelihood, and drawn given the prompt's own
counts: over the prompts they are spread like the true ones, which neither the plug-in nor the posterior mean are. So
prompts share strength.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

from iapo.atoms import mostly_tied

Floats = NDArray[np.float64]
LEAST_MASS = 1e-6
"""Levels below are left out of a prompt."""
NO_TIES = (np.zeros((0, 1)), 1)
"""`tied_levels` of prompts whose rewards are all distinct."""


def tied_levels(rewards: list[Floats], seed: int = 0) -> tuple[Floats, int]:
    """What the optimum has to know of each prompt's reference rewards: where most tie, the masses of their levels.

    Returns these, (prompts, levels) as from `draw_masses`, and how many prompts are left.
    """
    tied = which_tie(rewards)
    chosen = [one for one, is_tied in zip(rewards, tied, strict=True) if is_tied]
    return draw_masses(chosen, seed) if chosen else np.zeros((0, 1)), len(rewards) - len(chosen)


def which_tie(rewards: list[Floats]) -> NDArray[np.bool_]:
    """Whether (8) is for a prompt, `atoms.mostly_tied`, from each prompt's sampled rewards: [prompts]."""
    if not rewards:
        return np.zeros(0, bool)
    prompt, count = _levels(rewards)
    return mostly_tied(np.repeat(prompt, count), np.repeat(count > 1, count))


def level_counts(rewards: list[Floats]) -> Floats:
    """How many rewards of each prompt are at each of its levels: (prompts, levels), increasing, padded with zeros."""
    prompt, count = _levels(rewards)
    level = np.arange(len(prompt)) - np.searchsorted(prompt, prompt)
    counts = np.zeros((len(rewards), level.max(initial=0) + 1))
    counts[prompt, level] = count
    return counts


def share_at_the_top(rewards: list[Floats]) -> Floats:
    """The share of the rewards of each prompt that are its largest: [prompts]."""
    prompt, count = _levels(rewards)
    return count[np.flatnonzero(np.diff(prompt, append=len(rewards)))] / np.bincount(prompt, count)


def _levels(rewards: list[Floats]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The prompt of every level, in order of prompt and reward, and how many rewards are at it."""
    prompt, values = np.repeat(np.arange(len(rewards)), [len(one) for one in rewards]), np.concatenate(rewards)
    order = np.lexsort((values, prompt))
    prompt, values = prompt[order], values[order]
    first = np.flatnonzero(np.r_[True, (np.diff(prompt) > 0) | (np.diff(values) > 0)])
    return prompt[first], np.diff(first, append=len(values))


def draw_masses(rewards: list[Floats], seed: int) -> Floats:
    """Masses (prompts, levels) in increasing order of reward, padded with zeros, from each prompt's sampled rewards.

    Where prompts have no level in common they scatter about the shares of their own samples; with many samples they
    are these shares.
    """
    values, level = np.unique(np.concatenate(rewards), return_inverse=True)
    prompt = np.repeat(np.arange(len(rewards)), [len(one) for one in rewards])
    counts = np.zeros((len(rewards), len(values)))
    np.add.at(counts, (prompt, level), 1)
    mean = (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0)
    prior = concentration(counts, mean) * mean
    drawn = np.random.default_rng(seed).standard_gamma(counts + prior)
    masses = drawn / drawn.sum(axis=1, keepdims=True)
    masses[masses < LEAST_MASS] = 0
    masses = np.take_along_axis(masses, np.argsort(masses == 0, axis=1, kind="stable"), axis=1)
    return masses[:, : max(int((masses > 0).sum(axis=1).max(initial=0)), 1)]


def concentration(counts: Floats, mean: Floats) -> float:
    """The Dirichlet's concentration around a mean [levels] under which counts (prompts, levels) are likeliest."""
    total = counts.sum(axis=1)

    def cost(log_size: float) -> float:
        prior = np.exp(log_size) * mean
        inside = (gammaln(counts + prior) - gammaln(prior)).sum(axis=1)
        return -float(np.sum(gammaln(prior.sum()) - gammaln(prior.sum() + total) + inside))

    return float(np.exp(minimize_scalar(cost, bounds=(np.log(1e-3), np.log(1e4)), method="bounded").x))
