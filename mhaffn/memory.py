"""What stays in memory between passes: embedding, norm and head, and the GPU and DRAM tiers of a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
import xxhash

from mhaffn.config import Sublayer
from mhaffn.device import CudaDevice, HostDevice
from mhaffn.errors import ReadError
from mhaffn.image import Image, Weights, as_buffer, check_digest, extent_of, view
from mhaffn.plan import Plan
from mhaffn.reader import Extent, PinnedArena, Reader, Request, Slot
from mhaffn.sizes import PAGE
from mhaffn.store import Store
from mhaffn.store.safetensors import TensorInfo

PIECES = 4


@dataclass
class Residents:
    """Weights that are not streamed.

    ``tensors`` holds embedding, norm and head on the device; ``weights`` the sublayers that compute can
    read where they are; ``host_images`` those in pinned memory that must be copied to the device first.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[Sublayer, Weights] = field(default_factory=dict)
    host_images: dict[Sublayer, tuple[torch.Tensor, tuple[int, ...]]] = field(default_factory=dict)
    arenas: list[PinnedArena] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def close(self) -> None:
        """Frees everything; views of it must not be used afterwards."""
        for group in (self.tensors, self.weights, self.host_images):
            group.clear()
        for slot in self.slots:
            slot.release()
        for arena in self.arenas:
            arena.close()
        self.slots.clear()
        self.arenas.clear()


