"""Stage `report`: what was trained for and what came out, as one HTML page that needs nothing else.

Reads   config.json's content, manifests/*.json, prompts.parquet, quantiles.parquet, adapter/log.json,
        evaluation/metrics.json, evaluation/samples.parquet
Writes  report.html

Every number shown is a stored one or follows from stored ones; no model is loaded. Prompts and responses are
untrusted text: the template escapes everything but the figures.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml

from iapo import figures
from iapo.calibrate import BAD_KS, Floats
from iapo.closed_form import ClosedForm, frontier, optimal_win_rate
from iapo.config import Config
from iapo.errors import UserError
from iapo.estimators import draws
from iapo.evaluate import BASE, HIGHEST_KL, TRAINED, has_moved
from iapo.goal import untied_form
from iapo.procedures import Procedure, parse_procedure
from iapo.store import Manifest, read_manifest, read_table, write_text
from iapo.train import FIFTHS, read_log

Record = dict[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
STAGES_SHOWN = ("prompts", "sample", "calibrate", "train", "evaluate")
EXAMPLES = 4
"""Held-out prompts whose responses are shown."""
CURVE_POINTS = 32
CONTROLS = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    - {ord(kept) for kept in "\t\n\r"},
    "\N{REPLACEMENT CHARACTER}",
)
"""Control characters, among them those that change the direction of what follows."""


@dataclass(frozen=True)
class Results:
    """Everything stored that the report is made from, and the closed form it is compared with."""

    config: Config
    form: ClosedForm
    """At the KL that was trained for, without ties."""
    records: list[Record]
    """The records of metrics.json: for each policy, the objective's procedure first."""
    base_ks_distance: float
    samples: pd.DataFrame
    prompts: dict[str, list[dict[str, str]]]
    """Conversations of the held-out prompts by identifier."""
    references: dict[str, int]
    """Reference samples that calibrated rewards are places among, by prompt."""
    log: list[dict[str, float]]
    manifests: dict[str, dict[str, Any]]


def run(config: Config, manifest: Manifest) -> None:
    """Write report.html."""
    path = config.run / "report.html"
    write_text(path, render(read_results(config)))
    manifest.finish([path])


def read_results(config: Config) -> Results:
    """Read what the stages stored."""
    metrics = json.loads((config.run / "evaluation" / "metrics.json").read_text())
    prompts = read_table(config.run / "prompts.parquet").to_pylist()
    quantiles = read_table(config.run / "quantiles.parquet").select(["prompt_id", "n"]).to_pylist()
    manifests = {name: read_manifest(config.run, name) or {} for name in STAGES_SHOWN}
    return Results(
        config=config,
        form=untied_form(config.objective, manifests["train"]["closed_form"]),
        records=metrics["policies"],
        base_ks_distance=metrics["uniformity"]["base_ks_distance"],
        samples=read_table(config.run / "evaluation" / "samples.parquet").to_pandas(),
        prompts={row["prompt_id"]: row["prompt"] for row in prompts if row["split"] == "holdout"},
        references={row["prompt_id"]: row["n"] for row in quantiles},
        log=read_log(config.run / "adapter"),
        manifests=manifests,
    )


def render(results: Results) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "printable": printable}
    main = objective_records(results)
    trained = next(record for record in main if record["name"] == TRAINED)
    return environment.get_template("report.html.j2").render(
        config=results.config,
        configuration=yaml.safe_dump(
            results.config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
        ),
        headline=headline(trained),
        trained=trained,
        goal=results.manifests["train"]["closed_form"],
        procedure=trained["procedure"],
        against="" if trained["opponent"] == trained["procedure"] else f" against {trained['opponent']}",
        warnings=warnings(results),
        figures=draw(results),
        records=results.records,
        main=main,
        lengths=lengths(results.samples),
        base_ks_distance=results.base_ks_distance,
        bad_ks=BAD_KS,
        examples=examples(results),
        shown=samples_shown(results.config),
        held_out=results.manifests["train"]["held_out"],
        manifests=results.manifests,
        versions=results.manifests["evaluate"]["versions"],
    )


