"""Two processes on the CPU train the weights that one process does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from iapo.config import load_config
from iapo.pipeline import run_stage
from iapo.store import read_manifest

TRAIN = ("-m", "iapo.cli", "train")
TRAIN_SHARDED = (str(Path(__file__).with_name("fsdp_on_cpu.py")),)


def launch(path: Path, program: tuple[str, ...] = TRAIN) -> subprocess.CompletedProcess:
    """`iapo train` in two processes that talk through gloo.

    Started by torchrun, for `accelerate launch --cpu --num_processes 2` starts one.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run([*command, *program, str(path)], capture_output=True, text=True, env=environment, timeout=300)


def test_a_batch_that_the_processes_cannot_divide_is_refused(tiny_run, iapo):
    path = tiny_run(train={"batch_size": 15}, model={"quantization": "none"})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score", "calibrate")] == [0] * 4
    run_stage("ref_logprobs", load_config(path))
    done = launch(path)
    assert done.returncode != 0
    assert "train.batch_size 15 cannot be divided among 2 devices; expected a multiple" in done.stderr


def adapter_weights(run: Path) -> dict[str, torch.Tensor]:
    """As trained: before B was scaled for its KL, by a factor found on samples, which rounding may change."""
    record = read_manifest(run, "train")
    assert record is not None
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    return {n: w / record["scale"]["factor"] if "lora_B" in n else w for n, w in weights.items()}


@pytest.mark.parametrize(
    ("program", "tolerance", "output_layer"),
    [(TRAIN, 1e-5, False), (TRAIN_SHARDED, 3e-5, False), (TRAIN_SHARDED, 3e-5, True)],
    ids=["ddp", "fsdp", "fsdp, output layer"],
)
def test_two_processes_give_the_weights_of_one(tiny_run, iapo, program, tolerance, output_layer):
    """Every step is the same mean over 16 responses, however it is divided and packed."""
    settings = {"epochs": 0.5, "micro_batch_size": 2, "evaluations": 1, "output_layer": output_layer}
    path = tiny_run(train={"batch_size": 16, "lora_rank": 4} | settings, model={"quantization": "none"})
    assert [iapo(stage, path).code for stage in ("prompts", "sample", "score", "calibrate")] == [0] * 4
    config = load_config(path)
    run_stage("ref_logprobs", config)
    other = yaml.safe_load(path.read_text())
    other["run"] = str(config.run.parent / "two")
    shutil.copytree(config.run, other["run"])
    path.with_name("two.yaml").write_text(yaml.safe_dump(other))
    assert iapo("train", path).code == 0
    done = launch(path.with_name("two.yaml"), program)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = adapter_weights(config.run), adapter_weights(Path(other["run"]))
    assert one.keys() == two.keys()
    start = [weight for name, weight in one.items() if "lora_B" in name]
    assert max(float(weight.abs().max()) for weight in start) > 1e-3  # they start at zero
    for name, weight in one.items():  # Adam makes much of rounding where a gradient is next to nothing
        assert torch.allclose(weight, two[name], atol=tolerance), name
    records = [read_manifest(run, "train") for run in (config.run, Path(other["run"]))]
    held_out = [record["held_out"] for record in records if record]
    assert held_out[0]["loss"] == pytest.approx(held_out[1]["loss"], rel=1e-4)
