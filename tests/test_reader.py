"""The behaviour of the reader, the same for both engines."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from mhaffn.errors import (
    EngineUnavailableError,
    PinnedMemoryError,
    ReadCancelledError,
    ReadError,
    ReadTimeoutError,
    TruncatedFileError,
)
from mhaffn.reader import Extent, PinnedArena, Reader, measure_disk
from tests.reader_files import ENGINES, MIB, besides_small_pages, kernel, make_file


@pytest.fixture
def arena() -> Iterator[PinnedArena]:
    with PinnedArena(16 * MIB, cuda=False) as arena:
        yield arena


@pytest.fixture(params=ENGINES)
def reader(request: pytest.FixtureRequest, arena: PinnedArena) -> Iterator[Reader]:
    with Reader(engine=request.param, block_bytes=64 << 10, depth=4, arena=arena) as reader:
        yield reader


def read(reader: Reader, arena: PinnedArena, extents: list[Extent]) -> list[bytes]:
    with arena.lease(reader.cover_bytes(extents) or 1) as slot:
        request = reader.submit(extents, slot)
        request.wait(30)
        assert request.done and request.nbytes == sum(e.length for e in extents)
        with memoryview(slot) as view:
            return [bytes(view[at : at + e.length]) for at, e in zip(request.placements, extents, strict=True)]


@pytest.mark.parametrize("size", [1, 511, 512, 4095, 4096, 4097, 5 * 4096 - 1, 5 * 4096, 5 * 4096 + 1, 300_001])
def test_whole_files_arrive(reader: Reader, arena: PinnedArena, tmp_path: Path, size: int) -> None:
    content = make_file(tmp_path / "file", size)
    assert read(reader, arena, [Extent(str(tmp_path / "file"), 0, size)]) == [content]


def test_unaligned_extents_arrive_in_the_order_given(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", MIB + 3)
    rng = random.Random(0)
    for _ in range(50):
        extents = []
        for _ in range(rng.randrange(1, 8)):
            offset = rng.randrange(len(content))
            extents.append(
                Extent(str(tmp_path / "file"), offset, rng.randrange(min(200_000, len(content) - offset + 1)))
            )
        expected = [content[e.offset : e.offset + e.length] for e in extents]
        assert read(reader, arena, extents) == expected


def test_neighbours_share_one_cover(reader: Reader, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    assert reader.cover_bytes([Extent(path, 100, 50), Extent(path, 150, 3946)]) == 4096
    assert reader.cover_bytes([Extent(path, 4000, 200)]) == 8192
    assert reader.cover_bytes([Extent(path, 0, 4096), Extent(path, 40960, 1), Extent("other", 0, 1)]) == 3 * 4096
    assert reader.cover_bytes([]) == 0


def test_a_missing_file_is_an_open_error(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    with arena.lease(4096) as slot, pytest.raises(ReadError) as caught:
        reader.submit([Extent(str(tmp_path / "none"), 0, 1)], slot).wait(30)
    assert (caught.value.op, caught.value.errno) == ("open", errno.ENOENT)


def test_a_short_file_is_truncated_at_its_end(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    make_file(tmp_path / "file", 70_001)
    for offset in (0, 60_000, 70_001, 500_000):
        with arena.lease(MIB) as slot, pytest.raises(TruncatedFileError) as caught:
            reader.submit([Extent(str(tmp_path / "file"), offset, 200_000)], slot).wait(30)
        assert caught.value.offset == 70_001


def test_cancel_ends_a_request(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    make_file(tmp_path / "file", 8 * MIB)
    with arena.lease(8 * MIB) as slot:
        request = reader.submit([Extent(str(tmp_path / "file"), 0, 8 * MIB)], slot)
        request.cancel()
        with pytest.raises(ReadCancelledError):
            request.wait(30)


def test_as_many_reads_at_once_as_can_be_asked_for(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", 8 * MIB)
    extent = Extent(str(tmp_path / "file"), 0, 8 * MIB)
    engine = reader.info().engine
    with Reader(engine=engine, block_bytes=4096, depth=256, arena=arena) as deep, arena.lease(8 * MIB) as slot:  # type: ignore[arg-type]
        for turn in range(6):
            request = deep.submit([extent], slot)
            if turn % 2:  # reads and their cancellations: no completion of either may be dropped
                request.wait_ready(1 + turn * MIB, 30)
                request.cancel()
                with suppress(ReadCancelledError):
                    request.wait(30)
            else:
                request.wait(30)
                assert bytes(slot) == content


def test_a_reader_closed_while_others_use_it(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", MIB)
    outcomes: list[object] = []

    def work() -> None:
        try:
            while True:
                with arena.lease(MIB) as slot:
                    reader.submit([Extent(str(tmp_path / "file"), 0, MIB)], slot).wait(30)
                    if bytes(slot) != content:
                        outcomes.append("wrong bytes")
                reader.info()
        except BaseException as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    reader.close()
    for thread in threads:
        thread.join(30)
    assert outcomes == [ReadCancelledError] * 8
    assert arena.info().leased_bytes == 0


def test_a_cancelled_request_does_not_hold_up_the_next(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    make_file(tmp_path / "file", MIB)
    extent = Extent(str(tmp_path / "file"), 0, MIB)
    with arena.lease(MIB) as slot:
        for _ in range(200):
            cancelled = reader.submit([extent], slot)
            cancelled.cancel()
            with suppress(ReadCancelledError):
                cancelled.wait(5)
            reader.submit([extent], slot).wait(5)


def test_a_closed_reader_takes_nothing(reader: Reader, arena: PinnedArena) -> None:
    reader.close()
    with arena.lease(4096) as slot, pytest.raises(ReadCancelledError, match="closed"):
        reader.submit([], slot)


def test_ready_bytes_reach_the_end_in_order(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", 4 * MIB)
    with arena.lease(4 * MIB) as slot, memoryview(slot) as view:
        request = reader.submit([Extent(str(tmp_path / "file"), 0, 4 * MIB)], slot)
        for end in range(0, 4 * MIB + 1, 100_000):
            ready = request.wait_ready(end, 30)
            assert ready >= end
            assert view[:ready] == content[:ready]
        request.wait(30)
        assert request.ready_bytes == 4 * MIB


def test_empty_requests_are_done(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    assert read(reader, arena, []) == []
    assert read(reader, arena, [Extent(str(tmp_path / "none"), 5, 0)]) == [b""]


def test_a_request_starts_at_the_slot_offset(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", 10_000)
    extent = Extent(str(tmp_path / "file"), 5000, 4000)
    with arena.lease(MIB) as slot, memoryview(slot) as view:
        view[:] = b"\xa5" * MIB
        request = reader.submit([extent], slot, 8192)
        request.wait(30)
        assert request.placements == (8192 + 5000 - 4096,)
        assert view[request.placements[0] :][:4000] == content[5000:9000]
        assert request.ready_bytes == 5000 - 4096 + 4000
        assert view[:8192] == b"\xa5" * 8192
        assert view[8192 + request.cover_bytes :] == b"\xa5" * (MIB - 8192 - request.cover_bytes)


def test_what_cannot_fit_is_refused(reader: Reader, arena: PinnedArena) -> None:
    with arena.lease(8192) as slot:
        for extent, offset in [(Extent("f", 0, 8193), 0), (Extent("f", 0, 4097), 4096), (Extent("f", 0, 1), 1 << 40)]:
            with pytest.raises(ValueError, match="too small"):
                reader.submit([extent], slot, offset)
        with pytest.raises(ValueError, match="multiple of 4096"):
            reader.submit([Extent("f", 0, 1)], slot, 1)
        with pytest.raises(ValueError, match="range"):
            reader.submit([Extent("f", (1 << 63) - 1, 1)], slot)


def test_what_adds_up_past_all_files_is_refused(reader: Reader, arena: PinnedArena) -> None:
    most = (1 << 63) - 16384
    extents = [Extent("a", 0, most), Extent("b", 0, most), Extent("c", 0, 65536)]  # 64 bits hold less than they sum to
    for some in (extents, [extents[0]] * 3):
        with pytest.raises(ValueError, match="add up"):
            reader.cover_bytes(some)
        with arena.lease(MIB) as slot, pytest.raises(ValueError, match="add up"):
            reader.submit(some, slot)


def test_what_is_no_range_is_refused() -> None:
    for offset, length in [(-1, 1), (0, -1), (1 << 64, 1), (0, 1 << 63)]:
        with pytest.raises(ValueError, match="no range"):
            Extent("f", offset, length)


def test_any_name_a_file_can_have(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff name \xe2\x82\xac")
    content = make_file(Path(path), 5000)
    assert read(reader, arena, [Extent(path, 1, 4999)]) == [content[1:]]
    with arena.lease(8192) as slot, pytest.raises(TruncatedFileError) as caught:
        reader.submit([Extent(path, 0, 5001)], slot).wait(30)
    assert caught.value.path == path and path in str(caught.value)
    with arena.lease(8192) as slot, pytest.raises(ValueError, match="null byte"):
        reader.submit([Extent(path + "\0.safetensors", 0, 5000)], slot)


def test_what_is_not_a_file_is_refused(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, error in [(tmp_path, errno.EISDIR), (tmp_path / "pipe", errno.EINVAL)]:
        with arena.lease(4096) as slot, pytest.raises(ReadError) as caught:
            reader.submit([Extent(str(path), 0, 1)], slot).wait(30)
        assert (caught.value.op, caught.value.errno, caught.value.path) == ("open", error, str(path))


def test_after_an_error_the_reader_goes_on(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", 100_000)
    with arena.lease(MIB) as slot, pytest.raises(ReadError):
        reader.submit([Extent(str(tmp_path / "file"), 0, 1), Extent(str(tmp_path / "none"), 0, 1)], slot).wait(30)
    assert read(reader, arena, [Extent(str(tmp_path / "file"), 0, 100_000)]) == [content]


def test_a_file_put_in_place_of_another_is_read(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size in (5000, 6000):
        content = make_file(tmp_path / "new", size)
        (tmp_path / "new").replace(path)
        assert read(reader, arena, [Extent(str(path), 0, size)]) == [content]


def test_more_files_than_are_kept_open(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    contents = [make_file(tmp_path / str(i), 4096 + i) for i in range(400)]
    extents = [Extent(str(tmp_path / str(i)), 0, 4096 + i) for i in range(400)]
    for start in range(0, 400, 100):
        assert read(reader, arena, extents[start : start + 100]) == contents[start : start + 100]
    assert read(reader, arena, extents[:5]) == contents[:5]
    assert len(list(Path("/proc/self/fd").iterdir())) < 350


def test_released_memory_is_not_leased_while_it_is_written_to(
    reader: Reader, arena: PinnedArena, tmp_path: Path
) -> None:
    content = make_file(tmp_path / "file", 8 * MIB)
    engine = reader.info().engine
    with Reader(engine=engine, block_bytes=4096, depth=1) as slow:  # type: ignore[arg-type]
        slot = arena.lease(8 * MIB, 0)
        request = slow.submit([Extent(str(tmp_path / "file"), 0, 8 * MIB)], slot)
        request.wait_ready(1, 30)
        slot.release()
        with pytest.raises(PinnedMemoryError, match="overlap"):
            arena.lease(8 * MIB, 0)
        assert not request.done
        request.wait(30)
    with arena.lease(8 * MIB, 0) as again:
        assert bytes(again) == content


def test_waits_end_and_requests_go_on(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", 15 * MIB)
    with arena.lease(15 * MIB) as slot:
        request = reader.submit([Extent(str(tmp_path / "file"), 0, 15 * MIB)], slot)
        with pytest.raises(ReadTimeoutError) as caught:
            request.wait(0)
        assert caught.value.path == str(tmp_path / "file")
        with pytest.raises(ValueError, match="no number"):
            request.wait(float("nan"))
        with pytest.raises(ReadTimeoutError):
            request.wait_ready(15 * MIB, float("-inf"))
        request.wait(float("inf"))
        request.wait(0)
        assert bytes(slot) == content


def test_submit_does_not_wait(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    make_file(tmp_path / "file", 15 * MIB)
    with arena.lease(15 * MIB) as slot:
        requests, longest = [], 0.0
        for _ in range(40):
            start = time.perf_counter()
            requests.append(reader.submit([Extent(str(tmp_path / "file"), 0, 15 * MIB)], slot))
            longest = max(longest, time.perf_counter() - start)
        assert sum(request.done for request in requests) < 20
        assert longest < 0.05
        for request in requests:
            request.cancel()
        for request in requests:
            with suppress(ReadCancelledError):
                request.wait(30)


def test_times_are_those_of_perf_counter(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    make_file(tmp_path / "file", MIB)
    before = time.perf_counter()
    with arena.lease(MIB) as slot:
        request = reader.submit([Extent(str(tmp_path / "file"), 0, MIB)], slot)
        request.wait(30)
    assert before <= request.started_s <= request.finished_s <= time.perf_counter()


def test_info_says_what_is_used(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    make_file(tmp_path / "file", MIB)
    read(reader, arena, [Extent(str(tmp_path / "file"), 0, MIB)])
    info = reader.info()
    assert (info.bytes_read, info.block_bytes, info.depth, info.leaked_bytes) == (MIB, 64 << 10, 4, 0)
    (device,) = info.devices
    assert device.bytes_read == MIB and device.engine == info.engine
    if device.engine == "io_uring" and kernel() >= (6, 1):
        assert "deferred task work" in device.detail and device.registered_files
    status = (tmp_path / "file").stat()
    assert device.device == f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    assert 0 < info.busy_s < 30
    reader.close()
    assert reader.info().bytes_read == MIB


def test_settings_out_of_range_are_refused() -> None:
    for options, message in [
        ({"engine": "aio"}, "engine: got"),
        ({"direct": "maybe"}, "direct: got"),
        ({"block_bytes": 1000}, "multiple of 4096"),
        ({"block_bytes": 2 << 30}, "up to 1 GiB"),
        ({"block_bytes": -4096}, "multiple of 4096"),
        ({"depth": -1}, "between 1 and 256"),
        ({"depth": 0}, "between 1 and 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            Reader(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one byte"):
        PinnedArena(0)
    with pytest.raises(PinnedMemoryError, match="available"):
        PinnedArena(1 << 50, cuda=False)


def test_direct_on_insists(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    path = shm / f"mhaffn-test-{os.getpid()}"
    content = make_file(path, 10_000)
    try:
        with PinnedArena(2 * MIB, cuda=False) as arena:
            for options in ({"direct": "on"}, {"strict": True}):
                with (
                    Reader(**options) as reader,  # type: ignore[arg-type]
                    arena.lease(MIB) as slot,
                    pytest.raises(EngineUnavailableError, match="O_DIRECT does not work here"),
                ):
                    reader.submit([Extent(str(path), 0, 100)], slot).wait(30)
            with Reader() as reader:
                assert read(reader, arena, [Extent(str(path), 0, 10_000)]) == [content]
                info = reader.info()
                assert info.direct == "off" and "tmpfs" in info.reasons[0] and str(path) in info.reasons[0]
    finally:
        path.unlink()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_a_cause_that_many_files_meet_is_one_reason(arena: PinnedArena) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Reader() as reader:
        paths = [Path(folder, str(i)) for i in range(70)]
        for path in paths:
            read(reader, arena, [Extent(str(path), 0, len(make_file(path, 100)))])
        (reason,) = reader.info().reasons
        assert reason.startswith(f"{paths[0]} and other files: ") and "tmpfs" in reason


def test_direct_off_uses_the_page_cache(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", 100_000)
    with Reader(engine=reader.info().engine, direct="off", arena=arena) as buffered:  # type: ignore[arg-type]
        assert read(buffered, arena, [Extent(str(tmp_path / "file"), 77, 99_000)]) == [content[77:99_077]]
        info = buffered.info()
        assert (info.direct, besides_small_pages(info.reasons)) == ("off", [])


def test_slots_are_buffers_and_tensors_without_a_copy(arena: PinnedArena) -> None:
    slot = arena.lease(5000)
    assert len(slot) == slot.nbytes == 5000
    view = torch.frombuffer(slot, dtype=torch.uint8)
    shared, array = torch.from_dlpack(slot), np.from_dlpack(slot)  # type: ignore[arg-type]
    assert view.data_ptr() == shared.data_ptr() == array.ctypes.data == slot.address
    for refused in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            slot.__dlpack__(**refused)  # type: ignore[arg-type]
    slot.__dlpack__(stream=None, max_version=(1, 0), dl_device=(1, 0), copy=False)
    view[4999] = 7
    assert shared[4999] == array[4999] == memoryview(slot)[4999] == 7
    slot.release()
    assert slot.released
    with pytest.raises(BufferError):
        memoryview(slot)
    with pytest.raises(PinnedMemoryError, match="released"):
        torch.from_dlpack(slot)
    arena.close()
    view[4999] = 8  # what views refer to stays mapped
    assert shared[4999] == 8


def test_a_view_keeps_its_lease(arena: PinnedArena) -> None:
    view = torch.from_dlpack(arena.lease(4096, 0))
    with pytest.raises(PinnedMemoryError, match="overlap"):
        arena.lease(4096, 0)
    del view
    arena.lease(4096, 0).release()


def test_leases_do_not_overlap(arena: PinnedArena) -> None:
    first = arena.lease(4096, 8192)
    with pytest.raises(PinnedMemoryError, match="overlap"):
        arena.lease(8192, 4096)
    others = [arena.lease(8192), arena.lease(1)]
    assert [slot.offset for slot in others] == [0, 12288]
    with pytest.raises(PinnedMemoryError, match="leased"):
        arena.close()
    first.release()
    first.release()
    others.append(arena.lease(4096, 8192))
    assert others[-1].offset == 8192
    for slot in others:
        slot.release()
    assert arena.info().leased_bytes == 0
    assert arena.info().peak_leased_bytes == 16384


def test_arena_sizes_are_exact_to_2_mib() -> None:
    with PinnedArena(5 * MIB, cuda=False) as arena:
        info = arena.info()
        assert arena.nbytes == info.nbytes == 6 * MIB
        assert arena.lease(1).address % (2 * MIB) == 0
        assert info.prefaulted and info.prefault_s > 0
        assert not info.cuda_registered and info.cuda_reason == "not asked for"
        enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        assert info.huge_page_share > 0.5 or "[never]" in enabled


def test_buffers_are_registered_where_that_helps(reader: Reader, arena: PinnedArena, tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", 100_000)
    extent = Extent(str(tmp_path / "file"), 0, 100_000)
    uring = reader.info().engine == "io_uring"
    assert read(reader, arena, [extent]) == [content]
    assert reader.info().registered_buffers == (uring and arena.info().huge_page_share >= 0.5)
    with PinnedArena(2 * MIB, cuda=False, prefault=False) as small:
        assert not small.info().prefaulted
        engine = reader.info().engine
        with Reader(engine=engine, arena=small) as other:  # type: ignore[arg-type]
            assert read(other, small, [extent]) == [content]
            info = other.info()
            assert not info.registered_buffers
            assert [("small pages" in reason, "transparent_hugepage" in reason) for reason in info.reasons] == (
                [(True, True)] if uring else []
            )
        with Reader(engine=engine, strict=True, arena=small) as strict, small.lease(MIB) as slot:  # type: ignore[arg-type]
            request = strict.submit([extent], slot)
            if uring:
                with pytest.raises(EngineUnavailableError, match="small pages"):
                    request.wait(30)
            else:
                request.wait(30)  # nothing is registered for the pool


@pytest.mark.gpu
def test_pinned_for_cuda(tmp_path: Path) -> None:
    content = make_file(tmp_path / "file", 8 * MIB)
    with PinnedArena(64 * MIB, cuda=True) as arena, Reader(arena=arena) as reader:
        assert arena.info().cuda_registered and arena.info().register_s > 0
        with arena.lease(8 * MIB) as slot:
            request = reader.submit([Extent(str(tmp_path / "file"), 0, 8 * MIB)], slot)
            request.wait(30)
            host = torch.frombuffer(slot, dtype=torch.uint8)
            assert host.is_pinned()
            device = host.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            assert bytes(device.cpu().numpy()) == content


def test_cuda_is_optional_unless_asked_for() -> None:
    with PinnedArena(2 * MIB) as arena:
        info = arena.info()
        assert info.cuda_registered == (info.cuda_reason == "")
        registered = info.cuda_registered
    if not registered:
        with pytest.raises(PinnedMemoryError, match="CUDA"):
            PinnedArena(2 * MIB, cuda=True)


def test_measure_disk_finds_a_best_setting(tmp_path: Path) -> None:
    rows = measure_disk(tmp_path, seconds=0.6)
    assert {row.engine for row in rows} <= {"io_uring", "threads"}
    assert len({(row.engine, row.block_bytes, row.depth) for row in rows}) == len(rows) >= 6
    assert all(row.gib_per_s > 0 and row.cpu_ms_per_gb > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []
