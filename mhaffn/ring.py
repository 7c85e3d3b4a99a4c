"""A ring of bytes: the memory that streamed sublayers pass through, in the stream and in its simulation."""

from __future__ import annotations

from collections import deque


class ByteRing:
    """Places in a ring of ``capacity`` bytes, taken and freed first in, first out."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._places: deque[tuple[int, int]] = deque()
        self._end = 0

    def take(self, nbytes: int) -> int | None:
        """The offset of ``nbytes`` contiguous bytes, or None while there is no room for them.

        The next place is always right behind the last one, or at the start where that would pass the end:
        where a sublayer lies depends on the order alone, never on timing.
        """
        offset = self._end if self._end + nbytes <= self.capacity else 0
        if nbytes > self.capacity or any(o < offset + nbytes and offset < o + n for o, n in self._places):
            return None
        self._places.append((offset, nbytes))
        self._end = offset + nbytes
        return offset

    def free(self) -> None:
        """Gives back the oldest place."""
        self._places.popleft()

    def clear(self) -> None:
        self._places.clear()
        self._end = 0
