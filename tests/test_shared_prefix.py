"""The prompt once: attention against a dense mask; log-probs and gradients of whole models against rows alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from iapo import shared_prefix
from iapo.logprobs import Sharing, logprobs_of, make_batch, response_logprobs, sharing_of
from iapo.shared_prefix import ATTENTION, Layout, attention

LAYOUTS = {
    "one prompt": ((5, (3, 3, 3)),),
    "lengths that differ": ((4, (0, 1, 2, 2, 7)),),
    "two prompts": ((3, (2, 2)), (1, (4,))),
    "no tokens but the prompt's": ((6, (0, 0)), (2, ())),
    "long": ((70, (90, 90, 130)),),
}


def dense_mask(layout: Layout) -> torch.Tensor:
    """[T, T], true where the query (row) may see the key: written token by token."""
    owners = []
    for group, (prompt, responses) in enumerate(layout.groups):
        owners += [(group, -1)] * prompt
        owners += [(group, r) for r, length in enumerate(responses) for _ in range(length)]
    return torch.tensor(
        [
            [kg == qg and kr in (-1, qr) and key <= query for key, (kg, kr) in enumerate(owners)]
            for query, (qg, qr) in enumerate(owners)
        ]
    )


def tensors(length: int, heads: int = 4, key_heads: int = 2, size: int = 16) -> list[torch.Tensor]:
    generator = np.random.default_rng(0)
    shapes = [(1, length, count, size) for count in (heads, key_heads, key_heads)]
    return [torch.tensor(generator.standard_normal(shape)).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_and_its_gradients_are_those_of_a_dense_mask(groups, key_heads):
    layout = Layout(groups)
    mask = dense_mask(layout)
    query, key, value = tensors(len(mask), key_heads=key_heads)
    found, _ = attention(None, query, key, value, None, scaling=0.3, shared_prefix=layout)
    wide = [x.repeat_interleave(4 // key_heads, 1) for x in (key, value)]
    scores = (query @ wide[0].mT * 0.3).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-12)
    weight = torch.tensor(np.random.default_rng(1).standard_normal(expected.shape))
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (query, key, value)),
        torch.autograd.grad((expected * weight).sum(), (query, key, value)),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-11)


def ragged_sequences(query, key, value, segments):
    """The sequences that a flash kernel would take, one by one: slices of queries and keys, and who sees whom."""
    queries, keys = (list(pairwise(ends.tolist())) for ends in (segments.query_ends, segments.key_ends))
    assert queries[-1][1] == len(query) and keys[-1][1] == len(key) == len(value)
    assert max(stop - start for start, stop in queries) == segments.longest_query
    assert max(stop - start for start, stop in keys) == segments.longest_key
    for (first, last), (start, stop) in zip(queries, keys, strict=True):
        seen = torch.ones(last - first, stop - start, dtype=torch.bool)
        yield slice(first, last), slice(start, stop), seen.tril() if segments.causal else seen


def plain_flash(query, key, value, segments, scale):
    """What CUDA's kernel computes, sequence by sequence, with all scores."""
    out, total = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    groups = query.shape[1] // key.shape[1]
    for asking, asked, seen in ragged_sequences(query, key, value, segments):
        k, v = (x[asked].repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[asking], k) * scale
        scores = scores.masked_fill(~seen, float("-inf"))
        total[:, asking] = scores.logsumexp(-1)
        out[asking] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out, total


def plain_flash_backward(gradient, query, key, value, out, total, segments, scale):
    """Its gradients from the output and log-sum-exp that it is given, by the equations of flash attention."""
    found = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    groups = query.shape[1] // key.shape[1]
    for asking, asked, seen in ragged_sequences(query, key, value, segments):
        k, v = (x[asked].repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[asking], k) * scale
        weights = (scores - total[:, asking, None]).exp() * seen
        slopes = torch.einsum("qhd,khd->hqk", gradient[asking], v)
        slopes = weights * (slopes - (gradient[asking] * out[asking]).sum(-1).T[..., None]) * scale
        found[0][asking] = torch.einsum("hqk,khd->qhd", slopes, k)
        for whole, part in (
            (found[1], torch.einsum("hqk,qhd->khd", slopes, query[asking])),
            (found[2], torch.einsum("hqk,qhd->khd", weights, gradient[asking])),
        ):
            whole[asked] = part.unflatten(1, (-1, groups)).sum(2)
    return found


