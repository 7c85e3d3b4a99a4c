"""Cases under pytest-benchmark: a test for each case and implementation, timed by turns, reported one by one.

The implementations of a case are one group of the table. The first test of a case times them all by turns; each test
then hands its own samples on, by way of a clock that tells device time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from timer import Bench, Case, environment

Samples = dict[str, tuple[dict[str, Any], tuple[float, ...]]]


class DeviceClock:
    """Seconds that measured work took on the device; stands still otherwise."""

    __name__ = "device_clock"

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def report(self, benchmark: Any, group: str, samples_s: Sequence[float]) -> None:
        """Makes ``samples_s`` the rounds of ``benchmark``, which is shown beside the others of ``group``."""
        benchmark.group = group
        left = iter(samples_s)

        def advance() -> None:
            self.now_s += next(left)

        benchmark.pedantic(advance, rounds=len(samples_s), iterations=1)


CLOCK = DeviceClock()


def by_peer(cases: Mapping[str, Case]) -> Callable[[Any], Any]:
    """Parametrises a test by ``case`` and ``peer``; what is too large for a CPU carries the gpu mark."""
    pairs = [
        pytest.param(case.name, peer, marks=[] if case.small else [pytest.mark.gpu])
        for case in cases.values()
        for peer in case.peers
    ]

    def mark(test: Any) -> Any:
        return pytest.mark.benchmark(timer=CLOCK)(pytest.mark.parametrize(("case", "peer"), pairs)(test))

    return mark


class Recorder:
    """Times cases as tests ask for them; the last case is kept."""

    def __init__(self) -> None:
        self._bench: Bench | None = None
        self._case = ""
        self._samples: Samples = {}
        self._about: dict[str, Any] = {}

    def record(self, benchmark: Any, case: Case, peer: str) -> None:
        if self._bench is None:
            self._bench = Bench("pytest")
        if self._case != case.name:
            self._samples, self._case = self._bench.run(case), case.name
            about = environment()
            self._about = {name: about[name] for name in ("versions", "clocks", "commit")}
        entry, samples_ms = self._samples[peer]
        if failed := entry.get("failed"):
            (pytest.skip if failed.startswith("not here") else pytest.fail)(failed)
        benchmark.extra_info.update(entry | {"roofs": self._bench.roofs} | self._about)
        CLOCK.report(benchmark, case.name, [ms / 1e3 for ms in samples_ms])
