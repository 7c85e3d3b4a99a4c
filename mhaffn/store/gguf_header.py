"""The header of a GGUF file, walked as hostile bytes before a parser that trusts its counts sees it.

A file is ``"GGUF" | u32 version | u64 tensors | u64 entries``, then the entries (key, type, value), then
for each tensor name, dimensions, type and offset. Lengths and counts are the file's own claims.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from mhaffn.errors import CorruptFileError
from mhaffn.files import open_regular

ENTRIES_MAX = 65_536
ARRAY_ITEMS_MAX = 1 << 22
DIMENSIONS_MAX = 4
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_header(path: Path) -> None:
    """Raises :class:`CorruptFileError` unless every count and length lies within the file and its limits.

    Raises :class:`OSError` when the file cannot be opened.
    """
    with open_regular(path) as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _Walk(content).header()
        except (ValueError, struct.error) as error:
            raise CorruptFileError(f"{path}: {error}. It is no GGUF file, or is damaged: fetch it again.") from error


class _Walk:
    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    def header(self) -> None:
        if self.content[:4] != b"GGUF":
            raise ValueError(f"got {self.content[:4]!r} as the first bytes, expected b'GGUF'")
        self.skip(4)
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"got GGUF version {version}, expected one of {', '.join(map(str, VERSIONS))}")
        tensors, entries = self.count("<Q", ENTRIES_MAX), self.count("<Q", ENTRIES_MAX)
        for _ in range(entries):
            self.string()
            self.value(self.number("<I"))
        for _ in range(tensors):
            self.string()
            self.skip(8 * self.count("<I", DIMENSIONS_MAX) + 12)

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            item, count = self.number("<I"), self.count("<Q", ARRAY_ITEMS_MAX)
            if item == _STRING:
                for _ in range(count):
                    self.string()
            else:
                self.skip(count * self.scalar_bytes(item))
        else:
            self.skip(self.scalar_bytes(kind))

    def scalar_bytes(self, kind: int) -> int:
        if kind not in _SCALAR_BYTES:
            raise ValueError(f"got value type {kind}, expected one of {', '.join(map(str, _SCALAR_BYTES))}")
        return _SCALAR_BYTES[kind]

    def string(self) -> None:
        self.skip(self.number("<Q"))

    def count(self, form: str, most: int) -> int:
        count = self.number(form)
        if count > most:
            raise ValueError(f"got a count of {count} at byte {self.at}, expected at most {most}")
        return count

    def number(self, form: str) -> int:
        (number,) = struct.unpack_from(form, self.content, self.at)
        self.at += struct.calcsize(form)
        return int(number)

    def skip(self, nbytes: int) -> None:
        self.at += nbytes
        if self.at > len(self.content):
            raise ValueError(f"got a length that ends at byte {self.at}, expected at most {len(self.content)}")
