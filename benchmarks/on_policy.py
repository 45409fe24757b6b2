"""A policy of many_responses.py trained on with samples of its own, each seen once.

    python benchmarks/on_policy.py FILE FOLDER --start FOLDER ... --seconds 2400   # FILE: many_responses.py prepare's
    python benchmarks/many_responses.py measure FOLDER SETTING --sections '{"train": {"lora_rank": 192}}' [as before]

It begins at the mean of the weights of the policies in --start, which has less of the noise of each. The loss is
KL(π ‖ π*) = E_π[Δ − log f], whose gradient is the mean of Σ_s A_s ∇ log π(y_s | y_<s). The advantages A of tokens are
generalized ones (arXiv 1506.02438) of a critic: ridge regression of Δ − log f on what a prefix tells, which is its own
reward among the reference's, its log-ratio and its hidden state. On HH they have a fifth of the variance of Δ − log f,
which every token would have alone. All weights of the layers with an adapter are trained, by Muon with a cosine, and
stored as adapters whose rank is the hidden size (192 on HH). Needs no GPU.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.many_samples import Prompts, Rewards, bigram_rewards, draw, reward_model, targets_of  # noqa: E402
from benchmarks.stacked_llama import (  # noqa: E402
    Llama,
    by_block,
    hidden_states,
    layer_names,
    log_probs,
    normed,
    sample,
    token_log_probs,
)
from iapo.objectives import floored  # noqa: E402

PROMPTS, SAMPLES = 128, 128
"""Drawn at a time: prompts, and responses to each."""
GROUPS, TOGETHER = 4, 32
"""Groups in a step, and responses of one prompt in a group."""
LAMBDA = 0.85
"""How much of what later tokens bring counts for a token, per token between; 1 has no bias."""
CAP = 10.0
"""Nats; a response's Δ − log f counts up to here."""
TEMPER = 0.8
"""What log f is multiplied by. A fit this way ends above the KL of its target, on HH at 0.6 nats for 0.5 with 1."""
RIDGE, MEMORY = 1000.0, 0.85
"""Of the critic: its penalty, on features of variance 1, and what earlier samples weigh with each new drawing."""


@dataclass(frozen=True)
class Judge:
    """What says how good responses are: rewards, those of the reference [G, M], log F at j/M [1, M + 1]."""

    score: Rewards
    reference: Tensor
    log_cdfs: Tensor

    def log_f(self, rewards: Tensor, chosen: Tensor) -> Tensor:
        """log f [g, n] at rewards [g, n] of the chosen prompts [g]."""
        return targets_of(rewards, self.log_cdfs, self.reference[chosen][:, 1:])[0]

    def log_max(self) -> Tensor:
        """log f where it is highest."""
        rises = torch.log(-torch.expm1(self.log_cdfs[0, :-1] - self.log_cdfs[0, 1:]))
        return (self.log_cdfs[0, 1:] + rises).max().float() + math.log(self.log_cdfs.shape[1] - 1)

    def rank(self, rewards: Tensor, chosen: Tensor) -> Tensor:
        """The share of the reference's rewards below, within (0, 1)."""
        ordered = self.reference[chosen].sort(dim=1).values
        return (torch.searchsorted(ordered, rewards).float() + 0.5) / (ordered.shape[1] + 1)


