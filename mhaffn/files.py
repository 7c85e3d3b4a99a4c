"""Opening files that may be anything: a pipe, a device, far too large, or no JSON at all; where ours are kept, and how
temporary ones go in every way that a run can end.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from mhaffn.errors import MhaffnError, ReadError

JSON_BYTES_MAX = 64 << 20
TRIAL_BLOCK_BYTES = 16 << 20

_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxstring, _short.maxother = 2, 4, 8, 120, 120


def shown(value: object) -> str:
    """``value`` as an error message shows it: escaped, and short however long or deep it is."""
    return _short.repr(value)


def default_cache() -> Path:
    """``mhaffn`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhaffn"


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading; raises :class:`OSError`, and never waits for a writer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError:  # a zero byte, or characters that no file name can hold
        raise OSError(errno.EINVAL, "no possible file name", str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file", str(path))
    return open(descriptor, "rb")  # noqa: PTH123 – a descriptor has no Path


def parse_json(content: bytes) -> Any:
    """The JSON value in ``content``; raises :class:`ValueError` for all that is wrong with it.

    A key that stands twice in one object is refused: readers differ in which of the two they take.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path, raises: type[MhaffnError], advice: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises :class:`FileNotFoundError` when there is no such file, and ``raises`` – its message ends with
    ``advice`` – when it cannot be read, is larger than 64 MiB, or holds anything but one JSON object.
    """
    try:
        with open_regular(path) as file:
            content = file.read(JSON_BYTES_MAX + 1)
    except FileNotFoundError:
        if os.path.lexists(path):
            raise raises(f"{path} is a link to a file that is not there. {advice}") from None
        raise
    except OSError as error:
        raise raises(f"{path} cannot be read: {error.strerror}. {advice}") from error
    if len(content) > JSON_BYTES_MAX:
        raise raises(f"{path}: got more than {JSON_BYTES_MAX} bytes, expected a small JSON file. {advice}")
    try:
        values = parse_json(content)
    except ValueError as error:
        raise raises(f"{path} is not valid JSON: {error}. {advice}") from error
    if not isinstance(values, dict):
        raise raises(f"{path}: got {shown(values)}, expected a JSON object. {advice}")
    return values


def read_text(path: Path, raises: type[MhaffnError]) -> str:
    """The text in ``path``, a pipe too; ``raises`` when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise raises(f"{path}: got bytes that are not UTF-8 at {error.start}, expected a text file") from None
    except OSError as error:
        raise raises(f"{path} cannot be read: {error.strerror}. Give a text file.") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return values


@contextmanager
def trial_file(
    folder: Path, prefix: str, nbytes: int, announced: Callable[[Path], None] = lambda path: None
) -> Iterator[Path]:
    """A file of ``nbytes`` of noise in ``folder``, durable, and gone at the end; ``announced`` before it is written.

    Raises :class:`ReadError` where the folder cannot be written.
    """
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=prefix)  # noqa: SIM115 – closed below
    except OSError as error:
        raise ReadError(
            f"{folder} cannot be written ({error.strerror}); give a folder that can, or one that holds a model",
            op="open", path=str(folder), errno=error.errno or 0,
        ) from error  # fmt: skip
    with stoppable(), file:
        announced(Path(file.name))
        block = os.urandom(min(TRIAL_BLOCK_BYTES, nbytes))
        for start in range(0, nbytes, len(block)):
            file.write(block[: nbytes - start])
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program by way of its ``finally`` blocks."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handlers({signal.SIGTERM: stop, signal.SIGHUP: stop}):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """No second Ctrl-C interrupts what tidies up after the first."""
    with _handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


@contextmanager
def _handlers(wanted: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # a handler that was not set from Python
                signal.signal(number, handler)
