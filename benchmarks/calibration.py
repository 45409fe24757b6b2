"""How few samples a prompt calibrate as well as many: estimators of calibrated rewards. A table and one JSON line.

    python benchmarks/calibration.py RUN [--samples 4 8 16 32 64 100] [--repeats 20]

RUN is a run folder with many samples a prompt (400, say), sampled and scored. Of each prompt's samples K are drawn to
calibrate with, again and again, and the others tell the truth. For every estimator and K:

    error       root mean squared error of the calibrated reward of the K samples themselves, each left out of its own
                comparison; the chance in the truth is taken off
    as good as  the K of ranks alone that has this error, 1 + 1 / (6 error^2)
    W fitted    win rate of the policy that is fitted to the targets without other error: its log-ratio is their mean
                over the draws
    W learned   win rate of the policy that has learned one draw's targets by heart, chance and all
    explained   share of the variance of the targets that is not chance

Both policies have their log-ratios scaled so that the KL over the prompts is the budget.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
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


ESTIMATORS: dict[str, Callable[[Floats, Floats, list[str]], Places]] = {
    "ranks": ranks,
    "location-scale": location_scale,
    "pooled": pooled,
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
    total, squares, times = np.zeros_like(rewards), np.zeros_like(rewards), np.zeros_like(rewards)
    errors, worths, learned = [], [], []
    at = np.arange(prompts)[:, None]
    for _ in range(repeats):
        order = generator.permuted(np.tile(np.arange(count), (prompts, 1)), axis=1)
        chosen, rest = order[:, :samples], np.sort(order[:, samples:], axis=1)
        own, beside, worth = ESTIMATORS[name](rewards[at, chosen], rewards[at, rest], texts)
        truth = beside_ranks(rewards[at, rest], rewards[at, chosen])
        errors.append(squared_errors(own, truth, count - samples))
        worths.append(worth)
        centers = np.clip(beside, 0.5 / (worth + 1), 1 - 0.5 / (worth + 1))
        if name == "ranks":  # one more among K + 1
            centers = (beside * worth + 0.5) / (worth + 1)
        half = 0.5 / (worth + 1)
        targets = interval_targets(form, np.maximum(centers - half, 0), np.minimum(centers + half, 1), worth + 1)
        total[at, rest] += targets
        squares[at, rest] += targets**2
        times[at, rest] += 1
        by_reward = np.argsort(rewards[at, rest], axis=1)
        learned.append(win_rate_at(np.take_along_axis(targets, by_reward, axis=1), form))
    mean = total / np.maximum(times, 1)
    spread = np.maximum(squares / np.maximum(times, 1) - mean**2, 0) * times / np.maximum(times - 1, 1)  # of one draw
    by_prompt = np.mean(errors, axis=0)
    error = float(np.mean(by_prompt))
    chance = float(np.std(by_prompt, ddof=1) / np.sqrt(prompts))
    signal = float(np.var(mean) - np.mean(spread / np.maximum(times, 1)))
    return {
        "estimator": name,
        "samples": samples,
        "error": float(np.sqrt(max(error, 0))),
        "error_se": chance / (2 * float(np.sqrt(max(error, 1e-9)))),
        "as_good_as": 1 + 1 / (6 * max(error, 1e-6)),
        "worth_found": float(np.mean(worths)),
        "win_rate_fitted": win_rate_at(np.take_along_axis(mean, np.argsort(rewards, axis=1), axis=1), form),
        "win_rate_learned": float(np.mean(learned)),
        "explained": signal / (signal + float(np.mean(spread))),
    }


def main() -> None:
    """Measure every estimator at every K; print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 8, 16, 32, 64, 100])
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--procedure", default="best_of(4)")
    parser.add_argument("--target-kl", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rewards, texts = read_rewards(args.run)
    form = solve(args.procedure, target_kl=args.target_kl)
    scores = normal_scores(np.sort(rewards, axis=None), rewards)
    share = float(np.var(scores.mean(axis=1)) / np.var(scores))
    print(f"{len(rewards)} prompts of {rewards.shape[1]} samples, {share:.0%} of the variance of rewards is between prompts")
    print(f"{form.procedure} at {form.kl:g} nats: {form.win_rate:.4f} is possible")
    print(f"{'estimator':<16}{'K':>5}{'error':>9}{'± se':>8}{'as good as':>12}{'found':>8}", end="")
    print(f"{'W fitted':>10}{'W learned':>11}{'explained':>11}")
    rows = []
    for samples in args.samples:
        for name in args.estimators:
            row = measure(rewards, texts, name, samples, form, args.repeats, args.seed)
            rows.append(row)
            print(
                f"{name:<16}{samples:>5}{row['error']:>9.4f}{row['error_se']:>8.4f}{row['as_good_as']:>12.0f}"
                f"{row['worth_found']:>8.0f}{row['win_rate_fitted']:>10.4f}{row['win_rate_learned']:>11.4f}"
                f"{row['explained']:>11.3f}",
                flush=True,
            )
    about = {"prompts": len(rewards), "samples": rewards.shape[1], "between_prompts": share, "repeats": args.repeats}
    form_of = {"procedure": str(form.procedure), "kl": form.kl, "win_rate": form.win_rate}
    print(json.dumps({"benchmark": "calibration", "run": args.run.name, **about, **form_of, "rows": rows}))


if __name__ == "__main__":
    main()
