"""Stage `sample`: draw reference responses to every prompt from the base with the adapter off.

Reads   prompts.parquet, given.parquet (where there is one)
Writes  responses/*.parquet, one row a response
            prompt_id      string, sample_id int32     (key)
            response       string                      the text, without special tokens
            token_ids      list<int32>                 as sampled; ends with the end token where there is one
            finish_reason  string                      stop (ended) or length (cut at max_new_tokens: no end token)
            source         string                      reference or given
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from iapo.config import Config
from iapo.engines import Engine
from iapo.errors import UserError
from iapo.shards import Worker, run_shards, shard_seed
from iapo.store import Manifest, count_rows, read_table, write_table

log = logging.getLogger(__name__)

T = TypeVar("T")

RESPONSES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_id", pa.int32()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("source", pa.string()),
    ]
)


def run(config: Config, manifest: Manifest) -> None:
    """Sample the shards that are missing, then tokenize given responses; the manifest counts prompts left out."""
    prompts = count_rows(config.run / "prompts.parquet")
    samples = config.sample.samples_per_prompt
    rows = {name: len(part) * samples for name, part in prompt_shards(range(prompts), config.sample.shard_size).items()}
    folder = config.run / "responses"
    (folder / "given.parquet").unlink(missing_ok=True)  # made anew below, from the samples that there are by then
    outputs = run_shards(
        folder, rows, partial(_open_worker, config), label="sampling responses", workers=config.workers
    )
    too_long = prompts - count_rows(folder) // samples
    if (config.run / "given.parquet").is_file():
        outputs.append(_write_given(config))
    if too_long == prompts:
        raise UserError(
            f"no prompt leaves room for sample.max_new_tokens {config.sample.max_new_tokens} in the model's context; "
            "expected shorter prompts or a smaller sample.max_new_tokens"
        )
    if too_long:
        log.warning("sample: left out %d prompts that do not fit the context with their responses", too_long)
    manifest.finish(outputs, rows=count_rows(folder), prompts_too_long=too_long)


def prompt_shards(prompts: Sequence[T], size: int) -> dict[str, Sequence[T]]:
    """Consecutive prompts by name of shard."""
    starts = range(0, len(prompts), size)
    return {f"{number:05d}": prompts[start : start + size] for number, start in enumerate(starts)}


def fits(prompt: list[int], config: Config, context: int) -> bool:
    """Whether a prompt of these tokens leaves room for the longest response in a context of this many tokens."""
    return len(prompt) + config.sample.max_new_tokens <= context


def response_rows(
    engine: Engine, tokenizer: Any, prompts: dict[str, list[int]], samples: int, seed: int
) -> list[dict[str, Any]]:
    """Draw responses to prompts {prompt_id: token ids}; rows of the columns above, without `source`."""
    drawn = engine(list(prompts.values()), samples, seed)
    return [
        {
            "prompt_id": prompt_id,
            "sample_id": sample_id,
            "response": tokenizer.decode(response.token_ids, skip_special_tokens=True),
            "token_ids": response.token_ids,
            "finish_reason": response.finish_reason,
        }
        for prompt_id, group in zip(prompts, drawn, strict=True)
        for sample_id, response in enumerate(group)
    ]


def _open_worker(config: Config) -> Worker:
    from iapo.models import load_tokenizer, prompt_token_ids

    tokenizer = load_tokenizer(config.model)
    engine, context = _open_engine(config, tokenizer)
    table = read_table(config.run / "prompts.parquet").to_pylist()
    shards = prompt_shards(table, config.sample.shard_size)

    def make(name: str) -> pa.Table:
        tokens = {row["prompt_id"]: prompt_token_ids(tokenizer, row["prompt"]) for row in shards[name]}
        fitting = {prompt_id: ids for prompt_id, ids in tokens.items() if fits(ids, config, context)}
        rows = response_rows(
            engine, tokenizer, fitting, config.sample.samples_per_prompt, shard_seed(config.seed, name)
        )
        return pa.Table.from_pylist([row | {"source": "reference"} for row in rows], schema=RESPONSES)

    return make


def _open_engine(config: Config, tokenizer: Any) -> tuple[Engine, int]:
    """The configured engine and the context length of its model."""
    match config.sample.engine:
        case "openai":
            from iapo.engines import openai

            return openai.open_engine(config)
        case "vllm":
            from iapo.engines import vllm

            return vllm.open_engine(config)
        case _:
            from iapo.engines import transformers
            from iapo.models import context_length, load_base

            model = load_base(config.model)
            engine = transformers.configured_engine(model, tokenizer, config.sample)
            return engine, context_length(model)


def _write_given(config: Config) -> Path:
    """Tokenize the responses that came with the prompts; those whose prompt was left out are left out too.

    They end as most of the reference's own do, for a model may have several tokens that end a text.
    """
    from iapo.models import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    samples = read_table(config.run / "responses").to_pandas()
    sampled = set(samples["prompt_id"])
    ends = samples["token_ids"][samples["finish_reason"] == "stop"].str[-1]
    end = tokenizer.eos_token_id if ends.empty else int(ends.mode()[0])
    rows = []
    for row in read_table(config.run / "given.parquet").to_pylist():
        ids = tokenizer(row["response"], add_special_tokens=False)["input_ids"][: config.sample.max_new_tokens]
        cut = len(ids) == config.sample.max_new_tokens
        if cut:  # rewarded for what is trained on
            row["response"] = tokenizer.decode(ids, skip_special_tokens=True)
        ids = ids if cut else [*ids, end]
        if row["prompt_id"] in sampled:
            rows.append(row | {"token_ids": ids, "finish_reason": "length" if cut else "stop", "source": "given"})
    path = config.run / "responses" / "given.parquet"
    write_table(path, pa.Table.from_pylist(rows, schema=RESPONSES))
    return path
