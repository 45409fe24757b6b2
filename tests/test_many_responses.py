"""many_responses.py and on_policy.py at toy size, against transformers, peft, enumeration and one at a time."""

import argparse
import importlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

from iapo.closed_form import solve
from iapo.config import TrainConfig
from iapo.score import score_token_ids
from iapo.train import add_adapter


@pytest.fixture
def many(monkeypatch):
    """benchmarks.many_responses and many_samples with a small base, a reward model, and prompts of 3 to 5 tokens."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    module = importlib.import_module("benchmarks.many_responses")
    samples = importlib.import_module("benchmarks.many_samples")
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=9, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=1, **sizes)
    reward_config = LlamaConfig(vocab_size=9, num_labels=1, initializer_range=0.3, pad_token_id=0, **sizes)
    base, reward = LlamaForCausalLM(config).eval(), LlamaForSequenceClassification(reward_config).eval()
    prompts = [[2, 3, 4], [5, 2, 6, 8, 3], [2, 7, 7, 4]]
    return module, samples, base.requires_grad_(False), reward.requires_grad_(False), prompts


def plain_rows(prompts, responses):
    """Prompt, number and tokens of every response."""
    for row, own in enumerate(responses.tolist()):
        for number, tokens in enumerate(own):
            yield row, number, prompts[row], [token for token in tokens if token >= 0]


@pytest.mark.parametrize("output_layer", [False, True])
def test_many_policies_at_once_have_the_log_probs_of_each_alone(many, output_layer):
    module, samples, base, _, prompts = many
    cpu = torch.device("cpu")
    stored = module.stored(base)
    llama = module.Llama.of(stored["config"], stored["weights"], torch.float32, cpu)
    stack = module.Stack(llama, 3, 4, cpu, output_layer)
    laid = samples.Prompts.of(prompts, cpu)
    responses = samples.sample(llama, laid.tokens, laid.lengths, laid.last, 6, 7, 1)
    batch, wanted = laid.batch(torch.arange(3), responses.long()), responses.long()
    reference = module.log_probs(llama, batch, wanted, None)[0]
    for _ in range(3):
        loss = (module.log_probs(llama, batch, wanted, stack.adapters) - reference - 1).square().mean()
        stack.step(loss, torch.tensor(0.1), torch.tensor(0.001))
    found = module.log_probs(llama, batch, wanted, stack.adapters)
    assert (found - reference).abs().amax((1, 2)).min() > 0.1 and (found[1] - found[2]).abs().max() > 0.01
    policy = add_adapter(base, TrainConfig(lora_rank=4, output_layer=output_layer))
    for number in range(3):
        merged = module.log_probs(stack.merged(llama, number), batch, wanted, None)[0]
        assert (merged - found[number]).abs().max() < 1e-4
        slopes = (torch.autograd.grad(one.sum(), stack.leaves, retain_graph=True) for one in (merged, found[number]))
        assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(*slopes, strict=True))
        own = stack.weights(number)
        weights = {f"base_model.model.{name}.default.weight": value for name, value in own.items()}
        assert not policy.load_state_dict(weights, strict=False).unexpected_keys
        for row, place, prompt, tokens in plain_rows(prompts, responses):
            ids = torch.tensor([prompt + tokens])
            alone = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert found[number, row, place].item() == pytest.approx(
                alone[range(len(tokens)), tokens].sum().item(), abs=1e-4
            )


def test_many_responses_are_sampled_and_rewarded_as_one_by_one(many):
    module, samples, base, reward, prompts = many
    cpu = torch.device("cpu")
    stored, judge = module.stored(base), module.stored(reward)
    llama = module.Llama.of(stored["config"], stored["weights"], torch.float32, cpu)
    laid = samples.Prompts.of(prompts, cpu)
    torch.manual_seed(0)
    responses = samples.sample(llama, laid.tokens, laid.lengths, laid.last, 20_000, 3, 1)
    for row, prompt in enumerate(prompts):  # frequencies of whole responses beside their probabilities
        drawn, counts = responses[row].unique(dim=0, return_counts=True)
        some = counts.topk(20).indices
        for tokens, count in zip(drawn[some].tolist(), counts[some].tolist(), strict=True):
            tokens = [token for token in tokens if token >= 0]
            assert 1 not in tokens[:-1] and (len(tokens) == 3 or tokens[-1] == 1)
            logits = base(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            share = logits.log_softmax(-1)[range(len(tokens)), tokens].sum().exp().item()
            assert abs(count / 20_000 - share) < 5 * (share / 20_000) ** 0.5
    few = responses[:, :50]
    found = samples.reward_model(judge, 1, cpu)(laid, few)
    assert {
        few[row, place].max().item() == 1 or 1 in few[row, place].tolist() for row in range(3) for place in range(50)
    } == {
        True,
        False,
    }
    whole = [prompt + tokens + [1] * (tokens[-1] != 1) for _, _, prompt, tokens in plain_rows(prompts, few)]
    assert found.flatten().tolist() == pytest.approx(score_token_ids(reward, whole, 0, 32), abs=1e-5)


def test_a_relative_path_is_of_the_folder_that_one_is_in(many, tmp_path, monkeypatch):
    module, seen = importlib.import_module("benchmarks.many_responses"), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "measure", lambda folder, prefix, args: seen.append((folder, args.out)))
    monkeypatch.setattr("sys.argv", ["many_responses", "measure", "trained", "bundled", "--out", "runs"])
    module.main()
    assert seen == [(tmp_path / "trained", tmp_path / "runs" / "bundled-0")]


def test_targets_and_groups_of_many_responses(many):
    module, samples = many[:2]
    forms = [solve("best_of(4)", target_kl=0.5), solve("worst_of(16)", target_kl=0.5)]
    edges = np.linspace(0, 1, 65)
    tables = torch.stack([module.log_cdf(form.log_mean_density(edges[:-1], edges[1:])) for form in forms])
    rewards = torch.stack([torch.randperm(64).double(), torch.arange(64) // 4])  # the second in ties of four
    targets = samples.targets_of(rewards, tables)
    for number, form in enumerate(forms):
        low = rewards[0].numpy() / 64
        assert targets[number, 0].numpy() == pytest.approx(form.log_mean_density(low, low + 1 / 64), rel=1e-5, abs=1e-6)
        low = rewards[1].numpy() / 16
        assert targets[number, 1].numpy() == pytest.approx(form.log_mean_density(low, low + 1 / 16), rel=1e-5, abs=1e-6)
    # Other responses have the targets that they would have in the place of one of the 64.
    others = torch.tensor([[-1.0, 20.5, 99.0], [-1.0, 3.0, 99.0]], dtype=torch.float64)
    targets = samples.targets_of(others, tables, rewards[:, 1:])
    for number, column in np.ndindex(2, 3):
        stood_in = torch.cat([others[:, [column]], rewards[:, 1:]], dim=1)
        expected = samples.targets_of(stood_in, tables)[number, :, 0]
        assert targets[number, :, column].tolist() == pytest.approx(expected.tolist(), rel=1e-6)

    responses = torch.full((2, 40, 8), -1, dtype=torch.int16)
    for row, place in np.ndindex(2, 40):
        responses[row, place, : 1 + (5 * place + row) % 8] = 3
    short, long = samples.blocks_of(responses, (5, 8))
    for block, shortest in ((short, 1), (long, 6)):
        lengths = [
            (responses[row, place] >= 0).sum().item() for row, *places in block.groups.tolist() for place in places
        ]
        assert min(lengths) >= shortest and max(lengths) <= block.width
        pairs = [(row, place) for row, *places in block.groups.tolist() for place in places]
        assert len(set(pairs)) == len(pairs)
    assert len(short.groups) == 2 * (25 // 8) and len(long.groups) == 2 * (15 // 8)
    assert short.share == 5 / 8 and short.in_step == 20 and long.in_step == 12
    steps = short.endless(4)  # six groups, of which every one comes twice in three steps
    assert torch.cat([next(steps) for _ in range(3)]).unique(dim=0, return_counts=True)[1].tolist() == [2] * 6
    assert len(next(short.endless(9))) == 9


def test_own_samples_take_the_place_of_half_the_responses(many):
    module, samples, base, _, prompts = many
    cpu = torch.device("cpu")
    stored = module.stored(base)
    llama = module.Llama.of(stored["config"], stored["weights"], torch.float32, cpu)
    always_one = replace(llama, output=200 * llama.output)
    laid = samples.Prompts.of(prompts, cpu)

    def score(_, responses):
        return responses.clamp(min=0).sum(-1).double()  # exact, with ties

    form, edges = solve("best_of(4)", target_kl=0.5), np.linspace(0, 1, 41)
    table = module.log_cdf(form.log_mean_density(edges[:-1], edges[1:]))[None]
    responses, rewards = samples.draw(llama, score, laid, 40, 5, 1, 30)
    targets = samples.targets_of(rewards, table)
    before, targets_before = responses.clone(), targets.clone()
    samples.put_own_samples(responses, targets, [always_one, llama], score, laid, rewards[:, 1:], table, 1, 30)
    assert torch.equal(responses[:, 20:], before[:, 20:]) and torch.equal(targets[..., 20:], targets_before[..., 20:])
    kinds = [[len(own[:10].unique(dim=0)), len(own[10:20].unique(dim=0))] for own in responses]
    assert all(of_one == 1 and of_other > 5 for of_one, of_other in kinds)
    found = score(laid, responses)
    for row, place in np.ndindex(3, 20):
        stood_in = torch.cat([found[row, [place]], rewards[row, 1:]])[None]
        expected = samples.targets_of(stood_in, table)[0, 0, 0]
        assert targets[0, row, place].item() == pytest.approx(expected.item(), abs=1e-6)


def test_training_on_many_responses_stores_what_peft_loads(many, tmp_path, capsys, monkeypatch):
    module, _, base, reward, prompts = many
    form = solve("best_of(4)", target_kl=0.5)
    edges = np.linspace(0, 1, 257)
    inputs = {
        "base": module.stored(base),
        "reward": module.stored(reward),
        "prompts": {"train": prompts, "holdout": prompts[:2]},
        "end": 1,
        "widths": (3, 6),
        "rank": 2,
        "output_layer": False,
        "policies": [f"optimal best_of(4) {number}" for number in range(1, 6)],
        "log_cdfs": module.log_cdf(form.log_mean_density(edges[:-1], edges[1:])).expand(5, -1),
    }
    options = {"seconds": 6, "learning_rate": 1e-2, "at_once": 64, "seed": 0, "prefix": "a-", "rounds": 2}
    ticks = itertools.count(step=0.1)  # so that it is as many steps on a slow machine
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    module.train(inputs, tmp_path, argparse.Namespace(**options))
    assert capsys.readouterr().out.count("sampled the policies") == 2
    about = json.loads((tmp_path / "a-log.json").read_text())
    assert about["steps"] > 0 and len(about["held_out"]) == 5 and np.isfinite(about["held_out"]).all()
    stored = [torch.load(tmp_path / f"a-adapters{start}.pt") for start in (0, 4)]
    assert [len(part) for part in stored] == [4, 1]
    policy = add_adapter(base, TrainConfig(lora_rank=2))
    first, second = (stored[0][name] for name in inputs["policies"][:2])
    weights = {f"base_model.model.{name}.default.weight": value for name, value in first.items()}
    assert set(weights) == {name for name in policy.state_dict() if "lora_" in name}
    quality = importlib.import_module("benchmarks.quality")
    args = quality.parse(["bundled", "--procedures", "best_of(4)", "--out", str(tmp_path)])
    run = args.out / "iapo-optimal-best-of-4-1"
    policy.load_state_dict(weights, strict=False)
    policy.save_pretrained(run / "adapter")
    module.require_same(run / "adapter", first)
    with pytest.raises(SystemExit, match="of another training"):
        module.require_same(run / "adapter", second)
    last = list(weights)[-1]
    policy.load_state_dict({last: weights[last] + 1}, strict=False)  # the rest are alike
    policy.save_pretrained(run / "adapter")
    (run / "manifests").mkdir()
    (run / "manifests" / "train.json").write_text("{}")
    with pytest.raises(SystemExit, match="of another training"):
        module.measure(tmp_path, "a-", args)


@pytest.fixture
def on_policy(many):
    return importlib.import_module("benchmarks.on_policy")


@pytest.mark.parametrize("critic, decay", [("any", 1.0), ("exact", 0.5), ("exact", 0.0)])
def test_advantages_give_the_gradient_of_the_kl_to_the_target(on_policy, critic, decay):
    """By enumeration of responses of up to 3 of 3 tokens, of which 0 ends them: whatever the critic, or with any λ."""
    generator = torch.Generator().manual_seed(0)
    responses = [r for n in (1, 2, 3) for r in itertools.product(range(3), repeat=n) if 0 not in r[:-1]]
    responses = torch.tensor([[*r, *[-1] * (3 - len(r))] for r in responses if len(r) == 3 or r[-1] == 0])
    live = responses >= 0
    prefixes = sorted({tuple(own[:n]) for own in responses.tolist() for n in range(3) if min(own[:n], default=1) > 0})
    assert len(responses) == 1 + 2 + 4 * 3 and len(prefixes) == 1 + 2 + 4  # none goes on behind its end
    row = {prefix: number for number, prefix in enumerate(prefixes)}
    places = torch.tensor([[row.get(tuple(own[:n]), 0) for n in range(3)] for own in responses.tolist()])
    logits = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.double).requires_grad_()
    reference = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.double).log_softmax(-1)
    log_f = torch.randn(len(responses), generator=generator, dtype=torch.double)

    def of_tokens(table):
        return table[places].gather(-1, responses.clamp(min=0)[..., None])[..., 0] * live

    log_probs, plain = of_tokens(logits.log_softmax(-1)), of_tokens(reference)
    share = log_probs.sum(-1).exp()
    assert share.sum().item() == pytest.approx(1)
    (expected,) = torch.autograd.grad((share * ((log_probs - plain).sum(-1) - log_f)).sum(), logits, retain_graph=True)
    ratios = (log_probs - plain).detach()
    values = torch.randn(len(prefixes), generator=generator, dtype=torch.double)[places]
    if critic == "exact":
        for prefix, number in row.items():
            below = [tuple(own[: len(prefix)]) == prefix for own in responses.tolist()]
            to_go = ratios[:, len(prefix) :].sum(-1) - log_f
            values[live & (places == number)] = (share * to_go)[below].sum().detach() / share[below].sum().detach()
    found = on_policy.advantages(ratios, on_policy.increments(values, log_f, live), decay)
    (gradient,) = torch.autograd.grad((share.detach() * (found * log_probs).sum(-1)).sum(), logits)
    assert gradient.flatten().tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-9)
    assert expected.abs().max() > 0.01


def test_later_tokens_count_less_the_further_off_they_are(on_policy):
    found = on_policy.advantages(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 2.0, -3.0]), 0.5)
    assert found.tolist() == [1 + 4 / 2 + 1 / 4, 4 + 1 / 2, 1]


def test_the_critic_says_what_earlier_samples_taught(on_policy, monkeypatch):
    monkeypatch.setattr(on_policy, "RIDGE", 1e-3)
    critic, generator = on_policy.Critic(), torch.Generator().manual_seed(0)
    first, second, other = (torch.randn(200, 3, generator=generator) * 5 for _ in range(3))
    weights = torch.tensor([1.0, -2.0, 0.5])
    centre = first.mean(0)
    assert critic.predict_then_learn(2, first, (first - centre) @ weights).abs().max() == 0
    found = critic.predict_then_learn(2, second, (second - centre) @ weights)
    assert found.tolist() == pytest.approx(((second - centre) @ weights).tolist(), abs=1e-3)
    assert critic.predict_then_learn(3, other, other @ weights).abs().max() == 0  # of another place
    features = (torch.cat([first, second]) - centre) / (first.std(0) + 1e-3)
    wanted = torch.cat([(first - centre) @ weights, (second - centre) @ weights])
    critic.predict_then_learn(2, other, -other @ weights)  # what was taught before weighs less
    features, wanted = (
        torch.cat([features, (other - centre) / (first.std(0) + 1e-3)]),
        torch.cat([wanted, -other @ weights]),
    )
    shares = (0.85 ** torch.tensor([2.0, 1.0, 0.0])).repeat_interleave(200).sqrt()
    expected = torch.linalg.lstsq(features * shares[:, None], wanted * shares).solution
    assert critic.weights[2].tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_own_samples_are_judged_by_what_their_tokens_cost(many, on_policy):
    """From any token on, cost to go and expected cost add up to Δ − 0.8 log f less the prompt's mean."""
    module, samples, base, reward, prompts = many
    cpu, stored = torch.device("cpu"), module.stored(base)
    plain = module.Llama.of(stored["config"], stored["weights"], torch.float32, cpu)
    policy = replace(plain, embedding=plain.embedding * 1.3)
    laid, score = samples.Prompts.of(prompts, cpu), samples.reward_model(module.stored(reward), 1, cpu)
    form, edges = solve("worst_of(4)", target_kl=0.5), np.linspace(0, 1, 65)
    table = module.log_cdf(form.log_mean_density(edges[:-1], edges[1:]))[None]
    rewards = samples.draw(plain, score, laid, 64, 6, 1, 64)[1]
    judge, critic, chosen = on_policy.Judge(score, rewards, table), on_policy.Critic(), torch.tensor([2, 0])
    among = laid.some(chosen)  # padded alike: ranks of equal responses hang on a reward's last digit
    for number in range(2):
        drawn = on_policy.draw_own(policy, plain, judge, critic, laid, chosen, 6, 1)
        wanted, live = drawn.responses.long(), drawn.responses >= 0
        batch = laid.batch(chosen, wanted)
        ours, theirs = (
            on_policy.token_log_probs(one, on_policy.hidden_states(one, batch, None), wanted, None)[0]
            for one in (policy, plain)
        )
        assert torch.equal(theirs, drawn.reference)
        log_f = samples.targets_of(score(among, drawn.responses).double(), table, rewards[chosen][:, 1:])[0]
        cost = ((ours - theirs).sum(-1) - 0.8 * log_f).clamp(-10, 10)
        expected = (cost - cost.mean(1, keepdim=True))[..., None] * live
        found = on_policy.advantages(ours - theirs, drawn.increments, 1.0)
        assert torch.allclose(found[..., 0], expected[..., 0], atol=1e-4)
        rest = (found - expected)[..., 1:][live[..., 1:]]
        if number:  # what the critic learned from the first drawing, and it is right about some of it
            assert found[live].square().mean() < 0.9 * expected[live].square().mean()
        else:
            assert rest.abs().max() < 1e-4
    alike = {}  # what a token is expected to bring is known by then, whatever follows
    for row, place in np.ndindex(2, 128):
        for count in range(2, int(live[row, place].sum())):
            prefix = (row, *drawn.responses[row, place, :count].tolist())
            alike.setdefault(prefix, []).append(drawn.increments[row, place, count - 1].item())
    spreads = [max(rises) - min(rises) for rises in alike.values() if len(rises) > 1]
    assert len(spreads) > 10 and max(spreads) < 1e-4
    rows = []
    for chosen_rows, responses, reference, rises in drawn.groups():
        batch, wanted = laid.batch(chosen_rows, responses.long()), responses.long()
        again = on_policy.token_log_probs(plain, on_policy.hidden_states(plain, batch, None), wanted, None)[0]
        assert torch.allclose(again, reference, atol=1e-5) and reference.shape == rises.shape
        rows += [*zip(responses.flatten(0, 1).tolist(), rises.flatten(0, 1).tolist(), strict=True)]
    every = zip(drawn.responses.flatten(0, 1).tolist(), drawn.increments.flatten(0, 1).tolist(), strict=True)
    assert sorted(rows) == sorted(every)
    ranks = on_policy.Judge(score, torch.tensor([[3.0, 1.0, 2.0]]), table).rank(
        torch.tensor([[0.0, 1.5, 9.0]]), torch.tensor([0])
    )
    assert ranks[0].tolist() == [0.5 / 4, 1.5 / 4, 3.5 / 4]