def load_residents(
    store: Store,
    plan: Plan,
    images: dict[Sublayer, Image],
    *,
    device: HostDevice | CudaDevice,
    reader: Reader,
    verify: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Residents:
    """Reads what ``plan`` keeps in memory; ``progress`` gets bytes done and bytes in all."""
    on_device = [images[s] for s, tier in plan.tiers.items() if tier == "gpu"]
    on_host = [images[s] for s, tier in plan.tiers.items() if tier == "dram"]
    count = _Counter(progress, _bytes_of(store, on_device + on_host))
    residents = Residents()
    try:
        if device.copies:
            with PinnedArena(plan.loading_bytes) as arena:
                _load_to_device(store, on_device, residents, device, reader, arena, verify, count)
            _load_to_host(on_host, [], residents, reader, verify, count)
        else:
            tensors = _in_file_order(store)
            _load_to_host(on_host + on_device, tensors, residents, reader, verify, count)
            digest = xxhash.xxh3_64()
            for name, _ in tensors if verify else ():
                digest.update(as_buffer(residents.tensors[name].view(torch.uint8).reshape(-1)))
            _check_resident(store, digest.hexdigest(), verify)
            residents.weights = {
                sublayer: images[sublayer].views(memory, placements)
                for sublayer, (memory, placements) in residents.host_images.items()
            }
            residents.host_images.clear()
    except BaseException:
        residents.close()
        raise
    return residents


def _in_file_order(store: Store) -> list[tuple[str, TensorInfo]]:
    return sorted(store.resident.items(), key=lambda item: (item[1].path, item[1].offset))


def _check_resident(store: Store, digest: str, verify: bool) -> None:
    if verify and store.resident_checksum is not None:
        path = next(iter(store.resident.values())).path
        check_digest("the resident part", path, digest, store.resident_checksum)


class _Counter:
    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


def _bytes_of(store: Store, images: list[Image]) -> int:
    return sum(tensor.nbytes for tensor in store.resident.values()) + sum(i.records.nbytes for i in images)


def _load_to_host(
    images: list[Image],
    tensors: list[tuple[str, TensorInfo]],
    residents: Residents,
    reader: Reader,
    verify: bool,
    count: _Counter,
) -> None:
    """Reads into one arena, each sublayer (and tensor) in place, a few at a time."""
    jobs: list[list[Extent]] = [image.extents for image in images] + [[extent_of(t)] for _, t in tensors]
    if not jobs:
        return
    arena = PinnedArena(sum(_pages(reader.cover_bytes(job)) for job in jobs))
    residents.arenas.append(arena)
    for number, (slot, request) in enumerate(_in_turn(reader, arena, jobs)):
        residents.slots.append(slot)
        memory = torch.frombuffer(slot, dtype=torch.uint8)
        if number < len(images):
            image = images[number]
            if verify:
                image.check(_hash(memory, image.records.tensors, request.placements))
            image.check_scales(memory, request.placements)
            residents.host_images[image.records.sublayer] = memory, request.placements
        else:
            name, tensor = tensors[number - len(images)]
            residents.tensors[name] = view(memory, request.placements[0], tensor)
        count.add(request.nbytes)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _in_turn(reader: Reader, arena: PinnedArena, jobs: list[list[Extent]]) -> Iterator[tuple[Slot, Request]]:
    """Each job's slot and finished request, in order, with a few reads in flight."""
    flight: deque[tuple[Slot, Request]] = deque()
    try:
        for job in jobs:
            slot = arena.lease(_pages(reader.cover_bytes(job)))
            flight.append((slot, reader.submit(job, slot)))
            if len(flight) == PIECES:
                flight[0][1].wait()
                yield flight.popleft()
        while flight:
            flight[0][1].wait()
            yield flight.popleft()
    finally:
        for slot, request in flight:
            request.cancel()
            with suppress(ReadError):
                request.wait()
            slot.release()


def _hash(memory: torch.Tensor, tensors: Iterable[TensorInfo], placements: Iterable[int]) -> str:
    digest = xxhash.xxh3_64()
    for tensor, offset in zip(tensors, placements, strict=True):
        digest.update(as_buffer(memory[offset : offset + tensor.nbytes]))
    return digest.hexdigest()


def _load_to_device(
    store: Store,
    images: list[Image],
    residents: Residents,
    device: HostDevice | CudaDevice,
    reader: Reader,
    arena: PinnedArena,
    verify: bool,
    count: _Counter,
) -> None:
    """Reads piece by piece into ``arena`` and copies to tensors on the device."""
    digest = xxhash.xxh3_64()
    for name, tensor in _in_file_order(store):
        target = torch.empty(tensor.nbytes, dtype=torch.uint8, device=device.torch_device)
        for piece in _pieces(reader, arena, tensor, target, count):
            if verify:
                digest.update(as_buffer(piece))
        residents.tensors[name] = view(target, 0, tensor)
    _check_resident(store, digest.hexdigest(), verify)
    # One piece of memory: of many, the allocator would round each up by as much as 2 MiB.
    place = torch.empty(sum(image.nbytes for image in images), dtype=torch.uint8, device=device.torch_device)
    for image, memory in zip(images, place.split([image.nbytes for image in images]), strict=True):
        digest = xxhash.xxh3_64()
        for tensor, offset in zip(image.records.tensors, image.offsets, strict=True):
            for piece in _pieces(reader, arena, tensor, memory[offset : offset + tensor.nbytes], count):
                if verify:
                    digest.update(as_buffer(piece))
        if verify:
            image.check(digest.hexdigest())
        image.check_scales(memory)
        residents.weights[image.records.sublayer] = image.views(memory)


def _pieces(
    reader: Reader, arena: PinnedArena, tensor: TensorInfo, target: torch.Tensor, count: _Counter
) -> Iterator[torch.Tensor]:
    most = arena.nbytes // PIECES // PAGE * PAGE - 2 * PAGE  # with the pages that its ends lie in
    starts = range(0, tensor.nbytes, most)
    jobs = [[Extent(tensor.path, tensor.offset + s, min(most, tensor.nbytes - s))] for s in starts]
    for start, (slot, request) in zip(starts, _in_turn(reader, arena, jobs), strict=True):
        with slot:
            offset = request.placements[0]
            piece = torch.frombuffer(slot, dtype=torch.uint8)[offset : offset + request.nbytes]
            target[start : start + request.nbytes].copy_(piece)
            yield piece
        count.add(request.nbytes)
