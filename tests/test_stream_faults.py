"""A stream whose disk dies, and one that runs for a thousand passes."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mhaffn
from mhaffn.errors import EngineUnavailableError, ReadError, TruncatedFileError
from mhaffn.store.pack import pack
from tests.conftest import Model
from tests.reader_files import loop_mount
from tests.streaming import greedy, load_placed, resident_tokens, rss

FUSE = Path(__file__).with_name("fuse_file.py")
ENGINES = pytest.mark.parametrize("engine", ["io_uring", "threads"])


def streamed(folder: Path, **options: Any) -> mhaffn.StreamedLlama:
    return mhaffn.load(folder, gpu=None, dram=None, device="cpu", **options)


def run_until_it_fails(model: mhaffn.StreamedLlama) -> ReadError:
    with pytest.raises(ReadError) as caught:
        for _ in range(50):
            greedy(model)
    with pytest.raises(ReadError):  # it stays ended
        greedy(model)
    return caught.value


def test_a_checked_stream_outlives_the_main_thread(tiny_model: Model, tmp_path: Path) -> None:
    """As where a thread generates for a streamer that nobody joins."""
    pack(tiny_model(), tmp_path / "store")
    script = (
        "import sys, threading, time, torch, mhaffn\n"
        "model = mhaffn.load(sys.argv[1], gpu=None, dram=None, device='cpu')\n"
        "def work():\n"
        "    time.sleep(0.5)\n"
        "    print(model.generate(torch.tensor([[5, 17]]), max_new_tokens=9, do_sample=False).shape[1], flush=True)\n"
        "threading.Thread(target=work).start()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store")], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.split()[-1:] == ["11"], run.stderr[-2000:]


def test_closing_waits_for_no_checksum_that_is_not_begun(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def update(self, data: memoryview) -> None:
            time.sleep(0.5)

        def hexdigest(self) -> str:
            return ""

    pack(tiny_model(), tmp_path / "store")
    monkeypatch.setattr("mhaffn.checksums.THREADS", 1)
    monkeypatch.setattr("mhaffn.checksums.xxhash", SimpleNamespace(xxh3_64=Slow))
    model = streamed(tmp_path / "store")
    time.sleep(0.1)
    assert len(model.runner._stream._live) >= 4  # so many are read and wait
    started = time.perf_counter()
    model.close()
    assert time.perf_counter() - started < 1.0  # the one under way, of all that was read


@ENGINES
def test_a_disk_that_loses_its_end_ends_the_pass_and_the_process_goes_on(
    engine: Any, tiny_model: Model, tmp_path: Path
) -> None:
    source = tiny_model(hidden_size=576, intermediate_size=2048)
    expected = resident_tokens(source)
    with loop_mount(tmp_path / "loop", 128 << 20, 512) as disk:
        folder = shutil.copytree(source, disk / "model")
        os.sync()
        with streamed(folder, engine=engine) as model:
            assert greedy(model) == expected
            os.truncate(tmp_path / "loop" / "image", 1 << 20)
            error = run_until_it_fails(model)
        assert not isinstance(error, TruncatedFileError)
        assert "model.safetensors" in str(error) and error.errno
    with streamed(source, engine=engine) as model:
        assert greedy(model) == expected


def test_a_reader_that_refuses_every_read_closes_in_peace(tiny_model: Model) -> None:
    libc, disable_huge_pages = ctypes.CDLL(None), 41
    if libc.prctl(disable_huge_pages, 1, 0, 0, 0):
        pytest.skip("huge pages cannot be turned off here")
    try:
        model = streamed(tiny_model(), engine="io_uring", strict=True)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    finally:
        libc.prctl(disable_huge_pages, 0, 0, 0, 0)
    with model, pytest.raises(EngineUnavailableError, match="small pages"):
        greedy(model)
    assert model.runner._stream._freed_all
    model.close()


@contextmanager
def fuse_file(tmp_path: Path, backing: Path, flag: Path) -> Iterator[Path]:
    """The path of a file that reads as ``backing`` and fails while ``flag`` is there."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("a FUSE mount needs root and /dev/fuse")
    point = tmp_path / "fuse"
    point.mkdir()
    server = subprocess.Popen([sys.executable, FUSE, point, backing, flag], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not os.path.ismount(point):
            if server.poll() is not None:
                pytest.skip(f"no FUSE mount here: {server.communicate()[1].splitlines()[-1]}")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield point / "file"
    finally:
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)
        server.kill()
        server.wait()


@ENGINES
def test_a_file_system_that_fails_and_recovers(engine: Any, tiny_model: Model, tmp_path: Path) -> None:
    source, flag = tiny_model(), tmp_path / "fail"
    expected = resident_tokens(source)
    with fuse_file(tmp_path, source / "model.safetensors", flag) as path:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).symlink_to(path if file.suffix == ".safetensors" else file)
        with streamed(folder, engine=engine) as model:
            assert greedy(model) == expected
            flag.touch()
            assert "Input/output error" in str(run_until_it_fails(model))
        flag.unlink()
        with streamed(folder, engine=engine) as model:
            assert greedy(model) == expected


@pytest.mark.slow
def test_a_thousand_passes_leave_nothing_behind(tiny_model: Model, device: str) -> None:
    """No growth of memory, descriptors, threads or GPU memory, every tier in use."""
    folder = tiny_model(num_hidden_layers=2)
    ids = torch.tensor([[5, 17, 101]], device=device)
    tiers: Any = ("ssd", "dram", "ssd", "gpu") if device == "cuda" else ("ssd", "dram", "ssd", "ssd")
    with load_placed(folder, tiers, device=device) as model, torch.inference_mode():
        expected = model(ids).logits
        for _ in range(300):  # until the trace's and the allocators' own sizes have settled
            model(ids)
        before = held(device)
        for _ in range(1000):
            assert torch.equal(model(ids).logits, expected)
        after = held(device)
    grown = {name: after[name] - before[name] for name in after}
    assert grown.pop("rss") < 6 << 20, grown  # a trace span is about 0.3 kB
    assert not any(grown.values()), (grown, own_threads())


def own_threads() -> list[str]:
    """All but the kernel's: io_uring's workers are listed in the process too, and come and go as reads have to wait."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            names.append((task / "comm").read_text())
    return sorted(name.strip() for name in names if not name.startswith("iou-"))


def held(device: str) -> dict[str, int]:
    gc.collect()
    found = {"rss": rss(), "fds": len(list(Path("/proc/self/fd").iterdir())), "threads": len(own_threads())}
    if device == "cuda":
        torch.cuda.synchronize()
        found["gpu"] = torch.cuda.memory_reserved()
    return found
