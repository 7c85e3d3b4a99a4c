"""Compilers and interpreters that tests wait for run ahead of them, one a core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="session")
def _under_way() -> Iterator[tuple[ThreadPoolExecutor, dict[str, Future[Any]]]]:
    pool = ThreadPoolExecutor(os.cpu_count())
    yield pool, {}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def ahead(
    request: pytest.FixtureRequest, _under_way: tuple[ThreadPoolExecutor, dict[str, Future[Any]]]
) -> Callable[[Callable[..., Any]], Any]:
    """``ahead(work)`` gives what ``work`` returns for this case of a parametrised test, or raises what it raises.

    The first case that asks starts the work of all selected cases of that test.
    """
    pool, started = _under_way

    def result(work: Callable[..., Any]) -> Any:
        if request.node.nodeid not in started:
            for item in request.session.items:
                if isinstance(item, pytest.Function) and item.function is request.function:
                    started[item.nodeid] = pool.submit(work, **item.callspec.params)
        return started[request.node.nodeid].result()

    return result
