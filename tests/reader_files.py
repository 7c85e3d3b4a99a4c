"""Files, file systems and processes for the reader's tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mhaffn import _native

ENGINES = [
    pytest.param("io_uring", marks=pytest.mark.skipif(_native.liburing == "none", reason="built without liburing")),
    "threads",
]
MIB = 1 << 20
ROOT = Path(__file__).parent.parent


def kernel() -> tuple[int, ...]:
    """Its version, such as (6, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])


def besides_small_pages(reasons: Iterable[str]) -> list[str]:
    """``reasons`` without the one that a machine may add to any reader whose memory is in pieces."""
    return [reason for reason in reasons if "in small pages" not in reason]


def make_file(path: Path, size: int) -> bytes:
    content: bytes = np.random.default_rng(size).bytes(size)
    path.write_bytes(content)
    return content


@contextmanager
def loop_device(image: Path, size: int, sector: int) -> Iterator[str]:
    """A block device of ``size`` bytes with sectors of ``sector`` bytes; needs root."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    with image.open("wb") as file:
        file.truncate(size)
    made = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", str(sector), str(image)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=False)


@contextmanager
def loop_mount(folder: Path, size: int, sector: int, options: str = "defaults") -> Iterator[Path]:
    """An ext4 file system on a loop device; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = folder / "mount"
    mount.mkdir()
    with loop_device(folder / "image", size, sector) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        done = subprocess.run(["mount", "-o", options, device, str(mount)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        try:
            yield mount
        finally:
            subprocess.run(["umount", "--lazy", str(mount)], check=False)


def build_package(folder: Path, **environment: str) -> tuple[Path, str]:
    """The package with an extension built under ``environment``: where it is to be imported from, and the output."""
    site = folder / "site"
    # Not the extension that is here already.
    shutil.copytree(ROOT / "mhaffn", site / "mhaffn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(folder / "temp"), "--build-lib", str(site)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return site, built.stdout


def run_python(script: str, *arguments: str, timeout: float = 60, **options: object) -> str:
    """What a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(done.stdout)
