"""One training step beside TRL's DPOTrainer: response tokens a second and peak memory over weights, on the CPU.

Both train the same LoRA on the same random Llama and the same responses, in float32, with the reference's log-probs
given: K responses to one prompt are K rows for iapo, K/2 pairs for TRL. Each has a process of its own; the two take
turns. TRL takes all pairs of a prompt in one forward pass, and one pair at a time: the faster of the two, with the
memory that it takes, is what iapo is compared with. iapo takes all K at once, and as many as --together says.

Memory is the most bytes that torch allocates at a time beyond weights, gradients and moments: its profiler's record of
one forward and backward pass, after a whole step. What the allocator keeps besides is no one's need and is left out.
Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed

from iapo.config import TrainConfig, make_config
from iapo.train import PolicyTrainer, add_adapter, training_arguments

SHAPES = ((32, 128, 8), (512, 128, 8), (1024, 512, 4), (2048, 256, 16))
"""Prompt tokens, response tokens, responses."""
RANK = 16
RESULT = "result: "
"""Marks the line of a worker's answer among what trainers print."""
VOCABULARY = 32_000
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "vocab_size": 256},
    "5m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 8_192},
    "100m": {"hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"num_key_value_heads": 4, "vocab_size": VOCABULARY},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
}


def llama_config(size: str) -> LlamaConfig:
    """A Llama of that size; small ones tie their embeddings, as models of their size do."""
    settings: dict[str, Any] = SIZES[size]
    return LlamaConfig(**settings, max_position_embeddings=8192, tie_word_embeddings=size != "llama-3-8b")


def make_rows(shape: tuple[int, int, int], prompts: int, vocabulary: int) -> list[dict[str, Any]]:
    """K random responses to each of so many random prompts, as the trainer takes them."""
    prompt, response, count = shape
    generator = np.random.default_rng(0)
    rows = []
    for number in range(prompts):
        prompt_ids = generator.integers(3, vocabulary, prompt).tolist()
        rows += [
            {
                "prompt_id": str(number),
                "prompt_ids": prompt_ids,
                "response_ids": generator.integers(3, vocabulary, response).tolist(),
                "ref_logprob": -response * float(np.log(vocabulary)),
                "target": float(generator.normal()),
                "calibrated_reward": 0.5,
                "length": prompt + response,
            }
            for _ in range(count)
        ]
    return rows


def iapo_trainer(policy: Any, rows: list[dict[str, Any]], step: int, budget: int, folder: str) -> Any:
    """A step takes `step` responses, a forward pass `budget` tokens; in order, so that a step has one prompt."""
    settings: dict[str, Any] = {
        "run": folder,
        "model": {"base": "none"},
        "prompts": {"source": "none"},
        "reward": {"function": "none:none"},
        "objective": {"target_kl": 1.0},
        "train": {"batch_size": step},
    }
    trainer = PolicyTrainer(
        model=policy,
        args=training_arguments(make_config(settings), Path(folder), len(rows)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:1]),
        pad_id=0,
        budget=budget,
        temperature=1.0,
    )
    trainer._get_train_sampler = SequentialSampler
    return trainer


def trl_trainer(
    policy: Any, rows: list[dict[str, Any]], step: int, pairs: int, checkpointing: bool, folder: str
) -> Any:
    """TRL's DPOTrainer with the reference given; a forward pass takes so many pairs."""
    from tokenizers import Tokenizer, models
    from trl import DPOConfig, DPOTrainer

    words = {"<pad>": 0, "</s>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )
    cuda = torch.cuda.is_available()
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=step // (2 * pairs),
        num_train_epochs=1,
        learning_rate=1e-4,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=checkpointing,
        bf16=cuda,
        optim="paged_adamw_8bit" if cuda else "adamw_torch",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    sample = Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a"}])
    trainer = DPOTrainer(model=policy, args=arguments, train_dataset=sample, processing_class=tokenizer)
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_ids": chosen["prompt_ids"],
                "chosen_ids": chosen["response_ids"],
                "rejected_ids": rejected["response_ids"],
                "ref_chosen_logps": chosen["ref_logprob"],
                "ref_rejected_logps": rejected["ref_logprob"],
            }
            for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)
        ]
    )
    return trainer


