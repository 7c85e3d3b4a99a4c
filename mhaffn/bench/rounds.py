"""What is measured, how often, and in which rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST_SAMPLES = 64
MOST_LOST = 0.98
LONG_S = 0.5


@dataclass(frozen=True)
class Measurement:
    """``take(n)`` measures n times and returns a sample each (fewer where a sample is several passes in a row).

    Names are ``<what>.<which>``. Times are milliseconds; roofs are rates, in units a second. ``shares`` is its part
    of the time there is, relative to others.
    """

    name: str
    take: Callable[[int], list[float]]
    shares: float = 1.0


def repeat(sample: Callable[[], float]) -> Callable[[int], list[float]]:
    """``take`` of a measurement that measures one sample a call."""
    return lambda n: [sample() for _ in range(n)]


@dataclass(frozen=True)
class Step:
    """A measurement with its number of samples a round and the seconds they are expected to take."""

    measurement: Measurement
    samples: int
    expected_s: float


@dataclass(frozen=True)
class Schedule:
    steps: tuple[Step, ...]
    rounds: int

    @property
    def expected_s(self) -> float:
        return self.rounds * sum(step.expected_s for step in self.steps)


def warm_up(measurement: Measurement) -> float:
    """Two samples that do not count, of what takes long one; the seconds of the last, with all that belongs to it."""
    started = time.perf_counter()
    measurement.take(1)
    if (first := time.perf_counter() - started) > LONG_S:
        return first
    measurement.take(1)
    return time.perf_counter() - started - first


def schedule(costs: Sequence[tuple[Measurement, float]], seconds: float, rounds: int, least_rounds: int) -> Schedule:
    """Spreads ``seconds`` over measurements that cost so many seconds a sample; at least a sample each a round.

    Where even that takes longer there are fewer rounds, but ``least_rounds`` always.
    """
    shares = sum(measurement.shares for measurement, _ in costs)
    least = sum(cost for _, cost in costs)
    rounds = max(least_rounds, min(rounds, int(seconds / least)))
    steps = []
    for measurement, cost in costs:
        wanted = seconds / rounds * measurement.shares / shares / max(cost, 1e-6)
        samples = max(1, min(MOST_SAMPLES, int(wanted)))
        steps.append(Step(measurement, samples, samples * cost))
    return Schedule(tuple(steps), rounds)


def take(step: Step) -> tuple[list[float], float]:
    """A round's samples, and the share of the time that was lost to waiting for a processor, at most.

    Threads' waits are added up: where threads wait for each other, each one's wait is everyone's.
    """
    before, started = _waits(), time.perf_counter()
    samples = step.measurement.take(step.samples)
    taken = time.perf_counter() - started
    waited = sum(ns - before.get(thread, 0) for thread, ns in _waits().items()) / 1e9
    return samples, min(waited / taken, MOST_LOST)


def _waits() -> dict[str, int]:
    """Nanoseconds each thread of this process has been ready to run while others ran, where the kernel tells."""
    found = {}
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError, IndexError, ValueError):  # threads end
            found[thread.name] = int((thread / "schedstat").read_text(encoding="ascii").split()[1])
    return found
