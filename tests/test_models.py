"""What a GPU changes about models, as far as it can be told without one."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager

from iapo.config import make_config
from iapo.models import compute_dtype, release
from iapo.train import training_arguments


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch say that there is a GPU, with bfloat16 or (as a T4) only with its emulation."""

    def pretend(bfloat16):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
        )

    return pretend


def test_auto_is_bfloat16_only_where_the_gpu_computes_in_it(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_dtype("auto") == torch.float32
    gpu(bfloat16=True)
    assert compute_dtype("auto") == torch.bfloat16 and compute_dtype("float32") == torch.float32
    gpu(bfloat16=False)
    assert compute_dtype("auto") == torch.float32


@pytest.mark.parametrize(
    ("dtype", "mixed"), [("auto", "bf16"), ("bfloat16", "bf16"), ("float16", "fp16"), ("float32", None)]
)
def test_on_a_gpu_training_computes_in_the_configured_dtype(tmp_path, gpu, monkeypatch, dtype, mixed):
    config = make_config(
        {
            "run": str(tmp_path),
            "model": {"base": "bundled", "dtype": dtype},
            "prompts": {"source": "bundled"},
            "reward": {"model": "bundled"},
            "objective": {"target_kl": 0.5},
        }
    )
    monkeypatch.setattr("iapo.train.TrainingArguments", lambda **arguments: arguments)
    monkeypatch.setattr("iapo.train.PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    gpu(bfloat16=True)
    found = training_arguments(config, tmp_path, 100)
    assert [name for name in ("bf16", "fp16") if found[name]] == ([mixed] if mixed else [])


def test_embeddings_that_the_optimizer_was_told_of_are_let_go(gpu, monkeypatch):
    embedding = torch.nn.Embedding(3, 2)
    GlobalOptimManager.get_instance().register_module_override(embedding, "weight", {"optim_bits": 32})
    kept = weakref.ref(embedding)
    del embedding
    gc.collect()
    assert kept() is not None
    gpu(bfloat16=True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    release()
    assert kept() is None
