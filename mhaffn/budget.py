"""Memory budgets: what the user allows, or what is free now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mhaffn.config import parse_bytes
from mhaffn.errors import ConfigError

if TYPE_CHECKING:
    import torch

Budget = int | str | None
"""Bytes, text such as "14GiB", "auto" for what is free now, or None for none."""

GPU_HEADROOM = 0.92
DRAM_HEADROOM = 0.80


def resolve_budget(budget: Budget, free: Callable[[], int]) -> int | None:
    """``budget`` in bytes; None where no sublayer may stay. Raises :class:`ConfigError`."""
    if budget == "auto":
        return free()
    return parse_bytes(budget) or None if budget is not None else None


def free_gpu(device: torch.device) -> int:
    """Bytes of GPU memory to use: what is free, less headroom."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0] * GPU_HEADROOM)


def free_dram() -> int:
    """Bytes of host memory to use: what the kernel calls available, less headroom; a cgroup's limit counts too."""
    available = [_meminfo("MemAvailable")]
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        available.append(int(limit) - int(used))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        pass
    return int(max(min(available), 0) * DRAM_HEADROOM)


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ConfigError(f"/proc/meminfo has no {field}; give dram= a size")
