"""The figures of the report, each as the text of one inline SVG.

Labels stand beside what they name, in its colour, so that no figure needs a legend.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from iapo.calibrate import BAD_KS, Floats
from iapo.closed_form import ClosedForm
from iapo.plots import COLORS, FAINT, INK, STYLE, draw_density, draw_transform

PREDICTED_COLOR, TRAINED_COLOR, HELD_OUT_COLOR, *OTHER_COLORS, BASE_COLOR = COLORS

SVG_STYLE = STYLE | {
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and set in the page's font
    "svg.hashsalt": "iapo",  # the same figure has the same bytes
    "text.parse_math": False,  # names come from the user, who may use a dollar sign
}
SIZE = (5.2, 3.7)
BINS = 20

P = ParamSpec("P")


def _drawn(label: str) -> Callable[[Callable[Concatenate[Figure, P], None]], Callable[P, Markup]]:
    """Turns a function that draws on a figure into one that returns the drawing as SVG, in the report's style."""

    def decorate(draw: Callable[Concatenate[Figure, P], None]) -> Callable[P, Markup]:
        @wraps(draw)
        def drawn(*arguments: P.args, **named: P.kwargs) -> Markup:
            with matplotlib.rc_context(SVG_STYLE):
                figure = Figure(figsize=SIZE)
                draw(figure, *arguments, **named)
                return _to_svg(figure, draw.__name__, label)

        return drawn

    return decorate


@_drawn("Win rate against KL of each policy, below the closed form")
def frontier(
    figure: Figure,
    curves: Mapping[str, tuple[Floats, Floats]],
    records: Sequence[dict[str, Any]],
    target: tuple[float, float],
) -> None:
    """Win rate against KL: policies as points with 95 % intervals, the closed form as curves.

    curves: (KL, win rate) by name. records: those of metrics.json, one a policy. target: the (KL, win rate) asked for.
    """
    axes = figure.subplots()
    ends = {}
    for number, (name, (kl, win_rate)) in enumerate(curves.items()):
        color = INK if number == 0 else FAINT
        axes.plot(kl, win_rate, color=color, linewidth=1.6 if number == 0 else 1.2, zorder=1)
        ends[name] = (kl[-1], win_rate[-1], color)
    axes.plot(*target, "o", color="white", markeredgecolor=INK, markersize=7, zorder=2)
    near_axis = target[0] < 0.2 * max(end[0] for end in ends.values())
    _beside(axes, "target", target, INK, *(((9, -4), "left") if near_axis else ((-6, 6), "right")))
    for record, color in zip(records, policy_colors(records), strict=True):
        at = (record["kl"], record["win_rate"])
        down, up = at[1] - record["win_rate_low"], record["win_rate_high"] - at[1]
        axes.errorbar(
            *at,
            xerr=1.96 * record["kl_se"],
            yerr=[[max(down, 0)], [max(up, 0)]],
            fmt="o",
            color=color,
            markersize=6,
            linewidth=1.4,
            zorder=3,
            clip_on=False,
        )
        _beside(axes, record["name"], at, color, (7, -12), "left")
    kls = [record["kl"] for record in records]
    axes.set_xlim(min([0, *kls]), max([*(end[0] for end in ends.values()), *kls]))
    _label_ends(axes, ends)
    axes.set_xlabel("KL from the reference, nats")
    axes.set_ylabel("win rate against the reference")


@_drawn("The transform and the density of calibrated rewards")
def transform(figure: Figure, form: ClosedForm) -> None:
    """The transform Φ(u) that training maximizes, above the density f(u) of calibrated rewards that it leads to."""
    above, below = figure.subplots(2, sharex=True)
    draw_transform(above, form)
    draw_density(below, form)
    above.set_xlabel("")


@_drawn("Calibrated rewards of both policies and the predicted density")
def histogram(figure: Figure, base: Floats, trained: Floats, form: ClosedForm) -> None:
    """Calibrated rewards of both policies as densities, with the mean of the predicted density f(u) in each bin.

    f itself may rise to many times its mean over the last bin, and bars can only be compared with means.
    """
    edges = np.linspace(0, 1, BINS + 1)
    predicted = np.diff(form.cdf(edges)) * BINS
    axes = figure.subplots()
    axes.hist(trained, list(edges), density=True, color=TRAINED_COLOR, alpha=0.35, edgecolor="white", linewidth=0.8)
    axes.hist(base, list(edges), density=True, histtype="step", color=BASE_COLOR, linewidth=1.3)
    axes.stairs(predicted, edges, color=PREDICTED_COLOR, linewidth=1.8)
    _key(axes, {"predicted by f(u)": PREDICTED_COLOR, "trained": TRAINED_COLOR, "base": BASE_COLOR})
    axes.set_xlim(0, 1)
    axes.set_xlabel("calibrated reward u")
    axes.set_ylabel("density")


