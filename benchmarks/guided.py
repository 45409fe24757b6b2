"""A policy of many_responses.py that learns from one which sees the reward of a prefix with every next token.

    python benchmarks/guided.py FILE FOLDER --seconds 3600         # FILE: many_responses.py prepare's, of `hh`
    torchrun --nproc-per-node 2 benchmarks/guided.py FILE FOLDER   # on two cores, each with half of the prompts
    ... guided.py FILE FOLDER --policy NAME --begin FOLDER         # from an earlier one, of this or another KL
    python benchmarks/many_responses.py measure FOLDER hh [as for prepare]

The optimal policy is π*(a | y_<s) ∝ π_ref(a | y_<s) E[f | y_<s a], f being the closed form's density at the calibrated
reward of the whole response, E the mean over the reference's (so far controlled decoding, arXiv 2310.17022). A critic
of E[f] sees the reference's hidden state and the rewards of the prefix alone and with the token, as if they were whole.
Where the response ends with the token f is known. The critic learns at the policy's samples, from its own mean over
what may follow a prefix with the token. The policy is fitted to this teacher at the same prefixes (on-policy
distillation, as arXiv 2306.13649) by KL(π ‖ teacher) over all next tokens, which has no noise of the tokens that
happened to be drawn and of the rewards that they happened to bring. Needs no GPU.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.many_responses import policy_of  # noqa: E402
from benchmarks.many_samples import Prompts, Rewards, bigram_rewards  # noqa: E402
from benchmarks.next_rewards import NextRewards  # noqa: E402
from benchmarks.on_policy import HeldOut, Judge, judge_of  # noqa: E402
from benchmarks.stacked_llama import Llama, Stack, hidden_states, logits, native_dtype, normed, sample  # noqa: E402

KNOTS = (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Where the critic's functions of a reward bend, in standard deviations of the reference's from their mean."""
WIDTH, RANK = 256, 64
"""Of the critic: units of a layer, and of what a prefix and a token have to do with each other."""
RATE = 2e-3
"""Of the critic's steps at most."""
PROMPTS, SAMPLES = 64, 32
"""Drawn at a time: prompts, and responses to each."""
GROUPS, TOGETHER = 2, 16
"""In a step: groups, and responses of one prompt in a group. All of their prefixes are looked at, each once."""
FLOOR = -12.0
"""Nats; E[f] counts as no less."""


class Critic(nn.Module):
    """log E[f | y_<s a] − log max f of the reference's responses, at all tokens a or at one."""

    def __init__(self, hidden: int, length: int, tokens: int) -> None:
        super().__init__()
        self.length = length
        into, out = hidden + length + 1 + len(KNOTS), RANK + 1 + len(KNOTS) + 1
        layers = [nn.Linear(into, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, out)]
        self.body = nn.Sequential(*layers)
        self.tokens = nn.Parameter(0.05 * torch.randn(tokens, RANK + 1))

    def forward(self, hidden: Tensor, places: Tensor, now: Tensor, then: Tensor, tokens: Tensor | None) -> Tensor:
        """Logits of E[f] / max f [N, tokens], or [N, 1] of tokens [N].

        hidden [N, d] of prefixes of so many tokens [N]; now [N]: their rewards, then [N, tokens] or [N, 1]: those with
        the token, all in standard deviations.
        """
        bent = F.relu(now[:, None] - now.new_tensor(KNOTS))
        inputs = torch.cat([hidden, F.one_hot(places, self.length), now[:, None], bent], dim=-1)
        of_tokens, slopes, level = self.body(inputs).split([RANK, 1 + len(KNOTS), 1], dim=-1)
        if tokens is None:
            found = level + of_tokens @ self.tokens[:, :-1].T + self.tokens[:, -1]
        else:
            own = self.tokens[tokens]
            found = level + (of_tokens * own[:, :-1]).sum(-1, keepdim=True) + own[:, -1:]
        found = found + slopes[:, :1] * then
        for number, knot in enumerate(KNOTS, start=1):
            found = found + slopes[:, number : number + 1] * F.relu(then - knot)
        return found


