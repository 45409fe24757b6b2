"""What `iapo transform`, `iapo frontier` and `iapo robustness` print: a table for people, or one JSON object."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iapo.closed_form import ClosedForm, Frontier
from iapo.deployment import Robustness
from iapo.few_samples import ENOUGH, MOST_NOISE, few_samples, rank_targets, samples_needed

SHOWN = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)  # of the calibrated reward


def closed_form_record(form: ClosedForm, samples: int | None = None) -> dict[str, Any]:
    """The keys of `iapo transform --json`; a log density of minus infinity becomes null."""
    log_density = {str(u): float(form.log_density(u)) for u in SHOWN}
    return {
        "procedure": str(form.procedure),
        "opponent": str(form.opponent),
        "transform": str(form.transform),
        "beta": form.beta,
        "kl": form.kl,
        "win_rate": form.win_rate,
        "log_partition": form.log_partition,
        "log_density": {u: value if math.isfinite(value) else None for u, value in log_density.items()},
        **({} if samples is None else {"few_samples": few_samples_record(form, samples)}),
    }


def few_samples_record(form: ClosedForm, samples: int) -> dict[str, Any]:
    """What `--samples` adds: the policy fitted to ranks among K samples, its targets, and the K that would do."""
    targets = rank_targets(form, samples).tolist()
    return asdict(few_samples(form, samples)) | {"targets": targets, "samples_needed": samples_needed(form)}


def frontier_record(frontier: Frontier) -> dict[str, Any]:
    """The keys of `iapo frontier --json`: win_rate holds a list by transform, parallel to kl."""
    return {
        "procedure": str(frontier.procedure),
        "opponent": str(frontier.opponent),
        "kl": frontier.kls.tolist(),
        "win_rate": {name: rates.tolist() for name, rates in frontier.win_rates.items()},
    }


def robustness_record(found: Robustness) -> dict[str, Any]:
    """The keys of `iapo robustness --json`: win_rate by trained (rows) and deployed size, identity by deployed size."""
    return {
        "family": found.family,
        "kl": found.kl,
        "sizes": list(found.sizes),
        "win_rate": found.win_rates.tolist(),
        "identity": found.identity.tolist(),
    }


def print_robustness(found: Robustness, as_json: bool) -> None:
    if as_json:
        print(json.dumps(robustness_record(found)))
        return
    console = Console()
    console.print(f"Win rate of [bold]{escape(found.family)}[/] at a KL of {found.kl:g} nats\n")
    names = (*map(str, found.sizes), "identity")
    rows = zip(names, (*found.win_rates, found.identity), strict=True)
    console.print(_win_rates(("trained for, deployed with", *map(str, found.sizes)), rows))


def print_closed_form(form: ClosedForm, as_json: bool, samples: int | None = None) -> None:
    if as_json:
        print(json.dumps(closed_form_record(form, samples)))
        return
    console = Console()
    console.print(f"[bold]{form.procedure}[/] against [bold]{form.opponent}[/], transform [bold]{form.transform}[/]\n")
    summary = Table("KL, nats", "win rate", "beta", "log partition", box=None, pad_edge=False)
    summary.add_row(f"{form.kl:.6g}", f"{form.win_rate:.6f}", f"{form.beta:.6g}", f"{form.log_partition:.6g}")
    console.print(summary, "")
    table = Table(box=None, pad_edge=False)
    for column in ("calibrated reward u", "transform Φ(u)", "log density", "density f(u)"):
        table.add_column(column, justify="right")
    u = np.array(SHOWN)
    for row in zip(u, form.transform_values(u), form.log_density(u), form.density(u), strict=True):
        table.add_row(f"{row[0]:g}", *(f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}" for value in row[1:]))
    console.print(table)
    if samples is not None:
        found = few_samples_record(form, samples)
        lost = Table("KL, nats", "win rate", "possible at this KL", "chance in targets", box=None, pad_edge=False)
        values = (found[key] for key in ("win_rate", "optimal_win_rate"))
        lost.add_row(f"{found['kl']:.6g}", *(f"{value:.6f}" for value in values), f"{found['noise']:.1%}")
        console.print(f"\nFitted to ranks among [bold]{samples}[/] samples a prompt, without other error\n")
        console.print(lost)
        console.print(
            f"\n{found['samples_needed']} samples keep {ENOUGH:.0%} of the KL, with at most {MOST_NOISE:.0%} chance."
        )


def print_frontier(frontier: Frontier, as_json: bool) -> None:
    if as_json:
        print(json.dumps(frontier_record(frontier)))
        return
    console = Console()
    console.print(f"Win rate of [bold]{frontier.procedure}[/] against [bold]{frontier.opponent}[/]\n")
    rows = ((f"{kl:.4g}", rates) for kl, *rates in zip(frontier.kls, *frontier.win_rates.values(), strict=True))
    console.print(_win_rates(("KL, nats", *frontier.win_rates), rows))


def _win_rates(columns: Iterable[str], rows: Iterable[tuple[str, Iterable[float]]]) -> Table:
    """Named rows of win rates."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    for name, rates in rows:
        table.add_row(name, *(f"{rate:.4f}" for rate in rates))
    return table
