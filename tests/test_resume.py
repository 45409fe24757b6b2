"""Work that is killed goes on where it stopped and ends with the same rows and the same weights."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iapo.config import load_config
from iapo.store import read_table
from iapo.train import newest_checkpoint

PATIENCE = 240
"""Seconds after which a subprocess that shows no progress counts as hung; nothing is timed."""


def start(*arguments: object) -> subprocess.Popen:
    here = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-m", "iapo.cli", *map(str, arguments)],
        cwd=here,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_when(process: subprocess.Popen, reached: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Send a signal once something is reached; the exit code and standard error. Fails if it ends before."""
    until = time.monotonic() + PATIENCE
    while not reached():
        assert process.poll() is None, f"ended before: {process.communicate()[1]}"
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=PATIENCE)[1]
    return process.returncode, error


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


SLOW = {"samples_per_prompt": 16, "max_new_tokens": 32, "shard_size": 2, "batch_size": 8}
"""Ten shards of a fraction of a second each, so that there is time to interrupt."""


@pytest.fixture
def interrupted(tiny_run, iapo):
    def make(number: signal.Signals) -> tuple[Path, int, str, list[str]]:
        path = tiny_run("stopped", sample=SLOW)
        assert iapo("prompts", path).code == 0
        folder = load_config(path).run / "responses"
        code, error = stop_when(start("sample", path), lambda: len(shards(folder)) >= 2, number)
        return path, code, error, shards(folder)

    return make


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_sampling_goes_on_after_a_signal(interrupted, tiny_run, iapo, number):
    path, code, error, kept = interrupted(number)
    assert 2 <= len(kept) < 10
    if number == signal.SIGINT:
        assert code == 130 and error.rstrip().endswith("run the same command again to go on")
        assert "Traceback" not in error
    assert f"{len(kept) * 32:,} of 320 rows" in iapo("status", path).out
    folder = load_config(path).run / "responses"
    before = {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert iapo("sample", path).code == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == before

    whole = tiny_run("whole", sample=SLOW, prompts={"source": load_config(path).prompts.source})
    assert iapo("prompts", whole).code == iapo("sample", whole).code == 0
    other = load_config(whole).run / "responses"
    assert shards(folder) == shards(other) == [f"{n:05d}.parquet" for n in range(10)]
    for name in shards(folder):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert not list(folder.glob(".*.tmp"))


def test_training_goes_on_from_its_last_checkpoint(tiny_run, iapo):
    """Killed once a checkpoint is whole; the adapter equals that of a run that was left alone, bit for bit."""
    settings = {"epochs": 3, "batch_size": 16, "micro_batch_size": 2, "evaluations": 6}
    prepared = tiny_run("stopped", train=settings)
    stages = ("prompts", "sample", "score", "calibrate")
    assert [iapo(stage, prepared).code for stage in stages] == [0] * 4
    config = load_config(prepared)
    checkpoints = config.run / "checkpoints"
    code, _ = stop_when(start("train", prepared), lambda: newest_checkpoint(checkpoints) is not None, signal.SIGKILL)
    assert code == -signal.SIGKILL and newest_checkpoint(checkpoints) is not None
    assert not (config.run / "adapter").exists()
    process = start("train", prepared)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, error

    whole = tiny_run("whole", train=settings, prompts={"source": config.prompts.source})
    assert [iapo(stage, whole).code for stage in stages] == [0] * 4
    process = start("train", whole)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, error
    one, other = (
        load_file(load_config(path).run / "adapter" / "adapter_model.safetensors") for path in (prepared, whole)
    )
    assert one.keys() == other.keys() and any(
        weight.abs().max() > 0 for name, weight in one.items() if "lora_B" in name
    )
    for name in one:
        assert torch.equal(one[name], other[name]), name
    rows = [read_table(load_config(path).run / "ref_logprobs") for path in (prepared, whole)]
    assert rows[0].equals(rows[1])