@_drawn("Cumulative share of the base's calibrated rewards beside the diagonal")
def uniformity(figure: Figure, places: Floats, distance: float) -> None:
    """Share of fresh base samples at or below each calibrated reward, beside the diagonal; the largest gap is drawn."""
    u = np.sort(places)
    share = np.arange(1, len(u) + 1) / len(u)
    widest = int(np.argmax(np.maximum(np.abs(share - u), np.abs(share - 1 / len(u) - u))))
    color = PREDICTED_COLOR if distance > BAD_KS else HELD_OUT_COLOR
    steps = np.unique(np.linspace(0, len(u) - 1, 400).astype(int))  # as fine as can be seen
    axes = figure.subplots()
    axes.fill_between([0, 1], [-BAD_KS, 1 - BAD_KS], [BAD_KS, 1 + BAD_KS], color="#eeeeee", linewidth=0)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
    axes.plot(u[steps], share[steps], color=color, linewidth=1.8)
    axes.plot([u[widest]] * 2, [u[widest], share[widest]], color=INK, linewidth=1.2)
    _beside(axes, f"KS distance {distance:.3f}", (0.04, 0.94), color, (0, 0), "left")
    _beside(axes, f"grey: less than {BAD_KS:g} away", (0.96, 0.03), FAINT, (0, 0), "right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("calibrated reward u of fresh base samples")
    axes.set_ylabel("share at or below u")


@_drawn("Training loss, held-out squared error and explained variance by step")
def training(figure: Figure, log: Sequence[Mapping[str, float]]) -> None:
    """Training loss and held-out squared error above, explained variance on held-out prompts below."""
    loss, held_out = _series(log, "loss"), _series(log, "eval_loss")
    variance, zero = _series(log, "eval_explained_variance"), _series(log, "eval_loss_of_zero")
    above, below = figure.subplots(2, sharex=True)
    above.axhline(zero[1][-1], color=FAINT, linewidth=1, linestyle="--")
    above.plot(*loss, color=TRAINED_COLOR, linewidth=1, alpha=0.7)
    above.plot(*held_out, "o-", color=HELD_OUT_COLOR, linewidth=1.6, markersize=4, clip_on=False)
    above.set_title("squared error, nats²")
    above.set_ylim(bottom=0)
    last = max(loss[0][-1], held_out[0][-1])
    ends = {
        "log-ratio 0": (last, zero[1][-1], INK),
        "held-out": (last, held_out[1][-1], HELD_OUT_COLOR),
        "training": (last, loss[1][-1], TRAINED_COLOR),
    }
    _label_ends(above, ends)
    below.axhline(0, color=FAINT, linewidth=1, linestyle="--")
    below.plot(*variance, "o-", color=HELD_OUT_COLOR, linewidth=1.6, markersize=4, clip_on=False)
    below.set_title("explained variance, held-out")
    _label_ends(below, {f"{100 * variance[1][-1]:.0f} %": (last, variance[1][-1], HELD_OUT_COLOR)})
    below.set_xlabel("optimizer step")
    below.set_xlim(0, last)


@_drawn("Mean log-ratio by fifth of calibrated reward, beside the closed form's")
def fifths(figure: Figure, measured: Mapping[int, tuple[float, float]]) -> None:
    """Mean log-ratio on held-out prompts by fifth of the calibrated reward, beside the closed form's.

    measured: (mean log-ratio, mean target) by number of the fifth, 1 the lowest.
    """
    fifths = sorted(measured)
    ratio = [measured[number][0] for number in fifths]
    target = [measured[number][1] for number in fifths]
    axes = figure.subplots()
    axes.axhline(0, color=FAINT, linewidth=0.8, linestyle=":")
    axes.vlines(fifths, ratio, target, color=FAINT, linewidth=1)
    axes.plot(fifths, target, "_", color=PREDICTED_COLOR, markersize=26, markeredgewidth=2.4)
    axes.plot(fifths, ratio, "o", color=TRAINED_COLOR, markersize=7)
    _key(axes, {"closed form": PREDICTED_COLOR, "trained": TRAINED_COLOR})
    axes.set_xticks(fifths, [f"{(number - 1) / 5:.1f}–{number / 5:.1f}" for number in fifths])
    axes.set_xlim(0.5, 5.5)
    axes.set_xlabel("calibrated reward u")
    axes.set_ylabel("mean log-ratio, nats")


def policy_colors(records: Sequence[dict[str, Any]]) -> list[str]:
    """Grey for the base, blue for the trained policy, then the rest of the palette over and over."""
    return [
        (BASE_COLOR, TRAINED_COLOR)[number] if number < 2 else OTHER_COLORS[(number - 2) % len(OTHER_COLORS)]
        for number in range(len(records))
    ]


def _to_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as the text of an SVG element, as wide as the page lets it, with ids of its own in the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _beside(axes: Any, text: str, at: tuple[float, float], color: str, offset: tuple[int, int], side: str) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", color=color, ha=side)


def _key(axes: Any, colors: Mapping[str, str]) -> None:
    """Names in their colours at the upper left, which is free where the density rises to the right."""
    for line, (name, color) in enumerate(colors.items()):
        axes.annotate(
            name, (0, 1), xycoords="axes fraction", xytext=(8, -8 - 14 * line), textcoords="offset points", color=color,
            va="top",
        )  # fmt: skip


def _label_ends(axes: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Names to the right of where curves end, (x, y, colour) each, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = 0.05 * (high - low) * SIZE[1] / (axes.get_window_extent().height / axes.figure.dpi)
    previous = -np.inf
    for name, (x, y, color) in sorted(ends.items(), key=lambda item: item[1][1]):
        previous = max(y, previous + gap)
        axes.annotate(
            name, (x, previous), xytext=(6, 0), textcoords="offset points", color=color, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _series(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of what was logged under a name; the last value where a step was logged twice."""
    values = {entry["step"]: entry[key] for entry in log if key in entry}
    return list(values), list(values.values())
