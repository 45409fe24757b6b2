"""What `iapo estimate` predicts of a training pass beside what it takes on the CPU: peak bytes, and seconds.

Bytes are those that torch allocates at a time beyond weights and gradients, from its profiler: exact. Seconds are of
the processor, medians, and are predicted from this machine's rates, measured in the same run (a large matrix product, a
sum out of cache, a tiny kernel), as `iapo estimate` does it from a card's. Ends with one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.training import RANK, SHAPES, SIZES, allocated, llama_config, make_policy, make_rows, matrix_rate
from iapo import objectives
from iapo.config import TrainConfig
from iapo.dry_run import training_pass
from iapo.estimate import SHARE
from iapo.logprobs import make_batch, response_logprobs, sharing_of


def seconds(step: Callable[[], Any], repeats: int) -> float:
    """Median of processor time."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return statistics.median(found)


def bandwidth() -> float:
    """Bytes read and written a second by a sum of arrays that do not fit a cache."""
    a, b = torch.ones(2**25), torch.ones(2**25)
    return 3 * a.nbytes / seconds(lambda: torch.add(a, b, out=a), 7)


def launch() -> float:
    """Seconds that a kernel of nothing takes."""
    a = torch.ones(1)

    def many() -> None:
        for _ in range(1000):
            a.add_(1)

    return seconds(many, 7) / 1000


def measure(size: str, shape: tuple[int, int, int], checkpointing: bool, repeats: int) -> dict[str, Any]:
    """Predicted and measured, of one step of the size's Llama in one forward pass."""
    policy = make_policy(size, checkpointing)
    rows = make_rows(shape, 1, SIZES[size]["vocab_size"])
    batch = make_batch(
        [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows], 0, sharing_of(policy)
    )
    policy.train()

    def step() -> None:
        objectives.pointwise(response_logprobs(policy, batch), torch.zeros(len(rows))).backward()

    step()  # the gradients are there from now on
    taken, peak = seconds(step, repeats), allocated(step)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(size))
    train = TrainConfig(lora_rank=RANK)
    counted = training_pass(model, train, [shape], sum(shape[:2]) * shape[2], checkpointing, False, "cpu")
    predicted = counted.seconds(SHARE * matrix_rate(time.process_time), SHARE * bandwidth(), launch())
    case = {"size": size, "shape": shape, "checkpointing": checkpointing}
    return case | {"bytes": peak, "predicted_bytes": counted.peak, "seconds": taken, "predicted_seconds": predicted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["5m"], choices=list(SIZES))
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results = []
    print(f"{'model':>8} {'shape':>14} {'checkpoints':>11} {'MB':>9} {'predicted':>9} {'s':>7} {'predicted':>9}")
    for size in options.sizes:
        for text in options.shapes:
            for checkpointing in (False, True):
                shape: tuple[int, int, int] = tuple(map(int, text.split(",")))  # type: ignore[assignment]
                found = measure(size, shape, checkpointing, options.repeats)
                results.append(found)
                print(
                    f"{size:>8} {text:>14} {checkpointing!s:>11} {found['bytes'] / 1e6:9.1f} "
                    f"{found['predicted_bytes'] / found['bytes']:8.3f}x {found['seconds']:7.2f} "
                    f"{found['predicted_seconds'] / found['seconds']:8.2f}x",
                    flush=True,
                )
    print(json.dumps({"benchmark": "estimate", "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
