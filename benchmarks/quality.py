"""Win rate per nat where every response can be enumerated: KL and win rate are exact. A table and one JSON line.

    python benchmarks/quality.py [--out runs/quality] [--procedure "best_of(4)"] [--kls 0.25 0.5 1]

A random transformer over nine tokens answers in at most three of them, 585 different responses in all; the reward is an
arbitrary function of the response. Every transform is trained by `iapo train` for every KL on the same samples, and its
policy is summed over all responses of every prompt. `closed form` is the most that any policy can win at that KL;
`of the gain over identity`: (win rate − identity's closed form) / (closed form − identity's closed form) at that KL.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from iapo.atoms import atom_kl, atom_win_rate  # noqa: E402
from iapo.closed_form import optimal_win_rate, solve  # noqa: E402
from iapo.config import Config, make_config  # noqa: E402
from iapo.logprobs import logprobs_of  # noqa: E402
from iapo.models import load_policy, load_tokenizer, prompt_token_ids  # noqa: E402
from iapo.pipeline import run_stage  # noqa: E402
from iapo.procedures import pairings, parse_procedure  # noqa: E402
from iapo.store import read_manifest, read_table  # noqa: E402

LETTERS, END, LONGEST = "abcdefgh", "<end>", 3
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4}
STAGES = ("prompts", "sample", "score", "calibrate", "ref_logprobs")
SPLITS = ("train", "holdout")


def arbitrary(prompts: Any, responses: list[str]) -> list[float]:
    """A reward that is uniform over responses and has no structure at all: a hash of the letters."""
    digests = (hashlib.sha256(response.replace(" ", "").encode()).digest() for response in responses)
    return [int.from_bytes(digest[:6]) / 2**48 for digest in digests]


def write_model(folder: Path, seed: int) -> None:
    """A reference with uneven next tokens, its weights drawn by numpy, and a tokenizer of letters."""
    vocabulary = {END: 0} | {letter: number for number, letter in enumerate(LETTERS, start=1)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=END, pad_token=END, model_max_length=16)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=16,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.from_numpy(generator.standard_normal(weight.shape) / weight.shape[1] ** 0.5))
        model.lm_head.weight.mul_(0.7)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def configuration(args: argparse.Namespace, run: Path, transform: str, kl: float) -> Config:
    """A run of `iapo`; only the objective differs between runs."""
    return make_config(
        {
            "run": str(run),
            "seed": args.seed,
            "model": {"base": str(args.out / "model"), "quantization": "none"},
            "prompts": {"source": str(args.out / "prompts.txt"), "holdout": 4},
            "sample": {"samples_per_prompt": args.samples, "max_new_tokens": LONGEST, "batch_size": 1024},
            "reward": {"function": "benchmarks.quality:arbitrary"},
            "objective": {"procedure": args.procedure, "target_kl": kl, "transform": transform},
            "train": {
                "lora_rank": 32,
                "learning_rate": args.learning_rate,
                "epochs": args.epochs,
                "batch_size": 256,
                "micro_batch_size": 256,
                "evaluations": 1,
            },
        }
    )


def responses() -> list[list[int]]:
    """Every response: letters that end, or LONGEST letters without an end (cut)."""
    numbers = range(1, len(LETTERS) + 1)
    ended = [[*part, 0] for length in range(LONGEST) for part in itertools.product(numbers, repeat=length)]
    return ended + [list(part) for part in itertools.product(numbers, repeat=LONGEST)]


def exact(config: Config) -> dict[str, dict[str, float]]:
    """KL and win rate of a trained policy by split, summed over all responses of every prompt."""
    tokenizer, policy = load_tokenizer(config.model), load_policy(config.model, config.run / "adapter")
    rows = read_table(config.run / "prompts.parquet").to_pylist()
    every = responses()
    rewards = np.array(arbitrary(None, [tokenizer.decode(ids, skip_special_tokens=True) for ids in every]))
    order = np.argsort(rewards)
    assert np.diff(rewards[order]).min() > 0  # no two responses tie
    procedure = parse_procedure(config.objective.procedure)
    found = {}
    for split in SPLITS:
        prompts = [prompt_token_ids(tokenizer, row["prompt"]) for row in rows if row["split"] == split]
        pairs = list(itertools.product(prompts, every))
        arguments = ([p for p, _ in pairs], [r for _, r in pairs])
        own = logprobs_of(policy, *arguments, pad_id=0, batch_size=1024)
        with policy.disable_adapter():
            base = logprobs_of(policy, *arguments, pad_id=0, batch_size=1024)
        masses = np.exp(np.reshape(base, (len(prompts), len(every))))[:, order]
        assert np.abs(masses.sum(axis=1) - 1).max() < 1e-4  # nothing is missing
        log_f = np.reshape(np.subtract(own, base), (len(prompts), len(every)))[:, order]
        kl, win_rate = (
            float(atom_kl(masses, log_f).mean()),
            float(atom_win_rate(masses, log_f, pairings(procedure, procedure)).mean()),
        )
        best = optimal_win_rate(procedure, None, kl)
        plain = solve(procedure, None, "identity", target_kl=kl).win_rate
        found[split] = {
            "kl": kl,
            "win_rate": win_rate,
            "closed_form": best,
            "kl_efficiency": (win_rate - 0.5) / (best - 0.5),
            "identity_closed_form": plain,
            "of_the_gain_over_identity": (win_rate - plain) / (best - plain),
        }
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Sample once, train every transform for every KL, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--procedure", default="best_of(4)")
    parser.add_argument("--transforms", nargs="+", default=["optimal", "exp_tilt(10)", "log", "identity"])
    parser.add_argument("--kls", nargs="+", type=float, default=[0.25, 0.5, 1.0])
    parser.add_argument("--samples", type=int, default=512, help="a prompt")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    os.chdir(ROOT)  # where reward functions are looked for
    shutil.rmtree(args.out, ignore_errors=True)
    write_model(args.out / "model", args.seed)
    (args.out / "prompts.txt").write_text("\n".join(a + b for a in LETTERS[:4] for b in LETTERS[:4]) + "\n")
    samples = args.out / "samples"
    for stage in STAGES:
        run_stage(stage, configuration(args, samples, args.transforms[0], args.kls[0]))
    results = []
    print(f"{'transform':<14}{'asked':>6}{'':3}{'split':<9}{'KL':>7}{'win rate':>10}{'closed form':>13}", end="")
    print(f"{'efficiency':>12}{'of the gain over identity':>27}")
    for transform, kl in itertools.product(args.transforms, args.kls):
        run = args.out / f"{transform}-{kl:g}"
        shutil.copytree(samples, run)
        config = configuration(args, run, transform, kl)
        run_stage("train", config)
        found = exact(config)
        scale = (read_manifest(run, "train") or {})["scale"]
        results.append({"transform": transform, "asked_kl": kl, "scale": scale["factor"], **found})
        for split, one in found.items():
            line = f"{transform:<14}{kl:>6g}{'':3}{split:<9}{one['kl']:>7.3f}{one['win_rate']:>10.4f}"
            line += f"{one['closed_form']:>13.4f}{one['kl_efficiency']:>12.3f}{one['of_the_gain_over_identity']:>27.2f}"
            print(line, flush=True)
    print(json.dumps({"benchmark": "quality", "procedure": args.procedure, "runs": results}))
    return results


if __name__ == "__main__":
    main()
