"""Reward levels of prompts whose rewards tie: how likely each is, from few samples, with strength shared by prompts.

The share of K samples at each level (the plug-in) is no substitute for its mass where a procedure looks at the rare
ones: what no sample had is taken to be impossible, and equation (8) then allows far too little (docs/log.md). Verifiers
and short scales have the same levels for every prompt. So the masses of a prompt are taken from a Dirichlet
distribution around the mean over prompts, its concentration by maximum likelihood, and drawn given the prompt's own
counts: over the prompts they are spread like the true ones, which neither the plug-in nor the posterior mean are.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

Floats = NDArray[np.float64]
LEAST_MASS = 1e-6
"""Levels below are left out of a prompt."""


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
