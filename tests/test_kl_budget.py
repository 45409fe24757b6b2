import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from iapo.config import load_config
from iapo.kl_budget import LARGEST, TOLERANCE, find_factor, meet
from iapo.models import load_base
from iapo.store import read_manifest
from iapo.train import add_adapter


@pytest.mark.parametrize(("scale", "power"), [(0.1, 2.0), (4.0, 1.6), (0.02, 2.6)])
def test_factor_is_found_in_few_tries(scale: float, power: float) -> None:
    tries = []

    def kl_of(factor: float) -> tuple[float, float]:
        tries.append(factor)
        return scale * factor**power, 0.01

    found = find_factor(kl_of, 0.5)
    assert found.kl == pytest.approx(0.5, rel=TOLERANCE)
    assert found.factor == pytest.approx((0.5 / scale) ** (1 / power), rel=TOLERANCE)
    assert found.kl_before == scale
    assert len(tries) <= 4


def test_factor_is_found_where_less_of_an_adapter_spends_more() -> None:
    """An over-trained adapter may be so: its KL rises up to 0.73 of it, and falls from there on."""

    def kl_of(factor: float) -> tuple[float, float]:
        return 4 * factor**0.8 * math.exp(-1.1 * factor), 0.01

    assert kl_of(0.6)[0] > kl_of(1.0)[0] > 1.3
    for target in (0.5, 1.0):
        assert find_factor(kl_of, target).kl == pytest.approx(target, rel=TOLERANCE)


def test_every_layer_of_an_adapter_is_scaled(tiny_run, tmp_path) -> None:
    """B alone, the output layer's too; here the KL is the sum of its squares."""
    config = load_config(tiny_run(train={"output_layer": True}))
    policy = add_adapter(load_base(config.model), config.train)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy.save_pretrained(tmp_path / "adapter")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    spent = sum(float(weight.square().sum()) for name, weight in before.items() if "lora_B" in name)

    def measure(_, policy):
        own = [weight for name, weight in policy.named_parameters() if "lora_B" in name]
        return lambda: np.full(3, sum(float(weight.square().sum()) for weight in own))

    scale = meet(config, tmp_path / "adapter", spent / 4, measure)
    assert scale["factor"] == pytest.approx(0.5, rel=TOLERANCE)
    after = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert after.keys() == before.keys() and "base_model.model.lm_head.lora_B.weight" in after
    for name, weight in before.items():
        assert torch.allclose(after[name], weight * (scale["factor"] if "lora_B" in name else 1)), name


def test_an_adapter_that_learned_nothing_is_not_blown_up_without_bound() -> None:
    found = find_factor(lambda factor: (1e-6 * factor**2, 1e-6), 0.5)
    assert found.factor == LARGEST
    assert found.kl < 1e-3


@pytest.mark.parametrize("rate", [1e-3, 5e-2], ids=["too little KL", "too much"])
def test_the_kl_that_was_asked_for_is_spent(tiny_run, letters_model, iapo, rate):
    """Whatever the learning rate; `evaluate` measures it on samples of its own."""
    changes = {"base": str(letters_model), "quantization": "none"}
    path = tiny_run(
        model=changes,
        train={"epochs": 1, "learning_rate": rate},
        objective={"target_kl": 0.2},
        evaluate={"samples_per_prompt": 128},
    )
    stages = ("prompts", "sample", "score", "calibrate", "train", "evaluate")
    assert [iapo(stage, path).code for stage in stages] == [0] * 6
    run = load_config(path).run
    record = read_manifest(run, "train")
    assert record is not None
    scale = record["scale"]
    assert scale["kl"] == pytest.approx(0.2, rel=0.1)
    assert (scale["kl_before"] < 0.15) if rate < 5e-3 else (scale["kl_before"] > 0.25)
    trained = next(
        one
        for one in json.loads((run / "evaluation" / "metrics.json").read_text())["policies"]
        if one["name"] == "trained"
    )
    assert trained["kl"] == pytest.approx(0.2, rel=0.1, abs=3 * trained["kl_se"])
