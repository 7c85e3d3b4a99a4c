"""What benches under pytest share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from by_peer import Recorder
from timer import Case

from mhaffn.machine import describe

SAVE_S = 60.0
_saved_s = time.monotonic()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On a CPU threads that wait for each other make a busy machine's noise many times what it is."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recorder() -> Iterator[Recorder]:
    torch.manual_seed(0)
    yield Recorder()


@pytest.fixture
def record(recorder: Recorder, benchmark: Any) -> Callable[[Case, str], None]:
    """Reports one implementation of a case."""

    def one(case: Case, peer: str) -> None:
        with torch.no_grad():
            recorder.record(benchmark, case, peer)

    return one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Writes the results so far, once a minute: a long run that is cut off loses little."""
    global _saved_s
    session = item.config._benchmarksession  # type: ignore[attr-defined]
    numbered = session.save or session.autosave  # of which each writing would make another
    if session.json and session.benchmarks and not numbered and time.monotonic() - _saved_s > SAVE_S:
        session.handle_saving()
        _saved_s = time.monotonic()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["mhaffn"] = describe()
