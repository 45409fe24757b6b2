"""Small Llamas trained on a data set on the CPU, for the benchmarks that need a reference of their own."""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from benchmarks.stacked_llama import native_dtype
from iapo.store import write_json

CONTEXT = 128
VOCABULARY = 2048
PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {"hidden_size": 192, "num_hidden_layers": 5, "intermediate_size": 512, "num_attention_heads": 3}

Batches = Iterator[list[Any]]


def train_tokenizer(texts: Iterable[str], single_digits: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template; single_digits: no token has two, so that numbers are read by place."""
    bpe = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_of_words])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, model_max_length=CONTEXT, chat_template=CHAT_TEMPLATE
    )


def dialogue_ids(tokenizer: Any, prompt: Sequence[dict[str, str]], response: str) -> list[int]:
    """Token ids of a whole dialogue."""
    messages = [*prompt, {"role": "assistant", "content": response}]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


def padded(rows: Sequence[list[int]], pad: int) -> torch.Tensor:
    """Rows of one width, filled up at the end."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def batches(items: list[Any], size: int, epochs: int, seed: int, length: Any) -> Batches:
    """Batches of items of similar length, in random order, anew each epoch."""
    rng = random.Random(seed)
    for _ in range(epochs):
        pool = sorted(items, key=lambda item: length(item) + rng.random() * 8)
        made = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(made)
        yield from made


def fit(model: torch.nn.Module, losses: Iterator[torch.Tensor], steps: int, rate: float, label: str) -> None:
    """AdamW with warm-up and a cosine to zero; the loss is computed as it is asked for."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    start, average = time.perf_counter(), 0.0
    for step, loss in enumerate(losses, start=1):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average += (loss.item() - average) / min(step, 50)
        if step % max(1, steps // 10) == 0:
            seconds = time.perf_counter() - start
            print(f"  {label}: step {step}/{steps}, loss {average:.3f}, {seconds:.0f} s", flush=True)
    model.eval()


def mixed_precision() -> torch.autocast:
    """Autocast to bfloat16 where the processor computes in it; where that is emulated it is slower (docs/log.md)."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=native_dtype() == torch.bfloat16)


def language_loss(model: Any, rows: Sequence[list[int]], pad: int, after: int | None = None) -> torch.Tensor:
    """Mean negative log-likelihood of all tokens but the first; a causal model needs no mask for padding at the end.

    after: of the tokens after the first of this kind only.
    """
    ids = padded(rows, pad)
    wanted = ids[:, 1:] != pad
    if after is not None:
        wanted &= (ids[:, :-1] == after).cumsum(1) > 0
    with mixed_precision():
        logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[:, :-1][wanted])
    return F.cross_entropy(logits.float(), ids[:, 1:][wanted])


def train_llama(
    tokenizer: Any,
    rows: list[list[int]],
    unseen: list[list[int]],
    epochs: int,
    *,
    after: int | None = None,
    batch_size: int = 16,
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """A small Llama on rows of token ids, and a report of it; `after` as in `language_loss`."""
    pad = tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=pad)
    steps = epochs * math.ceil(len(rows) / batch_size)
    stream = batches(rows, batch_size, epochs, 0, len)
    start = time.perf_counter()
    fit(model, (language_loss(model, batch, pad, after) for batch in stream), steps, 2e-3, "reference")
    seconds = time.perf_counter() - start

    def learned(row: list[int]) -> int:
        return len(row) if after is None else len(row) - row.index(after) - 1

    with torch.inference_mode():
        losses = [
            (language_loss(model, part, pad, after).item(), sum(map(learned, part)))
            for part in (unseen[i : i + 32] for i in range(0, len(unseen), 32))
        ]
    loss = sum(value * count for value, count in losses) / sum(count for _, count in losses)
    return model, {
        "parameters": model.num_parameters(),
        "tokens": epochs * sum(map(len, rows)),
        "seconds": seconds,
        "held_out_perplexity": math.exp(loss),
    }


def once(report: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Make something and store what there is to say about it, last; or read that, where it was made before."""
    if not report.is_file():
        set_seed(0)
        write_json(report, make())
    return json.loads(report.read_text())


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A model with its tokenizer, as transformers loads it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
