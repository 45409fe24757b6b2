"""guided.py and next_rewards.py at toy size, against rewards of whole texts and against enumeration."""

import argparse
import importlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from iapo.closed_form import solve
from iapo.config import TrainConfig
from iapo.train import add_adapter

ROOT = Path(__file__).parents[1]
TEXTS = ["<pad>", "<end>", " so", " Good", "b", "ad", "!", "!!", " x"]
WEIGHTS = {"good": 1.0, "b": 0.2, "bad": -1.5, "so good": 0.7, "good !": 0.4, "! !": -0.3, "! >": 0.25, "< so": 0.1}
WEIGHTS |= {"sob": 0.6, "goodbad": 0.35, "x bad": 0.9, "bad >": -0.2, "so bad": 0.15, "!": 0.05, "< >": -0.8}


@pytest.fixture
def guided(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.guided")


@pytest.fixture
def inputs(guided):
    """As many_responses.py prepare makes them: a small base and a linear reward on words of nine tokens."""
    many = importlib.import_module("benchmarks.many_responses")
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=9, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=1, **sizes)
    tokenizer = Tokenizer(models.WordLevel({text: number for number, text in enumerate(TEXTS)}, unk_token="<pad>"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in TEXTS[:2]])
    tokenizer.decoder = decoders.Fuse()
    form, edges = solve("worst_of(4)", target_kl=0.5), np.linspace(0, 1, 257)
    prompts = [[2, 3, 4], [5, 2, 6, 8, 3], [2, 7, 7, 4], [8, 2]]
    return {
        "base": many.stored(LlamaForCausalLM(config).eval()),
        "reward": {"bigrams": WEIGHTS, "tokenizer": tokenizer.to_str()},
        "prompts": {"train": prompts, "holdout": prompts[:2]},
        "end": 1,
        "widths": (4,),
        "rank": 8,
        "output_layer": True,
        "policies": ["optimal worst_of(4) 0.5"],
        "log_cdfs": many.log_cdf(form.log_mean_density(edges[:-1], edges[1:]))[None],
    }


def decoded(tokens):
    return "".join(TEXTS[token] for token in tokens if token > 1)


def test_rewards_of_all_next_tokens_are_those_of_the_texts(guided):
    rewards = importlib.import_module("benchmarks.hh_rewards")
    found = guided.NextRewards(WEIGHTS, ["", "", *TEXTS[2:]])
    for length in range(4):
        for prefix in itertools.product(range(2, 9), repeat=length):
            texts = [decoded([*prefix, token]) for token in range(9)]
            expected = [sum(WEIGHTS.get(one, 0.0) for one in rewards.features(text)) for text in texts]
            assert found(prefix).tolist() == pytest.approx(expected, abs=1e-9), prefix
    with pytest.raises(AssertionError):
        guided.NextRewards(WEIGHTS, ["a b"])


def laid_out(guided, inputs):
    """The reference, training prompts, their judge with 256 samples to each, and these."""
    base = guided.Llama.of(*inputs["base"].values(), torch.float32, torch.device("cpu"))
    prompts = guided.Prompts.of(inputs["prompts"]["train"], torch.device("cpu"))
    score = guided.bigram_rewards(inputs["reward"])
    return base, prompts, *guided.judge_of(base, score, prompts, inputs["log_cdfs"], 4, 1, 256)


def branches(base, guided, prompts, row, length):
    """Every prefix of open responses to a prompt, with the reference's log-probs of all next tokens."""
    found = {}
    for place in range(length):
        prefixes = list(itertools.product([0, *range(2, 9)], repeat=place))
        padded = torch.tensor([[*one, *[-1] * (length - place)] for one in prefixes])[None]
        batch = prompts.batch(torch.tensor([row]), padded)
        states = guided.normed(base, guided.hidden_states(base, batch, None)[0, 0, :, place])
        log_probs = guided.logits(base, states[None], None)[0].log_softmax(-1)
        found |= {one: (state, own) for one, state, own in zip(prefixes, states, log_probs, strict=True)}
    return found


