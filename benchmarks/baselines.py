"""TRL's DPO, IPO and KTO on the samples of a run of iapo: best and worst of every few, as token ids.

Adapter, learning rate, epochs, responses a step and seed are those of the run, the reference's log-probabilities the
run's own. Training needs the extra `bench`.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, set_seed

from iapo.config import Config
from iapo.logprobs import logprobs_of
from iapo.models import load_base, load_tokenizer
from iapo.packed_trainer import Row
from iapo.targets import solve_objective, target_table
from iapo.train import add_adapter, training_arguments, training_rows

LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}
"""Methods of DPOTrainer and what it calls them."""
METHODS = (*LOSSES, "kto")
GROUP = 4
"""Samples that a pair is the best and the worst of: K samples of a prompt make K/4 pairs."""


def pairs(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Best and worst of every GROUP samples of a prompt, in their order; none where they tie."""
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for own in by_prompt.values():
        for start in range(0, len(own) - GROUP + 1, GROUP):
            group = sorted(own[start : start + GROUP], key=lambda row: row["calibrated_reward"])
            if group[0]["calibrated_reward"] < group[-1]["calibrated_reward"]:
                yield group[-1], group[0]


def train_baseline(method: str, beta: float, config: Config, adapter: Path) -> int:
    """Train one of METHODS on the run's training prompts and save its adapter; returns the number of pairs."""
    tokenizer = load_tokenizer(config.model)
    rows = training_rows(config, target_table(config, solve_objective(config.objective)), tokenizer)
    chosen = list(pairs([row for row in rows if row["split"] == "train"]))
    random.Random(config.seed).shuffle(chosen)
    set_seed(config.seed)
    policy = add_adapter(load_base(config.model), config.train)
    ours = training_arguments(config, adapter, len(rows))
    settings: dict[str, Any] = {
        "output_dir": str(adapter / "trainer"),
        "beta": beta,
        "num_train_epochs": config.train.epochs,
        "learning_rate": config.train.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "max_grad_norm": 1.0,
        "max_length": None,
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": config.train.gradient_checkpointing and torch.cuda.is_available(),
        "bf16": ours.bf16,
        "fp16": ours.fp16,
        "seed": config.seed,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    make = _kto if method == "kto" else _dpo
    trainer = make(policy, chosen, settings, config, tokenizer.pad_token_id, LOSSES.get(method))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    policy.save_pretrained(adapter)
    return len(chosen)


def _dpo(
    policy: Any, chosen: list[tuple[Row, Row]], settings: dict[str, Any], config: Config, pad_id: int, loss: Any
) -> Any:
    """A forward pass takes as many pairs as half of micro_batch_size."""
    from trl import DPOConfig, DPOTrainer

    together = config.train.micro_batch_size // 2
    arguments = DPOConfig(
        loss_type=[loss],
        per_device_train_batch_size=together,
        gradient_accumulation_steps=config.train.batch_size // (2 * together),
        **settings,
    )
    text = {"prompt": "a", "chosen": "a", "rejected": "a"}
    trainer = DPOTrainer(
        policy, args=arguments, train_dataset=Dataset.from_list([text]), processing_class=_words(pad_id)
    )
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_ids": best["prompt_ids"],
                "chosen_ids": best["response_ids"],
                "rejected_ids": worst["response_ids"],
                "ref_chosen_logps": best["ref_logprob"],
                "ref_rejected_logps": worst["ref_logprob"],
            }
            for best, worst in chosen
        ]
    )
    return trainer


def _kto(
    policy: Any, chosen: list[tuple[Row, Row]], settings: dict[str, Any], config: Config, pad_id: int, _: Any
) -> Any:
    """The best are desirable and the worst are not; KL from each prompt with the response before it, as TRL does it."""
    from trl import KTOConfig, KTOTrainer

    together = config.train.micro_batch_size
    arguments = KTOConfig(
        per_device_train_batch_size=together,
        gradient_accumulation_steps=config.train.batch_size // together,
        train_sampling_strategy="sequential",
        **settings,
    )
    text = [{"prompt": "a", "completion": "a", "label": label} for label in (True, False)]
    trainer = KTOTrainer(policy, args=arguments, train_dataset=Dataset.from_list(text), processing_class=_words(pad_id))
    labelled = [(row, label) for best, worst in chosen for row, label in ((best, True), (worst, False))]
    random.Random(config.seed).shuffle(labelled)
    prompts = [row["prompt_ids"] for row, _ in labelled]
    before = []
    for start in range(0, len(labelled), together):
        own = [row["response_ids"] for row, _ in labelled[start : start + together]]
        before += [own[-1], *own[:-1]]
    with policy.disable_adapter():
        mismatched = logprobs_of(policy, prompts, before, pad_id=pad_id, batch_size=together)
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "completion_ids": row["response_ids"],
                "KL_completion_ids": other,
                "label": label,
                "ref_logps": row["ref_logprob"],
                "ref_KL_logps": ref,
            }
            for (row, label), other, ref in zip(labelled, before, mismatched, strict=True)
        ]
    )
    return trainer


def _words(pad_id: int) -> PreTrainedTokenizerFast:
    """A tokenizer for the text that TRL's trainers have to be given first; what they train on is token ids."""
    words = {"<pad>": pad_id, "a": pad_id + 1, "</s>": pad_id + 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )
