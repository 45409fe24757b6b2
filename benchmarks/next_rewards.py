"""The rewards of a text with one token more, of all tokens at once, by the linear reward that hh.py fits.

What a token adds to a text depends on the last two words, and on what the text has already: each word and pair counts
once. So what a token adds to nothing is kept for each pair of last words, and what was there is taken off.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.hh_rewards import words

Floats = npt.NDArray[np.float64]
LETTERS = re.compile(r"[a-z']+")


class Gains(NamedTuple):
    """Tokens [n], each with a feature that it adds, the weights [n] of these, and all tokens of each feature."""

    tokens: npt.NDArray[np.int32]
    weights: Floats
    by_feature: dict[str, list[int]]


class NextRewards:
    """By weights of features (see `hh_rewards.features`), of tokens that are known by their texts.

    A token with a letter at its beginning must be letters throughout, as GPT-2's way to split a text makes them.
    """

    def __init__(self, weights: dict[str, float], tokens: Sequence[str]) -> None:
        self.texts = texts = [text.lower() for text in tokens]
        assert not any(LETTERS.match(text) and not LETTERS.fullmatch(text) for text in texts)
        self.weights, self.count = weights, len(texts)
        self.begin: dict[str, list[int]] = defaultdict(list)  # tokens by their first word, or by the end of the text
        self.letters: dict[str, list[int]] = defaultdict(list)  # those that go on with a word by their texts
        self.next: dict[str, list[str]] = defaultdict(list)  # words that have a weight behind a word
        self.longer: dict[str, list[str]] = defaultdict(list)  # words with weights that begin with this and go on
        for token, text in enumerate(texts):
            self.begin[[*words(text), ">"][0]].append(token)
            if LETTERS.match(text):
                self.letters[text].append(token)
        for feature in weights:
            first, *second = feature.split()
            self.next[first] += second
        for word in {word for feature in weights for word in feature.split()}:
            for length in range(1, len(word)):
                self.longer[word[:length]].append(word)
        self.joins = np.zeros(self.count, dtype=bool)
        self.joins[[token for own in self.letters.values() for token in own]] = True
        self.alone = self._gains((token, ["", *words(text), ">"]) for token, text in enumerate(texts))
        self.behind, self.joined = cache(self._behind), cache(self._joined)

    def __call__(self, prefix: Iterable[int]) -> Floats:
        """Rewards [V] of the prefix with each token, each as if the text ended there."""
        text = "".join(self.texts[token] for token in prefix)
        chain = ["<", *words(text)]
        closed = self._with([self.alone, self.behind(chain[-1])], self._features(chain))
        if not LETTERS.match(text[-1:]):
            return closed
        *before, begun = chain  # a word that may go on
        joined = self._with([self.joined(before[-1], begun)], self._features(before))
        return np.where(self.joins, joined, closed)

    def _with(self, gains: Iterable[Gains], had: set[str]) -> Floats:
        """Rewards [V] of the features that are there and those that each token adds to them."""
        found = np.full(self.count, math.fsum(self.weights[feature] for feature in had))
        for tokens, weights, by_feature in gains:
            found = found + np.bincount(tokens, weights, self.count)
            for feature in had & by_feature.keys():
                found[by_feature[feature]] -= self.weights[feature]
        return found

    def _features(self, chain: list[str]) -> set[str]:
        """Those with a weight that a chain of words has behind its first."""
        pairs = (f"{first} {second}" for first, second in pairwise(chain))
        return self.weights.keys() & {*chain[1:], *pairs}

    def _behind(self, last: str) -> Gains:
        """What tokens that begin behind the last word add to what they add alone."""
        pairs = {f"{last} {first}": self.begin[first] for first in self.next[last]}
        twice = self.alone.by_feature  # "!" and "!!"
        return self._of({pair: [one for one in own if one not in twice.get(pair, ())] for pair, own in pairs.items()})

    def _joined(self, before: str, begun: str) -> Gains:
        """Of tokens that go on with the word that was begun, where that makes a word with weights."""
        return self._gains(
            (token, [before, word, ">"])
            for word in self.longer[begun]
            for token in self.letters[word.removeprefix(begun)]
        )

    def _gains(self, chains: Iterable[tuple[int, list[str]]]) -> Gains:
        by_feature: dict[str, list[int]] = defaultdict(list)
        for token, chain in chains:
            for feature in self._features(chain):
                by_feature[feature].append(token)
        return self._of(by_feature)

    def _of(self, by_feature: dict[str, list[int]]) -> Gains:
        tokens = [token for own in by_feature.values() for token in own]
        weights = [self.weights[feature] for feature, own in by_feature.items() for _ in own]
        return Gains(np.array(tokens, dtype=np.int32), np.array(weights, dtype=np.float64), by_feature)