def objective_records(results: Results) -> list[Record]:
    """One record a policy: its results under the objective's procedure."""
    procedure, opponent = deployed(results.config)
    wanted = (str(procedure), str(opponent))
    return [record for record in results.records if (record["procedure"], record["opponent"]) == wanted]


def deployed(config: Config) -> tuple[Procedure, Procedure]:
    """The objective's procedure and its opponent."""
    procedure = parse_procedure(config.objective.procedure)
    return procedure, parse_procedure(config.objective.opponent) if config.objective.opponent else procedure


def headline(record: Record) -> str:
    """In one sentence, what was trained for and what came out."""
    against = "" if record["opponent"] == record["procedure"] else f" against {record['opponent']}"
    interval = f"{percent(0.95, 0)} interval {percent(record['win_rate_low'])} to {percent(record['win_rate_high'])}"
    sentence = (
        f"Trained for {record['procedure']}{against}, the policy beats its reference {percent(record['win_rate'])} "
        f"of the time ({interval}) at a KL of {number(record['kl'])}\N{NO-BREAK SPACE}nats"
    )
    if record["kl_efficiency"] is None:
        moved = has_moved(record["kl"], record["kl_se"])
        return f"{sentence}." if moved else f"{sentence}, which is too little to tell from none."
    if record["kl_efficiency"] < 0:
        return f"{sentence}, where {percent(record['closed_form_win_rate'])} is possible."
    return f"{sentence}: {percent(record['kl_efficiency'], 0)} of the gain that is possible at that KL."


def warnings(results: Results) -> list[str]:
    """What the stages found that a reader of the results has to know, a sentence each."""
    found = []
    train, calibrate = results.manifests["train"], results.manifests["calibrate"]
    trained = next(record for record in objective_records(results) if record["name"] == TRAINED)
    held_out = train["held_out"]
    if train["does_harm"]:
        found.append(
            f"Training does harm: the squared error on held-out prompts, {number(held_out['loss'])} nats², exceeds "
            f"{number(held_out['loss_of_zero'])}, that of log-ratio 0. Lower train.learning_rate "
            f"({results.config.train.learning_rate:g}) or give more responses."
        )
    untrained = trained["reference_win_rate"]
    if trained["win_rate_low"] <= untrained:
        found.append(
            f"The interval of the win rate under {trained['procedure']} is not clear of {percent(untrained)}, where "
            "the base is: these samples do not show that training helped."
        )
    for distance, of_what in (
        (results.base_ks_distance, "fresh samples of the base"),
        (calibrate["holdout_ks_distance"], "held-out reference samples"),
    ):
        if distance > BAD_KS:
            found.append(
                f"Calibrated rewards of {of_what} are {distance:.3f} away from uniform (KS distance; above {BAD_KS:g} "
                "is bad). Ties do this, and so do very few held-out prompts. The closed form and KL efficiency do not "
                "hold for such rewards, except that the latter does where most samples of a prompt tie."
            )
    goal, asked = train["closed_form"], results.config.objective.target_kl
    if asked is not None and goal["tied_prompts"] and goal["kl"] < asked:
        found.append(
            f"{number(asked)} nats were asked for. Where rewards tie, always giving the best response that was seen "
            f"takes little more than the {number(goal['kl'])} that the policy was trained for."
        )
    if equal := calibrate["prompts_of_equal_rewards"]:
        found.append(f"{equal:,} prompts have equal rewards throughout: they teach nothing, and training dropped them.")
    if too_long := results.manifests["sample"]["prompts_too_long"]:
        found.append(f"{too_long:,} prompts are too long for the model's context and were left out.")
    needed, fewest = 4 * (draws(deployed(results.config)[0]) or 0), min(results.references.values())
    if fewest < needed:
        found.append(
            f"{fewest} reference samples a prompt cannot resolve {trained['procedure']}: "
            f"sample.samples_per_prompt: {needed} would."
        )
    return found


def draw(results: Results) -> dict[str, str]:
    """The figures by name."""
    main = objective_records(results)
    places = spread_places(results)
    policy = results.samples["policy"].to_numpy()
    goal = results.manifests["train"]["closed_form"]
    return {
        "frontier": figures.frontier(curves(results, main), main, (goal["kl"], goal["win_rate"])),
        "transform": figures.transform(results.form),
        "histogram": figures.histogram(places[policy == BASE], places[policy == TRAINED], results.form),
        "uniformity": figures.uniformity(places[policy == BASE], results.base_ks_distance),
        "training": figures.training(results.log),
        "fifths": figures.fifths(fifths(results.manifests["train"]["held_out"])),
    }


