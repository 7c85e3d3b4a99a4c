"""What a run needs and takes: memory on host and device, before and after."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mhaffn.bench import passes
from mhaffn.config import ModelConfig, Sublayer, format_bytes
from mhaffn.errors import BudgetError
from mhaffn.plan import HUGE_PAGE, Plan
from mhaffn.sizes import Sizes, Workload

WORK_BYTES = {"cpu": 384 << 20, "cuda": 1 << 30}
"""Writing random weights, threads' buffers, what libraries allocate on first use."""
GRAPHS = 3
"""Prefill is captured in so many graphs, each with memory of its own."""


@dataclass(frozen=True)
class Roofs:
    """Bytes that the roofs are measured with; ``disk`` are read at a time, into ``disk_memory``."""

    memory: int
    h2d: int
    disk: int
    disk_memory: int
    matmul: int

    @staticmethod
    def fitting(device: torch.device, dram: int, quick: bool) -> Roofs:
        if device.type == "cuda":
            return Roofs(memory=1 << 30, h2d=256 << 20, disk=1 << 30, disk_memory=512 << 20, matmul=8192)
        memory = min(256 << 20, max(32 << 20, dram // 8 >> 20 << 20))
        if quick:
            return Roofs(memory=min(memory, 96 << 20), h2d=0, disk=32 << 20, disk_memory=32 << 20, matmul=1024)
        return Roofs(memory=memory, h2d=0, disk=256 << 20, disk_memory=memory, matmul=1536)


@dataclass(frozen=True)
class Needs:
    """Plans of the passes (``whole`` None: no room for whole layers), and bytes needed in all."""

    split: Plan
    whole: Plan | None
    gpu: int
    dram: int


def needs(config: ModelConfig, tokens: int, device: torch.device, roofs: Roofs) -> list[Needs]:
    """Ways to run, the best first."""
    copies = device.type == "cuda"
    sizes = Sizes(config, "bfloat16")
    layer = sum(sizes.image(Sublayer(0, kind)) for kind in ("mha", "ffn"))
    work = sizes.kv_cache(Workload(tokens, tokens)) + sizes.activations(Workload(tokens, tokens))
    found = []
    for prefetch, with_whole in ((2, True), (2, False), (1, False)):
        split = passes.split_plan(config, tokens, copies, prefetch)
        whole = passes.whole_plan(config, split) if with_whole else None
        plans = [split, *([whole] if whole else [])]
        gpu = sum(plan.gpu_bytes for plan in plans) + roofs.memory + roofs.h2d + 12 * roofs.matmul**2
        gpu += layer + sizes.image(Sublayer(0, "ffn")) + GRAPHS * work  # resident weights, a target of copies, compute
        dram = sum(plan.dram_bytes for plan in plans) + 2 * (layer + HUGE_PAGE) + WORK_BYTES[device.type]
        dram += roofs.disk_memory
        dram += roofs.h2d if copies else layer + work + roofs.memory + 10 * roofs.matmul**2
        found.append(Needs(split, whole, gpu if copies else 0, dram))
    return found


def choose(ways: list[Needs], gpu: int | None, dram: int) -> Needs:
    """The first way within both budgets; raises :class:`BudgetError` with what the least way needs."""
    for way in ways:
        if (gpu is None or way.gpu <= gpu) and way.dram <= dram:
            return way
    least = ways[-1]
    for option, budget, need in (("--gpu", gpu, least.gpu), ("--dram", dram, least.dram)):
        if budget is not None and need > budget:
            raise BudgetError(
                f"{option} {format_bytes(budget)} is too small: measuring this shape needs {format_bytes(need)} there. "
                f"Raise it, or give a smaller --shape or fewer --tokens."
            )
    raise AssertionError("a way that fits was not chosen")


class Watch:
    """The most memory that was in use since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.zeros(1, device=device)  # the context takes host memory too
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts at what is there now
        self._before = _resident("VmRSS")

    def peaks(self) -> dict[str, int]:
        gpu = int(torch.cuda.max_memory_reserved(self._device)) if self._device.type == "cuda" else 0
        return {"gpu": gpu, "dram": max(0, _resident("VmHWM") - self._before)}


def _resident(name: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
