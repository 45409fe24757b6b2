"""HH harmless-base: train small models on the data set itself, then run iapo with them. A table and one JSON line.

    python benchmarks/hh.py PATH [--out runs/hh]

PATH is the test split of harmless-base (.jsonl.gz, dialogues `chosen` and `rejected`). Made in the output folder, and
not again if there: a reference model, a reward model, a linear reward, and a run folder for each procedure. Nothing
of the data set goes anywhere else.

The reference learns the dialogues, the rewards learn the pairs (Bradley-Terry); 256 pairs are kept out of both to
report perplexity and pair accuracy. The reward with the higher accuracy is the one that the runs use.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hh_rewards import WEIGHTS_VARIABLE, features  # noqa: E402
from benchmarks.small_models import (  # noqa: E402
    CONTEXT,
    batches,
    dialogue_ids,
    fit,
    mixed_precision,
    once,
    padded,
    save,
    train_llama,
    train_tokenizer,
)
from iapo.config import Config, PromptsConfig, make_config  # noqa: E402
from iapo.pipeline import run_all, share_samples  # noqa: E402
from iapo.prompts import Exchange, read_exchanges, unique  # noqa: E402
from iapo.store import read_manifest, write_json  # noqa: E402

HELD_OUT_PAIRS = 256


# --- The data set ---------------------------------------------------------------------------------------------------


def read_pairs(path: Path, seed: int) -> tuple[list[Exchange], list[Exchange]]:
    """Prompts with their chosen and rejected responses, in that order: to train on, and held out."""
    exchanges, _ = unique(read_exchanges(PromptsConfig(source=str(path))))
    pairs = [exchange for exchange in exchanges if len(exchange.responses) >= 2]
    random.Random(seed).shuffle(pairs)
    return pairs[HELD_OUT_PAIRS:], pairs[:HELD_OUT_PAIRS]


# --- Training -------------------------------------------------------------------------------------------------------


def dialogues(tokenizer: Any, pairs: Sequence[Exchange]) -> list[list[list[int]]]:
    """Token ids of the chosen and the rejected dialogue of every pair."""
    return [[dialogue_ids(tokenizer, pair.prompt, text) for text in pair.responses[:2]] for pair in pairs]


def score(model: Any, rows: Sequence[list[int]], pad: int) -> torch.Tensor:
    """Rewards of dialogues; one too long for the context keeps its end, as in iapo."""
    ids = padded([row[-CONTEXT:] for row in rows], pad)
    with mixed_precision():
        return model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0].float()


def train_reward(
    tokenizer: Any, reference: LlamaForCausalLM, pairs: list[Exchange], held_out: list[Exchange], epochs: int
) -> tuple[LlamaForSequenceClassification, dict[str, float]]:
    """Bradley-Terry on chosen and rejected dialogues, from the reference's weights."""
    pad = tokenizer.pad_token_id
    config = LlamaConfig.from_dict(reference.config.to_dict() | {"num_labels": 1})
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(reference.model.state_dict())

    def margins(some: list[list[list[int]]]) -> torch.Tensor:
        rewards = score(model, [row for pair in some for row in pair], pad).view(-1, 2)
        return rewards[:, 0] - rewards[:, 1]

    def losses() -> Iterator[torch.Tensor]:
        for batch in batches(dialogues(tokenizer, pairs), 16, epochs, 1, lambda pair: max(map(len, pair))):
            yield -F.logsigmoid(margins(batch)).mean()

    start = time.perf_counter()
    fit(model, losses(), epochs * math.ceil(len(pairs) / 16), 3e-4, "reward")
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        unseen, seen = (
            torch.cat([margins(rows[i : i + 16]) for i in range(0, len(rows), 16)]).numpy()
            for rows in (dialogues(tokenizer, held_out), dialogues(tokenizer, pairs[:HELD_OUT_PAIRS]))
        )
    return model, {"held_out_accuracy": accuracy(unseen), "training_accuracy": accuracy(seen), "seconds": seconds}


