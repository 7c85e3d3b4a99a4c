"""Which sublayers may lie where: how many of each kind a budget holds, and their places in the pass.

Sublayers of one kind are all of one size, so a placement is first a count by kind and tier, a knapsack of
two sizes, and then an order: what stays on SSD is spread evenly over the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mhaffn.config import KINDS, Sublayer, order

Tier = Literal["gpu", "dram", "ssd"]
TIERS: tuple[Tier, ...] = ("gpu", "dram", "ssd")
Pair = tuple[int, int]
"""One number for each kind: MHA, FFN."""


@dataclass(frozen=True)
class Mix:
    """How many sublayers of each kind lie on the GPU and in DRAM, of ``layers`` each; the rest is on SSD."""

    layers: int
    gpu: Pair
    dram: Pair

    @property
    def off_gpu(self) -> Pair:
        return self.layers - self.gpu[0], self.layers - self.gpu[1]

    @property
    def ssd(self) -> Pair:
        return self.off_gpu[0] - self.dram[0], self.off_gpu[1] - self.dram[1]

    def spread(self, shift: float = 0.5, turn: int = 0) -> dict[Sublayer, Tier]:
        """The tier of each sublayer, in pass order, every tier spread evenly over each kind.

        ``shift`` sets FFNs on a tier back against MHAs there, in parts of all layers; ``turn`` is the layer
        that the pattern begins with.
        """
        tiers: dict[Sublayer, Tier] = {}
        for kind, dram, ssd, start in zip(KINDS, self.dram, self.ssd, (0.0, shift), strict=True):
            resident = 0  # layers not on SSD so far
            for step in range(self.layers):
                sublayer = Sublayer((step + turn) % self.layers, kind)
                if _chosen(step, ssd, self.layers, start):
                    tiers[sublayer] = "ssd"
                    continue
                tiers[sublayer] = "dram" if _chosen(resident, dram, self.layers - ssd, start) else "gpu"
                resident += 1
        return {sublayer: tiers[sublayer] for sublayer in order(self.layers)}


def _chosen(index: int, places: int, total: int, start: float) -> bool:
    """Whether ``index`` is one of ``places`` spread evenly over ``total``."""
    return (index * places + int(start * total)) % total < places if total else False


def fillings(room: int, most: Pair, nbytes: Pair) -> set[Pair]:
    """Counts by kind, up to ``most``, that fill ``room`` bytes: the fullest, the most of either kind, one between."""
    if room < 0:
        return set()
    found = [
        (min(most[0], (room - ffn * nbytes[1]) // nbytes[0]), ffn) for ffn in range(min(most[1], room // nbytes[1]) + 1)
    ]
    fullest = sorted(found, key=lambda pair: pair[0] * nbytes[0] + pair[1] * nbytes[1], reverse=True)
    return {*fullest[:3], found[0], found[len(found) // 2], found[-1]}


def least_window(streamed: Pair, depth: int, nbytes: Pair) -> int:
    """Bytes of ``depth`` + 1 sublayers in a row that no order of the ``streamed`` ones avoids: the mean, rounded up."""
    mha, ffn = streamed
    if not mha and not ffn:
        return 0
    ffns = -(-(depth + 1) * ffn // (mha + ffn))
    return ffns * nbytes[1] + (depth + 1 - ffns) * nbytes[0]


def windows(streamed: Pair, depth: int, nbytes: Pair) -> Iterator[int]:
    """Bytes that a ring for ``depth`` sublayers ahead may need: so many in a row, and up to two more."""
    for length in range(depth + 1, depth + 4):
        for ffns in range(length + 1):
            if (ffns == 0 or streamed[1]) and (ffns == length or streamed[0]):
                yield ffns * nbytes[1] + (length - ffns) * nbytes[0]
