"""Figures of the closed form: functions that draw on a matplotlib Axes, and functions that save a whole figure.

Colours are from the palette of Okabe and Ito, which readers with colour-blindness can tell apart; the format of a saved
figure follows the ending of its name.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iapo.closed_form import ClosedForm, Frontier
from iapo.deployment import Robustness
from iapo.errors import UserError

INK, FAINT = "#333333", "#8a8a8a"
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#767676")
STYLE = {
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_U = np.concatenate([np.linspace(0, 0.98, 491), np.linspace(0.98, 1, 201)[1:]])


def draw_transform(axes: Axes, form: ClosedForm) -> None:
    """Phi(u) over the calibrated reward u."""
    u = _U[1:]  # log is minus infinity at 0
    axes.plot(u, form.transform_values(u), color=COLORS[1])
    axes.set(xlabel="calibrated reward u", ylabel="transform Φ(u)", xlim=(0, 1))


def draw_density(axes: Axes, form: ClosedForm) -> None:
    """f(u) of the trained policy beside the reference's 1; both in e-folds where f spans more than a hundredfold."""
    density = form.density(_U)
    axes.axhline(1, color=FAINT, linewidth=1, linestyle=":")
    axes.plot(_U, density, color=COLORS[0])
    if density.max() > 30:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(density.min() / 2, 1e-3))
    else:
        axes.fill_between(_U, density, color=COLORS[0], alpha=0.12, linewidth=0)
        axes.set_ylim(bottom=0)
    axes.annotate("reference", (0, 1), xytext=(4, 3), textcoords="offset points", color=FAINT)
    axes.set(xlabel="calibrated reward u", ylabel="density f(u)", xlim=(0, 1))


def draw_frontier(axes: Axes, frontier: Frontier) -> None:
    """Win rate against KL, one line a transform, named at its end."""
    for (name, rates), color in zip(frontier.win_rates.items(), _cycle(len(frontier.win_rates)), strict=True):
        axes.plot(frontier.kls, rates, color=color, label=name, linewidth=2.4 if name == "optimal" else 1.5)
    axes.set(xlabel="KL, nats", ylabel="win rate", xscale="log", xlim=(frontier.kls[0], frontier.kls[-1]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.legend(loc="upper left")


def save_closed_form(form: ClosedForm, path: Path) -> None:
    """The transform beside the density."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        draw_transform(left, form)
        draw_density(right, form)
        figure.suptitle(
            f"{_game(form)}, {form.transform}: KL {form.kl:.3g} nats, win rate {form.win_rate:.3f}",
            fontsize=11,
            color=INK,
        )

    _save(path, (8, 3.4), draw)


def draw_win_rates(axes: Axes, found: Robustness) -> None:
    """Win rate against the size n at the KL of all, of the policies trained for it and of the identity transform."""
    for name, rates, color in (
        ("trained for n", np.diag(found.win_rates), COLORS[0]),
        ("identity", found.identity, COLORS[1]),
    ):
        axes.plot(found.sizes, rates, "o-", color=color, label=name, markersize=4)
    axes.axhline(0.5, color=FAINT, linewidth=1, linestyle=":")
    axes.annotate("reference", (found.sizes[0], 0.5), xytext=(2, 3), textcoords="offset points", color=FAINT)
    axes.set(xlabel=f"n of {found.family}", ylabel="win rate", xscale="log", xticks=found.sizes)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.minorticks_off()
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.98))


def draw_losses(axes: Axes, found: Robustness) -> None:
    """Percentage points of win rate lost, by the n trained for and the n deployed."""
    lost = 100 * found.losses
    axes.imshow(lost, cmap="OrRd", vmin=0, vmax=max(lost.max(), 1e-9) * 1.3, aspect="auto")
    for (row, column), value in np.ndenumerate(lost):
        text = "0" if row == column else f"{value:.2g}" if value < 10 else f"{value:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(found.sizes)), [str(size) for size in found.sizes])
    axes.set_yticks(range(len(found.sizes)), [str(size) for size in found.sizes])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="deployed with n", ylabel="trained for n", title="win rate lost, in points")


def save_robustness(found: Robustness, path: Path) -> None:
    """Win rate against n at a fixed KL, beside the matrix of what another n than the one trained for loses."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        draw_win_rates(left, found)
        draw_losses(right, found)
        figure.suptitle(f"{found.family} at a KL of {found.kl:g} nats", fontsize=11, color=INK)

    _save(path, (9, 3.9), draw)


def save_frontier(frontier: Frontier, path: Path) -> None:
    """Win rate against KL for every transform of the frontier."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        draw_frontier(axes, frontier)
        axes.set_title(_game(frontier))

    _save(path, (5.6, 4), draw)


def _game(result: ClosedForm | Frontier) -> str:
    against = "" if result.opponent == result.procedure else f" against {result.opponent}"
    return f"{result.procedure}{against}"


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _save(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    path = Path(path)
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"--plot {path}: a file name ending in .png, .svg or .pdf expected")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
