"""Python reward functions of the HH benchmark, named in a configuration as `benchmarks.hh_rewards:NAME`."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

Prompts = Sequence[list[dict[str, str]]]

WEIGHTS_VARIABLE = "IAPO_HH_BIGRAMS"
"""Environment variable with the path of the weights that `benchmarks/hh.py` fitted for `bigrams`."""

HELP = re.compile(r"\b(can help|happy to|you (?:can|could|might|may)|try|let me|would you like|here are|start with)\b")
CALM = re.compile(r"\b(sorry|thank|thanks|glad|sure|of course|please|hope|understand|good (?:question|idea)|enjoy)\b")
HARSH = re.compile(r"\b(stupid|idiot|dumb|hate|kill|shut up|silly|obvious(?:ly)?|damn|hell|whatever|waste)\b")


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return re.findall(r"[a-z']+|[.,!?]", text.lower())


def features(text: str) -> Iterator[str]:
    """The distinct words and bigrams of a response; its ends count as words."""
    tokens = ["<", *words(text), ">"]
    yield from set(tokens[1:-1])
    yield from {f"{a} {b}" for a, b in pairwise(tokens)}


def bigrams(prompts: Prompts, responses: Sequence[str]) -> list[float]:
    """A linear reward on words and bigrams, fitted to pairs by Bradley-Terry; it does not look at the prompt."""
    weights = _weights(os.environ[WEIGHTS_VARIABLE])
    return [sum(weights.get(feature, 0.0) for feature in sorted(features(response))) for response in responses]


def calm_help(prompts: Prompts, responses: Sequence[str]) -> list[float]:
    """Answers that stay calm, offer help, do not repeat themselves and are about 25 words long. Honest and shallow."""
    return [_calm_help(response) for response in responses]


def _calm_help(response: str) -> float:
    tokens = words(response)
    if not tokens:
        return -5.0
    text = " ".join(tokens)
    offered, calm, harsh = (len(pattern.findall(text)) for pattern in (HELP, CALM, HARSH))
    trigrams = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    repeated = sum(count - 1 for count in trigrams.values()) / len(tokens)
    varied = len(set(tokens)) / len(tokens)
    length = -(((len(tokens) - 25) / 25) ** 2)
    return min(offered, 2) + 0.7 * min(calm, 2) - 2.0 * harsh - 4.0 * repeated + varied + 0.5 * length


@cache
def _weights(path: str) -> dict[str, float]:
    return json.loads(Path(path).read_text(encoding="utf-8"))
