"""Calibrated rewards against a double loop, the intervals they stand for, and their uniformity."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chisquare, kstest

from iapo.calibrate import BAD_KS, calibrate, held_out_places, ks_distance, place, spread_ranks
from iapo.closed_form import solve
from iapo.few_samples import samples_needed
from iapo.store import read_manifest, read_table

REWARDS = {
    "untied": [0.3, -1.0, 2.5, 0.4, 7.0],
    "tied": [1.0, 2.0, 1.0, 3.0, 2.0, 2.0],
    "binary": [0.0, 1.0, 0.0, 0.0],
    "equal": [5.0, 5.0, 5.0],
}


def loop(reward: float, others: list[float]) -> float:
    """Share of the others below, ties counting half."""
    return sum((other < reward) + (other == reward) / 2 for other in others) / len(others)


@pytest.mark.parametrize("name", REWARDS)
def test_each_reference_sample_is_judged_by_the_others(name):
    rewards = REWARDS[name]
    found = place(np.sort(rewards), np.array(rewards), among=True)
    expected = [loop(rewards[i], rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]
    assert found.calibrated.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", REWARDS)
def test_given_responses_are_judged_by_all(name):
    rewards, given = REWARDS[name], [-10.0, 0.35, 1.0, 2.0, 5.0, 10.0]
    found = place(np.sort(rewards), np.array(given), among=False)
    assert found.calibrated.tolist() == pytest.approx([loop(reward, rewards) for reward in given])


@pytest.mark.parametrize("name", REWARDS)
def test_intervals_partition_the_unit_interval(name):
    """Distinct rewards stand for neighbouring intervals as wide as their share, from 0 to 1."""
    rewards = np.sort(REWARDS[name])
    found = place(rewards, rewards, among=True)
    pieces = sorted(set(zip(found.low.tolist(), found.high.tolist(), strict=True)))
    shares = [float((rewards == value).mean()) for value in np.unique(rewards)]
    assert [high - low for low, high in pieces] == pytest.approx(shares)
    assert [low for low, _ in pieces] == pytest.approx([0, *np.cumsum(shares)[:-1]])
    assert pieces[-1][1] == pytest.approx(1)


def test_intervals_of_given_responses_by_hand():
    found = place(np.array([1.0, 2.0, 2.0]), np.array([0.0, 1.5, 2.0, 3.0]), among=False)
    assert found.low.tolist() == [0, 0.25, 0.25, 0.75]  # one more of 4; ties share the union of their cells
    assert found.high.tolist() == [0.25, 0.5, 1, 1]


def frame(rows: list[tuple[str, int, str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["prompt_id", "sample_id", "source", "reward"])


def test_tables_by_hand():
    """Two prompts with rows in any order, one with a given response among its samples."""
    quantiles, calibrated = calibrate(
        frame(
            [
                ("b", 1, "reference", 4.0),
                ("a", 0, "reference", 3.0),
                ("b", 0, "reference", 9.0),
                ("a", 1_000_000, "given", 3.0),
                ("a", 2, "reference", 1.0),
                ("a", 1, "reference", 2.0),
            ]
        )
    )
    assert {row.prompt_id: (row.n, list(row.rewards)) for row in quantiles.itertuples()} == {
        "a": (3, [1.0, 2.0, 3.0]),
        "b": (2, [4.0, 9.0]),
    }
    found = {(row.prompt_id, row.sample_id): row.calibrated_reward for row in calibrated.itertuples()}
    expected = {("a", 0): 1.0, ("a", 1): 0.5, ("a", 2): 0.0, ("a", 1_000_000): 2.5 / 3, ("b", 0): 1.0, ("b", 1): 0.0}
    assert found == pytest.approx(expected)


def test_any_increasing_function_of_the_reward_gives_the_same_table():
    generator = np.random.default_rng(0)
    rows = [(f"p{n % 7}", n, "reference", float(generator.normal())) for n in range(70)]
    table = frame(rows)
    changed = table.assign(reward=np.exp(3 * table["reward"]) + 100)
    pd.testing.assert_frame_equal(calibrate(table)[1], calibrate(changed)[1])


@pytest.mark.parametrize("samples", [1, 3, 16])
def test_spread_ranks_are_exactly_uniform(samples):
    """20,000 ranks among few samples, by a KS test (continuous) and a chi-square; each p below 1e-4 one time in 1e4."""
    generator = np.random.default_rng(0)
    ranks = np.concatenate(
        [
            spread_ranks(np.sort(generator.normal(size=samples)), generator.normal(size=1), generator)
            for _ in range(20_000)
        ]
    )
    assert ranks.min() >= 0 and ranks.max() <= 1
    assert kstest(ranks, "uniform").pvalue > 1e-4
    assert chisquare(np.histogram(ranks, bins=10, range=(0, 1))[0]).pvalue > 1e-4


def held_out_frame(draw) -> pd.DataFrame:
    rows = [(f"p{p}", s, "reference", draw()) for p in range(60) for s in range(32)]
    return frame(rows).assign(split="holdout")


def test_held_out_places_show_ties_and_drift_and_nothing_else():
    generator = np.random.default_rng(0)
    even = ks_distance(held_out_places(held_out_frame(generator.normal), 0))
    tied = ks_distance(held_out_places(held_out_frame(lambda: float(generator.integers(2))), 0))
    drifting = held_out_frame(generator.normal)
    judged = drifting["sample_id"] % 2 == 1
    drifting.loc[judged, "reward"] += 0.7
    assert even < 0.05 and tied > BAD_KS and ks_distance(held_out_places(drifting, 0)) > BAD_KS
    assert len(held_out_places(drifting.assign(split="train"), 0)) == 0


def test_ks_distance_by_hand():
    # the empirical CDF jumps to 1/2 at 0.1 and to 1 at 0.2: 1 - 0.2 is the largest gap
    assert ks_distance(np.array([0.2, 0.1])) == pytest.approx(0.8)
    assert ks_distance((np.arange(10) + 0.5) / 10) == pytest.approx(0.05)
    assert ks_distance(np.empty(0)) == 0


def test_stage_joins_on_keys(tmp_path, tiny_run, iapo):
    path = tiny_run(sample={"samples_per_prompt": 16})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score", "calibrate")] == [0] * 4
    run = tmp_path / "run"
    rewards = read_table(run / "rewards").to_pandas()
    calibrated = read_table(run / "calibrated.parquet").to_pandas()
    assert len(calibrated) == len(rewards) == 320
    table = rewards.merge(calibrated, on=["prompt_id", "sample_id"], validate="one_to_one")
    for _, group in table.groupby("prompt_id"):
        values = group["reward"].tolist()
        expected = [loop(values[i], values[:i] + values[i + 1 :]) for i in range(len(values))]
        assert group["calibrated_reward"].tolist() == pytest.approx(expected)
    record = read_manifest(run, "calibrate")
    assert record is not None and record["prompts_of_equal_rewards"] == 0 and record["holdout_ks_distance"] < 0.25


def test_stage_warns_of_too_few_samples_and_says_how_many_would_do(tiny_run, iapo, caplog):
    path = tiny_run(sample={"samples_per_prompt": 8})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score", "calibrate")] == [0] * 4
    needed = samples_needed(solve("best_of(4)", target_kl=0.5))
    assert needed > 8
    assert f"8 samples a prompt are few for best_of(4) at 0.5 nats; sample.samples_per_prompt: {needed} would do" in (
        caplog.text
    )


def test_stage_refuses_rewards_that_are_all_equal(tiny_run, iapo):
    path = tiny_run(sample={"samples_per_prompt": 4}, reward={"function": "tiny_rewards:constant"})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score")] == [0] * 3
    outcome = iapo("calibrate", path)
    assert outcome.code == 2 and "all equal" in outcome.err


def test_stage_warns_of_ties_and_counts_prompts_that_teach_nothing(tmp_path, tiny_run, iapo, caplog):
    path = tiny_run(reward={"function": "tiny_rewards:ends_early"}, sample={"samples_per_prompt": 4})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score", "calibrate")] == [0] * 4
    rewards = read_table(tmp_path / "run" / "rewards").to_pandas()
    equal = int((rewards.groupby("prompt_id")["reward"].nunique() == 1).sum())
    record = read_manifest(tmp_path / "run", "calibrate")
    assert record is not None and 0 < equal == record["prompts_of_equal_rewards"]
    assert f"{equal} prompts have equal rewards throughout" in caplog.text and "away from uniform" in caplog.text
