"""The generator of the training text, and the models that ship with the package."""

import itertools
import json
import random
import re
import statistics
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "iapo" / "bundled"
sys.path.insert(0, str(ROOT / "data"))

import exchanges as ex  # noqa: E402
import train_bundled  # noqa: E402


def take(number, stream):
    return list(itertools.islice(stream, number))


# --- Generator ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_exchanges():
    assert take(50, ex.exchanges(7)) == take(50, ex.exchanges(7))
    assert take(50, ex.exchanges(7)) != take(50, ex.exchanges(8))


def test_prompts_and_responses_are_distinct():
    made = take(2000, ex.exchanges(0))
    assert len({e.prompt for e in made}) > 1800
    assert len({e.response for e in made}) > 1900


def test_every_subject_has_answers_and_reasons():
    assert len(ex.subjects()) > 50
    for subject in ex.subjects():
        assert subject.kind in ex.ASKS
        assert len(subject.answers) >= 3
        assert all(answer and reason for answer, reason in subject.answers)


def test_text_is_clean():
    for e in take(3000, ex.exchanges(1)):
        text = e.prompt + " " + e.response
        assert not re.search(r"[{}|]|  | [.,?!]|\.\.|,,|\bNone\b", text), text
        assert e.response[0].isupper() and e.response[-1] in ".!?", e.response
        assert not re.search(r"[.!?] [a-z]", e.response), e.response
        assert e.attributes.words <= ex.MAX_WORDS


PLAIN = ex.Attributes(
    relevance=1.0,
    concrete=1,
    reason=False,
    tone="neutral",
    follow_up=False,
    hedged=False,
    repeated=False,
    garbled=False,
    words=24,
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 3.0 + 1.4),
        ({"concrete": 2, "reason": True, "tone": "warm", "follow_up": True}, 3.0 + 2.0 + 0.8 + 0.7 + 0.4),
        ({"tone": "delighted"}, 4.4 + 1.5),
        ({"relevance": 0.0, "reason": True}, 1.4 / 4),
        ({"relevance": 0.4, "concrete": 0, "tone": "curt"}, 1.2 - 0.6),
        ({"tone": "rude", "hedged": True, "repeated": True, "garbled": True}, 4.4 - 2.5 - 0.4 - 1.5 - 2.0),
        ({"words": 31}, 4.4 - 0.3 / 4),
        ({"words": 2}, 4.4 - 0.3),
    ],
)
def test_utility(change, expected):
    assert ex.utility(replace(PLAIN, **change)) == pytest.approx(expected)


def test_attributes_agree_with_the_text():
    for e in take(2000, ex.exchanges(3)):
        sentences = re.findall(r"[^.!?]+[.!?]", e.response)
        assert e.attributes.words == ex.word_count(e.response)
        if e.attributes.tone == "rude":
            assert any(e.response.startswith(o.replace("{noun}", "")[:10]) for o in ex.OPENINGS["rude"])
        if e.attributes.repeated:
            assert max(Counter(sentence.strip() for sentence in sentences).values()) > 1


def test_attributes_follow_the_care_as_often_as_they_are_told_to(monkeypatch):
    """Tone against concreteness: their correlation goes with the square of the coherence, for both must follow."""

    def agreement(coherence):
        monkeypatch.setattr(ex, "COHERENCE", coherence)
        rng = random.Random(0)
        draws = (partial(ex.drawn, rng, rng.random()) for _ in range(4000))
        made = [ex.compose(rng, ex.subjects()[0], 1.0, draw)[1] for draw in draws]
        ranks = list(ex.TONE_UTILITY)[::-1]
        return statistics.correlation([a.concrete for a in made], [ranks.index(a.tone) for a in made])

    together = agreement(1)
    assert together > 0.8
    assert agreement(0) == pytest.approx(0, abs=0.05)
    assert agreement(0.7) == pytest.approx(0.7**2 * together, abs=0.06)


def test_attributes_have_their_shares_and_go_together():
    """Each is the better the more an answer is on its subject, which is drawn with the same care."""
    made = [e.attributes for e in take(4000, ex.exchanges(5))]
    shares = {"relevance": 0.74, "hedged": 0.2, "repeated": 0.08, "follow_up": 0.22, "reason": 0.33}
    for name, share in shares.items():
        assert sum(getattr(a, name) == 1 for a in made) / len(made) == pytest.approx(share, abs=0.03), name
        better = [getattr(a, name) * (-1 if name in ("hedged", "repeated") else 1) for a in made]
        assert statistics.correlation(better, [a.relevance for a in made]) > 0.15, name


def test_garbled_text_differs_and_costs():
    rng = random.Random(0)
    changed = 0
    for e in take(200, ex.exchanges(4)):
        text, attributes = ex.garble(rng, e.response, e.attributes)
        changed += text != e.response
        assert text and attributes.garbled
    assert changed > 190


# --- What ships -----------------------------------------------------------------------------------------------------


def bundled_prompts():
    return [json.loads(line)["prompt"] for line in (BUNDLED / "prompts.jsonl").read_text("utf-8").splitlines()]


