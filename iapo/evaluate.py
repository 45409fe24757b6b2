"""Stage `evaluate`: how often each policy beats the reference under each procedure, at what KL, on held-out prompts.

Reads   prompts.parquet, responses/*.parquet, rewards/*.parquet, quantiles.parquet, adapter/
Writes  evaluation/samples.parquet, one row a response
            policy             string, prompt_id string, sample_id int32   (key)
            response           string
            finish_reason      string
            n_tokens           int32
            log_ratio          float64   Δ = log π(y|x) − log π_ref(y|x) in nats
            kl                 float64   of the next token, summed along the response: `logprobs.Divergence`
            reward             float64   of the judge, or of the reward it was trained on
            calibrated_reward  float64   its place among the reference samples, by the same reward
        evaluation/metrics.json   `policies`, a list with a record for each policy and procedure; see `metrics`
        evaluation/parts/         the same samples by policy and shard, before they are scored
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from iapo.atoms import most_win_rate
from iapo.calibrate import Floats, held_out_prompts, ks_distance, place, spread_ranks
from iapo.closed_form import optimal_win_rate
from iapo.config import Config, RewardConfig
from iapo.errors import UserError
from iapo.estimators import mean_over_prompts, order_weights, prompt_win_rate
from iapo.levels import NO_TIES, tied_levels
from iapo.procedures import Procedure, has_functional, pairings, parse_procedure
from iapo.sample import fits, prompt_shards, response_rows
from iapo.score import open_reward
from iapo.shards import Worker, run_shards, shard_seed
from iapo.store import Manifest, read_table, write_json, write_table

log = logging.getLogger(__name__)

BASE, TRAINED = "base", "trained"
HIGHEST_KL = 10.0
"""The closed form is solved up to this many nats; by then its win rate is within 1e-4 of what any KL allows."""
PARTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_id", pa.int32()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("n_tokens", pa.int32()),
        ("log_ratio", pa.float64()),
        ("kl", pa.float64()),
    ]
)
SAMPLES = pa.schema(
    [
        ("policy", pa.string()),
        *PARTS,
        ("reward", pa.float64()),
        ("calibrated_reward", pa.float64()),
    ]
)


def run(config: Config, manifest: Manifest) -> None:
    """Sample every policy on the held-out prompts, score the samples, and write the metrics."""
    check_procedures(config)
    for name, folder in config.evaluate.adapters.items():
        if not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"evaluate.adapters.{name}: no adapter_config.json in {folder}; expected the folder of a PEFT adapter"
            )
    prompts = held_out_prompts(config)
    samples = config.evaluate.samples_per_prompt
    parts = []
    for policy, adapter in policies(config).items():
        rows = {name: len(part) * samples for name, part in prompt_shards(prompts, config.sample.shard_size).items()}
        shards = run_shards(
            config.run / "evaluation" / "parts" / policy,
            rows,
            partial(_open_worker, config, policy, adapter),
            label=f"evaluating {policy}",
            workers=config.workers,
        )
        parts.append(pa.concat_tables(read_table(shard) for shard in shards).to_pandas().assign(policy=policy))
    table = pd.concat(parts, ignore_index=True)
    reference, table["reward"] = score(config, prompts, table)
    table["calibrated_reward"] = calibrated_rewards(table, reference)
    outputs = [config.run / "evaluation" / "samples.parquet", config.run / "evaluation" / "metrics.json"]
    write_table(outputs[0], pa.Table.from_pandas(table, schema=SAMPLES, preserve_index=False))
    write_json(outputs[1], metrics(config, table, reference))
    manifest.finish(outputs, rows=len(table))


def policies(config: Config) -> dict[str, Path | None]:
    """Name and adapter of each policy: the base, the trained one, and those that the configuration names."""
    if taken := {BASE, TRAINED} & set(config.evaluate.adapters):
        raise UserError(f"evaluate.adapters: the name {taken.pop()} is taken; choose another")
    return {BASE: None, TRAINED: config.run / "adapter", **config.evaluate.adapters}


def procedures(config: Config) -> list[tuple[Procedure, Procedure]]:
    """Each procedure measured with its opponent: the objective's own first, then the others against themselves."""
    objective = parse_procedure(config.objective.procedure)
    opponent = parse_procedure(config.objective.opponent) if config.objective.opponent else objective
    others = [parse_procedure(text) for text in config.evaluate.procedures]
    return list(dict.fromkeys([(objective, opponent), *((other, other) for other in others)]))


