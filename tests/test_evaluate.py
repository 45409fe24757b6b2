"""Evaluation: metrics of a table made by hand, policies against each other on a tiny run, and what is refused."""

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tokenizer
from transformers import LlamaForCausalLM

from iapo.config import load_config
from iapo.errors import UserError
from iapo.evaluate import (
    HIGHEST_KL,
    base_ks_distance,
    calibrated_rewards,
    closed_form_win_rate,
    metrics,
    policies,
    procedures,
    prompt_win_rates,
)
from iapo.models import prompt_token_ids
from iapo.procedures import parse_procedure
from iapo.store import read_table

KEYS = {
    *("name", "procedure", "opponent", "prompts", "samples_per_prompt", "kl", "kl_se"),
    *("win_rate", "win_rate_low", "win_rate_high", "reference_win_rate", "closed_form_win_rate", "kl_efficiency"),
    *("lead", "lead_low", "lead_high"),
}


@pytest.fixture
def config(tiny_run):
    return load_config(tiny_run(evaluate={"procedures": ["sample", "worst_of(2)", "best_of(4)"]}))


def table(rewards: dict[tuple[str, str], list[float]], kls: dict[str, float]) -> pd.DataFrame:
    """rewards: (policy, prompt) -> rewards of its samples; kls: the KL along every sample of a prompt."""
    return pd.DataFrame(
        [
            {"policy": policy, "prompt_id": prompt, "sample_id": number, "reward": reward, "kl": kls[prompt]}
            for (policy, prompt), values in rewards.items()
            for number, reward in enumerate(values)
        ]
    )


REFERENCE = {"a": np.array([1.0, 2.0, 3.0, 4.0]), "b": np.array([0.0, 0.0, 1.0, 5.0])}
MADE = table(
    {
        ("base", "b"): [0.0, 1.0, 5.0, 0.0],
        ("base", "a"): [4.0, 3.0, 2.0, 1.0],
        ("trained", "b"): [6.0, 6.0, 6.0, 6.0],
        ("trained", "a"): [1.0, 2.0, 3.0, 4.0],
    },
    {"a": 0.2, "b": 0.4},
)


def test_metrics_by_hand(config):
    found = metrics(config, MADE, REFERENCE)["policies"]
    assert all(record.keys() >= KEYS for record in found)
    by_key = {(r["name"], r["procedure"]): r for r in found}
    assert list(by_key) == [
        (name, procedure)
        for name in ("base", "trained")
        for procedure in ("best_of(4)", "sample", "worst_of(2)")  # the objective's own first, and once
    ]
    for procedure in ("best_of(4)", "sample", "worst_of(2)"):
        assert by_key["base", procedure]["win_rate"] == pytest.approx(0.5)  # the same samples as the reference
        trained = by_key["trained", procedure]
        assert trained["win_rate"] == pytest.approx((0.5 + 1) / 2)  # even on a, always better on b
        assert (trained["kl"], trained["kl_se"]) == pytest.approx((0.3, 0.1))
        assert trained["win_rate_low"] == pytest.approx(0.5) and trained["win_rate_high"] == pytest.approx(1)
        gain = trained["closed_form_win_rate"] - 0.5
        assert 0 < gain < 0.5 and trained["kl_efficiency"] == pytest.approx(0.25 / gain)
        base = by_key["base", procedure]
        assert (base["lead"], base["lead_low"], base["lead_high"]) == pytest.approx((0.25, 0, 0.5))
        assert trained["lead"] is trained["lead_low"] is trained["lead_high"] is None


def test_the_lead_is_paired_by_prompt(config):
    """Prompts differ much, the policies on a prompt little: the lead is known better than either win rate."""
    reference = {f"p{n:02}": np.arange(8.0) for n in range(40)}
    rewards = {
        (policy, q): [n % 8 + shift] * 4
        for policy, shift in (("trained", 0.6), ("other", 0.0))
        for n, q in enumerate(reference)
    }
    made = table(rewards, dict.fromkeys(reference, 0.1))
    base = made[made["policy"] == "other"].assign(policy="base")
    found = metrics(config, pd.concat([base, made]).sample(frac=1, random_state=0), reference)["policies"]
    other = next(r for r in found if r["name"] == "other" and r["procedure"] == "sample")
    assert other["lead"] == pytest.approx(0.5 / 8) == other["lead_low"] == other["lead_high"]
    assert other["win_rate_high"] - other["win_rate_low"] > 0.1


