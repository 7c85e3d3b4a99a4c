"""Checksums of reads, made as their bytes arrive.

Those of consecutive reads are made on several cores: one may hash more slowly than disks read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

import xxhash

from mhaffn.errors import StreamError
from mhaffn.image import Segment

if TYPE_CHECKING:
    from mhaffn.reader import Request, Slot

THREADS = 4
"""Each makes the checksum of one read at a time."""


@dataclass
class Checksum:
    """That of the bytes which ``request`` reads into ``slot``, ``chunks`` of them in turn.

    ``outcome`` is the checksum (XXH3-64, hex), once made, or why there is none; ``cpu_s`` the CPU time that it took,
    ``end_s`` when that was.
    """

    request: Request
    slot: Slot
    chunks: Iterable[Segment]
    outcome: str | BaseException | None = None
    cpu_s: float = 0.0
    end_s: float = 0.0


class Checksums:
    """Makes checksums in the order asked for, until stopped; tells ``changed`` of each.

    An error, as of a read that failed, is the outcome of that checksum alone.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._asked: SimpleQueue[Checksum | None] = SimpleQueue()
        self._stopping = False

    def ask(self, checksum: Checksum) -> None:
        self._asked.put(checksum)

    def threads(self) -> list[threading.Thread]:
        """What makes them: to be started, and to be joined after :meth:`stop`. A process may end while they wait."""
        return [threading.Thread(target=self._run, name="mhaffn_hash", daemon=True) for _ in range(THREADS)]

    def stop(self) -> None:
        """Ends the threads: one not begun is not made, one under way ends with the chunk it is at.

        That chunk has to arrive, or its request to be cancelled.
        """
        self._stopping = True
        for _ in range(THREADS):
            self._asked.put(None)

    def _run(self) -> None:
        while (checksum := self._asked.get()) is not None:
            started_s = time.thread_time()
            try:
                outcome: str | BaseException = self._make(checksum)
            except BaseException as error:
                outcome = error
            with self._changed:
                checksum.cpu_s, checksum.end_s = time.thread_time() - started_s, time.perf_counter()
                checksum.outcome = outcome
                self._changed.notify_all()

    def _make(self, checksum: Checksum) -> str:
        digest = xxhash.xxh3_64()
        with memoryview(checksum.slot) as buffer:
            for chunk in checksum.chunks:
                if self._stopping:
                    raise StreamError("the stream was stopped before this checksum was made")
                checksum.request.wait_ready(chunk.source + chunk.nbytes)
                digest.update(buffer[chunk.source : chunk.source + chunk.nbytes])
        return digest.hexdigest()
