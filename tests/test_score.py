"""Rewards: of a model against one unpadded conversation at a time, of functions, and what is refused."""

import math

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_tokenizer, tiny_config
from jinja2 import Template
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from iapo.config import RewardConfig
from iapo.errors import StageError, UserError
from iapo.score import open_reward, score_token_ids
from iapo.store import read_table

PROMPTS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}],
    [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Tell me of the sea"}],
    [{"role": "user", "content": "Hi"}],
]
RESPONSES = ["Hello there", "Because.", "", "It is wet, and wide."]


@torch.inference_mode()
def alone(folder, texts: list[str]) -> list[float]:
    """The reward at the last token of each text by itself."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = [make_tokenizer()(text)["input_ids"] for text in texts]
    hidden = [model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    return [float(model.score(state)) for state in hidden]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_model_equals_one_by_one(tiny_reward, batch_size):
    reward = open_reward(RewardConfig(model=str(tiny_reward), batch_size=batch_size))
    texts = [
        Template(CHAT_TEMPLATE).render(messages=[*prompt, {"role": "assistant", "content": response}])
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert reward(PROMPTS, RESPONSES, [{}] * 4) == pytest.approx(alone(tiny_reward, texts), abs=1e-4)


@pytest.fixture(scope="module")
def bare_reward(tiny_reward, tmp_path_factory):
    """The same weights without padding token and chat template."""
    folder = tmp_path_factory.mktemp("bare-reward")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward)
    model.config.pad_token_id = None
    model.save_pretrained(folder)
    tokenizer = make_tokenizer(None)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 4])
def test_model_without_pad_token_and_chat_template(tiny_reward, bare_reward, batch_size):
    reward = open_reward(RewardConfig(model=str(bare_reward), batch_size=batch_size))
    texts = ["\n\n".join([*(t["content"] for t in p), r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert reward(PROMPTS, RESPONSES, [{}] * 4) == pytest.approx(alone(tiny_reward, texts), abs=1e-4)


@pytest.mark.parametrize("pad_id", [0, None])
def test_conversations_longer_than_the_context_keep_their_end(tiny_reward, pad_id):
    model = LlamaForSequenceClassification.from_pretrained(tiny_reward).eval()
    long = [5 + n % 200 for n in range(300)]
    found = score_token_ids(model, [long, long[-128:], [7]], pad_id, 3)
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0] != pytest.approx(found[2], abs=1e-2)


def test_a_response_that_ends_in_padding_tokens_is_scored_at_its_end(tiny_reward):
    """No padding token is named, and every small token id is in the batch."""
    model = LlamaForSequenceClassification.from_pretrained(tiny_reward).eval()
    sequences = [[5, 0, 0], [0, 1, 2, 3, 4, 6], [9]]
    with torch.inference_mode():
        hidden = [model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in sequences]
        expected = [float(model.score(state)) for state in hidden]
    assert score_token_ids(model, sequences, None, 3) == pytest.approx(expected, abs=1e-4)


def test_a_classifier_with_several_outputs_is_refused(tmp_path):
    LlamaForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 outputs"):
        open_reward(RewardConfig(model=str(tmp_path)))


def test_function_sees_metadata_if_it_asks():
    reward = open_reward(RewardConfig(function="tiny_rewards:known_answer"))
    assert reward(PROMPTS[:2], ["ab", "abc"], [{"wanted": "2"}, {"wanted": "2"}]) == [1.0, 0.0]


def test_function_by_hand():
    reward = open_reward(RewardConfig(function="tiny_rewards:average_byte"))
    assert reward(PROMPTS[:2], ["ac", ""], [{}, {}]) == [98.002, 0.0]  # a 97, c 99


@pytest.mark.parametrize(
    "function, words",
    [
        ("one_too_few", ["3 rewards for 4 responses"]),
        ("nan_once", ["nan", "'Hello there'", "finite", "iapo score"]),
        ("infinite", ["-inf", "finite"]),
        ("missing", ["no function missing"]),
        ("not_a_function", ["no function not_a_function"]),
    ],
)
def test_function_is_refused(function, words):
    with pytest.raises(UserError) as caught:
        open_reward(RewardConfig(function=f"tiny_rewards:{function}"))(PROMPTS, RESPONSES, [{}] * 4)
    for word in words:
        assert word in str(caught.value)


def test_missing_module_and_model(tmp_path):
    with pytest.raises(UserError, match="cannot import no_such_module"):
        open_reward(RewardConfig(function="no_such_module:f"))
    with pytest.raises(UserError, match="cannot be loaded"):
        open_reward(RewardConfig(model=str(tmp_path / "nothing")))


def test_stage_joins_rewards_to_their_responses(tmp_path, tiny_run, iapo):
    """An empty response has a reward like any other."""
    path = tiny_run(sample={"samples_per_prompt": 8, "temperature": 3.0})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score")] == [0, 0, 0]
    responses = read_table(tmp_path / "run" / "responses").to_pandas()
    rewards = read_table(tmp_path / "run" / "rewards").to_pandas()
    frame = responses.merge(rewards, on=["prompt_id", "sample_id"], validate="one_to_one")
    assert len(frame) == 160
    for row in frame.itertuples():
        data = row.response.encode()
        assert row.reward == (math.fsum(data) / len(data) + 0.001 * len(data) if data else 0.0)


@pytest.mark.parametrize("function", ["nan_once", "one_too_few", "no_such"])
def test_stage_refuses_and_keeps_the_samples(tmp_path, tiny_run, iapo, function):
    path = tiny_run(sample={"samples_per_prompt": 2}, reward={"function": f"tiny_rewards:{function}"})
    assert iapo("prompts", path).code == iapo("sample", path).code == 0
    outcome = iapo("score", path)
    assert (outcome.code, "Traceback" in outcome.err) == (2, False) and f"tiny_rewards:{function}" in outcome.err
    assert iapo("score", path, "--set", "reward.function=tiny_rewards:average_byte", "--restart").code == 0
    assert len(read_table(tmp_path / "run" / "rewards")) == 40


def test_a_reward_that_breaks_is_a_failure(tiny_run, iapo):
    path = tiny_run(sample={"samples_per_prompt": 2}, reward={"function": "tiny_rewards:raises"})
    assert iapo("prompts", path).code == iapo("sample", path).code == 0
    outcome = iapo("score", path)
    assert (outcome.code, "Traceback" in outcome.err) == (1, False) and "KeyError" in outcome.err
    assert "Traceback" in iapo("score", path, "--debug").err


@pytest.mark.parametrize(
    ("function", "reason"), [("raises", "KeyError"), ("nothing", "TypeError"), ("text", "ValueError")]
)
def test_a_function_that_fails_is_named(function, reason):
    with pytest.raises(StageError, match=f"tiny_rewards:{function} failed .{reason}.*one number a response"):
        open_reward(RewardConfig(function=f"tiny_rewards:{function}"))(PROMPTS, RESPONSES, [{}] * 4)


def test_a_module_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_rewards.py").write_text("undefined\n")
    with pytest.raises(UserError, match=r"cannot import broken_rewards.*NameError"):
        open_reward(RewardConfig(function="broken_rewards:f"))


def test_rewards_are_not_rounded_where_the_model_is(tiny_reward):
    """In bfloat16 a reward of its own precision would have 8 bits, and ties."""
    exact, rough = (open_reward(RewardConfig(model=str(tiny_reward), dtype=d)) for d in ("float32", "bfloat16"))
    responses = [f"response {number}" for number in range(64)]
    prompts, metadata = [PROMPTS[0]] * 64, [{}] * 64
    found = torch.tensor(rough(prompts, responses, metadata))
    assert (found != found.bfloat16()).float().mean() > 0.9
    assert torch.corrcoef(torch.stack([found, torch.tensor(exact(prompts, responses, metadata))]))[0, 1] > 0.99


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_encoders_keep_the_token_that_they_are_read_at(tmp_path, kind):
    """A conversation too long for them loses its beginning, but not that token; RoBERTa has two places fewer."""
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"cls_token": "<cls>"})
    tokenizer.model_max_length = 64
    shape = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 66 if kind == "roberta" else 64,
        "num_labels": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    make = {"bert": (BertConfig, BertForSequenceClassification)}
    make["roberta"] = (RobertaConfig, RobertaForSequenceClassification)
    configuration, model = make[kind]
    made = model(configuration(**shape)).eval()
    made.save_pretrained(tmp_path)
    beginning = processors.TemplateProcessing(single="<cls> $A", special_tokens=[("<cls>", tokenizer.cls_token_id)])
    tokenizer.backend_tokenizer.post_processor = beginning
    tokenizer.save_pretrained(tmp_path)
    long = "".join(chr(97 + n % 26) for n in range(100))
    ids = tokenizer("Hi\n\n" + long)["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and len(ids) > 64
    kept = torch.tensor([[ids[0], *ids[-63:]]])
    with torch.inference_mode():
        expected = made(input_ids=kept, attention_mask=torch.ones_like(kept)).logits.item()
    found = open_reward(RewardConfig(model=str(tmp_path)))([PROMPTS[0]], [long], [{}])
    assert found == pytest.approx([expected], abs=1e-5)
