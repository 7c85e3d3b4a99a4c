"""What each link did and when: spans on four lanes, and their sums by phase."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mhaffn.config import Kind, Sublayer

Lane = Literal["ssd", "h2d", "mha", "ffn"]
Phase = Literal["prefill", "decode"]
LANES: tuple[Lane, ...] = ("ssd", "h2d", "mha", "ffn")
SPANS_MAX = 200_000


@dataclass(frozen=True)
class Span:
    """Work of one link on one sublayer; times in seconds of ``time.perf_counter``."""

    lane: Lane
    sublayer: Sublayer
    start_s: float
    end_s: float
    nbytes: int


@dataclass(frozen=True)
class PassSpan:
    """One forward pass over all sublayers."""

    phase: Phase
    tokens: int
    start_s: float
    end_s: float


@dataclass
class Total:
    """Sums over spans: how many, how long (seconds), how much (bytes)."""

    count: int = 0
    seconds: float = 0.0
    nbytes: int = 0


class Trace:
    """Collects spans from any thread. Sums cover the whole run; only the last spans are kept.

    A link serves one sublayer at a time: a span that starts before its lane's last one ended is
    cut to start there, so that the seconds of a lane never exceed the time that passed. Work
    counts for the phase in which it ended: a prefetch across passes belongs to the pass it ran in.
    """

    def __init__(self) -> None:
        self.spans: deque[Span] = deque(maxlen=SPANS_MAX)
        self.passes: deque[PassSpan] = deque(maxlen=SPANS_MAX)
        self.totals: dict[tuple[Phase, Lane, Kind], Total] = defaultdict(Total)
        self.phase: Phase = "prefill"
        self._lane_end_s: dict[Lane, float] = dict.fromkeys(LANES, 0.0)
        self._lock = threading.Lock()

    def add(self, lane: Lane, sublayer: Sublayer, start_s: float, end_s: float, nbytes: int = 0) -> None:
        with self._lock:
            start_s = min(max(start_s, self._lane_end_s[lane]), end_s)
            self._lane_end_s[lane] = end_s
            self.spans.append(Span(lane, sublayer, start_s, end_s, nbytes))
            total = self.totals[self.phase, lane, sublayer.kind]
            total.count += 1
            total.seconds += end_s - start_s
            total.nbytes += nbytes

    @contextmanager
    def forward_pass(self, phase: Phase, tokens: int) -> Iterator[None]:
        """Marks one pass of ``tokens`` positions; a pass that raises is not recorded."""
        start_s = time.perf_counter()
        with self._lock:
            self.phase = phase
        yield
        with self._lock:
            self.passes.append(PassSpan(phase, tokens, start_s, time.perf_counter()))

    def clear(self) -> None:
        """Forgets everything seen so far."""
        with self._lock:
            self.spans.clear()
            self.passes.clear()
            self.totals.clear()

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
            events.append(event | {"args": {"bytes": span.nbytes}})
        for run in passes:
            events.append(_event(f"{run.phase} ({run.tokens} tokens)", 0, run.start_s, run.end_s))
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _event(name: str, tid: int, start_s: float, end_s: float) -> dict[str, object]:
    return {"ph": "X", "pid": 0, "tid": tid, "name": name, "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6}
