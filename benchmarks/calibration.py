"""How few samples a prompt calibrate as well as many: estimators of calibrated rewards. A table and one JSON line.

    python benchmarks/calibration.py RUN [--samples 4 8 16 32 64 100] [--repeats 20]

RUN is a run folder with many samples a prompt (256, say), sampled and scored. Of each prompt's samples K are drawn to
calibrate with, again and again, and the others tell the truth. For every estimator and K:

    error       root mean squared error of the calibrated reward of the K samples themselves, each left out of its own
                comparison; the chance in the truth is taken off
    as good as  the K of ranks alone that has this error, 1 + 1 / (6 error^2)
    found       what `pooling` itself takes this number for, from the K samples alone
    win rate    of the policy that has learned the targets of one draw by heart, chance and all, and whose log-ratio is
                scaled so that the mean KL over the prompts is the budget; on the half of the samples that are never
                calibrated with, so that the estimators meet the same ones
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, linprog
from scipy.sparse import csr_matrix, hstack, identity
from scipy.special import logsumexp
from scipy.stats import rankdata

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from iapo.atoms import atom_win_rate  # noqa: E402
from iapo.closed_form import ClosedForm, solve  # noqa: E402
from iapo.few_samples import interval_targets  # noqa: E402
from iapo.pooling import Pool, fit_pool, normal_scores, pooled_places, pooled_places_beside  # noqa: E402
from iapo.procedures import pairings  # noqa: E402
from iapo.prompts import GIVEN_FIRST_ID  # noqa: E402
from iapo.store import read_table  # noqa: E402

Floats = NDArray[np.float64]
Places = tuple[Floats, Floats, int]
"""Calibrated rewards of the samples, of the others, and the number of samples they are worth."""


def read_rewards(run: Path) -> tuple[Floats, list[str]]:
    """Rewards (prompts, samples) of reference samples, and the text of each prompt."""
    rewards = read_table(run / "rewards").to_pandas()
    rewards = rewards[rewards["sample_id"] < GIVEN_FIRST_ID].sort_values(["prompt_id", "sample_id"])
    table = rewards.pivot(index="prompt_id", columns="sample_id", values="reward").dropna()
    prompts = read_table(run / "prompts.parquet").to_pandas().set_index("prompt_id")["prompt"]
    return table.to_numpy(), [" ".join(turn["content"] for turn in prompts[name]) for name in table.index]


# --- Estimators: (samples (prompts, K), others (prompts, N), texts) -> places -----------------------------------------


def ranks(samples: Floats, others: Floats, texts: list[str]) -> Places:
    """The prompt's own samples alone."""
    return own_ranks(samples), beside_ranks(samples, others), samples.shape[1]


def location_scale(samples: Floats, others: Floats, texts: list[str]) -> Places:
    """(11) alone: w = 1."""
    return _by_pool(replace(fit_pool(samples), weight=1.0), samples, others)


def pooled(samples: Floats, others: Floats, texts: list[str]) -> Places:
    """(12)."""
    return _by_pool(fit_pool(samples), samples, others)


def _by_pool(pool: Pool, samples: Floats, others: Floats) -> Places:
    prompt = np.repeat(np.arange(len(others)), others.shape[1])
    beside = pooled_places_beside(pool, samples, prompt, others.ravel(), beside_ranks(samples, others).ravel())
    return pooled_places(pool, samples, own_ranks(samples)), beside.reshape(others.shape), pool.worth


def words(samples: Floats, others: Floats, texts: list[str]) -> Places:
    """(12) on what is left of rewards by a ridge regression of a prompt's mean reward on its words.

    The regression that a prompt's rewards are taken off is fitted to the other four fifths of the prompts, with the
    best of six penalties for a prediction of left-out means.
    """
    counts = np.zeros((len(texts), 128))
    for row, text in enumerate(texts):
        for word in set(text.lower().split()):
            counts[row, zlib.crc32(word.encode()) % 128] += 1
    counts = np.c_[counts, [np.log(1 + len(text)) for text in texts]]
    counts = (counts - counts.mean(axis=0)) / (counts.std(axis=0) + 1e-9)
    means, fold = samples.mean(axis=1), np.arange(len(texts)) % 5
    best = np.zeros(len(texts))  # predicting nothing, where no regression does better
    for penalty in 10.0 ** np.arange(0, 6):
        found = np.empty(len(texts))
        for part in range(5):
            known = fold != part
            gram = counts[known].T @ counts[known] + penalty * np.eye(counts.shape[1])
            slope = np.linalg.solve(gram, counts[known].T @ (means[known] - means[known].mean()))
            found[~known] = counts[~known] @ slope
        if np.var(means - found) < np.var(means - best):
            best = found
    return pooled(samples - best[:, None], others - best[:, None], texts)


