"""A KV cache that takes its memory once: as much as the plan has counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from mhaffn.sizes import Workload


class Room:
    """What a plan counts for a layer's keys and values. Of several caches the one that grew last has it.

    What the others hold is not counted: an old ``past_key_values`` that is kept, if only by ``out = model(ids)`` in a
    loop, takes as much memory besides.
    """

    def __init__(self, work: Workload) -> None:
        self._context, self._positions = work.context, work.batch * work.context
        self._holder: Callable[[], ReservedLayer | None] = lambda: None

    def positions(self, batch: int) -> int:
        """Of each of ``batch`` sequences, which share it."""
        return min(self._context, self._positions // batch)

    def pass_to(self, layer: ReservedLayer) -> None:
        """Whoever had it keeps what it holds, in memory no larger than that."""
        holder = self._holder()
        if holder is not None and holder is not layer:
            holder.leave()
        self._holder = weakref.ref(layer)


class ReservedLayer(DynamicLayer):
    """Keys and values of a layer, ``[B, H, S, K]`` each: the front of memory as large as a :class:`Room`.

    A plain layer is copied whole for each token, into memory a little larger than what it gives back, which the
    allocator keeps though no layer has a use for it. All else is as there: sequences may be cut, reordered, repeated
    and taken out. Only tensors taken from it are views: those of tokens cut off change as others take their places.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: Room, plain: DynamicLayer | None = None) -> None:
        super().__init__()
        if plain is not None:
            self.__dict__.update(plain.__dict__)
        self._room = room
        self._parts: tuple[Tensor, Tensor] | None = None  # for keys and values; both are of one piece of memory

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``[B, H, T, K]``; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        kind, new = _kind(key_states), key_states.shape[2]
        if _kind(value_states) != kind or (seen and not _kind(self.keys) == _kind(self.values) == kind):
            made: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return made  # of one dtype, unless it is refused there
        keys, values = self._memory_for(key_states, seen, seen + new)
        for part, held in ((keys, self.keys), (values, self.values)) if seen else ():
            if not _in_place(held, part):
                part.narrow(2, 0, seen).copy_(held)
        keys.narrow(2, seen, new).copy_(key_states)
        values.narrow(2, seen, new).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, seen + new), values.narrow(2, 0, seen + new)
        return self.keys, self.values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """As a plain layer's; of one that holds nothing, nothing, as of a cache that has no layers yet."""
        if self.is_initialized:
            super().crop(*args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Each sequence becomes what ``beam_idx`` names."""
        super().reorder_cache(beam_idx)
        self._settle()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence comes ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._settle()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences that ``indices`` name stay."""
        super().batch_select_indices(indices)
        self._settle()

    def leave(self) -> None:
        """Keeps what it holds in memory of its own; that of its room is free again."""
        if self._parts is not None and self.is_initialized:
            with torch.inference_mode(False):
                self.keys, self.values = self.keys.clone(), self.values.clone()
        self._parts = None

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copied and pickled it is a plain layer of what it holds, without the room, which no two share."""
        state = {name: value for name, value in vars(self).items() if name not in ("_room", "_parts")}
        if self.is_initialized:
            state |= {"keys": self.keys.clone(), "values": self.values.clone()}
        return DynamicLayer, (), state

    def _settle(self) -> None:
        """Brings what was made anew back into the room, before the next layer is made anew too."""
        if self._parts is not None and self.get_seq_length():
            self.update(self.keys[:, :, :0], self.values[:, :, :0])

    def _memory_for(self, states: Tensor, seen: int, total: int) -> tuple[Tensor, Tensor]:
        """Memory for ``total`` positions like ``states``; it may be that of the ``seen`` ones held, if they stay."""
        parts = self._parts
        if parts is not None and _kind(parts[0]) == _kind(states) and parts[0].shape[2] >= total:
            held = zip((self.keys, self.values), parts, strict=True) if seen else ()
            if all(_in_place(kept, part) or not _overlap(kept, part) for kept, part in held):
                return parts
        self._parts = parts = None  # given back first, if nothing is held there
        self._room.pass_to(self)
        batch, heads, _, dim = states.shape
        with torch.inference_mode(False):  # a later pass may come without it, and writes here too
            memory = states.new_empty(2, batch, heads, max(self._room.positions(batch), total), dim)
        self._parts = memory[0], memory[1]
        return self._parts


def _kind(t: Tensor) -> tuple[Any, ...]:
    """What is the same of all that one layer holds: sequences, heads, their width, dtype and device."""
    batch, heads, _, dim = t.shape
    return batch, heads, dim, t.dtype, t.device


def _in_place(held: Tensor, part: Tensor) -> bool:
    return held.data_ptr() == part.data_ptr() and held.stride() == part.stride()


def _overlap(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def rooms_of(work: Workload, layers: int) -> list[Room]:
    """The room of each layer in the plan made for ``work``."""
    return [Room(work) for _ in range(layers)]


def reserve(cache: Cache | None, rooms: Sequence[Room]) -> None:
    """Lets a plain :class:`~transformers.DynamicCache` grow in ``rooms``, one a layer; other caches stay as they are.

    One that holds something moves in as it grows.
    """
    if cache is None or type(cache) is not DynamicCache or cache.offloading or len(cache.layers) > len(rooms):
        return
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [ReservedLayer(room, layer) for room, layer in zip_longest(rooms, cache.layers)]
