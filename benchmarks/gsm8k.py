"""GSM8K: a small model trained on the data set itself, as a setting for the benchmarks of quality.

    python benchmarks/gsm8k.py FOLDER [--out runs/gsm8k]

FOLDER has train.jsonl.gz and test.jsonl.gz. The reference learns, from the problems of the training split, to answer a
question with the chain of sums that the solution is annotated with, `<<48/2=24>><<48+24=72>>`, and nothing else. The
prompts are questions that it has not seen: those of the test split, and those of the training split whose chain is too
long or has a mistake. Both are written to the output folder, and not
made again if there; prints a JSON line about the model.
"""

import argparse
import gzip
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gsm8k_rewards  # noqa: E402
from benchmarks.gsm8k_rewards import ANNOTATION, is_right  # noqa: E402
from benchmarks.small_models import (  # noqa: E402
    ASSISTANT,
    CONTEXT,
    END,
    dialogue_ids,
    once,
    save,
    train_llama,
    train_tokenizer,
)
from iapo.engines.transformers import open_engine  # noqa: E402
from iapo.models import prompt_token_ids  # noqa: E402

LONGEST = 32
"""Tokens of a response; with the longest prompt they fill the context."""
DRILLS = 300_000
"""Rows of sums that it learns from besides."""
REWARD = "right_count"


def read_problems(path: Path) -> list[tuple[str, str]]:
    """Questions and the chains of sums of their solutions; the chain is empty where a sum is not right."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    found = []
    for record in records:
        sums = ANNOTATION.findall(record["answer"])
        found.append((record["question"], "".join(f"<<{text}>>" for text in sums) if all(map(is_right, sums)) else ""))
    return found


def train_models(path: Path, out: Path, epochs: int = 2, count: int | None = None) -> dict[str, dict[str, float]]:
    """The reference in `out/reference`, prompts.jsonl, and a report of the reference; not made again if there.

    count: rows of sums, DRILLS where it is made; SystemExit where one is there that learned from another number.
    """
    training, test = read_problems(path / "train.jsonl.gz"), read_problems(path / "test.jsonl.gz")

    def reference() -> dict[str, float]:
        tokenizer = train_tokenizer([text for problem in training for text in problem], single_digits=True)
        rows, held_out = (
            {problem: ids for problem in problems if (ids := problem_ids(tokenizer, *problem))}
            for problems in (training, test)
        )
        practice = drills(tokenizer, [chain for _, chain in training], DRILLS if count is None else count)
        after = tokenizer.convert_tokens_to_ids(ASSISTANT)
        model, about = train_llama(
            tokenizer, [*rows.values()] * epochs + practice, [*held_out.values()], 1, after=after, batch_size=32
        )
        save(model, tokenizer, out / "reference")
        seen = {question for question, _ in rows}
        unseen = dict.fromkeys(question for question, _ in [*test, *training] if question not in seen)
        prompts = [text for text in unseen if len(question_ids(tokenizer, text)) <= CONTEXT - LONGEST]
        (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        counts = {"problems": len(rows), "drills": len(practice), "prompts": len(prompts)}
        return about | counts | sampled(model, tokenizer, [question_ids(tokenizer, text) for text in prompts[:128]])

    made = once(out / "reference.report.json", reference)
    if count not in (None, made["drills"]):
        raise SystemExit(
            f"{out}: its reference has learned from {made['drills']:,} drills, not {count:,}; give another --out"
        )
    return {"reference": made}


def question_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a prompt."""
    return prompt_token_ids(tokenizer, [{"role": "user", "content": question}])


def problem_ids(tokenizer: Any, question: str, chain: str) -> list[int] | None:
    """Token ids of a question and its chain; None where there is no chain or either is too long."""
    ids = dialogue_ids(tokenizer, [{"role": "user", "content": question}], chain)
    asked = len(question_ids(tokenizer, question))
    return ids if chain and asked <= CONTEXT - LONGEST and len(ids) - asked <= LONGEST else None


def drills(tokenizer: Any, chains: Sequence[str], count: int) -> list[list[int]]:
    """Token ids of `count` rows of a few sums without a question: two whole numbers below 100 as the chains have them.

    A few thousand problems are too few to learn arithmetic from. Operands of + - * are drawn from those of all chains
    for that sign; a division undoes a product.
    """
    operands: dict[str, list[str]] = {sign: [] for sign in "+-*"}
    for left, sign, right in re.findall(r"<<(\d{1,2})([+*-])(\d{1,2})=", "".join(chains)):
        operands[sign] += [left, right]
    generator = random.Random(0)

    def draw() -> str:
        sign = generator.choice("+-*/")
        first, second = (int(generator.choice(operands["*" if sign == "/" else sign])) for _ in range(2))
        match sign:
            case "+":
                return f"<<{first}+{second}={first + second}>>"
            case "-":
                return f"<<{max(first, second)}-{min(first, second)}={abs(first - second)}>>"
            case "*":
                return f"<<{first}*{second}={first * second}>>"
        return f"<<{first * second}/{max(second, 1)}={first * second // max(second, 1)}>>"

    rows = ("".join(draw() for _ in range(generator.randint(2, 4))) for _ in range(count))
    return [tokenizer.encode(ASSISTANT + row + END)[:CONTEXT] for row in rows]


def sampled(model: Any, tokenizer: Any, prompts: list[list[int]], samples: int = 16) -> dict[str, float]:
    """What a benchmark of rewards has to know of the model, from samples of some prompts."""
    engine = open_engine(
        model,
        end_ids=frozenset([tokenizer.eos_token_id]),
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=LONGEST,
        batch_size=256,
    )
    drawn = [one for group in engine(prompts, samples, 0) for one in group]
    texts = [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in drawn]
    rewards = np.reshape(getattr(gsm8k_rewards, REWARD)([], texts), (-1, samples))
    return {
        "mean_reward": float(rewards.mean()),
        "reward_deviation_within_prompts": float(rewards.std(axis=1).mean()),
        "all_right": float(np.mean(gsm8k_rewards.right_share([], texts) == np.ones(len(texts)))),
        "at_the_top_of_their_prompt": float((rewards == rewards.max(axis=1, keepdims=True)).mean()),
        "prompts_of_equal_rewards": float((rewards == rewards[:, :1]).all(axis=1).mean()),
        "mean_tokens": float(np.mean([len(one.token_ids) for one in drawn])),
        "cut": float(np.mean([one.finish_reason == "length" for one in drawn])),
    }


def sections(path: Path, out: Path) -> dict[str, Any]:
    """The sections of an iapo configuration for this setting: model, prompts, sample, reward; made where missing."""
    train_models(path, out)
    return {
        "model": {"base": str(out / "reference"), "quantization": "none"},
        "prompts": {"source": str(out / "prompts.jsonl")},
        "sample": {"max_new_tokens": LONGEST, "batch_size": 256},
        "reward": {"function": f"benchmarks.gsm8k_rewards:{REWARD}"},
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Make the model and the prompts, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the folder of the data set")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gsm8k")
    parser.add_argument("--epochs", type=int, default=2, help="over the problems")
    parser.add_argument("--drills", type=int, help=f"rows of sums; {DRILLS} if left out")
    args = parser.parse_args(argv)
    made = train_models(args.path.resolve(), args.out.resolve(), args.epochs, args.drills)
    print(json.dumps({"benchmark": "gsm8k", "models": made}))
    return made


if __name__ == "__main__":
    main()
