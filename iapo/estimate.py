"""GPU memory and time of each stage, from the model's configuration alone, before any weights are downloaded.

A stage's fullest pass is run without data (iapo.dry_run): its memory is the weights', the adapter's and what the pass
holds at its peak, and OVERHEAD. Each of its kernels takes as long as its work, its bytes or its start do, at SHARE of
the card's rates; the stage takes as many passes as its rows fill.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iapo.config import Config, ModelConfig, RewardConfig, TrainConfig
from iapo.errors import UserError

if TYPE_CHECKING:
    from iapo.dry_run import Counted

NF4_BYTES = 4.127 / 8
"""Bytes a weight in NF4 with double quantization: 4 bits, and 0.127 for the constants (QLoRA, arXiv 2305.14314)."""
ADAPTER_BYTES = 4 + 4 + 2
"""A parameter of the adapter: itself, its gradient, and two Adam moments in 8 bits."""
OVERHEAD = 0.8e9
"""Bytes of the CUDA context and of kernels' workspaces; assumed."""
SHARE = 0.75
"""Share of a device's peak rates that kernels reach: 0.69 to 0.84 on a CPU (docs/performance.md), assumed of GPUs."""
LAUNCH = 1e-5
"""Seconds from one kernel's start to the next one's, where kernels are small; assumed."""


@dataclass(frozen=True)
class Card:
    """A GPU: bytes of memory, floating-point operations a second in bfloat16 (dense), bytes a second of memory."""

    memory: float
    rate: float
    bandwidth: float


CARDS = {
    "rtx-3060": Card(12e9, 25.6e12, 360e9),
    "rtx-4060-ti": Card(16e9, 44e12, 288e9),
    "rtx-3090": Card(24e9, 71e12, 936e9),
    "rtx-4090": Card(24e9, 165e12, 1008e9),
    "h100": Card(80e9, 989e12, 3350e9),
}
"""Makers' figures."""

FACTORS_TRIED = 3
"""By `iapo.kl_budget`, each on RESPONSES of its samples: assumed."""


@dataclass(frozen=True)
class Need:
    """What a stage needs: peak GPU memory in bytes and time in seconds."""

    stage: str
    memory: float
    seconds: float


