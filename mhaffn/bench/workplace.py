"""Room on a disk for a while: said and checked before, cleared in every way a run can end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mhaffn.config import format_bytes
from mhaffn.errors import ConfigError, StoreError
from mhaffn.files import stoppable, undisturbed

PREFIX = ".mhaffn-bench-"
HEADROOM_BYTES = 256 << 20


def left_behind(folder: Path) -> list[Path]:
    """Folders of runs that were killed outright."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def check_room(folder: Path, nbytes: int) -> int:
    """Free bytes in ``folder``; raises :class:`StoreError` where ``nbytes`` and some headroom do not fit."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give one on the disk to measure with --folder")
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if nbytes + HEADROOM_BYTES > free:
        raise StoreError(
            f"{folder}: got {format_bytes(free)} of free space, need {format_bytes(nbytes + HEADROOM_BYTES)} for "
            f"random weights. Give a folder on another disk with --folder, or a smaller --shape."
        )
    return free


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder``, removed at the end: after errors, Ctrl-C, and signals that ask to stop."""
    with stoppable():
        try:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        except OSError as error:
            raise StoreError(f"{folder} cannot be written ({error.strerror}). Give another with --folder.") from error
        try:
            yield path
        finally:
            with undisturbed():
                shutil.rmtree(path, ignore_errors=True)


def describe_disk(folder: Path) -> dict[str, str]:
    """The file system and device under ``folder``, as /proc and /sys tell them."""
    device, kind = _mounted(folder)
    number = folder.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    model = ""
    for inner in ("device/model", "../device/model"):
        with suppress(OSError):
            model = model or (place / inner).read_text(encoding="utf-8").strip()
    with suppress(OSError):
        backing = Path((place / "loop" / "backing_file").read_text(encoding="utf-8").strip())
        model = f"a file on {_mounted(backing)[1]}"
    return {"device": device, "file_system": kind, "model": model}


def _mounted(path: Path) -> tuple[str, str]:
    """Device and file system that ``path`` lies on."""
    best = ("", "", "")
    resolved = str(path.resolve())
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        device, mount, kind, *_ = line.split()
        mount = mount.replace("\\040", " ")
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[1]):
            best = (device, mount, kind)
    return best[0], best[2]
