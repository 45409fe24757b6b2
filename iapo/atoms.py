"""Ties: the exact optimum on a prompt's own atoms, equation (8).

Verifiers and short scales give the same reward to many responses. The calibrated reward is then not uniform, and the
optimum depends on the prompt through the reference masses p_j of its reward levels, in increasing order. With the CDFs
R_j of the reference and F_j of the policy, ties counting one half,

    W = sum of [h_a(F_j) - h_a(F_j-1)] [h_b(R_j) + h_b(R_j-1)] / 2
    log f_j+1 - log f_j = h_a'(F_j) [h_b(R_j+1) - h_b(R_j-1)] / (2 beta),   sum of p_j f_j = 1              (8)

With a binary verifier best_of(n) is pass@n.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.optimize.elementwise import find_root

from iapo.closed_form import ClosedForm, optimal_win_rate, solve
from iapo.errors import UserError
from iapo.procedures import Pairing, Procedure, has_functional, pairings
from iapo.transforms import Optimal

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
_FINE = 0.5 ** np.arange(7, 40, 0.5)
_SCAN = np.sort(np.concatenate([np.linspace(0, 1, 129), _FINE, 1 - _FINE]))
_NEGLIGIBLE = 1e-6  # of the win rate
_INSIDE, _NARROWINGS = np.linspace(0, 1, 17), 6  # points of an interval that narrows around a minimum, and how often


def tie_pattern(rewards: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The reward levels of each prompt: rewards (prompts, K), finite, in any order.

    Returns counts (prompts, levels), the number of responses at each level in increasing order of reward, padded with
    zeros, and level (prompts, K), the index of each response's level.
    """
    rewards = np.asarray(rewards, float)
    order = np.argsort(rewards, axis=1, kind="stable")
    ascending = np.take_along_axis(rewards, order, axis=1)
    rank = np.zeros(rewards.shape, np.int64)
    rank[:, 1:] = np.cumsum(np.diff(ascending, axis=1) > 0, axis=1)
    level = np.empty_like(rank)
    np.put_along_axis(level, order, rank, axis=1)
    levels = rank.max(initial=0) + 1
    cell = rank + levels * np.arange(len(rank))[:, None]
    return np.bincount(cell.ravel(), minlength=levels * len(rank)).reshape(len(rank), levels), level


def mostly_tied(prompt: ArrayLike, tied: ArrayLike) -> NDArray[np.bool_]:
    """Whether (8) rather than (5) is for a prompt: whether most of its reference samples have a reward that recurs.

    prompt, tied: of each reference sample [N], the number of its prompt and whether its reward recurs there. [prompts].
    """
    prompt = np.asarray(prompt)
    return 2 * np.bincount(prompt, np.asarray(tied, float)) > np.bincount(prompt)


def atom_log_density(masses: ArrayLike, form: ClosedForm) -> Floats:
    """log f_j of every atom: the target of the log-ratio of a response at that reward level, in nats.

    masses: (prompts, atoms) masses or counts under the reference, in increasing order of reward; a row may be padded
    with zeros, whose log f is without meaning. Returns the same shape. Each distinct row is solved once.

    For the optimal transform this is (8) at the beta of `form`; for the others, and for procedures that are functionals
    of F, to which (8) does not apply, the log of the mean of f over the
    interval of calibrated rewards that the atom covers. Sum of p_j f_j is 1 in both. Raises UserError on a row that is
    negative or sums to nothing.
    """
    masses = np.asarray(masses, float)
    if masses.ndim != 2 or not np.all(masses >= 0) or not np.all(masses.sum(axis=1) > 0):
        raise UserError(
            f"masses of shape {masses.shape} given; (prompts, atoms) expected, no mass below 0 and some in every row"
        )
    rows, inverse = np.unique(masses, axis=0, return_inverse=True)
    rows = rows / rows.sum(axis=1, keepdims=True)
    pairs = pairings(form.procedure, form.opponent)
    if isinstance(form.transform, Optimal) and not has_functional(pairs):
        log_f = _optimum(rows, pairs, form.beta)
    else:
        high = np.minimum(np.cumsum(rows, axis=1), 1)
        log_f = form.log_mean_density(np.maximum(high - rows, 0), high)
    return log_f[inverse.ravel()]


