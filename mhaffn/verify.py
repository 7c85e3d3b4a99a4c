"""Reading a whole store once, to find what differs from what was packed.

Bytes come through the :class:`~mhaffn.reader.Reader`, past the page cache where that works, so it is the disk
that is checked. Each device is read by a thread of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from mhaffn.config import KINDS, Kind, Sublayer, format_bytes
from mhaffn.errors import ChecksumError, CorruptFileError, MhaffnError, ReadError, ReadTimeoutError, TruncatedFileError
from mhaffn.files import shown
from mhaffn.image import extent_of
from mhaffn.reader import Direct, Engine, Extent, PinnedArena, Reader, ReaderInfo, Request, Slot, check_modes
from mhaffn.store import Store, resolve
from mhaffn.store.format import survey
from mhaffn.store.manifest import NAME, RESIDENT_KEY
from mhaffn.store.safetensors import TensorInfo
from mhaffn.store.source import tensors_by_file

PIECE_BYTES = 16 << 20
PIECES = 4  # in flight on each device
SLOT_BYTES = PIECE_BYTES + 8192  # a piece may start and end in the middle of a page
STORE_KEY = ""


@dataclass(frozen=True)
class Damage:
    """What is wrong with one part of a store.

    ``part`` is "layer 3 ffn", "the resident part", the name of a tensor outside of both, or "the store";
    ``layer`` and ``kind`` say it of sublayers. ``got`` and ``expected`` are checksums (XXH3-64, hexadecimal) or
    sizes in bytes, None where only ``message`` says it. ``error`` is the error's class.
    """

    part: str
    layer: int | None
    kind: Kind | None
    file: str
    error: str
    got: str | None
    expected: str | None
    message: str


@dataclass(frozen=True)
class Verification:
    """What was found: ``parts`` in all, of which ``damages`` has the bad ones in pass order.

    Without checksums in the folder (``checksums`` false) only its structure was checked, and nothing was read:
    ``reader`` is None, ``bytes_read`` 0. ``seconds`` are those of the whole verification.
    """

    path: str
    checksums: bool
    parts: int
    damages: tuple[Damage, ...]
    bytes_read: int
    seconds: float
    reader: ReaderInfo | None

    @property
    def ok(self) -> bool:
        return not self.damages

    def summary(self) -> str:
        """What was checked and how it turned out, in a sentence or two."""
        if self.damages and self.reader is None:
            return f"{self.path}: {len(self.damages)} of {self.parts} parts damaged; no weights were read."
        if self.reader is None:
            return (
                f"{self.path}: the structure of {self.parts} parts is right: headers, names, shapes, file sizes. There "
                f"are no checksums here, so no weights were read; `mhaffn pack` writes a store that has them."
            )
        reader = self.reader
        speed = (
            f"{format_bytes(self.bytes_read)} in {self.seconds:.1f} s, {format_bytes(self.bytes_read / self.seconds)}/s"
        )
        devices = f"{len(reader.devices)} device{'s' if len(reader.devices) > 1 else ''}"
        how = f"{speed}, {devices}, {reader.engine}, O_DIRECT {reader.direct}"
        if self.damages:
            return (
                f"{self.path}: {len(self.damages)} of {self.parts} parts damaged ({how}). Pack the model again into a "
                f"new folder; if the disk damages that too, replace it."
            )
        return f"{self.path}: all {self.parts} parts are as they were packed ({how})."

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``ok``, ready for JSON."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True)
class _Part:
    key: str
    tensors: tuple[TensorInfo, ...]
    checksum: str

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def pieces(self) -> Iterator[Extent]:
        """Its bytes in file order, neighbouring tensors as one run, in pieces of at most ``PIECE_BYTES``."""
        runs: list[Extent] = []
        for extent in map(extent_of, self.tensors):
            last = runs[-1] if runs else None
            if last and last.path == extent.path and last.offset + last.length == extent.offset:
                runs[-1] = Extent(last.path, last.offset, last.length + extent.length)
            else:
                runs.append(extent)
        for run in runs:
            for start in range(0, run.length, PIECE_BYTES):
                yield Extent(run.path, run.offset + start, min(PIECE_BYTES, run.length - start))


def verify(
    model: str | Path,
    *,
    engine: Engine = "auto",
    direct: Direct = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Reads every sublayer and the resident part of a packed store and compares their checksums.

    ``progress`` gets bytes done and bytes in all. A folder that is no packed store has no checksums: there only
    headers, names, shapes and sizes are checked. Damage is returned, not raised; raised is what keeps from looking
    at all, as :func:`~mhaffn.store.resolve` and :meth:`~mhaffn.store.Store.open` do, and :class:`ConfigError`.
    """
    started_s = time.perf_counter()
    check_modes(engine, direct)
    folder = resolve(model)
    packed = os.path.lexists(folder / NAME)
    try:
        store, broken = survey(folder)
    except MhaffnError as error:
        if not packed and not isinstance(error, CorruptFileError | TruncatedFileError):
            raise
        damage = _damage(STORE_KEY, str(folder), error)
        return Verification(str(folder), packed, 1, (damage,), 0, time.perf_counter() - started_s, None)
    files = {key: os.fspath(folder / name) for name, key, _ in tensors_by_file(store.config)} if packed else {}
    damages = {key: _damage(key, files.get(key, str(folder)), error) for key, error in broken.items()}
    info = None
    if packed:
        with Reader(engine=engine, direct=direct) as reader:
            damages |= _read(reader, _parts(store), progress)
            info = reader.info()
    keys = [key for _, key, _ in tensors_by_file(store.config)]
    ordered = sorted(damages, key=lambda key: keys.index(key) if key in keys else len(keys))
    found = tuple(damages[key] for key in ordered)
    nbytes, seconds = info.bytes_read if info else 0, time.perf_counter() - started_s
    return Verification(str(folder), packed, len(keys), found, nbytes, seconds, info)


