"""Stage `train`: fit a LoRA adapter on the quantized base to the closed form, equation (3).

Reads   prompts.parquet, responses/*.parquet, calibrated.parquet, ref_logprobs/*.parquet
Writes  adapter/               a PEFT adapter
        adapter/log.json       a list of what was logged: step, loss, and on held-out prompts
            eval_loss                the objective: mean (Δ − log f)² in nats², both floored (`objectives.floored`)
            eval_explained_variance  1 − eval_loss / that of Δ = 0: 1 is perfect, below 0 worse than no training
            eval_log_ratio_1..5      mean Δ by fifth of calibrated reward; eval_target_1..5 the closed form's
"""

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import EvalPrediction, PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D

from iapo import kl_budget, objectives
from iapo.config import Config, TrainConfig
from iapo.errors import StageError, UserError
from iapo.goal import training_goal
from iapo.logprobs import response_logprobs
from iapo.models import compute_dtype, load_base, load_tokenizer, model_revision, prompt_token_ids, release
from iapo.packed_trainer import PackedTrainer, Row
from iapo.progress import console, progress
from iapo.store import Manifest, read_table, write_json
from iapo.targets import target_table

log = logging.getLogger(__name__)

HELD_OUT_RESPONSES = 1024
"""At most this many held-out responses are measured each time, evenly spaced: the error of the mean is 3 %."""
FIFTHS = 5
COMPLETE = "complete"
"""An empty file of this name, written after everything else, marks a checkpoint that can be resumed from."""


def run(config: Config, manifest: Manifest) -> None:
    """Train from the newest complete checkpoint, or from the start; the manifest says whether training did harm."""
    goal = training_goal(config)
    table = target_table(config, goal.form)
    tokenizer = load_tokenizer(config.model)
    rows = training_rows(config, table, tokenizer)
    training = [row for row in rows if row["split"] == "train"]
    held_out = spread([row for row in rows if row["split"] == "holdout"], HELD_OUT_RESPONSES)
    if not training or not held_out:
        raise UserError(
            f"train: {len(training)} training and {len(held_out)} held-out responses with rewards that differ; "
            "expected some of both: give more prompts or another reward"
        )
    if len({row["prompt_id"] for row in held_out}) < 2:
        raise UserError(
            "train: one held-out prompt, which tells no error of the KL; expected two or more: raise prompts.holdout"
        )
    set_seed(config.seed)
    policy = add_adapter(load_base(config.model), config.train)
    if config.train.gradient_checkpointing and torch.cuda.is_available():
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    folder = config.run / "checkpoints"
    trainer = PolicyTrainer(
        model=policy,
        args=training_arguments(config, folder, len(training)),
        train_dataset=Dataset.from_list(training),
        eval_dataset=Dataset.from_list(held_out),
        pad_id=tokenizer.pad_token_id,
        budget=token_budget(config.train, [*training, *held_out]),
        compute_metrics=held_out_metrics,
        temperature=config.sample.temperature,
    )
    trainer.remove_callback(PrinterCallback)
    with ExitStack() as stack:
        trainer.add_callback(_Report(stack))
        trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    final = trainer.evaluate()
    weights = trained_weights(trainer.model)
    if not trainer.is_world_process_zero():
        return
    harm = final["eval_explained_variance"] < 0
    if not np.isfinite(final["eval_loss"]):
        raise StageError("train: the held-out loss is not finite; lower train.learning_rate and run it with --restart")
    if harm:
        log.warning(
            "train: the held-out squared error %.3g exceeds %.3g, that of log-ratio 0: this training does harm; "
            "lower train.learning_rate (%g) or give more responses, then `iapo train --restart`",
            final["eval_loss"],
            final["eval_loss_of_zero"],
            config.train.learning_rate,
        )
    adapter = config.run / "adapter"
    policy.save_pretrained(adapter, state_dict=weights)
    write_json(adapter / "log.json", [finite(entry) for entry in trainer.state.log_history])
    revision = model_revision(policy)
    del trainer, policy, weights
    release()
    scale = kl_budget.meet(config, adapter, goal.kl)
    manifest.finish(
        [adapter],
        responses=len(training),
        prompts=len({row["prompt_id"] for row in training}),
        does_harm=bool(harm),
        held_out={key.removeprefix("eval_"): value for key, value in final.items() if key.startswith("eval_")},
        closed_form=goal.record(),
        scale=scale,
        model_revision=revision,
    )
    shutil.rmtree(folder, ignore_errors=True)


def training_rows(config: Config, table: pd.DataFrame, tokenizer: Any) -> list[Row]:
    """Rows for the trainer: prompt_ids, response_ids, ref_logprob, target, calibrated_reward, split, prompt_id."""
    prompts = read_table(config.run / "prompts.parquet").to_pylist()
    wanted = set(table["prompt_id"])
    tokens = {p["prompt_id"]: prompt_token_ids(tokenizer, p["prompt"]) for p in prompts if p["prompt_id"] in wanted}
    return [
        {
            "prompt_id": row.prompt_id,
            "split": row.split,
            "prompt_ids": tokens[row.prompt_id],
            "response_ids": row.token_ids.tolist(),
            "ref_logprob": row.ref_logprob,
            "target": row.target,
            "calibrated_reward": row.calibrated_reward,
            "length": len(tokens[row.prompt_id]) + len(row.token_ids),
        }
        for row in table.itertuples()
    ]


