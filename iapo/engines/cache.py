"""A key-value cache with room to grow: transformers' own copies all of its tokens for every new one."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that a layer is enlarged by when it is full."""


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values [rows, heads, tokens, width] are views of longer tensors, written in place."""

    def __init__(self, filled: DynamicLayer) -> None:
        vars(self).update(vars(filled))
        self.stored: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values, with those of new tokens at the end."""
        assert self.keys is not None and self.values is not None  # it is made of a filled layer
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if self.stored is None or after > self.stored[0].shape[-2]:
            self.stored = _enlarged(self.keys, after + ROOM), _enlarged(self.values, after + ROOM)
        keys, values = self.stored
        keys[..., before:after, :] = key_states
        values[..., before:after, :] = value_states
        self.keys, self.values = keys[..., :after, :], values[..., :after, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows; what was stored for all of them is let go."""
        super().batch_select_indices(indices)
        self.stored = None


def with_room(cache: Any) -> Any:
    """The same filled cache, its plain layers with room to grow (sliding windows and others stay what they are)."""
    cache.layers = [RoomyLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _enlarged(filled: Tensor, tokens: int) -> Tensor:
    stored = filled.new_empty(*filled.shape[:-2], tokens, filled.shape[-1])
    stored[..., : filled.shape[-2], :] = filled
    return stored