def test_the_kl_is_a_mean_over_prompts_with_their_error(config):
    """Rows in any order."""
    kls = np.random.default_rng(0).random((40, 16))
    reference = {f"p{n:02}": np.arange(16.0) for n in range(40)}
    made = table({(p, q): list(range(16)) for p in ("base", "trained") for q in reference}, dict.fromkeys(reference, 0))
    made = made.assign(kl=np.r_[0 * kls.ravel(), kls.ravel()]).sample(frac=1, random_state=0)
    base, trained = (
        {r["name"]: r for r in metrics(config, made, reference)["policies"]}[p] for p in ("base", "trained")
    )
    assert (base["kl"], base["kl_se"]) == (0, 0)
    assert trained["kl"] == pytest.approx(kls.mean())
    assert trained["kl_se"] == pytest.approx(kls.mean(axis=1).std(ddof=1) / 40**0.5)


def test_metrics_of_a_verifier_are_against_the_optimum_of_its_levels(config):
    """Pass rates of about 0.2 under best_of(4): 0.670528 is the most at 0.207235 nats (test_atoms)."""
    fifth = np.repeat([0.0, 1.0], [4000, 1000])
    kls = {"a": 0.2, "b": 0.21447}
    made = table({(policy, prompt): [0.0, 1.0] * 4 for policy in ("base", "trained") for prompt in "ab"}, kls)
    trained = next(
        r for r in metrics(config, made, {"a": fifth, "b": fifth})["policies"] if r["procedure"] == "best_of(4)"
    )
    passes, reference = 1 - 1 / 70, 1 - 0.8**4  # 4 of 8, of which 4 pass
    win_rate = passes * (1 - reference) + (passes * reference + (1 - passes) * (1 - reference)) / 2
    assert trained["win_rate"] == pytest.approx(win_rate, abs=1e-3) and trained["reference_win_rate"] == pytest.approx(
        0.5
    )
    assert trained["closed_form_win_rate"] == pytest.approx(0.670528, abs=0.01)
    gain = trained["closed_form_win_rate"] - 0.5
    assert trained["kl_efficiency"] == pytest.approx((trained["win_rate"] - 0.5) / gain)


def test_nothing_to_win_has_no_efficiency(config):
    made = table({(policy, "a"): [1.0] * 4 for policy in ("base", "trained")}, {"a": 0.5})
    made = pd.concat([made, made.assign(prompt_id="b", kl=0.6)])
    for record in metrics(config, made, dict.fromkeys("ab", np.ones(4)))["policies"]:
        assert record["closed_form_win_rate"] == pytest.approx(0.5) and record["kl_efficiency"] is None


def test_no_efficiency_where_the_kl_is_not_above_its_error(config):
    made = MADE.assign(kl=[-0.1] * 4 + [0.12] * 4 + [-0.1] * 4 + [0.12] * 4)
    found = metrics(config, made, REFERENCE)["policies"]
    assert all(r["closed_form_win_rate"] is None and r["kl_efficiency"] is None for r in found)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("kl", [30.0, 1e6, -3.0, 0.0, float("nan")])
def test_any_measured_kl_has_metrics(config, kl):
    """Beyond HIGHEST_KL the closed form is that of HIGHEST_KL; where there is nothing to compare with it is null."""
    found = metrics(config, MADE.assign(kl=kl), REFERENCE)["policies"]
    for record in found:
        if kl > 0:
            procedure = parse_procedure(record["procedure"])
            assert record["closed_form_win_rate"] == closed_form_win_rate(procedure, procedure, HIGHEST_KL)
            assert 0.99 < record["closed_form_win_rate"] <= 1
        else:
            assert record["closed_form_win_rate"] is None and record["kl_efficiency"] is None


