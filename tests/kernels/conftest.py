"""Compilers and interpreters that tests wait for run ahead of them, one a core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits comes after the tests of the store: they measure no time, and leave a core to what is waited for."""
    waiting = [item for item in items if item.get_closest_marker("ahead")]
    others = [item for item in items if not item.get_closest_marker("ahead")]
    after = max((i for i, item in enumerate(others, 1) if item.path.parent.name == "store"), default=0)
    items[:] = [*others[:after], *waiting, *others[after:]]


@pytest.fixture(scope="session", autouse=True)
def _under_way(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    """The work of all selected tests marked ``ahead``, begun with the first test of this folder."""
    pool, started = ThreadPoolExecutor(os.cpu_count()), {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and (mark := item.get_closest_marker("ahead")):
            started[item.nodeid] = pool.submit(mark.kwargs["work"], **item.callspec.params)
    yield started
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def ahead(request: pytest.FixtureRequest, _under_way: dict[str, Future[Any]]) -> Any:
    """What the work of this case of a parametrised test returns; raises what it raises."""
    return _under_way[request.node.nodeid].result()