def check_procedures(config: Config) -> None:
    """UserError for a procedure that cannot be read, or that draws more samples than a prompt has."""
    for pair in procedures(config):
        for procedure in pair:
            for samples in (config.sample.samples_per_prompt, config.evaluate.samples_per_prompt):
                order_weights(procedure, np.linspace(0, 1, samples))


def score(config: Config, prompts: list[dict[str, Any]], table: pd.DataFrame) -> tuple[dict[str, Floats], Floats]:
    """Sorted rewards of the stored reference samples by prompt, and the reward of every row of the table."""
    by_id = {row["prompt_id"]: row for row in prompts}
    judge = config.evaluate.judge
    measure = _measure(judge or config.reward, by_id)
    if judge is None:
        quantiles = read_table(config.run / "quantiles.parquet").to_pylist()
        reference = {row["prompt_id"]: np.array(row["rewards"]) for row in quantiles if row["prompt_id"] in by_id}
    else:
        responses = read_table(config.run / "responses").select(["prompt_id", "response", "source"]).to_pandas()
        responses = responses[(responses["source"] == "reference") & responses["prompt_id"].isin(by_id.keys())]
        responses = responses.assign(reward=measure(responses))
        reference = {str(name): np.sort(group.to_numpy()) for name, group in responses.groupby("prompt_id")["reward"]}
    return reference, measure(table)


def calibrated_rewards(table: pd.DataFrame, reference: dict[str, Floats]) -> Floats:
    """C(x, y) of every row among the stored reference samples of its prompt."""
    values = np.empty(len(table))
    for prompt_id, rows in table.groupby("prompt_id").indices.items():
        rewards = table["reward"].to_numpy()[rows]
        values[rows] = place(reference[str(prompt_id)], rewards, among=False).calibrated
    return values


def metrics(config: Config, table: pd.DataFrame, reference: dict[str, Floats]) -> dict[str, Any]:
    """The content of metrics.json.

    `policies`: for each policy and procedure name, procedure, opponent, prompts, samples_per_prompt, kl (nats, the mean
    along the policy's own samples) and kl_se (over prompts), win_rate with its 95 % bootstrap
    interval over prompts, reference_win_rate (W₀: ½ if the opponent has the same procedure), closed_form_win_rate (the
    optimum at the measured KL, of equation (4), or of (8) on prompts where most reference samples tie, see
    `iapo.levels`), kl_efficiency = (win_rate − W₀) / (closed_form_win_rate − W₀). Both are null where the KL is not
    above its error or the closed form cannot be solved at it, and the latter where nothing can be won: all rewards are
    equal. lead: how much more the trained policy wins than this one, paired by prompt, with its 95 % bootstrap
    interval; null for itself. `uniformity`: KS distance of fresh base samples from the uniform distribution that
    calibration promises.
    """
    records = []
    ties = tied_levels([reference[name] for name in table["prompt_id"].unique()], config.seed)
    won = {
        (policy, *pair): prompt_win_rates(rows, reference, *pair)
        for policy, rows in table.groupby("policy", sort=False)
        for pair in procedures(config)
    }
    for policy, rows in table.groupby("policy", sort=False):
        kl = mean_over_prompts(rows.groupby("prompt_id")["kl"].mean().to_numpy(), config.seed)
        for procedure, opponent in procedures(config):
            wins = won[policy, procedure, opponent]
            record = {
                "name": policy,
                "procedure": str(procedure),
                "opponent": str(opponent),
                "prompts": rows["prompt_id"].nunique(),
                "samples_per_prompt": config.evaluate.samples_per_prompt,
                "kl": kl.value,
                "kl_se": kl.se,
            }
            win = mean_over_prompts(wins, config.seed)
            lead = None
            if policy != TRAINED:
                lead = mean_over_prompts(won[TRAINED, procedure, opponent] - wins, config.seed)
            start = best_win_rate(procedure, opponent, 0, ties)
            moved = has_moved(kl.value, kl.se)
            optimum = closed_form_win_rate(procedure, opponent, kl.value, ties) if moved else None
            gain = 0.0 if optimum is None else optimum - start
            records.append(
                record
                | {
                    "win_rate": win.value,
                    "win_rate_low": win.low,
                    "win_rate_high": win.high,
                    "reference_win_rate": start,
                    "closed_form_win_rate": optimum,
                    "kl_efficiency": (win.value - start) / gain if gain > 1e-9 else None,
                    "lead": lead and lead.value,
                    "lead_low": lead and lead.low,
                    "lead_high": lead and lead.high,
                }
            )
    return {"policies": records, "uniformity": {"base_ks_distance": base_ks_distance(table, reference, config.seed)}}


