"""Seconds a pass will take under a plan: reads, copies and compute, event by event.

The same rules the stream follows: one SSD, one copy engine and one compute stream, each serving sublayers
in pass order; a read waits for room in staging, a copy for its read (chunk by chunk) and for room on the
device, compute for its copy; the cycle runs through the pass boundary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mhaffn.config import Sublayer
from mhaffn.ring import ByteRing

CHUNK_BYTES = 16 << 20
"""What is copied at once, as soon as it has arrived."""
PASSES = 6


class Planned(Protocol):
    """What the simulation needs of a plan: tiers in pass order, and the bytes of both rings."""

    @property
    def tiers(self) -> Mapping[Sublayer, str]: ...
    @property
    def staging_bytes(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...


@dataclass(frozen=True)
class Work:
    """One sublayer's part in a pass: bytes moved, and seconds of compute."""

    nbytes: int
    compute_s: float


@dataclass(frozen=True)
class Links:
    """Speeds in bytes a second. ``h2d`` is None where the device computes from host memory."""

    ssd: float
    h2d: float | None


@dataclass(frozen=True)
class Prediction:
    """Seconds of a steady pass, and what each link needs for one if it were alone."""

    seconds: float
    ssd_s: float
    h2d_s: float
    compute_s: float

    @property
    def bound_s(self) -> float:
        """No schedule is faster: the greatest of the sums."""
        return max(self.ssd_s, self.h2d_s, self.compute_s)

    @property
    def binding(self) -> str:
        """The link that sets the bound: "SSD", "copy" (host to device) or "compute"."""
        links = {"SSD": self.ssd_s, "copy": self.h2d_s, "compute": self.compute_s}
        return max(links, key=lambda link: links[link])


def predict(plan: Planned, work: Mapping[Sublayer, Work], links: Links) -> Prediction:
    """Simulates a few passes in a row under ``plan``; the last one is the steady pass reported."""
    ends = _pass_ends(plan, work, links)
    on_ssd = [sublayer for sublayer, tier in plan.tiers.items() if tier == "ssd"]
    off_device = [sublayer for sublayer, tier in plan.tiers.items() if tier != "gpu"]
    return Prediction(
        seconds=(ends[-1] - ends[1]) / (len(ends) - 2),
        ssd_s=sum(work[s].nbytes for s in on_ssd) / links.ssd,
        h2d_s=sum(work[s].nbytes for s in off_device) / links.h2d if links.h2d else 0.0,
        compute_s=sum(item.compute_s for item in work.values()),
    )


def _pass_ends(plan: Planned, work: Mapping[Sublayer, Work], links: Links) -> list[float]:
    ssd_s = h2d_s = compute_s = 0.0
    staging, slots = _Ring(plan.staging_bytes), _Ring(plan.slot_bytes)
    ends = []
    for _ in range(PASSES):
        for sublayer, tier in plan.tiers.items():
            item = work[sublayer]
            arrived_s = 0.0
            if tier == "ssd":
                read_from_s = max(ssd_s, staging.room_s(item.nbytes))
                arrived_s = ssd_s = read_from_s + item.nbytes / links.ssd
            if tier != "gpu" and links.h2d:
                first_chunk_s = arrived_s - max(0, item.nbytes - CHUNK_BYTES) / links.ssd if tier == "ssd" else 0.0
                copy_from_s = max(h2d_s, slots.room_s(item.nbytes), first_chunk_s)
                last_chunk_s = min(item.nbytes, CHUNK_BYTES) / links.h2d
                h2d_s = max(copy_from_s + item.nbytes / links.h2d, arrived_s + last_chunk_s)
                arrived_s = h2d_s
                if tier == "ssd":
                    staging.freed(h2d_s)
            compute_s = max(compute_s, arrived_s) + item.compute_s
            if tier == "ssd" and not links.h2d:
                staging.freed(compute_s)
            elif tier != "gpu" and links.h2d:
                slots.freed(compute_s)
        ends.append(compute_s)
    return ends


class _Ring:
    """A byte ring in simulated time: each place is free again at a time known when it is taken."""

    def __init__(self, capacity: int) -> None:
        self._ring, self._free_s = ByteRing(capacity), deque[float]()

    def room_s(self, nbytes: int) -> float:
        """When ``nbytes`` have room; takes them."""
        at_s = 0.0
        while self._ring.take(nbytes) is None:
            if not self._free_s:
                raise ValueError(f"a ring of {self._ring.capacity} bytes cannot hold {nbytes}")
            at_s = self._free_s.popleft()
            self._ring.free()
        return at_s

    def freed(self, at_s: float) -> None:
        """The newest place is free again at ``at_s``."""
        self._free_s.append(at_s)