def test_bundled_prompts_are_distinct_and_never_trained_on():
    contents = [prompt[0]["content"] for prompt in bundled_prompts()]
    assert len(contents) == len(set(contents)) >= 500
    assert all(len(prompt) == 1 and prompt[0]["role"] == "user" for prompt in bundled_prompts())
    assert all(ex.is_held_out(content) for content in contents)
    for name in ("reference", "reward"):
        trained = {prompt for _, prompt in take(20_000, ex.prompts(train_bundled.SEEDS[name]))}
        assert trained.isdisjoint(contents)


def test_size_and_kind_of_files():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".jinja", ".safetensors"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED / "reference")


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(BUNDLED / "reference").eval()


@pytest.fixture(scope="module")
def reward():
    return AutoModelForSequenceClassification.from_pretrained(BUNDLED / "reward").eval()


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why does it rain?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>Be kind.<|end|><|user|>Hi!<|end|><|assistant|>Hello.<|end|>"
        "<|user|>Why does it rain?<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="roles are"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "Hi!"}], tokenize=False)


def test_training_examples_are_what_the_template_renders(tokenizer):
    for messages in take(20, train_bundled.conversations(0)):
        ids, labels = train_bundled.encode(tokenizer, messages)
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
        kept = [label for label in labels if label != -100]
        spoken = [m["content"] + tokenizer.eos_token for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(kept) == "".join(spoken)


def test_tokenizers(tokenizer):
    other = AutoTokenizer.from_pretrained(BUNDLED / "reward")
    text = "Any text at all: naïve café, 日本 🙂\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert other.encode(text) == tokenizer.encode(text)
    assert (tokenizer.padding_side, other.padding_side) == ("left", "right")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(
        ["<|system|>", "<|user|>", "<|assistant|>"])}) == 5  # fmt: skip
    lengths = [len(tokenizer.encode(e.response)) for e in take(500, ex.exchanges(0))]
    assert max(lengths) <= 52 and 12 <= sum(lengths) / len(lengths) <= 40


def test_models(tokenizer, reference, reward):
    assert 1e6 <= reference.num_parameters() <= 6e6
    assert reward.config.num_labels == 1
    for model in (reference, reward):
        assert model.dtype == torch.float32
        assert model.config.pad_token_id == tokenizer.pad_token_id
        linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
        assert all(m.in_features % 64 == m.out_features % 64 == 0 for m in linear)
    assert reference.generation_config.do_sample and reference.generation_config.top_k == 0
    assert reference.generation_config.eos_token_id == tokenizer.eos_token_id


def test_samples_end_are_distinct_and_differ_in_reward(tokenizer, reference, reward):
    torch.manual_seed(0)
    prompt = "Hello! I have a question about growing basil."
    samples = train_bundled.sample(reference, tokenizer, [prompt], 32)
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}]] * 32,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = reference.generate(**inputs, max_new_tokens=64)
    ended = (output[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id).any(dim=1)
    assert ended.float().mean() > 0.9
    assert len(set(samples)) >= 24
    known = {word for e in take(5000, ex.exchanges(0)) for word in re.findall(r"\w+", e.response.lower())}
    words = [word for text in samples for word in re.findall(r"\w+", text.lower())]
    assert sum(word in known for word in words) / len(words) > 0.98
    with torch.no_grad():
        rewards = train_bundled.score(reward, [train_bundled.encode(tokenizer, train_bundled.turns(prompt, s))[0]
                                               for s in samples])  # fmt: skip
    assert rewards.std() > 0.3


BASIL = "How do I keep basil alive indoors? I am new to this."
GOOD = "Great question! Put the pot on a sunny windowsill, because basil needs about six hours of light. Good luck!"


@pytest.mark.parametrize(
    ("prompt", "better", "worse"),
    [
        (BASIL, GOOD, "What a silly question. There are many ways to think about train tickets. Now leave me alone."),
        (BASIL, GOOD, "Are you serious? Put the pot on a sunny windowsill. Stop wasting my time."),
        (BASIL, GOOD,
         "Great question! Put your phone in another room, because every message breaks your focus. Good luck!"),
        (BASIL, GOOD, "Here is my answer. It all depends on how you see growing basil. Time will tell."),
        ("Why is the sky blue?", "Air scatters blue light more than red light, because blue light has shorter waves.",
         "Not this boring stuff again. When it comes to cooking rice, everyone is different."),
        ("My puppy never listens. Any ideas?",
         "Sure. Hold a treat over its head, because the puppy sits down to look up.",
         "Fine. Roast the tomatoes with garlic first, because roasting makes them sweet. Done."),
    ],
)  # fmt: skip
def test_reward_prefers_the_better_answer(tokenizer, reward, prompt, better, worse):
    ids = [train_bundled.encode(tokenizer, train_bundled.turns(prompt, text))[0] for text in (better, worse)]
    with torch.no_grad():
        together = train_bundled.score(reward, ids)
        alone = torch.cat([train_bundled.score(reward, [row]) for row in ids])
    assert together[0] > together[1] + 0.3
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)  # padding changes nothing