def quantile_regression(samples: Floats, others: Floats, texts: list[str]) -> Places:
    """Linear quantiles of the normal score given the prompt's own mean and log deviation and the length of its text."""
    ordered = np.sort(samples, axis=None)
    y, z = normal_scores(ordered, samples), normal_scores(ordered, others)
    length = np.log([1 + len(text) for text in texts])[:, None]
    count = samples.shape[1]
    total, squares = y.sum(axis=1, keepdims=True), (y**2).sum(axis=1, keepdims=True)

    def features(total: Floats, squares: Floats, count: int, shape: tuple[int, ...]) -> Floats:
        spread = 0.5 * np.log(np.maximum(squares / count - (total / count) ** 2, 0.01))
        parts = np.broadcast_arrays(np.ones(shape), length, total / count, spread)
        return np.stack(parts, axis=-1)

    inside = features(total - y, squares - y**2, count - 1, y.shape)
    rows = np.random.default_rng(0).permutation(y.size)[:1200]
    design, response = inside.reshape(-1, 4)[rows], y.ravel()[rows]
    levels = np.arange(0.05, 0.96, 0.05)
    slopes = [_pinball(design, response, level) for level in levels]

    def places(some: Floats, about: Floats) -> Floats:
        knots = np.sort(np.stack([about @ slope for slope in slopes], axis=-1), axis=-1)
        ends = knots[..., :1] - 2, knots[..., -1:] + 2
        knots = np.concatenate([ends[0], knots, ends[1]], axis=-1).reshape(-1, len(levels) + 2)
        found = [np.interp(*pair, [0, *levels, 1]) for pair in zip(some.ravel(), knots, strict=True)]
        return np.reshape(found, some.shape)

    return places(y, inside), places(z, features(total, squares, count, z.shape)), 2 * count


def _pinball(design: Floats, response: Floats, level: float) -> Floats:
    """The coefficients of one quantile, by linear programming."""
    rows, columns = design.shape
    cost = np.r_[np.zeros(columns), np.full(rows, level), np.full(rows, 1 - level)]
    balance = hstack([csr_matrix(design), identity(rows), -identity(rows)])
    bounds = [(None, None)] * columns + [(0, None)] * (2 * rows)
    return linprog(cost, A_eq=balance, b_eq=response, bounds=bounds, method="highs").x[:columns]


ESTIMATORS: dict[str, Callable[[Floats, Floats, list[str]], Places]] = {
    "ranks": ranks,
    "location-scale": location_scale,
    "pooled": pooled,
    "words": words,
    "quantiles": quantile_regression,
}


def own_ranks(samples: Floats) -> Floats:
    """Each sample's mid-rank among the others of its prompt."""
    return (rankdata(samples, axis=1) - 1) / (samples.shape[1] - 1)


def beside_ranks(samples: Floats, others: Floats) -> Floats:
    """The mid-rank of each of the others among the samples of its prompt."""
    ordered = np.sort(samples, axis=1)
    pairs = zip(ordered, others, strict=True)
    sides = [[np.searchsorted(row, some, side=side) for side in ("left", "right")] for row, some in pairs]
    return np.asarray(sides).mean(axis=1) / samples.shape[1]


# --- Measures ---------------------------------------------------------------------------------------------------------


def squared_errors(places: Floats, truth: Floats, count: int) -> Floats:
    """Per prompt, without the chance of a truth that is itself a rank among `count` samples."""
    return np.mean((places - truth) ** 2 - truth * (1 - truth) / (count - 1), axis=1)


