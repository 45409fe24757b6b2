"""Ties: the exact optimum on a prompt's own atoms, equation (8).

Verifiers and short scales give the same reward to many responses. The calibrated reward is then not uniform, and the
optimum depends on the prompt through the reference masses p_j of its reward levels, in increasing order. With the CDFs
R_j of the reference and F_j of the policy, ties counting one half,

    W = sum of [h_a(F_j) - h_a(F_j-1)] [h_b(R_j) + h_b(R_j-1)] / 2
    log f_j+1 - log f_j = h_a'(F_j) [h_b(R_j+1) - h_b(R_j-1)] / (2 beta),   sum of p_j f_j = 1              (8)

With a binary verifier best_of(n) is pass@n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.optimize.elementwise import find_root

from iapo.closed_form import ClosedForm, optimal_win_rate, solve
from iapo.errors import UserError
from iapo.procedures import Pairing, Procedure, has_functional, pairings
from iapo.transforms import AnyTransform, Optimal

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
_FINE = 0.5 ** np.arange(7, 40, 0.5)
_SCAN = np.sort(np.concatenate([np.linspace(0, 1, 129), _FINE, 1 - _FINE]))
_NEGLIGIBLE = 1e-6  # of the win rate
_LEAST_LOG_BETA = -25.0  # below, a nat wins less than 1e-10
_INSIDE, _NARROWINGS = np.linspace(0, 1, 17), 6  # points of an interval that narrows around a minimum, and how often


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of which some have rewards that tie, as `prompts_with` makes it; all shares sum to 1."""

    masses: Floats
    """(patterns, atoms), distinct, in increasing order of reward, padded with zeros; each sums to 1."""
    share: Floats
    """(patterns,): of the prompts, how many have it."""
    untied: float
    """The share of the prompts to which (8) does not apply; they have the closed form."""


class Aim(NamedTuple):
    """What a policy is to win under: its procedure, the opponent's, and the transform."""

    procedure: Procedure
    opponent: Procedure
    transform: AnyTransform


class Means(NamedTuple):
    """Over prompts; KL in nats."""

    kl: float
    win_rate: float


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
    of F, to which (8) does not apply, the log of the mean of f over the interval of calibrated rewards that the atom
    covers. Sum of p_j f_j is 1 in both. Raises UserError on a row that is negative or sums to nothing.
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


def prompts_with(masses: ArrayLike, untied: int) -> Prompts:
    """masses: (prompts, atoms), as in `atom_log_density`, of prompts to which (8) applies; untied: how many more."""
    rows, inverse = np.unique(np.asarray(masses, float), axis=0, return_inverse=True)
    total = inverse.size + untied
    share = np.bincount(inverse.ravel(), minlength=len(rows)) / total
    return Prompts(rows / rows.sum(axis=1, keepdims=True), share, untied / total)


def means_of(prompts: Prompts, aim: Aim, beta: float) -> Means:
    """Mean KL and win rate over prompts of what `atom_log_density` makes of the closed form at this beta.

    The win rate is NaN for functionals of F, to which (8) does not apply.
    """
    pairs = pairings(aim.procedure, aim.opponent)
    if isinstance(aim.transform, Optimal) and not has_functional(pairs) and not prompts.untied:
        log_f, kl, win_rate = _optimum(prompts.masses, pairs, beta), 0.0, 0.0
    else:
        form = solve(*aim, beta=beta)
        log_f, kl, win_rate = atom_log_density(prompts.masses, form), form.kl, form.win_rate
    kl = prompts.untied * kl + float(prompts.share @ atom_kl(prompts.masses, log_f))
    if has_functional(pairs):
        return Means(kl, float("nan"))
    return Means(kl, prompts.untied * win_rate + float(prompts.share @ atom_win_rate(prompts.masses, log_f, pairs)))


def beta_at_kl(prompts: Prompts, aim: Aim, kl: float) -> float:
    """The one beta at which the mean KL over prompts is `kl` (nats).

    Without untied prompts the mean KL is below that of being always at the best atom, -log of its mass. Where W is not
    concave, as for worst_of, it jumps at some beta, for few patterns from next to nothing; then the beta is that of the
    side of more KL.
    """
    tried = _search(prompts, aim, lambda means: means.kl - kl)[1]
    enough = [log_beta for log_beta, means in tried.items() if means.kl > (1 - 1e-4) * kl] or [min(tried)]
    return float(np.exp(min(enough, key=lambda log_beta: abs(tried[log_beta].kl - kl))))


