"""The KV cache with its room taken once is the plain one, in other memory."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import mhaffn
from mhaffn.cache import ReservedLayer, reserve
from mhaffn.plan import Workload
from tests.conftest import Model

STEPS = ["append", "append", "append", "cut", "reorder", "repeat", "select", "reset", "copy", "drop first"]


def states(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 5), st.booleans()), min_size=2, max_size=24))
def test_whatever_becomes_of_it_it_holds_what_the_plain_one_holds(steps: list[tuple[str, int, bool]]) -> None:
    layers: list[Any] = [DynamicLayer(), ReservedLayer(12)]
    batch, kept = 2, []
    for seed, (step, n, inference) in enumerate(steps):
        inference = inference or step == "reset"  # the oldest transformers zeroes what it holds, wherever it is from
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
                    layers[i] = copy.deepcopy(layer)
                elif step == "drop first" and seen > 1:
                    layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
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


def rooms(cache: DynamicCache) -> list[torch.Tensor]:
    return [held for layer in cache.layers for held in (layer.keys, layer.values)]


def test_a_pass_takes_the_memory_of_all_and_later_ones_take_none(tiny_model: Model, device: str) -> None:
    cache = DynamicCache()
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device=device, context=40, batch=3) as model:
        first = torch.tensor([[5, 17, 101]] * 3, device=device)
        model(first, past_key_values=cache)
        places = [held.data_ptr() for held in rooms(cache)]
        for _ in range(20):
            model(first[:, :1], past_key_values=cache)
            cache.reorder_cache(torch.tensor([2, 0, 1], device=device))
        cache.crop(-4)
        model(first, past_key_values=cache)
        assert [held.data_ptr() for held in rooms(cache)] == places
        assert cache.get_seq_length() == 3 + 20 - 4 + 3
        counted = model.runner._sizes.kv_cache(model.runner.plan.work)
    assert sum(held.untyped_storage().nbytes() for held in rooms(cache)) == counted


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_many_sequences_share_the_room_of_the_plan(rows: int) -> None:
    cache = DynamicCache()
    reserve(cache, rows, Workload(context=40, batch=2), layers=3)
    assert [layer.positions for layer in cache.layers] == [min(40, 80 // rows)] * 3


def test_other_caches_stay_as_they_are(tiny_model: Model) -> None:
    config = AutoConfig.from_pretrained(tiny_model())
    filled, sliding = DynamicCache(), copy.deepcopy(config)
    filled.update(states(1, 3, 0), states(1, 3, 1), 0)
    sliding.sliding_window, sliding.layer_types = 8, ["sliding_attention"] * 3
    for cache in (filled, DynamicCache(config=sliding), StaticCache(config, max_cache_len=40)):
        before = list(cache.layers)
        reserve(cache, 1, Workload(context=40), layers=3)
        assert all(layer is same for layer, same in zip(cache.layers, before, strict=True))
    reserve(None, 1, Workload(context=40), layers=3)
