"""What ends while reads are in flight: readers, waits, processes, the interpreter."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mhaffn import _native
from tests.reader_files import ENGINES, MIB, ROOT, build_package, make_file, run_python
from tests.test_reader_faults import BLOCK_URING_LATER


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def _under_way() -> Iterator[tuple[ThreadPoolExecutor, dict[str, Future[Any]]]]:
    with ThreadPoolExecutor(4) as pool:
        yield pool, {}


@pytest.fixture
def side_by_side(
    request: pytest.FixtureRequest, _under_way: tuple[ThreadPoolExecutor, dict[str, Future[Any]]]
) -> Callable[[Callable[..., Any]], Any]:
    """``side_by_side(work)`` gives what ``work`` returns for this case of a test, or raises what it raises.

    The first case starts all that are selected: each has a process that mostly sleeps, to see what happens meanwhile.
    """
    pool, started = _under_way

    def result(work: Callable[..., Any]) -> Any:
        if request.node.nodeid not in started:
            for item in request.session.items:
                if isinstance(item, pytest.Function) and item.function is request.function:
                    started[item.nodeid] = pool.submit(work, **item.callspec.params)
        return started[request.node.nodeid].result()

    return result


FORK = """
import gc, multiprocessing, os, subprocess, sys, time
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
             reader.close, lambda: memoryview(slot), lambda: arena.lease(1), arena.info,
             lambda: request.ready_bytes, lambda: request.done, lambda: request.started_s, lambda: request.finished_s]
    assert all(refused(call) for call in calls), [refused(call) for call in calls]
    ranges = [line.split()[0].split("-") for line in open("/proc/self/maps")]
    assert not any(int(start, 16) <= address < int(end, 16) for start, end in ranges), "mapped in a fork"
    with PinnedArena(2 << 20, cuda=False) as own, Reader(engine=engine) as fresh, own.lease(4096) as mine:
        fresh.submit([Extent(path, 0, 4096)], mine).wait(30)
        assert bytes(mine) == content[:4096]

address = slot.address
for turn in range(6):
    request = reader.submit([Extent(path, 0, len(content))], slot)
    request.wait_ready(1 << 20, 30)
    if turn % 3 == 2:
        code = subprocess.run([sys.executable, "-c", "print(1)"], stdout=subprocess.DEVNULL).returncode
    elif turn % 3 == 1:
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


FORK_THAT_LIVES_ON = """
import os, signal, sys
from pathlib import Path
from mhaffn.reader import Extent, PinnedArena, Reader

path = sys.argv[1]
arena = PinnedArena(os.path.getsize(path), cuda=False)
reader = Reader(engine="io_uring", arena=arena)
with arena.lease(arena.nbytes) as slot:
    reader.submit([Extent(path, 0, os.path.getsize(path))], slot).wait(30)
if not reader.info().registered_buffers:
    print(*reader.info().reasons)
    raise SystemExit  # nothing is registered that a child could hold
pid = os.fork()
if pid == 0:
    signal.pause()
def held():
    # What the child's copies of our rings hold: [files, buffers] each.
    process = Path(f"/proc/{pid}")
    rings = [fd.name for fd in (process / "fd").iterdir() if "io_uring" in os.readlink(fd)]
    lines = [(process / "fdinfo" / fd).read_text().splitlines() for fd in rings]
    return [[int(l.split()[1]) for l in text if l.startswith(("UserFiles:", "UserBufs:"))] for text in lines]
before = held()
reader.close()
arena.close()
after = held()
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
print(before, after)
assert any(buffers for _, buffers in before), before
assert not any(files or buffers for files, buffers in after), after
"""


@pytest.mark.skipif(_native.liburing == "none", reason="built without liburing")
def test_a_fork_that_lives_on_holds_no_memory(tmp_path: Path) -> None:
    make_file(tmp_path / "file", 8 * MIB)
    output = run_python(FORK_THAT_LIVES_ON, str(tmp_path / "file"))
    if "small pages" in output:
        pytest.skip(output)


