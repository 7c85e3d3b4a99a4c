"""``mhaffn.json``, what a packed store knows beyond safetensors: its version and its checksums.

::

    {"version": 1, "dtype": "bfloat16", "source": "…", "checksums": {"0.mha": "<XXH3-64 hex>", …}}

A checksum covers the bytes of a sublayer's tensors, one after another in file order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mhaffn.errors import CorruptFileError

NAME = "mhaffn.json"
VERSION = 1
_CHECKSUM = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Manifest:
    """The manifest of a packed store; ``checksums`` is keyed ``"<layer>.<kind>"``."""

    dtype: str
    source: str
    checksums: Mapping[str, str]

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of ``folder``, None if it has none; raises :class:`CorruptFileError`."""
        path = folder / NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CorruptFileError(f"{path} is not a JSON file ({error}); pack the model again") from error
        if not isinstance(values, dict) or values.get("version") != VERSION:
            version = values.get("version") if isinstance(values, dict) else None
            raise CorruptFileError(
                f"{path}: got version {version!r}, expected {VERSION}. Pack the model again, or update mhaffn."
            )
        checksums = values.get("checksums")
        if not isinstance(checksums, dict) or not all(
            isinstance(value, str) and _CHECKSUM.fullmatch(value) for value in checksums.values()
        ):
            raise CorruptFileError(f"{path}: checksums must map sublayers to 16 hexadecimal digits")
        return Manifest(str(values.get("dtype")), str(values.get("source")), checksums)

    def checksum(self, folder: Path, key: str) -> str:
        """The checksum of sublayer ``key``; a manifest that lacks one is corrupt."""
        if key not in self.checksums:
            raise CorruptFileError(f"{folder / NAME} has no checksum for sublayer {key}; pack the model again")
        return self.checksums[key]

    def to_json(self) -> str:
        values = {
            "version": VERSION,
            "dtype": self.dtype,
            "source": self.source,
            "checksums": dict(self.checksums),
        }
        return json.dumps(values, indent=1) + "\n"
