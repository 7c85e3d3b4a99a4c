"""What each link did and when: spans on four lanes, pass by pass."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mhaffn.config import Sublayer

Lane = Literal["ssd", "h2d", "mha", "ffn"]
Phase = Literal["prefill", "decode", "sweep"]
LANES: tuple[Lane, ...] = ("ssd", "h2d", "mha", "ffn")
SPANS_MAX = 200_000


@dataclass(frozen=True)
class Span:
    """Work of one link on one sublayer for pass ``number``; times in seconds of ``time.perf_counter``."""

    lane: Lane
    sublayer: Sublayer
    number: int
    start_s: float
    end_s: float
    nbytes: int


@dataclass(frozen=True)
class PassSpan:
    """One pass over all sublayers: a forward pass, or a sweep, which moves weights and computes nothing."""

    number: int
    phase: Phase
    tokens: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Check:
    """The checksum of ``nbytes`` of a sublayer read for pass ``number``: the CPU time it took, and when it was made."""

    sublayer: Sublayer
    number: int
    nbytes: int
    cpu_s: float
    end_s: float


class Trace:
    """Collects the spans of every pass, from any thread; the last :data:`SPANS_MAX` are kept.

    Passes are numbered from 1. What is prefetched for the next pass carries that pass's number. A link
    serves one sublayer at a time: a span that starts before its lane's last one ended is cut to start
    there, so that the seconds of a lane never exceed the time that passed.
    """

    def __init__(self) -> None:
        self.spans: deque[Span] = deque(maxlen=SPANS_MAX)
        self.passes: deque[PassSpan] = deque(maxlen=SPANS_MAX)
        self.checks: deque[Check] = deque(maxlen=SPANS_MAX)
        self.number = 0
        self._lost = 0  # the last pass of which a span is no longer kept
        self._lane_end_s: dict[Lane, float] = dict.fromkeys(LANES, 0.0)
        self._lock = threading.Lock()

    def add(self, lane: Lane, sublayer: Sublayer, number: int, start_s: float, end_s: float, nbytes: int = 0) -> None:
        with self._lock:
            start_s = max(start_s, self._lane_end_s[lane])
            end_s = self._lane_end_s[lane] = max(start_s, end_s)
            if len(self.spans) == self.spans.maxlen:
                self._lost = max(self._lost, self.spans[0].number)
            self.spans.append(Span(lane, sublayer, number, start_s, end_s, nbytes))

    def add_check(self, check: Check) -> None:
        with self._lock:
            self.checks.append(check)

    @contextmanager
    def one_pass(self, phase: Phase, tokens: int) -> Iterator[None]:
        """Marks one pass of ``tokens`` positions; a pass that raises is not recorded."""
        start_s = time.perf_counter()
        with self._lock:
            self.number += 1
        yield
        with self._lock:
            self.passes.append(PassSpan(self.number, phase, tokens, start_s, time.perf_counter()))

    def kept(self, phase: Phase) -> tuple[list[PassSpan], list[Span]]:
        """The passes of ``phase`` whose spans are all still kept, and those spans."""
        with self._lock:
            spans, passes, lost = list(self.spans), list(self.passes), self._lost
        passes = [run for run in passes if run.phase == phase and run.number > lost]
        numbers = {run.number for run in passes}
        return passes, [span for span in spans if span.number in numbers]

    def checks_of(self, passes: Iterable[PassSpan]) -> list[Check]:
        """The checksums made of what was read for these passes."""
        numbers = {run.number for run in passes}
        with self._lock:
            return [check for check in self.checks if check.number in numbers]

    def write_chrome(self, path: str | Path) -> None:
        """Writes the kept spans as Chrome trace JSON: open it in Perfetto or chrome://tracing."""
        with self._lock:
            spans, passes = list(self.spans), list(self.passes)
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": lane}}
            for tid, lane in enumerate(("pass", *LANES))
        ]
        for span in spans:
            event = _event(str(span.sublayer), LANES.index(span.lane) + 1, span.start_s, span.end_s)
            events.append(event | {"args": {"bytes": span.nbytes, "pass": span.number}})
        for run in passes:
            event = _event(f"{run.phase} ({run.tokens} tokens)", 0, run.start_s, run.end_s)
            events.append(event | {"args": {"pass": run.number, "phase": run.phase, "tokens": run.tokens}})
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _event(name: str, tid: int, start_s: float, end_s: float) -> dict[str, object]:
    return {"ph": "X", "pid": 0, "tid": tid, "name": name, "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6}
