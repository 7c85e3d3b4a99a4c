"""Where compute runs, as the stream sees it: copies in, events, and the clock of each lane."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from mhaffn.config import Sublayer, format_bytes
from mhaffn.errors import BudgetError, ConfigError
from mhaffn.trace import LANES, Lane, Trace


class Event(Protocol):
    """A point in the order of work on a device."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Waits until it has passed."""


class Device(Protocol):
    """``copies`` is False where compute reads host memory itself; then nothing is copied or waited for."""

    torch_device: torch.device
    copies: bool

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy from pinned host memory on the copy stream."""

    def copy_after(self, event: Event | None) -> None:
        """Copies queued from now on run after ``event``."""

    def mark_copy(self) -> Event:
        """The point after all copies queued so far."""

    def mark_compute(self) -> Event:
        """The point after all work queued so far on the caller's compute stream, and after all such points before."""

    def compute_after(self, event: Event) -> None:
        """Work queued from now on on the caller's compute stream runs after ``event``."""

    def span(self, lane: Lane, sublayer: Sublayer, number: int, start: Event, end: Event, nbytes: int = 0) -> None:
        """Reports the time between two marks to the trace, for pass ``number``, once both have passed."""

    def settle(self) -> None:
        """Waits for all work on the device; reports what is left. Not for use while sublayers stream."""


class HostMark:
    """On the host work is done when it returns: a mark is the time it was made."""

    def __init__(self) -> None:
        self.time_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class HostDevice:
    """The CPU: computes from the memory that reads land in."""

    torch_device = torch.device("cpu")
    copies = False

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def copy_after(self, event: Event | None) -> None:
        pass

    def mark_copy(self) -> HostMark:
        return HostMark()

    def mark_compute(self) -> HostMark:
        return HostMark()

    def compute_after(self, event: Event) -> None:
        pass

    def span(self, lane: Lane, sublayer: Sublayer, number: int, start: Any, end: Any, nbytes: int = 0) -> None:
        self._trace.add(lane, sublayer, number, start.time_s, end.time_s, nbytes)

    def settle(self) -> None:
        pass


class CudaDevice:
    """A CUDA GPU: one copy stream of its own, the caller's current stream for compute, events between."""

    copies = True

    def __init__(self, device: torch.device, trace: Trace) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._trace = trace
        self._stream = torch.cuda.Stream(self.torch_device)
        self._last: tuple[int, torch.cuda.Event] | None = None  # the stream of the last compute mark, and that mark
        self._pending: dict[Lane, deque[tuple[Sublayer, int, torch.cuda.Event, torch.cuda.Event, int]]] = {
            lane: deque() for lane in LANES
        }
        self._lock = threading.Lock()
        self._zero = self._mark(self._stream)
        self._zero.synchronize()
        self._zero_s = time.perf_counter()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copy_after(self, event: Any) -> None:
        if event is not None:
            self._stream.wait_event(event)

    def mark_copy(self) -> torch.cuda.Event:
        return self._mark(self._stream)

    def mark_compute(self) -> torch.cuda.Event:
        stream = torch.cuda.current_stream(self.torch_device)
        if self._last is not None and self._last[0] != stream.cuda_stream:  # passes may come on several
            stream.wait_event(self._last[1])
        event = self._mark(stream)
        self._last = stream.cuda_stream, event
        return event

    def compute_after(self, event: Any) -> None:
        torch.cuda.current_stream(self.torch_device).wait_event(event)

    def span(self, lane: Lane, sublayer: Sublayer, number: int, start: Any, end: Any, nbytes: int = 0) -> None:
        with self._lock:
            self._pending[lane].append((sublayer, number, start, end, nbytes))
            self._report(lane)

    def settle(self) -> None:
        torch.cuda.synchronize(self.torch_device)  # compute may run on any stream of the caller's
        with self._lock:
            for lane in LANES:
                self._report(lane)

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _report(self, lane: Lane) -> None:
        """Hands the lane's spans whose end has passed to the trace; a lane's spans end in order."""
        pending = self._pending[lane]
        while pending and pending[0][3].query():
            sublayer, number, start, end, nbytes = pending.popleft()
            start_s, end_s = (self._zero_s + self._zero.elapsed_time(event) / 1e3 for event in (start, end))
            self._trace.add(lane, sublayer, number, start_s, end_s, nbytes)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns the GPU's running out of memory into a :class:`BudgetError` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise BudgetError(
            f"the GPU ran out of memory ({format_bytes(free)} of {format_bytes(total)} free): "
            f"{str(error).splitlines()[0]:.200} Give a smaller --gpu (gpu=), a shorter context or a smaller batch; "
            f"`nvidia-smi` shows what else holds memory."
        ) from error


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device named (None: CUDA if there is one, else the CPU); raises :class:`ConfigError`."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"got device {device!r}, expected cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"got device {chosen}, expected cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"got device {chosen}, but torch finds no CUDA GPU. `mhaffn doctor` says more; cpu works.")
    return chosen


def open_device(device: torch.device, trace: Trace) -> HostDevice | CudaDevice:
    """The device as a stream uses it."""
    return HostDevice(trace) if device.type == "cpu" else CudaDevice(device, trace)
