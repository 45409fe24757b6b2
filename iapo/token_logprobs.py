"""Log-probabilities of chosen tokens straight from hidden states and the output matrix: no logits are kept.

    log π(t) = z_t − log Σ_v exp z_v,   z = cap·tanh(s·Wh / cap) / temperature        (no cap: z = s·Wh / temperature)

Logits exist a chunk of tokens at a time. Where a gradient is wanted it is made in the same pass, for it is known up
to a factor: ∂log π(t)/∂h = s/temperature · Wᵀ[(1_t − π) ⊙ (1 − (z·temperature/cap)²)]. That is two products with the
output matrix a token, the fewest possible, and a tensor as large as the hidden states in place of the logits.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Logits held at a time: 16 MB in float32 stays near a CPU's cache, 256 MB keeps a GPU busy."""


@dataclass(frozen=True)
class Scored:
    """Which tokens are scored: before [N], flat positions of the hidden states before them; targets [N], their ids.

    Without targets it is the states themselves that are wanted, for `next_token_logprobs`.
    """

    before: Tensor
    targets: Tensor | None
    temperature: float = 1.0


@dataclass(frozen=True)
class LogitForm:
    """From products with the output matrix to logits: scaled, then soft-capped."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """float32 (or wider) logits."""
        logits = products if products.dtype == torch.float64 else products.float()
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def logit_form(config: Any) -> LogitForm:
    """As transformers does it: logit_scale (Cohere), logits_scaling (Granite), final_logit_softcapping (Gemma)."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    scale *= getattr(text, "lm_head_multiplier", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    return LogitForm(scale, getattr(text, "final_logit_softcapping", None))


def chosen_logprobs(
    hidden: Tensor, head: Any, targets: Tensor, temperature: float = 1.0, form: LogitForm | None = None
) -> Tensor:
    """log softmax(logits / temperature) at the targets: hidden [N, D], targets [N] -> [N], float32 or wider.

    head: the output layer. A frozen linear layer is used as a matrix; any other (quantized, or with an adapter of its
    own) is called on chunks, and again in the backward pass.
    """
    form = form or LogitForm()
    plain = type(head) is torch.nn.Linear and not head.weight.requires_grad and head.bias is None
    rows = rows_at_a_time(head.weight.shape[0] if plain else head.out_features, hidden.device)
    if plain:
        return _Chosen.apply(hidden, head.weight, targets, temperature, form, rows)

    def score(part: Tensor, chosen: Tensor) -> Tensor:
        logits = form(head(part)) / temperature
        return logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)

    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(score, *piece, use_reentrant=False) for piece in pieces])


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, form: LogitForm, rows: int
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        found = []
        slopes = torch.empty_like(hidden, dtype=weight.dtype) if wanted else None
        for start in range(0, len(targets), rows):
            part, chosen = hidden[start : start + rows].to(weight.dtype), targets[start : start + rows, None]
            logits = form(part @ weight.T)
            logs = torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
            found.append(logs.gather(-1, chosen)[:, 0])
            if slopes is None:
                continue
            change = logs.exp_()  # becomes π − 1_t
            change.scatter_add_(-1, chosen, change.new_full(chosen.shape, -1))
            if form.cap is not None:
                change *= 1 - (logits / form.cap).square_()
            slopes[start : start + rows] = (change.to(weight.dtype) @ weight) * (-form.scale / temperature)
        if slopes is not None:
            ctx.save_for_backward(slopes)
            ctx.dtype = hidden.dtype
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(ctx.dtype), None, None, None, None, None


def rows_at_a_time(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits are held at a time."""
    return max(1, CHUNK["cuda" if device.type == "cuda" else "cpu"] // vocabulary)


def teach(inner: Any, *, logits: bool = False) -> None:
    """Give a causal language model's forward the argument `scored`, whose log-probs [N] it then returns as logits.

    Without targets it returns states: hidden states [N, D], or with `logits` those, [N, V].

    The model's own forward runs, with its output layer replaced for the time: so wrappers around the model (PEFT,
    DDP, FSDP) see an ordinary call. Without the argument nothing changes. logits: use the model's own logits after
    all, for a model that makes something else of them than `LogitForm` knows.
    """
    plain: Any = getattr(inner.forward, "untaught", inner.forward)
    head, form = inner.get_output_embeddings(), logit_form(inner.config)

    @functools.wraps(plain)
    def forward(*args: Any, scored: Scored | None = None, **kwargs: Any) -> Any:
        if scored is None:
            return plain(*args, **kwargs)
        if logits:
            output = plain(*args, **kwargs)
            if scored.targets is None:
                output.logits = output.logits.flatten(0, -2).index_select(0, scored.before)
            else:
                output.logits = logprobs_from_logits(output.logits, scored.before, scored.targets, scored.temperature)
            return output
        found: list[Tensor] = []
        own = head.forward

        def score(hidden: Tensor) -> Tensor:
            head.forward = own  # chosen_logprobs calls a layer that is no plain matrix
            chosen = hidden.flatten(0, -2).index_select(0, scored.before)
            if scored.targets is not None:
                chosen = chosen_logprobs(chosen, head, scored.targets, scored.temperature, form)
            found.append(chosen)
            return hidden.new_zeros(1, 1, 1)

        head.forward = score
        try:
            output = plain(*args, **kwargs)
        finally:
            head.forward = own
        (output.logits,) = found
        return output

    forward.untaught = plain  # type: ignore[attr-defined]
    forward.logits_of = LogitForm() if logits else lambda states: form(head(states))  # type: ignore[attr-defined]
    inner.forward = forward


def next_token_logprobs(inner: Any, states: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(v | y_<t) of every token v, [N, V] in float32 or wider, from states that the taught model returned."""
    return torch.log_softmax(inner.forward.logits_of(states) / temperature, -1)


def logprobs_from_logits(logits: Tensor, before: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The same from a model's own logits [S, L, V]."""
    flat = logits.flatten(0, 1)
    rows = max(1, CHUNK["cpu"] // logits.shape[-1])
    found = []
    for places, chosen in zip(before.split(rows), targets.split(rows), strict=True):
        logs = torch.log_softmax(flat.index_select(0, places).float() / temperature, -1)
        found.append(logs.gather(-1, chosen[:, None])[:, 0])
    return torch.cat(found)
