"""What tests share: tiny models and tokenizers made on the spot, and a run of the demo made once."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from iapo.cli import main

torch.set_num_threads(1)  # on models this small threads cost more than they give

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and five special tokens."""
    specials = ["<pad>", "</s>", "<user>", "<assistant>", "<system>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", extra_special_tokens=specials[2:]
    )
    fast.chat_template = chat_template
    return fast


def tiny_config(**changes) -> LlamaConfig:
    """A Llama of two layers whose linear layers NF4 can quantize."""
    settings = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.2,  # large, so that the next token depends on what came before
    }
    return LlamaConfig(**(settings | changes))


def with_random_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with matrices drawn by numpy, whose stream is the same on every machine; torch's is not."""
    generator = np.random.default_rng(seed)
    scale = model.config.initializer_range
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.from_numpy(scale * generator.standard_normal(weight.shape)))
    return model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a random causal language model with tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    with_random_weights(LlamaForCausalLM(tiny_config()), 0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


LETTERS = "acgnrtwz"


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory) -> Path:
    """Like tiny_model, but its responses are made of eight letters, so that little data teaches it something."""
    folder = tmp_path_factory.mktemp("letters")
    model = with_random_weights(LlamaForCausalLM(tiny_config(tie_word_embeddings=False)), 0)
    tokenizer = make_tokenizer()
    likely = [tokenizer.eos_token_id, *tokenizer(LETTERS)["input_ids"]]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4  # a feature that is always on, for
        model.lm_head.weight[:, 0] = -2  # a bias against all tokens
        model.lm_head.weight[likely, 0] = 1  # but these
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory) -> Path:
    """Folder of a random reward model with tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("tiny-reward")
    with_random_weights(LlamaForSequenceClassification(tiny_config(num_labels=1)), 1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a command ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def iapo(capsys, monkeypatch) -> Callable[..., Outcome]:
    """Calls the command line in this process: iapo("sample", path) -> its exit code and output."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["iapo", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        written = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), written.out, written.err)

    return call


def tiny_settings(run: Path, base: Path, **changes: dict) -> dict:
    """Settings of a whole run on a tiny model in seconds, with sections or parts of them replaced."""
    questions = [f"{word} {number}" for word in ("add", "count", "name", "say") for number in range(1, 6)]
    source = run.parent / f"{run.name}-prompts.txt"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("\n".join(questions) + "\n")
    settings: dict = {
        "run": str(run),
        "model": {"base": str(base)},
        "prompts": {"source": str(source), "holdout": 6},
        "sample": {"samples_per_prompt": 16, "max_new_tokens": 6, "shard_size": 5},
        "reward": {"function": "tiny_rewards:average_byte"},
        "objective": {"procedure": "best_of(4)", "target_kl": 0.5},
        "train": {"lora_rank": 4, "learning_rate": 1e-3, "batch_size": 16, "micro_batch_size": 8, "evaluations": 3},
        "evaluate": {"samples_per_prompt": 16, "procedures": ["sample"]},
    }
    for section, values in changes.items():
        settings[section] = settings[section] | values if section in settings else values
    return settings


@pytest.fixture
def tiny_run(tmp_path, tiny_model) -> Callable[..., Path]:
    """Writes the YAML file of a tiny run in tmp_path/run: tiny_run(sample={...}) -> its path."""

    def write(name: str = "run", **changes: dict) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_settings(tmp_path / name, tiny_model, **changes)))
        return path

    return write


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> Path:
    """Run folder of the demo, made once through the command line."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "iapo.cli", "demo", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    return folder