IN_FLIGHT = """
import gc, sys, threading, time
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
assert not any(request.done for request in requests)
started = time.perf_counter()
if ending == "close":
    reader.close()
elif ending == "close twice":
    other = threading.Thread(target=reader.close)
    other.start()
    reader.close()
    assert all(request.done for request in requests)
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
elif ending in ("exit", "exit under a wait"):
    if ending == "exit under a wait":
        threading.Thread(target=requests[3].wait, daemon=True).start()
        time.sleep(0.02)
    print("ok", flush=True)
    sys.exit(0)
assert time.perf_counter() - started < 5, time.perf_counter() - started
view[:] = b"\\x5a" * size
time.sleep(float(2))
assert view == b"\\x5a" * size
print("ok")
"""


ENDINGS = ["close", "close twice", "signal", "collect", "exit", "exit under a wait"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_written_after_the_end(engine: str, ending: str, tmp_path: Path, side_by_side: Any) -> None:
    make_file(tmp_path / "file", 8 * MIB)
    side_by_side(partial(end_in_flight, tmp_path / "file", environment=dict(os.environ)))


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
    assert process.stdout.readline() == "ok\n", process.communicate(timeout=60)
    started = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, ""), errors
    assert time.monotonic() - started < 5


HANG = """
import ctypes, fcntl, gc, logging, os, struct, sys, threading, time
from mhaffn.errors import PinnedMemoryError, ReadCancelledError, ReadTimeoutError
from mhaffn.reader import Extent, PinnedArena, Reader

path, engine = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(message)s")
arena = PinnedArena(4 << 20, cuda=False, prefault=False)
slot = arena.lease(1 << 20, 0)
# A read that hangs in the kernel: its memory faults, and nobody answers the fault.
SYS_userfaultfd, UFFDIO_API, UFFDIO_REGISTER = 323, 0xC018AA3F, 0xC020AA00
faults = ctypes.CDLL(None).syscall(SYS_userfaultfd, os.O_CLOEXEC)
fcntl.ioctl(faults, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
fcntl.ioctl(faults, UFFDIO_REGISTER, bytearray(struct.pack("QQQQ", slot.address, 2 << 20, 1, 0)))

reader = Reader(engine=engine, arena=arena)
request = reader.submit([Extent(path, 0, 1 << 20)], slot)
try:
    request.wait(0.2)
    raise SystemExit("the read does not hang")
except ReadTimeoutError:
    pass
ticks, stop = [], threading.Event()
def tick():
    while not stop.wait(0.01):
        ticks.append(time.perf_counter())
ticker = threading.Thread(target=tick)
ticker.start()
started = time.perf_counter()
del reader
gc.collect()
took = time.perf_counter() - started
stop.set()
ticker.join()
assert took < 5, took
assert max(b - a for a, b in zip(ticks, ticks[1:])) < took / 2, "no other thread ran meanwhile"
slot.release()
assert arena.info().leaked_bytes == 1 << 20
try:
    arena.lease(4096, 4096)
    raise SystemExit("leaked memory was leased again")
except PinnedMemoryError:
    pass
try:
    request.wait(0)
    raise SystemExit("a read that hung was taken for one that ended well")
except ReadCancelledError:
    pass
os.close(faults)
"""


@pytest.mark.skipif(os.geteuid() != 0 or os.uname().machine != "x86_64", reason="userfaultfd by number, as root")
def test_a_read_that_never_ends_is_given_up(engine: str, tmp_path: Path, side_by_side: Any) -> None:
    make_file(tmp_path / "file", 1 * MIB)
    output = side_by_side(lambda engine: run_python(HANG, str(tmp_path / "file"), engine))
    assert "1048576 bytes of pinned memory are leaked" in output


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
    site, _ = build_package(tmp_path, CFLAGS=flags, CXXFLAGS=flags, LDFLAGS=flags)
    make_file(tmp_path / "file", 8 * MIB)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(site),
    }
    loaded = subprocess.run(
        [sys.executable, "-c", "import mhaffn._native as n; print(n.__file__)"],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert str(tmp_path) in loaded.stdout, loaded
    for engine in ("threads",) if _native.liburing == "none" else ("io_uring", "threads"):
        for ending in ENDINGS:
            end_in_flight(tmp_path / "file", engine, ending, environment)
    if _native.liburing != "none" and os.uname().machine == "x86_64":
        run_python(BLOCK_URING_LATER, str(tmp_path / "file"), str(errno.EPERM), "busy", env=environment)
