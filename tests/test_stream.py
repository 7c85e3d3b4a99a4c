"""The stream: every placement gives the resident model's tokens, within its memory, and fails loudly."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
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
from mhaffn.config import Sublayer, order
from mhaffn.device import HostDevice, open_device
from mhaffn.errors import (
    BudgetError,
    ChecksumError,
    ConfigError,
    EngineUnavailableError,
    PinnedMemoryError,
    ReadError,
    StreamError,
    TruncatedFileError,
)
from mhaffn.formats import Formats
from mhaffn.plan import TIERS, Plan, Tier, Workload, make_plan
from mhaffn.reader import PinnedArena
from mhaffn.report import make_report
from mhaffn.ring import ByteRing
from mhaffn.store import Store, pack
from mhaffn.trace import Trace
from tests.conftest import Model


class CopyingHost(HostDevice):
    """The CPU with memory of its own: streamed sublayers are copied, as to a GPU."""

    copies = True


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhaffn.runner.open_device", lambda device, trace: CopyingHost(trace))
    monkeypatch.setattr("mhaffn.opening.make_plan", lambda *a, **options: make_plan(*a, **(options | {"copies": True})))


def greedy(model: mhaffn.StreamedLlama, tokens: int = 6) -> list[int]:
    ids = torch.tensor([[5, 17, 101, 42, 9]], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    result: list[int] = output[0].tolist()
    return result


def resident_tokens(folder: Path, tokens: int = 6) -> list[int]:
    layers = Store.open(folder).config.num_layers
    with mhaffn.load(folder, device="cpu", tiers=dict.fromkeys(order(layers), "dram")) as model:
        return greedy(model, tokens)


PLACEMENTS = list(itertools.product(TIERS, repeat=4))


@pytest.mark.parametrize("engine", ["io_uring", pytest.param("threads", marks=pytest.mark.slow)])
def test_every_placement_gives_the_resident_tokens(engine: Any, tiny_model: Model) -> None:
    folder = tiny_model(num_hidden_layers=2)
    expected = resident_tokens(folder)
    for tiers in PLACEMENTS:
        with load_placed(folder, tiers, engine=engine, device="cpu") as model:
            assert greedy(model) == expected, tiers


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("placements", [PLACEMENTS[::4], pytest.param(PLACEMENTS, marks=pytest.mark.slow)])
def test_every_placement_with_copies(placements: list[tuple[Tier, ...]], tiny_model: Model) -> None:
    folder = tiny_model(num_hidden_layers=2)
    expected = resident_tokens(folder)
    for tiers in placements:
        with load_placed(folder, tiers) as model:
            assert greedy(model) == expected, tiers


FEW_BITS = {
    "int4": Formats.parse("int4:32", "int4:32"),
    "int8": Formats.parse("int8", "int8"),
    "a mix": Formats.parse("fp8", "int4:64:zeros", ["1=int8:32"]),
}


@pytest.fixture(scope="module")
def few_bits(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    source = tiny_model(
        num_hidden_layers=2, hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    packed = {
        name: pack(source, tmp_path_factory.mktemp("few") / "store", formats=formats).path
        for name, formats in FEW_BITS.items()
    }
    return packed.__getitem__


@pytest.mark.parametrize("placements", [PLACEMENTS[::10], pytest.param(PLACEMENTS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FEW_BITS)
@pytest.mark.parametrize("with_copies", [False, True])
def test_placements_of_weights_in_few_bits(
    with_copies: bool, name: str, placements: list[tuple[Tier, ...]], few_bits: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    folder = few_bits(name)
    expected = resident_tokens(folder)
    if with_copies:
        request.getfixturevalue("copying")
    for tiers in placements:
        with load_placed(folder, tiers, device="cpu") as model:
            assert greedy(model) == expected, tiers


@pytest.mark.gpu
@pytest.mark.parametrize("name", FEW_BITS)
def test_placements_of_weights_in_few_bits_on_the_gpu(name: str, few_bits: Callable[[str], Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    folder = few_bits(name)
    with load_placed(folder, ("gpu",) * 4, device="cuda") as model:
        expected = greedy(model)
    for tiers in PLACEMENTS[::4]:
        with load_placed(folder, tiers, device="cuda") as model:
            assert greedy(model) == expected, tiers


@pytest.mark.usefixtures("copying")
def test_a_model_opened_in_inference_mode_streams_too(tiny_model: Model) -> None:
    folder = tiny_model(num_hidden_layers=2)
    expected = resident_tokens(folder)
    with torch.inference_mode(), load_placed(folder, ("ssd", "dram", "ssd", "gpu")) as model:
        assert greedy(model) == expected


@pytest.mark.gpu
def test_every_placement_on_the_gpu(tiny_model: Model) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    folder = tiny_model(num_hidden_layers=2)
    with load_placed(folder, ("gpu",) * 4, device="cuda") as model:
        expected = greedy(model)
    for tiers in PLACEMENTS:
        with load_placed(folder, tiers, device="cuda") as model:
            assert greedy(model) == expected, tiers


def load_placed(folder: Path, tiers: tuple[Tier, ...], **options: Any) -> mhaffn.StreamedLlama:
    try:
        return mhaffn.load(
            folder, gpu=None, dram=None, tiers=dict(zip(order(len(tiers) // 2), tiers, strict=True)), **options
        )
    except EngineUnavailableError as error:
        pytest.skip(str(error))


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


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


def test_the_trace_counts_every_byte_once_a_pass(tiny_model: Model) -> None:
    folder = tiny_model()
    store = Store.open(folder)
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu") as model:
        greedy(model, 5)
        model.close()
        spans = list(model.runner.trace.spans)
    for sublayer, records in store.sublayers.items():
        reads = [s for s in spans if s.lane == "ssd" and s.sublayer == sublayer]
        computes = [s for s in spans if s.lane == sublayer.kind and s.sublayer == sublayer]
        assert len(computes) == 5 and len(reads) >= 5
        assert all(read.nbytes == records.nbytes for read in reads)
    assert [s.sublayer for s in spans if s.lane in ("mha", "ffn")] == list(order(3)) * 5


@pytest.mark.parametrize("verify", [True, False])
def test_the_report_tells_what_verifying_cost(verify: bool, tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "packed")
    streamed = dict.fromkeys(order(store.config.num_layers), "ssd")
    with mhaffn.load(store.path, device="cpu", tiers=streamed, verify=verify) as model:
        greedy(model)
        report = make_report(model.runner.trace, "decode")
    assert report is not None
    read = sum(row.nbytes for row in report.rows if row.lane == "ssd")
    assert (report.checks is not None) == verify
    if report.checks is not None:
        assert report.checks.nbytes == read > 0
        assert 0 < report.checks.cpu_s < report.seconds_per_pass * os.cpu_count()  # type: ignore[operator]


def test_a_pass_that_ends_early_starts_again_at_the_first_sublayer(tiny_model: Model) -> None:
    folder = tiny_model()
    expected = resident_tokens(folder)
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu") as model:
        for stop_at in (Sublayer(0, "ffn"), Sublayer(2, "mha")):
            fail_once_at(model, stop_at)
            with pytest.raises(ZeroDivisionError):
                greedy(model)
            assert greedy(model) == expected


@pytest.mark.parametrize("copies", [False, True])
def test_after_passes_that_failed_anywhere_memory_is_used_again_and_checked(
    copies: bool, tiny_model: Model, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if copies:
        request.getfixturevalue("copying")
    folder = tiny_model(hidden_size=576, intermediate_size=1024)
    expected = resident_tokens(folder)
    packed = pack(folder, tmp_path / "packed")
    with load_placed(packed.path, ("ssd", "ssd", "dram", "ssd", "gpu", "ssd"), device="cpu") as model:
        for sublayer in order(3):
            fail_once_at(model, sublayer)
            with pytest.raises(ZeroDivisionError):
                greedy(model)
            assert greedy(model) == expected
        report = make_report(model.runner.trace, "decode")
        assert report is not None and report.checks is not None
        streamed = sum(packed.sublayers[s].nbytes for s in model.runner.plan.streamed("ssd"))
        assert report.checks.nbytes == streamed, "all that was read for a pass, and once"
        info = model.runner.staging_info()
        assert info is not None and info.leaked_bytes == 0
        assert 0 < info.peak_leased_bytes <= model.runner.plan.staging_bytes
        with Path(packed.sublayers[Sublayer(2, "ffn")].tensors[0].path).open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(bytes(5))
        with pytest.raises(ChecksumError, match="layer 2 ffn"):
            greedy(model, 12)


@pytest.mark.parametrize("copies", [False, True])
def test_after_a_pass_that_came_to_nothing_streamed_the_trace_tells_right(
    copies: bool, tiny_model: Model, request: pytest.FixtureRequest
) -> None:
    if copies:
        request.getfixturevalue("copying")
    folder = tiny_model()
    expected = resident_tokens(folder)
    with load_placed(folder, ("gpu", "ssd", "dram", "ssd", "gpu", "ssd"), device="cpu") as model:
        assert greedy(model) == expected
        for _ in range(2):
            fail_once_at(model, Sublayer(0, "mha"))
            with pytest.raises(ZeroDivisionError):
                greedy(model)
        assert greedy(model) == expected
        trace = model.runner.trace
    numbers = [run.number for run in trace.passes]
    assert numbers == [*range(1, 7), *range(9, 15)]
    spans = {(span.lane, span.sublayer, span.number): span for span in trace.spans}
    for number, sublayer in itertools.product(numbers, model.runner.plan.streamed("ssd")):
        assert spans["ssd", sublayer, number].end_s <= spans[sublayer.kind, sublayer, number].start_s


def fail_once_at(model: mhaffn.StreamedLlama, sublayer: Sublayer) -> None:
    block = model.runner.blocks[sublayer.layer]
    module = block.mha if sublayer.kind == "mha" else block.ffn

    def fail(*_: Any) -> None:
        handle.remove()
        raise ZeroDivisionError

    handle = module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_a_file_that_shrinks_ends_the_run_and_the_next_model_works(
    engine: Any, tiny_model: Model, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model(dtype="bfloat16", hidden_size=576), tmp_path / "model")
    expected = resident_tokens(folder)
    path = folder / "model.safetensors"
    size, content = path.stat().st_size, path.read_bytes()
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", engine=engine) as model:
        assert greedy(model) == expected
        os.truncate(path, size // 2)
        with pytest.raises(TruncatedFileError, match=path.name) as caught:
            for _ in range(8):
                greedy(model)
        assert size // 2 <= caught.value.offset + 4096
        with pytest.raises(TruncatedFileError):
            greedy(model)
    path.write_bytes(content)
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", engine=engine) as model:
        assert greedy(model) == expected


def load_and_run(folder: Path, **options: Any) -> None:
    with mhaffn.load(folder, gpu=None, dram=None, **options) as model:
        greedy(model)


def test_a_flipped_bit_is_found_before_it_becomes_text(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "store")
    path = Path(store.sublayers[Sublayer(1, "ffn")].tensors[0].path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for tiers in (None, dict.fromkeys(order(3), "dram")):
        with pytest.raises(ChecksumError, match=r"layer 1 ffn is damaged.*--no-verify"):
            load_and_run(store.path, device="cpu", tiers=tiers)
        load_and_run(store.path, device="cpu", tiers=tiers, verify=False)


def test_a_flipped_bit_in_the_embedding_is_found(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "store")
    path = Path(store.resident["head"].path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    with pytest.raises(ChecksumError, match="the resident part is damaged"):
        load_and_run(store.path, device="cpu")


@pytest.mark.usefixtures("copying")
def test_a_flipped_bit_is_found_on_its_way_to_the_device(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "store")
    path = Path(store.sublayers[Sublayer(2, "mha")].tensors[0].path)
    content = bytearray(path.read_bytes())
    content[5000] ^= 128
    path.write_bytes(content)
    for tiers in (None, dict.fromkeys(order(3), "gpu"), dict.fromkeys(order(3), "dram")):
        with pytest.raises(ChecksumError, match="layer 2 mha"):
            load_and_run(store.path, tiers=tiers)


def test_a_missing_file_is_named(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "a folder with spaces – und Umlauten äöü")
    path = Path(store.sublayers[Sublayer(1, "mha")].tensors[0].path)
    with mhaffn.load(store.path, gpu=None, dram=None, device="cpu") as model:
        greedy(model)
    content = path.read_bytes()
    opened = Store.open(store.path)
    path.unlink()
    with pytest.raises(ReadError, match="layer-001-mha"):
        runner = mhaffn.runner.Runner(
            opened, make_plan(opened.config, "float32", copies=False), device=torch.device("cpu")
        )
        try:
            for _ in range(2):
                runner.sweep()
        finally:
            runner.close()
    path.write_bytes(content)


def test_odd_offsets_in_a_foreign_file_are_read_right(tiny_model: Model, tmp_path: Path) -> None:
    """A header of odd length puts every tensor at an odd address, where no typed view exists."""
    folder = shutil.copytree(tiny_model(dtype="bfloat16"), tmp_path / "model")
    expected = resident_tokens(tiny_model(dtype="bfloat16"))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 3).to_bytes(8, "little") + content[8 : 8 + length] + b"   " + content[8 + length :])
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu") as model:
        assert greedy(model) == expected


def test_two_passes_at_once_are_refused(tiny_model: Model) -> None:
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as model:
        entered, go_on = threading.Event(), threading.Event()

        def wait(*_: Any) -> None:
            entered.set()
            go_on.wait(20)

        model.runner.blocks[1].register_forward_pre_hook(wait)
        thread = threading.Thread(target=greedy, args=(model, 1))
        thread.start()
        assert entered.wait(20)
        with pytest.raises(StreamError, match="another pass is running"):
            greedy(model)
        go_on.set()
        thread.join()


def test_close_in_the_middle_of_a_pass_is_quick_and_final(tiny_model: Model) -> None:
    folder, before = tiny_model(), set(threading.enumerate())  # making a model starts a thread of tqdm's
    model = mhaffn.load(folder, gpu=None, dram=None, device="cpu")
    greedy(model, 1)
    assert set(threading.enumerate()) - before
    started = time.perf_counter()
    model.close()
    assert time.perf_counter() - started < 5
    assert not set(threading.enumerate()) - before


def test_a_close_that_was_interrupted_can_be_done_again(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = tiny_model(), set(threading.enumerate())
    model = mhaffn.load(folder, gpu=None, dram=None, device="cpu")
    greedy(model, 1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mhaffn.stream.threading.Thread.join", interrupted)
        model.close()
    with pytest.raises(StreamError, match="closed"):
        greedy(model, 1)
    model.close()
    model.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(PinnedMemoryError, match="closed"):
        model.runner.staging_info()


def sweep_until_error(model: mhaffn.StreamedLlama, errors: list[BaseException]) -> None:
    try:
        while True:
            model.runner.sweep()
    except BaseException as error:
        errors.append(error)


def test_close_during_a_pass_ends_it_with_an_error(tiny_model: Model) -> None:
    for wait_s in (0.0, 0.002, 0.01, 0.05):
        model = mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu")
        errors: list[BaseException] = []

        thread = threading.Thread(target=sweep_until_error, args=(model, errors))
        thread.start()
        time.sleep(wait_s)
        model.close()
        thread.join(10)
        assert not thread.is_alive()
        assert [type(error) for error in errors] == [StreamError]


@pytest.mark.parametrize("kind", ["mha", "ffn"])
def test_an_interrupt_between_two_steps_gives_no_wrong_weights(kind: Any, tiny_model: Model) -> None:
    """Where one kind streams, its neighbours have the same shapes: mixing them up would go unnoticed."""
    folder = tiny_model()
    expected = resident_tokens(folder)
    tiers: dict[Sublayer, Tier] = {s: "ssd" if s.kind == kind else "dram" for s in order(3)}
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", tiers=tiers) as model:
        stream = model.runner._stream
        wait = stream._await_arrival

        def interrupted() -> None:
            stream._await_arrival = wait  # type: ignore[method-assign]
            wait()
            raise KeyboardInterrupt

        for _ in range(2):
            stream._await_arrival = interrupted  # type: ignore[method-assign, assignment]
            with pytest.raises(KeyboardInterrupt):
                greedy(model)
            assert greedy(model) == expected


def test_an_interrupt_before_the_release_of_the_last_sublayer_blocks_no_later_pass(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next pass begins where the cycle stands, so that nothing is out of order."""
    folder = tiny_model()
    expected = resident_tokens(folder)
    tiers: dict[Sublayer, Tier] = {s: "ssd" if s == Sublayer(2, "ffn") else "dram" for s in order(3)}
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", tiers=tiers) as model:
        span = HostDevice.span

        def interrupted(device: HostDevice, lane: Any, sublayer: Sublayer, *options: Any) -> None:
            if sublayer == Sublayer(2, "ffn"):
                raise KeyboardInterrupt
            span(device, lane, sublayer, *options)

        for _ in range(4):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(HostDevice, "span", interrupted)
                greedy(model)
        results: list[list[int]] = []
        thread = threading.Thread(target=lambda: results.append(greedy(model)), daemon=True)
        thread.start()
        thread.join(20)
        assert results == [expected]


def test_a_forked_child_is_told_to_load_again(tiny_model: Model) -> None:
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as model:
        greedy(model, 1)
        child = os.fork()
        if child == 0:
            code = 3
            try:
                model.runner._stream.acquire(Sublayer(0, "mha"))
            except StreamError as error:
                code = 0 if "fork" in str(error) else 4
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        greedy(model, 2)


def test_two_models_stream_the_same_store_at_once(tiny_model: Model) -> None:
    folder = tiny_model()
    expected = resident_tokens(folder)
    with (
        mhaffn.load(folder, gpu=None, dram=None, device="cpu") as first,
        mhaffn.load(folder, gpu=None, dram=None, device="cpu") as second,
    ):
        results: list[list[int]] = []
        threads = [threading.Thread(target=lambda m=m: results.append(greedy(m))) for m in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected, expected]


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
