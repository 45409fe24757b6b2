"""The results of benchmarks/quality.py as a picture: a panel for each setting, procedure and KL.

python benchmarks/quality_plot.py RESULT.json ... --plot docs/images/results.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS, LINE = "#0072b2", "#767676", "#d55e00"
NAMES = {"dpo": "DPO", "ipo": "IPO", "kto": "KTO", "identity": "identity (QRPO)", "log": "log (QRPO)"}


def panels(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The best record of every method, by the title of its panel."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        for record in result["measured"]:
            exact = record["kl_se"] == 0
            if not record["met"] or (exact and record["split"] == "holdout"):  # at the KL of the others, not their own
                continue
            title = f"{result['setting']}: {record['procedure']}, {record['asked_kl']:g} nats"
            methods = found.setdefault(title, {})
            if record["win_rate"] > methods.get(record["method"], record | {"win_rate": -1.0})["win_rate"]:
                methods[record["method"]] = record
    return {title: sorted(methods.values(), key=lambda one: one["win_rate"]) for title, methods in found.items()}


def draw(axes: Any, title: str, records: list[dict[str, Any]]) -> None:
    """Win rate of each method with its interval; lines: the most possible, and the most for plain win rate."""
    for row, record in enumerate(records):
        color = OURS if record["method"] in ("optimal", "exp_tilt(10)") else OTHERS
        error = [[record["win_rate"] - record["win_rate_low"]], [record["win_rate_high"] - record["win_rate"]]]
        axes.errorbar(record["win_rate"], row, xerr=error, fmt="o", color=color, capsize=2, markersize=5)
    best = max(records, key=lambda one: one["method"] == "optimal")
    axes.axvline(best["closed_form"], color=LINE, linewidth=1.2, label="closed form")
    axes.axvline(best["identity"], color=LINE, linewidth=1.2, linestyle="--", label="identity's closed form")
    axes.set_yticks(range(len(records)), [NAMES.get(record["method"], record["method"]) for record in records])
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("win rate", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.margins(y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Read the results, draw the panels, save the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    found = panels([json.loads(path.read_text()) for path in args.results])
    columns = 3
    rows = -(-len(found) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.1 * columns, 2.3 * rows), squeeze=False, layout="constrained")
    for axes, (title, records) in zip(grid.flat, found.items(), strict=False):
        draw(axes, title, records)
    for axes in grid.flat[len(found) :]:
        axes.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()