def has_moved(kl: float, se: float) -> bool:
    """Whether a measured KL can be told from none."""
    return kl > max(2 * se, 1e-4)


def best_win_rate(procedure: Procedure, opponent: Procedure, kl: float, ties: tuple[Floats, int]) -> float:
    """The largest win rate of any policy at this KL on prompts with these `tied_levels`; at 0, the reference's.

    Functionals of F, to which (8) does not apply, have that of equation (4), as if nothing tied.
    """
    levels, untied = ties
    if not len(levels) or has_functional(pairings(procedure, opponent)):
        return optimal_win_rate(procedure, opponent, kl)
    return most_win_rate(levels, untied, procedure, opponent, kl)


def closed_form_win_rate(
    procedure: Procedure, opponent: Procedure, kl: float, ties: tuple[Floats, int] = NO_TIES
) -> float | None:
    """The largest win rate possible at a measured KL; None, with a warning, where the closed form cannot be solved."""
    try:
        return best_win_rate(procedure, opponent, min(kl, HIGHEST_KL), ties)
    except UserError as error:
        log.warning("%s at the measured KL of %.4g nats: no closed form to compare with: %s", procedure, kl, error)
        return None


def prompt_win_rates(
    rows: pd.DataFrame, reference: dict[str, Floats], procedure: Procedure, opponent: Procedure
) -> Floats:
    """Win rate of one policy's rows against the reference for each prompt [P]: an unbiased U-statistic."""
    values = []
    for prompt_id, group in rows.groupby("prompt_id"):
        mine, theirs = group["reward"].to_numpy(), reference[str(prompt_id)]
        my_places = place(theirs, mine, among=False).calibrated
        their_places = place(theirs, theirs, among=True).calibrated
        values.append(
            sum(
                weight * prompt_win_rate(mine, theirs, order_weights(a, my_places), order_weights(b, their_places))
                for weight, a, b in pairings(procedure, opponent)
            )
        )
    return np.array(values)


def base_ks_distance(table: pd.DataFrame, reference: dict[str, Floats], seed: int) -> float:
    """KS distance from uniform of fresh samples of the base among the stored ones: is the reference still the same?"""
    generator = np.random.default_rng(seed)
    base = table[table["policy"] == BASE]
    places = [
        spread_ranks(reference[str(prompt_id)], rewards.to_numpy(), generator)
        for prompt_id, rewards in base.groupby("prompt_id")["reward"]
    ]
    return ks_distance(np.concatenate(places))


def _measure(config: RewardConfig, prompts: dict[str, dict[str, Any]]) -> Any:
    reward = open_reward(config)

    def measure(table: pd.DataFrame) -> Floats:
        found = [prompts[prompt_id] for prompt_id in table["prompt_id"]]
        metadata = [json.loads(row["metadata"]) for row in found]
        return np.array(reward([row["prompt"] for row in found], table["response"].tolist(), metadata))

    return measure


def _open_worker(config: Config, policy: str, adapter: Path | None) -> Worker:
    from iapo.engines.transformers import configured_engine
    from iapo.logprobs import Divergence, divergences_of
    from iapo.models import context_length, load_policy, load_tokenizer, prompt_token_ids

    tokenizer = load_tokenizer(config.model)
    model = load_policy(config.model, adapter)
    engine = configured_engine(model, tokenizer, config.sample)
    shards = prompt_shards(held_out_prompts(config), config.sample.shard_size)

    def make(name: str) -> pa.Table:
        tokens = {row["prompt_id"]: prompt_token_ids(tokenizer, row["prompt"]) for row in shards[name]}
        tokens = {prompt_id: ids for prompt_id, ids in tokens.items() if fits(ids, config, context_length(model))}
        seed = shard_seed(config.seed, f"evaluate/{policy}/{name}")
        rows = response_rows(engine, tokenizer, tokens, config.evaluate.samples_per_prompt, seed)
        prompts, responses = [tokens[row["prompt_id"]] for row in rows], [row["token_ids"] for row in rows]
        if adapter is None:
            divergences = [Divergence(0.0, 0.0)] * len(rows)
        else:
            divergences = divergences_of(
                model,
                prompts,
                responses,
                pad_id=tokenizer.pad_token_id,
                batch_size=config.train.micro_batch_size,
                temperature=config.sample.temperature,
            )
        made = [
            row | {"n_tokens": len(row["token_ids"]), **vars(divergence)}
            for row, divergence in zip(rows, divergences, strict=True)
        ]
        return pa.Table.from_pylist(made, schema=PARTS)

    return make
