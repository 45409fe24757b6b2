"""How near its closed form a fit comes with millions of responses: sampled, rewarded and trained on by one GPU.

    python benchmarks/many_responses.py prepare FILE SETTING --policies "optimal best_of(4) 0.5" ... [as quality.py]
    python benchmarks/many_responses.py train FILE FOLDER --seconds 240                 # on a GPU; torch is enough
    python benchmarks/many_responses.py measure FOLDER SETTING [as quality.py]          # where it was prepared

`iapo train` waits for Python when a model has 2.5 M parameters. Here the same loss (`objectives.pointwise`) with
LoRA on the same layers runs as a CUDA graph, all policies at once on the same responses, until --seconds are over: Adam
with a cosine, gradients clipped at 1, steps of 256 responses, products in bfloat16. Reward models score the tokens as
sampled. FILE holds models, prompts and log F of each policy. With --rounds half of the responses are replaced, so
often in the second half of the time, by as many of the policies' own, whose targets are those of their places among
the reference's: least squares are right for any distribution, so all policies learn from all. On a CPU the products
are in float32 and nothing is compiled.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hh_rewards import WEIGHTS_VARIABLE  # noqa: E402
from benchmarks.many_samples import (  # noqa: E402
    TOGETHER,
    Prompts,
    bigram_rewards,
    blocks_of,
    draw,
    put_own_samples,
    reward_model,
    targets_of,
)
from benchmarks.stacked_llama import Llama, Stack, log_probs  # noqa: E402
from iapo.objectives import floored  # noqa: E402

HELD_OUT = 1024
"""Samples of each held-out prompt, of which the first 64 tell the explained variance."""
IN_FILE = 4
"""Policies stored in one file."""
WIDTHS = {"bundled": (32, 64), "hh": (16,)}
"""Tokens that short and long responses are padded to."""


# --- Before: what the GPU needs -------------------------------------------------------------------------------------


def prepare(path: Path, args: argparse.Namespace, policies: list[str], samples: int) -> None:
    """Run the stages before training, if they are not done, and store models, prompts and log F."""
    from benchmarks import quality
    from iapo.closed_form import solve
    from iapo.models import end_token_ids, load_base, load_reward, load_tokenizer, prompt_token_ids
    from iapo.store import read_table

    config = quality.configuration(args, args.out / "samples", quality.OPTIMAL, args.procedures[0], args.kls[0])
    for stage in quality.BEFORE_TRAINING:
        quality.run_stage(stage, config)
    base, tokenizer = load_base(config.model), load_tokenizer(config.model)
    (end,) = end_token_ids(base, tokenizer)
    sampled = set(read_table(config.run / "quantiles.parquet")["prompt_id"].to_pylist())
    prompts: dict[str, list[list[int]]] = {"train": [], "holdout": []}
    for row in read_table(config.run / "prompts.parquet").to_pylist():
        if row["prompt_id"] in sampled:
            prompts[row["split"]].append(prompt_token_ids(tokenizer, row["prompt"]))
    edges = np.linspace(0, 1, samples + 1)
    ranks = (edges[:-1], edges[1:])
    forms = [solve(procedure, None, transform, target_kl=kl) for transform, procedure, kl in map(policy_of, policies)]
    if config.reward.model:
        reward: dict[str, Any] = stored(load_reward(config.reward)[0])
    else:
        weights = json.loads(Path(os.environ[WEIGHTS_VARIABLE]).read_text())
        reward = {"bigrams": weights, "tokenizer": tokenizer.backend_tokenizer.to_str()}
    inputs = {
        "base": stored(base),
        "reward": reward,
        "prompts": prompts,
        "end": end,
        "widths": WIDTHS[args.setting],
        "rank": config.train.lora_rank,
        "output_layer": config.train.output_layer,
        "policies": policies,
        "log_cdfs": torch.stack([log_cdf(form.log_mean_density(*ranks)) for form in forms]),
    }
    torch.save(inputs, path)
    print({name: len(part) for name, part in prompts.items()}, inputs["policies"], path.stat().st_size)


def policy_of(text: str) -> tuple[str, str, float]:
    """Transform, procedure and KL."""
    transform, procedure, kl = text.split()
    return transform, procedure, float(kl)


def log_cdf(log_means: Any) -> Tensor:
    """log F at j/M [M + 1] from the log means of f over M equal ranks; deep in its tail F itself is 0."""
    masses = torch.tensor(log_means) - math.log(len(log_means))
    return torch.cat([torch.tensor([-math.inf], dtype=torch.float64), masses.logcumsumexp(0)])


def stored(model: Any) -> dict[str, Any]:
    return {"config": model.config.to_dict(), "weights": model.state_dict()}


# --- On the GPU -----------------------------------------------------------------------------------------------------


def train(inputs: dict[str, Any], out: Path, args: argparse.Namespace) -> None:
    """Sample, reward, train for the time given, measure on held-out prompts, store adapters and figures."""
    start = time.perf_counter()
    score = bigram_rewards(inputs["reward"]) if "bigrams" in inputs["reward"] else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.compiler.set_stance("force_eager")  # but for the step, whose shapes are always the same
    torch.manual_seed(args.seed)

    def say(text: str, **figures: Any) -> None:
        print(f"{time.perf_counter() - start:7.1f} s  {text}", *(f"{k} {v}" for k, v in figures.items()), flush=True)

    base = inputs["base"]
    products = torch.bfloat16 if device.type == "cuda" else torch.float32
    llama = Llama.of(base["config"], base["weights"], products, device)
    exact = Llama.of(base["config"], base["weights"], torch.float32, device)
    score = score or reward_model(inputs["reward"], inputs["end"], device)
    training, unseen = (Prompts.of(inputs["prompts"][split], device) for split in ("train", "holdout"))
    length, end, log_cdfs = max(inputs["widths"]), inputs["end"], inputs["log_cdfs"].to(device)
    samples, count = log_cdfs.shape[1] - 1, len(inputs["policies"])
    responses, rewards = draw(exact, score, training, samples, length, end, args.at_once)
    say("sampled and rewarded", responses=responses.shape[0] * responses.shape[1])
    targets = targets_of(rewards, log_cdfs)
    held_out, held_out_rewards = draw(exact, score, unseen, min(samples, HELD_OUT), length, end, args.at_once)
    held_out_targets = targets_of(held_out_rewards, log_cdfs[:, :: samples // held_out.shape[1]])[:, :, :64]
    held_out = held_out[:, :64]
    blocks = blocks_of(responses, inputs["widths"])
    in_step = [block.in_step for block in blocks]  # a graph has the same shapes throughout
    shares = torch.tensor([block.share for block in blocks], device=device)
    say("grouped", blocks=[(len(block.groups), block.width, block.in_step, round(block.share, 3)) for block in blocks])

    stack = Stack(llama, count, inputs["rank"], device, inputs["output_layer"])
    pace, correction = torch.zeros((), device=device), torch.ones((), device=device)
    endless = [block.endless(number) for block, number in zip(blocks, in_step, strict=True)]
    chosen = [next(steps).clone() for steps in endless]
    errors = torch.zeros(2, count, device=device)  # squared ones of Δ, and of 0
    nothing = floored(torch.zeros((), device=device))

    def log_ratios(prompts: Prompts, rows: Tensor, wanted: Tensor) -> Tensor:
        batch = prompts.batch(rows, wanted)
        with torch.no_grad():
            reference = log_probs(llama, batch, wanted, None)
        return log_probs(llama, batch, wanted, stack.adapters) - reference

    def one_step() -> None:
        losses = []
        for width, share, own in zip(inputs["widths"], shares, chosen, strict=True):
            rows, picked = own[:, 0], own[:, 1:]
            wanted = responses[rows[:, None], picked, :width].long()
            target = floored(targets[:, rows[:, None], picked])
            loss = (floored(log_ratios(training, rows, wanted)) - target).square().mean((1, 2))
            losses.append(share * loss)
            errors.add_(share * torch.stack([loss.detach(), (target - nothing).square().mean((1, 2))]))
        stack.step(torch.stack(losses).sum(), pace, correction)

    def explained() -> list[float]:
        squares = torch.zeros(2, count, device=device)
        with torch.no_grad():
            for rows in torch.arange(len(held_out), device=device).split(16):
                target = floored(held_out_targets[:, rows])
                found = floored(log_ratios(unseen, rows, held_out[rows].long()))
                squares += torch.stack([(one - target).square().sum((1, 2)) for one in (found, nothing)])
        return [round(value, 4) for value in (1 - squares[0] / squares[1]).tolist()]

    replay = captured(one_step, stack) if device.type == "cuda" else one_step
    say("captured")
    rounds = iter([0.5 + 0.5 * number / args.rounds for number in range(args.rounds)])
    began, step, history, shown, next_round = time.perf_counter(), 0, [], 0.0, next(rounds, math.inf)
    while (spent := (time.perf_counter() - began) / (start + args.seconds - began)) < 1:
        if spent >= next_round:
            with torch.no_grad():
                policies = [stack.merged(exact, number) for number in range(count)]
            put_own_samples(responses, targets, policies, score, training, rewards[:, 1:], log_cdfs, end, args.at_once)
            blocks = blocks_of(responses, inputs["widths"])
            shares.copy_(torch.tensor([block.share for block in blocks]))
            endless = [block.endless(number) for block, number in zip(blocks, in_step, strict=True)]
            say("sampled the policies")
            next_round = next(rounds, math.inf)
        step += 1
        for own, steps in zip(chosen, endless, strict=True):
            own.copy_(next(steps))
        rate = args.learning_rate * min(step / 200, 0.5 + 0.5 * math.cos(math.pi * spent))
        pace.fill_(rate / (1 - 0.9**step))
        correction.fill_(1 - 0.999**step)
        replay()
        if step % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        if spent >= shown:
            on_training = (1 - errors[0] / errors[1]).tolist()
            errors.zero_()
            history.append({"step": step, "training": [round(one, 4) for one in on_training], "held_out": explained()})
            say(f"step {step}", **history[-1])
            shown += 1 / 8
    seen = sum(in_step) * TOGETHER * step
    final = {"steps": step, "seen": seen, "responses": responses.shape[0] * samples, "held_out": explained()}
    say("trained", **final)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: stack.weights(number) for number, name in enumerate(inputs["policies"])}
    for first in range(0, count, IN_FILE):
        torch.save(dict(list(weights.items())[first : first + IN_FILE]), out / f"{args.prefix}adapters{first}.pt")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = {"device": name, "seconds": args.seconds, "policies": inputs["policies"], **final, "history": history}
    (out / f"{args.prefix}log.json").write_text(json.dumps(about))


def captured(one_step: Callable[[], None], stack: Stack) -> Callable[[], None]:
    """The step as a CUDA graph; trying it out leaves no trace (pace is 0, moments are emptied)."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.compiler.set_stance("default"):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                one_step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            one_step()
    stack.m.zero_()
    stack.v.zero_()
    return graph.replay


