"""Reads for minutes, with errors and cancellations among them, and fails if anything grows.

python tests/soak_reader.py --seconds 600
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import xxhash

from mhaffn.errors import ReadError
from mhaffn.reader import Extent, PinnedArena, Reader

MIB = 1 << 20
FILE_BYTES = 64 * MIB
WARM_UP = 0.2  # of the time, before growth is measured
ALLOWED_RSS_GROWTH = 1 * MIB  # noise of the interpreter's own allocator


def usage() -> tuple[int, int, int]:
    """Open files, threads and resident bytes of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) << 10
    return len(list(Path("/proc/self/fd").iterdir())), int(status["Threads"]), resident


def read_once(reader: Reader, arena: PinnedArena, path: str, content: memoryview, rng: random.Random) -> int:
    """One request of whole, damaged or cancelled kind; returns the bytes that were checked."""
    kind = rng.choice(("whole", "whole", "whole", "cancelled", "missing", "past the end"))
    offset = rng.randrange(FILE_BYTES - 8 * MIB)
    extents = [Extent(path, offset + i * 2 * MIB, rng.randrange(1, 3 * MIB // 2)) for i in range(rng.randrange(1, 4))]
    if kind == "missing":
        extents.append(Extent(path + ".missing", 0, 1))
    elif kind == "past the end":
        extents.append(Extent(path, FILE_BYTES - 10, 20))
    with arena.lease(reader.cover_bytes(extents)) as slot, memoryview(slot) as view:
        request = reader.submit(extents, slot)
        if kind == "cancelled":
            request.cancel()
        if kind != "whole":
            with suppress(ReadError):
                request.wait(60)
            return 0
        request.wait(60)
        for at, extent in zip(request.placements, extents, strict=True):
            got = xxhash.xxh3_64_intdigest(view[at : at + extent.length])
            expected = xxhash.xxh3_64_intdigest(content[extent.offset : extent.offset + extent.length])
            if got != expected:
                raise SystemExit(f"wrong bytes: {extent}")
    return request.nbytes


def soak(seconds: float, folder: Path) -> str:
    """Runs for ``seconds`` and describes what happened; raises :class:`SystemExit` on growth."""
    data = os.urandom(FILE_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder) as file, PinnedArena(32 * MIB, cuda=False) as arena:
        file.write(data)
        file.flush()
        rng, content = random.Random(0), memoryview(data)
        started, base, checked, requests, readers = time.monotonic(), None, 0, 0, 0
        while (elapsed := time.monotonic() - started) < seconds:
            engine = ("auto", "threads")[readers % 2]
            with Reader(engine=engine, block_bytes=256 << 10, arena=arena) as reader:  # type: ignore[arg-type]
                readers += 1
                for _ in range(50):
                    checked += read_once(reader, arena, file.name, content, rng)
                    requests += 1
            if elapsed < WARM_UP * seconds:
                base = usage()
        files, threads, resident = usage()
        if base is None:
            raise SystemExit("too short to measure growth")
        growth = resident - base[2]
        text = (
            f"{seconds:.0f} s, {readers} readers, {requests} requests, {checked / 1e9:.1f} GB checked: open files "
            f"{base[0]} to {files}, threads {base[1]} to {threads}, resident bytes grew by {growth}"
        )
        if files > base[0] or threads > base[1] or growth > ALLOWED_RSS_GROWTH:
            raise SystemExit(f"growth: {text}")
        return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    sys.stdout.write(soak(options.seconds, options.folder) + "\n")