def fit_bigrams(
    pairs: list[Exchange], held_out: list[Exchange], penalty: float = 30.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Bradley-Terry on words and bigrams seen in at least three responses, with a ridge penalty."""
    found = Counter(feature for pair in pairs for text in pair.responses[:2] for feature in features(text))
    column = {name: index for index, name in enumerate(sorted(name for name, count in found.items() if count >= 3))}

    def matrix(some: Sequence[Exchange]) -> Any:
        entries = [
            (row, column[name], sign)
            for row, pair in enumerate(some)
            for text, sign in zip(pair.responses[:2], (1.0, -1.0), strict=True)
            for name in features(text)
            if name in column
        ]
        rows, columns, values = zip(*entries, strict=True)
        return csr_matrix((values, (rows, columns)), shape=(len(some), len(column)))

    differences = matrix(pairs)

    def loss(weights: Any) -> tuple[float, Any]:
        margins = differences @ weights
        value = np.logaddexp(0, -margins).sum() + 0.5 * penalty * weights @ weights
        return value, penalty * weights - differences.T @ (1 / (1 + np.exp(margins)))

    solution = minimize(loss, np.zeros(len(column)), jac=True, method="L-BFGS-B").x
    report = {
        "features": len(column),
        "held_out_accuracy": accuracy(matrix(held_out) @ solution),
        "training_accuracy": accuracy(differences @ solution),
    }
    return {name: round(float(solution[index]), 6) for name, index in column.items()}, report


def accuracy(margins: Any) -> float:
    """Share of pairs whose chosen response has the higher reward; ties count half."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def train_models(
    path: Path, out: Path, reference_epochs: int, reward_epochs: int, kind: str = "best"
) -> dict[str, dict[str, float]]:
    """What is learned from the data set, saved in `out`, and a report of each; what is there is not made again.

    kind: the rewards to learn: `model`, `bigrams`, or `best` for both.
    """
    pairs, held_out = read_pairs(path, seed=0)

    def reference() -> dict[str, float]:
        turns = (turn["content"] for pair in pairs for turn in pair.prompt)
        tokenizer = train_tokenizer([*turns, *(text for pair in pairs for text in pair.responses)])
        rows, unseen = (
            [row[:CONTEXT] for pair in dialogues(tokenizer, some) for row in pair] for some in (pairs, held_out)
        )
        model, about = train_llama(tokenizer, rows, unseen, reference_epochs)
        save(model, tokenizer, out / "reference")
        return about

    def reward() -> dict[str, float]:
        tokenizer = AutoTokenizer.from_pretrained(out / "reference")
        start = LlamaForCausalLM.from_pretrained(out / "reference")
        model, about = train_reward(tokenizer, start, pairs, held_out, reward_epochs)
        save(model, tokenizer, out / "reward")
        return about

    def bigrams() -> dict[str, float]:
        weights, about = fit_bigrams(pairs, held_out)
        write_json(out / "bigrams.json", weights)
        return about

    makers = {"model": [reward], "bigrams": [bigrams], "best": [reward, bigrams]}[kind]
    return {make.__name__: once(out / f"{make.__name__}.report.json", make) for make in (reference, *makers)}


# --- The runs -------------------------------------------------------------------------------------------------------


def choose_reward(made: dict[str, Any], out: Path) -> dict[str, Any]:
    """The `reward` section: of the rewards made, the one that is right on more held-out pairs."""
    best = max(made.keys() & {"reward", "bigrams"}, key=lambda name: made[name]["held_out_accuracy"])
    if best == "bigrams":
        os.environ[WEIGHTS_VARIABLE] = str((out / "bigrams.json").resolve())
        return {"function": "benchmarks.hh_rewards:bigrams"}
    return {"model": str(out / "reward"), "batch_size": 256}


def run_config(path: Path, run: Path, procedure: str, args: argparse.Namespace, **sections: Any) -> Config:
    """The configuration of one run; `sections` replace those that the runs have in common."""
    common = {
        "run": str(run),
        "seed": args.seed,
        "prompts": {"source": str(path), "limit": args.prompts, "holdout": args.holdout},
        "sample": {"samples_per_prompt": args.samples, "max_new_tokens": 32, "batch_size": 256},
        "objective": {"procedure": procedure, "target_kl": args.target_kl},
        "train": {
            "lora_rank": 32,
            "learning_rate": args.learning_rate,
            "epochs": args.epochs,
            "batch_size": 64,
            "micro_batch_size": 64,
        },
        "evaluate": {"samples_per_prompt": args.samples, "procedures": ["sample", "best_of(4)", "worst_of(4)"]},
    }
    return make_config(common | sections, "benchmarks/hh.py")


def sections(path: Path, out: Path) -> dict[str, Any]:
    """Model, prompts, responses and reward for benchmarks/quality.py, with the bigram reward; made where missing."""
    made = train_models(path.resolve(), out, 2, 1, "bigrams")
    return {
        "model": {"base": str(out / "reference")},
        "prompts": {"source": str(path.resolve())},
        "sample": {"max_new_tokens": 16},
        "reward": choose_reward(made, out),
    }


