"""Every kind of file the reader meets: sizes, file systems, devices, and files that change while they are read."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from mhaffn.errors import ReadError, TruncatedFileError
from mhaffn.reader import Extent, PinnedArena, Reader
from tests.reader_files import ENGINES, MIB, besides_small_pages, loop_device, loop_mount, make_file

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def arena() -> Iterator[PinnedArena]:
    with PinnedArena(64 * MIB, cuda=False) as arena:
        yield arena


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_a_file_truncated_while_it_is_read(engine: str, direct: str, arena: PinnedArena, tmp_path: Path) -> None:
    path, size, cut = tmp_path / "file", 48 * MIB, 40 * MIB + 1234
    content = make_file(path, size)
    for _ in range(20):
        path.write_bytes(content)
        with (
            Reader(engine=engine, direct=direct, block_bytes=64 << 10, depth=2) as reader,  # type: ignore[arg-type]
            arena.lease(size) as slot,
            memoryview(slot) as view,
        ):
            view[:] = b"\xa5" * size
            request = reader.submit([Extent(str(path), 0, size)], slot)
            request.wait_ready(1 * MIB, 30)
            os.truncate(path, cut)
            try:
                request.wait(30)
            except TruncatedFileError as error:
                assert (error.offset, error.path, error.length > 0) == (cut, str(path), True)
                assert MIB <= request.ready_bytes <= cut
                assert view[: request.ready_bytes] == content[: request.ready_bytes]
                with pytest.raises(TruncatedFileError):
                    request.wait_ready(size, 30)
                return
    pytest.fail("the file was read before it could be truncated, 20 times")


def test_one_request_reads_one_version_of_a_file(engine: str, arena: PinnedArena, tmp_path: Path) -> None:
    count, step = 8000, 8192
    path, new = tmp_path / "file", tmp_path / "new"
    extents = [Extent(str(path), i * step, 16) for i in range(count)]

    def write(version: int) -> None:
        with new.open("wb") as file:
            for _ in range(count):
                file.write(bytes([version]) * 16 + bytes(step - 16))
            file.flush()
            os.fsync(file.fileno())

    write(0)
    new.replace(path)
    with Reader(engine=engine, depth=64, arena=arena) as reader, arena.lease(count * 4096) as slot:  # type: ignore[arg-type]
        for turn in range(5):
            write(turn + 1)
            request = reader.submit(extents, slot)
            time.sleep(turn * 1e-3)
            new.replace(path)
            request.wait(30)
            with memoryview(slot) as view:
                versions = {view[at] for at in request.placements}
            assert versions < {turn, turn + 1}, versions


def test_a_file_that_grows_shrinks_and_is_replaced(engine: str, arena: PinnedArena, tmp_path: Path) -> None:
    path, rng, content = tmp_path / "file", random.Random(0), b""
    path.touch()
    with Reader(engine=engine, block_bytes=64 << 10, arena=arena) as reader, arena.lease(8 * MIB) as slot:  # type: ignore[arg-type]
        for _ in range(200):
            change = rng.choice(("grow", "shrink", "replace"))
            if change == "grow":
                more = rng.randbytes(rng.randrange(1, 100_000))
                with path.open("ab") as file:
                    file.write(more)
                content += more
            elif change == "shrink":
                content = content[: rng.randrange(len(content) + 1)]
                os.truncate(path, len(content))
            else:
                content = make_file(tmp_path / "new", rng.randrange(1, 200_000))
                (tmp_path / "new").replace(path)
            reader.submit([Extent(str(path), 0, len(content))], slot).wait(30)
            assert bytes(slot)[: len(content)] == content
            with pytest.raises(TruncatedFileError) as caught:
                reader.submit([Extent(str(path), 0, len(content) + 1)], slot).wait(30)
            assert caught.value.offset == len(content)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


@pytest.mark.slow
def test_a_blob_across_the_1_gib_boundary(engine: str, tmp_path: Path) -> None:
    size = 1344 * MIB  # 1.3125 GiB
    digest = xxhash.xxh3_64()
    with (tmp_path / "blob").open("wb") as file:
        block = os.urandom(MIB)
        for i in range(size // MIB):
            piece = i.to_bytes(8, "little") + block[8:]
            digest.update(piece)
            file.write(piece)
        os.fsync(file.fileno())
    # The second time, whatever is allocated once is there; the last block size does not divide 1 GiB.
    for block_bytes in (4 * MIB, 4 * MIB, 5 * MIB + 4096):
        before = resident_bytes()
        with (
            PinnedArena(size, cuda=False) as arena,
            Reader(engine=engine, block_bytes=block_bytes, arena=arena) as reader,  # type: ignore[arg-type]
        ):
            with arena.lease(size) as slot:
                request = reader.submit([Extent(str(tmp_path / "blob"), 0, size)], slot)
                request.wait()
                growth = resident_bytes() - before
                assert xxhash.xxh3_64_hexdigest(slot) == digest.hexdigest()
            # A machine whose memory is in pieces may have no huge pages left for so much of it.
            huge = arena.info().huge_page_share >= 0.5
            assert reader.info().registered_buffers == (engine == "io_uring" and huge)
    (tmp_path / "blob").unlink()
    assert growth <= size + 2 * MIB


SIZES = [1, 511, 512, 513, 4095, 4096, 4097, 8191, 10 * 4096 - 1, 10 * 4096, 10 * 4096 + 1]
OFFSETS = [0, 1, 511, 512, 4095, 4096, 4097, 7 * 4096 - 1, 7 * 4096, 7 * 4096 + 1]


def read_sizes_and_offsets(engine: str, folder: Path, arena: PinnedArena) -> Reader:
    with Reader(engine=engine, block_bytes=8192, depth=4, arena=arena) as reader:  # type: ignore[arg-type]
        for size in SIZES:
            path = folder / f"file{size}"
            content = make_file(path, size)
            for offset in [at for at in OFFSETS if at < size]:
                for length in {1, size - offset, (size - offset + 1) // 2}:
                    with arena.lease(64 << 10) as slot, memoryview(slot) as view:
                        request = reader.submit([Extent(str(path), offset, length)], slot)
                        request.wait(30)
                        at = request.placements[0]
                        assert view[at : at + length] == content[offset : offset + length]
            with arena.lease(128 << 10) as slot, pytest.raises(TruncatedFileError) as caught:
                reader.submit([Extent(str(path), 0, size + 1)], slot).wait(30)
            assert caught.value.offset == size
            path.unlink()
    return reader


def test_sizes_and_offsets_here_and_in_memory(engine: str, arena: PinnedArena, tmp_path: Path) -> None:
    read_sizes_and_offsets(engine, tmp_path, arena)
    shm = Path(f"/dev/shm/mhaffn-test-{os.getpid()}")
    shm.mkdir()
    try:
        reader = read_sizes_and_offsets(engine, shm, arena)
        assert reader.info().direct == "off"
    finally:
        shm.rmdir()


@needs_root
@pytest.mark.parametrize("sector", [512, 4096])
def test_sizes_and_offsets_on_a_loop_device(engine: str, arena: PinnedArena, tmp_path: Path, sector: int) -> None:
    with loop_mount(tmp_path / "loop", 64 * MIB, sector) as folder:
        reader = read_sizes_and_offsets(engine, folder, arena)
        assert (reader.info().direct, besides_small_pages(reader.info().reasons)) == ("on", [])


def cached_share(path: Path) -> float:
    """The part of a file that lies in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        address = ctypes.addressof(view := ctypes.c_char.from_buffer(pages))
        resident = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), resident) == 0
        del view
    return sum(byte & 1 for byte in resident) / len(resident)


