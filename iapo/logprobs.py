"""Log-probabilities of responses: of the sampled token ids, summed in float32, whatever the padding or batch."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iapo.shared_prefix import ATTENTION, Layout, register
from iapo.token_logprobs import Scored, next_token_logprobs, rows_at_a_time, teach

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """B responses to their prompts as S sequences of at most L tokens, in which N response tokens are scored.

    input_ids and position_ids [S, L]. attention_mask: [S, L] where sequences are padded, else [1, 1, 1, 1], which
    means that layout says who sees whom. before [N]: flat positions of the hidden states that predict the response
    tokens; targets [N]: their ids, response by response; counts [B]: how many each response has.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    before: Tensor
    targets: Tensor
    counts: Tensor
    layout: Layout | None


@dataclass(frozen=True)
class Sharing:
    """Whether a model can take a prompt once for all its responses, up to how many tokens of the two together."""

    possible: bool
    longest: float = float("inf")

    def allows(self, length: int) -> bool:
        """For a prompt with a response of this many tokens together."""
        return self.possible and length <= self.longest


def make_batch(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    pad_id: int,
    sharing: Sharing,
    device: torch.device | str = "cpu",
) -> Batch:
    """Responses as one batch in their order: each prompt once if the model allows it, else padded on the right."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    make = _shared_batch if sharing.allows(longest) else _padded_batch
    return make(prompts, responses, pad_id, device)


def _shared_batch(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int, device: torch.device | str
) -> Batch:
    """One sequence without padding: a prompt, its responses by length, the next prompt with its own, ...

    The last token of a response predicts nothing and is left out.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, ids_of in enumerate(prompts):
        groups.setdefault(tuple(ids_of), []).append(row)
    ids: list[int] = []
    positions: list[int] = []
    before: list[list[int]] = [[] for _ in prompts]
    layout = []
    for prompt, rows in groups.items():
        rows.sort(key=lambda row: len(responses[row]))
        last = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        for row in rows:
            length = len(responses[row]) - 1
            before[row] = [last, *range(len(ids), len(ids) + length)]
            ids += responses[row][:length]
            positions += range(len(prompt), len(prompt) + length)
        layout.append((len(prompt), tuple(len(responses[row]) - 1 for row in rows)))
    return Batch(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        torch.tensor([place for places in before for place in places], device=device),
        torch.tensor([token for response in responses for token in response], device=device),
        torch.tensor([len(response) for response in responses], device=device),
        Layout(tuple(layout)),
    )


def _padded_batch(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int, device: torch.device | str
) -> Batch:
    """A sequence for each response."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids, seen = [], []
    before: list[int] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = len(prompt) + len(response)
        ids.append([*prompt, *response, *[pad_id] * (width - length)])
        seen.append([1] * length + [0] * (width - length))
        before += range(row * width + len(prompt) - 1, row * width + length - 1)
    return Batch(
        torch.tensor(ids, device=device),
        torch.arange(width, device=device).expand(len(ids), width),
        torch.tensor(seen, device=device),
        torch.tensor(before, device=device),
        torch.tensor([token for response in responses for token in response], device=device),
        torch.tensor([len(response) for response in responses], device=device),
        None,
    )


def response_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log π(y|x) [B], float32: the sum over response tokens, each given all before it.

    The same temperature as in sampling divides the logits, so that this is the log-probability under the policy that
    is sampled. model: one that `sharing_of` has seen, or a wrapper around it.
    """
    per_token = _forward(model, batch, Scored(batch.before, batch.targets, temperature))
    return torch.segment_reduce(per_token, "sum", lengths=batch.counts)


def _forward(model: Any, batch: Batch, scored: Scored) -> Tensor:
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        scored=scored,
        **({} if batch.layout is None else {"shared_prefix": batch.layout}),
    ).logits


