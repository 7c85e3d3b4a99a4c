"""The KV cache with its room taken once is the plain one, in other memory."""

from __future__ import annotations

import copy
import pickle
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import mhaffn
from mhaffn.cache import ReservedLayer, Room, reserve, rooms_of
from mhaffn.sizes import Workload
from tests.conftest import Model

STEPS = ["append", "append", "append", "cut", "reorder", "repeat", "select", "reset", "copy", "drop first", "lend"]


def states(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 5), st.booleans()), min_size=2, max_size=24))
def test_whatever_becomes_of_it_it_holds_what_the_plain_one_holds(steps: list[tuple[str, int, bool]]) -> None:
    room = Room(Workload(context=12, batch=2))
    layers: list[Any] = [DynamicLayer(), ReservedLayer(room)]
    batch, kept = 2, []
    for seed, (step, n, inference) in enumerate(steps):
        mode: AbstractContextManager[Any] = torch.inference_mode() if inference else torch.no_grad()
        seen = layers[0].get_seq_length()
        with mode:
            for i, layer in enumerate(layers):
                if step == "append":
                    keys, values = states(batch, n, seed), states(batch, n, -seed - 1)
                    returned = layer.update(keys, values)
                    assert torch.equal(returned[0], layer.keys) and torch.equal(returned[1], layer.values)
                elif step == "cut" and seen > n:
                    layer.crop(-n)
                elif step == "reorder":
                    layer.reorder_cache(torch.arange(n, n + batch) % batch)
                elif step == "repeat" and seen and batch < 8:
                    layer.batch_repeat_interleave(2)
                elif step == "select" and seen and batch > 1:
                    layer.batch_select_indices(torch.arange(batch - 1))
                elif step == "reset":
                    with torch.inference_mode():  # transformers 5.17 fills what is there with zeros
                        layer.reset()
                elif step == "copy":
                    kept.append((layer, None if layer.keys is None else layer.keys.clone()))
                    copied = (copy.deepcopy if n > 2 else copy.copy)(layer)
                    layers[i] = ReservedLayer(room, copied) if i else copied
                elif step == "drop first" and seen > 1:
                    layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
                elif step == "lend" and i:
                    other = ReservedLayer(room)
                    other.update(states(n, n, seed), states(n, n, seed))
                    kept.append((other, other.keys.clone()))
        if step == "repeat" and seen and batch < 8:
            batch *= 2
        elif step == "select" and seen and batch > 1:
            batch -= 1
        elif step == "reset" and layers[0].get_seq_length() == 0:
            batch = 2
        plain, reserved = layers
        assert plain.get_seq_length() == reserved.get_seq_length()
        if plain.get_seq_length():
            assert torch.equal(plain.keys, reserved.keys) and torch.equal(plain.values, reserved.values), step
    for layer, keys in kept:  # what goes on in a copy does not change what it was made of
        assert keys is None or torch.equal(layer.keys, keys)


def tensors(cache: DynamicCache) -> list[torch.Tensor]:
    return [held for layer in cache.layers for held in (layer.keys, layer.values)]


def held_bytes(*caches: DynamicCache) -> int:
    storages = [held.untyped_storage() for cache in caches for held in tensors(cache)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def counted(model: mhaffn.StreamedLlama) -> int:
    return model.runner._sizes.kv_cache(model.runner.plan.work)


def test_a_pass_takes_the_memory_of_all_and_later_ones_take_none(tiny_model: Model, device: str) -> None:
    cache = DynamicCache()
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device=device, context=40, batch=3) as model:
        first = torch.tensor([[5, 17, 101]] * 3, device=device)
        model(first, past_key_values=cache)
        places = [held.data_ptr() for held in tensors(cache)]
        for _ in range(20):
            model(first[:, :1], past_key_values=cache)
            cache.reorder_cache(torch.tensor([2, 0, 1], device=device))
        cache.crop(-4)
        model(first, past_key_values=cache)
        assert [held.data_ptr() for held in tensors(cache)] == places
        assert cache.get_seq_length() == 3 + 20 - 4 + 3
        assert held_bytes(cache) == counted(model)


