"""Targets for the ranks of K samples: which lose least. A table and one JSON line.

    python benchmarks/few_samples.py [--plot FILE] [--fit]

For every choice of targets: the KL of the policy fitted to them without other error, its win rate there beside the
largest possible, the share of the possible gain it has when its log-ratio is scaled to the KL that was asked for, and
the share of the variance of the targets that is chance.

    interval    the log of the mean of f over [(i - 1)/K, i/K]
    E log f     the mean of log f over U ~ Beta(i, K + 1 - i)
    log E f     the log of the mean of f over it
    price c     equation (10) of `iapo.few_samples`

--fit instead fits d random features of 6-dimensional responses to the targets of N of them by least squares, and
measures KL and win rate of the policy that comes of it among 20,000 others: what finite data makes of the choices.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import beta as beta_distribution

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from iapo import few_samples  # noqa: E402
from iapo.atoms import atom_kl, atom_win_rate  # noqa: E402
from iapo.closed_form import ClosedForm, optimal_win_rate, solve  # noqa: E402
from iapo.few_samples import RankMean, rank_targets  # noqa: E402
from iapo.procedures import pairings  # noqa: E402

Floats = NDArray[np.float64]
Choice = Callable[[ClosedForm, int], Floats]
_x, _w = np.polynomial.legendre.leggauss(400)
U, DU = (_x + 1) / 2, _w / 2
CASES = (("best_of(4)", 0.5), ("worst_of(4)", 0.5), ("best_of(8)", 2.0))


def interval(form: ClosedForm, samples: int) -> Floats:
    edges = np.arange(samples + 1) / samples
    return form.log_mean_density(edges[:-1], edges[1:])


def _posterior(samples: int) -> Floats:
    rank = np.arange(1, samples + 1)[:, None]
    return beta_distribution.pdf(U, rank, samples + 1 - rank) * DU


def mean_log(form: ClosedForm, samples: int) -> Floats:
    return _posterior(samples) @ form.log_density(U)


def log_mean(form: ClosedForm, samples: int) -> Floats:
    return np.log(_posterior(samples) @ form.density(U))


def priced(price: float) -> Choice:
    def choice(form: ClosedForm, samples: int) -> Floats:
        few_samples.NOISE_PRICE = price
        rank_targets.cache_clear()
        return rank_targets(form, samples)

    return choice


CHOICES: dict[str, Choice] = {
    "interval": interval,
    "E log f": mean_log,
    "log E f": log_mean,
    **{f"price {price}": priced(price) for price in (0.3, 0.1, 0.03)},
}


def ideal_rows() -> Iterator[dict[str, Any]]:
    """What a fit without other error makes of each choice."""
    for procedure, kl in CASES:
        form = solve(procedure, target_kl=kl)
        for samples in (8, 16, 32, 100):
            for name, choice in CHOICES.items():
                targets = choice(form, samples)
                mean = RankMean(tuple(targets))
                fitted = solve(procedure, None, mean, beta=1.0)
                scaled = solve(procedure, None, mean, target_kl=kl)
                explained = DU @ mean(U) ** 2 - targets.mean() ** 2
                yield {
                    "procedure": procedure,
                    "asked": kl,
                    "samples": samples,
                    "targets": name,
                    "kl": fitted.kl,
                    "win_rate": fitted.win_rate,
                    "possible": optimal_win_rate(procedure, None, fitted.kl),
                    "gain_at_asked": (scaled.win_rate - 0.5) / (form.win_rate - 0.5),
                    "chance": 1 - explained / targets.var(),
                }


def finite_rows() -> Iterator[dict[str, Any]]:
    """What a least-squares fit of d features to N responses makes of each choice."""
    count = 20_000
    for procedure, kl in CASES:
        form = solve(procedure, target_kl=kl)
        for features, responses in ((100, 10_000), (1000, 10_000), (1000, 100_000)):
            generator = np.random.default_rng(0)
            directions, phases = 0.35 * generator.normal(size=(6, features)), 6.28 * generator.random(features)

            def embed(z: Floats, directions: Floats = directions, phases: Floats = phases) -> Floats:
                return np.c_[np.ones(len(z)), np.sqrt(2) * np.cos(z @ directions + phases)]

            def reward(z: Floats) -> Floats:
                return np.tanh(0.7 * z @ [1, 1, 0.5, 0.3, 0, 0]) + 0.2 * z[:, 0] * z[:, 2]

            judged = generator.normal(size=(count, 6))
            judged = embed(judged[np.argsort(reward(judged))])
            for samples in (8, 32):
                z = generator.normal(size=(responses // samples * samples, 6))
                ranks = reward(z).reshape(-1, samples).argsort(axis=1).argsort(axis=1).ravel()
                design = embed(z)
                gram = design.T @ design + 1e-5 * len(z) * np.eye(features + 1)
                for name, choice in CHOICES.items():
                    log_ratio = judged @ np.linalg.solve(gram, design.T @ choice(form, samples)[ranks])

                    kl_found, win_rate = _policy(log_ratio, form)
                    scale = brentq(lambda size, d=log_ratio, f=form: _policy(size * d, f)[0] - f.kl, 0, 100, xtol=1e-4)
                    yield {
                        "procedure": procedure,
                        "asked": kl,
                        "features": features,
                        "responses": responses,
                        "samples": samples,
                        "targets": name,
                        "kl": kl_found,
                        "win_rate": win_rate,
                        "gain_at_asked": (_policy(scale * log_ratio, form)[1] - 0.5) / (form.win_rate - 0.5),
                    }


def _policy(log_ratio: Floats, form: ClosedForm) -> tuple[float, float]:
    """KL and win rate, given the log-ratio of equally likely responses in order of reward, up to a constant."""
    masses = np.ones((1, len(log_ratio)))
    log_f = (log_ratio - logsumexp(log_ratio) + np.log(len(log_ratio)))[None]
    pairs = pairings(form.procedure, form.opponent)
    return float(atom_kl(masses, log_f)[0]), float(atom_win_rate(masses, log_f, pairs)[0])


def save_plot(path: Path) -> None:
    """KL and win rate against K, of a policy fitted to best_of(4) at 0.5 nats, for three choices of targets."""
    from matplotlib.figure import Figure

    form = solve("best_of(4)", target_kl=0.5)
    counts = [4, 6, 8, 12, 16, 24, 32, 48, 64, 100]
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {
        f"price {few_samples.NOISE_PRICE}": ("#0072b2", "-", "targets of (10)"),
        "interval": ("#d55e00", "--", "mean of f over the interval"),
        "E log f": ("#767676", ":", "posterior mean of log f"),
    }
    for name, (color, line, label) in styles.items():
        fitted = [
            solve("best_of(4)", None, RankMean(tuple(CHOICES[name](form, samples))), beta=1.0) for samples in counts
        ]
        left.plot(counts, [one.kl for one in fitted], line, color=color, marker="o", ms=3.5, label=label)
        right.plot(counts, [one.win_rate for one in fitted], line, color=color, marker="o", ms=3.5, label=label)
    for axes, value, label in ((left, form.kl, "KL of the fitted policy, nats"), (right, form.win_rate, "win rate")):
        axes.axhline(value, color="#222222", lw=0.8)
        axes.annotate("asked for", (4, value), (0, -3), textcoords="offset points", va="top", fontsize=8)
        axes.set_xscale("log")
        axes.set_xticks([4, 8, 16, 32, 64, 100], ["4", "8", "16", "32", "64", "100"])
        axes.minorticks_off()
        axes.set_xlabel("samples a prompt, K")
        axes.set_title(label, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args()
    if args.plot:
        save_plot(args.plot)
    rows = []
    for row in finite_rows() if args.fit else ideal_rows():
        if not rows:
            print("".join(f"{name:>14}" for name in row))
        rows.append(row)
        print("".join(f"{value:>14.4g}" if isinstance(value, float) else f"{value:>14}" for value in row.values()))
    print(json.dumps({"benchmark": "few_samples", "fit": args.fit, "rows": rows}))


if __name__ == "__main__":
    main()