def pack(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], budget: int, sharing: Sharing
) -> list[list[int]]:
    """Split responses into batches of at most `budget` tokens, by length, prompts together: lists of row numbers.

    A prompt counts once in a batch if it is shared; a row longer than the budget is a batch of its own.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    shared = bool(lengths) and sharing.allows(max(lengths))
    groups: dict[Any, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt) if shared else row, []).append(row)
    parts: list[list[int]] = []
    used = budget + 1
    for rows in sorted(groups.values(), key=lambda rows: (max(lengths[row] for row in rows), rows)):
        rows.sort(key=lambda row: (lengths[row], row))
        first = True
        for row in rows:
            if shared:
                more = used + (lengths[row] if first else len(responses[row]))
            else:  # padded to the longest, which comes last
                more = (len(parts[-1]) + 1) * lengths[row] if parts else used
            if more > budget:
                parts.append([])
                more = lengths[row]
            parts[-1].append(row)
            used, first = more, False
    return parts


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
    """Log-probabilities of many responses in their order, without gradients.

    A forward pass takes as many tokens as `batch_size` of the longest rows have without sharing.
    """
    values = [0.0] * len(responses)
    for rows, batch in _batches(model, prompts, responses, pad_id, batch_size):
        for index, value in zip(rows, response_logprobs(model, batch, temperature).tolist(), strict=True):
            values[index] = value
    return values


@dataclass(frozen=True)
class Divergence:
    """How far a policy is from the reference along one response, in nats.

    log_ratio: Δ = log π(y|x) − log π_ref(y|x). kl: the sum over its tokens of KL(π(·|y_<t) ‖ π_ref(·|y_<t)).
    """

    log_ratio: float
    kl: float


@torch.inference_mode()
def divergences_of(
    policy: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    pad_id: int,
    batch_size: int,
    temperature: float = 1.0,
) -> list[Divergence]:
    """The divergence along each of many responses, from a PEFT model and itself with its adapter off.

    By the chain rule the mean of `kl` over the policy's own responses is KL(π ‖ π_ref), as that of `log_ratio` is; but
    the chance in which token came next is taken out of it (Rao-Blackwell), and no tail of rare responses is in it. That
    holds for responses cut at a length, and where they were sampled from the whole distribution at this temperature.
    Arguments: those of `logprobs_of`.
    """
    inner = policy.get_base_model()
    found: list[Any] = [None] * len(responses)
    for rows, batch in _batches(policy, prompts, responses, pad_id, batch_size):
        states = Scored(batch.before, None)
        own = _forward(policy, batch, states)
        with policy.disable_adapter():
            reference = _forward(policy, batch, states)
        at_a_time = rows_at_a_time(4 * inner.config.get_text_config().vocab_size, own.device)  # four such are held
        per_token = []
        parts = (part.split(at_a_time) for part in (own, reference, batch.targets))
        for one, other, target in zip(*parts, strict=True):
            log_p = next_token_logprobs(inner, one, temperature)
            with policy.disable_adapter():  # which the output layer may have too
                log_ratio = log_p - next_token_logprobs(inner, other, temperature)
            kl = (log_p.exp() * log_ratio).sum(-1)
            per_token.append(torch.stack([log_ratio.gather(-1, target[:, None])[:, 0], kl], -1))
        sums = torch.segment_reduce(torch.cat(per_token), "sum", lengths=batch.counts)
        for index, values in zip(rows, sums.tolist(), strict=True):
            found[index] = Divergence(*values)
    return found


def _batches(
    model: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of many responses, each with the row numbers of its own."""
    sharing = sharing_of(model)
    longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    for rows in pack(prompts, responses, batch_size * longest, sharing):
        yield rows, make_batch([prompts[i] for i in rows], [responses[i] for i in rows], pad_id, sharing, model.device)


def sharing_of(model: Any) -> Sharing:
    """Make a causal language model (or PEFT's wrapper of one) score responses, and find out what it can share.

    Done once a model, before it is wrapped for several devices. What a model can do is tried on a few tokens, beside
    its own logits of one sequence at a time: an architecture that is not known falls back and says so.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(inner, "_iapo_sharing", None)
    if found is None:
        found = inner._iapo_sharing = _try_sharing(inner)
    return found


CANNOT_SHARE = (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError)
"""What a model may raise when it is given shared prompts."""


def _try_sharing(inner: Any) -> Sharing:
    name = inner.config.model_type
    expected = _expected(inner)
    teach(inner)
    if why := _differs(inner, expected, Sharing(False)):
        teach(inner, logits=True)
        log.warning("%s models make something unknown of their logits (%s); whole logits are kept", name, why)
    try:
        why = prepare_sharing(inner) or _differs(inner, expected, Sharing(True))
    except CANNOT_SHARE as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
    if not why:
        return Sharing(True, window(inner))
    if inner.config._attn_implementation == ATTENTION:
        inner.set_attn_implementation("sdpa")
    log.warning("%s models cannot share a prompt (%s); it is computed again for every response", name, why)
    return Sharing(False)


def prepare_sharing(inner: Any) -> str:
    """Let the model's attention layers call ours; or say why not."""
    if inner.config._attn_implementation != "sdpa":
        return f"attention is {inner.config._attn_implementation}, not SDPA"
    register()
    inner.set_attn_implementation(ATTENTION)
    return "" if inner.config._attn_implementation == ATTENTION else "attention cannot be replaced"


def window(inner: Any) -> float:
    """Positions that every layer sees at least, where some see only the nearest ones."""
    text = inner.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and set(kinds) <= {"full_attention"}:
        return float("inf")
    return min((window for window in windows if window), default=float("inf"))


_PROMPTS = [[2, 3, 4], [2, 3, 4], [5, 6], [2, 3, 4]]
_RESPONSES = [[7, 8, 9], [10, 11], [12, 13], [14]]
"""Tokens for trying a model, taken modulo its vocabulary."""


def _trial(inner: Any) -> tuple[list[list[int]], list[list[int]]]:
    size = inner.get_input_embeddings().weight.shape[0]
    return tuple([[id % size for id in ids] for ids in rows] for rows in (_PROMPTS, _RESPONSES))  # type: ignore[return-value]


@torch.no_grad()
def _expected(inner: Any) -> list[float]:
    """The trial's log-probs, each from the model's own logits of its sequence alone."""
    found = []
    for prompt, response in zip(*_trial(inner), strict=True):
        logits = inner(input_ids=torch.tensor([prompt + response], device=inner.device), use_cache=False).logits
        logs = torch.log_softmax(logits[0, len(prompt) - 1 : -1].float(), -1)
        found.append(float(logs[torch.arange(len(response)), response].sum()))
    return found


@torch.no_grad()
def _differs(inner: Any, expected: list[float], sharing: Sharing) -> str:
    """How the trial's log-probs differ from what was expected, beyond rounding; empty if they do not."""
    prompts, responses = _trial(inner)
    found = response_logprobs(inner, make_batch(prompts, responses, 0, sharing, inner.device)).tolist()
    relative, absolute = (1e-3, 1e-3) if inner.dtype in (torch.float32, torch.float64) else (0.02, 0.25)
    for value, other in zip(found, expected, strict=True):
        if not abs(value - other) <= absolute + relative * abs(other):
            return f"a log-prob of {value:.4f} in place of {other:.4f}"
    return ""
