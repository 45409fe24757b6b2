"""Log-probabilities of responses: of the sampled token ids, summed in float32, whatever the padding or batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Prompts and responses as one right-padded batch; B sequences, L the longest.

    input_ids [B, L], attention_mask [B, L], response_mask [B, L] true at response tokens, first: the earliest
    position of any response token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    first: int


def make_batch(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int, device: torch.device | str = "cpu"
) -> Batch:
    """Join prompt and response token ids and pad them on the right."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids, seen, scored = [], [], []
    for prompt, response in zip(prompts, responses, strict=True):
        pad = width - len(prompt) - len(response)
        ids.append([*prompt, *response, *[pad_id] * pad])
        seen.append([1] * (width - pad) + [0] * pad)
        scored.append([False] * len(prompt) + [True] * len(response) + [False] * pad)
    return Batch(
        torch.tensor(ids, device=device),
        torch.tensor(seen, device=device),
        torch.tensor(scored, device=device),
        min(map(len, prompts)),
    )


def response_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log π(y|x) [B], float32: the sum over response tokens, each given all before it.

    Only positions from the shortest prompt's end on go through the output matrix. The same temperature as in
    sampling divides the logits, so that this is the log-probability under the policy that is sampled.
    """
    length = batch.input_ids.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=length - batch.first + 1,
    ).logits[:, :-1]
    targets = batch.input_ids[:, batch.first :]
    per_token = token_logprobs(logits, targets, temperature)
    return per_token.masked_fill(~batch.response_mask[:, batch.first :], 0.0).sum(-1)


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the targets, float32.

    logits [B, T, V], targets [B, T] -> [B, T]. Row by row, so that at most [T, V] is ever held in float32.
    """
    rows = []
    for row, target in zip(logits, targets, strict=True):
        scaled = row.float() / temperature
        rows.append(scaled.gather(-1, target[:, None])[:, 0] - scaled.logsumexp(-1))
    return torch.stack(rows)


@torch.inference_mode()
def logprobs_of(
    model: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    pad_id: int,
    batch_size: int,
    temperature: float = 1.0,
) -> list[float]:
    """Log-probabilities of many responses in their order, computed in batches of similar length, without gradients."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    values = [0.0] * len(lengths)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = make_batch([prompts[i] for i in chosen], [responses[i] for i in chosen], pad_id, model.device)
        for index, value in zip(chosen, response_logprobs(model, batch, temperature).tolist(), strict=True):
            values[index] = value
    return values
