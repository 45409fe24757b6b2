"""Stage `score`: the reward of every response, from a reward model or a Python function.

Reads   prompts.parquet, responses/*.parquet
Writes  rewards/*.parquet, one row a response
            prompt_id  string, sample_id int32   (key)
            reward     float64                   any scale, finite
"""

import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from iapo.config import Config, RewardConfig
from iapo.errors import StageError, UserError
from iapo.prompts import Message
from iapo.shards import Worker, run_shards
from iapo.store import Manifest, count_rows, read_table

REWARDS = pa.schema([("prompt_id", pa.string()), ("sample_id", pa.int32()), ("reward", pa.float64())])

Reward = Callable[[Sequence[list[Message]], Sequence[str], Sequence[dict[str, Any]]], list[float]]
"""(prompts, responses, metadata of the prompts) -> one reward a response."""


def run(config: Config, manifest: Manifest) -> None:
    """Score the shards that are missing, one for each shard of responses."""
    responses = sorted((config.run / "responses").glob("*.parquet"))
    rows = {path.stem: count_rows(path) for path in responses}
    folder = config.run / "rewards"
    outputs = run_shards(folder, rows, partial(_open_worker, config), label="scoring responses", workers=config.workers)
    manifest.finish(outputs, rows=count_rows(folder))


def open_reward(config: RewardConfig) -> Reward:
    """Load what scores: a Python function or a sequence classifier. Every reward it gives is finite, or UserError."""
    score = _open_function(config.function) if config.function else _open_model(config)
    name = config.function or config.model

    def checked(prompts: Sequence[list[Message]], responses: Sequence[str], metadata: Any) -> list[float]:
        try:
            rewards = [float(reward) for reward in score(prompts, responses, metadata)]
        except Exception as error:
            if config.function is None:
                raise
            raise StageError(
                f"reward {name} failed ({type(error).__name__}: {error}); expected a list of one number a response: "
                "mend it; `iapo --debug` shows where"
            ) from error
        if len(rewards) != len(responses):
            raise UserError(
                f"reward {name} gave {len(rewards)} rewards for {len(responses)} responses; expected one each"
            )
        for prompt, response, reward in zip(prompts, responses, rewards, strict=True):
            if not math.isfinite(reward):
                raise UserError(
                    f"reward {name} gave {reward} to the response {response[:40]!r} to {prompt[-1]['content'][:40]!r}; "
                    "expected a finite number: mend the reward, then run `iapo score --restart`"
                )
        return rewards

    return checked


def find_function(name: str) -> Callable[..., Any]:
    """Import module:function, looking in the current folder first. UserError says what is missing."""
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(
            f"reward.function {name}: cannot import {module_name} from {Path.cwd()} ({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise UserError(f"reward.function {name}: module {module_name} has no function {function_name}")
    return function


def _open_worker(config: Config) -> Worker:
    score = open_reward(config.reward)
    prompts = {row["prompt_id"]: row for row in read_table(config.run / "prompts.parquet").to_pylist()}

    def make(name: str) -> pa.Table:
        rows = read_table(config.run / "responses" / f"{name}.parquet").to_pylist()
        rewards = score(
            [prompts[row["prompt_id"]]["prompt"] for row in rows],
            [row["response"] for row in rows],
            [json.loads(prompts[row["prompt_id"]]["metadata"]) for row in rows],
        )
        scored = [row | {"reward": reward} for row, reward in zip(rows, rewards, strict=True)]
        return pa.Table.from_pylist(scored, schema=REWARDS)

    return make


def _open_function(name: str) -> Reward:
    function = find_function(name)
    if "metadata" in inspect.signature(function).parameters:
        return lambda prompts, responses, metadata: function(prompts, responses, metadata=metadata)
    return lambda prompts, responses, metadata: function(prompts, responses)


def _open_model(config: RewardConfig) -> Reward:
    from iapo.models import load_reward

    model, tokenizer = load_reward(config)
    longest = min(model.config.get_text_config().max_position_embeddings, tokenizer.model_max_length)

    def score(prompts: Sequence[list[Message]], responses: Sequence[str], metadata: Any) -> list[float]:
        ids = [_conversation_ids(tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
        ids = [_shortened(row, longest, tokenizer) for row in ids]
        return score_token_ids(model, ids, tokenizer.pad_token_id, config.batch_size)

    return score


def score_token_ids(model: Any, sequences: list[list[int]], pad_id: int | None, batch_size: int) -> list[float]:
    """Rewards of token sequences, in batches of similar length; one too long for the model keeps its last tokens.

    The model reads its score at the last token that is not padding. Where it names no padding token we pad with a
    token that the batch does not contain, so that no token of a response can be taken for padding.
    """
    import torch

    longest = model.config.get_text_config().max_position_embeddings
    rewards = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [sequences[index][-longest:] for index in chosen]
        pad = pad_id if pad_id is not None else _absent_token(batch)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
        width = max(map(len, batch))
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in batch], device=model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        for index, reward in zip(chosen, logits.double().tolist(), strict=True):
            rewards[index] = reward
    return rewards


def _shortened(ids: list[int], longest: int, tokenizer: Any) -> list[int]:
    """The last tokens of what is too long, behind the token that every text begins with: encoders are read at it."""
    if len(ids) <= longest:
        return ids
    first = ids[:1] if ids[0] in (tokenizer.cls_token_id, tokenizer.bos_token_id) else []
    return first + ids[len(first) - longest :]


def _absent_token(batch: list[list[int]]) -> int:
    present = {token for ids in batch for token in ids}
    return next(token for token in range(len(present) + 1) if token not in present)


def _conversation_ids(tokenizer: Any, prompt: list[Message], response: str) -> list[int]:
    if tokenizer.chat_template is not None:
        messages = [*prompt, {"role": "assistant", "content": response}]
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    return list(tokenizer("\n\n".join([*(turn["content"] for turn in prompt), response]))["input_ids"])
