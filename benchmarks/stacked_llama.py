"""A small Llama in plain torch with many LoRA adapters side by side, for many_responses.py and on_policy.py.

P policies are one base with P adapters: every activation has a first dimension of P, so that small models fill a GPU.
Responses to a prompt share it: G prompts of n responses each, padded at the end to the widths that a CUDA graph has.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""The linear layers of a block, as transformers names them; each has an adapter, as `iapo train` has it."""
OUTPUT = "lm_head"
"""The output layer's name; it may have an adapter too."""

Adapter = tuple[Tensor, Tensor]
"""A [P, rank, in] and B [P, out, rank]."""


@dataclass(frozen=True)
class Adapters:
    """Of each block by name, and of the output layer if it has one."""

    blocks: list[dict[str, Adapter]]
    output: Adapter | None


@dataclass(frozen=True)
class Llama:
    """Frozen weights; `dtype` is what products are computed in, what is added up stays in float32."""

    embedding: Tensor
    blocks: list[dict[str, Tensor]]
    norm: Tensor
    output: Tensor
    heads: int
    eps: float
    theta: float
    dtype: torch.dtype

    @classmethod
    def of(
        cls, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> "Llama":
        """From a transformers config and state dict, of as many key as query heads and a tied output matrix."""
        assert config["num_key_value_heads"] == config["num_attention_heads"]
        weights = {name.removeprefix("model."): value.to(device) for name, value in weights.items()}
        blocks: list[dict[str, Tensor]] = []
        for layer in range(config["num_hidden_layers"]):
            own = {name: weights[f"layers.{layer}.{name}.weight"].to(dtype) for name in LINEAR}
            norms = ("input_layernorm", "post_attention_layernorm")
            blocks.append(own | {name: weights[f"layers.{layer}.{name}.weight"].float() for name in norms})
        rope = config["rope_parameters"]["rope_theta"]
        heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
        embedding, norm = weights["embed_tokens.weight"].float(), weights["norm.weight"].float()
        return cls(embedding, blocks, norm, embedding, heads, eps, rope, dtype)


@dataclass(frozen=True)
class Batch:
    """Prompts without their last token [G, T] with their lengths [G], and n rows of R tokens each [G, n, R], which
    begin with that last token."""

    prompts: Tensor
    lengths: Tensor
    rows: Tensor


def hidden_states(llama: Llama, batch: Batch, adapters: Adapters | None) -> Tensor:
    """States of the rows' tokens behind the last layer [P, G, n, R, d], float32; P is 1 without adapters."""
    groups, width = batch.prompts.shape
    _, count, length = batch.rows.shape
    device = batch.rows.device
    policies = 1 if adapters is None else len(adapters.blocks[0][LINEAR[0]][0])
    split = groups * width
    places = batch.lengths[:, None, None] + torch.arange(length, device=device).expand(groups, count, length)
    positions = torch.cat([torch.arange(width, device=device).repeat(groups), places.flatten()])
    rotation = _rotation(llama, positions)
    unseen = torch.arange(width, device=device) >= batch.lengths.repeat(policies)[:, None, None, None, None]
    later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    tokens = torch.cat([batch.prompts.flatten(), batch.rows.flatten()])
    x = llama.embedding[tokens].expand(policies, -1, -1).contiguous()
    if adapters is not None:
        x.requires_grad_()  # as those of further layers do, which are then compiled together with the first
    for number, block in enumerate(llama.blocks):
        own = None if adapters is None else adapters.blocks[number]
        x = _fused_block(x, block, own, rotation, unseen, later, llama.heads, llama.eps)
    return x[:, split:].unflatten(1, (groups, count, length))


def log_probs(llama: Llama, batch: Batch, wanted: Tensor, adapters: Adapters | None) -> Tensor:
    """Log-probs of responses [P, G, n] in nats; wanted [G, n, R]: what follows each of the rows' tokens, or below 0."""
    return token_log_probs(llama, hidden_states(llama, batch, adapters), wanted, adapters).sum(-1)


def token_log_probs(llama: Llama, hidden: Tensor, wanted: Tensor, adapters: Adapters | None) -> Tensor:
    """Log-probs of tokens [P, G, n, R] in nats, 0 where there is none, from hidden states [P, G, n, R, d]."""
    targets = wanted.expand(len(hidden), -1, -1, -1)
    own = None if adapters is None else adapters.output
    return -_fused_losses(hidden, llama.norm, llama.output, own, targets, llama.eps)


def native_dtype() -> torch.dtype:
    """bfloat16 where this processor computes in it; where that is emulated it is slower."""
    processor = torch.cpu.get_capabilities()
    native = processor.get("amx_bf16", False) or processor.get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32


def normed(llama: Llama, hidden: Tensor) -> Tensor:
    """Hidden states [..., d] as the output layer has them."""
    return F.rms_norm(hidden, hidden.shape[-1:], llama.norm, llama.eps)


def logits(llama: Llama, h: Tensor, adapters: Adapters | None) -> Tensor:
    """Of all tokens that may follow [P, N, V], from normed hidden states [P, N, d]."""
    return _adapted(h @ llama.output.T, h, None if adapters is None else adapters.output)


def _losses(hidden: Tensor, norm: Tensor, output: Tensor, own: Adapter | None, targets: Tensor, eps: float) -> Tensor:
    """Negative log-likelihood of each token, 0 where there is none."""
    h = F.rms_norm(hidden.flatten(1, -2), (hidden.shape[-1],), norm, eps)
    logits = _adapted(h @ output.T, h, own).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none").view(targets.shape)


def _block(
    x: Tensor,
    block: dict[str, Tensor],
    own: dict[str, Adapter] | None,
    rotation: tuple[Tensor, Tensor],
    unseen: Tensor,
    later: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """One layer of x [P, S, d], prompts before rows. Hidden are unseen [P·G, 1, 1, 1, T] and later [R, R] tokens."""
    policies, width, length = len(x), unseen.shape[-1], len(later)
    groups = len(unseen) // policies
    split = groups * width
    count = (x.shape[1] - split) // (groups * length)
    h = _norm(x, block["input_layernorm"], block, eps)
    q, k, v = (_linear(h, name, block, own).unflatten(-1, (heads, -1)) for name in LINEAR[:3])
    q, k = _rotate(q, rotation), _rotate(k, rotation)
    of_prompts = [part[:, :split].reshape(policies * groups, width, heads, -1).transpose(1, 2) for part in (q, k, v)]
    seen = F.scaled_dot_product_attention(*of_prompts, is_causal=True).transpose(1, 2)
    q, k, v = (
        part[:, split:].reshape(policies * groups, count, length, heads, -1).permute(0, 3, 1, 2, 4)
        for part in (q, k, v)
    )
    _, prompt_keys, prompt_values = of_prompts
    to_prompt = (q.flatten(2, 3) @ prompt_keys.mT).unflatten(2, (count, length)).masked_fill(unseen, -math.inf)
    to_own = (q @ k.mT).masked_fill(later, -math.inf)
    scores = torch.cat([to_prompt, to_own], dim=-1).float() / math.sqrt(q.shape[-1])
    shares = scores.softmax(-1).to(h.dtype)
    mixed = (shares[..., :width].flatten(2, 3) @ prompt_values).unflatten(2, (count, length))
    mixed = (mixed + shares[..., width:] @ v).permute(0, 2, 3, 1, 4)
    attended = [seen.reshape(policies, split, -1), mixed.reshape(policies, groups * count * length, -1)]
    x = x + _linear(torch.cat(attended, dim=1), LINEAR[3], block, own)
    return _feed_forward(x, block, own, eps)


def layer_names(llama: Llama, output_layer: bool) -> list[str]:
    """Of all layers with an adapter, as transformers names them: block by block, then perhaps the output layer."""
    names = [f"model.layers.{number}.{name}" for number in range(len(llama.blocks)) for name in LINEAR]
    return [*names, OUTPUT] if output_layer else names


def by_block(of_layers: list[Any]) -> tuple[list[dict[str, Any]], Any]:
    """What there is of each layer in `layer_names`: of each block by name, and of the output layer or None."""
    each, last = len(LINEAR), len(of_layers) % len(LINEAR)
    blocks = [
        dict(zip(LINEAR, of_layers[start : start + each], strict=True))
        for start in range(0, len(of_layers) - last, each)
    ]
    return blocks, of_layers[-1] if last else None


class Stack:
    """LoRA adapters of P policies in one tensor [P, all], with Adam's moments."""

    def __init__(self, llama: Llama, policies: int, rank: int, device: torch.device, output_layer: bool) -> None:
        shapes = []
        for block in llama.blocks:
            for name in LINEAR:
                out, into = block[name].shape
                shapes += [(rank, into), (out, rank)]
        if output_layer:
            out, into = llama.output.shape
            shapes += [(rank, into), (out, rank)]
        sizes = [math.prod(shape) for shape in shapes]
        self.flat = torch.zeros(policies, sum(sizes), device=device)
        self.m, self.v = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        parts = self.flat.split(sizes, dim=1)
        self.leaves = [
            part.view(policies, *shape).detach().requires_grad_() for part, shape in zip(parts, shapes, strict=True)
        ]
        for a in self.leaves[::2]:  # as peft begins; B is 0
            a.detach().uniform_(-1, 1).div_(math.sqrt(a.shape[2]))
        self.names = layer_names(llama, output_layer)
        self.pairs = list(zip(self.leaves[::2], self.leaves[1::2], strict=True))
        self.adapters = Adapters(*by_block(self.pairs))

    def weights(self, policy: int) -> dict[str, Tensor]:
        """A policy's A [rank, in] and B [out, rank] of every layer by name."""
        return {
            f"{layer}.{part}": one[policy].detach().cpu().clone()
            for layer, pair in zip(self.names, self.pairs, strict=True)
            for part, one in zip(("lora_A", "lora_B"), pair, strict=True)
        }

    def merged(self, llama: Llama, policy: int) -> Llama:
        """The base with a policy's adapter added to its weights, which have gradients with respect to it."""
        blocks = [
            block | {name: block[name] + (b[policy] @ a[policy]).to(llama.dtype) for name, (a, b) in own.items()}
            for block, own in zip(llama.blocks, self.adapters.blocks, strict=True)
        ]
        if self.adapters.output is None:
            return replace(llama, blocks=blocks)
        a, b = self.adapters.output
        return replace(llama, blocks=blocks, output=llama.output + b[policy] @ a[policy])

    def step(self, loss: Tensor, pace: Tensor, correction: Tensor) -> None:
        """A step of Adam, gradients clipped policy by policy. pace: the rate over 1 − β₁ᵗ; correction: 1 − β₂ᵗ."""
        parts = torch.autograd.grad(loss, self.leaves)
        gradient = torch.cat([part.flatten(1) for part in parts], dim=1)
        gradient /= gradient.norm(dim=1, keepdim=True).clamp(min=1)
        with torch.no_grad():
            self.m.lerp_(gradient, 0.1)
            self.v.lerp_(gradient.square(), 0.001)
            self.flat -= pace * self.m / ((self.v / correction).sqrt() + 1e-8)


@torch.inference_mode()
def sample(llama: Llama, prompts: Tensor, lengths: Tensor, last: Tensor, count: int, length: int, end: int) -> Tensor:
    """Draw `count` responses of at most `length` tokens to each prompt [G, T] at temperature 1: [G, count, length].

    Prompts are without their last token, which is in last [G]. After a response's end token there are −1.
    """
    groups, width = prompts.shape
    rows, device = groups * count, prompts.device
    unseen = torch.arange(width, device=device) >= lengths[:, None, None, None]
    rotation = _rotation(llama, torch.arange(width, device=device).repeat(groups))
    x = llama.embedding[prompts.flatten()]
    kept = []
    for block in llama.blocks:
        h = _norm(x, block["input_layernorm"], block, llama.eps)
        q, k, v = (_linear(h, name, block, None).unflatten(-1, (llama.heads, -1)) for name in LINEAR[:3])
        q, k, v = (
            part.view(groups, width, llama.heads, -1).transpose(1, 2)
            for part in (_rotate(q, rotation), _rotate(k, rotation), v)
        )
        cache = [
            torch.empty(rows, llama.heads, length, q.shape[-1], dtype=llama.dtype, device=device) for _ in range(2)
        ]
        kept.append((k, v, *cache))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = _feed_forward(x + _linear(attended, LINEAR[3], block, None), block, None, llama.eps)
    token = last.repeat_interleave(count)
    running = torch.ones_like(token, dtype=torch.bool)
    drawn = torch.full((rows, length), -1, dtype=torch.int16, device=device)
    for step in range(length):
        rotation = _rotation(llama, (lengths + step).repeat_interleave(count))
        x = llama.embedding[token]
        for block, (prompt_keys, prompt_values, keys, values) in zip(llama.blocks, kept, strict=True):
            h = _norm(x, block["input_layernorm"], block, llama.eps)
            q, k, v = (_linear(h, name, block, None).unflatten(-1, (llama.heads, -1)) for name in LINEAR[:3])
            q, keys[:, :, step], values[:, :, step] = _rotate(q, rotation), _rotate(k, rotation), v
            grouped = q.view(groups, count, llama.heads, -1).transpose(1, 2)
            to_prompt = (grouped @ prompt_keys.mT).masked_fill(unseen, -math.inf).transpose(1, 2)
            to_own = (q[:, :, None] @ keys[:, :, : step + 1].mT)[:, :, 0]
            scores = torch.cat([to_prompt.reshape(rows, llama.heads, width), to_own], dim=-1)
            shares = (scores.float() / math.sqrt(q.shape[-1])).softmax(-1).to(llama.dtype)
            of_prompt = shares[..., :width].view(groups, count, llama.heads, width).transpose(1, 2) @ prompt_values
            mixed = of_prompt.transpose(1, 2).reshape(rows, llama.heads, -1)
            mixed = mixed + (shares[..., None, width:] @ values[:, :, : step + 1])[:, :, 0]
            x = _feed_forward(x + _linear(mixed.flatten(1), LINEAR[3], block, None), block, None, llama.eps)
        logits = F.rms_norm(x, (x.shape[-1],), llama.norm, llama.eps) @ llama.output.T
        up_to = logits.softmax(-1).cumsum(-1)
        drawn_at = torch.rand(rows, 1, device=device) * up_to[:, -1:]
        token = torch.searchsorted(up_to, drawn_at, right=True)[:, 0].clamp(max=up_to.shape[1] - 1)
        drawn[:, step] = torch.where(running, token, -1)
        running &= token != end
    return drawn.view(groups, count, length)


def _feed_forward(x: Tensor, block: dict[str, Tensor], own: dict[str, Adapter] | None, eps: float) -> Tensor:
    h = _norm(x, block["post_attention_layernorm"], block, eps)
    gate, up = (_linear(h, name, block, own) for name in LINEAR[4:6])
    return x + _linear(F.silu(gate) * up, LINEAR[6], block, own)


def _norm(x: Tensor, weight: Tensor, block: dict[str, Tensor], eps: float) -> Tensor:
    """In the dtype of the layer's products."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps).to(block[LINEAR[0]].dtype)


def _linear(x: Tensor, name: str, block: dict[str, Tensor], adapters: dict[str, Adapter] | None) -> Tensor:
    return _adapted(x @ block[name].T, x, None if adapters is None else adapters[name])


def _adapted(found: Tensor, x: Tensor, adapter: Adapter | None) -> Tensor:
    if adapter is None:
        return found
    a, b = (part.to(x.dtype) for part in adapter)
    return torch.baddbmm(found, x @ a.mT, b.mT)


def _rotation(llama: Llama, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position [S, 1, size of a head]."""
    size = llama.embedding.shape[1] // llama.heads
    pace = llama.theta ** (-torch.arange(0, size, 2, device=positions.device) / size)
    angles = (positions[:, None] * pace).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [..., S, heads, size]."""
    cosine, sine = rotation
    first, second = x.float().chunk(2, dim=-1)
    return (x * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)


def _fused(function: Any) -> Any:
    """Compiled on a GPU: what is no matrix product is bound by memory, and its parts are many."""
    return torch.compile(function, dynamic=False, disable=not torch.cuda.is_available())


_fused_block, _fused_losses = _fused(_block), _fused(_losses)
