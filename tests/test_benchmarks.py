"""Benchmarks at toy size: the GPU's on the CPU, so that it runs when a GPU is there; and estimates, which must hold."""

import importlib
import json
from pathlib import Path

import pytest

from iapo.atoms import atom_kl
from iapo.closed_form import optimal_win_rate
from iapo.config import load_config
from iapo.models import load_policy


def test_the_gpu_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    gpu = importlib.import_module("benchmarks.gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    result = gpu.main(["--toy", "--out", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(result))
    assert result["exactness"]["float32_logprob"] < 1e-3 and result["exactness"]["float32_gradient"] < 1e-3
    measured = [case for case in result["cases"] if case["trainer"] == "iapo"]
    assert len(measured) == 4 and all(case["tokens_per_second"] > 0 for case in measured)
    assert all(case["predicted_peak_bytes"] > 0 for case in measured)
    assert {case["cap_gb"] for case in measured} == {None, 12, 16, 24}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_benchmark_of_estimates_finds_what_was_predicted(monkeypatch, checkpointing):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    benchmark = importlib.import_module("benchmarks.estimate")
    found = benchmark.measure("tiny", (40, 20, 4), checkpointing, 1)
    assert found["predicted_bytes"] == pytest.approx(found["bytes"], rel=0.1)
    assert found["seconds"] > 0 and found["predicted_seconds"] > 0


def test_the_benchmark_of_training_measures_one_forward_pass(monkeypatch):
    """Memory of what goes through the model at once, less with checkpoints; seconds and profile of whole steps."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    benchmark = importlib.import_module("benchmarks.training")
    case = {"trainer": "iapo", "size": "tiny", "shape": (40, 30, 4), "steps": 2, "processor_time": True}

    def measure(wanted, together=4, checkpointing=False):
        return benchmark.measure(case | {"wanted": wanted, "together": together, "checkpointing": checkpointing})

    assert measure("peak", checkpointing=True) < measure("peak", together=2) < measure("peak")
    assert len(measure("seconds")) == 2
    parts = measure("profile")
    assert parts["matrix products"] > 0 and parts["attention"] > 0


def test_the_benchmark_of_quality_leaves_nothing_out(tmp_path, monkeypatch):
    """Exact figures at toy size: it asserts that its responses are all there are, and no policy beats the optimum."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    benchmark = importlib.import_module("benchmarks.quality")
    assert benchmark.parse(["hh", "--data", "here.gz"]).data == tmp_path / "here.gz"  # it runs in the package's folder
    sections = {"sample": {"samples_per_prompt": 64}, "train": {"epochs": 4, "learning_rate": 3e-3, "lora_rank": 32}}
    arguments = ["enumerable", "--out", str(tmp_path), "--transforms", "optimal", "--baselines", "--kls", "0.3"]
    found = {one.split: one for one in benchmark.main([*arguments, "--sections", json.dumps(sections)])}
    assert len(benchmark.enumerable.responses()) == 1 + 8 + 64 + 512
    for split in ("train", "holdout"):
        assert 0.5 < found[split].win_rate < found[split].closed_form
        assert found[split].closed_form < optimal_win_rate("best_of(4)", None, found[split].kl)  # responses are lumps
        assert 0.5 < found[split].identity < found[split].closed_form
    assert found["train"].kl == pytest.approx(0.3, rel=0.03)  # on which the factor is found, exactly
    run = tmp_path / "enumerable-0" / "iapo-optimal-best-of-4-0.3"  # whose adapter `train` scaled on held-out prompts
    config = load_config(run / "config.json")
    own = benchmark.enumerable.exact(config, load_policy(config.model, run / "adapter"), "holdout")
    assert atom_kl(*own).mean() == pytest.approx(0.3, rel=0.15)


def test_baselines_learn_from_the_best_and_the_worst_of_every_four(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    baselines = importlib.import_module("benchmarks.baselines")
    rewards = {"a": [0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.4, 0.6, 0.8], "b": [0.5, 0.5, 0.5, 0.5, 0.5, 0.2, 0.5, 0.5]}
    rows = [
        {"prompt_id": name, "calibrated_reward": u, "row": i} for name in rewards for i, u in enumerate(rewards[name])
    ]
    found = [(best["prompt_id"], best["row"], worst["row"]) for best, worst in baselines.pairs(rows)]
    assert [one for one in found if one[0] == "a"] == [("a", 1, 0), ("a", 4, 5)]  # the ninth has no group
    assert [one[2] for one in found if one[0] == "b"] == [5]  # the first four tie