# --- After: as quality.py does --------------------------------------------------------------------------------------


def measure(folder: Path, prefix: str, args: argparse.Namespace) -> None:
    """Scale the adapters, measure them on held-out prompts, print the table and the JSON line of quality.py."""
    from benchmarks import quality
    from iapo import kl_budget
    from iapo.models import load_base
    from iapo.pipeline import manifest_of, share_samples
    from iapo.train import add_adapter

    about = json.loads((folder / f"{prefix}log.json").read_text())
    found = {name: own for path in folder.glob(f"{prefix}adapters*.pt") for name, own in torch.load(path).items()}
    trained = []
    for name, explained in zip(about["policies"], about["held_out"], strict=True):
        transform, procedure, kl = policy_of(name)
        run = args.out / quality.file_name(f"iapo-{transform}-{procedure}-{kl:g}")
        config = quality.configuration(args, run, transform, procedure, kl)
        if (run / "manifests" / "train.json").exists():
            require_same(run / "adapter", found[name])
        else:
            share_samples(args.out / "samples", run)
            policy = add_adapter(load_base(config.model), config.train)
            weights = {f"base_model.model.{part}.default.weight": value for part, value in found[name].items()}
            _, unexpected = policy.load_state_dict(weights, strict=False)
            assert not unexpected and len(weights) == sum("lora_" in part for part in policy.state_dict())
            policy.save_pretrained(run / "adapter")
            manifest = manifest_of("train", config)  # as if `iapo train` had made it
            manifest.start()
            manifest.finish([run / "adapter"], responses=about["seen"], explained_variance=explained)
        target = procedure if transform == quality.OPTIMAL else ""
        asked = quality.Trained(transform, f"trained for {kl:g}", target, kl)
        trained.append(quality.scaled(config, run / "adapter", asked, kl_budget.sampled_kls))
        print(name, trained[-1].factor, trained[-1].kl_before, flush=True)
    measured = list(quality.measure(args, args.out / "samples", trained))
    quality.print_table(quality.best_of_each(measured), args.seed)
    figures = [vars(one) | {"prompt_win_rates": None, "kl_efficiency": one.kl_efficiency} for one in measured]
    print(json.dumps({"benchmark": "many_responses", "setting": args.setting, "trained": about, "measured": figures}))


