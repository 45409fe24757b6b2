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
"""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from iapo.config import Config
from iapo.errors import UserError
from iapo.estimators import draws
from iapo.procedures import parse_procedure
from iapo.store import Manifest, read_table, write_table

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

QUANTILES = pa.schema([("prompt_id", pa.string()), ("n", pa.int32()), ("rewards", pa.list_(pa.float64()))])
CALIBRATED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_id", pa.int32()),
        ("calibrated_reward", pa.float64()),
        ("tie_low", pa.float64()),
        ("tie_high", pa.float64()),
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
    procedure = parse_procedure(config.objective.procedure)
    frame = join_rewards(config)
    quantiles, calibrated = calibrate(frame)
    samples = int(quantiles["n"].min())
    if samples < 2:
        raise UserError("calibrate: a prompt has fewer than 2 reference rewards; sample more with `iapo sample`")
    needed = 4 * (draws(procedure) or 0)
    if samples < needed:
        log.warning(
            "calibrate: %d samples a prompt cannot resolve %s; sample.samples_per_prompt: %d would",
            samples,
            procedure,
            needed,
        )
    equal = int(sum(rewards[0] == rewards[-1] for rewards in quantiles["rewards"]))
    if equal == len(quantiles):
        raise UserError(
            "calibrate: the rewards of every prompt are all equal, so nothing can be learned from them; "
            "expected a reward that tells responses apart"
        )
    if equal:
        log.warning("calibrate: %d prompts have equal rewards throughout and teach nothing; train drops them", equal)
    distance = ks_distance(held_out_places(frame, config.seed))
    if distance > BAD_KS:
        log.warning(
            "calibrate: calibrated rewards of held-out reference samples are %.3f away from uniform (KS distance); "
            "ties do this, and then win rates by equation (4) do not hold; so does chance, with few samples",
            distance,
        )
    outputs = [config.run / "quantiles.parquet", config.run / "calibrated.parquet"]
    write_table(outputs[0], pa.Table.from_pandas(quantiles, schema=QUANTILES, preserve_index=False))
    write_table(outputs[1], pa.Table.from_pandas(calibrated, schema=CALIBRATED, preserve_index=False))
    manifest.finish(outputs, rows=len(calibrated), prompts_of_equal_rewards=equal, holdout_ks_distance=distance)


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
    quantiles, calibrated = [], []
    for prompt_id, group in frame.groupby("prompt_id", sort=False):
        own = (group["source"] == "reference").to_numpy()
        rewards = group["reward"].to_numpy(dtype=np.float64)
        reference = np.sort(rewards[own])
        quantiles.append({"prompt_id": prompt_id, "n": len(reference), "rewards": reference})
        among = place(reference, rewards[own], among=True)
        beside = place(reference, rewards[~own], among=False)
        part = pd.DataFrame({"prompt_id": prompt_id, "sample_id": group["sample_id"]})
        for column, inside, outside in (
            ("calibrated_reward", among.calibrated, beside.calibrated),
            ("tie_low", among.low, beside.low),
            ("tie_high", among.high, beside.high),
        ):
            values = np.empty(len(group))
            values[own], values[~own] = inside, outside
            part[column] = values
        calibrated.append(part)
    return pd.DataFrame(quantiles), pd.concat(calibrated, ignore_index=True)


def place(reference: Floats, rewards: Floats, *, among: bool) -> Places:
    """Mid-ranks of rewards [N] in sorted reference rewards [K], and the intervals of quantiles they stand for.

    among: the rewards are themselves of the reference. Each is then left out of its own comparison, and rank i of K
    stands for [(i − 1)/K, i/K]. Other rewards become one more of K + 1. Equal rewards share the union of their
    intervals.
    """
    below = np.searchsorted(reference, rewards, side="left").astype(np.float64)
    equal = np.searchsorted(reference, rewards, side="right") - below - (1 if among else 0)
    others = len(reference) - (1 if among else 0)
    total = others + 1
    return Places((below + equal / 2) / others, below / total, (below + equal + 1) / total)


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
