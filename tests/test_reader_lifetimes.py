"""What ends while reads are in flight: readers, waits, processes, the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mhaffn import _native
from tests.reader_files import ENGINES, MIB, ROOT, make_file, run_python


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


FORK = """
import gc, multiprocessing, os, sys, time
from mhaffn.errors import MhaffnError
from mhaffn.reader import Extent, PinnedArena, Reader

path, engine = sys.argv[1:]
content = open(path, "rb").read()
arena = PinnedArena(len(content), cuda=False)
reader = Reader(engine=engine, block_bytes=64 << 10, depth=2, arena=arena)
slot = arena.lease(len(content))

def refused(call):
    try:
        call()
    except (MhaffnError, BufferError) as error:
        chain = f"{error} {error.__cause__}"
        assert "fork" in chain and "make new ones" in chain, chain
        return True
    return False

def child(request):
    calls = [lambda: reader.submit([], slot), lambda: request.wait(), lambda: request.cancel(), reader.info,
             reader.close, lambda: memoryview(slot), lambda: arena.lease(1), arena.info]
    assert all(refused(call) for call in calls), [refused(call) for call in calls]
    with PinnedArena(2 << 20, cuda=False) as own, Reader(engine=engine) as fresh, own.lease(4096) as mine:
        fresh.submit([Extent(path, 0, 4096)], mine).wait(30)
        assert bytes(mine) == content[:4096]

for turn in range(4):
    request = reader.submit([Extent(path, 0, len(content))], slot)
    request.wait_ready(1 << 20, 30)
    if turn % 2:
        process = multiprocessing.get_context("fork").Process(target=child, args=(request,))
        process.start()
        process.join(30)
        code = process.exitcode
    else:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(request)
                del request, reader, slot, arena
                gc.collect()
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, code
    request.wait(30)
    assert bytes(slot) == content
slot.release()
reader.close()
arena.close()
print("ok")
"""


def test_a_fork_is_refused_and_harms_nothing(engine: str, tmp_path: Path) -> None:
    make_file(tmp_path / "file", 32 * MIB)
    assert run_python(FORK, str(tmp_path / "file"), engine) == "ok\n"


IN_FLIGHT = """
import gc, sys, time
from mhaffn.errors import MhaffnError
from mhaffn.reader import Extent, PinnedArena, Reader

path, engine, ending = sys.argv[1:]
size = 32 << 20
arena = PinnedArena(size, cuda=False)
canary = arena.lease(size)
view = memoryview(canary)
canary.release()  # the view stays, so that the memory can be looked at while it is leased to others
slots = [arena.lease(size // 4, i * size // 4) for i in range(4)]
reader = Reader(engine=engine, block_bytes=4096, depth=2, arena=arena)
requests = [reader.submit([Extent(path, 0, size // 4)], slot) for slot in slots]
requests[0].wait_ready(1, 30)
started = time.perf_counter()
if ending == "close":
    reader.close()
elif ending == "signal":
    print("ready", flush=True)
    try:
        requests[3].wait()
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        started = time.perf_counter()
        reader.close()
elif ending == "collect":
    del reader, requests, slots
    gc.collect()
elif ending == "exit":
    print("ok", flush=True)
    sys.exit(0)
assert time.perf_counter() - started < 5, time.perf_counter() - started
view[:] = b"\\x5a" * size
time.sleep(float(2))
assert view == b"\\x5a" * size
print("ok")
"""


@pytest.mark.parametrize("ending", ["close", "signal", "collect", "exit"])
def test_nothing_is_written_after_the_end(engine: str, ending: str, tmp_path: Path) -> None:
    make_file(tmp_path / "file", 8 * MIB)
    end_in_flight(tmp_path / "file", engine, ending, dict(os.environ))


def end_in_flight(path: Path, engine: str, ending: str, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", IN_FLIGHT, str(path), engine, ending],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    if ending == "signal":
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "ok\n"), errors


@pytest.mark.slow
def test_the_same_under_address_sanitizer(tmp_path: Path) -> None:
    """The extension itself is instrumented; the interpreter gets the runtime by LD_PRELOAD."""
    # The C++ library too, before the first exception: the runtime looks for its functions when it starts.
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in runtime):
        pytest.skip("no AddressSanitizer runtime")
    flags = "-fsanitize=address -g -O1"
    package = tmp_path / "site" / "mhaffn"
    package.mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "reader.py"):
        (package / name).write_text((ROOT / "mhaffn" / name).read_text())
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "temp"),
         "--build-lib", str(tmp_path / "site")],
        check=True, cwd=ROOT, capture_output=True,
        env={**os.environ, "CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": flags},
    )  # fmt: skip
    make_file(tmp_path / "file", 8 * MIB)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(tmp_path / "site"),
    }
    loaded = subprocess.run(
        [sys.executable, "-c", "import mhaffn._native as n; print(n.__file__)"],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert str(tmp_path) in loaded.stdout, loaded
    for engine in ("threads",) if _native.liburing == "none" else ("io_uring", "threads"):
        for ending in ("close", "signal", "collect", "exit"):
            end_in_flight(tmp_path / "file", engine, ending, environment)