@dataclass(frozen=True)
class Drawn:
    """Own samples: chosen prompts [g], responses [g, n, R], the reference's log-probs and the critic's increments."""

    chosen: Tensor
    responses: Tensor
    reference: Tensor
    increments: Tensor

    def groups(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Steps of GROUPS times TOGETHER responses, each response once."""
        prompts, samples = self.responses.shape[:2]
        places = torch.randperm(prompts * samples // TOGETHER, device=self.chosen.device)
        parts = [
            part.unflatten(1, (-1, TOGETHER)).flatten(0, 1)
            for part in (self.responses, self.reference, self.increments)
        ]
        for some in places.split(GROUPS):
            responses, reference, increments = (part[some] for part in parts)
            yield self.chosen[some // (samples // TOGETHER)], responses, reference, increments


class Critic:
    """Ridge regression at each number of tokens, on the samples of all drawings so far, the older the less."""

    def __init__(self) -> None:
        self.scales: dict[int, tuple[Tensor, Tensor]] = {}
        self.products: dict[int, tuple[Tensor, Tensor]] = {}
        self.weights: dict[int, Tensor] = {}

    def predict_then_learn(self, place: int, features: Tensor, wanted: Tensor) -> Tensor:
        """What earlier drawings say of features [N, F], zeros the first time; then learn what is wanted [N]."""
        if place not in self.scales:
            self.scales[place] = features.mean(0), features.std(0) + 1e-3
        mean, deviation = self.scales[place]
        x = (features - mean) / deviation
        found = x @ self.weights[place] if place in self.weights else torch.zeros_like(wanted)
        square, product = (x.T @ x).double(), (x.T @ wanted).double()
        if place in self.products:
            before = self.products[place]
            square, product = square + MEMORY * before[0], product + MEMORY * before[1]
        self.products[place] = square, product
        penalty = RIDGE * torch.eye(len(product), dtype=torch.double, device=x.device)
        self.weights[place] = torch.linalg.solve(square + penalty, product).float()
        return found


def increments(values: Tensor, log_f: Tensor, live: Tensor) -> Tensor:
    """V(y_≤s) − V(y_<s) of each token [..., R], 0 behind the last, V being what a token and later ones will cost.

    values [..., R]: V(y_<s), of the prefix before each token. log_f [...]: −V of the whole response. live [..., R].
    """
    end = -log_f[..., None]
    later = torch.cat([values[..., 1:], end], dim=-1)
    lives_on = F.pad(live[..., 1:], (0, 1), value=False)
    return torch.where(lives_on, later, end).sub(values) * live


def advantages(log_ratios: Tensor, rises: Tensor, decay: float) -> Tensor:
    """Σ_{k ≥ s} decay^{k − s} (Δ_k + V(y_≤k) − V(y_<k)) of each token s [..., R]: what it costs beyond expectation."""
    surprises = log_ratios + rises  # 0 behind the last token
    found, running = torch.empty_like(surprises), torch.zeros_like(surprises[..., 0])
    for place in reversed(range(surprises.shape[-1])):
        running = surprises[..., place] + decay * running
        found[..., place] = running
    return found


def of_prefix(judge: Judge, rewards: Tensor, chosen: Tensor, log_ratio: Tensor, hidden: Tensor) -> Tensor:
    """Features [g, n, F] of prefixes: their rewards [g, n] as if they were whole, Δ so far [g, n], states [g, n, d]."""
    rank = judge.rank(rewards, chosen)
    log_f = judge.log_f(rewards, chosen).clamp(min=-12)
    bounded = log_f.clamp(min=-6)
    of_rewards = [rank, rank**2, rank**3, (rank + 0.003).log(), log_f, bounded, log_f.clamp(min=-3)]
    of_both = [log_ratio, log_ratio**2, log_ratio * rank, log_ratio * bounded]
    return torch.cat([torch.stack([*of_rewards, *of_both], dim=-1), hidden], dim=-1)


@torch.no_grad()
def draw_own(
    policy: Llama, base: Llama, judge: Judge, critic: Critic, prompts: Prompts, chosen: Tensor, length: int, end: int
) -> Drawn:
    """Sample the policy, and let the critic judge each prefix by what it learned from earlier samples."""
    found = []
    for some in chosen.split(16):  # a forward pass of whole sequences takes more memory than a step of decoding
        responses = sample(
            policy, prompts.tokens[some], prompts.lengths[some], prompts.last[some], SAMPLES, length, end
        )
        batch, wanted = prompts.batch(some, responses.long()), responses.long()
        hidden, plain = hidden_states(policy, batch, None), hidden_states(base, batch, None)
        reference = token_log_probs(base, plain, wanted, None)[0]
        log_ratios = token_log_probs(policy, hidden, wanted, None)[0] - reference
        found.append((responses, reference, log_ratios, normed(policy, hidden[0])))
    responses, reference, log_ratios, hidden = (torch.cat(parts) for parts in zip(*found, strict=True))
    among = prompts.some(chosen)
    live, log_ratio = responses >= 0, log_ratios.sum(-1)
    log_f = TEMPER * judge.log_f(judge.score(among, responses).double(), chosen)
    cost = (log_ratio - log_f).clamp(-CAP, CAP)
    mean = cost.mean(1, keepdim=True)
    so_far = log_ratios.cumsum(-1) - log_ratios
    values = mean[..., None].repeat(1, SAMPLES, length)
    for place in range(1, length):
        on = live[..., place]
        if not on.any():
            break
        prefix = responses.clone()
        prefix[..., place:] = -1
        rewards = judge.score(among, prefix).double()
        features = of_prefix(judge, rewards, chosen, so_far[..., place], hidden[..., place, :])
        values[..., place][on] += critic.predict_then_learn(place, features[on], (cost - mean)[on])
    return Drawn(chosen, responses, reference, increments(values - so_far, log_ratio - cost, live))


def judge_of(
    base: Llama, score: Rewards, prompts: Prompts, log_cdfs: Tensor, length: int, end: int, at_once: int
) -> tuple[Judge, Tensor]:
    """Of M samples of the reference to each prompt, with these [G, M, R]; log_cdfs [1, M + 1]."""
    responses, rewards = draw(base, score, prompts, log_cdfs.shape[1] - 1, length, end, at_once)
    return Judge(score, rewards, log_cdfs), responses


@dataclass(frozen=True)
class HeldOut:
    """Prompts that nothing is trained on, and the reference's responses [G, M, R] to them."""

    base: Llama
    prompts: Prompts
    judge: Judge
    plain: Tensor
    end: int
    at_once: int

    @torch.no_grad()
    def figures(self, policy: Llama) -> dict[str, float]:
        """By 64 samples to each prompt: KL, KL(π ‖ π*); by as many of the reference's: what is explained of log f."""
        everyone = torch.arange(len(self.prompts.last), device=self.plain.device)
        own, rewards = draw(policy, self.judge.score, self.prompts, 64, self.plain.shape[2], self.end, self.at_once)
        ratio = self._log_ratios(policy, own)
        target = floored(self.judge.log_f(self.judge.reference, everyone)[:, :64])
        nothing = floored(torch.zeros_like(target))
        found = floored(self._log_ratios(policy, self.plain[:, :64]))
        explained = 1 - (found - target).square().sum() / (nothing - target).square().sum()
        figures = {"kl": ratio.mean(), "kl_to_target": (ratio - self.judge.log_f(rewards, everyone)).mean()}
        return {key: round(value.item(), 4) for key, value in (figures | {"explained": explained}).items()}

    def _log_ratios(self, policy: Llama, responses: Tensor) -> Tensor:
        found = []
        for some in torch.arange(len(responses), device=responses.device).split(16):
            wanted = responses[some].long()
            batch = self.prompts.batch(some, wanted)
            ours, plain = (log_probs(one, batch, wanted, None)[0] for one in (policy, self.base))
            found.append(ours - plain)
        return torch.cat(found)


def changed(base: Llama, changes: list[Tensor], dtype: torch.dtype) -> Llama:
    """The base with the changes of the layers in `layer_names`."""
    of_blocks, of_output = by_block(changes)
    blocks = [
        block | {name: (block[name] + change).to(dtype) for name, change in own.items()}
        for block, own in zip(base.blocks, of_blocks, strict=True)
    ]
    output = base.output if of_output is None else base.output + of_output
    return replace(base, blocks=blocks, output=output, dtype=dtype)


def mean_of(stored: list[dict[str, Tensor]], layers: list[str]) -> list[Tensor]:
    """The mean change B A of each layer."""
    return [
        torch.stack([own[f"{layer}.lora_B"] @ own[f"{layer}.lora_A"] for own in stored]).mean(0) for layer in layers
    ]


def as_adapters(changes: list[Tensor], layers: list[str]) -> dict[str, Tensor]:
    """Each change as B A, one of them the identity: whichever has the hidden size, which each layer has on one side."""
    found, hidden = {}, changes[0].shape[1]
    for layer, change in zip(layers, changes, strict=True):
        out, into = change.shape
        a, b = (torch.eye(into), change) if into == hidden else (change, torch.eye(out))
        found |= {f"{layer}.lora_A": a.clone(), f"{layer}.lora_B": b.clone()}
    return found


def train(
    inputs: dict[str, Any], name: str, start: list[dict[str, Tensor]], out: Path, args: argparse.Namespace
) -> None:
    """Train for the time given, say how it goes on held-out prompts, store adapters and figures."""
    began = time.perf_counter()
    score = bigram_rewards(inputs["reward"]) if "bigrams" in inputs["reward"] else None  # before there is CUDA
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.compiler.set_stance("force_eager")
    torch.manual_seed(args.seed)
    score = score or reward_model(inputs["reward"], inputs["end"], device)
    length, end = max(inputs["widths"]), inputs["end"]
    exact = Llama.of(inputs["base"]["config"], inputs["base"]["weights"], torch.float32, device)
    layers = layer_names(exact, inputs["output_layer"])
    changes = [change.to(device).requires_grad_() for change in mean_of(start, layers)]
    with torch.no_grad():
        base = changed(exact, [torch.zeros_like(change) for change in changes], dtype)
    training, unseen = (Prompts.of(inputs["prompts"][split], device) for split in ("train", "holdout"))
    log_cdfs = inputs["log_cdfs"][inputs["policies"].index(name)][None].to(device)

    def say(text: str, **figures: Any) -> None:
        print(f"{time.perf_counter() - began:7.1f} s  {text}", *(f"{k} {v}" for k, v in figures.items()), flush=True)

    of_training, _ = judge_of(base, score, training, log_cdfs, length, end, args.at_once)
    held_out = HeldOut(
        base, unseen, *judge_of(base, score, unseen, log_cdfs, length, end, args.at_once), end, args.at_once
    )
    optimizer = torch.optim.Muon(changes, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    critic, step, seen, history, shown = Critic(), 0, 0, [], 0.0
    say("sampled the reference")
    order = torch.empty(0, dtype=torch.long, device=device)
    trained_from, spent = time.perf_counter(), 0.0 if args.seconds else 1.0
    while spent < 1:
        if len(order) < min(PROMPTS, len(training.last)):
            order = torch.randperm(len(training.last), device=device)
        chosen, order = order[:PROMPTS], order[PROMPTS:]
        with torch.no_grad():
            policy = changed(exact, changes, dtype)
        for _ in range(1 if step else 2):  # what is drawn first only teaches the critic
            drawn = draw_own(policy, base, of_training, critic, training, chosen, length, end)
        for rows, responses, reference, rises in drawn.groups():
            wanted = responses.long()
            policy = changed(exact, changes, dtype)
            hidden = hidden_states(policy, training.batch(rows, wanted), None)
            found = token_log_probs(policy, hidden, wanted, None)[0]
            weighed = advantages(found.detach() - reference, rises, LAMBDA)
            gradient = torch.autograd.grad((weighed * found).sum(-1).mean(), changes)
            spent = (time.perf_counter() - trained_from) / (began + args.seconds - trained_from)
            if spent >= 1:
                break
            step, seen = step + 1, seen + responses.shape[0] * TOGETHER
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * min(step / 200, 1) * (0.5 + 0.5 * math.cos(math.pi * spent))
            for change, own in zip(changes, gradient, strict=True):
                change.grad = own
            optimizer.step()
            if spent >= shown:
                with torch.no_grad():
                    history.append({"step": step, **held_out.figures(changed(exact, changes, dtype))})
                say("trained", seen=seen, **history[-1])
                shown += 1 / 8
    with torch.no_grad():
        final = held_out.figures(changed(exact, changes, dtype))
    say("done", seen=seen, **final)
    out.mkdir(parents=True, exist_ok=True)
    torch.save({name: as_adapters([change.detach().cpu() for change in changes], layers)}, out / "adapters0.pt")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    figures = {"device": device_name, "seconds": args.seconds, "policies": [name], "steps": step, "seen": seen}
    about = figures | {"held_out": [final["explained"]], "last": final, "history": history}
    (out / "log.json").write_text(json.dumps(about))
    print(json.dumps({"benchmark": "on_policy", **about}))


def main() -> None:
    """Read what is there, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, nargs="+", required=True, help="folders of adapters, of which the mean")
    parser.add_argument("--policy", help="its name; the first without")
    parser.add_argument("--seconds", type=float, default=2400, help="for so long; 0: only the mean")
    parser.add_argument("--learning-rate", type=float, default=4e-5)
    parser.add_argument("--at-once", type=int, default=8192, help="responses that are sampled together")
    parser.add_argument("--seed", type=int, default=0, help="another for each training that is to be averaged")
    args = parser.parse_args()
    inputs = torch.load(args.path)
    name = args.policy or inputs["policies"][0]
    stored = [
        own[name] for folder in args.start for file in folder.glob("adapters*.pt") if name in (own := torch.load(file))
    ]
    if len(stored) != len(args.start):
        sys.exit(f"{len(stored)} of {len(args.start)} folders in --start have {name!r}: give folders that do")
    train(inputs, name, stored, args.out, args)


if __name__ == "__main__":
    main()
