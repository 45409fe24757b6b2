"""Responses in tensors, for many_responses.py and on_policy.py: drawn, rewarded, with targets, grouped into steps."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.hh_rewards import features
from benchmarks.stacked_llama import Batch, Llama, hidden_states, sample

TOGETHER, GROUPS = 8, 32
"""Responses of a prompt in a step, and how often so many are in one."""


@dataclass(frozen=True)
class Prompts:
    """Without their last token and padded [G, T], lengths so [G], last tokens [G]."""

    tokens: Tensor
    lengths: Tensor
    last: Tensor

    @classmethod
    def of(cls, rows: list[list[int]], device: torch.device) -> "Prompts":
        width = max(map(len, rows)) - 1
        tokens = torch.tensor([row[:-1] + [0] * (width - len(row) + 1) for row in rows], device=device)
        lengths = torch.tensor([len(row) - 1 for row in rows], device=device)
        return cls(tokens, lengths, torch.tensor([row[-1] for row in rows], device=device))

    def some(self, chosen: Tensor) -> "Prompts":
        """The chosen ones [g], padded to the longest of them."""
        lengths = self.lengths[chosen]
        return Prompts(self.tokens[chosen, : int(lengths.max())], lengths, self.last[chosen])

    def batch(self, chosen: Tensor, responses: Tensor) -> Batch:
        """Of the chosen prompts [g] with responses [g, n, R]: rows begin with the prompt's last token, R tokens."""
        last = self.last[chosen][:, None, None].expand(-1, responses.shape[1], 1)
        rows = torch.cat([last, responses[..., :-1].clamp(min=0)], dim=-1)
        return Batch(self.tokens[chosen], self.lengths[chosen], rows)


Rewards = Callable[[Prompts, Tensor], Tensor]
"""(prompts, their responses [G, n, R]) -> rewards [G, n]"""


def reward_model(about: dict[str, Any], end: int, device: torch.device) -> Rewards:
    """A sequence classifier, read at the end token; a response that was cut is ended."""
    llama = Llama.of(about["config"], about["weights"], torch.float32, device)
    head = about["weights"]["score.weight"].to(device)[0].float()

    @torch.inference_mode()
    def score(prompts: Prompts, responses: Tensor) -> Tensor:
        ended = torch.nn.functional.pad(responses.long(), (0, 2), value=-1)
        length = (ended >= 0).sum(-1, keepdim=True)
        is_cut = ended.gather(-1, length - 1) != end
        ended.scatter_(-1, length, torch.where(is_cut, end, -1))
        at = length - 1 + is_cut.long()  # of the end token among the response's
        found = hidden_states(llama, prompts.batch(torch.arange(len(ended), device=device), ended), None)[0]
        found = torch.nn.functional.rms_norm(found, found.shape[-1:], llama.norm, llama.eps)
        return (found @ head).gather(-1, at + 1)[..., 0]  # rows begin one token earlier

    return score


def bigram_rewards(about: dict[str, Any]) -> Rewards:
    """The reward of hh.py, of texts, by other processes, which are made before there is CUDA."""
    fork = multiprocessing.get_context("fork")
    workers = ProcessPoolExecutor(os.cpu_count(), fork, _open_bigrams, (about,))
    list(workers.map(_bigrams_of, [np.zeros((1, 1), np.int16)]))

    def score(prompts: Prompts, responses: Tensor) -> Tensor:
        rows = responses.flatten(0, 1).cpu().numpy()
        parts = list(workers.map(_bigrams_of, np.array_split(rows, max(1, len(rows) // 4096))))
        return torch.tensor(np.concatenate(parts), device=responses.device).view(responses.shape[:2])

    return score


def _open_bigrams(about: dict[str, Any]) -> None:
    from tokenizers import Tokenizer

    global _TOKENIZER, _WEIGHTS
    _TOKENIZER, _WEIGHTS = Tokenizer.from_str(about["tokenizer"]), about["bigrams"]


def _bigrams_of(rows: np.ndarray) -> np.ndarray:
    texts = _TOKENIZER.decode_batch([row[row >= 0].tolist() for row in rows], skip_special_tokens=True)
    return np.array([sum(_WEIGHTS.get(one, 0.0) for one in sorted(features(text))) for text in texts])


def draw(llama: Llama, score: Rewards, prompts: Prompts, samples: int, length: int, end: int, at_once: int) -> Any:
    """Responses [G, samples, length], int16, and their rewards [G, samples], float64."""
    responses, rewards = [], []
    count = max(1, min(samples, at_once // len(prompts.last)))
    small = max(1, count // 8)  # a forward pass of whole sequences takes more memory than a step of decoding
    for start in range(0, samples, count):
        drawn = sample(llama, prompts.tokens, prompts.lengths, prompts.last, min(count, samples - start), length, end)
        responses.append(drawn)
        rewards += [score(prompts, part).double() for part in drawn.split(small, dim=1)]
    return torch.cat(responses, dim=1), torch.cat(rewards, dim=1)


def targets_of(rewards: Tensor, log_cdfs: Tensor, others: Tensor | None = None) -> Tensor:
    """log of each policy's mean density over the ranks of a reward among its prompt's M, in nats [P, G, rewards].

    log_cdfs [P, M + 1]: log F at j/M. others [G, M − 1]: the other rewards, where `rewards` are not all M themselves.
    """
    ordered = (rewards if others is None else others).sort(dim=1).values
    low, high = (torch.searchsorted(ordered, rewards, side=side) for side in ("left", "right"))
    if others is not None:
        high += 1  # itself
    width = torch.log((high - low) / (log_cdfs.shape[1] - 1))
    return torch.stack(
        [(log_f[high] + torch.log(-torch.expm1(log_f[low] - log_f[high])) - width).float() for log_f in log_cdfs]
    )


@dataclass(frozen=True)
class Block:
    """Groups of responses of like length: [N, 1 + TOGETHER] (a prompt, places of its responses), a share of all."""

    groups: Tensor
    width: int
    share: float

    @property
    def in_step(self) -> int:
        """How many groups a step has, after the share."""
        return max(1, round(GROUPS * self.share))

    def endless(self, in_step: int) -> Iterator[Tensor]:
        """So many groups for each step, in another order each time round."""
        assert len(self.groups), f"no prompt has {TOGETHER} responses of up to {self.width} tokens"
        device = self.groups.device
        order = torch.empty(0, dtype=torch.long, device=device)
        while True:
            while len(order) < in_step:
                order = torch.cat([order, torch.randperm(len(self.groups), device=device)])
            yield self.groups[order[:in_step]]
            order = order[in_step:]


def blocks_of(responses: Tensor, widths: tuple[int, ...]) -> list[Block]:
    """All responses in groups of a prompt and a width, but for fewer than TOGETHER of each."""
    lengths = (responses >= 0).sum(-1)
    found, shorter = [], 0
    for width in widths:
        inside = (lengths > shorter) & (lengths <= width)
        order = inside.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        whole = inside.sum(1) // TOGETHER
        groups = torch.cat(
            [
                torch.cat(
                    [torch.full((int(count), 1), row, device=order.device), own[: count * TOGETHER].view(-1, TOGETHER)],
                    1,
                )
                for row, (own, count) in enumerate(zip(order, whole.tolist(), strict=True))
            ]
        )
        found.append(Block(groups, width, float(inside.double().mean())))
        shorter = width
    return found


def put_own_samples(
    responses: Tensor,
    targets: Tensor,
    policies: list[Llama],
    score: Rewards,
    prompts: Prompts,
    others: Tensor,
    log_cdfs: Tensor,
    end: int,
    at_once: int,
) -> None:
    """As many samples of each policy in place of the first half of the responses [G, M, R], with targets [P, G, M].

    others [G, M − 1]: rewards of the reference's, see `targets_of`.
    """
    each = responses.shape[1] // 2 // len(policies)
    for number, policy in enumerate(policies):
        own = slice(number * each, (number + 1) * each)
        responses[:, own], rewards = draw(policy, score, prompts, each, responses.shape[2], end, at_once)
        targets[:, :, own] = targets_of(rewards, log_cdfs, others)