def atom_win_rate(masses: ArrayLike, log_f: ArrayLike, pairs: tuple[Pairing, ...]) -> Floats:
    """W of (8) for any policy on the atoms: masses and log f of shape (prompts, atoms); returns (prompts,)."""
    masses = np.asarray(masses, float)
    reference = _cdf(masses / masses.sum(axis=1, keepdims=True))
    policy = _cdf(np.diff(reference) * np.exp(np.asarray(log_f, float)))
    terms = (
        weight * np.diff(a.cdf(policy)) * (b.cdf(reference)[:, 1:] + b.cdf(reference)[:, :-1]) / 2
        for weight, a, b in pairs
    )
    return np.asarray(sum(term.sum(axis=1) for term in terms))


def atom_kl(masses: ArrayLike, log_f: ArrayLike) -> Floats:
    """KL = sum of p_j f_j log f_j, in nats: shapes as in `atom_win_rate`."""
    masses, log_f = np.asarray(masses, float), np.asarray(log_f, float)
    return np.sum(masses / masses.sum(axis=1, keepdims=True) * np.exp(log_f) * log_f, axis=1)


def most_win_rate(masses: ArrayLike, untied: int, procedure: Procedure, opponent: Procedure, kl: float) -> float:
    """The largest mean win rate over prompts of any policy of this mean KL (nats); at 0 or less, the reference's.

    masses: (prompts, atoms) of the prompts to which (8) applies, as in `atom_log_density`; untied: how many others
    there are, each of which has the closed form. All have one beta, for no other division of the KL among prompts wins
    more. Where W is not concave no beta may give this KL; then it is the value between the two optima of one beta,
    a bound on all policies. More KL than it takes to be always at the top wins no more. Not for functionals of F.
    Raises UserError where the closed form cannot be solved.
    """
    rows, inverse = np.unique(np.asarray(masses, float), axis=0, return_inverse=True)
    rows = rows / rows.sum(axis=1, keepdims=True)
    share = np.bincount(inverse.ravel(), minlength=len(rows)) / (inverse.size + untied)
    pairs = pairings(procedure, opponent)
    continuous = untied / (inverse.size + untied)

    def total(log_f: Floats) -> tuple[float, float]:
        return float(share @ atom_win_rate(rows, log_f, pairs)), float(share @ atom_kl(rows, log_f))

    @cache
    def optimum(log_beta: float) -> tuple[float, float]:
        win_rate, spent = total(_optimum(rows, pairs, np.exp(log_beta)))
        if untied:
            form = solve(procedure, opponent, beta=float(np.exp(log_beta)))
            win_rate, spent = win_rate + continuous * form.win_rate, spent + continuous * form.kl
        return win_rate, spent

    if kl <= 0:
        return total(np.zeros(rows.shape))[0] + continuous * optimal_win_rate(procedure, opponent, 0)
    high = low = 0.0
    while optimum(high)[1] > kl:
        high += 1
    while optimum(low)[1] < kl and np.exp(low) * kl > _NEGLIGIBLE:
        low -= 1
    if not optimum(low)[1] > kl > optimum(high)[1]:
        return optimum(low)[0]
    log_beta = brentq(lambda log_beta: optimum(log_beta)[1] - kl, low, high, xtol=1e-6)
    win_rate, spent = optimum(log_beta)
    bound = win_rate + float(np.exp(log_beta)) * (kl - spent)  # no W - beta KL is larger than that at the optimum
    return min(bound, 1.0)


def _optimum(masses: Floats, pairs: tuple[Pairing, ...], beta: float) -> Floats:
    """The solution of (8) with the largest W - beta KL, by shooting from the top atom down.

    The mass x of the policy on the top atom fixes all others by (8); the sum of p_j f_j must be 1. It lies between the
    reference's mass (f = 1 at the top, and less below) and 1. There is one x if all h_a' increase (W is concave).
    """
    grid = np.linspace(0, 1, 257)
    concave = all(np.all(np.diff(a.density(grid)) >= 0) for _, a, _ in pairs)
    padding = np.argmax(masses[:, ::-1] > 0, axis=1)  # of each row, at the top; taken to the bottom meanwhile
    column = (np.arange(masses.shape[1]) - padding[:, None]) % masses.shape[1]
    masses = np.take_along_axis(masses, column, axis=1)
    shoot = _shooting(masses, pairs, beta)
    mass_at_top = masses[:, -1]
    scan = np.array([0.0, 1.0]) if concave else _SCAN
    x = mass_at_top[:, None] + (1 - mass_at_top[:, None]) * scan
    missing = shoot(x.ravel(), np.repeat(np.arange(len(x)), len(scan)), None).reshape(x.shape)
    missing[:, 0], missing[:, -1] = np.maximum(missing[:, 0], 0), np.minimum(missing[:, -1], 0)
    row, low, high = _crossings(x, missing, shoot)
    root = find_root(shoot, (low, high), args=(row,)).x
    log_f = np.empty((len(row), masses.shape[1]))
    shoot(np.where(np.isnan(root), low, root), row, log_f)  # nan: at its low end, but for rounding
    value = atom_win_rate(masses[row], log_f, pairs) - beta * atom_kl(masses[row], log_f)
    best = np.lexsort((value, row))  # the last of each row is its best
    solved = log_f[best[np.searchsorted(row[best], np.arange(len(masses)), side="right") - 1]]
    found = np.empty_like(solved)
    np.put_along_axis(found, column, np.where(masses > 0, solved, 0), axis=1)
    return found