def win_rate_at(log_ratio: Floats, form: ClosedForm) -> float:
    """Mean win rate of the policies with this log-ratio, (prompts, N) in order of reward, scaled to the form's KL."""
    count = log_ratio.shape[1]

    def scaled(size: float) -> Floats:
        return size * log_ratio - logsumexp(size * log_ratio, axis=1, keepdims=True) + np.log(count)

    def kl(size: float) -> float:
        log_f = scaled(size)
        return float(np.mean(np.exp(log_f) * log_f))

    high = 1.0
    while kl(high) < form.kl and high < 1e4:
        high *= 2
    size = brentq(lambda size: kl(size) - form.kl, 0, high, xtol=1e-6)
    pairs = pairings(form.procedure, form.opponent)
    return float(atom_win_rate(np.ones_like(log_ratio), scaled(size), pairs).mean())


def measure(
    rewards: Floats, texts: list[str], name: str, samples: int, form: ClosedForm, repeats: int, seed: int
) -> dict[str, float]:
    """One row of the table: an estimator at K samples."""
    generator = np.random.default_rng(seed)
    prompts, count = rewards.shape
    half = count // 2
    judged = np.sort(rewards[:, half:], axis=1)
    errors, worths, rates = [], [], []
    for _ in range(repeats):
        chosen = generator.permuted(np.tile(np.arange(half), (prompts, 1)), axis=1)
        calibrating, left = np.split(np.take_along_axis(rewards[:, :half], chosen, axis=1), [samples], axis=1)
        own, beside, worth = ESTIMATORS[name](calibrating, judged, texts)
        rest = np.concatenate([left, judged], axis=1)
        errors.append(squared_errors(own, beside_ranks(rest, calibrating), count - samples))
        worths.append(worth)
        total = worth + 1  # a judged one is one more
        middle = np.clip(beside, 0.5 / total, 1 - 0.5 / total) if name != "ranks" else (beside * worth + 0.5) / total
        rates.append(win_rate_at(interval_targets(form, middle - 0.5 / total, middle + 0.5 / total, total), form))
    by_prompt = np.mean(errors, axis=0)
    error, chance = max(float(by_prompt.mean()), 1e-6), float(by_prompt.std(ddof=1) / np.sqrt(prompts))
    return {
        "estimator": name,
        "samples": samples,
        "error": float(np.sqrt(error)),
        "error_se": chance / (2 * float(np.sqrt(error))),
        "as_good_as": 1 + 1 / (6 * error),
        "found": float(np.mean(worths)),
        "win_rate": float(np.mean(rates)),
        "win_rate_se": float(np.std(rates, ddof=1) / np.sqrt(repeats)),
    }


def main() -> None:
    """Measure every estimator at every K; print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 8, 16, 32, 64, 100])
    parser.add_argument(
        "--estimators", nargs="+", default=["ranks", "location-scale", "pooled"], choices=list(ESTIMATORS)
    )
    parser.add_argument("--procedure", default="best_of(4)")
    parser.add_argument("--target-kl", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rewards, texts = read_rewards(args.run)
    form = solve(args.procedure, target_kl=args.target_kl)
    scores = normal_scores(np.sort(rewards, axis=None), rewards)
    share = float(np.var(scores.mean(axis=1)) / np.var(scores))
    print(f"{len(rewards)} prompts of {rewards.shape[1]} samples; {share:.0%} of the variance is between prompts")
    print(f"{form.procedure} at {form.kl:g} nats: {form.win_rate:.4f} is possible")
    print(f"{'estimator':<16}{'K':>5}{'error':>9}{'± se':>8}{'as good as':>12}{'found':>8}", end="")
    print(f"{'win rate':>10}{'± se':>8}")
    rows = []
    for samples in args.samples:
        for name in args.estimators:
            row = measure(rewards, texts, name, samples, form, args.repeats, args.seed)
            rows.append(row)
            print(
                f"{name:<16}{samples:>5}{row['error']:>9.4f}{row['error_se']:>8.4f}{row['as_good_as']:>12.0f}"
                f"{row['found']:>8.0f}{row['win_rate']:>10.4f}{row['win_rate_se']:>8.4f}",
                flush=True,
            )
    about = {"prompts": len(rewards), "samples": rewards.shape[1], "between_prompts": share, "repeats": args.repeats}
    form_of = {"procedure": str(form.procedure), "kl": form.kl, "win_rate": form.win_rate}
    print(json.dumps({"benchmark": "calibration", "run": args.run.name, **about, **form_of, "rows": rows}))


if __name__ == "__main__":
    main()
