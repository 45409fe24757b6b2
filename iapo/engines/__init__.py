"""Engines draw responses to prompts. Each is one module with one function; `sample` picks by `sample.engine`.

An engine is a callable (prompts, samples, seed) -> for each prompt, `samples` responses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Response:
    """A sampled response: the token ids as sampled, with the end token where there is one.

    finish_reason: `stop` where the policy ended the response, `length` where it was cut (no end token then).
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


Engine = Callable[[list[list[int]], int, int], list[list[Response]]]
"""(token ids of each prompt, samples a prompt, seed) -> responses of each prompt, in order."""
