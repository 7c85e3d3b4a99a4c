"""Where each sublayer's weights live between uses: a pure decision, made once, before any memory is taken.

Access is cyclic and known, so placement is static. The GPU's budget is filled first, then DRAM's, and what
is left stays on SSD, spread evenly over the pass so that the SSD never idles while others compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mhaffn.config import Kind, ModelConfig, Sublayer, format_bytes, order
from mhaffn.errors import BudgetError, ConfigError
from mhaffn.ring import ByteRing

Tier = Literal["gpu", "dram", "ssd"]
TIERS: tuple[Tier, ...] = ("gpu", "dram", "ssd")
PAGE = 4096
HUGE_PAGE = 2 << 20
DEVICE_ALIGN = 256
STAGING_BYTES = 64 << 20
PREFETCH = 2
LIBRARY_BYTES = 512 << 20
CHUNK_TOKENS = 4096
"""Positions a sublayer works on at once: a longer prompt goes through its weights in several steps."""
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def _huge_pages(nbytes: int) -> int:
    return -(-nbytes // HUGE_PAGE) * HUGE_PAGE


@dataclass(frozen=True)
class Workload:
    """What a run must have room for: ``batch`` sequences, each of ``tokens`` a pass and ``context`` in all at most."""

    tokens: int = 2048
    context: int = 4096
    batch: int = 1


@dataclass(frozen=True)
class Plan:
    """The tier of every sublayer, and the memory that follows from it (bytes).

    ``copies`` says whether the device has memory of its own. ``staging_bytes`` is the ring in host memory
    that SSD reads land in; ``slot_bytes`` the ring on the device that streamed sublayers are copied into
    (0 where the device computes from host memory); ``fixed_bytes`` is what compute holds besides:
    embedding, head, KV cache, activations.
    """

    tiers: Mapping[Sublayer, Tier]
    prefetch: int
    staging_bytes: int
    slot_bytes: int
    gpu_tier_bytes: int
    dram_tier_bytes: int
    fixed_bytes: int
    copies: bool

    @property
    def gpu_bytes(self) -> int:
        """All memory of its own the device gives to the plan."""
        return self.fixed_bytes + self.gpu_tier_bytes + self.slot_bytes if self.copies else 0

    @property
    def dram_bytes(self) -> int:
        """All host memory the plan uses: what is pinned, in huge pages, and what a CPU computes with."""
        pinned = _huge_pages(self.staging_bytes) + _huge_pages(self.dram_tier_bytes)
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
class Sizes:
    """Bytes of each sublayer: its weights alone, and at most what they take as an image in memory.

    ``bits`` gives the bits a matrix element takes, scales included, by kind; by default those of ``dtype``.
    """

    config: ModelConfig
    dtype: str
    bits: Mapping[Kind, float] = field(default_factory=dict)

    def weights(self, sublayer: Sublayer) -> int:
        return sum(self._tensors(sublayer))

    def image(self, sublayer: Sublayer) -> int:
        """An upper bound of host and device images: every tensor by its aligned cover."""
        return sum(nbytes // PAGE * PAGE + 2 * PAGE for nbytes in self._tensors(sublayer))

    def resident(self) -> int:
        return sum(self._nbytes(shape) for shape in self.config.resident_shapes().values())

    def kv_cache(self, work: Workload) -> int:
        c = self.config
        per_position = 2 * c.num_kv_heads * c.head_dim * ITEMSIZE[self.dtype]
        return work.batch * work.context * c.num_layers * per_position

    def activations(self, work: Workload) -> int:
        """A bound of what one pass holds at once: hidden states of all tokens, q/k/v, gate and up of a step, logits."""
        c = self.config
        step = 3 * c.hidden_size + 3 * c.intermediate_size + 4 * c.num_heads * c.head_dim
        elements = work.tokens * 4 * c.hidden_size + min(work.tokens, CHUNK_TOKENS) * step
        return work.batch * (elements * ITEMSIZE[self.dtype] + c.vocab_size * 4 * 4)

    def fixed(self, work: Workload) -> int:
        """What every plan holds besides sublayers: embedding, norm, head, KV cache, activations."""
        return self.resident() + self.kv_cache(work) + self.activations(work)

    def _tensors(self, sublayer: Sublayer) -> list[int]:
        share = self.bits.get(sublayer.kind, 8 * ITEMSIZE[self.dtype]) / (8 * ITEMSIZE[self.dtype])
        shapes = self.config.sublayer_shapes(sublayer.kind).values()
        return [round(self._nbytes(shape) * (share if len(shape) > 1 else 1)) for shape in shapes]

    def _nbytes(self, shape: Iterable[int]) -> int:
        nbytes = ITEMSIZE[self.dtype]
        for n in shape:
            nbytes *= n
        return nbytes


def make_plan(
    config: ModelConfig,
    dtype: str,
    *,
    gpu: int | None = None,
    dram: int | None = None,
    copies: bool,
    work: Workload | None = None,
    tiers: Mapping[Sublayer, Tier] | None = None,
    prefetch: int = PREFETCH,
    bits: Mapping[Kind, float] | None = None,
) -> Plan:
    """Decides the tiers within the budgets ``gpu`` and ``dram`` (bytes; None: everything streams from SSD).

    ``copies`` says whether the device has memory of its own, so that streamed sublayers are copied to
    it; without, there is no GPU tier, and ``gpu`` must be None. ``tiers`` fixes the placement instead.
    ``bits`` is that of :class:`Sizes`.

    Raises :class:`BudgetError`, naming the minimum, when a budget cannot hold what must be there.
    """
    if prefetch < 1:
        raise ConfigError(f"got prefetch = {prefetch}, expected at least 1")
    work = work or Workload()
    sizes = Sizes(config, dtype, bits or {})
    images = {sublayer: sizes.image(sublayer) for sublayer in order(config.num_layers)}
    fixed = sizes.fixed(work) + (LIBRARY_BYTES if copies else 0)
    if not copies:
        gpu = None
    for depth in sorted({prefetch, 1}, reverse=True):  # a shorter prefetch where budgets hold no longer one
        plan = _fit(images, gpu, dram, fixed, depth, copies, tiers)
        if (gpu is None or plan.gpu_bytes <= gpu) and (dram is None or plan.dram_bytes <= dram):
            return plan
    by_hand = tiers is not None
    least = _huge_pages(plan.staging_bytes) + (0 if copies else fixed)
    _check("--gpu", gpu, plan.gpu_bytes, plan.gpu_bytes if by_hand else fixed + plan.slot_bytes)
    _check("--dram", dram, plan.dram_bytes, plan.dram_bytes if by_hand else least)
    return plan


def _fit(
    images: Mapping[Sublayer, int],
    gpu: int | None,
    dram: int | None,
    fixed: int,
    depth: int,
    copies: bool,
    tiers: Mapping[Sublayer, Tier] | None,
) -> Plan:
    """The plan with rings for ``depth``. Rings depend on what streams, and what fits on the rings: so again
    with larger reserves until they do."""
    staging = slots = _ring_bytes(list(images.values()), depth)
    while True:
        placed = dict(tiers) if tiers is not None else _place(images, gpu, dram, fixed, staging, slots, copies)
        on = {tier: [nbytes for s, nbytes in images.items() if placed[s] == tier] for tier in TIERS}
        streamed = [nbytes for s, nbytes in images.items() if placed[s] != "gpu"]
        plan = Plan(
            tiers={s: placed[s] for s in images},
            prefetch=depth,
            staging_bytes=_ring_bytes(on["ssd"], depth),
            slot_bytes=_ring_bytes(streamed, depth) if copies else 0,
            gpu_tier_bytes=sum(on["gpu"]),
            dram_tier_bytes=sum(on["dram"]),
            fixed_bytes=fixed,
            copies=copies,
        )
        if plan.staging_bytes <= staging and plan.slot_bytes <= slots:
            return plan
        staging, slots = max(staging, plan.staging_bytes), max(slots, plan.slot_bytes)


def _place(
    images: Mapping[Sublayer, int], gpu: int | None, dram: int | None, fixed: int, ring: int, slots: int, copies: bool
) -> dict[Sublayer, Tier]:
    everything = sum(images.values())
    gpu_room = (gpu or 0) - fixed if copies else 0
    if gpu_room < everything:
        gpu_room -= slots
    placed: dict[Sublayer, Tier] = {}
    spread = _spread(list(images))
    for sublayer in spread:
        if images[sublayer] <= gpu_room:
            placed[sublayer], gpu_room = "gpu", gpu_room - images[sublayer]
    rest = [sublayer for sublayer in spread if sublayer not in placed]
    dram_room = (dram or 0) - (0 if copies else fixed)
    if _huge_pages(sum(images[sublayer] for sublayer in rest)) > dram_room:
        dram_room = (dram_room - _huge_pages(ring)) // HUGE_PAGE * HUGE_PAGE
    for sublayer in rest:
        if images[sublayer] <= dram_room:
            placed[sublayer], dram_room = "dram", dram_room - images[sublayer]
        else:
            placed[sublayer] = "ssd"
    return placed


def _spread(sublayers: list[Sublayer]) -> list[Sublayer]:
    """The sublayers in golden-ratio order: every prefix, and what it leaves, is spread over the pass."""
    golden = (5**0.5 - 1) / 2
    return sorted(sublayers, key=lambda s: sublayers.index(s) * golden % 1.0)


def _ring_bytes(cycle: list[int], depth: int) -> int:
    """The least ring in which the sublayer in use and ``depth`` more always fit, wherever the cycle stands.

    Small models get at least :data:`STAGING_BYTES` when they prefetch, so that the SSD sees a deep queue.
    """
    if not cycle:
        return 0
    runs = [[sum(_repeated(cycle, i, length)) for i in range(len(cycle))] for length in range(depth + 1, depth + 4)]
    window = max(runs[0])
    always = window + max(cycle)  # the end of the ring, where the next image may not fit, costs one image at most
    if depth > 1 and always <= STAGING_BYTES:
        return max(always, min(STAGING_BYTES, sum(cycle) + max(cycle)))
    candidates = sorted({total for lengths in runs for total in lengths if window <= total < always})
    return next((total for total in candidates if _holds(total, cycle, depth)), always)


def _repeated(cycle: list[int], start: int, length: int) -> Iterable[int]:
    return (cycle[(start + j) % len(cycle)] for j in range(length))


def _holds(capacity: int, cycle: list[int], depth: int) -> bool:
    """Whether ``depth`` + 1 images always fit as the cycle turns, until it stands as it once stood."""
    ring, held, starts = ByteRing(capacity), 0, Counter[int]()
    while True:
        for number, nbytes in enumerate(cycle):
            if held > depth:
                ring.free()
                held -= 1
            offset = ring.take(nbytes)
            if offset is None:
                return False
            held += 1
            if number == 0:  # where a turn starts decides all its places
                starts[offset] += 1
                if starts[offset] > depth + 2:
                    return True


def _check(option: str, budget: int | None, need: int, least: int) -> None:
    if budget is not None and need > budget:
        raise BudgetError(
            f"{option} {format_bytes(budget)} is too small: this model needs at least {format_bytes(max(least, 1))} "
            f"there ({least} bytes). Raise it, or ask for a shorter context or a smaller batch."
        )
