"""The demo as it is run by a new user: every stage on the bundled model, through the command line."""

import json
import shutil
from pathlib import Path

import pytest

from iapo.config import BUNDLED_FOLDER
from iapo.pipeline import BEFORE_TRAINING, status
from iapo.start import demo_config, plain_demo_config
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
    trained = next(record for record in metrics["policies"] if record["name"] == "trained")
    assert plain["best_of(4)"]["kl"] == pytest.approx(0.5, rel=0.15)
    assert plain["best_of(4)"]["kl"] == pytest.approx(trained["kl"], rel=0.1)
    assert plain["best_of(4)"]["lead_low"] > 0 > plain["sample"]["lead_high"]  # each wins its own
    assert plain["best_of(4)"]["lead"] == pytest.approx(trained["win_rate"] - plain["best_of(4)"]["win_rate"])
    shared, own = demo_run / "responses", demo_run / "plain" / "responses"
    assert read_table(shared).equals(read_table(own))


def test_the_reference_is_still_the_reference_when_it_is_evaluated(demo_run):
    metrics = json.loads((demo_run / "evaluation" / "metrics.json").read_text())
    assert metrics["uniformity"]["base_ks_distance"] < 0.06
    calibrate = json.loads((demo_run / "manifests" / "calibrate.json").read_text())
    assert calibrate["holdout_ks_distance"] < 0.1
    train = json.loads((demo_run / "manifests" / "train.json").read_text())
    assert not train["does_harm"]


def test_repeating_the_demo_from_elsewhere_does_nothing(demo_run, monkeypatch):
    monkeypatch.chdir(demo_run.parent)
    out = Path(demo_run.name)
    assert {state for _, state, _ in status(demo_config(out))} == {"done"}
    plain = {name: state for name, state, _ in status(plain_demo_config(out))}
    assert {name for name, state in plain.items() if state == "done"} == {*BEFORE_TRAINING, "train"}


@pytest.mark.parametrize(("part", "stage"), [("reference", "sample"), ("reward", "score")])
def test_a_bundled_model_trained_anew_makes_stale_what_the_old_one_made(demo_run, tmp_path, monkeypatch, part, stage):
    shutil.copytree(BUNDLED_FOLDER, tmp_path / "bundled")
    with (tmp_path / "bundled" / part / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr("iapo.pipeline.BUNDLED_FOLDER", tmp_path / "bundled")
    monkeypatch.chdir(demo_run.parent)
    assert [name for name, state, _ in status(demo_config(Path(demo_run.name))) if state == "stale"] == [stage]
