"""Stage `calibrate`: sorted reference rewards of every prompt, and every response's place among them.

Reads   responses/*.parquet, rewards/*.parquet, prompts.parquet
Writes  quantiles.parquet, one row a prompt
            prompt_id          string            (key)
            n                  int32             reference rewards
            rewards            list<float64>     in ascending order
        calibrated.parquet, one row a response
            prompt_id          string, sample_id int32   (key)
            calibrated_reward  float64           C(x, y) in [0, 1]: share of reference rewards below, ties counting half
            tie_low, tie_high  float64           the interval of quantiles that the response stands for
            samples            int32             of how many samples that interval is a rank, or ranks: K; one more
                                                 for given responses; what pooling is worth (`iapo.pooling`)
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from iapo.atoms import mostly_tied
from iapo.config import Config
from iapo.errors import UserError
from iapo.few_samples import few_samples, samples_needed
from iapo.pooling import LEAST_SAMPLES, Pool, fit_pool, pooled_places, pooled_places_beside
from iapo.store import Manifest, read_table, write_table
from iapo.targets import solve_objective

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

QUANTILES = pa.schema([("prompt_id", pa.string()), ("n", pa.int32()), ("rewards", pa.list_(pa.float64()))])
CALIBRATED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_id", pa.int32()),
        ("calibrated_reward", pa.float64()),
        ("tie_low", pa.float64()),
        ("tie_high", pa.float64()),
        ("samples", pa.int32()),
    ]
)
BAD_KS = 0.1
"""A Kolmogorov-Smirnov distance from uniform above this one is reported as a warning, everywhere it is shown."""


@dataclass(frozen=True)
class Places:
    """Where responses stand among sorted reference rewards; arrays of one length, all in [0, 1]."""

    calibrated: Floats
    low: Floats
    high: Floats


def run(config: Config, manifest: Manifest) -> None:
    """Write both tables; the manifest holds the uniformity of held-out samples and what cannot be learned from."""
    frame = join_rewards(config)
    quantiles, calibrated = calibrate(frame)
    samples = int(quantiles["n"].min())
    if samples < 2:
        raise UserError("calibrate: a prompt has fewer than 2 reference rewards; sample more with `iapo sample`")
    worth = samples
    if config.calibrate.pool:
        pool = fit_pool(_untied(frame))
        calibrated, worth = pool_places(frame, calibrated, pool), pool.worth
        log.info(
            "calibrate: pooled over prompts, %d samples a prompt are worth %d; the model has weight %.2f beside ranks",
            samples,
            worth,
            pool.weight,
        )
    _report_samples(config, worth)
    equal = int(sum(rewards[0] == rewards[-1] for rewards in quantiles["rewards"]))
    if equal == len(quantiles):
        raise UserError(
            "calibrate: the rewards of every prompt are all equal, so nothing can be learned from them; "
            "expected a reward that tells responses apart"
        )
    if equal:
        log.warning("calibrate: %d prompts have equal rewards throughout and teach nothing; train drops them", equal)
    held_out = pooled_held_out_places if config.calibrate.pool else held_out_places
    distance = ks_distance(held_out(frame, config.seed))
    if distance > BAD_KS:
        log.warning(
            "calibrate: calibrated rewards of held-out reference samples are %.3f away from uniform (KS distance); "
            "ties do this, and then win rates by equation (4) do not hold; so does chance, with few samples",
            distance,
        )
    outputs = [config.run / "quantiles.parquet", config.run / "calibrated.parquet"]
    write_table(outputs[0], pa.Table.from_pandas(quantiles, schema=QUANTILES, preserve_index=False))
    write_table(outputs[1], pa.Table.from_pandas(calibrated, schema=CALIBRATED, preserve_index=False))
    manifest.finish(
        outputs,
        rows=len(calibrated),
        prompts_of_equal_rewards=equal,
        holdout_ks_distance=distance,
        samples_worth=worth,
    )


def _report_samples(config: Config, samples: int) -> None:
    """Say what this many samples cost the objective, and warn where more are needed."""
    form = solve_objective(config.objective)
    found = few_samples(form, samples)
    log.info(
        "calibrate: fitted to the ranks of %d samples without other error, %s keeps %.3g of %.3g nats and wins %.3f of "
        "the %.3f possible; %.0f%% of the variance of its targets is chance",
        samples,
        form.procedure,
        found.kl,
        form.kl,
        found.win_rate,
        form.win_rate,
        100 * found.noise,
    )
    needed = samples_needed(form)
    if samples < needed:
        log.warning(
            "calibrate: %d samples a prompt are few for %s at %.3g nats; sample.samples_per_prompt: %d would do%s",
            samples,
            form.procedure,
            form.kl,
            needed,
            "" if config.calibrate.pool else ", or fewer with calibrate.pool: true",
        )


def join_rewards(config: Config) -> pd.DataFrame:
    """prompt_id, sample_id, source, split, reward of every response, in order of prompt and sample."""
    responses = read_table(config.run / "responses").select(["prompt_id", "sample_id", "source"]).to_pandas()
    rewards = read_table(config.run / "rewards").to_pandas()
    prompts = read_table(config.run / "prompts.parquet").select(["prompt_id", "split"]).to_pandas()
    frame = responses.merge(rewards, on=["prompt_id", "sample_id"], validate="one_to_one").merge(
        prompts, on="prompt_id"
    )
    if len(frame) != len(responses):
        raise UserError(
            f"calibrate: {len(responses)} responses and {len(frame)} of them with rewards; run `iapo score --restart`"
        )
    return frame.sort_values(["prompt_id", "sample_id"], ignore_index=True)


def calibrate(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of quantiles and of calibrated rewards from columns prompt_id, sample_id, source, reward."""
    prompt, names = pd.factorize(frame["prompt_id"])
    own = (frame["source"] == "reference").to_numpy()
    rewards = frame["reward"].to_numpy(dtype=np.float64)
    level = np.unique(rewards, return_inverse=True)[1]
    key = prompt * (level.max(initial=0) + 1) + level  # orders rewards within a prompt, and prompts
    reference = np.sort(key[own])
    counts = np.bincount(prompt[own], minlength=len(names))
    start = np.cumsum(counts) - counts
    below = np.searchsorted(reference, key, side="left") - start[prompt]
    equal = np.searchsorted(reference, key, side="right") - start[prompt] - below - own
    places = _places(below, equal, counts[prompt] - own)
    calibrated = frame[["prompt_id", "sample_id"]].assign(
        calibrated_reward=places.calibrated,
        tie_low=places.low,
        tie_high=places.high,
        samples=counts[prompt] + ~own,
    )
    ordered = rewards[own][np.lexsort((rewards[own], prompt[own]))]
    quantiles = pd.DataFrame({"prompt_id": names, "n": counts, "rewards": np.split(ordered, start[1:])})
    return quantiles, calibrated


