"""What a measurement was taken on: machine, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import mhaffn

PACKAGES = ("torch", "triton", "transformers", "numpy", "cupy-cuda13x")


def describe() -> dict[str, object]:
    """Processor, memory, kernel, GPU, package versions, commit and date (UTC), for a file of results."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpu": _gpu(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "mhaffn": mhaffn.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def file_name(device: str) -> str:
    """What a file of results is called: by the GPU ("cuda"), or by the processor and its cores ("cpu")."""
    gpu = _gpu() if device == "cuda" else None
    words = str(gpu["name"]).removeprefix("NVIDIA ") if gpu else f"{_cpu()} {os.cpu_count()} cores"
    return re.sub(r"\W+", "-", words.lower()).strip("-")


def version_of(package: str) -> str:
    """The version of a package that is installed; empty where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu() -> dict[str, object] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """The commit of a source checkout, with + where its files differ from it; None elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