def test_nothing_is_cut_from_a_cache_that_holds_nothing() -> None:
    cache = DynamicCache()
    reserve(cache, rooms_of(Workload(), 2))
    cache.crop(1)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_many_sequences_share_the_room_of_the_plan(rows: int) -> None:
    assert Room(Workload(context=40, batch=2)).positions(rows) == min(40, 80 // rows)


def test_sequences_that_come_and_go_keep_to_the_room_of_the_plan(tiny_model: Model, device: str) -> None:
    cache = DynamicCache()
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device=device, context=40) as model:
        model(torch.tensor([[5, 17, 101]], device=device), past_key_values=cache)
        cache.batch_repeat_interleave(4)
        for _ in range(7):
            model(torch.tensor([[7]] * 4, device=device), past_key_values=cache)
        assert held_bytes(cache) <= counted(model)
        cache.batch_select_indices(torch.tensor([2], device=device))
        places = [held.data_ptr() for held in tensors(cache)]
        for _ in range(30):
            model(torch.tensor([[7]], device=device), past_key_values=cache)
        assert held_bytes(cache) == counted(model) and [held.data_ptr() for held in tensors(cache)] == places


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_sequences_that_do_not_follow_on_are_refused_as_by_the_plain_one(before: int, after: int) -> None:
    for layer in (DynamicLayer(), ReservedLayer(Room(Workload(context=40)))):
        layer.update(states(before, 2, 0), states(before, 2, 0))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(states(after, 2, 0), states(after, 2, 0))
        assert layer.keys.shape == (before, 2, 2, 4)


def test_an_emptied_one_may_serve_another_model() -> None:
    layer = ReservedLayer(Room(Workload(context=40)))
    layer.update(states(1, 2, 0), states(1, 2, 0))
    layer.crop(-2)
    wider = states(1, 3, 0).repeat(1, 2, 1, 2).bfloat16()
    assert all(torch.equal(held, wider) and held.dtype == wider.dtype for held in layer.update(wider, wider))


def test_a_copy_is_plain_and_as_small_as_what_it_holds() -> None:
    cache = DynamicCache()
    reserve(cache, rooms_of(Workload(context=4000), layers=2))
    for layer in range(2):
        cache.update(states(1, 3, layer), states(1, 3, -layer), layer)
    for same in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert {type(layer) for layer in same.layers} == {DynamicLayer}
        assert held_bytes(same) == sum(held.nbytes for held in tensors(cache))
        assert all(map(torch.equal, tensors(same), tensors(cache)))


@torch.no_grad()
def test_caches_in_turns_hold_the_room_of_one(tiny_model: Model, device: str) -> None:
    prompts = [torch.tensor([row], device=device) for row in ([5, 17, 101], [9, 3])]
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device=device, context=40) as model:
        expected = [model(ids.repeat(1, 4)).logits for ids in prompts]
        caches = [DynamicCache(), DynamicCache()]
        for turn in range(4):
            for ids, cache, whole in zip(prompts, caches, expected, strict=True):
                logits = model(ids, past_key_values=cache).logits
                part = slice(turn * ids.shape[1], (turn + 1) * ids.shape[1])
                torch.testing.assert_close(logits, whole[:, part], rtol=0, atol=1e-4)
                rest = sum(held.nbytes for other in caches if other is not cache for held in tensors(other))
                assert held_bytes(*caches[: 1 + (turn > 0 or cache is caches[1])]) <= counted(model) + rest
            if turn == 1:
                caches[0] = copy.deepcopy(caches[0])


def test_what_a_plain_one_holds_moves_in() -> None:
    cache, longer = DynamicCache(), DynamicCache()
    cache.update(states(1, 3, 0), states(1, 3, 1), 0)
    rooms = rooms_of(Workload(context=40), layers=3)
    reserve(cache, rooms)
    keys, values = cache.update(states(1, 1, 2), states(1, 1, 3), 0)
    assert (
        torch.equal(keys, torch.cat([states(1, 3, 0), states(1, 1, 2)], 2))
        and keys.untyped_storage().nbytes() == 2 * 40 * 32
    )
    assert torch.equal(values, torch.cat([states(1, 3, 1), states(1, 1, 3)], 2)) and len(cache.layers) == 3
    for layer in range(4):
        longer.update(states(1, 3, 0), states(1, 3, 1), layer)
    reserve(longer, rooms)
    assert {type(layer) for layer in longer.layers} == {DynamicLayer}


def test_other_caches_stay_as_they_are(tiny_model: Model) -> None:
    config = AutoConfig.from_pretrained(tiny_model())
    sliding = copy.deepcopy(config)
    sliding.sliding_window, sliding.layer_types = 8, ["sliding_attention"] * 3
    for cache in (DynamicCache(config=sliding), StaticCache(config, max_cache_len=40)):
        before = list(cache.layers)
        reserve(cache, rooms_of(Workload(context=40), layers=3))
        assert all(layer is same for layer, same in zip(cache.layers, before, strict=True))
    reserve(None, rooms_of(Workload(context=40), layers=3))