def distances(guided, teacher, prompts, row):
    """KL(π_ref ‖ π*) and KL(teacher ‖ π*) over all responses to a prompt, and the log-probs along the way."""
    base, judge, next_rewards = teacher.base, teacher.judge, teacher.next_rewards
    tree = branches(base, guided, prompts, row, 4)
    rows = torch.tensor([[*prefix, *[5] * (4 - len(prefix))] for prefix in tree])  # what comes later must not matter
    places = torch.tensor([len(prefix) for prefix in tree])
    states, plain = (torch.stack(parts) for parts in zip(*tree.values(), strict=True))
    taught, again, _ = teacher.log_probs(rows, places, states, torch.full_like(places, row))
    assert torch.allclose(plain, again, atol=1e-6) and taught.logsumexp(-1).abs().max() < 1e-5
    lines = {prefix: (own, theirs) for prefix, own, theirs in zip(tree, taught, plain, strict=True)}
    ends = [(*prefix, 1) for prefix in tree]
    ends += [(*prefix, last) for prefix in tree if len(prefix) == 3 for last in [0, *range(2, 9)]]
    ours, reference, rewards = [], [], []
    for response in ends:
        steps = [(lines[response[:place]], token) for place, token in enumerate(response)]
        ours.append(sum(own[token] for (own, _), token in steps))
        reference.append(sum(theirs[token] for (_, theirs), token in steps))
        rewards.append(next_rewards([token for token in response if token > 1])[1])
    ours, reference = torch.stack(ours).double(), torch.stack(reference).double()
    assert ours.exp().sum().item() == pytest.approx(1, abs=1e-4)
    log_f = judge.log_f(torch.tensor(rewards)[None], torch.tensor([row]))[0].clamp(min=guided.FLOOR)
    optimal = (reference + log_f).log_softmax(0)
    return *((one.exp() * (one - optimal)).sum().item() for one in (reference, ours)), lines


def test_the_teacher_comes_near_the_optimal_policy(guided, inputs):
    """From nothing but its own next values and f where responses end, at samples of a policy that stays as it is.

    By enumeration: KL(teacher ‖ π*) is a small part of KL(π_ref ‖ π*); it is exact where nothing follows.
    """
    base, prompts, judge, _ = laid_out(guided, inputs)
    critic, next_rewards = guided.Critic(16, 4, 9), guided.NextRewards(WEIGHTS, ["", "", *TEXTS[2:]])
    teacher, row = guided.Teacher(base, judge, next_rewards, critic, 1), 1
    stack = guided.Stack(base, 1, 8, torch.device("cpu"), True)
    optimizer, steps = torch.optim.AdamW(critic.parameters(), weight_decay=1e-3), 400
    far, before, _ = distances(guided, teacher, prompts, row)
    for step in range(steps):
        if step % 40 == 0:
            with torch.no_grad():
                own = guided.own_samples(base, teacher, prompts, torch.arange(4), 4)
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        _, of_critic = guided.both_losses(teacher, stack, prompts, own)
        guided.take_step(optimizer, torch.autograd.grad(of_critic, list(critic.parameters())))
    _, after, lines = distances(guided, teacher, prompts, row)
    assert far > 1 and after < min(0.03 * far, 0.3 * before)
    last = (2, 3, 6)  # the ratios of the last token's probabilities are those of f
    own, theirs = lines[last]
    known = judge.log_f(torch.tensor(next_rewards(last))[None], torch.tensor([row]))[0].clamp(min=guided.FLOOR)
    assert torch.allclose(own, (theirs + known).log_softmax(0), atol=1e-5)


