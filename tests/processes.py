"""Processes that start in a moment: forked from one that has imported what takes seconds."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch", "safetensors.torch", "mhaffn.cli", "mhaffn.hf", "mhaffn.store", "mhaffn.calibrate",
        "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    ]
)  # fmt: skip


class Command:
    """``mhaffn`` with ``words``, in a process of its own that ends as an interpreter does."""

    def __init__(self, folder: Path, words: tuple[object, ...], environment: dict[str, str]) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        self.process = context.Process(
            target=_main, args=([*map(str, words)], os.environ | environment, self._out, self._err)
        )
        self.process.start()

    @property
    def printed(self) -> str:
        """What it has written to standard output so far."""
        return self._out.read_text(encoding="utf-8") if self._out.exists() else ""

    @property
    def told(self) -> str:
        """What it has written to standard error so far."""
        return self._err.read_text(encoding="utf-8") if self._err.exists() else ""

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Waits for ``condition`` to hold, which it must before the command ends."""
        ends = time.monotonic() + timeout_s
        while not condition():
            running = self.process.is_alive() and time.monotonic() < ends
            assert running or condition(), f"it never came to that: {self.told}"
            time.sleep(0.005)

    def wait(self, timeout_s: float = 60) -> int:
        """Its exit code."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"it still runs after {timeout_s} s: {self.told}"
        return self.process.exitcode


@contextmanager
def running(*words: object, **environment: str) -> Iterator[Command]:
    """A command for the length of a block, where there is no GPU."""
    with TemporaryDirectory() as folder:
        command = Command(Path(folder), words, {"CUDA_VISIBLE_DEVICES": "", **environment})
        try:
            yield command
        finally:
            command.process.kill()
            command.process.join()


def _main(words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()  # of when the first process was made
    os.environ.update(environment)
    sys.argv = ["mhaffn", *words]
    from mhaffn.cli import main

    as_an_interpreter(main)


def as_an_interpreter(work: Callable[..., Any], *arguments: Any) -> None:
    """Does ``work`` and ends the process: its threads are waited for, its exit functions run, its objects destroyed."""
    gc.freeze()  # memory that is shared until it is touched: the collector has nothing to look for there
    code: Any = 0
    try:
        work(*arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    ctypes.pythonapi.Py_Exit(code)  # of a forked process multiprocessing would leave all that out
