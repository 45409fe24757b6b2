"""Steps packed into forward passes: the same step whatever the packing, and what a step sees."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from transformers import LlamaForCausalLM

from iapo.config import TrainConfig, load_config
from iapo.objectives import pointwise
from iapo.packed_trainer import GroupsAtRandom, Rows, handful, handful_of, split_until
from iapo.train import PolicyTrainer, add_adapter, token_budget, training_arguments


def make_rows() -> list[dict]:
    """Four prompts with four responses each, of 1 to 8 tokens."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(2, 40, length).tolist() for length in (3, 9, 1, 5)]
    rows = []
    for number in generator.permutation(16).tolist():
        response = generator.integers(2, 40, int(generator.integers(1, 9))).tolist()
        rows.append(
            {
                "prompt_id": str(number % 4),
                "prompt_ids": prompts[number % 4],
                "response_ids": response,
                "ref_logprob": -3.0 * len(response),
                "target": float(generator.normal()),
                "calibrated_reward": number / 16,
                "length": len(prompts[number % 4]) + len(response),
            }
        )
    return rows


@pytest.fixture
def make_trainer(tmp_path, tiny_run):
    def make(budget: int) -> PolicyTrainer:
        torch.manual_seed(0)
        base = LlamaForCausalLM(tiny_config(vocab_size=40)).requires_grad_(False).eval()
        policy = add_adapter(base, TrainConfig(lora_rank=4))
        torch.manual_seed(1)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        rows = make_rows()
        return PolicyTrainer(
            model=policy,
            args=training_arguments(load_config(tiny_run(train={"batch_size": 16})), tmp_path / "c", len(rows)),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            pad_id=0,
            budget=budget,
            temperature=1.0,
        )

    return make


def test_a_step_does_not_depend_on_its_packing(make_trainer):
    rows = make_rows()
    found = []
    for budget in (1, 20, 60, 10_000):
        trainer = make_trainer(budget)
        assert sorted(row for part in trainer.parts(rows) for row in part) == list(range(16))
        loss = trainer.training_step(trainer.model, {"rows": Rows(rows)})
        gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        found.append((len(trainer.parts(rows)), float(loss), gradients))
    assert [parts for parts, *_ in found] == sorted({parts for parts, *_ in found}, reverse=True)
    assert found[0][0] == 16 and found[-1][0] == 1
    for _, loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        assert torch.allclose(gradients, found[0][2], atol=1e-5 * found[0][2].abs().max())


def test_prediction_is_in_the_order_of_the_rows(make_trainer):
    rows = make_rows()
    trainer = make_trainer(30)
    loss, log_ratio, labels = trainer.prediction_step(trainer.model, {"rows": Rows(rows)}, False)
    assert labels[:, 0].tolist() == pytest.approx([row["target"] for row in rows])
    assert labels[:, 1].tolist() == pytest.approx([row["calibrated_reward"] for row in rows])
    for index, row in enumerate(rows):
        _, alone, _ = trainer.prediction_step(trainer.model, {"rows": Rows([row])}, False)
        assert log_ratio[index].item() == pytest.approx(alone.item(), abs=1e-4)
    assert loss.item() == pytest.approx(pointwise(log_ratio, labels[:, 0]).item(), rel=1e-5)


def test_each_epoch_takes_every_row_once_in_handfuls_of_a_prompt():
    prompts = [str(n % 5) for n in range(60)]  # 12 rows a prompt
    sampler = GroupsAtRandom(prompts, 4, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(Counter(order) == Counter(range(60)) for order in orders)
    assert orders[0] == orders[2] != orders[1] and len(sampler) == 60
    handfuls = [orders[0][start : start + 4] for start in range(0, 60, 4)]
    assert all(len({prompts[row] for row in handful}) == 1 for handful in handfuls)
    assert len({prompts[handful[0]] for handful in handfuls[:5]}) > 2  # prompts in random order
    assert any(sorted(handful) != handful for handful in handfuls)  # responses too
    assert list(GroupsAtRandom(prompts, 4, seed=1)) != orders[0]


def test_split_until_by_hand():
    parts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    split_until(parts, 4)
    assert parts == [[1, 2], [3, 4, 5], [6], [7, 8]]
    split_until(parts, 100)
    assert parts == [[n] for n in range(1, 9)]


def test_a_forward_pass_takes_what_micro_batch_size_of_the_longest_rows_have():
    assert token_budget(TrainConfig(micro_batch_size=4), make_rows()) == 4 * max(row["length"] for row in make_rows())


def test_a_prompt_costs_no_more_than_the_responses_that_share_it():
    """By hand: the least number of responses with as many tokens as the prompt, from one to all."""
    assert [handful(*lengths, 8) for lengths in ((32, 128), (128, 128), (129, 128), (512, 128), (2048, 128))] == [
        *(1, 1, 2, 4),
        8,
    ]
    rows = make_rows()  # four prompts of 3, 9, 1 and 5 tokens with four responses each
    responses = sum(len(row["response_ids"]) for row in rows) / 16
    assert handful_of(Dataset.from_list(rows)) == min(4, -int(-4.5 // responses))
    long = [row | {"prompt_ids": [1] * 99} for row in rows]
    assert handful_of(Dataset.from_list(long)) == 4


def test_training_takes_handfuls_by_that_rule(make_trainer):
    trainer = make_trainer(60)
    assert trainer._get_train_sampler().together == handful_of(Dataset.from_list(make_rows()))
