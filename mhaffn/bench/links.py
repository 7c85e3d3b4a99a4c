"""Weights on their way, by sublayer: SSD to pinned memory through our reader, and pinned memory to the GPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count

import torch

from mhaffn.bench.rounds import Measurement, repeat
from mhaffn.config import KINDS, Kind, Sublayer, order
from mhaffn.image import Image, Segment, Weights
from mhaffn.reader import Extent, PinnedArena, Reader, ReaderInfo, Request, Slot
from mhaffn.roofs import seconds
from mhaffn.simulate import CHUNK_BYTES
from mhaffn.sizes import PAGE
from mhaffn.store import Store

PLACES = 2
"""Layers that have room in host memory at once: reads of one go on while those of the other are waited for."""


class Links:
    """The links alone: one arena with room for two layers, one reader."""

    def __init__(self, store: Store, device: torch.device, arena: PinnedArena, reader: Reader) -> None:
        self.store, self.device, self.reader = store, device, reader
        self._images = {s: Image(records) for s, records in store.sublayers.items()}
        self._offsets: dict[Kind, int] = {"mha": 0, "ffn": reader.cover_bytes(self._images[Sublayer(0, "mha")].extents)}
        self._slot_bytes = layer_cover_bytes(store, reader)
        self._slots: list[Slot] = [arena.lease(self._slot_bytes, i * self._slot_bytes) for i in range(PLACES)]
        self._turn = count()

    def info(self) -> ReaderInfo:
        return self.reader.info()

    def close(self) -> None:
        for slot in self._slots:
            slot.release()

    def weights(self) -> dict[Kind, Weights]:
        """The first layer on the device, in memory of its own."""
        found: dict[Kind, Weights] = {}
        for kind in KINDS:
            image, request = self._images[Sublayer(0, kind)], self._submit(Sublayer(0, kind))
            request.wait()
            memory = torch.empty(image.nbytes, dtype=torch.uint8, device=self.device)
            self._copy(memory, image.chunks(request.placements, CHUNK_BYTES))
            found[kind] = image.views(memory)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return found

    def ssd(self) -> list[Measurement]:
        """Reads of one sublayer, one layer, and of all sublayers in a row; the last one in milliseconds a layer."""
        found = [Measurement(f"ssd.{kind}", repeat(lambda kind=kind: self._read_ms((kind,)))) for kind in KINDS]  # type: ignore[misc]
        return [
            *found,
            Measurement("ssd.layer", repeat(lambda: self._read_ms(KINDS))),
            Measurement("ssd.row", repeat(self._row_ms)),
        ]

    def h2d(self) -> list[Measurement]:
        """Copies of one sublayer and of one layer, in the stream's chunks."""
        layer = {kind: self._images[Sublayer(0, kind)] for kind in KINDS}
        sources: dict[Kind, list[Segment]] = {}
        for kind in KINDS:
            request = self._submit(Sublayer(0, kind))
            request.wait()
            sources[kind] = list(layer[kind].chunks(request.placements, CHUNK_BYTES))
        target = torch.empty(max(image.nbytes for image in layer.values()), dtype=torch.uint8, device=self.device)

        def copy(kinds: tuple[Kind, ...]) -> None:
            for kind in kinds:
                self._copy(target, sources[kind])

        def ms(kinds: tuple[Kind, ...]) -> float:
            return seconds(self.device, lambda: copy(kinds)) * 1e3

        found = [Measurement(f"h2d.{kind}", repeat(lambda kind=kind: ms((kind,)))) for kind in KINDS]  # type: ignore[misc]
        return [*found, Measurement("h2d.layer", repeat(lambda: ms(KINDS)))]

    def _copy(self, target: torch.Tensor, chunks: Iterable[Segment]) -> None:
        memory = torch.frombuffer(self._slots[0], dtype=torch.uint8)
        for chunk in chunks:
            source = memory[chunk.source : chunk.source + chunk.nbytes]
            target[chunk.target : chunk.target + chunk.nbytes].copy_(source, non_blocking=True)

    def _extents(self, sublayer: Sublayer) -> list[Extent]:
        return self._images[sublayer].extents

    def _submit(self, sublayer: Sublayer) -> Request:
        return self.reader.submit(
            self._extents(sublayer), self._slots[sublayer.layer % PLACES], self._offsets[sublayer.kind]
        )

    def _read_ms(self, kinds: tuple[Kind, ...]) -> float:
        """The next layer's sublayers as one request, nothing else in flight."""
        layer = next(self._turn) % self.store.config.num_layers
        extents = [extent for kind in kinds for extent in self._extents(Sublayer(layer, kind))]
        started = time.perf_counter()
        self.reader.submit(extents, self._slots[layer % PLACES], self._offsets[kinds[0]]).wait()
        return (time.perf_counter() - started) * 1e3

    def _row_ms(self) -> float:
        """All sublayers with the queue kept full, a layer's share of it."""
        layers = self.store.config.num_layers
        sublayers = [*order(layers)]
        ahead = PLACES * len(KINDS)
        requests: list[Request] = []
        started = time.perf_counter()
        for number, sublayer in enumerate(sublayers):
            if number >= ahead:
                requests[number - ahead].wait()
            requests.append(self._submit(sublayer))
        for request in requests:
            request.wait()
        return (time.perf_counter() - started) * 1e3 / layers


def layer_cover_bytes(store: Store, reader: Reader) -> int:
    """Bytes of host memory that a layer's reads take."""
    covers = (reader.cover_bytes(Image(store.sublayers[Sublayer(0, kind)]).extents) for kind in KINDS)
    return sum(-(-cover // PAGE) * PAGE for cover in covers)


@contextmanager
def open_links(store: Store, device: torch.device) -> Iterator[Links]:
    with Reader() as trial:
        nbytes = PLACES * layer_cover_bytes(store, trial)
    with PinnedArena(nbytes) as arena, Reader(arena=arena) as reader:
        links = Links(store, device, arena, reader)
        try:
            yield links
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            reader.close()
            links.close()
