"""A model's steps without the model: its own code on tensors that have sizes and no data.

So what is counted is what each architecture does, whatever it is: the most bytes that exist at a time beside the
weights, and every operation's floating-point work and bytes moved, from which a device's rates give the time. What a
kernel allocates for itself is not seen; rounding by the allocator neither.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import ModuleList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from iapo import objectives
from iapo.config import TrainConfig
from iapo.logprobs import (
    CANNOT_SHARE,
    Batch,
    Sharing,
    make_batch,
    pack,
    prepare_sharing,
    response_logprobs,
    window,
)
from iapo.shared_prefix import ATTENTION
from iapo.token_logprobs import CHUNK, teach
from iapo.train import add_adapter

Lengths = tuple[int, int, int]
"""Tokens of a prompt and of each of its responses, and how many those are."""


@dataclass(frozen=True)
class Counted:
    """Of a pass over some rows: the most bytes in each of its phases beside what was there before; how often kernels of
    so many operations and bytes moved ran.
    """

    rows: int
    peaks: tuple[float, ...]
    kernels: Mapping[tuple[float, float], float]

    @property
    def peak(self) -> float:
        """The most bytes at a time."""
        return max(self.peaks)

    def seconds(self, rate: float, bandwidth: float, launch: float) -> float:
        """Each kernel takes as long as its work, its bytes or its start does, whichever is longest."""
        return sum(max(work / rate, moved / bandwidth, launch) * n for (work, moved), n in self.kernels.items())


def at_full_depth(make: Callable[[], Any], count: Callable[[Any], Counted]) -> Counted:
    """count(make()), from two shallow copies where layers repeat, for all that is counted is linear in their number.

    (The peak of each phase is; a maximum over phases is not.)
    """
    layers, period = _layers(make())
    depth = len(layers)
    shallow = depth % period + period * (2 if period == 1 else 1)
    if depth <= shallow + period:
        return count(make())
    found = []
    for number in (shallow, shallow + period):
        model = make()
        del _layers(model)[0][number:]
        model.config.get_text_config().num_hidden_layers = number
        found.append(count(model))
    first, second = found
    more = (depth - shallow) / period

    def extend(one: float, two: float) -> float:
        return one + (two - one) * more

    kernels = {
        key: extend(first.kernels.get(key, 0), second.kernels.get(key, 0))
        for key in {**first.kernels, **second.kernels}
    }
    return Counted(first.rows, tuple(map(extend, first.peaks, second.peaks)), kernels)


def _layers(model: Any) -> tuple[Any, int]:
    """The list of a model's layers, and after how many they repeat."""
    text = model.config.get_text_config()
    (layers, *_) = [m for m in model.modules() if isinstance(m, ModuleList) and len(m) == text.num_hidden_layers]
    kinds = getattr(text, "layer_types", None) or [None] * len(layers)
    looks = [
        (kind, [(name, tensor.shape) for name, tensor in layer.named_parameters()])
        for kind, layer in zip(kinds, layers, strict=True)
    ]
    return layers, next(period for period in range(1, len(looks) + 1) if looks[period:] == looks[:-period])


class Meter(TorchDispatchMode):
    """Counts live bytes and kernels of what runs under it; what `model` holds is not counted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.held = 0
        self.peaks = [0]
        self.kernels: Counter[tuple[float, float]] = Counter()
        self.seen: Any = WeakIdKeyDictionary()
        for tensor in [*model.parameters(), *model.buffers()]:
            self.seen[tensor.untyped_storage()] = True
            if tensor.grad is not None:
                self.seen[tensor.grad.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor | tuple | list):  # a question that tensors without data ask, not a kernel
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen[storage] = True
                self.held += storage.nbytes()
                self.peaks[-1] = max(self.peaks[-1], self.held)
                finalize(storage, self._free, storage.nbytes())
        if not _is_view(func) and "empty" not in func.name():
            moved = sum(t.numel() * t.itemsize for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            self.kernels[_work(func, args, kwargs or {}, out), moved] += 1
        return out

    def _free(self, size: int) -> None:
        self.held -= size

    def next_phase(self) -> None:
        """What comes has a peak of its own."""
        self.peaks.append(self.held)

    def counted(self, rows: int) -> Counted:
        """What was counted so far."""
        return Counted(rows, tuple(self.peaks), dict(self.kernels))


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Floating-point operations of a kernel, of matrix products and attention; nothing else has many for its bytes."""
    packet = func._overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return 2 * _attention_products(args[0], args[1], causal=args[4:5] == (True,))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 5 * _attention_products(args[1], args[2], causal=args[7])
    formula = flop_registry.get(packet)
    return float(formula(*args, **kwargs, out_val=out)) if formula else 0.0


