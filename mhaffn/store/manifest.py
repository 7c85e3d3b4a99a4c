"""``mhaffn.json``, what a packed store knows beyond safetensors: its version and its checksums.

::

    {"version": 1, "dtype": "bfloat16", "source": "…",
     "checksums": {"0.mha": "<XXH3-64 hex>", "0.ffn": …, …, "resident": …}}

A checksum covers the bytes of a file's tensors – a sublayer's, or the resident ones – one after another
in file order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mhaffn.config import DTYPES
from mhaffn.errors import CorruptFileError
from mhaffn.files import read_json_object, shown

NAME = "mhaffn.json"
UNFINISHED_NAME = "mhaffn-pack.json"
VERSION = 1
RESIDENT_KEY = "resident"
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_PACK_AGAIN = "Pack the model again."


@dataclass(frozen=True)
class Manifest:
    """The manifest of a packed store; ``checksums`` is keyed ``"<layer>.<kind>"`` and ``"resident"``."""

    dtype: str
    source: str
    checksums: Mapping[str, str]

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of ``folder``, None if it has none; raises :class:`CorruptFileError`."""
        path = folder / NAME
        try:
            values = read_json_object(path, CorruptFileError, _PACK_AGAIN)
        except FileNotFoundError:
            return None
        version, dtype, checksums = values.get("version"), values.get("dtype"), values.get("checksums")
        if type(version) is not int or version != VERSION:
            raise CorruptFileError(
                f"{path}: got version {shown(version)}, expected {VERSION}. Pack the model again, or update mhaffn."
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CorruptFileError(
                f"{path}: got dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}. {_PACK_AGAIN}"
            )
        if not isinstance(checksums, dict):
            raise CorruptFileError(f"{path}: got checksums {shown(checksums)}, expected an object. {_PACK_AGAIN}")
        for key, value in checksums.items():
            if not isinstance(value, str) or not _CHECKSUM.fullmatch(value):
                raise CorruptFileError(
                    f"{path}: got checksum {shown(value)} for {shown(key)}, expected 16 hex digits. {_PACK_AGAIN}"
                )
        return Manifest(dtype, str(values.get("source")), checksums)

    def checksum(self, folder: Path, key: str) -> str:
        """The checksum for ``key``, a sublayer's or "resident"; a manifest that lacks one is corrupt."""
        if key not in self.checksums:
            raise CorruptFileError(f"{folder / NAME}: got no checksum for {key}, expected one. {_PACK_AGAIN}")
        return self.checksums[key]

    def to_json(self) -> str:
        values = {
            "version": VERSION,
            "dtype": self.dtype,
            "source": self.source,
            "checksums": dict(self.checksums),
        }
        return json.dumps(values, indent=1) + "\n"