@needs_root
def test_only_reads_that_were_to_be_buffered_stay_in_the_page_cache(
    engine: str, arena: PinnedArena, tmp_path: Path
) -> None:
    size = 16 * MIB
    with loop_mount(tmp_path / "loop", 64 * MIB, 512, "data=journal") as folder:  # where ext4 has no direct reads
        path = folder / "file"
        content = make_file(path, size)
        os.sync()
        for direct, least, most in (("auto", 0.0, 0.3), ("off", 0.9, 1.0)):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert cached_share(path) < 0.1
            with (
                Reader(engine=engine, direct=direct, block_bytes=MIB, depth=2, arena=arena) as reader,  # type: ignore[arg-type]
                arena.lease(size) as slot,
            ):
                reader.submit([Extent(str(path), 0, size)], slot).wait(30)
                assert bytes(slot) == content
                info = reader.info()
                assert (info.engine, info.direct) == (engine, "off")
                assert any("no direct reads" in reason for reason in info.reasons) == (direct == "auto")
            assert least <= cached_share(path) <= most, direct


@needs_root
def test_a_block_device_is_read(engine: str, arena: PinnedArena, tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", 8 * MIB, 4096) as device:
        content = make_file(Path(device), 8 * MIB)
        with Reader(engine=engine, arena=arena) as reader, arena.lease(8 * MIB) as slot:  # type: ignore[arg-type]
            reader.submit([Extent(device, 0, 8 * MIB)], slot).wait(30)
            assert bytes(slot) == content
            with pytest.raises(TruncatedFileError) as caught:
                reader.submit([Extent(device, 8 * MIB - 10, 20)], slot).wait(30)
            assert caught.value.offset == 8 * MIB


@needs_root
def test_several_devices_serve_one_request(engine: str, arena: PinnedArena, tmp_path: Path) -> None:
    with loop_mount(tmp_path / "loop", 64 * MIB, 512) as folder:
        paths = [tmp_path / "mha", folder / "ffn", tmp_path / "more"]
        contents = [make_file(path, MIB + i) for i, path in enumerate(paths)]
        extents = [Extent(str(path), 0, MIB + i) for i, path in enumerate(paths)]
        with (
            Reader(engine=engine, arena=arena) as reader,  # type: ignore[arg-type]
            arena.lease(6 * MIB) as slot,
            memoryview(slot) as view,
        ):
            request = reader.submit(extents, slot)
            request.wait(30)
            for at, content in zip(request.placements, contents, strict=True):
                assert view[at : at + len(content)] == content
            assert sorted(device.bytes_read for device in reader.info().devices) == [MIB + 1, 2 * MIB + 2]
            extents[1] = Extent(str(folder / "ffn"), 0, 2 * MIB)
            with pytest.raises(TruncatedFileError, match="ffn"):
                reader.submit(extents, slot).wait(30)


@needs_root
def test_a_device_that_fails_is_an_io_error(engine: str, arena: PinnedArena, tmp_path: Path) -> None:
    with loop_mount(tmp_path / "loop", 64 * MIB, 512) as folder:
        make_file(folder / "file", 32 * MIB)
        os.sync()
        os.truncate(tmp_path / "loop" / "image", 8 * MIB)
        with (
            Reader(engine=engine, direct="on", arena=arena) as reader,  # type: ignore[arg-type]
            arena.lease(32 * MIB) as slot,
            pytest.raises(ReadError) as caught,
        ):
            reader.submit([Extent(str(folder / "file"), 0, 32 * MIB)], slot).wait(30)
        assert (caught.value.op, caught.value.errno) == ("read", errno.EIO)
        assert caught.value.path == str(folder / "file")
        assert 0 <= caught.value.offset < 32 * MIB and 0 < caught.value.length <= 4 * MIB