def test_the_critic_is_asked_about_the_last_token_of_each_prefix(guided, inputs, monkeypatch):
    base, prompts, judge, _ = laid_out(guided, inputs)
    asked = []

    class Recorder(guided.Critic):
        def forward(self, hidden, places, now, then, tokens):
            if tokens is not None:
                asked.extend(zip(places.tolist(), now.tolist(), then[:, 0].tolist(), tokens.tolist(), strict=True))
            return super().forward(hidden, places, now, then, tokens)

    next_rewards = guided.NextRewards(WEIGHTS, ["", "", *TEXTS[2:]])
    teacher = guided.Teacher(base, judge, next_rewards, Recorder(16, 4, 9), 1)
    own = guided.own_samples(base, teacher, prompts, torch.tensor([2, 0]), 4)
    guided.both_losses(teacher, guided.Stack(base, 1, 8, torch.device("cpu"), True), prompts, own)
    expected = []
    for prompt, rows in zip([2, 0], own.responses.tolist(), strict=True):
        for row in rows:
            for place in range(row.index(-1) - 1 if -1 in row else 3):
                said = [next_rewards(row[:place])[1], next_rewards([*row[:place], row[place]])[1]]
                now, then = guided.standard(judge, torch.tensor([said]), torch.tensor([prompt]))[0].tolist()
                expected.append((place, now, then, row[place]))
    assert len(asked) == len(expected) > 64
    assert np.allclose(asked, expected, atol=1e-4)


def test_the_critic_bends_with_the_reward_and_is_the_same_at_one_token_and_at_all(guided):
    critic, (hidden, now) = guided.Critic(16, 4, 9), (torch.randn(5, 16), torch.randn(5))
    then, places = 2 * torch.randn(5, 9), torch.tensor([0, 1, 2, 2, 3])
    found = critic(hidden, places, now, then, None)
    bent = [[one, *(max(one - knot, 0) for knot in guided.KNOTS)] for one in now.tolist()]
    inputs = torch.cat([hidden, torch.eye(4)[places], torch.tensor(bent)], dim=-1)
    for row, out in enumerate(critic.body(inputs)):
        for token in range(9):
            vector, bias = critic.tokens[token, :-1], critic.tokens[token, -1]
            one = then[row, token]
            steps = torch.stack([one, *((one - knot).clamp(min=0) for knot in guided.KNOTS)])
            expected = out[-1] + out[: guided.RANK] @ vector + bias + out[guided.RANK : -1] @ steps
            assert found[row, token].item() == pytest.approx(expected.item(), abs=1e-4)
    for token in range(9):
        single = critic(hidden, places, now, then[:, [token]], torch.full((5,), token))
        assert torch.allclose(single[:, 0], found[:, token], atol=1e-5)


def test_rewards_of_prefixes_are_those_of_their_texts(guided, inputs):
    _, prompts, judge, responses = laid_out(guided, inputs)
    found = guided.prefix_rewards(judge.score, prompts, responses[:, :6])
    features = importlib.import_module("benchmarks.hh_rewards").features
    for row, number, place in np.ndindex(4, 6, 5):
        text = decoded(responses[row, number, :place].tolist())
        expected = sum(WEIGHTS.get(one, 0.0) for one in features(text))
        assert found[row, number, place].item() == pytest.approx(expected, abs=1e-6)


def test_what_the_critic_says_is_on_the_scale_of_f(guided, inputs):
    base, _, judge, _ = laid_out(guided, inputs)
    form = solve("worst_of(4)", target_kl=0.5)
    assert judge.log_max().item() == pytest.approx(form.log_mean_density([255 / 256], [1.0])[0], abs=1e-5)
    next_rewards = guided.NextRewards(WEIGHTS, ["", "", *TEXTS[2:]])
    half = guided.Teacher(base, judge, next_rewards, lambda *rest: torch.zeros(1, 9), 1)
    hidden, row = torch.randn(1, 16), torch.tensor([2])
    own, plain, _ = half.log_probs(torch.tensor([[2, 3, -1, -1]]), torch.tensor([2]), hidden, row)
    ended = judge.log_f(torch.tensor([[next_rewards([2, 3])[1]]]), row).item()
    rises = (own - plain)[0]
    assert (rises[3] - rises[1]).item() == pytest.approx(judge.log_max().item() - np.log(2) - ended, abs=1e-4)


def test_steps_go_through_all_own_samples(guided):
    seen = Counter()
    for rows, picked in guided.groups(6):
        assert picked.shape == (len(rows), guided.TOGETHER)
        seen.update((row, one) for row, own in zip(rows.tolist(), picked.tolist(), strict=True) for one in own)
    assert seen == dict.fromkeys(itertools.product(range(6), range(guided.SAMPLES)), 1)