def test_a_kl_at_which_the_closed_form_is_refused(tiny_run, caplog):
    """early_stop(32, 0.3) is refused at 10 nats: null, with a warning in one line, and the others are measured."""
    config = load_config(tiny_run(evaluate={"procedures": ["early_stop(32, 0.3)"]}))
    samples = table(
        {(p, q): [0.1 * n for n in range(32)] for p in ("base", "trained") for q in "ab"}, {"a": 30, "b": 30}
    )
    found = metrics(config, samples, {name: np.arange(32.0) for name in "ab"})["policies"]
    by_procedure = {record["procedure"]: record for record in found}
    refused = by_procedure["early_stop(32, 0.3)"]
    assert refused["closed_form_win_rate"] is None and refused["kl_efficiency"] is None
    assert by_procedure["best_of(4)"]["closed_form_win_rate"] > 0.99
    json.dumps(found, allow_nan=False)
    (message, *others) = [record.getMessage() for record in caplog.records]
    assert "early_stop(32, 0.3) at the measured KL of 30 nats" in message and "\n" not in message
    assert all(other == message for other in others)


def test_win_rates_of_prompts_do_not_mix_in_any_order_of_rows():
    rows = MADE[MADE["policy"] == "trained"]
    best = parse_procedure("best_of(2)")
    for shuffled in (rows, rows.sample(frac=1, random_state=0)):
        assert prompt_win_rates(shuffled, REFERENCE, best, best).tolist() == pytest.approx([0.5, 1.0])


def test_win_rate_of_a_mixture_plays_the_same_procedure_on_both_sides():
    """0.5 sample + 0.5 best_of(2): half of single draws, half of pairs, enumerated."""
    rows = table({("trained", "b"): [0.0, 2.0, 5.0]}, {"b": 0.0})
    mine, theirs = [0.0, 2.0, 5.0], REFERENCE["b"].tolist()

    def wins(a: list[float], b: list[float]) -> float:
        return float(np.mean([(x > y) + (x == y) / 2 for x in a for y in b]))

    pairs = [max(pair) for pair in combinations(mine, 2)], [max(pair) for pair in combinations(theirs, 2)]
    expected = (wins(mine, theirs) + wins(*pairs)) / 2
    mixture = parse_procedure("0.5 sample + 0.5 best_of(2)")
    assert prompt_win_rates(rows, REFERENCE, mixture, mixture).tolist() == pytest.approx([expected])


def test_calibrated_rewards_by_hand():
    rows = table({("trained", "b"): [0.0, 7.0], ("trained", "a"): [2.5, 1.0]}, {"a": 0.0, "b": 0.0})
    assert calibrated_rewards(rows, REFERENCE).tolist() == [0.25, 1.0, 0.5, 0.125]


def test_base_ks_distance_looks_at_the_base_alone():
    generator = np.random.default_rng(0)
    reference = {f"p{n}": np.sort(generator.normal(size=16)) for n in range(100)}

    def fresh(policy: str, shift: float) -> dict:
        return {(policy, name): (generator.normal(size=16) + shift).tolist() for name in reference}

    ratios = dict.fromkeys(reference, 0.0)
    same = table(fresh("base", 0) | fresh("trained", 2), ratios)
    other = table(fresh("base", 0.5) | fresh("trained", 0), ratios)
    assert base_ks_distance(same, reference, 0) < 0.06 and base_ks_distance(other, reference, 0) > 0.12


def test_procedures_and_policies(tiny_run, tmp_path):
    path = tiny_run(
        objective={"procedure": "best_of(4)", "opponent": "sample", "target_kl": 0.5},
        evaluate={"procedures": ["best_of(4)"], "adapters": {"other": "somewhere"}},
    )
    found = [(str(a), str(b)) for a, b in procedures(load_config(path))]
    assert found == [("best_of(4)", "sample"), ("best_of(4)", "best_of(4)")]
    assert list(policies(load_config(path))) == ["base", "trained", "other"]
    with pytest.raises(UserError, match="taken"):
        policies(load_config(path, ("evaluate.adapters.base=x",)))


