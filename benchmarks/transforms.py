"""The analytical comparison of arXiv 2412.19792: win rate against KL of best_of and worst_of under each transform.

    python benchmarks/transforms.py [--plot docs/images/transforms.png]

Prints, for each procedure and KL, the win rate of the optimum and how many points (hundredths of win rate) the other
transforms fall short of it: identity, log, exponential tilts with fixed t (of the paper's sign: t > 0 for best_of,
t < 0 for worst_of) and with the best t, which is given too. Ends with one JSON line.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar

from iapo.closed_form import frontier, solve
from iapo.plots import STYLE, draw_frontier

SIZES = (2, 4, 32)
KLS = (0.02, 0.095, 0.5, 1.0, 2.0)
TILTS = (5, 10, 30, 90)


def best_tilt(procedure: str, kl: float, sign: int) -> tuple[float, float]:
    """The t of sign(t) e^(t u) with the largest win rate at this KL, and that win rate; |t| between 0.05 and 600."""

    def loss(log_t: float) -> float:
        return -solve(procedure, None, f"exp_tilt({sign * np.exp(log_t):.12g})", target_kl=kl).win_rate

    grid = np.log(np.geomspace(0.05, 600, 25))
    values = [loss(x) for x in grid]
    at = int(np.argmin(values))
    around = (grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
    found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-4})
    return float(sign * np.exp(found.x)), -float(found.fun)


def compare(procedure: str, kl: float, sign: int) -> dict:
    optimal = solve(procedure, target_kl=kl).win_rate
    t, tilted = best_tilt(procedure, kl, sign)
    fixed = {f"exp_tilt({sign * t})": None for t in TILTS}
    short = {
        name: 100 * (optimal - solve(procedure, None, name, target_kl=kl).win_rate)
        for name in ("identity", "log", *fixed)
    }
    return {
        "procedure": procedure,
        "kl": kl,
        "optimal": optimal,
        "points_short": short | {"best exp_tilt": 100 * (optimal - tilted)},
        "best_t": t,
    }


def draw(path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.4))
        panels = figure.subplots(2, len(SIZES), sharex=True, sharey=True)
        for row, (name, sign) in zip(panels, (("best_of", 1), ("worst_of", -1)), strict=True):
            for axes, n in zip(row, SIZES, strict=True):
                tilts = (f"exp_tilt({sign * 10})", f"exp_tilt({sign * 3 * n})")
                draw_frontier(axes, frontier(f"{name}({n})", transforms=("optimal", "identity", "log", *tilts)))
                axes.set_title(f"{name}({n})")
                axes.legend(loc="lower right", fontsize=8)
                axes.label_outer()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = [
        compare(f"{name}({n})", kl, sign)
        for name, sign in (("best_of", 1), ("worst_of", -1))
        for n in SIZES
        for kl in KLS
    ]
    print("points short of the optimum at the same KL")
    columns = ("identity", "log", *(f"t = {t}" for t in TILTS), "best t")
    print(f"{'procedure':14} {'KL':>6} {'optimal':>8}" + "".join(f"{name:>9}" for name in columns) + f"{'t':>9}")
    for row in rows:
        short = "".join(f"{points:>9.2f}" for points in row["points_short"].values())
        print(f"{row['procedure']:14} {row['kl']:>6g} {row['optimal']:>8.4f}{short}{row['best_t']:>9.3g}")
    if arguments.plot:
        draw(arguments.plot)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