def _parts(store: Store) -> list[_Part]:
    resident = sorted(store.resident.values(), key=lambda tensor: (tensor.path, tensor.offset))
    parts = [_Part(s.key, records.tensors, records.checksum or "") for s, records in store.sublayers.items()]
    return [*parts, _Part(RESIDENT_KEY, tuple(resident), store.resident_checksum or "")] if resident else parts


def _read(reader: Reader, parts: list[_Part], progress: Callable[[int, int], None]) -> dict[str, Damage]:
    """Damages by key; a thread for each device, so that a slow one does not hold up the others."""
    lanes: dict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        lanes[_device(part.tensors[0].path)].append(part)
    if not lanes:
        return {}
    count = _Count(sum(part.nbytes for part in parts), progress)
    stop = threading.Event()
    with ThreadPoolExecutor(len(lanes), thread_name_prefix="mhaffn-verify") as pool:
        done = [pool.submit(_read_lane, reader, lane, count, stop) for lane in lanes.values()]
        try:
            wait(done, return_when=FIRST_EXCEPTION)
            return {key: damage for lane in done if lane.done() for key, damage in lane.result().items()}
        except BaseException:  # of a lane, or Ctrl-C: what is in flight anywhere ends now
            stop.set()
            reader.close()
            raise


class _Count:
    """Bytes done, added up over threads."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)


def _read_lane(reader: Reader, parts: list[_Part], count: _Count, stop: threading.Event) -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    with PinnedArena(PIECES * SLOT_BYTES, cuda=False) as arena:
        flight: deque[tuple[_Part, Extent, Slot, Request]] = deque()
        checks = {part.key: xxhash.xxh3_64() for part in parts}

        def finish_oldest() -> None:
            part, extent, slot, request = flight.popleft()
            with slot:
                try:
                    request.wait()
                    checks[part.key].update(memoryview(slot)[request.placements[0] :][: extent.length])
                except ReadTimeoutError:
                    raise
                except ReadError as error:
                    damages.setdefault(part.key, _damage(part.key, extent.path, error))
            count.add(extent.length)

        for part in parts:
            for extent in part.pieces():
                if stop.is_set():
                    break
                if len(flight) == PIECES:
                    finish_oldest()
                slot = arena.lease(SLOT_BYTES)
                flight.append((part, extent, slot, reader.submit([extent], slot)))
        while flight:
            finish_oldest()
    for part in parts:
        digest = checks[part.key].hexdigest()
        if part.key not in damages and digest != part.checksum:
            damages[part.key] = _wrong_checksum(part, digest)
    return damages


def _device(path: str) -> int:
    try:
        return Path(path).stat().st_dev
    except OSError:  # gone since its header was read: the read will say so
        return 0


def _wrong_checksum(part: _Part, digest: str) -> Damage:
    path = part.tensors[0].path
    error = ChecksumError(f"{path}: got checksum {digest}, expected {part.checksum}. Pack the model again.")
    return replace(_damage(part.key, path, error), got=digest, expected=part.checksum)


def _damage(key: str, path: str, error: MhaffnError) -> Damage:
    """``error`` as the damage of the part ``key``, in the file at ``path`` unless the error names another."""
    name, layer, kind = _named(key)
    got = expected = None
    if isinstance(error, ReadError):
        path = error.path or path
    if isinstance(error, TruncatedFileError):
        got, expected = f"{error.offset} bytes", f"{error.offset + error.length} bytes"
    elif not Path(path).exists():
        got, expected = "no file", "a file"
    return Damage(name, layer, kind, path, type(error).__name__, got, expected, f"{name}: {error}")


def _named(key: str) -> tuple[str, int | None, Kind | None]:
    """What to call a part, and its layer and kind if it is a sublayer."""
    layer, _, kind = key.rpartition(".")
    if layer.isdecimal() and kind in KINDS:
        sublayer = Sublayer(int(layer), "mha" if kind == "mha" else "ffn")
        return str(sublayer), sublayer.layer, sublayer.kind
    return {RESIDENT_KEY: "the resident part", STORE_KEY: "the store"}.get(key, shown(key)), None, None
