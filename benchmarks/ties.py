"""Equation (8) for many prompts at once, and one by one. A table and one JSON line.

    python benchmarks/ties.py

`binary`: 100,000 prompts of K = 32 rewards that are 0 or 1, from rewards to calibrated rewards to targets. `patterns`:
20,000 prompts of K = 32 with about as many distinct tie patterns, targets alone. `one by one` is scipy's brentq on the
two atoms of 500 of the binary prompts, for comparison. `most`: the most that can be won at a mean of 0.5 nats by
three prompts of 400 levels, which solves (8) for about twenty betas. Processor seconds of this process, medians of 3.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from iapo.atoms import atom_log_density, most_win_rate, tie_pattern  # noqa: E402
from iapo.calibrate import calibrate  # noqa: E402
from iapo.closed_form import solve  # noqa: E402
from iapo.procedures import parse_procedure  # noqa: E402
from iapo.targets import log_density_targets  # noqa: E402

PROMPTS, PATTERNS, SAMPLES, ONE_BY_ONE, BETA = 100_000, 20_000, 32, 500, 0.2


def seconds(work: Callable[[], object]) -> float:
    """Median of 3, in processor time."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return float(np.median(taken))


def binary_target(passed: int, n: int) -> float:
    """log f of a pass for best_of(n), by root finding on the mass of the policy that passes."""
    rate = passed / SAMPLES

    def missing(mass: float) -> float:
        return np.log(mass / rate) - np.log((1 - mass) / (1 - rate)) - n * (1 - mass) ** (n - 1) / (2 * BETA)

    return float(np.log(brentq(missing, 1e-12, 1 - 1e-12, xtol=1e-14) / rate))


def main() -> None:
    """Time all of it; print the table and the JSON line."""
    generator = np.random.default_rng(0)
    rewards = (generator.random((PROMPTS, SAMPLES)) < generator.random((PROMPTS, 1))).astype(float)
    frame = pd.DataFrame(
        {
            "prompt_id": np.repeat([f"{number:016x}" for number in range(PROMPTS)], SAMPLES),
            "sample_id": np.tile(np.arange(SAMPLES), PROMPTS),
            "source": "reference",
            "reward": rewards.ravel(),
        }
    )
    form = solve("best_of(4)", beta=BETA)
    calibrated = calibrate(frame)[1]
    counts = tie_pattern(rewards)[0]
    passed = rewards.sum(axis=1).astype(int)
    some = passed[(passed > 0) & (passed < SAMPLES)][:ONE_BY_ONE]
    levels = np.where(
        generator.random((PATTERNS, SAMPLES)) < 0.5,
        generator.integers(0, 12, (PATTERNS, SAMPLES)),
        12 * generator.random((PATTERNS, SAMPLES)),
    )
    patterns = tie_pattern(levels)[0]
    rows = {
        "binary: rewards to calibrated rewards": seconds(lambda: calibrate(frame)),
        "binary: calibrated rewards to targets": seconds(lambda: log_density_targets(calibrated, form)),
        "binary: (8) alone, from counts": seconds(lambda: atom_log_density(counts, form)),
        "binary: (8) one by one, for as many": seconds(lambda: [binary_target(int(k), 4) for k in some])
        * PROMPTS
        / ONE_BY_ONE,
    }
    for procedure in ("best_of(4)", "worst_of(4)", "kth(3, 5)"):
        other = solve(procedure, beta=BETA)
        rows[f"patterns: {procedure}"] = seconds(lambda other=other: atom_log_density(patterns, other))
    fine = generator.dirichlet(np.ones(400), size=3)
    for procedure in map(parse_procedure, ("best_of(8)", "worst_of(4)")):
        rows[f"most: {procedure}"] = seconds(lambda one=procedure: most_win_rate(fine, 0, one, one, 0.5))
    for name, value in rows.items():
        print(f"{name:<42}{value:>8.2f} s")
    distinct = len(np.unique(patterns, axis=0))
    about = {"prompts": PROMPTS, "samples": SAMPLES, "distinct_patterns": distinct}
    print(
        json.dumps({"benchmark": "ties", **about, "seconds": {name: round(value, 3) for name, value in rows.items()}})
    )


if __name__ == "__main__":
    main()