def _attention_products(query: Tensor, key: Tensor, causal: bool) -> float:
    """Operations of one product over all pairs of a query [..., T, d] and a key [..., T', d] that it sees."""
    pairs = query.shape[-2] * (key.shape[-2] + 1) / 2 if causal else query.shape[-2] * key.shape[-2]
    return 2 * query.shape[:-2].numel() * pairs * query.shape[-1]


@contextmanager
def without_data(model: Any, device: str) -> Iterator[None]:
    """Tensors made inside have no data, those of `model` (on the meta device) neither; the model is used up by it.

    All say that they are on the CPU, for nothing else is sure to be there; device: as whose logits are cut to chunks.
    """
    made: dict[int, Tensor] = {}

    def emptied(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # tied weights stay one
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                made[id(tensor)] = torch.nn.Parameter(made[id(tensor)], tensor.requires_grad)
        return made[id(tensor)]

    chunk, CHUNK["cpu"] = CHUNK["cpu"], CHUNK[device]
    try:
        with FakeTensorMode():
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: emptied(tensor) for name, tensor in tensors.items() if tensor is not None})
            yield
    finally:
        CHUNK["cpu"] = chunk


class _Dequantized(torch.autograd.Function):
    """A product with a 4-bit matrix as bitsandbytes makes it of many tokens: the matrix is made whole each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ _dequantize(packed, shape, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (packed,) = ctx.saved_tensors
        return gradients[0] @ _dequantize(packed, ctx.shape, gradients[0].dtype), None, None


def _dequantize(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return packed.new_zeros(shape, dtype=dtype)  # reads what is packed, writes the matrix


def quantize(model: Any, dtype: torch.dtype) -> Any:
    """A model on the meta device with the linear layers that bitsandbytes would quantize as it would have them."""
    from bitsandbytes.nn import Linear4bit

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or layer is head:
                continue
            made: Any = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, device="meta"
            )
            shape = (layer.out_features, layer.in_features)
            packed = torch.empty(shape[0] * shape[1] // 2, 1, dtype=torch.uint8, device="meta")
            packed = torch.nn.Parameter(packed, requires_grad=False)
            vars(packed).update({key: vars(made.weight)[key] for key in ("compress_statistics", "quant_type")})
            made.weight = packed
            made.forward = partial(_four_bit, made, shape, dtype)
            setattr(parent, name, made)
    model.is_loaded_in_4bit = True  # as PEFT asks
    return model


def _four_bit(layer: Any, shape: tuple[int, int], dtype: torch.dtype, x: Tensor) -> Tensor:
    product = _Dequantized.apply(x.to(dtype), layer.weight, shape)
    return (product if layer.bias is None else product + layer.bias).to(x.dtype)


def training_pass(
    model: Any,
    train: TrainConfig,
    rows: Sequence[Lengths],
    budget: int,
    checkpointing: bool,
    autocast: bool,
    device: str,
) -> Counted:
    """Forward and backward of the fullest forward pass of a LoRA training step on the rows, by `train`'s own code.

    autocast: in bfloat16. The adapter's gradients are there before, as in all forward passes of a step but the first.
    """
    policy = add_adapter(model.requires_grad_(False).eval(), train)
    with without_data(policy, device):
        sharing = _sharing(policy)
        if checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        prompts, responses = _fullest(rows, budget, sharing)
        with Meter(policy) as meter:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                log_ratio = response_logprobs(policy, _batch(prompts, responses, sharing))
                loss = objectives.pointwise(log_ratio, torch.zeros(len(responses)))
            meter.next_phase()
            loss.backward()
    return meter.counted(len(responses))


def scoring_pass(model: Any, rows: Sequence[Lengths], budget: int, device: str) -> Counted:
    """Log-probs of the fullest forward pass over the rows, without gradients."""
    with without_data(model, device), torch.no_grad():
        sharing = _sharing(model)
        prompts, responses = _fullest(rows, budget, sharing)
        with Meter(model) as meter:
            response_logprobs(model, _batch(prompts, responses, sharing))
    return meter.counted(len(responses))


def classifying_pass(model: Any, length: int, rows: int) -> Counted:
    """A forward pass of a sequence classifier."""
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = 0
    with without_data(model, "cpu"), torch.no_grad(), Meter(model) as meter:
        model(input_ids=torch.ones(rows, length, dtype=torch.long))
    return meter.counted(rows)


def sampling_step(model: Any, prompt: int, length: int, prompts: int, samples: int) -> Counted:
    """One step of sampling so many responses to each prompt, with `length` tokens in the cache, which is counted.

    The first phases are the prompts' own pass and the cache's repetition, of which only memory is counted.
    """
    rows = prompts * samples
    with without_data(model, "cpu"), torch.no_grad(), Meter(model) as meter:
        ids = torch.ones(prompts, prompt, dtype=torch.long)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        meter.next_phase()
        cache.batch_repeat_interleave(samples)
        meter.next_phase()
        if length > prompt:  # as many tokens at once as would have been sampled one by one
            ids = torch.ones(rows, length - prompt, dtype=torch.long)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        meter.peaks[-1] = meter.held
        meter.kernels.clear()
        logits = model(
            input_ids=torch.ones(rows, 1, dtype=torch.long),
            attention_mask=torch.ones(rows, 1, 1, length + 1, dtype=torch.bool),
            past_key_values=cache,
            use_cache=True,
        ).logits
        torch.multinomial(torch.softmax(logits[:, -1].float(), -1), 1)
    return meter.counted(rows)


def _fullest(rows: Sequence[Lengths], budget: int, sharing: Sharing) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of the forward pass with the most tokens; each triple's prompt is one of its own."""
    prompts = [[number] * prompt for number, (prompt, _, count) in enumerate(rows) for _ in range(count)]
    responses = [[0] * response for _, response, count in rows for _ in range(count)]
    parts = pack(prompts, responses, budget, sharing)

    def tokens(part: list[int]) -> int:
        return _batch([prompts[i] for i in part], [responses[i] for i in part], sharing).input_ids.numel()

    part = max(parts, key=tokens)
    return [prompts[i] for i in part], [responses[i] for i in part]


def _batch(prompts: list[list[int]], responses: list[list[int]], sharing: Sharing) -> Batch:
    """The batch, with the mask that transformers makes of padding, for that looks at data."""
    batch = make_batch(prompts, responses, 0, sharing)
    if batch.layout is not None:
        return batch
    count, width = batch.input_ids.shape
    return replace(batch, attention_mask=torch.ones(count, 1, width, width, dtype=torch.bool))


def _sharing(model: Any) -> Sharing:
    """What `logprobs.sharing_of` finds, but for architectures that share and get it wrong, which no size shows."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    teach(inner)
    try:
        if not prepare_sharing(inner):
            response_logprobs(inner, make_batch([[0, 0]] * 2, [[0, 0]] * 2, 0, Sharing(True)))
            return Sharing(True, window(inner))
    except CANNOT_SHARE:
        pass
    if inner.config._attn_implementation == ATTENTION:
        inner.set_attn_implementation("sdpa")
    return Sharing(False)