class Stopwatch:
    """Seconds of each stage, from the announcements of the pipeline; a stage that was done already has none."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name: str | None = None
        self._start = 0.0

    def __call__(self, name: str, done: bool) -> None:
        """A stage begins, and the one before it ends."""
        now = time.perf_counter()
        if self._name is not None:
            self.seconds[self._name] = round(now - self._start, 1)
        self._name, self._start = (None if done else name), now
        print(f"{name}: {'done before' if done else 'running'}", file=sys.stderr, flush=True)

    def stop(self) -> dict[str, float]:
        """The last stage ends; the seconds of all."""
        self("end", True)
        return self.seconds


def run_procedure(config: Config) -> dict[str, Any]:
    """All stages of one run, and what came out of it under the procedure that it was trained for."""
    stopwatch = Stopwatch()
    run_all(config, announce=stopwatch)
    seconds = stopwatch.stop()
    metrics = json.loads((config.run / "evaluation" / "metrics.json").read_text())
    records = {(one["name"], one["procedure"]): one for one in metrics["policies"]}
    sampled, calibrated, trained = (read_manifest(config.run, name) or {} for name in ("sample", "calibrate", "train"))
    return {
        "run": config.run.name,
        "target_kl": config.objective.target_kl,
        **records["trained", config.objective.procedure],
        "base_win_rate": records["base", config.objective.procedure]["win_rate"],
        "others": {
            procedure: round(one["win_rate"], 4)
            for (name, procedure), one in records.items()
            if name == "trained" and procedure != config.objective.procedure
        },
        "training_responses": trained["responses"],
        "prompts_too_long": sampled["prompts_too_long"],
        "holdout_ks_distance": calibrated["holdout_ks_distance"],
        "explained_variance": trained["held_out"]["explained_variance"],
        "seconds": seconds,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """One line a run, then the seconds of its stages."""
    print(f"\n{'run':<16}{'procedure':<13}{'asked KL':>9}{'KL ± se':>17}{'win rate':>24}{'closed form':>13}", end="")
    print(f"{'efficiency':>12}{'expl. var.':>12}")
    for one in results:
        kl = f"{one['kl']:.3f} ± {one['kl_se']:.3f}"
        win = f"{one['win_rate']:.3f} [{one['win_rate_low']:.3f}, {one['win_rate_high']:.3f}]"
        closed, efficiency = one["closed_form_win_rate"], one["kl_efficiency"]
        closed, efficiency = ("-" if value is None else f"{value:.3f}" for value in (closed, efficiency))
        line = f"{one['run']:<16}{one['procedure']:<13}{one['target_kl']:>9}{kl:>17}{win:>24}{closed:>13}"
        print(f"{line}{efficiency:>12}{one['explained_variance']:>12.3f}")
    for one in results:
        stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in one["seconds"].items())
        print(f"{one['run']}: seconds {stages or '(all stages were done before)'}")


def bundled_sections() -> dict[str, Any]:
    """The package's own small model on these prompts, with a reward written by hand."""
    return {"model": {"base": "bundled"}, "reward": {"function": "benchmarks.hh_rewards:calm_help"}}


def main() -> None:
    """Train or load the models, do the runs, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the data set, .jsonl.gz")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "hh")
    parser.add_argument("--model", choices=("own", "bundled"), default="own", help="trained here, or the package's")
    parser.add_argument("--reward", choices=("best", "model", "bigrams"), default="best", help="of those trained here")
    parser.add_argument("--procedures", nargs="+", default=["worst_of(4)", "best_of(4)"])
    parser.add_argument("--name", default="", help="prefix of the run folders, for another setting")
    parser.add_argument("--prompts", type=int, default=800, help="of which those that fit the context are used")
    parser.add_argument("--holdout", type=int, default=200)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--target-kl", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--reference-epochs", type=int, default=2)
    parser.add_argument("--reward-epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.path, args.out = args.path.resolve(), args.out.resolve()
    os.chdir(ROOT)  # where reward functions are looked for

    made: dict[str, Any] = {}
    if args.model == "bundled":
        sections = bundled_sections()
    else:
        made = train_models(args.path, args.out, args.reference_epochs, args.reward_epochs, args.reward)
        print(json.dumps(made, indent=2))
        sections = {"model": {"base": str(args.out / "reference")}, "reward": choose_reward(made, args.out)}
    results: list[dict[str, Any]] = []
    first: Path | None = None
    for procedure in args.procedures:
        run = args.out / (f"{args.name}{args.model}-" + re.sub(r"[^a-z0-9]+", "-", procedure).strip("-"))
        config = run_config(args.path, run, procedure, args, **sections)
        if first is not None and not (run / "manifests" / "ref_logprobs.json").exists():
            share_samples(first, run)
        first = first or run
        results.append(run_procedure(config))
    print_table(results)
    print(json.dumps({"benchmark": "hh", "reward": sections["reward"], "models": made, "runs": results}))


if __name__ == "__main__":
    main()
