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


@pytest.fixture
def start(tmp_path):
    """Starts a command in a process of its own, its standard error in a file: start("train", path)."""

    def call(*arguments: object) -> subprocess.Popen:
        with (tmp_path / "stderr.txt").open("w") as error:
            return subprocess.Popen(
                [sys.executable, "-m", "iapo.cli", *map(str, arguments)],
                cwd=Path(__file__).parent,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=error,
            )

    return call


def stop_when(process: subprocess.Popen, reached: Callable[[], bool], number: signal.Signals) -> int:
    """Send a signal once something is reached; the exit code. Fails if the process ends before."""
    until = time.monotonic() + PATIENCE
    while not reached():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(PATIENCE)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


SLOW = {"samples_per_prompt": 32, "max_new_tokens": 32, "shard_size": 2, "batch_size": 2}
"""Ten shards of a second each or so, so that there is time to interrupt on a busy machine too."""


@pytest.fixture
def interrupted(tiny_run, iapo, start, tmp_path):
    def make(number: signal.Signals) -> tuple[Path, int, str, list[str]]:
        path = tiny_run("stopped", sample=SLOW)
        assert iapo("prompts", path).code == 0
        folder = load_config(path).run / "responses"
        code = stop_when(start("sample", path), lambda: len(shards(folder)) >= 2, number)
        return path, code, (tmp_path / "stderr.txt").read_text(), shards(folder)

    return make


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_sampling_goes_on_after_a_signal(interrupted, tiny_run, iapo, number):
    path, code, error, kept = interrupted(number)
    assert 2 <= len(kept) < 10
    if number == signal.SIGINT:
        assert code == 130 and error.rstrip().endswith("run the same command again to go on")
        assert "Traceback" not in error
    assert f"{len(kept) * 64:,} of 640 rows" in iapo("status", path).out
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


def test_training_goes_on_from_its_last_checkpoint(tiny_run, iapo, start):
    """Killed once a checkpoint is whole; the adapter equals that of a run that was left alone, bit for bit."""
    settings = {"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "evaluations": 7, "output_layer": True}
    stages = ("prompts", "sample", "score", "calibrate")
    stopped, whole = tiny_run("stopped", train=settings), tiny_run("whole", train=settings)
    for path in (stopped, whole):
        assert [iapo(stage, path).code for stage in stages] == [0] * 4
    run, other = load_config(stopped).run, load_config(whole).run
    checkpoints = run / "checkpoints"
    code = stop_when(start("train", stopped), lambda: newest_checkpoint(checkpoints) is not None, signal.SIGKILL)
    assert code == -signal.SIGKILL and newest_checkpoint(checkpoints) is not None
    assert not (run / "adapter").exists()
    for path in (stopped, whole):
        assert start("train", path).wait(PATIENCE) == 0
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, other))
    assert one.keys() == two.keys()
    assert all(weight.abs().max() > 0 for weight in one.values())
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert read_table(run / "ref_logprobs").equals(read_table(other / "ref_logprobs"))