def pool_places(frame: pd.DataFrame, calibrated: pd.DataFrame, pool: Pool) -> pd.DataFrame:
    """Calibrated rewards with strength shared across prompts, (12), in place of ranks; rows as in both arguments.

    Prompts of which most samples tie keep their ranks, which are the atoms of equation (8).
    """
    matrix = _untied(frame)
    rows = frame["prompt_id"].map(pd.Series(range(len(matrix)), _untied_prompts(frame))).to_numpy(dtype=np.float64)
    own = (frame["source"] == "reference").to_numpy()
    values = calibrated["calibrated_reward"].to_numpy(copy=True)
    inside, beside = own & np.isfinite(rows), ~own & np.isfinite(rows)
    values[inside] = pooled_places(pool, matrix, values[inside].reshape(matrix.shape)).ravel()
    values[beside] = pooled_places_beside(
        pool, matrix, rows[beside].astype(np.int64), frame["reward"].to_numpy()[beside], values[beside]
    )
    middle = np.clip(values, 0.5 / pool.worth, 1 - 0.5 / pool.worth)
    changed = inside | beside
    return calibrated.assign(
        calibrated_reward=values,
        tie_low=np.where(changed, middle - 0.5 / pool.worth, calibrated["tie_low"]),
        tie_high=np.where(changed, middle + 0.5 / pool.worth, calibrated["tie_high"]),
        samples=np.where(changed, pool.worth, calibrated["samples"]),
    )


def _untied_prompts(frame: pd.DataFrame) -> list[str]:
    """Prompts for which most reference samples do not tie."""
    reference = frame[frame["source"] == "reference"]
    prompt, names = pd.factorize(reference["prompt_id"])
    return list(names[~mostly_tied(prompt, reference.duplicated(["prompt_id", "reward"], keep=False))])


