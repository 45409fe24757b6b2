"""Time and accuracy of the closed form's optimum over procedures, n from 1 to 1024 and KL from 1e-4 to 10 nats.

    OMP_NUM_THREADS=1 python benchmarks/closed_form.py

Prints a table with the worst of each procedure, then one JSON line. Time is processor time of one solution, none of it
cached. The residual is the largest defect of the equations as they are solved, between the nodes of the solver: of the
slopes of log F and log f by s (`iapo.curves`), which are at most 1; where there is no h, of (1), relative to
1 + |log f|. The defect of (5) is that of log f(1) - log f(u) = integral of k / beta du from u to 1 with du as the
polynomials have it, relative to 1 + |log f(u)|, at all edges of panels. Warnings are errors.
"""

import json
import time
import warnings
from collections.abc import Iterator

import numpy as np

from iapo import functionals
from iapo.closed_form import solve
from iapo.curves import Curve, log_kernel, residual
from iapo.errors import UserError
from iapo.functionals import Variation
from iapo.optimum import Collocation
from iapo.paths import along
from iapo.procedures import Pairing, has_functional, pairings, parse_procedure
from iapo.quadrature import NODES

KLS = (1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 32, 128, 512, 1024)
POINTWISE = (
    "sample",
    *(f"{name}({n})" for name in ("best_of", "worst_of") for n in SIZES),
    *(f"kth({k}, {n})" for k, n in ((3, 5), (2, 32), (16, 32), (2, 1024), (512, 1024), (1000, 1024))),
    *(f"best_of_poisson({mu})" for mu in (0.5, 3, 100, 1000)),
    "0.5 sample + 0.5 best_of(8)",
    "0.5 worst_of(8) + 0.5 best_of(8)",
    "0.9 best_of(64) + 0.1 worst_of(2)",
    "0.5 worst_of(1024) + 0.5 best_of(1024)",
)
FUNCTIONAL = (
    "early_stop(2, 0.5)",
    "early_stop(8, 0.8)",
    "early_stop(32, 0.3)",
    "early_stop(64, 0.95)",
    "early_stop(1024, 0.999)",
    "0.5 early_stop(8, 0.8) + 0.5 worst_of(4)",
    "0.5 early_stop(4, 0.9) + 0.5 best_of(4)",
)
LIMITS = {"pointwise": 0.3, "functional": 3.0}


def main() -> None:
    warnings.simplefilter("error")
    solve("early_stop(2, 0.5)", target_kl=0.1)  # imports torch, which is not what is measured
    print(f"{'procedure':40} {'solved':>8}", end="")
    print(f"{'KL error':>10}{'residual':>10}{'of (5)':>10}{'median s':>10}{'longest s':>11}{'refused s':>11}")
    rows = {kind: [] for kind in LIMITS}
    for kind, texts in zip(LIMITS, (POINTWISE, FUNCTIONAL), strict=True):
        for text in texts:
            found = list(solutions(text))
            rows[kind] += found
            solved, refused = split(found)
            worst = {key: max(row[key] for row in solved) for key in ("kl_error", "residual", "of_5", "seconds")}
            median = np.median([row["seconds"] for row in solved])
            print(
                f"{text:40} {len(solved):>3} of {len(found)}{worst['kl_error']:>10.0e}{worst['residual']:>10.0e}"
                f"{worst['of_5']:>10.0e}{median:>10.3f}{worst['seconds']:>11.3f}"
                f"{max((row['seconds'] for row in refused), default=0):>11.3f}",
                flush=True,
            )
    print(json.dumps({kind: summary(found, LIMITS[kind]) for kind, found in rows.items()}))


def solutions(text: str) -> Iterator[dict]:
    """A record for each KL; the residual is None where the KL was refused."""
    pairs = pairings(parse_procedure(text))
    functional = has_functional(pairs)
    solver = Variation(pairs) if functional else Collocation(pairs)
    for kl in KLS:
        row = {"procedure": text, "kl": kl, "residual": None}
        start = time.process_time()
        try:
            point = along(solver, [kl])[0]
        except UserError:
            yield row | {"seconds": time.process_time() - start}
            continue
        seconds = time.process_time() - start
        form = solve(text, target_kl=kl)  # what a user gets has no NaN, and its mean over any number of samples is 1
        mean = np.mean(np.exp(form.log_mean_density(np.arange(32) / 32, np.arange(1, 33) / 32)))
        assert np.all(np.isfinite(form.log_density(np.linspace(0, 1, 101)))) and abs(mean - 1) < 1e-7
        defect = functionals.residual(pairs, point) if functional else residual(pairs, point)
        yield row | {
            "kl_error": abs(form.kl / kl - 1),
            "residual": defect,
            "of_5": defect if functional else defect_of_5(pairs, point),
            "seconds": seconds,
        }


def defect_of_5(pairs: tuple[Pairing, ...], curve: Curve) -> float:
    """Of log f(1) - log f(u) = integral of k / beta du from u to 1, by the polynomials and another Gauss rule."""
    x, weight = np.polynomial.legendre.leggauss(12)
    x, points = (1 + x) / 2, np.r_[0, NODES]
    powers = np.arange(len(points))
    slopes = np.linalg.solve(
        np.vander(points, increasing=True).T, (powers * x[:, None] ** np.maximum(powers - 1, 0)).T
    ).T
    width = np.diff(curve.edges)[:, None]
    place = curve.edges[:-1, None] + width * x
    values = curve.at(place)
    log_rest = curve.log_rest(place, values)
    by_place = slopes @ np.concatenate([curve.state[:-1, None], curve.stages], axis=1) / width[..., None]
    fall = curve.length - by_place.sum(axis=-1)  # of log(1 - u)
    log_slope = log_kernel(pairs, values[..., 0], log_rest) - curve.log_beta + log_rest  # dlog f / -dlog(1 - u)
    integral = np.sum(width * weight / 2 * np.exp(np.minimum(log_slope, 300)) * fall, axis=1)
    error = np.cumsum((integral - np.diff(curve.state[:, 1]))[::-1])[::-1]
    return float(np.max(np.abs(error) / (1 + np.abs(curve.state[:-1, 1]))))


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Those that were solved, and the others."""
    return [row for row in rows if row["residual"] is not None], [row for row in rows if row["residual"] is None]


def summary(rows: list[dict], limit: float) -> dict:
    solved, refused = split(rows)
    return {
        "cases": len(rows),
        "refused": [(row["procedure"], row["kl"]) for row in refused],
        "kl_error": max(row["kl_error"] for row in solved),
        "residual": max(row["residual"] for row in solved),
        "of_5": max(row["of_5"] for row in solved),
        "residual_above_1e-8": [(row["procedure"], row["kl"]) for row in solved if row["residual"] > 1e-8],
        "median_seconds": float(np.median([row["seconds"] for row in solved])),
        "longest_seconds": max(row["seconds"] for row in solved),
        f"longer_than_{limit:g}_s": [(row["procedure"], row["kl"]) for row in rows if row["seconds"] > limit],
    }


if __name__ == "__main__":
    main()
