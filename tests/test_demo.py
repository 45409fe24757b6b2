"""The demo as it is run by a new user: every stage on the bundled model, through the command line."""

import json

import pytest

from iapo.store import read_table

KEYS = {
    *("name", "procedure", "opponent", "prompts", "samples_per_prompt", "kl", "kl_se"),
    *("win_rate", "win_rate_low", "win_rate_high", "closed_form_win_rate", "kl_efficiency"),
}


def test_the_policy_trained_for_best_of_4_wins_under_it(demo_run):
    metrics = json.loads((demo_run / "evaluation" / "metrics.json").read_text())
    assert all(record.keys() >= KEYS for record in metrics["policies"])
    by_policy = {record["name"]: record for record in metrics["policies"] if record["procedure"] == "best_of(4)"}
    assert by_policy["trained"]["win_rate_low"] > 0.5
    assert by_policy["trained"]["win_rate_low"] > by_policy["base"]["win_rate_high"]
    assert 0 < by_policy["trained"]["kl_efficiency"] < 1
    assert by_policy["base"]["kl"] == 0


def test_training_for_plain_win_rate_from_the_same_samples_wins_less(demo_run):
    metrics = json.loads((demo_run / "evaluation" / "metrics.json").read_text())
    plain = {record["procedure"]: record for record in metrics["policies"] if record["name"] == "plain win rate"}
    assert plain["best_of(4)"]["kl"] == pytest.approx(0.5, rel=0.15)
    assert plain["best_of(4)"]["lead"] > 0 > plain["sample"]["lead"]  # each is better at what it was trained for
    shared, own = demo_run / "responses", demo_run / "plain" / "responses"
    assert read_table(shared).equals(read_table(own))


def test_the_reference_is_still_the_reference_when_it_is_evaluated(demo_run):
    metrics = json.loads((demo_run / "evaluation" / "metrics.json").read_text())
    assert metrics["uniformity"]["base_ks_distance"] < 0.06
    calibrate = json.loads((demo_run / "manifests" / "calibrate.json").read_text())
    assert calibrate["holdout_ks_distance"] < 0.1
    train = json.loads((demo_run / "manifests" / "train.json").read_text())
    assert not train["does_harm"]