def _untied(frame: pd.DataFrame) -> Floats:
    """Rewards (prompts, K) of the reference samples of those prompts, as drawn."""
    reference = frame[(frame["source"] == "reference") & frame["prompt_id"].isin(_untied_prompts(frame))]
    counts = reference.groupby("prompt_id", sort=False).size()
    if counts.nunique() != 1 or counts.iloc[0] < LEAST_SAMPLES or len(counts) < 2:
        raise UserError(
            f"calibrate.pool: {len(counts)} training or held-out prompts without many ties; expected two or more with "
            f"equally many samples, at least {LEAST_SAMPLES}: set calibrate.pool: false"
        )
    return reference["reward"].to_numpy(dtype=np.float64).reshape(len(counts), -1)


def place(reference: Floats, rewards: Floats, *, among: bool) -> Places:
    """Mid-ranks of rewards [N] in sorted reference rewards [K], and the intervals of quantiles they stand for.

    among: the rewards are themselves of the reference. Each is then left out of its own comparison, and rank i of K
    stands for [(i − 1)/K, i/K]. Other rewards become one more of K + 1. Equal rewards share the union of their
    intervals.
    """
    below = np.searchsorted(reference, rewards, side="left")
    equal = np.searchsorted(reference, rewards, side="right") - below - (1 if among else 0)
    return _places(below, equal, len(reference) - (1 if among else 0))


def _places(below: Counts, equal: Counts, others: Counts | int) -> Places:
    """Places of responses from how many of the others have a lower reward, and the same one."""
    total = others + 1
    return Places((below + equal / 2) / others, below / total, (below + equal + 1) / total)


def held_out_prompts(config: Config) -> list[dict[str, Any]]:
    """Rows of the held-out prompts that were sampled from, in the order of prompts.parquet."""
    sampled = set(read_table(config.run / "quantiles.parquet")["prompt_id"].to_pylist())
    rows = read_table(config.run / "prompts.parquet").to_pylist()
    return [row for row in rows if row["split"] == "holdout" and row["prompt_id"] in sampled]


def held_out_places(frame: pd.DataFrame, seed: int) -> Floats:
    """Calibrated rewards of every other reference sample of held-out prompts, judged by the rest.

    A sample's rank is spread over its own cell of width 1/(K + 1) at random, so that exchangeable samples without
    ties come out exactly uniform for every K; ties are left at their middle, where they show.
    """
    generator = np.random.default_rng(seed)
    held_out = frame[(frame["split"] == "holdout") & (frame["source"] == "reference")]
    places = []
    for _, group in held_out.groupby("prompt_id", sort=False):
        rewards = group.sort_values("sample_id")["reward"].to_numpy(dtype=np.float64)
        places.append(spread_ranks(np.sort(rewards[::2]), rewards[1::2], generator))
    return np.concatenate(places) if places else np.empty(0)


def pooled_held_out_places(frame: pd.DataFrame, seed: int) -> Floats:
    """Pooled calibrated rewards of held-out prompts, each sample judged by the other samples of its prompt.

    What prompts have in common is learned from the training prompts alone. Ranks are spread over cells of width 1/K at
    random. Prompts where most samples tie are left out, for they keep their ranks.
    """
    learned = fit_pool(_untied(frame[frame["split"] != "holdout"]))
    rewards = _untied(frame[frame["split"] == "holdout"])
    cells = np.random.default_rng(seed).random(rewards.shape)
    ranks = (np.argsort(np.argsort(rewards, axis=1), axis=1) + cells) / rewards.shape[1]
    return pooled_places(learned, rewards, ranks).ravel()


def spread_ranks(reference: Floats, rewards: Floats, generator: np.random.Generator) -> Floats:
    """Ranks of fresh rewards [N] among reference rewards [K], exactly uniform on [0, 1] if both have one law."""
    places = place(reference, rewards, among=False)
    cell = 1 / (len(reference) + 1)
    middle = (places.low + places.high) / 2
    return middle + cell * (generator.random(len(rewards)) - 0.5)


def ks_distance(values: Floats) -> float:
    """Kolmogorov-Smirnov distance of values in [0, 1] from the uniform distribution."""
    from scipy.stats import kstest

    return float(kstest(values, "uniform").statistic) if len(values) else 0.0
