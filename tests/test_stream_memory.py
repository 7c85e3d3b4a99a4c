"""The stream's memory: staging, tiers, caches and all that is around them keep to their budgets."""

from __future__ import annotations

import re
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import mhaffn
import mhaffn.runner
from mhaffn.bench.memory import Watch
from mhaffn.device import open_device
from mhaffn.errors import BudgetError, ConfigError
from mhaffn.plan import Plan, make_plan
from mhaffn.reader import PinnedArena
from mhaffn.ring import ByteRing
from mhaffn.sizes import Workload
from mhaffn.store import Store
from mhaffn.trace import Trace
from tests.conftest import Model
from tests.streaming import greedy, resident_tokens, rss


def test_staging_keeps_to_its_budget_and_later_passes_allocate_nothing(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    arena = mhaffn.runner.PinnedArena

    def counted(nbytes: int, **options: Any) -> Any:
        made.append(nbytes)
        return arena(nbytes, **options)

    monkeypatch.setattr("mhaffn.runner.PinnedArena", counted)
    monkeypatch.setattr("mhaffn.memory.PinnedArena", counted)
    folder = tiny_model(hidden_size=576, intermediate_size=4096, num_hidden_layers=12)
    plan = least_plan(folder, copies=False)
    weights = sum(records.nbytes for records in Store.open(folder).sublayers.values())
    assert plan.staging_bytes < weights / 4
    with mhaffn.load(folder, gpu=None, dram=plan.dram_bytes, device="cpu") as model:
        assert model.runner.plan.staging_bytes == plan.staging_bytes
        greedy(model, 2)
        before = rss()
        for _ in range(4):
            greedy(model, 4)
        assert len(made) == 2 and made[1] <= plan.dram_bytes  # residents, then staging: none in any later pass
        info = model.runner.staging_info()
        assert info is not None and 0 < info.peak_leased_bytes <= plan.staging_bytes
        assert rss() - before < 4 << 20
    with pytest.raises(BudgetError, match=r"at least .*\(\d+ bytes\)"):
        mhaffn.load(folder, gpu=None, dram=plan.dram_bytes - 1, device="cpu")


@pytest.mark.usefixtures("copying")
def test_arenas_keep_to_the_dram_budget(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is mapped at one time: staging and DRAM tier together, or what the device's part is loaded through."""
    mapped: list[int] = []

    class Counted(PinnedArena):
        def __init__(self, nbytes: int, **options: Any) -> None:
            super().__init__(nbytes, **options)
            open_now.append(self)
            mapped.append(sum(arena.nbytes for arena in open_now))

        def close(self) -> None:
            super().close()
            if self in open_now:
                open_now.remove(self)

    open_now: list[Counted] = []
    monkeypatch.setattr("mhaffn.runner.PinnedArena", Counted)
    monkeypatch.setattr("mhaffn.memory.PinnedArena", Counted)
    folder = tiny_model(hidden_size=576, intermediate_size=4096, num_hidden_layers=4, vocab_size=8000)
    expected = resident_tokens(folder)

    def load(gpu: int | None, dram: int) -> mhaffn.StreamedLlama:
        planned = partial(make_plan, copies=True, gpu=gpu)
        monkeypatch.setattr("mhaffn.opening.make_plan", lambda *a, gpu, copies, **options: planned(*a, **options))
        return mhaffn.load(folder, dram=dram)

    with pytest.raises(BudgetError, match=r"--dram .* needs at least") as refused:
        load(None, 1)
    least = int(re.findall(r"\((\d+) bytes\)", str(refused.value))[0])
    for gpu, budget in ((None, least), (None, 2 * least + 12345), (4 << 30, 8 << 20), (4 << 30, 1 << 30)):
        mapped.clear()
        with load(gpu, budget) as model:
            assert greedy(model) == expected
            assert max(mapped) <= model.runner.plan.dram_bytes <= budget
            assert min(128 << 20, budget) - (2 << 20) <= mapped[0], "reads as large as the budget lets them be"
        assert not open_now
    with pytest.raises(BudgetError, match=rf"--dram .* needs at least .*\({8 << 20} bytes\)"):
        load(4 << 30, (8 << 20) - 1)


def least_plan(folder: Path, *, copies: bool) -> Plan:
    """Everything from SSD, one sublayer ahead, with room for the model's whole context."""
    config = Store.open(folder).config
    work = Workload(tokens=config.max_position_embeddings, context=config.max_position_embeddings)
    return make_plan(config, "float32", copies=copies, prefetch=1, work=work)


def test_rss_of_a_streamed_model_is_staging_and_residents_not_the_model(tiny_model: Model) -> None:
    folder = tiny_model(hidden_size=576, intermediate_size=4096, num_hidden_layers=12)
    store = Store.open(folder)
    weights = sum(records.nbytes for records in store.sublayers.values())
    plan = least_plan(folder, copies=False)
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as warm_up:
        greedy(warm_up)
    before = rss()
    with mhaffn.load(folder, gpu=None, dram=plan.dram_bytes, device="cpu") as model:
        greedy(model)
        grown = rss() - before
        assert grown < plan.staging_bytes + 24 * 2**20 < weights
        assert grown < plan.dram_bytes  # the whole budget holds embedding, head, KV cache and activations too


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "top_p": 0.9, "top_k": 50}, {"do_sample": False, "num_beams": 4}], ids=str
)
def test_choosing_tokens_of_a_large_vocabulary_keeps_to_the_budget(options: dict[str, Any], tiny_model: Model) -> None:
    folder, batch = tiny_model(dtype="bfloat16", vocab_size=128_000), 32
    ids = torch.randint(2, 200, (batch // options.get("num_beams", 1), 8))

    def generate(model: mhaffn.StreamedLlama, ids: torch.Tensor) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **options)

    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as warm_up:
        generate(warm_up, ids[:1])
    watch = Watch(torch.device("cpu"))
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", context=16, batch=batch) as model:
        generate(model, ids)
        assert watch.peaks()["dram"] <= model.runner.plan.dram_bytes + (12 << 20)  # torch's own


@pytest.mark.gpu
def test_what_one_stream_computes_is_marked_after_what_another_did() -> None:
    device = open_device(torch.device("cuda"), Trace())
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1 << 30)
        before = device.mark_compute()
    with torch.cuda.stream(torch.cuda.Stream()):
        device.mark_compute().synchronize()
    assert before.query()