def win_rate_at(prompts: Prompts, aim: Aim, kl: float, least: float = _LEAST_LOG_BETA) -> float:
    """The mean win rate over prompts at a mean KL above 0 (nats), with log beta not much below `least`.

    At a jump it is the value between the two optima of one beta, a bound on all policies. More KL than there is wins
    no more. Not for functionals of F.
    """
    log_beta, tried = _search(prompts, aim, lambda means: means.kl - kl, least)
    spent, win_rate = tried[log_beta]
    return min(win_rate + _price(aim, log_beta, least) * (kl - spent), 1.0)


def kl_at(prompts: Prompts, aim: Aim, win_rate: float) -> float:
    """The mean KL (nats) of which this is the `win_rate_at`; UserError where there is none."""
    pairs = pairings(aim.procedure, aim.opponent)
    own, most = (
        float(prompts.share @ atom_win_rate(prompts.masses, log_f, pairs)) + prompts.untied * untied
        for log_f, untied in (
            (np.zeros(prompts.masses.shape), optimal_win_rate(aim.procedure, aim.opponent, 0)),
            (_always_at_the_top(prompts.masses), 1.0),
        )
    )
    if not own < win_rate < most:
        raise UserError(
            f"target_win_rate = {win_rate} given; where rewards tie as they do here, more than the reference's own "
            f"{own:.4g} and less than {most:.4g} expected"
        )
    log_beta, tried = _search(prompts, aim, lambda means: means.win_rate - win_rate)
    spent, found = tried[log_beta]
    price = _price(aim, log_beta, _LEAST_LOG_BETA)
    return spent + (win_rate - found) / price if price else spent


def most_win_rate(masses: ArrayLike, untied: int, procedure: Procedure, opponent: Procedure, kl: float) -> float:
    """The largest mean win rate over prompts of any policy of this mean KL (nats); at 0 or less, the reference's.

    masses, untied: as in `prompts_with`. All prompts have one beta, for no other division of the KL among prompts wins
    more. Where W is not concave no beta may give this KL; then it is a bound, see `win_rate_at`. More KL than it takes
    to be always at the top wins no more. Not for functionals of F. Raises UserError where the closed form cannot be
    solved.
    """
    prompts = prompts_with(masses, untied)
    if kl > 0:
        return win_rate_at(prompts, Aim(procedure, opponent, Optimal()), kl, np.log(_NEGLIGIBLE / kl))
    tied = atom_win_rate(prompts.masses, np.zeros(prompts.masses.shape), pairings(procedure, opponent))
    return float(prompts.share @ tied) + prompts.untied * optimal_win_rate(procedure, opponent, 0)


def _search(
    prompts: Prompts, aim: Aim, excess: Callable[[Means], float], least: float = _LEAST_LOG_BETA
) -> tuple[float, dict[float, Means]]:
    """The log beta at which something of the means that falls with it is 0, and the means at each that was tried."""
    tried: dict[float, Means] = {}

    def excess_at(log_beta: float) -> float:
        if log_beta not in tried:
            tried[log_beta] = means_of(prompts, aim, float(np.exp(log_beta)))
        return excess(tried[log_beta])

    log_beta = _crossing(excess_at, least)
    excess_at(log_beta)
    return log_beta, tried


def _price(aim: Aim, log_beta: float, least: float) -> float:
    """dW / dKL along the optimum, which no W - beta KL exceeds.

    0 for other transforms, whose KL does not jump, and where the search ended at `least`: more KL wins nothing.
    """
    return float(np.exp(log_beta)) if isinstance(aim.transform, Optimal) and log_beta >= least else 0.0


def _crossing(excess: Callable[[float], float], least: float) -> float:
    """The log beta at which what falls with it crosses 0, to 1e-5; about `least` where it does not above."""
    high = low = 0.0
    while excess(high) > 0:
        low, high = high, high + 1
    while excess(low) < 0:
        if low < least:
            return low
        low, high = low - 1, low
    return low if excess(low) == 0 else float(brentq(excess, low, high, xtol=1e-5))


def _always_at_the_top(masses: Floats) -> Floats:
    """log f of the policy that always has the best reward: (rows, atoms)."""
    top = np.zeros(masses.shape, bool)
    top[np.arange(len(masses)), _top(masses)] = True
    return np.where(top, -np.log(np.where(top, masses, 1)), -np.inf)


def _top(masses: Floats) -> NDArray[np.intp]:
    """The index of the best atom of each row."""
    return masses.shape[1] - 1 - np.argmax(masses[:, ::-1] > 0, axis=1)


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