def test_a_policy_learns_from_the_teacher(guided, inputs, tmp_path, capsys, monkeypatch):
    ticks = itertools.count(step=0.1)
    monkeypatch.setattr(guided, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    args = argparse.Namespace(seconds=60, learning_rate=1e-2, at_once=1024, seed=0, begin=None)
    guided.train(inputs, inputs["policies"][0], tmp_path, args)
    about = json.loads((tmp_path / "log.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1] == json.dumps({"benchmark": "guided", **about})
    first, last = about["history"][0], about["last"]
    assert first["taught"] == pytest.approx(0, abs=0.02) and about["history"][-1]["taught"] > 0.5
    assert first["kl"] == pytest.approx(0, abs=0.02) and last["kl"] > 0.1
    assert last["kl_to_target"] < 0.6 * first["kl_to_target"] and last["explained"] > 0.2
    stored = torch.load(tmp_path / "adapters0.pt")[inputs["policies"][0]]
    config = LlamaConfig.from_dict(inputs["base"]["config"])
    policy = add_adapter(LlamaForCausalLM(config), TrainConfig(lora_rank=8, output_layer=True))
    weights = {f"base_model.model.{part}.default.weight": value for part, value in stored.items()}
    assert not policy.load_state_dict(weights, strict=False).unexpected_keys
    assert set(weights) == {part for part in policy.state_dict() if "lora_" in part}

    base = guided.Llama.of(*inputs["base"].values(), torch.float32, torch.device("cpu"))
    stack = guided.Stack(base, 1, 8, torch.device("cpu"), True)
    for kl, factor in ((0.125, 0.5), (2, 1)):  # a quarter of the nats; and four times as many, which is not scaled to
        guided.begin_at(stack, f"optimal worst_of(4) {kl}", torch.load(tmp_path / "adapters0.pt"))
        begun = stack.weights(0)
        assert begun.keys() == stored.keys()
        factors = {part: factor if "lora_B" in part else 1 for part in stored}
        assert all(torch.allclose(begun[part], factors[part] * own) for part, own in stored.items())
    assert stack.adapters.output[1].abs().sum() > 0  # what the products have is what was read

    critics = []

    class Kept(guided.Critic):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            critics.append((self, self.tokens.detach().clone()))

    monkeypatch.setattr(guided, "Critic", Kept)
    again = argparse.Namespace(**vars(args) | {"seconds": 3, "begin": tmp_path})
    (tmp_path / "again").mkdir()
    guided.train(inputs, inputs["policies"][0], tmp_path / "again", again)
    begun = json.loads((tmp_path / "again" / "log.json").read_text())["history"][0]
    assert begun["kl"] == pytest.approx(last["kl"], abs=0.1)
    assert begun["explained"] == pytest.approx(last["explained"], abs=0.02)
    ((critic, made),) = critics  # it begins where that of the policy ended, and learns while the policy does
    stored = torch.load(tmp_path / "critic.pt")["tokens"]
    assert 0 < (critic.tokens - stored).norm() < 0.5 * (critic.tokens - made).norm()


def test_two_processes_train_one_policy(inputs, tmp_path):
    torch.save(inputs, tmp_path / "inputs.pt")
    given = [str(tmp_path / "inputs.pt"), str(tmp_path / "out"), "--seconds", "25", "--at-once", "1024"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "benchmarks/guided.py", *given]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    about = json.loads((tmp_path / "out" / "log.json").read_text())
    assert about["processes"] == 2 and about["seen"] == 64 * about["steps"]
    assert about["last"]["kl_to_target"] < about["history"][0]["kl_to_target"]


def test_a_reward_model_is_refused(guided, inputs, tmp_path, monkeypatch):
    torch.save(inputs | {"reward": inputs["base"]}, tmp_path / "inputs.pt")
    monkeypatch.setattr("sys.argv", ["guided", str(tmp_path / "inputs.pt"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="has a reward model: give a file of `hh`"):
        guided.main()
