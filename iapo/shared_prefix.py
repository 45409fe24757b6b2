"""Attention for the prompt once: K responses of one prompt go through the model as one sequence.

A sequence is prompt + r₁ + … + r_K, then the next prompt with its responses; positions restart after the prompt and
each response sees the prompt and itself only. So a prompt of P tokens costs P + ΣR instead of K·P + ΣR, and all
layers but attention need not know.

Attention is exact and never pays for pairs that cannot see each other. It is split by keys: every prompt and every
response attends causally to itself, responses attend to their prompt without a mask, and the two parts of a response
are joined by their log-sum-exp L: O = Σ exp(L_i − L)·O_i. The backward pass needs no joining: a flash kernel given the
joined O and L returns each part's exact gradients. On the CPU that is a kernel call for each prompt, its responses of
one length, and the two together; on CUDA two calls for all, of the flash kernel for sequences of different lengths.
That one has no float32 and wants an Ampere or newer: else PyTorch's attention with one dense mask does it, hidden pairs
and all.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "iapo_shared_prefix"
"""Name of the attention function; without a layout it is transformers' own SDPA."""


@dataclass(frozen=True)
class Run:
    """Neighbouring causal blocks of equal length: a prompt, or responses of one prompt."""

    start: int
    count: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """The run of x [1, heads, T, ...] as [count, heads, length, ...]; a view."""
        part = x[0, :, self.start : self.start + self.count * self.length]
        return part.unflatten(1, (self.count, self.length)).transpose(0, 1)


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a sequence: for each prompt its length and those of its responses, in order."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(prompt + sum(responses) for prompt, responses in self.groups)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All prompts and responses; neighbouring responses of one length together."""
        found, start = [], 0
        for prompt, responses in self.groups:
            found.append(Run(start, 1, prompt))
            start += prompt
            for length, same in groupby(responses):
                count = len(list(same))
                if length:
                    found.append(Run(start, count, length))
                start += count * length
        return tuple(found)

    @cached_property
    def crossings(self) -> tuple[tuple[slice, slice], ...]:
        """(tokens of all responses, tokens of their prompt), for each prompt."""
        found, start = [], 0
        for prompt, responses in self.groups:
            middle, end = start + prompt, start + prompt + sum(responses)
            if end > middle:
                found.append((slice(middle, end), slice(start, middle)))
            start = end
        return tuple(found)

    def segments(self, device: torch.device) -> "Segments":
        """The same for the flash kernel of CUDA; made once a batch."""
        if "_segments" not in self.__dict__:
            own, places = [run.length for run in self.runs for _ in range(run.count)], torch.arange(self.length)
            asking = [responses.stop - responses.start for responses, _ in self.crossings]
            asked = [prompt.stop - prompt.start for _, prompt in self.crossings]
            responses = torch.cat([places[:0], *(places[responses] for responses, _ in self.crossings)])
            prompts = torch.cat([places[:0], *(places[prompt] for _, prompt in self.crossings)])
            self.__dict__["_segments"] = Segments(
                Ragged(_ends(own, device), _ends(own, device), max(own), max(own), True),
                Ragged(
                    _ends(asking, device), _ends(asked, device), max(asking, default=0), max(asked, default=0), False
                ),
                responses.to(device),
                prompts.to(device),
            )
        return self.__dict__["_segments"]

    def mask(self, device: torch.device) -> Tensor:
        """The same as a table [T, T], true where the query (row) sees the key; made once a batch."""
        if "_mask" not in self.__dict__:
            group, response = [], []
            for number, (prompt, lengths) in enumerate(self.groups):
                group += [number] * (prompt + sum(lengths))
                response += [0] * prompt
                for index, length in enumerate(lengths, 1):
                    response += [index] * length
            groups, responses = torch.tensor(group, device=device), torch.tensor(response, device=device)
            own = (responses == 0) | (responses == responses[:, None])
            self.__dict__["_mask"] = ((groups == groups[:, None]) & own).tril()
        return self.__dict__["_mask"]


class Ragged(NamedTuple):
    """S sequences of different lengths end to end, queries beside keys, as the flash kernel takes them.

    *_ends [S + 1], int32: where each sequence ends, after a 0. longest_*: tokens of the longest.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    causal: bool


@dataclass(frozen=True)
class Segments:
    """A layout by sequences: every prompt and response with itself; all responses of a prompt, as one, with it.

    responses [R] and prompts [P], int64: flat positions of the latter's tokens, prompts without responses left out.
    """

    own: Ragged
    crossing: Ragged
    responses: Tensor
    prompts: Tensor


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_prefix: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What attention layers call: query [1, heads, T, d], key and value [1, key heads, T, d] -> [1, T, heads, d].

    Raises NotImplementedError for what it does not compute: soft-capped scores, sinks, biases, dropout.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    if dropout:
        raise NotImplementedError("attention with dropout")
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotary embeddings in float32
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    if query.device.type == "cuda" and not has_flash(query):
        return masked(query, key, value, shared_prefix, scale).transpose(1, 2), None
    split = _SplitOnCuda if query.device.type == "cuda" else _Split
    return split.apply(query, key, value, shared_prefix, scale).transpose(1, 2), None


def has_flash(query: Tensor) -> bool:
    """Whether CUDA's flash kernel takes it: half precision, Ampere or newer, heads of at most 256 in steps of 8."""
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    size = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and size <= 256 and size % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def masked(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attention by one dense mask, on any device: as `_Split`, for T² pairs."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, layout.mask(query.device), scale=scale)


def register() -> None:
    """Make the attention function known to transformers; again is harmless."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Split(torch.autograd.Function):
    """Attention by parts: query [1, H, T, d], key and value [1, H', T, d], H a multiple of H' -> [1, H, T, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        _, heads, length, size = query.shape
        out = query.new_empty(1, length, heads, size).transpose(1, 2)  # as the output projection wants it
        kind = torch.float64 if query.dtype == torch.float64 else torch.float32
        total = query.new_empty(1, heads, length, dtype=kind)
        for run in layout.runs:
            own, own_total = _flash(run.of(query), run.of(key), run.of(value), 0.0, True, scale=scale)
            run.of(out).copy_(own)
            run.of(total).copy_(own_total)
        for responses, prompt in layout.crossings:
            seen, seen_total = _flash(
                query[:, :, responses], key[:, :, prompt], value[:, :, prompt], 0.0, False, scale=scale
            )
            joined = torch.logaddexp(total[:, :, responses], seen_total)
            own = out[:, :, responses]
            own.mul_((total[:, :, responses] - joined).exp_()[..., None])
            own.add_(seen.mul_((seen_total - joined).exp_()[..., None]))
            total[:, :, responses] = joined
        ctx.save_for_backward(query, key, value, out, total)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, out, total = ctx.saved_tensors
        (gradient,) = gradients
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for run in ctx.layout.runs:
            parts = _flash_backward(
                *(run.of(x) for x in (gradient, query, key, value, out, total)), 0.0, True, scale=ctx.scale
            )
            for whole, part in zip(found, parts, strict=True):
                run.of(whole).copy_(part)
        for responses, prompt in ctx.layout.crossings:
            parts = _flash_backward(
                gradient[:, :, responses],
                query[:, :, responses],
                key[:, :, prompt],
                value[:, :, prompt],
                out[:, :, responses],
                total[:, :, responses],
                0.0,
                False,
                scale=ctx.scale,
            )
            for whole, where, part in zip(found, (responses, prompt, prompt), parts, strict=True):
                whole[:, :, where] += part
        return *found, None, None


class _SplitOnCuda(torch.autograd.Function):
    """The same by a flash kernel for sequences of different lengths, which wants [T, H, d] and gives totals [H, T]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        parts = layout.segments(query.device)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out, total = _ragged_flash(query, key, value, parts.own, scale)
        if len(parts.responses):
            seen, seen_total = _ragged_flash(
                query[parts.responses], key[parts.prompts], value[parts.prompts], parts.crossing, scale
            )
            own_total = total[:, parts.responses]
            joined = torch.logaddexp(own_total, seen_total)
            own = out[parts.responses] * (own_total - joined).exp().T[..., None]
            out[parts.responses] = own.add_(seen * (seen_total - joined).exp().T[..., None]).to(out.dtype)
            total[:, parts.responses] = joined
        ctx.save_for_backward(query, key, value, out, total)
        ctx.parts, ctx.scale = parts, scale
        return out.transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, out, total = ctx.saved_tensors
        parts, gradient = ctx.parts, gradients[0][0].transpose(0, 1)
        found = _ragged_flash_backward(gradient, query, key, value, out, total, parts.own, ctx.scale)
        if len(parts.responses):
            asking, asked = parts.responses, parts.prompts
            more = _ragged_flash_backward(
                gradient[asking],
                query[asking],
                key[asked],
                value[asked],
                out[asking],
                total[:, asking],
                parts.crossing,
                ctx.scale,
            )
            for whole, where, part in zip(found, (asking, asked, asked), more, strict=True):
                whole.index_add_(0, where, part)
        return *(x.transpose(0, 1)[None] for x in found), None, None


def _ragged_flash(query: Tensor, key: Tensor, value: Tensor, segments: Ragged, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, d] and log-sum-exp [H, T], float32."""
    *where, causal = segments
    found = torch.ops.aten._flash_attention_forward(query, key, value, *where, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _ragged_flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    segments: Ragged,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    *where, causal = segments
    unused = query.new_zeros(2, dtype=torch.uint64)  # the state of dropout, of which there is none
    arguments = (gradient.contiguous(), query, key, value, out, total.contiguous())
    return torch.ops.aten._flash_attention_backward(*arguments, *where, 0.0, causal, unused, unused[:0], scale=scale)
