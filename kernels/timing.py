"""Device time of GPU calls: CUDA events around graph replays or single calls, medians.

A host timer around a launch measures the launch. Calls that would find their inputs in L2 are given as several calls
on different buffers, larger together than the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def _summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    at = [ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.2, 0.8)]
    return Timing(*at)


def _sample(run: Call, calls: int, samples: int) -> Timing:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return _summary([start.elapsed_time(end) / calls for start, end in events])


def time_graph(calls: Sequence[Call], samples: int = 20) -> Timing:
    """The calls one after another in a CUDA graph: what they cost without the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first calls compile, load modules and allocate: not in a capture
        calls[0]()
        calls[-1]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    graph.replay()
    return _sample(graph.replay, len(calls), samples)


def time_calls(call: Call, samples: int = 20) -> Timing:
    """Single calls as a program makes them; for work of 100 µs and more, where launches hide."""
    call()
    call()
    torch.cuda.synchronize()
    return _sample(call, 1, samples)
