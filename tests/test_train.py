"""Training: equation (3) on models whose every response is enumerated, and the stage on tiny sampled runs."""

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from conftest import tiny_config, with_random_weights
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PrinterCallback,
)

from iapo.closed_form import solve
from iapo.config import ObjectiveConfig, TrainConfig, load_config
from iapo.errors import UserError
from iapo.few_samples import rank_targets
from iapo.logprobs import logprobs_of, make_batch, response_logprobs, sharing_of
from iapo.models import load_base, load_policy, load_tokenizer
from iapo.pipeline import run_stage
from iapo.store import read_manifest, read_table, write_table
from iapo.targets import solve_objective, target_table
from iapo.train import (
    COMPLETE,
    PolicyTrainer,
    add_adapter,
    finite,
    held_out_metrics,
    newest_checkpoint,
    spread,
    training_arguments,
    training_rows,
)

VOCABULARY, END = 12, 1
RESPONSES = [[END], *([a, b] for a, b in product(range(VOCABULARY), repeat=2) if a != END)]
PROMPTS = [[3, 4, 5, 6], [7, 8]]  # not of one token: attention cannot tell [7] from [7, 7]


def exact_win_rate(policy: np.ndarray, reference: np.ndarray, procedure: str) -> float:
    """P(best or worst of n responses of the policy beats that of the reference), responses in order of reward."""
    n = int(procedure[-2])

    def law(probabilities: np.ndarray) -> np.ndarray:
        cdf = np.concatenate([[0], np.cumsum(probabilities)])
        return np.diff(cdf**n if procedure.startswith("best") else 1 - (1 - cdf) ** n)

    mine, theirs = law(policy), law(reference)
    return float(sum(p * (theirs[:j].sum() + theirs[j] / 2) for j, p in enumerate(mine)))


