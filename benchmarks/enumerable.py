"""The enumerable setting of benchmarks/quality.py: a policy whose KL and win rate are sums, not estimates.

A random transformer answers in at most three letters of eight, 585 different responses in all; the reward is an
arbitrary function of the response. So what is learned on some prompts says little of the rest: the prompts that were
trained on show how exact a fit can be, the others how little carries over.
"""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from iapo.atoms import Floats, atom_kl
from iapo.config import Config
from iapo.logprobs import logprobs_of
from iapo.models import load_tokenizer, prompt_token_ids
from iapo.store import read_table

LETTERS, END, LONGEST = "abcdefgh", "<end>", 3
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4}
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


def responses() -> list[list[int]]:
    """Every response: letters that end, or LONGEST letters without an end (cut)."""
    numbers = range(1, len(LETTERS) + 1)
    ended = [[*part, 0] for length in range(LONGEST) for part in itertools.product(numbers, repeat=length)]
    return ended + [list(part) for part in itertools.product(numbers, repeat=LONGEST)]


def sections(folder: Path, seed: int) -> dict[str, Any]:
    """Model, prompts, responses and reward; the model and the prompts are made in the folder."""
    if not (folder / "prompts.txt").exists():
        write_model(folder, seed)
        (folder / "prompts.txt").write_text("\n".join(a + b for a in LETTERS[:4] for b in LETTERS[:4]) + "\n")
    return {
        "model": {"base": str(folder)},
        "prompts": {"source": str(folder / "prompts.txt")},
        "sample": {"max_new_tokens": LONGEST, "batch_size": 1024},
        "reward": {"function": "benchmarks.enumerable:arbitrary"},
    }


def exact(config: Config, policy: Any, split: str) -> tuple[Floats, Floats]:
    """Masses under the reference and log-ratios of a policy: (prompts of the split, responses) by rising reward."""
    tokenizer, every = load_tokenizer(config.model), responses()
    rows = read_table(config.run / "prompts.parquet").to_pylist()
    rewards = np.array(arbitrary(None, [tokenizer.decode(ids, skip_special_tokens=True) for ids in every]))
    order = np.argsort(rewards)
    assert np.diff(rewards[order]).min() > 0  # no two responses tie
    prompts = [prompt_token_ids(tokenizer, row["prompt"]) for row in rows if row["split"] == split]
    asked, answered = zip(*itertools.product(prompts, every), strict=True)
    own = logprobs_of(policy, asked, answered, pad_id=0, batch_size=1024)
    with policy.disable_adapter():
        base = logprobs_of(policy, asked, answered, pad_id=0, batch_size=1024)
    masses = np.exp(np.reshape(base, (len(prompts), len(every))))[:, order]
    assert np.abs(masses.sum(axis=1) - 1).max() < 1e-4  # nothing is missing
    return masses, np.reshape(np.subtract(own, base), masses.shape)[:, order]


def training_kls(config: Config, policy: Any) -> Callable[[], Floats]:
    """For `kl_budget.meet`: the exact KL on each prompt that was trained on, in nats."""
    return lambda: atom_kl(*exact(config, policy, "train"))
