"""The NVMe reader: extents of files into pinned memory, exact bytes or a typed error.

::

    with PinnedArena(64 << 20) as arena, Reader(arena=arena) as reader:
        extents = [Extent("model.safetensors", offset=4096, length=8 << 20)]
        with arena.lease(reader.cover_bytes(extents)) as slot:
            request = reader.submit(extents, slot)
            request.wait()
            first = memoryview(slot)[request.placements[0] :][: extents[0].length]

Reads use io_uring and ``O_DIRECT`` where they work, else ``preadv`` threads and the page cache;
:meth:`Reader.info` says which and why. Each device has a thread and a ring of its own.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from mhaffn import _native
from mhaffn._native import Request, Slot
from mhaffn.errors import ConfigError, EngineUnavailableError, ReadError
from mhaffn.files import trial_file

__all__ = [
    "ArenaInfo",
    "DeviceInfo",
    "DiskRow",
    "Extent",
    "PinnedArena",
    "Reader",
    "ReaderInfo",
    "Request",
    "Slot",
    "measure_disk",
]

Engine = Literal["auto", "io_uring", "threads"]
Direct = Literal["auto", "on", "off"]

log = logging.getLogger("mhaffn")


def check_modes(engine: str, direct: str) -> None:
    """Raises :class:`~mhaffn.errors.ConfigError` for an engine, or a mode of ``O_DIRECT``, that there is not."""
    for name, value, choices in (("engine", engine, get_args(Engine)), ("direct", direct, get_args(Direct))):
        if value not in choices:
            raise ConfigError(f"got {name} = {value!r}, expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class Extent:
    """Bytes ``[offset, offset + length)`` of the file at ``path``."""

    path: str
    offset: int
    length: int

    def __post_init__(self) -> None:
        if min(self.offset, self.length) < 0 or max(self.offset, self.length) >= 1 << 63:
            raise ValueError(f"{self.path!r}: bytes {self.offset} + {self.length} are no range of a file")


@dataclass(frozen=True)
class ArenaInfo:
    """What an arena is and what it took to make it. Sizes in bytes, times in seconds.

    ``huge_page_share`` is the part of the memory that lies in huge pages, 0 to 1. ``cuda_reason`` says why
    the memory is not registered with CUDA. ``leaked_bytes`` are never leased again, since a read that could
    not be ended may still write to them.
    """

    nbytes: int
    leased_bytes: int
    peak_leased_bytes: int
    leaked_bytes: int
    huge_page_share: float
    prefaulted: bool
    prefault_s: float
    cuda_registered: bool
    cuda_reason: str
    register_s: float
    numa_node: int | None


@dataclass(frozen=True)
class DeviceInfo:
    """One device that was read from: how, and how much. ``device`` is major:minor."""

    device: str
    engine: str
    direct: bool
    registered_buffers: bool
    registered_files: bool
    detail: str
    bytes_read: int
    busy_s: float
    retries: int


@dataclass(frozen=True)
class ReaderInfo:
    """What the reader really uses.

    ``engine`` is ``io_uring`` or ``threads``; ``direct`` is ``on``, ``off``, or ``mixed`` where files differ or one had
    to be read through the page cache from some point on;
    ``reasons`` has a sentence for each step down from the best there is. ``busy_s`` adds up, over devices,
    the seconds with a read in flight. ``liburing`` is how the extension was linked: static, shared, none.
    """

    engine: str
    direct: str
    registered_buffers: bool
    reasons: tuple[str, ...]
    devices: tuple[DeviceInfo, ...]
    bytes_read: int
    busy_s: float
    leaked_bytes: int
    liburing: str
    block_bytes: int
    depth: int


class PinnedArena:
    """Host memory for transfers: anonymous, 2 MiB aligned, in huge pages, faulted in, registered with CUDA.

    ``nbytes`` is rounded up to 2 MiB. ``cuda``: "auto" registers where a CUDA device can be used, True
    insists, False leaves it. ``numa_node``: None is the GPU's, where there is a choice; a number insists. A fork
    does not inherit the memory. Raises :class:`~mhaffn.errors.PinnedMemoryError`.
    """

    def __init__(
        self, nbytes: int, *, cuda: str | bool = "auto", prefault: bool = True, numa_node: int | None = None
    ) -> None:
        wanted = {"auto": "auto", True: "yes", False: "no"}.get(cuda)
        if wanted is None:
            raise ValueError(f"cuda: got {cuda!r}, expected 'auto', True or False")
        if nbytes <= 0:
            raise ValueError(f"an arena has at least one byte, got {nbytes}")
        self._native: _native.Arena | None = _native.Arena(nbytes, wanted, prefault, numa_node)
        self.nbytes: int = self._native.nbytes
        if self.nbytes and not self.info().prefaulted and prefault:
            log.warning("faulting in %d bytes of pinned memory took too long; the rest follows when used", self.nbytes)

    @property
    def native(self) -> _native.Arena:
        if self._native is None:
            from mhaffn.errors import PinnedMemoryError

            raise PinnedMemoryError("the arena is closed")
        return self._native

    def lease(self, nbytes: int, offset: int | None = None) -> Slot:
        """``nbytes`` of the arena: exactly at ``offset`` (a multiple of 4 KiB), or where they first fit.

        Raises :class:`~mhaffn.errors.PinnedMemoryError` where they overlap a live lease, or do not fit.
        """
        return self.native.lease(nbytes, offset)

    def info(self) -> ArenaInfo:
        return ArenaInfo(**self.native.info())

    def close(self) -> None:
        """Gives the memory back, with the last view of it; :class:`PinnedMemoryError` while leases live."""
        if self._native is not None:
            self._native.close()
            self._native = None

    def __enter__(self) -> PinnedArena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._native is not None:
            self._native = None  # leases that an error left behind must not hide it; the last one frees the memory


class Reader:
    """Reads extents into slots. Any thread may use it; it is not inherited by forks.

    - ``engine``: "io_uring", "threads" (preadv), or "auto" for the first that works.
    - ``direct``: "on" (``O_DIRECT``), "off" (page cache), or "auto" for direct where it works.
    - ``strict``: raise :class:`~mhaffn.errors.EngineUnavailableError` instead of falling back.
    - ``block_bytes``, ``depth``: the size of one read, and how many a device gets at once.
    - ``arena``: its memory is registered with the ring, which saves CPU time. Meant for staging.
    """

    def __init__(
        self,
        *,
        engine: Engine = "auto",
        direct: Direct = "auto",
        strict: bool = False,
        block_bytes: int = 4 << 20,
        depth: int = 16,
        arena: PinnedArena | None = None,
    ) -> None:
        self.block_bytes, self.depth = block_bytes, depth
        self._native = _native.Reader(
            engine, direct, strict, block_bytes, depth, None if arena is None else arena.native
        )

    def cover_bytes(self, extents: Sequence[Extent]) -> int:
        """Bytes of slot these extents need: whole 4 KiB pages, pages shared by neighbours counted once."""
        return _native.cover_bytes(_tuples(extents))

    def submit(self, extents: Sequence[Extent], slot: Slot, slot_offset: int = 0) -> Request:
        """Starts reading ``extents`` into ``slot`` from ``slot_offset`` (a multiple of 4 KiB); never waits.

        Extents of a file that touch or share a page are one read. Reads follow each other in the slot, by
        file in the order given, then by offset; ``Request.placements`` says where each extent is. Whatever
        fails, a missing file too, is raised by ``Request.wait()``. Raises :class:`ValueError` where the slot
        is too small, :class:`~mhaffn.errors.ReadCancelledError` after :meth:`close`.
        """
        return self._native.submit(_tuples(extents), slot, slot_offset)

    def info(self) -> ReaderInfo:
        values: dict[str, Any] = self._native.info()
        devices = tuple(DeviceInfo(**device) for device in values.pop("devices"))
        return ReaderInfo(**values, devices=devices, block_bytes=self.block_bytes, depth=self.depth)

    def close(self) -> None:
        """Cancels what is in flight and waits, at most seconds, until nothing writes to a slot any more.

        Memory that a device still holds after that is never used again; that is logged.
        """
        leaked = self._native.close()
        if leaked:
            log.error("%d bytes of pinned memory are leaked: reads into them could not be ended", leaked)

    def __del__(self) -> None:
        with suppress(AttributeError, EngineUnavailableError):  # not made; or in a fork, where it is not ours
            self.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tuples(extents: Sequence[Extent]) -> list[tuple[bytes, int, int]]:
    return [(os.fsencode(extent.path), extent.offset, extent.length) for extent in extents]


@dataclass(frozen=True)
class DiskRow:
    """What one setting of the reader reaches on a disk."""

    engine: str
    block_bytes: int
    depth: int
    direct: str
    gib_per_s: float
    cpu_ms_per_gb: float


DISK_SETTINGS = [(4 << 20, 16), (4 << 20, 8), (1 << 20, 16), (16 << 20, 4), (1 << 20, 4), (256 << 10, 32)]
DISK_FILE_BYTES = 1 << 30
DISK_ARENA_BYTES = 128 << 20


def measure_disk(path: str | os.PathLike[str], seconds: float = 10.0) -> list[DiskRow]:
    """Measures reads from the disk of ``path`` with each engine, block and depth, for about ``seconds``.

    A folder gets a temporary file of at most 1 GiB (written first, in addition to ``seconds``); a file is
    read itself. Raises :class:`~mhaffn.errors.ReadError` and :class:`OSError`.
    """
    engines: list[Engine] = ["threads"] if _native.liburing == "none" else ["io_uring", "threads"]
    with _file_to_measure(Path(path)) as file, PinnedArena(DISK_ARENA_BYTES, cuda=False) as arena:
        share = seconds / (len(engines) * len(DISK_SETTINGS))
        return [
            _measure_setting(file, arena, engine, block_bytes, depth, share)
            for block_bytes, depth in DISK_SETTINGS
            for engine in engines
        ]


@contextmanager
def _file_to_measure(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        if path.stat().st_size < DISK_ARENA_BYTES:
            raise ReadError(f"{path}: too small to measure, need {DISK_ARENA_BYTES} bytes", path=str(path))
        yield path
        return
    free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
    size = min(DISK_FILE_BYTES, free // 2) // DISK_ARENA_BYTES * DISK_ARENA_BYTES
    if size == 0:
        raise ReadError(f"{path}: too little free space to measure, need {2 * DISK_ARENA_BYTES} bytes", path=str(path))
    with trial_file(path, ".mhaffn-disk-", size) as file:
        yield file


def _measure_setting(
    file: Path, arena: PinnedArena, engine: Engine, block_bytes: int, depth: int, seconds: float
) -> DiskRow:
    engine = "auto" if engine == "io_uring" else engine
    with (
        Reader(engine=engine, block_bytes=block_bytes, depth=depth, arena=arena) as reader,
        arena.lease(arena.nbytes) as slot,
    ):
        half = arena.nbytes // 2
        places = file.stat().st_size // half
        jobs = ([Extent(str(file), (n % places) * half, half)] for n in range(1 << 62))
        flight = [reader.submit(next(jobs), slot, 0), reader.submit(next(jobs), slot, half)]
        flight[0].wait()
        started, cpu, read = time.perf_counter(), time.process_time(), 0
        turn = 0
        while time.perf_counter() - started < seconds:
            flight[turn] = reader.submit(next(jobs), slot, turn * half)
            turn = 1 - turn
            flight[turn].wait()
            read += half
        elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
        info = reader.info()
        name = info.engine
    return DiskRow(name, block_bytes, depth, info.direct, read / elapsed / (1 << 30), cpu * 1e3 / (read / 1e9))
