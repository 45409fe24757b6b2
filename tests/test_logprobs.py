"""Log-probabilities of responses against one sequence at a time, token by token, in float64 and without padding."""

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from iapo import token_logprobs
from iapo.logprobs import Sharing, divergences_of, logprobs_of, make_batch, pack, response_logprobs, sharing_of
from iapo.models import prompt_token_ids
from iapo.store import read_table

TOLERANCE = 1e-4
PROMPTS = [[10, 11, 12, 13], [20], [30, 31], [3] * 20, [7, 8]]
RESPONSES = [[5, 6, 1], [1], [9, 9, 9, 9, 9, 9], [12, 0, 13, 1], [0, 0, 2]]  # 0 is the padding token: also a token


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(vocab_size=40)).eval()


@torch.inference_mode()
def slow_logprob(model, prompt: list[int], response: list[int], temperature: float = 1.0) -> float:
    total = 0.0
    for position, token in enumerate(response):
        ids = torch.tensor([prompt + response[:position]])
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].double() / temperature
        total += float(torch.log_softmax(logits, -1)[token])
    return total


def slow(model, temperature: float = 1.0) -> list[float]:
    return [slow_logprob(model, p, r, temperature) for p, r in zip(PROMPTS, RESPONSES, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_equal_to_the_loop_for_every_batch_split(model, temperature, batch_size):
    values = logprobs_of(model, PROMPTS, RESPONSES, pad_id=0, batch_size=batch_size, temperature=temperature)
    assert values == pytest.approx(slow(model, temperature), abs=TOLERANCE)


def test_order_and_padding_token_change_nothing(model):
    values = logprobs_of(model, PROMPTS[::-1], RESPONSES[::-1], pad_id=17, batch_size=3)
    assert values[::-1] == pytest.approx(slow(model), abs=TOLERANCE)


def test_gradients_are_those_of_the_unpadded_loop(model):
    """What training differentiates: one parameter's gradient of the sum, padded batch against single sequences."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    batch = make_batch(PROMPTS, RESPONSES, 0, sharing_of(model))
    (together,) = torch.autograd.grad(response_logprobs(model, batch).sum(), weight)
    alone = torch.zeros_like(weight)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        picked = torch.log_softmax(logits, -1)[range(len(response)), response].sum()
        alone += torch.autograd.grad(picked, weight)[0]
    assert torch.allclose(together, alone, atol=1e-4)


def test_probabilities_of_all_short_responses_sum_to_one(model):
    """Two tokens of 40: responses that end at once, and all that do not."""
    responses = [[1], *([a, b] for a in range(40) if a != 1 for b in range(40))]
    values = logprobs_of(model, [[20, 21]] * len(responses), responses, pad_id=0, batch_size=256)
    assert torch.tensor(values).double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module", params=["all-linear", ["q_proj", "lm_head"]], ids=["layers", "output layer too"])
def policy(request):
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config(vocab_size=40)).eval()
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=request.param, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return policy


@torch.inference_mode()
def slow_divergence(policy, prompt: list[int], response: list[int], temperature: float) -> tuple[float, float]:
    log_ratio = kl = 0.0
    for position, token in enumerate(response):
        ids = torch.tensor([prompt + response[:position]])
        own = torch.log_softmax(policy(input_ids=ids).logits[0, -1].double() / temperature, -1)
        with policy.disable_adapter():
            reference = torch.log_softmax(policy(input_ids=ids).logits[0, -1].double() / temperature, -1)
        log_ratio += float((own - reference)[token])
        kl += float(torch.nn.functional.kl_div(reference, own, log_target=True, reduction="sum"))
    return log_ratio, kl


@pytest.mark.parametrize("whole_logits", [False, True])
@pytest.mark.parametrize(("batch_size", "temperature"), [(1, 1.0), (3, 0.7), (64, 1.0)])
def test_divergences_are_those_of_the_loop(policy, batch_size, temperature, whole_logits, monkeypatch):
    expected = [slow_divergence(policy, p, r, temperature) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    monkeypatch.setitem(token_logprobs.CHUNK, "cpu", 3 * 40)  # three tokens at a time
    sharing_of(policy)
    token_logprobs.teach(policy.get_base_model(), logits=whole_logits)
    found = divergences_of(policy, PROMPTS, RESPONSES, pad_id=0, batch_size=batch_size, temperature=temperature)
    assert [one.log_ratio for one in found] == pytest.approx([one for one, _ in expected], abs=TOLERANCE)
    assert [one.kl for one in found] == pytest.approx([kl for _, kl in expected], abs=TOLERANCE)
    assert max(abs(one) for one, _ in expected) > 0.3 and min(kl for _, kl in expected) > 0.01


def test_the_kl_along_responses_has_the_mean_of_the_log_ratio_and_less_chance_in_it(policy):
    """Over all responses of at most two tokens of 40, 1 ends them: the chain rule, cut at a length, exactly."""
    responses = [[1], *([a, b] for a in range(40) if a != 1 for b in range(40))]
    prompts = [[20, 21]] * len(responses)
    found = divergences_of(policy, prompts, responses, pad_id=0, batch_size=256)
    p = torch.tensor(logprobs_of(policy, prompts, responses, pad_id=0, batch_size=256)).double().exp()
    log_ratio, kl = (torch.tensor([getattr(one, name) for one in found]).double() for name in ("log_ratio", "kl"))
    assert float(p @ kl) == pytest.approx(float(p @ log_ratio), rel=1e-4)
    assert float(p @ kl) > 0.05
    assert float(p @ (kl - p @ kl) ** 2) < 0.1 * float(p @ (log_ratio - p @ log_ratio) ** 2)


def test_padded_batch_by_hand():
    batch = make_batch([[10, 11], [20]], [[5, 1], [6, 7, 8, 1]], 0, Sharing(False))
    assert batch.input_ids.tolist() == [[10, 11, 5, 1, 0], [20, 6, 7, 8, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.before.tolist() == [1, 2, 5, 6, 7, 8]
    assert batch.targets.tolist() == [5, 1, 6, 7, 8, 1]
    assert batch.counts.tolist() == [2, 4] and batch.layout is None


def test_shared_batch_by_hand():
    """Prompts once, responses by length without their last token; what is scored stays in the order of the rows."""
    batch = make_batch([[10, 11], [20], [10, 11]], [[5, 6, 7], [1], [8, 1]], 0, Sharing(True))
    assert batch.input_ids.tolist() == [[10, 11, 8, 5, 6, 20]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert batch.before.tolist() == [1, 3, 4, 5, 1, 2]
    assert batch.targets.tolist() == [5, 6, 7, 1, 8, 1]
    assert batch.counts.tolist() == [3, 1, 2]
    assert batch.layout is not None and batch.layout.groups == ((2, (1, 2)), (1, (0,)))
    assert batch.attention_mask.shape == (1, 1, 1, 1)


def test_packing_by_hand():
    """Prompts a (2 tokens) and b (3): shared, a prompt counts once in a batch; padded, every row as the longest."""
    prompts = [[1, 1], [2, 2, 2], [1, 1], [2, 2, 2], [1, 1]]
    responses = [[5] * 4, [5] * 2, [5], [5] * 6, [5] * 3]
    assert pack(prompts, responses, 10, Sharing(True)) == [[2, 4, 0], [1], [3]]  # 2+1+3+4, then 3+2, then 3+6
    assert pack(prompts, responses, 21, Sharing(True)) == [[2, 4, 0, 1, 3]]
    assert pack(prompts, responses, 10, Sharing(False)) == [[2, 1], [4], [0], [3]]  # 2x5, 5, 6, 9
    assert pack(prompts, responses, 1, Sharing(True)) == [[2], [4], [0], [1], [3]]
    assert pack(prompts, responses, 10, Sharing(True, 5)) == pack(prompts, responses, 10, Sharing(False))
    assert pack([], [], 10, Sharing(True)) == []


def test_stage_stores_the_base_log_prob_of_every_sampled_response(tmp_path, tiny_run, iapo):
    """At the temperature of sampling, for responses that ended and for those that were cut."""
    path = tiny_run(sample={"temperature": 1.5, "samples_per_prompt": 4}, model={"quantization": "none"})
    assert iapo("prompts", path).code == iapo("sample", path).code == 0
    from iapo.config import load_config
    from iapo.pipeline import run_stage

    config = load_config(path)
    assert run_stage("ref_logprobs", config)
    model, tokenizer = LlamaForCausalLM.from_pretrained(config.model.base).eval(), make_tokenizer()
    prompts = {row["prompt_id"]: row["prompt"] for row in read_table(config.run / "prompts.parquet").to_pylist()}
    responses = read_table(config.run / "responses").to_pandas()
    frame = responses.merge(read_table(config.run / "ref_logprobs").to_pandas(), on=["prompt_id", "sample_id"])
    assert len(frame) == len(responses) == 80 and set(frame["finish_reason"]) == {"stop", "length"}
    some = frame.groupby("finish_reason").head(12)
    for row in some.itertuples():
        prompt, response = prompt_token_ids(tokenizer, prompts[row.prompt_id]), row.token_ids.tolist()
        assert row.ref_logprob == pytest.approx(slow_logprob(model, prompt, response, 1.5), abs=TOLERANCE)
        assert row.n_tokens == len(response)
