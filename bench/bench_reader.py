"""The reader against the best there is for the same file: fio's engines, and the least io_uring loop.

    pytest bench/bench_reader.py                               the disk of the temporary folder
    pytest bench/bench_reader.py --basetemp=/mnt/fast/bench    another disk

First every peer setting is tried, the best five again; the best then runs in pairs with the reader, one after the
other, each reading the whole file; ``--benchmark-min-rounds=10`` asks for more than eight pairs. Bytes are checked
before anything is timed. Results with every sample go to ``bench/results/reader-<machine>.json``, and a table of them
to the terminal. fio gets huge pages from the kernel's pool where this runs as root.
Where liburing's headers are missing, the loop is taken ready-made from ``build/read_loop``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mhaffn.machine import describe
from mhaffn.reader import Extent, PinnedArena, Reader
from mhaffn.stream import CHUNK_BYTES

ROOT = Path(__file__).resolve().parent.parent
MIB, GIB = 1 << 20, 1 << 30
FILE_BYTES = 4 * GIB
REQUEST_BYTES = 256 * MIB
ARENA_BYTES = 1 * GIB
LEAST_PAIRS = 8
TARGETS = {
    "io_uring / best peer": 0.97,
    "threads / io_uring": 0.90,
    "cpu_ms_per_gb": 5.0,
    "verify_ms_per_gb": 45.0,
    "pin_ms_per_gib": 120.0,
}


@dataclass(frozen=True)
class Sample:
    """One reading of the file."""

    gib_per_s: float
    cpu_ms_per_gb: float


@dataclass(frozen=True)
class Peer:
    """Something else that reads the file, in one setting."""

    name: str
    run: Callable[[Path], Sample]


def fio_peer(engine: str, block_mib: int, depth: int, huge: bool) -> Peer:
    jobs = depth if engine == "psync" else 1
    command = [
        "fio", "--name=read", "--rw=read", "--direct=1", "--invalidate=0", "--output-format=json", "--thread",
        f"--ioengine={engine}", f"--bs={block_mib}M", f"--iodepth={1 if engine == 'psync' else depth}",
        f"--numjobs={jobs}", f"--size={FILE_BYTES // jobs}", f"--offset_increment={FILE_BYTES // jobs}",
        "--group_reporting", *(["--mem=mmaphuge"] if huge else []),
        *(["--fixedbufs", "--registerfiles"] if engine == "io_uring" else []),
    ]  # fmt: skip

    def run(path: Path) -> Sample:
        done = subprocess.run([*command, f"--filename={path}"], capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        read = job["read"]
        assert read["io_bytes"] == FILE_BYTES and job["error"] == 0
        seconds = read["runtime"] / 1e3  # the longest job's, with group_reporting
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
        return Sample(FILE_BYTES / seconds / GIB, cpu * 1e3 / (FILE_BYTES / 1e9))

    pages = "huge pages" if huge else "small pages"
    return Peer(f"fio {engine}, {block_mib} MiB x {depth}, {pages}", run)


def loop_peer(binary: Path, block_mib: int, depth: int) -> Peer:
    """The loop reads into as much memory as we do: less would stay in the processor's caches, where no use has it."""

    def run(path: Path) -> Sample:
        output = subprocess.run(
            [str(binary), str(path), str(block_mib * MIB), str(depth), str(ARENA_BYTES)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        nbytes, seconds, cpu = (float(word) for word in output.split())
        assert nbytes == FILE_BYTES
        return Sample(nbytes / seconds / GIB, cpu * 1e3 / (nbytes / 1e9))

    return Peer(f"io_uring loop, {block_mib} MiB x {depth}", run)


def read_loop_binary(folder: Path) -> Path | None:
    binary = folder / "read_loop"
    command = ["g++", "-O2", "-std=c++17", str(ROOT / "bench" / "read_loop.cpp"), "-l:liburing.a", "-o", str(binary)]
    if shutil.which("g++") and subprocess.run(command, capture_output=True).returncode == 0:
        return binary
    ready = ROOT / "build" / "read_loop"
    return ready if ready.exists() else None


@pytest.fixture(scope="module")
def huge_pages() -> Iterator[bool]:
    """A pool of 2 MiB pages for fio's buffers; given back afterwards."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    needed = 96
    try:
        pool.write_text(str(max(needed, int(before))))
        yield int(pool.read_text()) >= needed
        pool.write_text(before)
    except PermissionError:
        yield int(before) >= needed


@pytest.fixture(scope="module")
def peers(huge_pages: bool, tmp_path_factory: pytest.TempPathFactory) -> list[Peer]:
    found = []
    if shutil.which("fio"):
        settings = [(e, b, d) for e in ("io_uring", "libaio", "psync") for b, d in [(1, 8), (1, 32), (4, 8), (4, 16)]]
        found += [fio_peer(*setting, huge) for setting in settings for huge in {huge_pages, False}]
    if binary := read_loop_binary(tmp_path_factory.mktemp("loop")):
        found += [loop_peer(binary, block, depth) for block, depth in [(1, 16), (4, 8), (4, 16), (16, 4)]]
    if not found:
        pytest.skip("neither fio nor build/read_loop is here to compare with")
    return found


@pytest.fixture(scope="module")
def pairs(pytestconfig: pytest.Config) -> int:
    return max(LEAST_PAIRS, int(pytestconfig.getoption("benchmark_min_rounds")))


@dataclass(frozen=True)
class Disk:
    """The file that all read, and its content's digest."""

    path: Path
    digest: str


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    path = tmp_path_factory.mktemp("disk") / "file"
    digest, block = xxhash.xxh3_64(), os.urandom(16 * MIB)
    with path.open("wb") as file:
        for i in range(FILE_BYTES // len(block)):
            piece = i.to_bytes(8, "little") + block[8:]
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    yield Disk(path, digest.hexdigest())
    path.unlink()


@pytest.fixture(scope="module")
def arena() -> Iterator[PinnedArena]:
    with PinnedArena(ARENA_BYTES) as arena:
        yield arena


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Written when the module is done, one file a machine."""
    values: dict[str, Any] = {"machine": describe(), "file_bytes": FILE_BYTES, "targets": TARGETS}
    yield values
    gpu = values["machine"]["gpu"]
    name = re.sub(r"\W+", "-", gpu["name"].lower()).strip("-") if gpu else "cpu"
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"reader-{name}.json").write_text(json.dumps(values, indent=1) + "\n")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        sys.stdout.write("\n".join(["", *table(values), ""]))


def table(values: dict[str, Any]) -> list[str]:
    """Median, p20, p80 and target of what was measured, and of each peer that was tried."""
    best, pairs = values.get("io_uring / best peer", {}), values.get("threads / io_uring", {})
    rows = [
        ("io_uring / best peer", best.get("ratio")),
        ("io_uring, GiB/s", best.get("ours_gib_per_s")),
        ("best peer, GiB/s", best.get("theirs_gib_per_s")),
        ("cpu_ms_per_gb", best.get("ours_cpu_ms_per_gb")),
        ("best peer, CPU ms/GB", best.get("theirs_cpu_ms_per_gb")),
        ("threads / io_uring", pairs.get("ratio")),
        ("threads, CPU ms/GB", pairs.get("ours_cpu_ms_per_gb")),
        ("verify_ms_per_gb", values.get("verify_ms_per_gb")),
        ("pin_ms_per_gib", values.get("pin_ms_per_gib", {}).get("total")),
    ]
    lines = [f"{'':24}{'median':>9}{'p20':>9}{'p80':>9}{'target':>9}"]
    for name, row in rows:
        if row:
            target = values["targets"].get(name, "")
            lines.append(f"{name:24}{row['median']:9.2f}{row['p20']:9.2f}{row['p80']:9.2f}{target:>9}")
    if best:
        lines.append(f"best peer: {best['best_peer']}; engine {best['engine']}, direct {best['direct']}")
    lines += [
        f"  {name}: {' '.join(f'{v:.2f}' for v in tried)}" for name, tried in best.get("peers_gib_per_s", {}).items()
    ]
    return lines


def read_file(
    reader: Reader, arena: PinnedArena, path: Path, digest: xxhash.xxh3_64 | None = None, size: int = FILE_BYTES
) -> Sample:
    """Reads the file through the arena, three requests in flight; ``digest`` gets the bytes as a stream's does: in
    chunks, each as soon as it is there and may still lie in a cache."""
    places = ARENA_BYTES // REQUEST_BYTES
    with arena.lease(ARENA_BYTES) as slot, memoryview(slot) as view:
        started, cpu = time.perf_counter(), time.process_time()
        count = size // REQUEST_BYTES
        requests = []
        for i in range(count + 3):
            if i < count:
                extent = Extent(str(path), i * REQUEST_BYTES, REQUEST_BYTES)
                requests.append(reader.submit([extent], slot, i % places * REQUEST_BYTES))
            if i >= 3:
                request, bytes_read = requests[i - 3], view[(i - 3) % places * REQUEST_BYTES :][:REQUEST_BYTES]
                for start in range(0, REQUEST_BYTES if digest is not None else 0, CHUNK_BYTES):
                    request.wait_ready(start + CHUNK_BYTES)
                    digest.update(bytes_read[start : start + CHUNK_BYTES])
                request.wait()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Sample(size / seconds / GIB, cpu * 1e3 / (size / 1e9))


def spread(values: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[-1], "samples": values}


def paired(ours: list[Sample], theirs: list[Sample]) -> dict[str, Any]:
    return {
        "ours_gib_per_s": spread([sample.gib_per_s for sample in ours]),
        "theirs_gib_per_s": spread([sample.gib_per_s for sample in theirs]),
        "ratio": spread([a.gib_per_s / b.gib_per_s for a, b in zip(ours, theirs, strict=True)]),
        "ours_cpu_ms_per_gb": spread([sample.cpu_ms_per_gb for sample in ours]),
        "theirs_cpu_ms_per_gb": spread([sample.cpu_ms_per_gb for sample in theirs]),
    }


def in_pairs(benchmark: Any, pairs: int, ours: Callable[[], Sample], theirs: Callable[[], Sample]) -> dict[str, Any]:
    """Times both, one after the other, ``pairs`` times; pytest-benchmark shows ours."""
    mine: list[Sample] = []
    other: list[Sample] = []

    def run_theirs() -> None:
        other.append(theirs())

    def run_ours() -> None:
        mine.append(ours())

    benchmark.pedantic(run_ours, setup=run_theirs, rounds=pairs, iterations=1)
    result = paired(mine, other)
    benchmark.extra_info.update({key: value["median"] for key, value in result.items()})
    return result


def fastest(peers: list[Peer], path: Path) -> tuple[Peer, dict[str, list[float]]]:
    """The best of two rounds over all and three more over the five best, each by turns; and every GiB/s."""
    tried: dict[str, list[float]] = {peer.name: [] for peer in peers}

    def median(peer: Peer) -> float:
        return statistics.median(tried[peer.name])

    left = peers
    for rounds in (2, 3):
        for _ in range(rounds):
            for peer in left:
                tried[peer.name].append(peer.run(path).gib_per_s)
        left = sorted(left, key=median, reverse=True)[:5]
    return left[0], tried


def test_io_uring_against_the_best_peer(
    benchmark: Any, pairs: int, disk: Disk, arena: PinnedArena, peers: list[Peer], results: dict[str, Any]
) -> None:
    with Reader(arena=arena) as reader:
        digest = xxhash.xxh3_64()
        read_file(reader, arena, disk.path, digest)
        assert digest.hexdigest() == disk.digest
        best, tried = fastest(peers, disk.path)
        result = in_pairs(benchmark, pairs, lambda: read_file(reader, arena, disk.path), lambda: best.run(disk.path))
        info = reader.info()
    results["io_uring / best peer"] = {
        "engine": info.engine, "direct": info.direct, "reasons": info.reasons, "best_peer": best.name,
        "registered_buffers": info.registered_buffers, "peers_gib_per_s": tried, **result,
    }  # fmt: skip


def test_threads_against_io_uring(
    benchmark: Any, pairs: int, disk: Disk, arena: PinnedArena, results: dict[str, Any]
) -> None:
    with Reader(arena=arena) as uring, Reader(engine="threads") as threads:
        digest = xxhash.xxh3_64()
        read_file(threads, arena, disk.path, digest)
        assert digest.hexdigest() == disk.digest
        results["threads / io_uring"] = in_pairs(
            benchmark, pairs, lambda: read_file(threads, arena, disk.path), lambda: read_file(uring, arena, disk.path)
        )


def test_verification(benchmark: Any, pairs: int, disk: Disk, arena: PinnedArena, results: dict[str, Any]) -> None:
    """CPU time of XXH3 over what was read, apart from the reading: the difference of two runs, one after the other."""
    with Reader(arena=arena) as reader:
        size = FILE_BYTES // 2
        result = in_pairs(
            benchmark,
            pairs,
            lambda: read_file(reader, arena, disk.path, xxhash.xxh3_64(), size),
            lambda: read_file(reader, arena, disk.path, size=size),
        )
    both = zip(result["ours_cpu_ms_per_gb"]["samples"], result["theirs_cpu_ms_per_gb"]["samples"], strict=True)
    results["verify_ms_per_gb"] = spread([verified - plain for verified, plain in both])


def test_pinning(benchmark: Any, results: dict[str, Any]) -> None:
    infos = []

    def pin() -> None:
        with PinnedArena(4 * GIB) as arena:
            infos.append(arena.info())

    benchmark.pedantic(pin, rounds=5, iterations=1)
    results["pin_ms_per_gib"] = {
        "cuda_registered": infos[0].cuda_registered,
        "huge_page_share": infos[0].huge_page_share,
        "prefault": spread([info.prefault_s / 4 * 1e3 for info in infos]),
        "register": spread([info.register_s / 4 * 1e3 for info in infos]),
        "total": spread([(info.prefault_s + info.register_s) / 4 * 1e3 for info in infos]),
    }