def require_same(adapter: Path, weights: dict[str, torch.Tensor]) -> None:
    """What was measured in this --out before, and is read again, must be this training's."""
    from safetensors.torch import load_file  # not where only `train` runs

    stored = load_file(adapter / "adapter_model.safetensors")
    if not all(torch.equal(stored[f"base_model.model.{part}.weight"], own) for part, own in weights.items()):
        sys.exit(f"{adapter} is of another training: remove all but samples from {adapter.parents[1]}")


def main() -> None:
    """One of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "train", "measure"))
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path, nargs="?", help="train: a folder; prepare, measure: the setting")
    parser.add_argument("--policies", nargs="+", help="prepare: transform, procedure and KL of each")
    parser.add_argument("--samples", type=int, default=8192, help="prepare: of each prompt")
    parser.add_argument("--seconds", type=float, default=240, help="train: for so long, sampling included")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--rounds", type=int, default=0, help="train: how often half are replaced by the policies' own")
    parser.add_argument("--at-once", type=int, default=65536, help="train: responses that are sampled together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", default="", help="train, measure: of the files in the folder")
    given, rest = parser.parse_known_args()
    if given.what == "train":
        train(torch.load(given.path), given.out, given)
        return
    from benchmarks import quality

    args = quality.parse([*([given.out.name] if given.out else []), *rest])
    args.seed = given.seed
    args.out = args.out.with_name(f"{args.setting}-{args.seed}")
    given.path = given.path.resolve()
    os.chdir(ROOT)  # where reward functions are looked for
    if given.what == "prepare":
        prepare(given.path, args, given.policies, given.samples)
    else:
        measure(given.path, given.prefix, args)


if __name__ == "__main__":
    main()