def test_the_logits_of_all_tokens_keep_to_the_budget_that_counts_them(tiny_model: Model) -> None:
    folder = tiny_model(dtype="bfloat16", vocab_size=128_000, max_position_embeddings=1024)
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as warm_up, torch.inference_mode():
        warm_up(torch.ones(1, 8, dtype=torch.int64))
    watch = Watch(torch.device("cpu"))
    options: dict[str, Any] = {"gpu": None, "dram": None, "device": "cpu", "context": 1024, "all_logits": True}
    with mhaffn.load(folder, **options) as model, torch.inference_mode():
        assert model(torch.ones(1, 1024, dtype=torch.int64)).logits.shape == (1, 1024, 128_000)
        assert watch.peaks()["dram"] <= model.runner.plan.dram_bytes + (12 << 20)  # torch's own
        assert model(torch.ones(4, 200, dtype=torch.int64)).logits.shape == (4, 200, 128_000)
        with pytest.raises(ConfigError, match="states and logits"):
            model(torch.ones(4, 256, dtype=torch.int64))


@pytest.mark.parametrize(("batch", "context", "tokens"), [(1, 8192, 8192), (3, 2048, 2048)], ids=["steps", "padding"])
def test_masks_of_long_prompts_keep_to_the_budget(batch: int, context: int, tokens: int, tiny_model: Model) -> None:
    folder = tiny_model(
        dtype="bfloat16", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context
    )
    ids = torch.randint(2, 200, (batch, context - 4))
    seen = torch.ones_like(ids)
    seen[1:, :9] = 0
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as warm_up:
        greedy(warm_up)
    watch = Watch(torch.device("cpu"))
    with mhaffn.load(
        folder, gpu=None, dram=None, device="cpu", context=context, tokens=tokens, batch=batch
    ) as model:  # fmt: skip
        model.generate(ids, attention_mask=seen, max_new_tokens=2, do_sample=False)
        assert watch.peaks()["dram"] <= model.runner.plan.dram_bytes + (24 << 20)  # torch's own


def test_a_cache_that_grows_keeps_to_the_budget(tiny_model: Model) -> None:
    context, heads, dim = 16_384, 32, 64
    folder = tiny_model(
        dtype="bfloat16", num_hidden_layers=1, hidden_size=64, num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=dim, max_position_embeddings=context,
    )  # fmt: skip
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as warm_up:
        greedy(warm_up)
    watch = Watch(torch.device("cpu"))
    with (
        mhaffn.load(folder, gpu=None, dram=None, device="cpu", context=context, tokens=64) as model,
        torch.inference_mode(),
    ):
        cache = DynamicCache()
        full = torch.ones(1, dtype=torch.bfloat16).expand(1, heads, context - 65, dim)
        cache.update(full, full, 0)
        for tokens in (64, 1):
            model(torch.ones(1, tokens, dtype=torch.int64), past_key_values=cache)
        assert watch.peaks()["dram"] <= model.runner.plan.dram_bytes + (32 << 20)  # torch's own, and the allocator's


@given(st.integers(1, 40), st.lists(st.one_of(st.integers(1, 30), st.none()), max_size=60))
def test_a_byte_ring_never_hands_out_bytes_twice(capacity: int, steps: list[int | None]) -> None:
    ring, taken = ByteRing(capacity), deque[tuple[int, int]]()
    for nbytes in steps:
        if nbytes is None:
            if taken:
                taken.popleft()
                ring.free()
            continue
        offset = ring.take(nbytes)
        if offset is None:
            # Nothing contiguous was free where the ring may place: after the newest, or at the start.
            assert taken or nbytes > capacity
            continue
        assert offset >= 0 and offset + nbytes <= capacity
        assert all(offset + nbytes <= o or o + n <= offset for o, n in taken)
        taken.append((offset, nbytes))


@given(st.lists(st.integers(1, 50), min_size=2, max_size=8), st.integers(1, 3))
def test_the_planned_ring_always_holds_the_prefetch(images: list[int], prefetch: int) -> None:
    """However the cycle drifts over the ring, ``prefetch`` sublayers fit beside the one in use."""
    n = len(images)
    window = max(sum(images[(i + j) % n] for j in range(prefetch + 1)) for i in range(n))
    ring, held = ByteRing(window + max(images)), deque[int]()
    for step in range(6 * n):
        if len(held) == prefetch + 1:
            held.popleft()
            ring.free()
        assert ring.take(images[step % n]) is not None
        held.append(step)