@pytest.mark.parametrize("output_layer", [False, True])
def test_changes_of_weights_are_adapters_of_the_hidden_size(many, on_policy, output_layer):
    module, _, base = many[:3]
    llama = module.Llama.of(*module.stored(base).values(), torch.float32, torch.device("cpu"))
    layers = on_policy.layer_names(llama, output_layer)
    wholes = [base.get_submodule(layer).weight for layer in layers]
    changes = [torch.randn_like(whole) for whole in wholes]
    policy = on_policy.changed(llama, changes, torch.float32)
    assert torch.equal(policy.output, llama.output + changes[-1] if output_layer else llama.output)
    place = layers.index("model.layers.1.mlp.up_proj")
    assert torch.equal(policy.blocks[1]["mlp.up_proj"], wholes[place] + changes[place])
    stored = on_policy.as_adapters(changes, layers)
    assert {stored[f"{layer}.lora_A"].shape[0] for layer in layers} == {16}
    for change, found in zip(changes, on_policy.mean_of([stored], layers), strict=True):
        assert torch.allclose(found, change, atol=1e-6)


def test_training_on_own_samples_comes_nearer_to_the_target(many, on_policy, tmp_path, capsys, monkeypatch):
    module, _, base, reward, prompts = many
    form, edges = solve("worst_of(4)", target_kl=0.5), np.linspace(0, 1, 257)
    inputs = {
        "base": module.stored(base),
        "reward": module.stored(reward),
        "prompts": {"train": prompts, "holdout": prompts},
        "end": 1,
        "widths": (3, 6),
        "output_layer": True,
        "policies": ["optimal best_of(4) 9", "optimal worst_of(4) 0.5"],
        "log_cdfs": torch.stack(
            [torch.zeros(257).double(), module.log_cdf(form.log_mean_density(edges[:-1], edges[1:]))]
        ),
    }
    name = inputs["policies"][1]
    llama = module.Llama.of(*inputs["base"].values(), torch.float32, torch.device("cpu"))
    plain = module.Stack(llama, 1, 2, "cpu", output_layer=True)
    ticks = itertools.count(step=0.1)
    monkeypatch.setattr(on_policy, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    args = argparse.Namespace(seconds=25, learning_rate=1e-2, at_once=1024, seed=0)
    draw_own, drawn_for = on_policy.draw_own, []
    monkeypatch.setattr(on_policy, "draw_own", lambda *rest: drawn_for.append(rest[5]) or draw_own(*rest))
    on_policy.train(inputs, name, [plain.weights(0)], tmp_path, args)
    assert drawn_for[0] is drawn_for[1] and drawn_for[1] is not drawn_for[2]  # the first for the critic alone
    about = json.loads((tmp_path / "log.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1] == json.dumps({"benchmark": "on_policy", **about})
    assert about["last"]["kl_to_target"] < 0.7 * about["history"][0]["kl_to_target"]
    assert about["history"][0]["explained"] == pytest.approx(0, abs=0.01) and about["last"]["explained"] > 0.2
    assert about["last"]["kl"] > 0.1 and about["history"][0]["kl"] == pytest.approx(0, abs=0.02)
    stored = torch.load(tmp_path / "adapters0.pt")[name]
    policy = add_adapter(base, TrainConfig(lora_rank=16, output_layer=True))
    weights = {f"base_model.model.{part}.default.weight": value for part, value in stored.items()}
    assert not policy.load_state_dict(weights, strict=False).unexpected_keys
    assert set(weights) == {part for part in policy.state_dict() if "lora_" in part}
    layers = sorted({part.rsplit(".", 1)[0] for part in stored})
    for mean, layer in zip(on_policy.mean_of([stored, plain.weights(0)], layers), layers, strict=True):
        change = stored[f"{layer}.lora_B"] @ stored[f"{layer}.lora_A"]
        assert change.abs().max() > 1e-3 and torch.allclose(mean, change / 2)
    # Without time it is the mean alone; without the policy it says so.
    (tmp_path / "plain").mkdir()
    torch.save({name: plain.weights(0)}, tmp_path / "plain" / "adapters0.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    given = ["on_policy", *map(str, (tmp_path / "inputs.pt", tmp_path / "mean", "--seconds", 0, "--start"))]
    monkeypatch.setattr("sys.argv", [*given, str(tmp_path), str(tmp_path / "plain"), "--policy", name])
    on_policy.main()
    mean = torch.load(tmp_path / "mean" / "adapters0.pt")[name]
    assert all(
        torch.allclose(mean[f"{one}.lora_B"] @ mean[f"{one}.lora_A"], change / 2, atol=1e-6)
        for one in layers
        for change in [stored[f"{one}.lora_B"] @ stored[f"{one}.lora_A"]]
    )
    monkeypatch.setattr("sys.argv", [*given, str(tmp_path)])
    with pytest.raises(SystemExit, match="0 of 1 folders in --start have 'optimal best_of"):
        on_policy.main()
