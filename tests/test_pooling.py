"""Pooled calibration against known distributions, its leave-one-out against leaving one out, and the stage."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr
from scipy.stats import gamma, rankdata

from iapo.calibrate import (
    BAD_KS,
    calibrate,
    held_out_places,
    ks_distance,
    pool_places,
    pooled_held_out_places,
)
from iapo.closed_form import solve
from iapo.pooling import fit_pool, normal_scores, pooled_places, pooled_places_beside
from iapo.store import read_manifest, read_table
from iapo.targets import log_density_targets


def own_ranks(rewards: np.ndarray) -> np.ndarray:
    return (rankdata(rewards, axis=1) - 1) / (rewards.shape[1] - 1)


def drawn(prompts: int, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Normal rewards of prompts that differ in mean and deviation, and their true quantiles."""
    generator = np.random.default_rng(seed)
    errors = generator.normal(size=(prompts, samples))
    deviation = np.exp(0.3 * generator.normal(size=(prompts, 1)))
    return generator.normal(size=(prompts, 1)) + deviation * errors, ndtr(errors)


def rms(places: np.ndarray, truth: np.ndarray) -> float:
    return float(np.sqrt(np.mean((places - truth) ** 2)))


@pytest.mark.parametrize("samples", [4, 8, 32])
def test_what_pooling_is_worth_is_what_it_says(samples):
    """Against the true quantiles: a smaller error than ranks, and that of ranks among at least `worth` samples."""
    rewards, truth = drawn(600, samples)
    pool = fit_pool(rewards)
    ranks = own_ranks(rewards)
    error = rms(pooled_places(pool, rewards, ranks), truth)
    assert error < 0.85 * rms(ranks, truth)
    assert samples < pool.worth < 1.05 * (1 + 1 / (6 * error**2))


def test_where_prompts_have_different_shapes_the_ranks_take_over():
    """Gamma rewards whose shape differs by prompt: the model alone is worse than ranks, the mixture is not."""
    generator = np.random.default_rng(1)
    shape = np.exp(1.5 * generator.normal(size=(300, 1)))
    sign = generator.choice([-1, 1], size=(300, 1))
    rewards = sign * generator.gamma(shape, size=(300, 64))
    truth = np.where(sign > 0, gamma.cdf(np.abs(rewards), shape), gamma.sf(np.abs(rewards), shape))
    pool, ranks = fit_pool(rewards), own_ranks(rewards)
    assert rms(pooled_places(replace(pool, weight=1.0), rewards, ranks), truth) > 1.2 * rms(ranks, truth)
    assert rms(pooled_places(pool, rewards, ranks), truth) < rms(ranks, truth)
    assert 0 < pool.weight < 0.5 and pool.worth >= 64


def test_each_sample_is_left_out_of_its_own_comparison():
    rewards, _ = drawn(20, 6)
    pool = fit_pool(rewards)
    found = pooled_places(pool, rewards, own_ranks(rewards))
    for sample in range(6):  # to one step of the empirical G
        rest = np.delete(rewards, sample, axis=1)
        ranks = (rest < rewards[:, [sample]]).mean(axis=1)
        beside = pooled_places_beside(pool, rest, np.arange(20), rewards[:, sample], ranks)
        assert found[:, sample] == pytest.approx(beside, abs=1 / rewards.size)


def test_only_the_order_of_rewards_matters():
    rewards, _ = drawn(50, 8)
    changed = np.exp(rewards) + 7
    found, again = fit_pool(rewards), fit_pool(changed)
    assert (again.weight, again.worth) == (found.weight, found.worth)
    ranks = own_ranks(rewards)
    assert pooled_places(again, changed, ranks) == pytest.approx(pooled_places(found, rewards, ranks))


def test_normal_scores_are_finite_everywhere():
    ordered = np.array([0.0, 1.0, 2.0])
    found = normal_scores(ordered, np.array([-9.0, 1.0, 9.0]))
    assert found[1] == pytest.approx(0) and np.all(np.isfinite(found)) and found[0] == pytest.approx(-found[2])


def table(rewards: np.ndarray, holdout: int = 0) -> pd.DataFrame:
    prompts, samples = rewards.shape
    return pd.DataFrame(
        {
            "prompt_id": np.repeat([f"p{prompt:03}" for prompt in range(prompts)], samples),
            "sample_id": np.tile(np.arange(samples), prompts),
            "source": "reference",
            "reward": rewards.ravel(),
            "split": np.repeat(np.where(np.arange(prompts) < holdout, "holdout", "train"), samples),
        }
    )


def test_held_out_samples_are_uniform_and_prompts_of_another_shape_show():
    rewards, _ = drawn(240, 32)
    for samples in (4, 32):
        assert ks_distance(pooled_held_out_places(table(drawn(240, samples)[0], 80), 0)) < 0.07
    even = ks_distance(pooled_held_out_places(table(rewards, 80), 0))
    rewards[:80] = np.where(rewards[:80] > 0, 3, 0) + 0.01 * rewards[:80]  # held-out prompts of two lumps each
    odd = ks_distance(pooled_held_out_places(table(rewards, 80), 0))
    assert even < 0.05 < odd
    assert ks_distance(held_out_places(table(rewards, 80), 0)) < 0.05 < BAD_KS  # of ranks alone


def test_places_of_given_responses_and_of_prompts_that_tie():
    rewards, _ = drawn(40, 8)
    rewards[0] = [0, 0, 0, 1, 1, 1, 1, 0]
    rows = table(rewards)
    given = rows.iloc[[9, 3]].assign(sample_id=1_000_000, source="given")
    everything = pd.concat([rows, given]).sort_values(["prompt_id", "sample_id"], ignore_index=True)
    pool = fit_pool(rewards[1:])
    before = calibrate(everything)[1]
    after = pool_places(everything, before, pool)
    tied = (everything["prompt_id"] == "p000").to_numpy()
    assert after[tied].equals(before[tied].astype(after.dtypes))
    assert set(after.loc[~tied, "samples"]) == {pool.worth}
    width = (after["tie_high"] - after["tie_low"])[~tied]
    assert width.to_numpy() == pytest.approx(1 / pool.worth) and after["tie_low"].min() >= 0
    assert after["tie_high"].max() <= 1 + 1e-12
    targets = log_density_targets(after, solve("best_of(4)", target_kl=0.3))
    by_reward = everything[~tied].assign(target=targets[~tied]).sort_values("reward").groupby("prompt_id")["target"]
    assert all(np.all(np.diff(group.to_numpy()) > -0.5) for _, group in by_reward)


@pytest.mark.parametrize("samples", [5, 16])
def test_stage_pools_when_asked(tmp_path, tiny_run, iapo, caplog, samples):
    path = tiny_run(sample={"samples_per_prompt": samples}, calibrate={"pool": True})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score", "calibrate")] == [0] * 4
    record = read_manifest(tmp_path / "run", "calibrate")
    calibrated = read_table(tmp_path / "run" / "calibrated.parquet").to_pandas()
    assert record is not None and record["samples_worth"] >= samples and "pooled over prompts" in caplog.text
    assert set(calibrated["samples"]) == {record["samples_worth"]}
    assert calibrated["calibrated_reward"].between(0, 1).all()


def test_stage_refuses_to_pool_what_it_cannot(tiny_run, iapo):
    path = tiny_run(sample={"samples_per_prompt": 3}, calibrate={"pool": True})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score")] == [0] * 3
    outcome = iapo("calibrate", path)
    assert outcome.code == 2 and "calibrate.pool: false" in outcome.err
