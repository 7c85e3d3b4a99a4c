"""A KV cache that takes its memory once: as much as the plan has counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from mhaffn.plan import Workload


class ReservedLayer(DynamicLayer):
    """Keys and values of a layer, ``[B, H, S, K]`` each: the front of memory that has room for ``positions`` of them.

    A plain layer is copied whole for each token, into memory a little larger than what it gives back, which the
    allocator keeps though no layer has a use for it. All else is as there: sequences may be cut, reordered, repeated
    and taken out, and what outgrows its room moves into a larger one.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self._rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``[B, H, T, K]``; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        total = seen + key_states.shape[-2]
        keys = _extended(self._rooms[0], self.keys, seen, key_states, self.positions)
        values = _extended(self._rooms[1], self.values, seen, value_states, self.positions)
        self._rooms = keys, values
        self.keys, self.values = keys[:, :, :total], values[:, :, :total]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Each sequence becomes what ``beam_idx`` names, in the room there is."""
        super().reorder_cache(beam_idx)
        if self.get_seq_length():
            self.update(self.keys[:, :, :0], self.values[:, :, :0])


def _extended(room: Tensor | None, held: Tensor, seen: int, new: Tensor, positions: int) -> Tensor:
    """Memory that begins with the ``seen`` positions of ``held``, and ``new`` after them: ``room`` if it will do."""
    batch, heads, count, dim = new.shape
    total = seen + count
    stays = room is not None and (held.data_ptr(), held.stride()) == (room.data_ptr(), room.stride())
    if room is None or not _fits(room, batch, total) or (seen and not stays and _overlap(held, room)):
        stays = False
        with torch.inference_mode(False):  # a later pass may come without it, and writes here too
            room = new.new_empty(batch, heads, max(positions, total), dim)
    if seen and not stays:
        room[:, :, :seen] = held
    room[:, :, seen:total] = new
    return room


def _fits(room: Tensor, batch: int, positions: int) -> bool:
    may_write = torch.is_inference_mode_enabled() or not room.is_inference()  # such as a copy made in that mode is
    return may_write and room.shape[0] == batch and room.shape[2] >= positions


def _overlap(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def reserve(cache: Cache | None, batch: int, work: Workload, layers: int) -> None:
    """Gives a plain :class:`~transformers.DynamicCache` that is still empty the room of the plan made for ``work``.

    ``batch`` sequences share it. Other caches, and those that hold something, stay as they are.
    """
    if cache is None or type(cache) is not DynamicCache or cache.offloading:
        return
    if all(type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers):
        positions = min(work.context, work.batch * work.context // batch)
        cache.layers = [ReservedLayer(positions) for _ in range(layers)]
