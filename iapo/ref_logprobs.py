"""Stage `ref_logprobs`: log-probability of every response under the reference, computed once, before training.

Reads   prompts.parquet, responses/*.parquet
Writes  ref_logprobs/*.parquet, one row a response
            prompt_id    string, sample_id int32   (key)
            ref_logprob  float64                   log π_ref(y|x) in nats, summed over response tokens
            n_tokens     int32                     response tokens, the end token included

The reference is the same quantized base that is trained, with the adapter off.
"""

from functools import partial

import pyarrow as pa

from iapo.config import Config
from iapo.shards import Worker, run_shards
from iapo.store import Manifest, count_rows, read_table

REF_LOGPROBS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_id", pa.int32()),
        ("ref_logprob", pa.float64()),
        ("n_tokens", pa.int32()),
    ]
)


def run(config: Config, manifest: Manifest) -> None:
    """Compute the shards that are missing, one for each shard of responses."""
    responses = sorted((config.run / "responses").glob("*.parquet"))
    rows = {path.stem: count_rows(path) for path in responses}
    folder = config.run / "ref_logprobs"
    label = "reference log-probs"
    outputs = run_shards(folder, rows, partial(_open_worker, config), label=label, workers=config.workers)
    manifest.finish(outputs, rows=count_rows(folder))


def _open_worker(config: Config) -> Worker:
    from iapo.logprobs import logprobs_of
    from iapo.models import load_base, load_tokenizer, prompt_token_ids

    model, tokenizer = load_base(config.model), load_tokenizer(config.model)
    prompts = {row["prompt_id"]: row["prompt"] for row in read_table(config.run / "prompts.parquet").to_pylist()}

    def make(name: str) -> pa.Table:
        rows = read_table(config.run / "responses" / f"{name}.parquet").to_pylist()
        tokens = {
            prompt_id: prompt_token_ids(tokenizer, prompts[prompt_id])
            for prompt_id in dict.fromkeys(row["prompt_id"] for row in rows)
        }
        values = logprobs_of(
            model,
            [tokens[row["prompt_id"]] for row in rows],
            [row["token_ids"] for row in rows],
            pad_id=tokenizer.pad_token_id,
            batch_size=config.train.micro_batch_size,
            temperature=config.sample.temperature,
        )
        found = [
            row | {"ref_logprob": value, "n_tokens": len(row["token_ids"])}
            for row, value in zip(rows, values, strict=True)
        ]
        return pa.Table.from_pylist(found, schema=REF_LOGPROBS)

    return make
