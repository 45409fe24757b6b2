"""GPU memory and time of each stage, from the model's configuration alone, before any weights are downloaded.

What is counted is written beside each term; everything else (fragmentation, kernels' workspaces) is OVERHEAD. Time
is floating-point work, or bytes moved where that takes longer, at the share of the card's rate named EFFICIENCY.
"""

from dataclasses import dataclass
from typing import Any

from iapo.config import Config, ModelConfig
from iapo.errors import UserError

NF4_BYTES = 4.127 / 8
"""Bytes a weight in NF4 with double quantization: 4 bits, and 0.127 for the constants (QLoRA, arXiv 2305.14314)."""
OVERHEAD = 0.8e9
"""Bytes of the CUDA context and of workspaces; assumed."""
LOGITS = 4 * 2**26
"""Bytes of the logits that exist at a time, in float32 (`token_logprobs.CHUNK`)."""
TOGETHER = 8
"""Responses that share a prompt in training (`packed_trainer.TOGETHER`)."""
EFFICIENCY = 0.35
"""Share of a card's peak rates that is reached; assumed, small models and short batches reach less."""


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


@dataclass(frozen=True)
class Shape:
    """What a language model's size comes down to; parameters apart for linear layers and for the rest."""

    linear: float
    other: float
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int


@dataclass(frozen=True)
class Need:
    """What a stage needs: peak GPU memory in bytes and time in seconds."""

    stage: str
    memory: float
    seconds: float


def estimate(config: Config, card: Card) -> list[Need]:
    """Needs of the stages that use a GPU, in order. UserError where a model's configuration cannot be had."""
    base = model_shape(config.model)
    prompts, prompt_tokens = workload(config)
    held_out = min(config.prompts.holdout, prompts)
    new_tokens = config.sample.max_new_tokens
    length = prompt_tokens + new_tokens
    samples = prompts * config.sample.samples_per_prompt
    train, epochs = config.train, config.train.epochs
    weights = weight_bytes(base, config.model.quantization)

    sampling = (
        weights + cache_bytes(base, config.sample.batch_size, length) + logit_bytes(base, config.sample.batch_size)
    )
    tokens = train.micro_batch_size * length  # of a forward pass, shared prompts counted once
    forward = weights + forward_bytes(base, tokens) + 3 * LOGITS
    training = (
        weights
        + adapter_bytes(base, train.lora_rank)
        + activation_bytes(base, tokens, train.lora_rank, train.gradient_checkpointing)
        + 3 * LOGITS
    )
    evaluated = held_out * config.evaluate.samples_per_prompt * (2 + len(config.evaluate.adapters))
    shared = forward_seconds(base, prompt_tokens / TOGETHER + new_tokens, card)
    once = forward_seconds(base, prompt_tokens / config.sample.samples_per_prompt + new_tokens, card)
    passes = 3 + (1 if train.gradient_checkpointing else 0) - 1  # forward, input gradients, and again if checkpointed
    steps_bytes = weights / config.sample.batch_size / card.bandwidth
    drawing = new_tokens * max(steps_bytes, 2 * (base.linear + base.other) / card.rate) / EFFICIENCY
    found = [Need("sample", sampling + OVERHEAD, samples * drawing)]
    if config.reward.model is not None:
        reward = model_shape(ModelConfig(base=config.reward.model, revision=config.reward.revision), reward=True)
        scoring = weight_bytes(reward, config.reward.quantization)
        scoring += forward_bytes(reward, config.reward.batch_size * length)
        found.append(Need("score", scoring + OVERHEAD, samples * forward_seconds(reward, length, card)))
    return [
        *found,
        Need("ref_logprobs", forward + OVERHEAD, samples * once),
        Need("train", training + OVERHEAD, (prompts - held_out) / prompts * samples * epochs * passes * shared),
        Need("evaluate", max(sampling, forward) + OVERHEAD, evaluated * (drawing + 2 * once)),
    ]


def model_shape(config: ModelConfig, reward: bool = False) -> Shape:
    """Sizes of a model from its config.json; its layers are built on the meta device, which takes no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from iapo.models import resolve

    name = resolve(config.base, "reward" if reward else "reference")
    try:
        settings = AutoConfig.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: its config.json cannot be had: {' '.join(str(error).split())[:200]}") from error
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(settings)
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    text: Any = settings.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shape(
        linear=linear,
        other=sum(p.numel() for p in model.parameters()) - linear,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv_width=kv_heads * head_size,
        vocabulary=text.vocab_size,
    )


def workload(config: Config) -> tuple[int, int]:
    """Prompts and about how many tokens each has: what is stored, or counted in the source at four letters a token."""
    from iapo.config import BUNDLED
    from iapo.prompts import read_exchanges, unique

    if config.prompts.source == BUNDLED or "." in config.prompts.source.rsplit("/", 1)[-1]:
        exchanges, _ = unique(read_exchanges(config.prompts))
        letters = sum(len(turn["content"]) for exchange in exchanges for turn in exchange.prompt)
        count = min(len(exchanges), config.prompts.limit or len(exchanges))
        return count, max(8, letters // (4 * len(exchanges)))
    if config.prompts.limit is None:
        raise UserError(f"prompts.source {config.prompts.source} is not a local file; set prompts.limit to estimate")
    return config.prompts.limit, 256


def weight_bytes(shape: Shape, quantization: str) -> float:
    """Linear layers in NF4 or 16 bits; embeddings, norms and the output matrix in 16 bits."""
    return shape.linear * (NF4_BYTES if quantization == "nf4" else 2) + shape.other * 2


def cache_bytes(shape: Shape, rows: int, length: int) -> float:
    """Keys and values of every layer in 16 bits; twice, for the cache is copied as it grows."""
    return 2 * (2 * shape.layers * shape.kv_width * 2 * rows * length)


def logit_bytes(shape: Shape, positions: int) -> float:
    """Logits in 16 bits, and once in 32 for the softmax."""
    return positions * shape.vocabulary * (2 + 4)


def forward_bytes(shape: Shape, tokens: int) -> float:
    """One layer's activations, 16 bits."""
    return tokens * (4 * shape.hidden + 3 * shape.intermediate) * 2


def kept_numbers(shape: Shape, rank: int) -> float:
    """Numbers a token that a layer with LoRA on all its linear layers keeps for the backward pass, frozen otherwise.

    Hidden states before and after each of two norms, queries and attention's output (6), keys and values, the four
    of a gated MLP (gate, its activation, up, their product), and seven inner states of LoRA.
    """
    return 6 * shape.hidden + 2 * shape.kv_width + 4 * shape.intermediate + 7 * rank


def activation_bytes(shape: Shape, tokens: int, rank: int, checkpointing: bool, width: int = 2) -> float:
    """Kept for the backward pass, of `width` bytes a number: a layer's input each and one layer, or every layer."""
    one_layer = tokens * kept_numbers(shape, rank) * width
    return shape.layers * tokens * shape.hidden * width + one_layer if checkpointing else shape.layers * one_layer


def adapter_bytes(shape: Shape, rank: int) -> float:
    """LoRA weights, gradients and two Adam moments, 32 bits; seven linear layers a block."""
    per_layer = rank * (
        4 * shape.hidden + 2 * (shape.hidden + shape.kv_width) + 3 * (shape.hidden + shape.intermediate)
    )
    return shape.layers * per_layer * 4 * 4


def forward_seconds(shape: Shape, length: float, card: Card) -> float:
    """One forward pass over so many tokens: two operations a weight and token."""
    return 2 * (shape.linear + shape.other) * length / (card.rate * EFFICIENCY)