@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("key_heads", [4, 1])
def test_the_split_for_cuda_is_that_for_the_cpu(groups, key_heads, monkeypatch):
    """All but its kernels, for which benchmarks/gpu.sh needs a GPU: here they are written out."""
    monkeypatch.setattr(shared_prefix, "_ragged_flash", plain_flash)
    monkeypatch.setattr(shared_prefix, "_ragged_flash_backward", plain_flash_backward)
    layout = Layout(groups)
    inputs = tensors(layout.length, key_heads=key_heads)
    outputs = [split.apply(*inputs, layout, 0.3) for split in (shared_prefix._SplitOnCuda, shared_prefix._Split)]
    assert torch.allclose(*outputs, atol=1e-12)
    weight = torch.tensor(np.random.default_rng(1).standard_normal(outputs[0].shape))
    for mine, theirs in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in outputs), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "built", "takes"),
    [
        (torch.bfloat16, 128, (8, 6), True, True),
        (torch.float16, 64, (9, 0), True, True),
        (torch.float32, 64, (9, 0), True, False),
        (torch.bfloat16, 64, (7, 5), True, False),
        (torch.bfloat16, 264, (9, 0), True, False),
        (torch.bfloat16, 60, (9, 0), True, False),
        (torch.bfloat16, 64, (9, 0), False, False),
    ],
)
def test_what_the_flash_kernel_of_cuda_takes(monkeypatch, dtype, size, capability, built, takes):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert shared_prefix.has_flash(torch.zeros(1, 2, 3, size, dtype=dtype)) is takes


@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("key_heads", [4, 1])
def test_what_runs_on_cuda_without_flash_is_the_same(groups, key_heads):
    layout = Layout(groups)
    inputs = tensors(layout.length, key_heads=key_heads)
    assert layout.mask(torch.device("cpu")).equal(dense_mask(layout))
    assert layout.mask(torch.device("cpu")) is layout.mask(torch.device("cpu"))
    outputs = [attend(*inputs, layout, 0.3) for attend in (shared_prefix.masked, shared_prefix._Split.apply)]
    assert torch.allclose(*outputs, atol=1e-12)
    weight = torch.tensor(np.random.default_rng(1).standard_normal(outputs[0].shape))
    for mine, theirs in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in outputs), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)


def test_runs_and_crossings_by_hand():
    layout = Layout(((3, (2, 2, 4)), (1, (0, 5))))
    assert [(run.start, run.count, run.length) for run in layout.runs] == [
        (0, 1, 3),
        (3, 2, 2),
        (7, 1, 4),
        (11, 1, 1),
        (12, 1, 5),
    ]
    assert layout.crossings == ((slice(3, 11), slice(0, 3)), (slice(12, 17), slice(11, 12)))


def test_autocast_gives_nearly_the_same():
    model = make_model("Llama")
    batch = make_batch(*make_rows(), 0, sharing_of(model))
    with torch.no_grad():
        exact = response_logprobs(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = response_logprobs(model, batch)
    assert found.dtype == torch.float32 and not found.equal(exact)
    assert torch.allclose(found, exact, rtol=0.02, atol=0.1)


def test_what_attention_cannot_compute_is_refused():
    query, key, value = tensors(5)
    layout = Layout(((3, (2,)),))
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=name):
            attention(None, query, key, value, None, shared_prefix=layout, **{name: 1.0})
    with pytest.raises(NotImplementedError, match="dropout"):
        attention(None, query, key, value, None, dropout=0.1, shared_prefix=layout)


