"""Training on a GPU, in one go: exactness, then iapo beside TRL by shape, 100 M parameters and Llama-3-8B in NF4.

Run by benchmarks/gpu.sh. Weights are random and made on the spot; nothing is downloaded. Ends with one JSON line, which
--out also writes. On a machine without CUDA --toy runs the same code on tiny models, which is how it is tested.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM, set_seed
from transformers.integrations import replace_with_bnb_linear

from benchmarks.training import (
    RANK,
    SHAPES,
    SIZES,
    Clock,
    iapo_trainer,
    llama_config,
    make_rows,
    step_work,
    trl_trainer,
)
from iapo.config import TrainConfig
from iapo.dry_run import at_full_depth, quantize, training_pass
from iapo.estimate import ADAPTER_BYTES, adapter_parameters
from iapo.logprobs import make_batch, response_logprobs, sharing_of
from iapo.models import release
from iapo.train import add_adapter

STEPS = {False: 8, True: 3}
"""A measurement without and with NF4, of which the first is left out."""
LENGTHS, BATCHES = (24, 1, 9, 24, 2, 24, 24, 5), (slice(0, 4), slice(4, 5), slice(5, 8))
"""Tokens of the responses that exactness is tried on, and which go together: one alone, with a single token to see."""


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_base(size: str, quantization: str, device: torch.device) -> Any:
    """A frozen Llama with random weights, made layer by layer on the device: bfloat16, or linear ones in NF4."""
    config = llama_config(size)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if quantization == "nf4":
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantized)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old.ndim == 1:
                weight = torch.ones(old.shape, dtype=torch.bfloat16, device=device)
            else:
                shape = (module.out_features, module.in_features) if hasattr(module, "out_features") else old.shape
                weight = torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator).mul_(0.02)
            if type(old).__name__ == "Params4bit":
                made: Any = type(old)(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
                ).to(device)
            else:
                made = torch.nn.Parameter(weight, requires_grad=False)
            setattr(module, name, made)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False).eval()


def exactness(size: str, device: torch.device) -> dict[str, float]:
    """Largest error of log-probs and, over the largest, of gradients against float64, one row at a time, by dtype."""
    set_seed(0)
    base = LlamaForCausalLM(llama_config(size)).requires_grad_(False).eval()
    policy = add_adapter(base, TrainConfig(lora_rank=RANK))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    rows = make_rows((40, 24, 4), 2, SIZES[size]["vocab_size"])
    prompts = [row["prompt_ids"] for row in rows]
    responses = [row["response_ids"][:length] for row, length in zip(rows, LENGTHS, strict=True)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    policy.double()
    exact = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        exact.append(torch.log_softmax(logits, -1)[range(len(response)), response].sum())
    slopes = torch.autograd.grad(torch.stack(exact).sum(), trained)
    policy.float().to(device)
    sharing = sharing_of(policy)
    batches = [make_batch(prompts[own], responses[own], 0, sharing, device) for own in BATCHES]
    assert all(batch.layout is not None for batch in batches)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            values = torch.cat([response_logprobs(policy, batch) for batch in batches])
        gradients = torch.autograd.grad(values.sum(), trained)
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_logprob"] = float((values.cpu().double() - torch.stack(exact)).abs().max())
        found[f"{name}_gradient"] = max(
            float((mine.cpu().double() - theirs).abs().max() / theirs.abs().max())
            for mine, theirs in zip(gradients, slopes, strict=True)
        )
    return found


def measure(case: dict[str, Any], device: torch.device) -> Any:
    """Response tokens a second and peak bytes over weights; or the error where memory runs out.

    A case is one of `all_cases`; in NF4 there is gradient checkpointing.
    """
    release()
    size, shape, together, nf4 = (case[name] for name in ("model", "shape", "together", "nf4"))
    prompt, response, count = shape
    rows = make_rows(shape, STEPS[nf4], SIZES[size]["vocab_size"])
    try:
        policy = add_adapter(random_base(size, "nf4" if nf4 else "none", device), TrainConfig(lora_rank=RANK))
        if nf4:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        weights = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            if case["trainer"] == "trl":
                trainer = trl_trainer(policy, rows, count, together // 2, nf4, folder)
            else:
                trainer = iapo_trainer(policy, rows, count, prompt + together * response, folder)
            trainer.args.eval_strategy, trainer.args.save_strategy = "no", "no"
            trainer.add_callback(clock)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
        peak = torch.cuda.max_memory_allocated() - weights if device.type == "cuda" else 0
    except torch.cuda.OutOfMemoryError as error:
        return {"out_of_memory": str(error)[:200]}
    seconds = statistics.median(clock.seconds[1:])
    return {"tokens_per_second": response * count / seconds, "peak_bytes": peak, "weights_bytes": weights}


@cache
def predicted_peak(size: str, shape: tuple[int, int, int], together: int, nf4: bool) -> float:
    """What `iapo estimate` expects beside weights and adapter: gradients, moments, and what the pass holds."""

    def make() -> Any:
        with torch.device("meta"):
            model = LlamaForCausalLM(llama_config(size)).to(torch.bfloat16)
        return quantize(model, torch.bfloat16) if nf4 else model

    train = TrainConfig(lora_rank=RANK)

    def one_pass(model: Any) -> Any:
        return training_pass(model, train, [shape], shape[0] + together * shape[1], nf4, True, "cuda")

    return at_full_depth(make, one_pass).peak + (ADAPTER_BYTES - 4) * adapter_parameters(make(), train)


def matrix_rate(device: torch.device, width: int) -> float:
    """Floating-point operations a second of large products in bfloat16."""
    a = torch.randn(width, width, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def all_cases(toy: bool) -> list[dict[str, Any]]:
    """What is measured: model, NF4 or not, cap of memory in GB, shape, trainer, its responses of a forward pass."""
    tiny = [("tiny", nf4, cap, [(8, 4, 2)]) for nf4, cap in ((False, None), (True, 12), (True, 16), (True, 24))]
    caps = [(12, SHAPES[1:]), (16, SHAPES[3:]), (24, SHAPES[3:])]  # the last shape needs the most
    models = tiny if toy else [("100m", False, None, SHAPES), *(("llama-3-8b", True, *cap) for cap in caps)]
    trainers = ["iapo"] + ["trl"] * (importlib.util.find_spec("trl") is not None)
    return [
        {"model": model, "nf4": nf4, "cap_gb": cap, "shape": shape, "trainer": trainer, "together": together}
        for model, nf4, cap, shapes in models
        for shape in shapes
        for trainer in trainers
        for together in sorted({2, shape[2]} if nf4 else {shape[2]})
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--toy", action="store_true", help="tiny models, on whatever device there is")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not options.toy:
        parser.error("no CUDA device; --toy runs the same code on tiny models")
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    result: dict[str, Any] = {"benchmark": "gpu", "device": name, "exactness": exactness("tiny", device)}
    print(result, flush=True)
    if any(error > (1e-2 if "float32" in name else 1e-1) for name, error in result["exactness"].items()):
        raise SystemExit(f"not exact on {name}: nothing else is measured")
    result["matrix_rate"] = rate = matrix_rate(device, 256 if options.toy else 8192)
    result["cases"] = []
    for case in all_cases(options.toy):
        if case["cap_gb"] and cuda:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, case["cap_gb"] * 1e9 / total))
        found = measure(case, device)
        if "tokens_per_second" in found and case["trainer"] == "iapo":
            work = step_work(case["model"], case["shape"]) / (case["shape"][1] * case["shape"][2])
            found["predicted_peak_bytes"] = predicted_peak(case["model"], case["shape"], case["together"], case["nf4"])
            found["share_of_matrix_rate"] = found["tokens_per_second"] * work / rate
        result["cases"].append(case | found)
        print(case | found, flush=True)
        if options.out:
            options.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