def _crossings(x: Floats, missing: Floats, shoot: "_Shooting") -> tuple[Counts, Floats, Floats]:
    """Where what is missing changes its sign: row, low and high end in x.

    x, missing: (rows, points). Two crossings between neighbouring points show as a minimum of its size, which is
    followed to its bottom.
    """
    positive = np.concatenate([missing[:, :1] >= 0, missing[:, 1:] > 0], axis=1)
    row, column = np.nonzero(positive[:, :-1] != positive[:, 1:])
    size = np.abs(missing)
    dips = (size[:, 1:-1] <= size[:, :-2]) & (size[:, 1:-1] <= size[:, 2:])
    dips &= (positive[:, 1:-1] == positive[:, :-2]) & (positive[:, 1:-1] == positive[:, 2:])
    at, middle = np.nonzero(dips)
    low, high, side = x[at, middle], x[at, middle + 2], np.where(positive[at, middle + 1], 1.0, -1.0)
    found = [(row, x[row, column], x[row, column + 1])]
    for _ in range(_NARROWINGS):
        inside = low[:, None] + (high - low)[:, None] * _INSIDE
        left = side[:, None] * shoot(inside.ravel(), np.repeat(at, len(_INSIDE)), None).reshape(inside.shape)
        change = (left[:, :-1] > 0) != (left[:, 1:] > 0)
        dip, place = np.nonzero(change)
        found.append((at[dip], inside[dip, place], inside[dip, place + 1]))
        whole = ~np.any(change, axis=1)
        lowest = np.clip(np.argmin(left, axis=1), 1, len(_INSIDE) - 2)[whole]
        at, side, inside = at[whole], side[whole], inside[whole]
        low, high = (inside[np.arange(len(at)), lowest + one] for one in (-1, 1))
    row, low, high = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return row, low, high


_Shooting = Callable[[Floats, Counts, Floats | None], Floats]


def _shooting(masses: Floats, pairs: tuple[Pairing, ...], beta: float) -> _Shooting:
    """(8) from the top atom down, as a function of the mass of the policy there.

    masses: (rows, atoms), the last of each row above 0. What is returned takes top, row and log_f: arrays (n,) of such
    masses and of the rows they are for, and None or an array (n, atoms) to be filled; it returns what is missing to a
    total of 1, (n,).
    """
    reference = _cdf(masses)
    by_atom = np.ascontiguousarray(masses.T)
    steps = []
    for weight, a, b in pairs:
        h = b.cdf(reference)
        steps.append((a, np.ascontiguousarray(weight * (h[:, 2:] - h[:, :-2]).T / (2 * beta))))

    def shoot(top: Floats, row: Counts, log_f: Floats | None = None) -> Floats:
        current, cdf = np.log(top / by_atom[-1][row]), 1 - top
        if log_f is not None:
            log_f[:, -1] = current
        for j in range(len(by_atom) - 2, -1, -1):
            inside = np.maximum(cdf, 0)
            for a, step in steps:
                current = current - a.density(inside) * step[j][row]
            cdf = cdf - by_atom[j][row] * np.exp(current)
            if log_f is not None:
                log_f[:, j] = current
        return cdf

    return shoot


def _cdf(masses: Floats) -> Floats:
    """0 and the cumulative masses: (rows, atoms + 1), the last 1."""
    total = np.cumsum(masses, axis=1)
    return np.concatenate([np.zeros((len(masses), 1)), np.minimum(total / total[:, -1:], 1)], axis=1)