def make_policy(size: str, checkpointing: bool) -> Any:
    """The random base with a fresh adapter."""
    set_seed(0)
    base = LlamaForCausalLM(llama_config(size)).requires_grad_(False).eval()
    policy = add_adapter(base, TrainConfig(lora_rank=RANK))
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


class Clock(TrainerCallback):
    """Seconds of each optimizer step, by the clock and of the processor."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.start, self.worked = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.processor.append(time.process_time() - self.worked)


def make_trainer(case: dict[str, Any], folder: str) -> Any:
    """The trainer of a case: trainer, size, shape, steps, responses a forward pass, checkpointing."""
    shape, together = tuple(case["shape"]), case["together"]
    prompt, response, count = shape
    rows = make_rows(shape, case["steps"], SIZES[case["size"]]["vocab_size"])
    policy = make_policy(case["size"], case["checkpointing"])
    if case["trainer"] == "trl":
        trainer = trl_trainer(policy, rows, count, together // 2, case["checkpointing"], folder)
    else:
        trainer = iapo_trainer(policy, rows, count, prompt + together * response, folder)
    trainer.args.eval_strategy, trainer.args.save_strategy = "no", "no"
    return trainer


def measure(case: dict[str, Any]) -> Any:
    """What a case asks for, in this process."""
    return {"seconds": step_seconds, "peak": peak_bytes, "profile": step_profile}[case["wanted"]](case)


def step_seconds(case: dict[str, Any]) -> list[float]:
    """How long every step takes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, folder)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    return clock.processor if case["processor_time"] else clock.seconds


def peak_bytes(case: dict[str, Any]) -> int:
    """Memory of one forward and backward pass, of as many responses as it takes together."""
    prompt, response, _ = case["shape"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case | {"shape": (prompt, response, case["together"]), "steps": 1}, folder)
        trainer.train()  # gradients and moments are there from now on
        inputs = next(iter(trainer.get_train_dataloader()))
        return allocated(lambda: trainer.training_step(trainer.model, inputs))


def allocated(step: Callable[[], Any]) -> int:
    """The most bytes at a time that torch allocates on the CPU while the step runs, beyond what was there."""
    with record(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    kineto: Any = recorded.profiler
    events = kineto.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([change for _, change in changes]).max())