def estimate(config: Config, card: Card) -> list[Need]:
    """Needs of the stages that use a GPU, in order. UserError where a model's configuration cannot be had."""
    from iapo.dry_run import classifying_pass, sampling_step, scoring_pass, training_pass
    from iapo.kl_budget import RESPONSES
    from iapo.packed_trainer import handful

    base = make_model(config.model)
    prompts, prompt_tokens, longest_prompt = workload(config)
    held_out = min(config.prompts.holdout, prompts)
    train, sample = config.train, config.sample
    each, new_tokens = sample.samples_per_prompt, sample.max_new_tokens
    weights = weight_bytes(base())
    budget = train.micro_batch_size * (longest_prompt + new_tokens)

    def seconds(counted: "Counted") -> float:
        return counted.seconds(card.rate * SHARE, card.bandwidth * SHARE, LAUNCH) / counted.rows

    def rows(responses: int, together: int) -> list[tuple[int, int, int]]:
        """So many responses, by prompt."""
        whole, rest = divmod(responses, together)
        return [(prompt_tokens, new_tokens, together)] * whole + [(prompt_tokens, new_tokens, rest)] * bool(rest)

    at_once = max(1, sample.batch_size // each), min(each, sample.batch_size)

    def draw(length: int) -> "Counted":
        return _count(base, lambda model: sampling_step(model, prompt_tokens, length, *at_once))

    last, halfway = draw(prompt_tokens + new_tokens - 1), draw(prompt_tokens + new_tokens // 2)
    drawing = new_tokens * seconds(halfway)
    found = [Need("sample", weights + last.peak + OVERHEAD, prompts * each * drawing)]
    if config.reward.model is not None:
        reward = make_model(config.reward)
        length, at_once_scored = prompt_tokens + new_tokens, config.reward.batch_size
        scored = _count(reward, lambda model: classifying_pass(model, length, at_once_scored))
        found.append(Need("score", weight_bytes(reward()) + scored.peak + OVERHEAD, prompts * each * seconds(scored)))
    enough = max(each, math.ceil(budget / new_tokens))
    reference = _count(base, lambda model: scoring_pass(model, rows(enough, each), budget, "cuda"))
    together = handful(prompt_tokens, new_tokens, each)
    step = _count(
        base,
        lambda model: training_pass(
            model, train, rows(train.batch_size, together), budget, train.gradient_checkpointing, True, "cuda"
        ),
    )
    adapter = ADAPTER_BYTES * adapter_parameters(base(), train)
    evaluated = held_out * config.evaluate.samples_per_prompt * (2 + len(config.evaluate.adapters))
    own_samples = weights + max(last.peak, reference.peak) + OVERHEAD, drawing + 2 * seconds(reference)
    trained = (prompts - held_out) * each * train.epochs
    return [
        *found,
        Need("ref_logprobs", weights + reference.peak + OVERHEAD, prompts * each * seconds(reference)),
        Need("train", weights + adapter + step.peak + OVERHEAD, trained * seconds(step)),
        Need("train: factor", own_samples[0], FACTORS_TRIED * RESPONSES * own_samples[1]),
        Need("evaluate", own_samples[0], evaluated * own_samples[1]),
    ]


def _count(make: Callable[[], Any], one_pass: Callable[[Any], "Counted"]) -> "Counted":
    from iapo.dry_run import at_full_depth
    from iapo.logprobs import CANNOT_SHARE

    try:
        return at_full_depth(make, one_pass)
    except CANNOT_SHARE as error:
        name, reason = make().config.model_type, " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} models cannot be estimated, for their code does not run without data ({reason}); try a short run"
        ) from error


def make_model(config: ModelConfig | RewardConfig) -> Callable[[], Any]:
    """What makes the model from its config.json, as it would be loaded on a GPU, on the meta device: no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from iapo.dry_run import quantize
    from iapo.models import resolve

    reward = isinstance(config, RewardConfig)
    base = config.model if isinstance(config, RewardConfig) else config.base
    name = resolve(str(base), "reward" if reward else "reference")
    labels = {"num_labels": 1} if reward else {}
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        settings = AutoConfig.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code, **labels
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: its config.json cannot be had: {' '.join(str(error).split())[:200]}") from error
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM

    def make() -> Any:
        with torch.device("meta"):
            model = kind.from_config(copy.deepcopy(settings)).to(dtype)
        return quantize(model, dtype) if config.quantization == "nf4" else model

    return make


def weight_bytes(model: Any) -> float:
    """Of a model that `make_model` makes."""
    return sum(p.nbytes * (2 * NF4_BYTES if p.dtype.itemsize == 1 else 1) for p in model.parameters())


def adapter_parameters(model: Any, train: TrainConfig) -> int:
    """Numbers in the adapter that is trained."""
    from iapo.train import add_adapter

    policy = add_adapter(model.requires_grad_(False), train)
    return sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)


def workload(config: Config) -> tuple[int, int, int]:
    """Prompts, and about how many tokens they have in the mean and at most: four letters of the source a token."""
    from iapo.config import BUNDLED
    from iapo.prompts import read_exchanges, unique

    if config.prompts.source == BUNDLED or "." in config.prompts.source.rsplit("/", 1)[-1]:
        exchanges, _ = unique(read_exchanges(config.prompts))
        tokens = [max(8, sum(len(turn["content"]) for turn in exchange.prompt) // 4) for exchange in exchanges]
        return min(len(tokens), config.prompts.limit or len(tokens)), round(sum(tokens) / len(tokens)), max(tokens)
    if config.prompts.limit is None:
        raise UserError(f"prompts.source {config.prompts.source} is not a local file; set prompts.limit to estimate")
    return config.prompts.limit, 256, 256