@pytest.fixture
def trained(tiny_run, iapo):
    def make(**changes):
        path = tiny_run(**changes)
        stages = ("prompts", "sample", "score", "calibrate", "train")
        assert [iapo(stage, path).code for stage in stages] == [0] * 5
        return path

    return make


def test_stage(trained, tiny_reward, iapo, tmp_path):
    """Log-ratios of the policy's own samples against single sequences; a judge and another adapter take part."""
    path = trained(train={"learning_rate": 1e-2}, model={"quantization": "none"})
    other = tmp_path / "other"
    (tmp_path / "run" / "adapter").rename(other)
    assert iapo("train", path, "--restart").code == 0
    changes = ("--set", f"evaluate.adapters.other={other}", "--set", f"evaluate.judge.model={tiny_reward}")
    assert iapo("evaluate", path, *changes).code == 0

    run = tmp_path / "run"
    samples = read_table(run / "evaluation" / "samples.parquet").to_pandas()
    assert samples.groupby("policy").size().to_dict() == {"base": 96, "trained": 96, "other": 96}
    prompts = {row["prompt_id"]: row for row in read_table(run / "prompts.parquet").to_pylist()}
    assert {prompts[name]["split"] for name in samples["prompt_id"]} == {"holdout"}
    assert (samples.loc[samples["policy"] == "base", "log_ratio"] == 0).all()
    assert samples.loc[samples["policy"] == "trained", "log_ratio"].abs().max() > 0.05
    kls = samples.groupby("policy")["kl"].agg(["min", "max"])
    assert kls.loc["base"].tolist() == [0, 0] and -1e-6 < kls.loc["trained", "min"] < kls.loc["trained", "max"]
    records = json.loads((run / "evaluation" / "metrics.json").read_text())["policies"]
    assert {(r["name"], r["procedure"]) for r in records} == {
        (name, procedure) for name in ("base", "trained", "other") for procedure in ("best_of(4)", "sample")
    }
    assert samples["reward"].nunique() > 200  # the judge's scale, not that of the bytes
    assert samples["reward"].abs().max() < 40

    from peft import PeftModel

    base = LlamaForCausalLM.from_pretrained(load_config(path).model.base)
    policy = PeftModel.from_pretrained(base, run / "adapter").eval()
    parts = read_table(sorted((run / "evaluation" / "parts" / "trained").glob("*.parquet"))[0]).to_pylist()
    compared = 0
    for row in parts:
        ids = make_tokenizer()(row["response"])["input_ids"] + [1] * (row["finish_reason"] == "stop")
        if "\N{REPLACEMENT CHARACTER}" in row["response"] or len(ids) != row["n_tokens"]:
            continue  # bytes that are no text, and special tokens, do not survive decoding
        compared += 1
        prompt = prompt_token_ids(make_tokenizer(), prompts[row["prompt_id"]]["prompt"])
        with torch.inference_mode():
            values = [score_alone(policy, prompt, ids)]
            with policy.disable_adapter():
                values.append(score_alone(policy, prompt, ids))
        assert row["log_ratio"] == pytest.approx(values[0] - values[1], abs=1e-3)
    assert compared > 0


def score_alone(model, prompt: list[int], response: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    return float(torch.log_softmax(logits, -1)[range(len(response)), response].sum())


def test_stage_refuses_what_it_cannot_use(trained, iapo, tmp_path):
    path = trained()
    outcome = iapo("evaluate", path, "--set", f"evaluate.adapters.other={tmp_path / 'nowhere'}")
    assert outcome.code == 2 and "adapter_config.json" in outcome.err
    outcome = iapo("evaluate", path, "--restart", "--set", "evaluate.samples_per_prompt=3")
    assert outcome.code == 2 and "best_of(4) draws 4 and there are 3 samples" in outcome.err
    assert not (tmp_path / "run" / "evaluation").exists()  # refused before anything is sampled