def curves(results: Results, records: list[Record]) -> dict[str, tuple[Floats, Floats]]:
    """Win rate against KL of the closed form by transform, somewhat beyond the largest KL to be shown.

    Where it cannot be solved that far, the curves end at the KL that was asked for.
    """
    procedure, opponent = deployed(results.config)
    largest = max([results.form.kl, *(record["kl"] + 1.96 * record["kl_se"] for record in records)])
    steps = np.linspace(0, 1, CURVE_POINTS)[1:] ** 2  # the curves are steepest at 0
    try:
        found = frontier(procedure, opponent, ("optimal", "identity"), min(1.15 * largest, HIGHEST_KL) * steps)
    except UserError:
        found = frontier(procedure, opponent, ("optimal", "identity"), results.form.kl * steps)
    untrained = optimal_win_rate(procedure, opponent, 0)
    kl = np.append(0, found.kls)
    return {name: (kl, np.append(untrained, win_rate)) for name, win_rate in found.win_rates.items()}


def spread_places(results: Results) -> Floats:
    """Calibrated rewards, each spread at random over its own cell of width 1/(K + 1).

    Among K reference samples a calibrated reward is a multiple of 1/K (or half of one, with a tie). Spread as in
    `calibrate.spread_ranks`, those of the reference are exactly uniform, so that bins of a histogram compare.
    """
    generator = np.random.default_rng(results.config.seed)
    among = results.samples["prompt_id"].map(results.references).to_numpy(dtype=np.float64)
    places = results.samples["calibrated_reward"].to_numpy(dtype=np.float64) * among
    return (places + generator.random(len(places))) / (among + 1)


def fifths(held_out: dict[str, float]) -> dict[int, tuple[float, float]]:
    """Mean log-ratio and mean target by number of the fifth; a fifth without responses is absent."""
    return {
        number: (held_out[f"log_ratio_{number}"], held_out[f"target_{number}"])
        for number in range(1, FIFTHS + 1)
        if f"log_ratio_{number}" in held_out
    }


def lengths(samples: pd.DataFrame) -> list[Record]:
    """Mean length of each policy's responses in tokens, and the share that was cut at the limit."""
    return [
        {
            "name": name,
            "tokens": float(rows["n_tokens"].mean()),
            "cut": float((rows["finish_reason"] == "length").mean()),
        }
        for name, rows in samples.groupby("policy", sort=False)
    ]


def samples_shown(config: Config) -> int:
    """Of how many responses the best, median and worst are shown: what the procedure draws, or 4 if that is below 3."""
    drawn = draws(deployed(config)[0]) or 0
    return min(drawn if drawn >= 3 else 4, config.evaluate.samples_per_prompt)


def examples(results: Results) -> list[Record]:
    """A few held-out prompts with, for the base and the trained policy, the best, median and worst of the first few.

    Prompts are taken in the order of their identifiers, which are hashes: an arbitrary choice that nobody made.
    """
    shown = samples_shown(results.config)
    found = []
    for prompt_id in sorted(set(results.samples["prompt_id"]))[:EXAMPLES]:
        policies = {}
        for policy in (BASE, TRAINED):
            rows = results.samples.query("policy == @policy and prompt_id == @prompt_id")
            ranked = rows.sort_values("sample_id").head(shown).sort_values("reward", ascending=False).to_dict("records")
            policies[policy] = {
                "best": ranked[0],
                "median": ranked[(len(ranked) - 1) // 2],
                "worst": ranked[-1],
            }
        found.append({"prompt": results.prompts[prompt_id], "policies": policies})
    return found


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many digits after the point, with a true minus sign; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent; a dash for None."""
    return "–" if value is None else f"{number(100 * value, digits)}\N{NO-BREAK SPACE}%"


def printable(text: str) -> str:
    """Text whose control characters are replaced by a visible mark: HTML does not allow them, or they reorder text."""
    return text.translate(CONTROLS)