def spread(rows: list[Row], most: int) -> list[Row]:
    """At most so many rows, evenly spaced."""
    return [rows[int(index)] for index in np.linspace(0, len(rows) - 1, min(most, len(rows)))]


def add_adapter(base: Any, config: TrainConfig) -> Any:
    """The base with a new LoRA adapter on every linear layer; it starts as the reference (B = 0). Neither drops out.

    On the output layer too if configured, which PEFT's "all-linear" leaves out. Where it is tied to the embedding, only
    what it adds to logits is trained: the embedding stays.
    """
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for part in (base.config, *base.modules()):
        vars(part).update({name: 0.0 for name, value in vars(part).items() if "drop" in name and type(value) is float})
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_rank,
        lora_dropout=0.0,
        target_modules=linear_layers(base) if config.output_layer else "all-linear",
        task_type="CAUSAL_LM",
    )
    policy = get_peft_model(base, lora)
    save = partial(policy.save_pretrained, save_embedding_layers=False)
    vars(policy).update(save_pretrained=save)  # checkpoints too are without the base's own output matrix
    return policy


def linear_layers(model: Any) -> list[str]:
    """The names, as PEFT matches them, of all linear layers and the output layer."""
    kinds = (torch.nn.Linear, Conv1D)  # quantized layers are of these kinds
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, kinds)})


def finite(entry: dict[str, Any]) -> dict[str, Any]:
    """Without what JSON cannot hold: the norm of gradients that overflowed in float16, a step that was not taken."""
    return {name: value for name, value in entry.items() if not isinstance(value, float) or np.isfinite(value)}


def trained_weights(policy: Any) -> dict[str, Any]:
    """What is trained, whole and on the CPU of the first process, however the model is sharded; all have to ask."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(policy, options=options)


class PolicyTrainer(PackedTrainer):
    """transformers.Trainer with the objective in place of a model's own loss; all else is as users know it."""

    def __init__(self, *, temperature: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.temperature = temperature

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        log_ratio = response_logprobs(model, inputs["batch"], self.temperature) - inputs["ref_logprob"]
        loss = objectives.pointwise(log_ratio, inputs["target"])
        return (loss, {"log_ratio": log_ratio}) if return_outputs else loss


def held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The objective at Δ and at 0, what of the latter is explained, and Δ and target by fifth of calibrated reward."""
    log_ratio = np.asarray(prediction.predictions, dtype=np.float64)
    target, calibrated = np.asarray(prediction.label_ids, dtype=np.float64).T
    error, zero = (
        objectives.pointwise(torch.tensor(of), torch.tensor(target)).item() for of in (log_ratio, np.zeros_like(target))
    )
    metrics = {"loss": error, "loss_of_zero": zero, "explained_variance": 1 - error / zero}
    fifth = np.minimum((calibrated * FIFTHS).astype(int), FIFTHS - 1)
    for number in range(FIFTHS):
        if (inside := fifth == number).any():
            metrics[f"log_ratio_{number + 1}"] = log_ratio[inside].mean()
            metrics[f"target_{number + 1}"] = target[inside].mean()
    return {name: float(value) for name, value in metrics.items()}


def token_budget(train: TrainConfig, rows: Sequence[Row]) -> int:
    """Tokens a forward pass: what `micro_batch_size` of the longest rows have; more rows where prompts are shared."""
    return train.micro_batch_size * max(row["length"] for row in rows)


def training_arguments(config: Config, folder: Path, responses: int) -> TrainingArguments:
    """The Trainer's settings; UserError where the devices do not divide the batch."""
    train = config.train
    on_cpu = not torch.cuda.is_available()
    dtype = None if on_cpu else compute_dtype(config.model.dtype)
    devices = PartialState(cpu=on_cpu).num_processes  # several processes on CPUs are seen only if told so
    if train.batch_size % devices:
        raise UserError(
            f"train.batch_size {train.batch_size} cannot be divided among {devices} devices; expected a multiple"
        )
    steps = max(1, int(train.epochs * responses / train.batch_size))
    every = max(1, steps // train.evaluations)
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=on_cpu,
        per_device_train_batch_size=train.batch_size // devices,  # packed into forward passes by PackedTrainer
        per_device_eval_batch_size=train.batch_size // devices,
        num_train_epochs=train.epochs,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_grad_norm=1.0,
        seed=config.seed,
        remove_unused_columns=False,
        label_names=["target"],
        report_to="none",
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, steps // 50),
        optim="paged_adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,  # with the loss scaled, or small gradients would be 0
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


class _Report(TrainerCallback):
    """Advances the progress bar, prints held-out measurements and marks checkpoints as complete."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            bar = progress("training, optimizer steps", total=state.max_steps, done=state.global_step)
            self.advance = self.stack.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            self.advance(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        metrics = rest["metrics"]
        if state.is_world_process_zero:
            console.print(
                f"  step {state.global_step}: held-out squared error {metrics['eval_loss']:.3f} "
                f"(log-ratio 0: {metrics['eval_loss_of_zero']:.3f}), "
                f"explained variance {metrics['eval_explained_variance']:.1%}",
                highlight=False,
                soft_wrap=True,
            )

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def read_log(adapter: Path) -> list[dict[str, float]]:
    """What training logged, in order."""
    return json.loads((adapter / "log.json").read_text())
