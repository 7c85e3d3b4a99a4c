"""Where each sublayer's weights live between uses: a pure decision, made once, before any memory is taken.

Access is cyclic and known, so placement is static. Of the placements that fill the budgets, the one with the
fastest pass is taken: by the bound of its links, and, where a machine's speeds are given, by simulation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product

from mhaffn.config import KINDS, Kind, ModelConfig, Sublayer, format_bytes, order
from mhaffn.errors import BudgetError, ConfigError
from mhaffn.formats import Formats
from mhaffn.placement import TIERS, Mix, Pair, Tier, fillings, least_window, windows
from mhaffn.ring import ByteRing
from mhaffn.simulate import Links, Work, predict
from mhaffn.sizes import Sizes, Workload

__all__ = ["TIERS", "Plan", "Speeds", "Tier", "make_plan"]

HUGE_PAGE = 2 << 20
STAGING_BYTES = 64 << 20
DEPTHS = (2, 3, 4, 1)
SHORT_PREFETCH_GAIN = 1.02
"""A prefetch of 1 must be faster than longer ones by this factor: real links jitter, simulated ones do not."""
FEW_LAYERS = 8
"""Up to here one sublayer more or less matters, and so do counts and orders that are not the obvious ones."""
SIMULATED_SUBLAYERS = 8000
LOADING_BYTES = 128 << 20
LOADING_BYTES_MIN = 8 << 20
"""Host memory that what stays on a device of its own memory is loaded through: at most, and at least."""
LIBRARY_BYTES, HOST_LIBRARY_BYTES = 512 << 20, 40 << 20
"""What PyTorch and its libraries hold besides, on a GPU, and on a CPU that computes."""


def _huge_pages(nbytes: int) -> int:
    return -(-nbytes // HUGE_PAGE) * HUGE_PAGE


@dataclass(frozen=True)
class Plan:
    """The tier of every sublayer, and the memory that follows from it (bytes).

    ``copies`` says whether the device has memory of its own. ``staging_bytes`` is the ring in host memory
    that SSD reads land in; ``slot_bytes`` the ring on the device that streamed sublayers are copied into
    (0 where the device computes from host memory); ``fixed_bytes`` is what compute holds besides:
    embedding, head, KV cache, activations. ``loading_bytes`` of host memory are what all that stays on the device
    comes through; they are given back before anything else is pinned.
    """

    work: Workload
    tiers: Mapping[Sublayer, Tier]
    prefetch: int
    staging_bytes: int
    slot_bytes: int
    gpu_tier_bytes: int
    dram_tier_bytes: int
    fixed_bytes: int
    loading_bytes: int
    copies: bool

    @property
    def gpu_bytes(self) -> int:
        """All memory of its own the device gives to the plan."""
        return self.fixed_bytes + self.gpu_tier_bytes + self.slot_bytes if self.copies else 0

    @property
    def dram_bytes(self) -> int:
        """All host memory the plan uses: what is pinned, in huge pages, and what a CPU computes with."""
        resident = self.dram_tier_bytes + (0 if self.copies else self.gpu_tier_bytes)
        pinned = max(_huge_pages(self.staging_bytes) + _huge_pages(resident), self.loading_bytes)
        return pinned + (0 if self.copies else self.fixed_bytes)

    def streamed(self, tier: Tier | None = None) -> list[Sublayer]:
        """Sublayers off the device, in pass order; of one tier if given."""
        return [s for s, t in self.tiers.items() if t != "gpu" and tier in (None, t)]

    def count(self, tier: Tier) -> int:
        return sum(1 for placed in self.tiers.values() if placed == tier)

    def describe(self) -> str:
        """One line for people."""
        places = ", ".join(f"{self.count(tier)} on {tier.upper()}" for tier in TIERS if self.count(tier))
        device = f"GPU {format_bytes(self.gpu_bytes)}, " if self.copies else ""
        return (
            f"{len(self.tiers)} sublayers: {places}; prefetch {self.prefetch} ahead; "
            f"{device}host {format_bytes(self.dram_bytes)}"
        )


@dataclass(frozen=True)
class Speeds:
    """What placements are judged by: links, and passes as (how often, seconds of compute by kind)."""

    links: Links
    passes: tuple[tuple[float, Mapping[Kind, float]], ...]


TYPICAL = Speeds(Links(ssd=5e9, h2d=25e9), ((1.0, {"mha": 0.0, "ffn": 0.0}),))
"""Where nothing was measured: an NVMe disk, PCIe 4, and compute that is never the bound."""


def make_plan(
    config: ModelConfig,
    dtype: str,
    *,
    gpu: int | None = None,
    dram: int | None = None,
    copies: bool,
    work: Workload | None = None,
    tiers: Mapping[Sublayer, Tier] | None = None,
    prefetch: int | None = None,
    formats: Formats | None = None,
    stored: Mapping[Sublayer, tuple[int, ...]] | None = None,
    speeds: Speeds | None = None,
) -> Plan:
    """Decides the tiers within the budgets ``gpu`` and ``dram`` (bytes; None: everything streams from SSD).

    ``copies`` says whether the device has memory of its own, so that streamed sublayers are copied to
    it; without, there is no GPU tier, and ``gpu`` must be None. ``tiers`` fixes the placement, ``prefetch``
    the distance instead (1 where the budgets hold no longer one). ``formats`` and ``stored`` are those of
    :class:`Sizes`. With the ``speeds`` of a machine placements are simulated on it.

    Raises :class:`BudgetError`, naming the minimum, when a budget cannot hold what must be there, and
    :class:`ConfigError` where ``tiers`` are not those of all sublayers.
    """
    if prefetch is not None and prefetch < 1:
        raise ConfigError(f"got prefetch = {prefetch}, expected at least 1")
    if tiers is not None:
        _check_placed(tiers, config)
    work = work or Workload()
    sizes = Sizes(config, dtype, formats or Formats(), stored or {})
    beside = LIBRARY_BYTES if copies else HOST_LIBRARY_BYTES
    if dtype == "float32" or not copies:  # our kernels are for 16 bits on a GPU
        beside += sizes.masks(work)
    memory = _Memory(
        work=work,
        images={sublayer: sizes.image(sublayer) for sublayer in order(config.num_layers)},
        fixed=sizes.fixed(work) + beside,
        gpu=gpu if copies else None,
        dram=dram,
        copies=copies,
    )
    for depths in (DEPTHS,) if prefetch is None else ((prefetch,), (1,)):
        search = _Search(memory, sizes, depths, speeds)
        plan = search.fixed(tiers) if tiers is not None else search.best()
        if plan is not None:
            return plan
    raise memory.too_small(tiers)


def _check_placed(tiers: Mapping[Sublayer, Tier], config: ModelConfig) -> None:
    """Every sublayer of the model is placed, nothing else, and on tiers there are."""
    if not isinstance(tiers, Mapping):
        raise ConfigError(f"got tiers of type {type(tiers).__name__}, expected a mapping of sublayers to tiers")
    sublayers = list(order(config.num_layers))
    for sublayer in (*sublayers, *(key for key in tiers if key not in sublayers)):
        tier = tiers.get(sublayer, "none")
        if tier not in TIERS or sublayer not in sublayers:
            raise ConfigError(
                f"got tier {tier!r} for {sublayer}, expected {', '.join(TIERS)} for each of the {len(sublayers)} "
                f"sublayers of {config.num_layers} layers, and no others"
            )


@dataclass(frozen=True)
class _Memory:
    """The sublayers' sizes, and the budgets that plans of them must keep to."""

    work: Workload
    images: Mapping[Sublayer, int]
    fixed: int
    gpu: int | None
    dram: int | None
    copies: bool

    def by_kind(self) -> list[tuple[Pair, int]]:
        """What to count with as the size of an MHA and of an FFN, and bytes to leave free for its being wrong.

        Where layers differ, that is their mean, with room for some that are larger, and then the largest.
        """
        sizes = [[nbytes for s, nbytes in self.images.items() if s.kind == kind] for kind in KINDS]
        mean = -(-sum(sizes[0]) // len(sizes[0])), -(-sum(sizes[1]) // len(sizes[1]))
        most = max(sizes[0]), max(sizes[1])
        return [(most, 0)] if mean == most else [(mean, 2 * (sum(most) - sum(mean))), (most, 0)]

    def plan(self, tiers: Mapping[Sublayer, Tier], depth: int) -> Plan:
        on = {tier: [nbytes for s, nbytes in self.images.items() if tiers[s] == tier] for tier in TIERS}
        streamed = [nbytes for s, nbytes in self.images.items() if tiers[s] != "gpu"]
        return Plan(
            work=self.work,
            tiers={s: tiers[s] for s in self.images},
            prefetch=depth,
            staging_bytes=_ring_bytes(tuple(on["ssd"]), depth),
            slot_bytes=_ring_bytes(tuple(streamed), depth) if self.copies else 0,
            gpu_tier_bytes=sum(on["gpu"]),
            dram_tier_bytes=sum(on["dram"]),
            fixed_bytes=self.fixed,
            loading_bytes=self.loading(),
            copies=self.copies,
        )

    def budget(self, tier: Tier) -> int | None:
        """Bytes that sublayers may stay in; None where none may."""
        return {"gpu": self.gpu, "dram": self.dram, "ssd": None}[tier]

    def loading(self) -> int:
        """Host memory to load the device's through: as much as the budget has, in whole huge pages."""
        if not self.copies:
            return 0
        room = LOADING_BYTES if self.dram is None else self.dram // HUGE_PAGE * HUGE_PAGE
        return min(max(room, LOADING_BYTES_MIN), LOADING_BYTES)

    def holds(self, plan: Plan) -> bool:
        return (self.gpu is None or plan.gpu_bytes <= self.gpu) and (self.dram is None or plan.dram_bytes <= self.dram)

    def whole_kinds(self) -> Iterator[Mapping[Sublayer, Tier]]:
        """Placements with all sublayers of a kind on one tier that there is."""
        there = [tier for tier in TIERS if tier == "ssd" or self.budget(tier) is not None]
        for mha, ffn in product(there, repeat=2):
            yield {s: mha if s.kind == "mha" else ffn for s in self.images}

    def too_small(self, tiers: Mapping[Sublayer, Tier] | None) -> BudgetError:
        """The error for budgets that hold no plan; what they must hold is the least of a prefetch of 1."""
        placements = self.whole_kinds() if tiers is None else [tiers]
        plans = [self.plan(placed, 1) for placed in placements]
        fitting = [plan for plan in plans if self.gpu is None or plan.gpu_bytes <= self.gpu]
        if not fitting:
            return _too_small("--gpu", self.gpu or 0, min(plan.gpu_bytes for plan in plans))
        return _too_small("--dram", self.dram or 0, min(plan.dram_bytes for plan in fitting))

    def mixes(self, depth: int) -> set[Mix]:
        """Counts by kind that fill the budgets beside rings for ``depth``; whether they really fit, plans say."""
        layers = len(self.images) // 2
        none, every = (0, 0), (layers, layers)
        found = {Mix(layers, none, none)}  # with those of everything in one place: a mean may hide that they fit
        if self.dram is not None:
            found.add(Mix(layers, none, every))
        if self.gpu is not None:
            found.add(Mix(layers, every, none))
        for sizes, spare in self.by_kind():
            on_gpu = {none}
            if self.copies:
                on_gpu = self._fillings(every, sizes, self.gpu, self.fixed + spare, depth, 1)
            for gpu in on_gpu:
                left, fixed = (layers - gpu[0], layers - gpu[1]), spare + (0 if self.copies else self.fixed)
                fillings = self._fillings(left, sizes, self.dram, fixed, depth, HUGE_PAGE)
                found |= {Mix(layers, gpu, dram) for dram in fillings}
        return found

    def _fillings(self, most: Pair, sizes: Pair, budget: int | None, fixed: int, depth: int, grain: int) -> set[Pair]:
        """Counts, up to ``most``, that fill ``budget`` beside ``fixed`` and a ring for those left over."""
        found = {(0, 0)}
        if budget is None:
            return found
        mha, ffn = sizes
        everything = most[0] * mha + most[1] * ffn
        room = (budget - fixed) // grain * grain
        if everything <= room:
            return {most}
        for full in ((0, 0), (most[0], 0), (0, most[1])):  # a kind that is wholly resident needs no room in the ring
            left = most[0] - full[0], most[1] - full[1]
            for window in windows(left, depth, sizes):
                ring = min(STAGING_BYTES, everything + ffn) if depth > 1 and window <= STAGING_BYTES else window
                rest = room - -(-ring // grain) * grain - full[0] * mha - full[1] * ffn
                found |= {(full[0] + m, full[1] + f) for m, f in fillings(rest, left, sizes)}
        if len(self.images) <= 2 * FEW_LAYERS:  # one less may let a ring fit that depends on what is left over
            found |= {(max(m - 1, 0), f) for m, f in found} | {(m, max(f - 1, 0)) for m, f in found}
        return {
            (m, f)
            for m, f in found
            if least_window((most[0] - m, most[1] - f), depth, sizes) <= room - -(-(m * mha + f * ffn) // grain) * grain
        }


class _Search:
    """The fastest plan that memory holds, among those of some prefetch distances."""

    def __init__(self, memory: _Memory, sizes: Sizes, depths: tuple[int, ...], speeds: Speeds | None) -> None:
        self.memory, self.depths, self.simulated = memory, depths, speeds is not None
        self.speeds = speeds or TYPICAL
        self.weights = {sublayer: sizes.weights(sublayer) for sublayer in memory.images}
        self.least = [min(n for s, n in self.weights.items() if s.kind == kind) for kind in KINDS]
        self.tries = max(1, SIMULATED_SUBLAYERS // len(memory.images))

    def fixed(self, tiers: Mapping[Sublayer, Tier]) -> Plan | None:
        """The plan of a placement by hand; None where none fits."""
        plans = [plan for depth in self.depths if self.memory.holds(plan := self.memory.plan(tiers, depth))]
        return min(plans, key=self.seconds, default=None) if self.simulated else next(iter(plans), None)

    def best(self) -> Plan | None:
        """Tries counts in the order of their bounds, until no bound is below the best pass; None if none fits."""
        mixes = [(mix, depth) for depth in self.depths for mix in self.memory.mixes(depth)]
        ranked = sorted(((*self.rank(mix, depth), mix, depth) for mix, depth in mixes), key=lambda item: item[:3])
        best, best_s = None, float("inf")
        for bound_s, _, _, mix, depth in ranked:
            if bound_s >= best_s * 0.9995 or self.tries <= 0:
                break
            for plan in self.orders(mix, depth):
                if not self.simulated:
                    return self.improved(plan)
                plan_s = self.seconds(plan)
                if plan_s < best_s * 0.9995:
                    best, best_s = plan, plan_s
                if best_s <= bound_s * 1.0005:
                    break
        return self.improved(best)

    def improved(self, plan: Plan | None) -> Plan | None:
        """``plan`` with sublayers moved to faster tiers one by one, while the pass's bound falls.

        Counts go by the mean of a kind: where sizes differ, or what streams is small, they leave room. Where there is
        no plan, or there are few sublayers, it begins with each whole kind on one tier too.
        """
        starts = [] if plan is None else [plan]
        if plan is None or len(plan.tiers) <= 2 * FEW_LAYERS:
            plans = (self.memory.plan(tiers, depth) for tiers in self.memory.whole_kinds() for depth in self.depths)
            starts += filter(self.memory.holds, plans)
        ends = [self.climbed(start) for start in starts]
        if not self.simulated:
            return min(ends, key=self.cost, default=None)
        return min([*starts, *ends], key=self.seconds, default=None)  # a lower bound may be harder to reach

    def climbed(self, plan: Plan) -> Plan:
        while True:
            moved = [
                candidate
                for tiers in self.moves(plan.tiers)
                for depth in {plan.prefetch, 1} & set(self.depths)
                if self.memory.holds(candidate := self.memory.plan(tiers, depth))
            ]
            best = min(moved, key=self.cost, default=plan)
            if self.cost(best) >= self.cost(plan):
                return plan
            plan = best

    def moves(self, tiers: Mapping[Sublayer, Tier]) -> Iterator[Mapping[Sublayer, Tier]]:
        """Placements with one sublayer of each size on a faster tier: of those alike, the one in the middle."""
        alike: dict[tuple[Tier, int], list[Sublayer]] = {}
        for sublayer, tier in tiers.items():
            alike.setdefault((tier, self.memory.images[sublayer]), []).append(sublayer)
        for (tier, _), found in alike.items():
            for faster in TIERS[: TIERS.index(tier)]:
                if self.memory.budget(faster) is not None:
                    yield {**tiers, found[len(found) // 2]: faster}

    def cost(self, plan: Plan) -> tuple[float, float]:
        """The bound of its passes, and the seconds in which it moves what they need."""
        ssd, off_gpu = (sum(self.weights[s] for s in plan.streamed(tier)) for tier in ("ssd", None))
        return self.bound(ssd, off_gpu, plan.prefetch)

    def bound(self, ssd: int, off_gpu: int, depth: int) -> tuple[float, float]:
        """Seconds of the slowest link in the passes that count, and of the links that move so many bytes a pass."""
        ssd_s, h2d_s = ssd / self.speeds.links.ssd, off_gpu / (self.speeds.links.h2d or math.inf)
        layers = len(self.weights) // 2
        bound_s = sum(
            often * max(ssd_s, h2d_s, layers * sum(compute_s.values())) for often, compute_s in self.speeds.passes
        )
        return bound_s * (SHORT_PREFETCH_GAIN if depth == 1 else 1.0), ssd_s + h2d_s

    def orders(self, mix: Mix, depth: int) -> Iterator[Plan]:
        """Plans of these counts that memory holds: rings depend on the order too, where there are few sublayers."""
        for turn in range(mix.layers if mix.layers <= FEW_LAYERS else 1):
            for shift in (0.5, 0.0):
                if self.memory.holds(plan := self.memory.plan(mix.spread(shift, turn), depth)):
                    yield plan

    def seconds(self, plan: Plan) -> float:
        """Seconds of the passes that count, by simulation."""
        self.tries -= 1
        total = 0.0
        for often, compute_s in self.speeds.passes:
            work = {s: Work(nbytes, compute_s[s.kind]) for s, nbytes in self.weights.items()}
            total += often * predict(plan, work, self.speeds.links).seconds
        return total * (SHORT_PREFETCH_GAIN if plan.prefetch == 1 else 1.0)

    def rank(self, mix: Mix, depth: int) -> tuple[float, float, int]:
        """What no plan of these counts is faster than, and what else to prefer: less to move, a usual distance."""
        ssd, off_gpu = (
            sum(count * n for count, n in zip(counts, self.least, strict=True)) for counts in (mix.ssd, mix.off_gpu)
        )
        return *self.bound(ssd, off_gpu, depth), self.depths.index(depth)


@lru_cache(4096)
def _ring_bytes(cycle: tuple[int, ...], depth: int) -> int:
    """The least ring in which the sublayer in use and ``depth`` more always fit, wherever the cycle stands.

    Small models get at least :data:`STAGING_BYTES` when they prefetch, so that the SSD sees a deep queue.
    """
    if not cycle:
        return 0
    runs = [_runs(cycle, length) for length in range(depth + 1, depth + 4)]
    window = max(runs[0])
    always = window + max(cycle)  # the end of the ring, where the next image may not fit, costs one image at most
    if depth > 1 and always <= STAGING_BYTES:
        return max(always, min(STAGING_BYTES, sum(cycle) + max(cycle)))
    candidates = sorted({total for lengths in runs for total in lengths if window <= total < always})
    return next((total for total in candidates if _holds(total, cycle, depth)), always)


def _runs(cycle: tuple[int, ...], length: int) -> list[int]:
    """Bytes of ``length`` images in a row, from each one of the cycle on."""
    turns = 1 + -(-length // len(cycle))
    until = list(accumulate(cycle * turns, initial=0))
    return [until[i + length] - until[i] for i in range(len(cycle))]


def _holds(capacity: int, cycle: tuple[int, ...], depth: int) -> bool:
    """Whether ``depth`` + 1 images always fit as the cycle turns, until it stands as it once stood."""
    ring, held, stood = ByteRing(capacity), deque[int](maxlen=depth + 1), set[tuple[int, ...]]()
    while (stands := tuple(held)) not in stood:
        stood.add(stands)
        for nbytes in cycle:
            if len(held) > depth:
                ring.free()
            offset = ring.take(nbytes)
            if offset is None:
                return False
            held.append(offset)
    return True


def _too_small(option: str, budget: int, least: int) -> BudgetError:
    return BudgetError(
        f"{option} {format_bytes(budget)} is too small: this model needs at least {format_bytes(max(least, 1))} "
        f"there ({least} bytes). Raise it, or ask for a shorter context or a smaller batch."
    )
