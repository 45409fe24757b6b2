"""Sampling with transformers on this machine: each prompt prefilled once for all of its samples."""

from collections.abc import Callable
from typing import Any

import torch

from iapo.config import SampleConfig
from iapo.engines import Engine, Response
from iapo.engines.cache import with_room
from iapo.models import end_token_ids

SHRINK_BELOW = 0.75
"""Finished rows leave the batch when fewer than this share of its rows still run (measured: docs/log.md)."""


def open_engine(
    model: Any,
    *,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> Engine:
    """An engine over a loaded causal language model (an adapter on it is used as it stands).

    batch_size: responses sampled at once; prompts of similar length go together. `advance` is told of each batch.
    """

    def draw(prompts: list[list[int]], samples: int, seed: int) -> list[list[Response]]:
        generator = torch.Generator(device=model.device).manual_seed(seed)
        responses: list[list[Response]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
        at_once = max(1, batch_size // samples)
        for start in range(0, len(prompts), at_once):
            chosen = by_length[start : start + at_once]
            left = samples
            while left:
                count = min(left, max(1, batch_size // len(chosen)))
                batch = [prompts[index] for index in chosen]
                drawn = sample_batch(model, batch, count, end_ids, pad_id, max_new_tokens, temperature, generator)
                for index, group in zip(chosen, drawn, strict=True):
                    responses[index].extend(group)
                left -= count
                advance(count * len(chosen))
        return responses

    return draw


def configured_engine(model: Any, tokenizer: Any, config: SampleConfig) -> Engine:
    """The engine over a loaded model, as the `sample` section has it."""
    return open_engine(
        model,
        end_ids=end_token_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
    )


@torch.inference_mode()
def sample_batch(
    model: Any,
    prompts: list[list[int]],
    samples: int,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[Response]]:
    """Draw `samples` responses to each prompt from the whole distribution at a temperature.

    The prompts [B, P] are padded on the left and prefilled once; the cache is then repeated for the B·samples rows,
    and rows that have finished are taken out of it as they become many.
    """
    device = model.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    cache = with_room(cache)
    logits = output.logits[:, -1].repeat_interleave(samples, dim=0)
    mask = mask.repeat_interleave(samples, dim=0)
    position = lengths.repeat_interleave(samples)[:, None]

    rows = torch.arange(len(prompts) * samples, device=device)  # which response each row of the batch is
    ends = torch.tensor(sorted(end_ids), device=device)
    drawn = torch.full((len(rows), max_new_tokens), -1, device=device)
    running = torch.ones(len(rows), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        probabilities = torch.softmax(logits.float() / temperature, dim=-1)
        token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        drawn[rows[running], step] = token[running]
        running &= ~torch.isin(token, ends)
        alive = int(running.sum())
        if alive == 0 or step == max_new_tokens - 1:
            break
        if alive < SHRINK_BELOW * len(rows):
            kept = running.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, token, mask, position, running = rows[kept], token[kept], mask[kept], position[kept], running[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        logits, position = output.logits[:, -1], position + 1

    responses = [_response(row, end_ids) for row in drawn.tolist()]
    return [responses[start : start + samples] for start in range(0, len(responses), samples)]


def _response(row: list[int], end_ids: frozenset[int]) -> Response:
    token_ids = [token for token in row if token >= 0]
    return Response(token_ids, "stop" if token_ids[-1] in end_ids else "length")
