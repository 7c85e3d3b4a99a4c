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
    """Milliseconds a call; ``samples_ms`` in the order they were taken."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples_ms: tuple[float, ...]


def summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    median, p20, p80 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.2, 0.8))
    return Timing(median, p20, p80, tuple(samples))


def _sample(run: Call, calls: int, samples: int) -> Timing:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) / calls for start, end in events])


class Graph:
    """Calls captured one after another."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # first calls compile, load modules and allocate: not in a capture
            calls[0]()
            calls[-1]()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()
        self.graph.replay()
        torch.cuda.synchronize()


def time_graph(calls: Sequence[Call], samples: int = 20) -> Timing:
    """The calls one after another in a CUDA graph: what they cost without the host."""
    graph = Graph(calls)
    return _sample(graph.graph.replay, graph.calls, samples)


def by_turns(graphs: dict[str, Graph], samples: int) -> dict[str, Timing]:
    """Times graphs in alternation, each sample the second of two replays (the first warms what the last left cold)."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(samples):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.graph.replay()
            start.record()
            graph.graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: summary([start.elapsed_time(end) / graphs[name].calls for start, end in pairs])
        for name, pairs in events.items()
    }


def time_calls(call: Call, samples: int = 20) -> Timing:
    """Single calls as a program makes them; for work of 100 µs and more, where launches hide."""
    call()
    call()
    torch.cuda.synchronize()
    return _sample(call, 1, samples)
