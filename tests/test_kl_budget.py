import json
import math

import pytest

from iapo.config import load_config
from iapo.kl_budget import LARGEST, TOLERANCE, find_factor
from iapo.store import read_manifest


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
