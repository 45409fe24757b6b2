"""Log-probs without logits against torch.log_softmax on whole logits, values and gradients."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from iapo import token_logprobs
from iapo.logprobs import Sharing, logprobs_of, make_batch, response_logprobs, sharing_of
from iapo.token_logprobs import LogitForm, chosen_logprobs, logit_form, logprobs_from_logits

VOCABULARY, WIDTH, TOKENS = 37, 16, 23
FORMS = {"plain": LogitForm(), "scaled": LogitForm(0.3), "capped": LogitForm(2.0, 3.0)}


def problem(dtype: torch.dtype = torch.float64):
    generator = np.random.default_rng(0)
    hidden = torch.tensor(generator.standard_normal((TOKENS, WIDTH)), dtype=dtype).requires_grad_()
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.tensor(generator.standard_normal((VOCABULARY, WIDTH))))
    return hidden, head, torch.tensor(generator.integers(0, VOCABULARY, TOKENS))


def whole(hidden, head, targets, temperature, form):
    logits = head(hidden) * form.scale
    if form.cap is not None:
        logits = form.cap * torch.tanh(logits / form.cap)
    return torch.log_softmax(logits / temperature, -1)[range(TOKENS), targets]


@pytest.fixture(params=[1, 5 * VOCABULARY, 2**20], ids=["a token a chunk", "five", "all"])
def chunk(request, monkeypatch):
    monkeypatch.setitem(token_logprobs.CHUNK, "cpu", request.param)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "layer"])
def test_values_and_gradients_are_those_of_whole_logits(chunk, form, temperature, matrix):
    hidden, head, targets = problem()
    if not matrix:  # a layer that is called, such as one with an adapter
        head = type("Called", (torch.nn.Linear,), {})(WIDTH, VOCABULARY, bias=True, dtype=torch.float64)
    found = chosen_logprobs(hidden, head, targets, temperature, form)
    expected = whole(hidden, head, targets, temperature, form)
    assert torch.allclose(found, expected, atol=1e-12)
    weight = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    wanted = [hidden, *head.parameters()] if not matrix else [hidden]
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_gradient_check_by_differences():
    hidden, head, targets = problem()
    assert torch.autograd.gradcheck(lambda h: chosen_logprobs(h, head, targets, 0.8, LogitForm(1.5, 4.0)), hidden)


def test_sums_are_float32_for_half_precision():
    hidden, head, targets = problem(torch.bfloat16)
    found = chosen_logprobs(hidden, head, targets)
    exact = torch.log_softmax((hidden @ head.weight.T).double(), -1)[range(TOKENS), targets]
    assert found.dtype == torch.float32 and torch.allclose(found.double(), exact, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (expected,) = torch.autograd.grad(exact.sum(), hidden)
    assert gradient.dtype == torch.bfloat16 and torch.allclose(gradient, expected, atol=0.1, rtol=0.02)


def test_no_tensor_of_tokens_times_vocabulary(monkeypatch):
    """The largest tensor that is made is a chunk of logits, forward and backward."""
    monkeypatch.setitem(token_logprobs.CHUNK, "cpu", 4 * VOCABULARY)
    hidden, head, targets = problem()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple) else (result,)) if x is not None)
            return result

    with Watch():
        chosen_logprobs(hidden, head, targets).sum().backward()
    assert 4 * VOCABULARY in sizes and max(sizes) <= max(VOCABULARY * WIDTH, TOKENS * WIDTH)


def test_logit_forms_of_known_models():
    assert logit_form(tiny_config()) == LogitForm()
    for name, value, form in (
        ("logit_scale", 0.0625, LogitForm(0.0625)),
        ("logits_scaling", 8.0, LogitForm(0.125)),
        ("final_logit_softcapping", 30.0, LogitForm(1.0, 30.0)),
    ):
        config = tiny_config()
        setattr(config, name, value)
        assert logit_form(config) == form


def test_an_adapter_on_the_output_layer_is_trained():
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config(vocab_size=40, tie_word_embeddings=False)).requires_grad_(False).eval()
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    parameters = [p for name, p in model.named_parameters() if "lm_head.lora" in name]
    assert len(parameters) == 2
    prompt, response = [3, 4, 5], [7, 8, 9]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, 2:-1]
    expected = torch.log_softmax(logits, -1)[range(3), response].sum()
    found = response_logprobs(model, make_batch([prompt], [response], 0, sharing_of(model)))[0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-4) and theirs.abs().max() > 0


def test_a_model_that_changes_its_logits_in_its_own_way_keeps_them(caplog):
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.linspace(0, 5, output.logits.shape[-1])
            return output

    torch.manual_seed(0)
    model = Odd(tiny_config(vocab_size=40)).eval()
    prompt, response = [3, 4, 5], [7, 8, 9]
    found = logprobs_of(model, [prompt], [response], pad_id=0, batch_size=1)
    assert "whole logits are kept" in caplog.text
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, 2:-1]
    assert found[0] == pytest.approx(torch.log_softmax(logits, -1)[range(3), response].sum().item(), abs=1e-4)


def test_log_probs_of_kept_logits(monkeypatch):
    monkeypatch.setitem(token_logprobs.CHUNK, "cpu", 2 * VOCABULARY)
    logits = torch.tensor(np.random.default_rng(0).standard_normal((2, 5, VOCABULARY)))
    before, targets = torch.tensor([0, 3, 9, 9]), torch.tensor([4, 0, 36, 1])
    expected = torch.log_softmax(logits.reshape(10, -1) / 0.5, -1)[before, targets]
    assert torch.allclose(logprobs_from_logits(logits, before, targets, 0.5).double(), expected, atol=1e-5)


def test_the_model_is_as_before_without_the_argument():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(vocab_size=40)).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(input_ids=ids).logits
    sharing = sharing_of(model)
    response_logprobs(model, make_batch([[3, 4]], [[5, 6]], 0, Sharing(False)))
    assert torch.equal(model(input_ids=ids).logits, before) and sharing_of(model) is sharing