SHARED = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Gemma": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {},
    "Cohere": {"logit_scale": 0.5},
    "Granite": {"logits_scaling": 3.0},
}
UNSHARED = {
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},  # scores are soft-capped
    "Qwen3Next": {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}  # recurrent layers
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def make_model(name: str, **changes):
    settings = {
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(settings | changes))
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(base, lora).eval()


def make_rows() -> tuple[list[list[int]], list[list[int]]]:
    generator = np.random.default_rng(0)
    one, two = (generator.integers(2, 40, length).tolist() for length in (9, 1))
    responses = [generator.integers(2, 40, length).tolist() for length in (7, 3, 7, 1, 4, 6, 4)]
    return [one, one, two, one, one, two, two], responses


def alone(model, prompts, responses) -> torch.Tensor:
    """Log-probs from the model's own logits, a row at a time."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits, -1)[range(len(response)), response].sum())
    return torch.stack(found)


@pytest.mark.parametrize("name", SHARED | UNSHARED)
def test_families_give_the_log_probs_and_gradients_of_rows_alone(name, caplog):
    model = make_model(name, **(SHARED | UNSHARED)[name])
    prompts, responses = make_rows()
    weights = torch.linspace(-1, 1, len(prompts))
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = alone(model, prompts, responses)
    gradients = torch.autograd.grad((expected * weights).sum(), parameters)
    sharing = sharing_of(model)
    assert sharing.possible == (name in SHARED)
    assert ("computed again for every response" in caplog.text) == (name in UNSHARED)
    for way in (sharing, Sharing(False)):
        batch = make_batch(prompts, responses, 0, way)
        assert (batch.layout is not None) == way.possible
        for checkpointing in (False, True):
            if checkpointing:
                model.train()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            found = response_logprobs(model, batch)
            assert torch.allclose(found, expected, atol=1e-4)
            for mine, theirs in zip(torch.autograd.grad((found * weights).sum(), parameters), gradients, strict=True):
                assert torch.allclose(mine, theirs, atol=2e-5 * max(1, theirs.abs().max()))
        model.gradient_checkpointing_disable()
        model.eval()


@pytest.mark.parametrize("name", ["Mistral", "Gemma3Text"])
def test_rows_longer_than_a_sliding_window_are_not_shared(name):
    changes = {"sliding_window": 12} | ({"head_dim": 16} if name == "Gemma3Text" else {})
    changes |= {"layer_types": ["sliding_attention", "full_attention"]} if name == "Gemma3Text" else {}
    model = make_model(name, **changes)
    prompts, responses = make_rows()  # the longest row has 16 tokens
    assert sharing_of(model) == Sharing(True, 12)
    assert make_batch(prompts, responses, 0, sharing_of(model)).layout is None
    short = [prompts[0][:5]] * 2, responses[:2]  # 12 tokens
    assert make_batch(*short, 0, sharing_of(model)).layout is not None
    for rows in ((prompts, responses), short):
        found = logprobs_of(model, *rows, pad_id=0, batch_size=8)
        assert found == pytest.approx(alone(model, *rows).tolist(), abs=1e-4)


def test_generation_is_what_it_was():
    """Sampling and log-probs use one model in turn in `evaluate`."""
    model = make_model("Llama")
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    arguments = {"attention_mask": (ids != 0).long(), "do_sample": False, "max_new_tokens": 8}
    before = model.generate(input_ids=ids, **arguments)
    assert sharing_of(model).possible and model.config._attn_implementation == ATTENTION
    assert torch.equal(model.generate(input_ids=ids, **arguments), before)


def test_responses_do_not_see_each_other():
    """Bit for bit: what one response says changes nothing for the others."""
    model = make_model("Llama")
    sharing = sharing_of(model)
    with torch.no_grad():
        results = [
            response_logprobs(model, make_batch([[3, 4, 5]] * 3, [[7, 8, 9], other, [9, 9, 2]], 0, sharing))
            for other in ([1, 2, 3], [30, 31, 32])
        ]
    for one, two in pairwise(results):
        assert one[[0, 2]].equal(two[[0, 2]]) and one[1] != two[1]
