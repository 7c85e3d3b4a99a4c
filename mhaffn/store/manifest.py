"""``mhaffn.json``, what a packed store knows beyond safetensors: its version and its checksums.

::

    {"version": 1, "dtype": "bfloat16", "source": "…",
     "checksums": {"0.mha": "<XXH3-64 hex>", "0.ffn": …, …, "resident": …}}

A checksum covers the bytes of a file's tensors – a sublayer's, or the resident ones – one after another
in file order.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mhaffn.config import DTYPES
from mhaffn.errors import CorruptFileError, StoreError
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


def refuse_unfinished(folder: Path) -> None:
    """Raises :class:`StoreError`, with the command that goes on, where ``folder`` is an unfinished pack or holds
    a part of one."""
    path = folder / UNFINISHED_NAME
    if not os.path.lexists(path):
        return
    try:
        command = _pack_command(folder, read_json_object(path, CorruptFileError, _PACK_AGAIN))
    except (CorruptFileError, FileNotFoundError):
        command = None
    again = f"`{command}` goes on from there" if command else "Run the same `mhaffn pack` again: it goes on from there"
    raise StoreError(f"{folder} is an unfinished pack. {again}.")


def _pack_command(folder: Path, values: Mapping[str, object]) -> str | None:
    """The command that finishes the pack which wrote ``values``; None where they are not all strings to show."""
    source, target, dtype = values.get("source"), values.get("store", os.fspath(folder)), values.get("dtype")
    if "importance" in values:  # of a text that is not known any more
        return None
    formats = values.get("formats", [])
    words: list[object] = ["mhaffn", "pack", source, target, "--dtype", dtype]
    words += formats if isinstance(formats, list) else [None]
    words += place_options(values.get("places"))
    if not all(isinstance(word, str) and word.isprintable() for word in words):
        return None
    return shlex.join(map(str, words))


def place_options(places: object) -> list[object]:
    """The options of `mhaffn pack` for ``places``: None, or a list of folders by "mha", "ffn" or "stripe"."""
    options: list[object] = []
    for kind, folders in places.items() if isinstance(places, Mapping) else ():
        options.append(f"--{kind}" if kind == "stripe" else f"--{kind}-dir")
        options += folders if isinstance(folders, list) else []
    return options