@pytest.mark.parametrize("procedure, target_kl", [("best_of(4)", 0.5), ("worst_of(3)", 0.1)])
def test_policy_becomes_the_reference_times_the_density_of_calibrated_rewards(tmp_path, tiny_run, procedure, target_kl):
    """Every response of two tokens to two prompts, each with arbitrary rewards: π must become π_ref · f(C)."""
    random = tiny_config(vocab_size=VOCABULARY, initializer_range=0.1, tie_word_embeddings=False)
    base = with_random_weights(LlamaForCausalLM(random), 0).requires_grad_(False).eval()
    form = solve(procedure, None, "optimal", target_kl=target_kl)
    generator = np.random.default_rng(0)
    rows, exact = [], []
    for number, prompt in enumerate(PROMPTS):
        ranked = [RESPONSES[index] for index in generator.permutation(len(RESPONSES))]  # in order of reward
        ref_logprob = np.array(logprobs_of(base, [prompt] * len(ranked), ranked, pad_id=0, batch_size=64))
        reference = np.exp(ref_logprob)
        above = np.cumsum(reference)
        assert above[-1] == pytest.approx(1, abs=1e-5)
        high = np.minimum(above, 1)
        target = form.log_mean_density(np.concatenate([[0], high[:-1]]), high)
        exact.append((prompt, ranked, reference, reference * np.exp(target)))
        rows += [
            {
                "prompt_id": str(number),
                "split": "train",
                "prompt_ids": prompt,
                "response_ids": response,
                "ref_logprob": float(ref_logprob[rank]),
                "target": float(target[rank]),
                "calibrated_reward": float(high[rank] - reference[rank] / 2),
                "length": len(prompt) + len(response),
            }
            for rank, response in enumerate(ranked)
        ]
    settings = {"lora_rank": 32, "learning_rate": 1e-2, "batch_size": 266, "epochs": 150}
    config = load_config(tiny_run(train=settings | {"evaluations": 1}))
    policy = add_adapter(base, config.train)
    trainer = PolicyTrainer(
        model=policy,
        args=training_arguments(config, tmp_path / "checkpoints", len(rows)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        pad_id=0,
        budget=10_000,
        compute_metrics=held_out_metrics,
        temperature=1.0,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for prompt, ranked, reference, optimum in exact:
        assert optimum.sum() == pytest.approx(1, abs=1e-4)
        trained = np.exp(logprobs_of(policy, [prompt] * len(ranked), ranked, pad_id=0, batch_size=64))
        assert trained.sum() == pytest.approx(1, abs=1e-4)

        def kl(p: np.ndarray, q: np.ndarray) -> float:
            return float(p @ np.log(p / q))

        assert kl(reference, optimum) > 0.05
        assert kl(trained, optimum) < 0.001
        assert kl(trained, reference) == pytest.approx(kl(optimum, reference), abs=0.01)
        assert kl(trained, reference) == pytest.approx(form.kl, abs=0.07)  # a large atom hides some of its density
        win_rate = exact_win_rate(trained, reference, procedure)
        assert win_rate == pytest.approx(exact_win_rate(optimum, reference, procedure), abs=0.002)
        assert win_rate == pytest.approx(form.win_rate, abs=0.03)
        assert exact_win_rate(reference, reference, procedure) == pytest.approx(0.5)


@pytest.fixture
def calibrated(tiny_run, iapo):
    """A tiny run ready to train, with settings of its own: calibrated(train={...}) -> path of its configuration."""

    def make(**changes):
        path = tiny_run(**changes)
        assert [iapo(stage, path).code for stage in ("prompts", "sample", "score", "calibrate")] == [0] * 4
        return path

    return make


def trainer_of(config, policy) -> PolicyTrainer:
    rows = training_rows(config, target_table(config, solve_objective(config.objective)), load_tokenizer(config.model))
    return PolicyTrainer(
        model=policy,
        args=training_arguments(config, config.run / "checkpoints", len(rows)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        pad_id=0,
        budget=10_000,
        compute_metrics=held_out_metrics,
        temperature=config.sample.temperature,
    )


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_before_training_every_log_ratio_is_zero(calibrated, temperature):
    """The quantized policy with a new adapter is the reference whose log-probabilities were stored."""
    config = load_config(calibrated(sample={"temperature": temperature}))
    run_stage("ref_logprobs", config)
    trainer = trainer_of(config, add_adapter(load_base(config.model), config.train))
    prediction = trainer.predict(trainer.eval_dataset)
    assert len(prediction.predictions) == 320 and np.abs(prediction.predictions).max() < 1e-3
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss_of_zero"], rel=1e-3)
    assert metrics["eval_explained_variance"] == pytest.approx(0, abs=1e-3)


def test_targets_are_those_of_their_own_responses_in_any_order_of_rows(calibrated):
    config = load_config(calibrated())
    run_stage("ref_logprobs", config)
    form = solve_objective(ObjectiveConfig(procedure="best_of(4)", target_kl=0.5))
    table = target_table(config, form)
    rewards = read_table(config.run / "rewards").to_pandas().set_index(["prompt_id", "sample_id"])["reward"]
    responses = read_table(config.run / "responses").to_pandas().set_index(["prompt_id", "sample_id"])["token_ids"]
    untied = 0
    for _, group in table.groupby("prompt_id"):
        own = np.array([rewards[key] for key in zip(group["prompt_id"], group["sample_id"], strict=True)])
        if len(set(own)) == len(own) == 16:
            untied += 1
            in_order = group["target"].to_numpy()[np.argsort(own)]
            assert in_order == pytest.approx(rank_targets(form, 16), abs=1e-9)
    assert untied > 0
    for row in table.itertuples():
        assert list(row.token_ids) == list(responses[row.prompt_id, row.sample_id])
    for name in ("calibrated.parquet", "ref_logprobs/00001.parquet", "responses/00002.parquet"):
        rows = read_table(config.run / name)
        write_table(config.run / name, rows.take(list(range(len(rows)))[::-1]))
    again = target_table(config, form)
    assert again.drop(columns="token_ids").equals(table.drop(columns="token_ids"))


def test_prompts_of_equal_rewards_are_left_out(calibrated):
    config = load_config(calibrated(reward={"function": "tiny_rewards:ends_early"}, sample={"samples_per_prompt": 4}))
    run_stage("ref_logprobs", config)
    rewards = read_table(config.run / "rewards").to_pandas()
    differ = rewards.groupby("prompt_id")["reward"].nunique() > 1
    table = target_table(config, solve_objective(config.objective))
    assert 0 < differ.sum() < 20 and set(table["prompt_id"]) == set(differ.index[differ])


@pytest.mark.parametrize("micro", [4, 8])
def test_accumulated_micro_batches_train_as_one_batch(calibrated, tmp_path, micro):
    config = load_config(calibrated(train={"epochs": 0.3}, model={"quantization": "none"}))
    run_stage("ref_logprobs", config)
    adapters = []
    for size in (16, micro):
        train = config.train.model_copy(update={"micro_batch_size": size})
        torch.manual_seed(0)
        policy = add_adapter(load_base(config.model), train)
        trainer_of(config.model_copy(update={"train": train}), policy).train()
        adapters.append({name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad})
    assert all(adapters[0][name].abs().max() > 0 for name in adapters[0] if "lora_B" in name)
    for name, weight in adapters[0].items():
        assert torch.allclose(weight, adapters[1][name], atol=2e-4), name


def test_stage(calibrated, letters_model, iapo, caplog):
    """A sensible learning rate improves held-out prompts, warns of nothing, and leaves a PEFT adapter and its log."""
    path = calibrated(train={"epochs": 2, "learning_rate": 1e-3}, model={"base": str(letters_model)})
    outcome = iapo("train", path)
    assert outcome.code == 0 and "does harm" not in caplog.text and "before it was scaled" not in caplog.text
    config = load_config(path)
    record = read_manifest(config.run, "train")
    assert record is not None and not record["does_harm"]
    held_out = record["held_out"]
    assert 0 < held_out["explained_variance"] <= 1
    assert held_out["log_ratio_5"] > held_out["log_ratio_1"]
    assert record["closed_form"]["kl"] == pytest.approx(0.5, abs=1e-4)
    assert (record["prompts"], record["responses"]) == (14, 14 * 16)
    logged = json.loads((config.run / "adapter" / "log.json").read_text())
    assert [entry["step"] for entry in logged if "eval_loss" in entry][-1] == 28
    assert {"loss", "grad_norm", "learning_rate"} <= logged[0].keys()
    policy = PeftModel.from_pretrained(load_base(config.model), config.run / "adapter")
    assert {type(m).__name__ for n, m in policy.named_modules() if n.endswith("q_proj")} == {"Linear4bit"}
    assert not (config.run / "checkpoints").exists()
    assert "done before" in iapo("train", path).out


def test_a_too_large_learning_rate_is_said_to_do_harm(calibrated, iapo, caplog):
    path = calibrated(train={"learning_rate": 0.1})
    assert iapo("train", path).code == 0
    assert "does harm" in caplog.text and "train.learning_rate (0.1)" in caplog.text
    assert "nats before it was scaled, where 0.5 were asked for" in caplog.text
    record = read_manifest(load_config(path).run, "train")
    assert record is not None and record["does_harm"]
    assert record["held_out"]["loss"] > record["held_out"]["loss_of_zero"]


def test_held_out_metrics_by_hand():
    # responses 1 and 3 err, by 1 and -1 where nothing is floored; calibrated rewards fall in fifths 1, 1, 5, 5
    def floored(x):
        return math.log(math.exp(x) + math.exp(-2))

    error = ((floored(3) - floored(2)) ** 2 + (floored(-2) - floored(-1)) ** 2) / 4
    zero = sum((floored(target) - floored(0)) ** 2 for target in (2, 0, -1, 1)) / 4
    metrics = held_out_metrics(
        EvalPrediction(
            predictions=np.array([3.0, 0.0, -2.0, 1.0]),
            label_ids=np.array([[2.0, 0.0], [0.0, 0.19], [-1.0, 0.8], [1.0, 1.0]]),
        )
    )
    assert metrics == pytest.approx(
        {
            "loss": error,
            "loss_of_zero": zero,
            "explained_variance": 1 - error / zero,
            "log_ratio_1": 1.5,
            "target_1": 1.0,
            "log_ratio_5": -0.5,
            "target_5": 0.0,
        }
    )


def test_spread_by_hand():
    rows = [{"n": n} for n in range(10)]
    assert spread(rows, 4) == [{"n": 0}, {"n": 3}, {"n": 6}, {"n": 9}]
    assert spread(rows, 100) == rows and spread([], 3) == []


def test_only_whole_checkpoints_are_resumed(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_an_adapter_covers_every_linear_layer_without_dropout():
    policy = add_adapter(LlamaForCausalLM(tiny_config()), TrainConfig(lora_rank=4))
    names = {name.split(".")[-4] for name, p in policy.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(not isinstance(module, torch.nn.Dropout) or module.p == 0 for module in policy.modules())


def test_the_output_layer_is_added_to_what_has_an_adapter_without_it():
    """GPT-2's layers are no torch.nn.Linear."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    without, with_it = (
        {
            name.removesuffix(".lora_A.default.weight")
            for name, _ in add_adapter(
                GPT2LMHeadModel(config), TrainConfig(lora_rank=2, output_layer=output_layer)
            ).named_parameters()
            if "lora_A" in name
        }
        for output_layer in (False, True)
    )
    assert len(without) == 2 * 4 and with_it == without | {"base_model.model.lm_head"}


def test_the_output_layer_has_an_adapter_if_asked_for(calibrated, iapo):
    """Trained, scaled and read again like the others, with none of the base's own weights in its file."""
    path = calibrated(train={"output_layer": True})
    assert iapo("train", path).code == 0
    config = load_config(path)
    stored = load_file(config.run / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in stored} > {"lm_head", "q_proj"}
    assert all(".lora_A." in name or ".lora_B." in name for name in stored)
    assert stored["base_model.model.lm_head.lora_B.weight"].abs().max() > 0
    policy, base = load_policy(config.model, config.run / "adapter"), load_base(config.model)
    ids = torch.tensor([[5, 6, 7]])
    with policy.disable_adapter():
        assert torch.equal(policy(input_ids=ids).logits, base(input_ids=ids).logits)
    assert not torch.allclose(policy(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-4)
    assert torch.equal(policy.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert iapo("evaluate", path).code == 0


def test_an_adapter_on_a_tied_output_layer_merges_into_an_untied_model(tmp_path):
    """As docs/pipeline.md says."""
    with_random_weights(LlamaForCausalLM(tiny_config(tie_word_embeddings=True)), 0).save_pretrained(tmp_path / "base")
    policy = add_adapter(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), TrainConfig(lora_rank=4, output_layer=True)
    )
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.tensor([[5, 6, 7]])
    expected = policy(input_ids=ids).logits
    policy.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in stored)  # checkpoints are saved this way
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", tie_word_embeddings=False)
    model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
    PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    with policy.disable_adapter():
        assert not torch.allclose(policy(input_ids=ids).logits, expected, atol=0.1)


def test_a_base_that_drops_out_does_so_no_more():
    """GPT-2 does by default; in training mode, which gradient checkpointing needs, log-probs are still one number."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    assert config.resid_pdrop > 0
    policy = add_adapter(GPT2LMHeadModel(config).eval(), TrainConfig(lora_rank=2))
    batch = make_batch([[1, 2, 3]] * 2, [[4, 5], [6]], 0, sharing_of(policy))
    expected = response_logprobs(policy, batch)
    policy.train()
    assert torch.allclose(response_logprobs(policy, batch), expected, atol=1e-5)


def test_training_needs_rewards_that_differ_on_both_splits(calibrated, iapo):
    """Rewards differ only for prompts that start with `name`, none of which is held out of these five."""
    path = calibrated(reward={"function": "tiny_rewards:only_name"}, prompts={"holdout": 1})
    split = {
        row["prompt"][0]["content"]: row["split"]
        for row in read_table(load_config(path).run / "prompts.parquet").to_pylist()
    }
    assert not any(split[f"name {n}"] == "holdout" for n in range(1, 6))
    outcome = iapo("train", path)
    assert outcome.code == 2 and "80 training and 0 held-out responses" in outcome.err


def test_one_held_out_prompt_is_refused_before_training(calibrated, iapo):
    path = calibrated(prompts={"holdout": 1})
    outcome = iapo("train", path)
    assert outcome.code == 2 and "one held-out prompt" in outcome.err and "prompts.holdout" in outcome.err


def test_a_log_entry_that_overflowed_can_be_stored():
    entry = {"step": 1, "loss": 0.5, "grad_norm": float("inf"), "learning_rate": 1e-4}
    assert finite(entry) == {"step": 1, "loss": 0.5, "learning_rate": 1e-4}


def test_an_unknown_procedure_is_refused():
    with pytest.raises(UserError, match="best_off"):
        solve_objective(ObjectiveConfig(procedure="best_off(4)", target_kl=0.5))
