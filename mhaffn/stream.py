"""Executes a plan: weights of each sublayer on the device, in the order every pass visits them.

Two rings of bytes carry the sublayers that are not resident. Reads land in *staging* (pinned host
memory); where the device has memory of its own, each sublayer is copied into *slots* on the device: by a
mover thread, chunk by chunk as its bytes arrive; or, where it waits in DRAM and is next, by the computing
thread, once that has made room. Both rings are first in, first out, because access is cyclic:
a sublayer's place is free again once it was released. The cycle runs through the pass boundary, so
while the head computes, the first sublayers of the next pass are already on their way. Checksums are
made beside that.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mhaffn.checksums import Checksum, Checksums
from mhaffn.config import Sublayer
from mhaffn.device import CudaDevice, Event, HostDevice
from mhaffn.errors import MhaffnError, StreamError
from mhaffn.image import Image, Segment, Weights
from mhaffn.plan import Plan
from mhaffn.ring import ByteRing
from mhaffn.simulate import CHUNK_BYTES
from mhaffn.trace import Check, Trace

if TYPE_CHECKING:
    from mhaffn.memory import Residents
    from mhaffn.reader import PinnedArena, Reader, Request, Slot

STOP_S = 30.0


@dataclass
class _Read:
    """A sublayer on its way from SSD into staging; one that is not checked has no checksum."""

    sublayer: Sublayer
    slot: Slot
    request: Request
    checksum: Checksum | None = None


@dataclass
class _Arrival:
    """A sublayer that is, or by ``event`` will be, where compute can read it."""

    sublayer: Sublayer
    weights: Weights
    event: Event | None = None
    read: _Read | None = None
    slot: tuple[int, int] | None = None


class Stream:
    """Weights on the device, sublayer after sublayer, by a plan.

    One pass at a time uses a stream. :meth:`weights` gives views that are valid on the current CUDA
    stream inside the ``with`` block; out of order, or after a pass that came to nothing streamed, it
    starts again at the sublayer asked for. An error of the reader or a damaged checksum ends the
    stream: each later call raises it again.
    """

    def __init__(
        self,
        plan: Plan,
        images: dict[Sublayer, Image],
        residents: Residents,
        *,
        device: HostDevice | CudaDevice,
        reader: Reader,
        staging: PinnedArena | None,
        trace: Trace,
        verify: bool = True,
    ) -> None:
        self.plan = plan
        self._images, self._residents = images, residents
        self._device, self._reader, self._staging, self._trace = device, reader, staging, trace
        self._verify = verify
        self._cycle = plan.streamed() if device.copies else plan.streamed("ssd")
        self._on_ssd = plan.streamed("ssd")
        self._positions = {sublayer: i for i, sublayer in enumerate(plan.tiers)}
        self._lock = threading.RLock()  # taken by itself: an interrupt inside Condition's own `with` leaves it locked
        self._change = threading.Condition(self._lock)
        self._live: list[_Read] = []
        self._torn = False  # whether a step below was cut short by an interrupt: then the cycle starts again
        self._pid = os.getpid()
        self._staging_ring = ByteRing(plan.staging_bytes)
        self._slot_ring = ByteRing(plan.slot_bytes)
        with torch.inference_mode(False):  # the mover, a thread in no such mode, could not write to a tensor made in it
            self._slots = torch.empty(plan.slot_bytes, dtype=torch.uint8, device=device.torch_device)
        self._reads: deque[_Read] = deque()
        self._arrivals: deque[_Arrival] = deque()
        self._held: deque[_Arrival] = deque()
        self._freed: deque[tuple[int, int, Event]] = deque()
        self._copied: deque[tuple[_Read, Event]] = deque()
        self._checked: set[Sublayer] = set()
        self._error: BaseException | None = None
        self._closing = threading.RLock()
        self._closed = self._stopping = self._freed_all = False
        self._next = self._next_pass = self._next_read = self._due = self._moving_pass = 0
        self._checksums = Checksums(self._change)
        self._threads: list[threading.Thread] = []
        if self._cycle:
            self._start(0, number=1)

    @contextmanager
    def weights(self, sublayer: Sublayer) -> Iterator[Weights]:
        """The weights of ``sublayer`` for the length of the block; its compute is timed."""
        weights = self.acquire(sublayer)
        started = self._device.mark_compute()
        try:
            yield weights
        finally:
            ended = self._device.mark_compute()
            self._device.span(sublayer.kind, sublayer, self._trace.number, started, ended)
            self.release(sublayer, ended)

    def acquire(self, sublayer: Sublayer) -> Weights:
        """Waits until ``sublayer`` is on the device and returns views of its weights.

        Raises the typed error of the read that failed, or :class:`StreamError` after :meth:`close`.
        """
        if self._closed:
            raise StreamError("the stream is closed; load the model again")
        if os.getpid() != self._pid:
            raise StreamError("the model was loaded before a fork; load it again in this process")
        resident = self._residents.weights.get(sublayer)
        if resident is not None:
            return resident
        due = self._cycle[self._next] == sublayer and self._next_pass == self._trace.number
        if self._torn or self._held or not due:  # held: an interrupt kept it from release
            self._torn = True
            self._stop()
            self._start(self._cycle.index(sublayer), self._trace.number)
        self._torn = True
        arrival = self._await_arrival()
        if arrival.sublayer != sublayer:
            raise StreamError(f"got {arrival.sublayer} where {sublayer} was due; the next pass starts again")
        self._next = (self._next + 1) % len(self._cycle)
        self._next_pass += self._next == 0
        self._held.append(arrival)
        if arrival.event is not None:
            self._device.compute_after(arrival.event)
        self._torn = False
        return arrival.weights

    def release(self, sublayer: Sublayer, ended: Event | None = None) -> None:
        """Gives the oldest acquired sublayer's memory back once the work queued so far is done."""
        if not self._held or self._held[0].sublayer != sublayer:
            return
        torn, self._torn = self._torn, True
        arrival = self._held.popleft()
        with self._lock:
            if self._stopping:
                return
            if arrival.slot is not None:
                self._freed.append((*arrival.slot, ended or self._device.mark_compute()))
                self._slot_ring.free()
                self._move_from_dram()
            elif arrival.read is not None:
                self._give_back(arrival.read)
            self._change.notify_all()
        self._torn = torn

    def close(self) -> None:
        """Ends all transfers and frees all memory of the stream; may be called again, an interrupted one too."""
        with self._closing:
            if not self._freed_all:
                self._closed = True
                self._free_all()
                self._freed_all = True

    def _free_all(self) -> None:
        self._stop()
        self._reader.close()
        self._slots = torch.empty(0, dtype=torch.uint8)
        if self._staging is not None:
            self._staging.close()
        self._residents.close()

    def _await_arrival(self) -> _Arrival:
        with self._lock:
            while not self._arrivals:
                if self._error is not None:
                    raise self._error.with_traceback(None)
                if self._closed or self._stopping:
                    raise StreamError("the stream was closed during a pass")
                self._change.wait(timeout=1.0)
            return self._arrivals.popleft()

    def _start(self, index: int, number: int) -> None:
        """Starts the cycle at its sublayer ``index`` of pass ``number``, with all rings empty."""
        if self._error is not None:
            raise self._error.with_traceback(None)
        position = self._positions[self._cycle[index]]
        ahead = (i for i, sublayer in enumerate(self._on_ssd) if self._positions[sublayer] >= position)
        self._next, self._next_pass, self._next_read = index, number, next(ahead, 0)
        self._due, self._moving_pass = index, number
        self._stopping = False
        self._checksums = Checksums(self._change)
        with self._lock:
            self._submit_reads()
        self._threads = [threading.Thread(target=self._move, name="mhaffn_move", daemon=True)]
        if any(map(self._is_checked, self._on_ssd)):
            self._threads += self._checksums.threads()
        for thread in self._threads:
            thread.start()

    def _stop(self) -> None:
        """Ends the threads and all transfers, and takes every place in the rings back."""
        with self._lock:
            self._stopping = True
            reads = list(self._live)
            self._change.notify_all()
        for read in reads:
            read.request.cancel()
        self._checksums.stop()
        until_s = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread.ident is not None:  # else an interrupt came before it started
                thread.join(max(0.0, until_s - time.monotonic()))
            if thread.is_alive():
                raise StreamError(f"transfers did not end within {STOP_S:.0f} s; their memory is kept, not reused")
        self._threads.clear()
        self._device.settle()
        for read in reads:
            with suppress(MhaffnError):  # whatever ended it has been told already
                read.request.wait(STOP_S)
        for read in reads:
            read.slot.release()
        self._live.clear()
        for queue in (self._reads, self._arrivals, self._held, self._freed, self._copied):
            queue.clear()
        self._staging_ring.clear()
        self._slot_ring.clear()

    # Reads are kept as far ahead as staging has room; called with self._change held.

    def _submit_reads(self) -> None:
        while self._on_ssd and self._staging is not None and not self._stopping and self._error is None:
            sublayer = self._on_ssd[self._next_read]
            extents = self._images[sublayer].extents
            nbytes = self._reader.cover_bytes(extents)
            offset = self._staging_ring.take(nbytes)
            if offset is None:
                return
            slot = self._staging.lease(nbytes, offset)
            read = _Read(sublayer, slot, self._reader.submit(extents, slot))
            self._live.append(read)
            if self._is_checked(sublayer):
                chunks = self._images[sublayer].chunks(read.request.placements, CHUNK_BYTES)
                read.checksum = Checksum(read.request, slot, chunks)
                self._checksums.ask(read.checksum)
            self._reads.append(read)
            self._next_read = (self._next_read + 1) % len(self._on_ssd)
            self._change.notify_all()

    def _is_checked(self, sublayer: Sublayer) -> bool:
        return self._verify and self._images[sublayer].records.checksum is not None

    def _give_back(self, read: _Read) -> None:
        self._live.remove(read)
        read.slot.release()
        self._staging_ring.free()
        self._submit_reads()

    # Copies from DRAM are queued by whoever makes room for them, called with self._change held: most often the thread
    # that computes, which the mover would have to wait for until it lets go of the interpreter.

    def _move_from_dram(self) -> None:
        while not self._stopping and self.plan.tiers[sublayer := self._cycle[self._due]] == "dram":
            image = self._images[sublayer]
            offset = self._slot_ring.take(image.nbytes)
            if offset is None:
                return
            slot, place = self._slot_at(offset, image)
            memory, placements = self._residents.host_images[sublayer]
            for segment in image.segments(placements):
                self._copy(sublayer, slot, memory, segment)
            self._arrive(_Arrival(sublayer, image.views(slot), self._device.mark_copy(), slot=place))

    # What the mover thread does: sublayers from SSD.

    def _move(self) -> None:
        try:
            while True:
                with self._lock:
                    self._move_from_dram()
                    while self.plan.tiers[self._cycle[self._due]] == "dram":
                        self._wait()
                        self._move_from_dram()
                self._move_from_ssd()
        except _StoppedError:
            pass
        except BaseException as error:
            with self._lock:
                if not self._stopping:
                    self._error = error
                self._change.notify_all()

    def _move_from_ssd(self) -> None:
        read = self._next_submitted()
        image, memory = self._images[read.sublayer], torch.frombuffer(read.slot, dtype=torch.uint8)
        if not self._device.copies:
            for _ in self._arriving(read):
                pass
            self._arrive(_Arrival(read.sublayer, image.views(memory, read.request.placements), read=read))
            return
        slot, place = self._take_slot(image)
        for segment in self._arriving(read):
            self._copy(read.sublayer, slot, memory, segment)
        copied = self._device.mark_copy()
        self._copied.append((read, copied))
        self._arrive(_Arrival(read.sublayer, image.views(slot), copied, slot=place))

    def _next_submitted(self) -> _Read:
        """The oldest read not yet moved."""
        with self._lock:
            while not self._reads:
                self._wait()
            self._raise_if_stopping()
            return self._reads.popleft()

    def _wait(self) -> None:
        """Waits for a change; while copies from staging are under way, for the oldest of them. Lock held."""
        self._raise_if_stopping()
        if not self._copied:
            self._change.wait()
            return
        self._lock.release()
        try:
            self._copied[0][1].synchronize()
        finally:
            self._lock.acquire()
        self._reclaim()

    def _reclaim(self) -> None:
        """Gives staging that was copied from back to the reader. Lock held."""
        while self._copied and self._copied[0][1].query():
            self._give_back(self._copied.popleft()[0])

    def _arriving(self, read: _Read) -> Iterator[Segment]:
        """The runs of a read, in chunks, each as soon as it is in memory; ends once the whole is verified."""
        image, request = self._images[read.sublayer], read.request
        for chunk in image.chunks(request.placements, CHUNK_BYTES):
            with self._lock:
                self._reclaim()
            request.wait_ready(chunk.source + chunk.nbytes)
            yield chunk
        request.wait()
        nbytes = image.records.nbytes
        self._trace.add("ssd", read.sublayer, self._moving_pass, request.started_s, request.finished_s, nbytes)
        if read.checksum is not None:
            image.check(self._digest_of(read.checksum))
            made = read.checksum
            self._trace.add_check(Check(read.sublayer, self._moving_pass, nbytes, made.cpu_s, made.end_s))
        if read.sublayer not in self._checked:
            image.check_scales(torch.frombuffer(read.slot, dtype=torch.uint8), request.placements)
            self._checked.add(read.sublayer)

    def _digest_of(self, checksum: Checksum) -> str:
        """That checksum, as soon as it is made; raises what kept it from that."""
        with self._lock:
            while checksum.outcome is None:
                self._wait()
        if isinstance(checksum.outcome, BaseException):
            raise checksum.outcome
        return checksum.outcome

    def _take_slot(self, image: Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Room on the device, and its place, as soon as there is some."""
        with self._lock:
            while (offset := self._slot_ring.take(image.nbytes)) is None:
                self._wait()
            self._raise_if_stopping()
            return self._slot_at(offset, image)

    def _slot_at(self, offset: int, image: Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """The slot at ``offset``, and its place; copies queued from now on wait for what last used it. Lock held."""
        self._device.copy_after(self._last_use(offset, image.nbytes))
        return self._slots[offset : offset + image.nbytes], (offset, image.nbytes)

    def _last_use(self, offset: int, nbytes: int) -> Event | None:
        """The mark after which those bytes may be written; earlier marks have passed once it has.

        The newest release would do as well, but it may lie sublayers ahead, and copies would wait for it.
        """
        overlapping = [i for i, (o, n, _) in enumerate(self._freed) if o < offset + nbytes and offset < o + n]
        if not overlapping:
            return None
        for _ in range(overlapping[-1]):
            self._freed.popleft()
        return self._freed.popleft()[2]

    def _copy(self, sublayer: Sublayer, slot: torch.Tensor, memory: torch.Tensor, segment: Segment) -> None:
        started = self._device.mark_copy()
        self._device.copy(
            slot[segment.target : segment.target + segment.nbytes],
            memory[segment.source : segment.source + segment.nbytes],
        )
        self._device.span("h2d", sublayer, self._moving_pass, started, self._device.mark_copy(), segment.nbytes)

    def _arrive(self, arrival: _Arrival) -> None:
        with self._lock:
            self._raise_if_stopping()
            self._arrivals.append(arrival)
            self._due = (self._due + 1) % len(self._cycle)
            if self._due == 0:
                self._moving_pass += 1
            self._change.notify_all()

    def _raise_if_stopping(self) -> None:
        if self._stopping:
            raise _StoppedError


class _StoppedError(Exception):
    """Ends a thread when the stream stops."""