def step_profile(case: dict[str, Any]) -> dict[str, float]:
    """Where the time of a step goes, in seconds of processor time of one thread that waits for the others."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, folder)
        with record(activities=[ProfilerActivity.CPU]) as recorded:
            trainer.train()
    parts = {"matrix products": 0.0, "attention": 0.0, "softmax over the vocabulary": 0.0, "the rest": 0.0}
    for event in recorded.key_averages():
        name = event.key.removeprefix("aten::")
        part = (
            "attention"
            if "flash_attention" in name
            else "matrix products"
            if name in ("mm", "addmm", "bmm")
            else "softmax over the vocabulary"
            if "log_softmax" in name or "logsumexp" in name
            else "the rest"
        )
        parts[part] += event.self_cpu_time_total / 1e6 / case["steps"]
    return parts


class Worker:
    """A process that measures cases of one trainer, one at a time."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--worker"]
        environment = os.environ | {"TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, case: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        raise RuntimeError(f"{case}: the process ended with {self.process.wait()}")


def work() -> None:
    """What a Worker's process does."""
    for line in sys.stdin:
        print(RESULT + json.dumps(measure(json.loads(line))), flush=True)


def matrix_rate(now: Callable[[], float]) -> float:
    """Floating-point operations a second of a large product in float32, by that clock."""
    a, b = torch.randn(2048, 768), torch.randn(768, 2048)
    best = float("inf")
    for _ in range(20):
        start = now()
        a @ b
        best = min(best, now() - start)
    return 2 * 2048 * 768 * 2048 / best


def step_work(size: str, shape: tuple[int, int, int]) -> float:
    """Floating-point operations of a step with the prompt once: the least that exact training on a frozen base takes.

    Two a weight and token forward, two for the gradient of the input; LoRA two more for its own weights; the output
    matrix for response tokens only; attention over pairs that see each other, two products forward and five backward.
    """
    config, (prompt, response, count) = llama_config(size), shape
    width, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    linear = 2 * width * width + 2 * width * kv + 3 * width * inner
    lora = RANK * (4 * width + 2 * (width + kv) + 3 * (width + inner))
    tokens = prompt + count * (response - 1)
    pairs = prompt**2 / 2 + count * response * (prompt + response / 2)
    layers = config.num_hidden_layers * (tokens * (4 * linear + 6 * lora) + 7 * 2 * pairs * width)
    return layers + 4 * count * response * width * config.vocab_size


def compare(case: dict[str, Any], together: set[int], most: int, rounds: int, workers: dict[str, Worker]) -> Any:
    """iapo with so many responses a forward pass beside TRL; a row of the table each, iapo's against TRL's fastest."""
    prompt, response, count = case["shape"]
    unshared = {2, count} if count * (prompt + response) <= most else {2}
    variants = [("trl", at_once) for at_once in sorted(unshared)] + [("iapo", at_once) for at_once in sorted(together)]
    seconds: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for name, at_once in variants:
            found = workers[name](case | {"trainer": name, "together": at_once, "wanted": "seconds"})
            seconds[name, at_once] += found[1:] or found
    rows: list[dict[str, Any]] = []
    for name, at_once in variants:
        peak = workers[name](case | {"trainer": name, "together": at_once, "wanted": "peak"})
        rate = response * count / statistics.median(seconds[name, at_once])
        row = {"trainer": name, "together": at_once, "tokens_per_second": rate, "peak_bytes": peak}
        if name == "iapo":
            peer = max(rows[: len(unshared)], key=lambda other: other["tokens_per_second"])
            row |= {"speedup": rate / peer["tokens_per_second"], "memory": peak / peer["peak_bytes"]}
        rows.append(row)
        ratios = f"{row['speedup']:8.2f}x {row['memory']:6.2f}x" if name == "iapo" else ""
        shape = ",".join(map(str, case["shape"]))
        print(
            f"{case['size']:>10} {shape:>14} {name:>5} {at_once:8d} {rate:9.1f} {peak / 1e6:7.0f} {ratios}", flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["5m"], choices=list(SIZES))
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn; the first is left out if there are more")
    parser.add_argument("--together", nargs="+", type=int, default=[], help="responses a forward pass, beside all K")
    parser.add_argument("--most-tokens", type=int, default=40_000, help="a forward pass of TRL, for want of memory")
    parser.add_argument(
        "--processor-time", action="store_true", help="not the clock's, for one thread on a busy machine"
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing for both")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work()
    workers = {"trl": Worker(), "iapo": Worker()}
    now = time.process_time if options.processor_time else time.perf_counter
    results = []
    print(f"{'model':>10} {'shape':>14} {'':>5} {'together':>8} {'tokens/s':>9} {'MB':>7} {'speed':>9} {'memory':>7}")
    for size in options.sizes:
        for text in options.shapes:
            shape: tuple[int, int, int] = tuple(map(int, text.split(",")))  # type: ignore[assignment]
            case: dict[str, Any] = {"size": size, "shape": shape, "steps": options.steps}
            case |= {"checkpointing": options.checkpointing, "processor_time": options.processor_time}
            together = {shape[2]} | {count for count in options.together if count < shape[2]}
            result = case | {"rows": compare(case, together, options.most_tokens, options.rounds, workers)}
            rate = matrix_rate(now) / step_work(size, shape) * shape[1] * shape[2]
            result["share_of_matrix_rate"] = result["rows"][-1]["tokens_per_second"] / rate
            print(f"{'':>10} {text:>14} all K: {result['share_of_matrix_rate']:.0%} of the matrix rate", flush=True)
            if options.profile:
                wanted = {"trainer": "iapo", "together": shape[2], "wanted": "profile"}
                result["profile"] = workers["iapo"](case | wanted)
                print({part: round(seconds, 3) for part, seconds in result["profile"].items()}, flush=True)
            results.append(result)
    print(json.dumps({"benchmark": "training", "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
