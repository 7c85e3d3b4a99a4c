"""The behaviour of the reader, the same for both engines."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mhaffn import _native
from mhaffn.errors import PinnedMemoryError, ReadCancelledError, ReadError, TruncatedFileError
from mhaffn.reader import Extent, PinnedArena, Reader

ENGINES = [
    pytest.param("io_uring", marks=pytest.mark.skipif(_native.liburing == "none", reason="built without liburing")),
    "threads",
]
MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[PinnedArena]:
    with PinnedArena(16 * MIB, cuda=False) as arena:
        yield arena


@pytest.fixture(params=ENGINES)
def reader(request: pytest.FixtureRequest, arena: PinnedArena) -> Iterator[Reader]:
    with Reader(engine=request.param, block_bytes=64 << 10, depth=4, arena=arena) as reader:
        yield reader


def make_file(path: Path, size: int) -> bytes:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return content


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
        assert arena.nbytes == arena.info().nbytes == 6 * MIB
        assert os.sysconf("SC_PAGESIZE") == 4096
