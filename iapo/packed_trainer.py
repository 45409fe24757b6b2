"""transformers.Trainer on whole steps: each is packed into forward passes by tokens, rows of a prompt together."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer

from iapo.logprobs import make_batch, pack, sharing_of
from iapo.shards import shard_seed

log = logging.getLogger(__name__)

Row = dict[str, Any]

COLUMNS = ("ref_logprob", "target", "calibrated_reward")


def handful(prompt_tokens: float, response_tokens: float, most: int) -> int:
    """Responses of one prompt that a step takes together, 1 to `most`, so that the prompt costs no more than they do.

    No more than that, for a response teaches a little less beside others of its prompt (measured: docs/log.md).
    """
    return max(1, min(most, math.ceil(prompt_tokens / response_tokens)))


def handful_of(rows: Any) -> int:
    """The same for a data set of rows, by their mean lengths."""
    lengths = [(len(row["prompt_ids"]), len(row["response_ids"])) for row in rows]
    prompt_tokens, response_tokens = map(sum, zip(*lengths, strict=True))
    return handful(prompt_tokens, response_tokens, max(Counter(rows["prompt_id"]).values()))


@dataclass(frozen=True)
class Rows:
    """The rows of a step on one device, for the trainer to pack; opaque to what moves tensors between devices."""

    rows: Sequence[Row]


def collate(rows: Sequence[Row]) -> dict[str, Rows]:
    """The data loader's collator."""
    return {"rows": Rows(rows)}


class GroupsAtRandom(Sampler[int]):
    """Every row once an epoch: each prompt's rows in random handfuls of `together`, the handfuls in random order.

    So a step of a multiple of `together` rows sees random responses of random prompts. Nothing is sorted by length
    across steps, which would bias each step where reward goes with length (measured: docs/log.md).
    """

    def __init__(self, prompts: Sequence[str], together: int, seed: int) -> None:
        self.groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            self.groups.setdefault(prompt, []).append(row)
        self.together, self.seed, self.epoch, self.rows = together, seed, 0, len(prompts)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, so that a resumed epoch has the order that it had."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(shard_seed(self.seed, f"epoch {self.epoch}"))
        handfuls = []
        for rows in self.groups.values():
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            handfuls += [order[start : start + self.together] for start in range(0, len(order), self.together)]
        for index in torch.randperm(len(handfuls), generator=generator).tolist():
            yield from handfuls[index]


class PackedTrainer(Trainer):
    """Trainer whose data loader gives whole steps, with `compute_loss` on packed parts of them.

    A part is {"batch": logprobs.Batch, and COLUMNS [B] float32}; the loss of a step is the mean of its parts' losses
    weighted by responses, so a loss that is a mean over responses does not depend on how they are packed. `budget`:
    tokens a forward pass, except that a longer response is one of its own.
    """

    def __init__(self, *, pad_id: int, budget: int, **arguments: Any) -> None:
        super().__init__(data_collator=collate, **arguments)
        self.pad_id, self.budget = pad_id, budget
        self.sharing = sharing_of(self.model)
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupsAtRandom:
        rows: Any = train_dataset or self.train_dataset
        together = handful_of(rows)
        if self.is_world_process_zero():
            log.info("train: a step takes %d responses of a prompt together", together)
        return GroupsAtRandom(rows["prompt_id"], together, self.args.seed)

    def parts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Row numbers by forward pass; as many passes on every device, for they may have to talk in each."""
        prompts, responses = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]
        parts = pack(prompts, responses, self.budget, self.sharing)
        if self.accelerator.num_processes > 1:
            most: Any = reduce(torch.tensor(len(parts), device=self.accelerator.device), "max")
            split_until(parts, int(most))
        return parts

    def part(self, rows: Sequence[Row], chosen: Sequence[int]) -> dict[str, Any]:
        """The arguments of `compute_loss` for some of the rows, in that order."""
        batch = make_batch(
            [rows[i]["prompt_ids"] for i in chosen],
            [rows[i]["response_ids"] for i in chosen],
            self.pad_id,
            self.sharing,
            self.args.device,
        )
        columns = {name: torch.tensor([rows[i][name] for i in chosen], dtype=torch.float32) for name in COLUMNS}
        return {"batch": batch} | self._prepare_inputs(columns)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one step's rows, part by part; returns the step's loss."""
        model.train()
        rows = inputs["rows"].rows
        total = torch.zeros((), device=self.args.device)
        for chosen in self.parts(rows):
            with self.compute_loss_context_manager():
                mean: Any = self.compute_loss(model, self.part(rows, chosen))
            loss = mean * (len(chosen) / len(rows))
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss; log-ratio [B]; target and calibrated reward [B, 2], of the rows in their order."""
        rows = inputs["rows"].rows
        order: list[int] = []
        losses, log_ratios = [], []
        with torch.no_grad():
            for chosen in self.parts(rows):
                part = self.part(rows, chosen)
                with self.compute_loss_context_manager():
                    loss, outputs = self.compute_loss(model, part, return_outputs=True)
                order += chosen
                losses.append(loss * len(chosen) / len(rows))
                log_ratios.append(outputs["log_ratio"])
        back = torch.tensor(order, device=self.args.device).argsort()
        labels = torch.tensor([[row["target"], row["calibrated_reward"]] for row in rows], device=self.args.device)
        return torch.stack(losses).sum(), torch.cat(log_ratios)[back], labels


def split_until(parts: list[list[int]], count: int) -> None:
    """Halve the parts with the most rows until there are `count` (fewer, where rows run out)."""
    while len(parts) < count and (largest := max(parts, key=len)) and len(largest) > 1:
        index = parts.index(largest)
        parts[index : index + 1] = [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
