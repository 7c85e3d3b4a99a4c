"""What each part of a machine reaches by itself, none of our code in the way: the roofs that figures are held against.

Each function gives a sampler: called, it measures once and returns a rate in bytes or operations a second. Samplers
keep the memory they need, so that a machine can be watched while other things are measured by turns with it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from mhaffn.reader import PinnedArena

Sampler = Callable[[], float]
DISK_BLOCK_BYTES = 4 << 20
DISK_THREADS = 8
READ_BLOCK = 4096
READ_LOOPS = 16


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _read_kernel(p_x, p_out, BLOCK: tl.constexpr, LOOPS: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(LOOPS):
        total += tl.load(p_x + (tl.program_id(0) * LOOPS + i).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(p_out + tl.program_id(0), tl.sum(total, 0))


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of ``work``: on a GPU by events on the current stream, on the CPU by the clock."""
    if device.type == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def seconds_queued(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of ``work`` queued behind itself: the host's part in starting it does not show."""
    if device.type != "cpu":
        work()
    return seconds(device, work)


def memory_read(device: torch.device, nbytes: int) -> Sampler:
    """Bytes a second of reading ``nbytes`` (more than any cache holds) from the device's memory."""
    if device.type == "cpu":
        values = torch.ones(nbytes // 4)
        return lambda: nbytes / seconds(device, values.amax)
    piece = READ_BLOCK * READ_LOOPS
    words = torch.randint(0, 100, (nbytes // 4 // piece * piece,), device=device, dtype=torch.int32)
    out = torch.empty(words.numel() // piece, device=device, dtype=torch.int32)

    def read() -> None:
        _read_kernel[(out.numel(),)](words, out, BLOCK=READ_BLOCK, LOOPS=READ_LOOPS, num_warps=8)

    return lambda: words.numel() * 4 / seconds_queued(device, read)


def matmul(device: torch.device, dtype: torch.dtype, size: int) -> Sampler:
    """Floating-point operations a second of a ``size``³ matrix product by PyTorch."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.float32).to(dtype)
    return lambda: 2 * size**3 / seconds_queued(device, lambda: a @ b)


@contextmanager
def host_to_device(device: torch.device, nbytes: int) -> Iterator[Sampler]:
    """Bytes a second of one copy of ``nbytes`` from pinned memory to the GPU."""
    with PinnedArena(nbytes) as arena, arena.lease(nbytes) as slot:
        source = torch.frombuffer(slot, dtype=torch.uint8)
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        yield lambda: nbytes / seconds(device, lambda: target.copy_(source, non_blocking=True))
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Disk:
    """``sample`` reads; ``direct`` is whether it goes past the page cache."""

    sample: Sampler
    direct: bool


@contextmanager
def disk(files: Sequence[Path], nbytes: int, memory: int) -> Iterator[Disk]:
    """Bytes a second of plain ``preadv`` calls in :data:`DISK_THREADS` threads; a sample reads at most ``nbytes``.

    Samples go on where the last one stopped, round and round through ``files``, and through ``memory`` bytes that they
    read into: as many as what is held against them reads into, since the processor's caches would take a smaller number
    faster, where no weights stay. Raises :class:`OSError`.
    """
    direct = all(_takes_direct(path) for path in files)
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    opened = [os.open(path, flags) for path in files]
    blocks = [
        (descriptor, offset)
        for descriptor, path in zip(opened, files, strict=True)
        for offset in range(0, max(path.stat().st_size - DISK_BLOCK_BYTES, 0) + 1, DISK_BLOCK_BYTES)
    ]
    places = max(1, memory // (DISK_THREADS * DISK_BLOCK_BYTES))
    local, turn = threading.local(), count()

    def read(number: int) -> int:
        if not hasattr(local, "places"):
            whole = mmap.mmap(-1, places * DISK_BLOCK_BYTES)
            whole.madvise(mmap.MADV_HUGEPAGE)
            local.places = cycle([memoryview(whole)[i * DISK_BLOCK_BYTES :][:DISK_BLOCK_BYTES] for i in range(places)])
        descriptor, offset = blocks[number % len(blocks)]
        return os.preadv(descriptor, [next(local.places)], offset)

    def sample() -> float:
        numbers = [next(turn) for _ in range(max(1, min(nbytes // DISK_BLOCK_BYTES, len(blocks))))]
        started = time.perf_counter()
        done = sum(pool.map(read, numbers))
        return done / (time.perf_counter() - started)

    pool = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="mhaffn-roof")
    try:
        yield Disk(sample, direct)
    finally:
        pool.shutdown(cancel_futures=True)
        for descriptor in opened:
            os.close(descriptor)


def _takes_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def measure(sampler: Callable[[], Any], for_s: float, *, least: int = 3) -> list[float]:
    """Samples for about ``for_s`` seconds, one before them that does not count; at least ``least``."""
    sampler()
    ends = time.perf_counter() + for_s
    samples: list[float] = []
    while len(samples) < least or time.perf_counter() < ends:
        samples.append(float(sampler()))
    return samples