@dataclass(frozen=True)
class Teacher:
    """The reference, what rewards it may still get, and the critic."""

    base: Llama
    judge: Judge
    next_rewards: NextRewards
    critic: Critic
    end: int

    def log_probs(self, rows: Tensor, places: Tensor, hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all next tokens [N, V], the teacher's and the reference's; and log E[f] of the prefixes [N].

        After the first places [N] of the rows [N, R], responses to the chosen prompts [N]; hidden [N, d].
        """
        rewards = torch.from_numpy(
            np.stack(
                [self.next_rewards(row[:place]) for row, place in zip(rows.tolist(), places.tolist(), strict=True)]
            )
        )
        then = standard(self.judge, rewards, chosen)
        found = F.logsigmoid(self.critic(hidden, places, then[:, self.end], then, None)) + self.judge.log_max()
        whole = places == rows.shape[1] - 1
        found[whole] = self.judge.log_f(rewards[whole], chosen[whole])
        found[:, self.end] = self.judge.log_f(rewards[:, [self.end]], chosen)[:, 0]
        plain = logits(self.base, hidden, None).log_softmax(-1)
        weighed = plain + found.clamp(min=FLOOR)
        values = weighed.logsumexp(-1)
        return weighed - values[:, None], plain, values


def standard(judge: Judge, rewards: Tensor, chosen: Tensor) -> Tensor:
    """Rewards [N, n] in standard deviations of the reference's from their mean, of each row's prompt [N]."""
    own = judge.reference[chosen]
    return ((rewards - own.mean(1, keepdim=True)) / own.std(1, keepdim=True)).float()


# --- The policy -----------------------------------------------------------------------------------------------------


class Own(NamedTuple):
    """The policy's responses [g, n, R] to the chosen prompts [g]; of their prefixes the reference's hidden states
    [g, n, R, d] and the rewards [g, n, R + 1] in standard deviations."""

    chosen: Tensor
    responses: Tensor
    hidden: Tensor
    rewards: Tensor

    def some(self, rows: Tensor, picked: Tensor) -> "Own":
        """Of prompts at rows [g] the responses picked [g, n]."""
        return Own(self.chosen[rows], *(part[rows[:, None], picked] for part in self[1:]))


def own_samples(policy: Llama, teacher: Teacher, prompts: Prompts, chosen: Tensor, length: int) -> Own:
    """SAMPLES to each of the chosen prompts [g]."""
    base, responses, hidden = teacher.base, [], []
    for some in chosen.split(8):
        own = prompts.some(some)
        responses.append(sample(policy, own.tokens, own.lengths, own.last, SAMPLES, length, teacher.end))
        batch = own.batch(torch.arange(len(some)), responses[-1].long())
        hidden.append(normed(base, hidden_states(base, batch, None)[0]))
    rows = torch.cat(responses)
    prefixes = prefix_rewards(teacher.judge.score, prompts.some(chosen), rows)
    return Own(chosen, rows, torch.cat(hidden), standard(teacher.judge, prefixes.flatten(1), chosen).view_as(prefixes))


def prefix_rewards(score: Rewards, prompts: Prompts, responses: Tensor) -> Tensor:
    """Rewards [G, M, R + 1] of the first 0 to R tokens of responses [G, M, R], as if they were whole."""
    found = []
    for place in range(responses.shape[2] + 1):
        prefix = responses.clone()
        prefix[..., place:] = -1
        found.append(score(prompts, prefix))
    return torch.stack(found, dim=-1)


def both_losses(teacher: Teacher, stack: Stack, prompts: Prompts, own: Own) -> tuple[Tensor, Tensor]:
    """Of the policy and the critic, means over prefixes.

    KL(π ‖ teacher) [2] over the next token, and the reference's. And the critic's logistic loss with the last token of
    a prefix, whose E[f] is known better behind it: as the reference's mean over what follows, f itself at the end.
    """
    base, (chosen, rows, hidden, rewards) = teacher.base, own
    open_ = rows >= 0
    prompt, response, place = open_.nonzero().T
    with torch.no_grad():
        wanted, plain, values = teacher.log_probs(rows[prompt, response], place, hidden[open_], chosen[prompt])
    later = place > 0
    before = (prompt[later], response[later], place[later] - 1)
    then = rewards[..., 1:][before][:, None]
    said = teacher.critic(hidden[before], before[2], rewards[before], then, rows[before].long())[:, 0]
    of_critic = F.binary_cross_entropy_with_logits(said, (values[later] - teacher.judge.log_max()).exp())
    batch = prompts.some(chosen).batch(torch.arange(len(chosen)), rows.long())
    policy = stack.merged(base, 0)  # a product for each layer, where adapters beside it would have three
    states = normed(base, hidden_states(policy, batch, None)[0][open_])
    found = logits(policy, states, None).log_softmax(-1)
    return torch.stack([(one.exp() * (one - wanted)).sum(-1).mean() for one in (found, plain)]), of_critic


def begin_at(stack: Stack, name: str, stored: dict[str, dict[str, Tensor]]) -> None:
    """At the one policy that is stored; scaled where the named one has less KL, which goes with a factor's square.

    Not where it has more: 1.8 times an adapter of best_of(16) spent 25 nats, where it had 0.2 (docs/log.md).
    """
    ((other, weights),) = stored.items()
    (*_, wanted), (*_, spent) = policy_of(name), policy_of(other)
    for layer, (a, b) in zip(stack.names, stack.pairs, strict=True):
        a.data[0] = weights[f"{layer}.lora_A"]
        b.data[0] = math.sqrt(min(wanted / spent, 1)) * weights[f"{layer}.lora_B"]


def store(out: Path, name: str, stack: Stack, critic: Critic) -> None:
    """The policy as `measure` reads it, and the critic, with which a policy that begins here goes on."""
    torch.save({name: stack.weights(0)}, out / "adapters0.pt")
    torch.save(critic.state_dict(), out / "critic.pt")


def take_step(optimizer: torch.optim.Optimizer, gradient: Sequence[Tensor]) -> None:
    """With the mean gradient of all processes, clipped at 1."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, own in zip(parameters, mean_of_processes(gradient), strict=True):
        parameter.grad = own
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def mean_of_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each of the tensors."""
    if not dist.is_initialized():
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def train(inputs: dict[str, Any], name: str, out: Path, args: argparse.Namespace) -> None:
    """Train for the time given, say how it goes on held-out prompts, store adapters and figures."""
    began = time.perf_counter()
    score = bigram_rewards(inputs["reward"])  # by other processes, which are made before there are threads
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tokenizer = Tokenizer.from_str(inputs["reward"]["tokenizer"])
    next_rewards = NextRewards(
        inputs["reward"]["bigrams"], [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
    )
    cpu, length, end = torch.device("cpu"), max(inputs["widths"]), inputs["end"]
    base = Llama.of(inputs["base"]["config"], inputs["base"]["weights"], native_dtype(), cpu)
    log_cdfs = inputs["log_cdfs"][inputs["policies"].index(name)][None]
    training, unseen = (Prompts.of(inputs["prompts"][split], cpu) for split in ("train", "holdout"))
    training = training.some(torch.arange(len(training.last))[rank::world])
    torch.manual_seed(args.seed)  # the same adapters and critic in all processes
    stack = Stack(base, 1, inputs["rank"], cpu, inputs["output_layer"])
    critic = Critic(base.norm.shape[0], length, len(base.output))
    if args.begin:
        begin_at(stack, name, torch.load(args.begin / "adapters0.pt"))
        critic.load_state_dict(torch.load(args.begin / "critic.pt"))
    torch.manual_seed(args.seed * world + rank)

    def say(text: str, **figures: Any) -> None:
        if rank == 0:
            seconds = time.perf_counter() - began
            print(f"{seconds:7.1f} s  {text}", *(f"{key} {value}" for key, value in figures.items()), flush=True)

    judge, responses = judge_of(base, score, training, log_cdfs, length, end, args.at_once)
    held_out = HeldOut(
        base, unseen, *judge_of(base, score, unseen, log_cdfs, length, end, args.at_once), end, args.at_once
    )
    say("sampled the reference", responses=responses.shape[0] * responses.shape[1])
    teacher = Teacher(base, judge, next_rewards, critic, end)
    optimizer = torch.optim.Adam(stack.leaves, lr=0.0, betas=(0.9, 0.99))
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=0.0, weight_decay=1e-3)
    step, seen, shown, history, kls = 0, 0, 0.0, [], torch.zeros(2)
    trained_from, spent = time.perf_counter(), 0.0
    while spent < 1:
        chosen = torch.randperm(len(training.last))[:PROMPTS]
        chosen = chosen[training.lengths[chosen].argsort()]  # what is of like length is sampled together
        with torch.no_grad():
            own = own_samples(stack.merged(base, 0), teacher, training, chosen, length)
        for rows, picked in groups(len(chosen)):
            share = (time.perf_counter() - trained_from) / (began + args.seconds - trained_from)
            spent = mean_of_processes([torch.tensor(share)])[0].item()
            if spent >= 1:
                break
            found, of_critic = both_losses(teacher, stack, training, own.some(rows, picked))
            pace = min(step / 50, 1) * (0.5 + 0.5 * math.cos(math.pi * spent))
            optimizer.param_groups[0]["lr"] = args.learning_rate * pace
            critic_optimizer.param_groups[0]["lr"] = RATE * pace
            take_step(optimizer, torch.autograd.grad(found[0], stack.leaves))
            take_step(critic_optimizer, torch.autograd.grad(of_critic, list(critic.parameters())))
            step, seen = step + 1, seen + world * picked.numel()
            kls = kls.lerp(found.detach(), max(0.01, 1 / step))
            if spent >= shown and rank == 0:
                figures = {"taught": round(1 - (kls[0] / kls[1]).item(), 4), **held_out.figures(stack.merged(base, 0))}
                history.append({"step": step, **figures})
                say("trained", seen=seen, **figures)
                store(out, name, stack, critic)
                shown += 1 / 4
    if rank > 0:
        return
    final = held_out.figures(stack.merged(base, 0))
    say("done", seen=seen, **final)
    store(out, name, stack, critic)
    figures = {"seconds": args.seconds, "processes": world, "policies": [name], "steps": step, "seen": seen}
    about = figures | {"held_out": [final["explained"]], "last": final, "history": history}
    (out / "log.json").write_text(json.dumps(about))
    print(json.dumps({"benchmark": "guided", **about}))


def groups(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps of GROUPS prompts [g] of so many, with TOGETHER of their responses [g, n], each response once."""
    each = SAMPLES // TOGETHER
    for some in torch.randperm(count * each).split(GROUPS):
        yield some // each, (some % each)[:, None] * TOGETHER + torch.arange(TOGETHER)


def main() -> None:
    """Read what is there, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--policy", help="its name; the first without")
    parser.add_argument("--begin", type=Path, help="folder of an earlier one, of any KL; the reference without")
    parser.add_argument("--seconds", type=float, default=3600, help="for so long, with what comes before training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--at-once", type=int, default=8192, help="responses that are sampled together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    inputs = torch.load(args.path)
    if "bigrams" not in inputs["reward"]:
        sys.exit(
            f"{args.path} has a reward model: give a file of `hh`, whose linear reward is known for every next token"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    train(inputs, args.policy or inputs["policies"][0], args.out, args)


if __name__ == "__main__":
    main()
