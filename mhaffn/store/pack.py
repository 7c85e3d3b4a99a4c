"""Writing a packed store: one safetensors file a sublayer, tensors aligned, each with its checksum.

::

    DST/config.json, tokenizer files, generation_config.json
        layer-000-mha.safetensors, layer-000-ffn.safetensors, …    (data at a multiple of 4 KiB)
        resident.safetensors                                       embedding, final norm, head
        model.safetensors.index.json                               what other tools open
        mhaffn.json                                                version and checksums, written last

Every file is written as ``NAME.partial``, synced and renamed, so a file without that suffix is whole.
A pack that was killed goes on where it stopped, and ends byte for byte as if it had not been.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from mhaffn.config import DTYPES, ModelConfig, format_bytes
from mhaffn.errors import ConfigError, CorruptFileError, MhaffnError, StoreError
from mhaffn.files import shown
from mhaffn.store import manifest
from mhaffn.store.format import INDEX_NAME, TORCH_DTYPES, Store
from mhaffn.store.safetensors import read_header, write_header
from mhaffn.store.source import Source, open_source, tensors_by_file

if TYPE_CHECKING:
    import torch

ALIGN = 4096
CHECKSUM_KEY = "xxh3_64"
SAFETENSORS_DTYPES = {name: code for code, name in TORCH_DTYPES.items()}
HEADROOM_BYTES = 64 << 20
_WIDER = {"float16": "--dtype bfloat16 or float32", "bfloat16": "--dtype float32"}


@dataclass(frozen=True)
class PackProgress:
    """How far a pack is, in bytes of the finished store."""

    file: str
    done_bytes: int
    total_bytes: int


def pack(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    progress: Callable[[PackProgress], None] = lambda _: None,
) -> Store:
    """Packs the model at ``source`` (a Hugging Face folder or a GGUF file) into the folder ``target``.

    ``dtype`` is bfloat16, float16 or float32; by default the source's own (bfloat16 for GGUF). Memory
    used: about twice the largest tensor in float32. Returns the opened store.

    Raises :class:`ConfigError` for an unknown dtype, :class:`StoreError` when the target cannot be
    written or holds something else, and what reading the source raises.
    """
    origin, target = open_source(Path(source)), Path(target)
    dtype = origin.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ConfigError(f"got dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    try:
        with _claim(origin, target, dtype):
            return _write(origin, target, dtype, progress)
    except OSError as error:
        if isinstance(error, MhaffnError):
            raise
        raise StoreError(
            f"{error.filename or target} cannot be read or written: {error.strerror or error}. "
            f"Give a folder that can be written; what is packed is kept, and the same command goes on from there."
        ) from error


@contextmanager
def _claim(source: Source, target: Path, dtype: str) -> Iterator[None]:
    """Holds ``target`` for this source and dtype: new, or left by an earlier try that did not finish."""
    if target.exists() and source.path.resolve() == target.resolve():
        raise StoreError(f"{target}: source and target are the same folder. Give another target.")
    if target.exists() and not target.is_dir():
        raise StoreError(f"{target} is a file, expected a folder. Give another target.")
    target.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(target)
    _check_space(source.config, target, dtype)
    values = {"version": manifest.VERSION, "dtype": dtype, "files": source.fingerprint()}
    claim = json.dumps(values, indent=1).encode()
    state = target / manifest.UNFINISHED_NAME
    with open(os.open(state, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:  # noqa: PTH123 – never truncates
        _lock(file, target)
        found = file.read()
        if found not in (b"", claim):
            raise StoreError(
                f"{target} holds an unfinished pack of another model, another dtype, or files that changed since. "
                f"Remove it, or finish that one."
            )
        if not found:
            file.write(claim)
            file.flush()
            os.fsync(file.fileno())
        yield


def _refuse_strangers(target: Path) -> None:
    names = {path.name for path in target.iterdir()}
    if manifest.NAME in names and manifest.UNFINISHED_NAME not in names:
        raise StoreError(f"{target} already holds a finished store, which is not empty: run it, or give a new folder")
    if names and manifest.UNFINISHED_NAME not in names:
        raise StoreError(
            f"{target} is not empty and no unfinished pack of this model: it holds "
            f"{', '.join(map(shown, sorted(names)[:3]))}. Give a new folder, or remove this one."
        )


def _check_space(config: ModelConfig, target: Path, dtype: str) -> None:
    total = sum(_file_bytes(shapes, dtype) for _, _, shapes in tensors_by_file(config))
    done = sum(path.stat().st_size for path in target.glob("*.safetensors*"))
    needed, free = total - done + HEADROOM_BYTES, shutil.disk_usage(target).free
    if needed > free:
        raise StoreError(
            f"{target}: got {format_bytes(free)} free, expected {format_bytes(needed)}. Free some, or go elsewhere."
        )


def _lock(file: BinaryIO, target: Path) -> None:
    """One pack at a time: the kernel frees the lock when its process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(f"{target} is being written by another pack. Wait for it, or give another target.") from None


def _file_bytes(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * _itemsize(dtype) + ALIGN


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _write(source: Source, target: Path, dtype: str, progress: Callable[[PackProgress], None]) -> Store:
    begun = source.fingerprint()
    for name, content in source.side_files():
        _replace(target / name, content)
    files = list(tensors_by_file(source.config))
    total = sum(_file_bytes(shapes, dtype) for _, _, shapes in files)
    checksums: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    done = data_bytes = 0
    for name, key, shapes in files:
        progress(PackProgress(name, done, total))
        checksums[key] = _finished_checksum(target / name) or _write_file(source, target / name, shapes, dtype)
        weight_map |= dict.fromkeys(shapes, name)
        done += _file_bytes(shapes, dtype)
        data_bytes += _file_bytes(shapes, dtype) - ALIGN
    if source.fingerprint() != begun:
        raise StoreError(f"{source.path} changed while it was packed. Remove {target} and pack again.")
    config = {key: value for key, value in source.config_values().items() if key != "torch_dtype"}
    config["dtype"] = dtype
    _replace(target / "config.json", _json({key: config[key] for key in sorted(config)}))
    _replace(target / INDEX_NAME, _json({"metadata": {"total_size": data_bytes}, "weight_map": weight_map}))
    record = manifest.Manifest(dtype=dtype, source=source.path.name, checksums=checksums)
    _replace(target / manifest.NAME, record.to_json().encode())
    _sync_folder(target)
    (target / manifest.UNFINISHED_NAME).unlink()
    _sync_folder(target)
    progress(PackProgress("done", total, total))
    return Store.open(target)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def _finished_checksum(path: Path) -> str | None:
    """The checksum of a file an earlier try finished; None if there is none."""
    if not path.exists():
        return None
    checksum = read_header(path).metadata.get(CHECKSUM_KEY)
    if checksum is None:
        raise CorruptFileError(
            f"{path}: got no checksum in its header: another tool wrote it. Remove it and pack again."
        )
    return checksum


def _write_file(source: Source, path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> str:
    """Writes one file, tensor by tensor; the checksum stands in the header, which is written last."""
    code, itemsize = SAFETENSORS_DTYPES[dtype], _itemsize(dtype)
    entries = {name: (code, shape, math.prod(shape) * itemsize) for name, shape in shapes.items()}
    digest = xxhash.xxh3_64()

    def header() -> bytes:
        return write_header(entries, {"format": "pt", CHECKSUM_KEY: digest.hexdigest()}, ALIGN)

    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.seek(len(header()))
        for name, shape in shapes.items():
            payload = _payload(source, name, shape, dtype)
            digest.update(payload)
            file.write(payload)
        file.seek(0)
        file.write(header())
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    _sync_folder(path.parent)
    return digest.hexdigest()


def _payload(source: Source, name: str, shape: tuple[int, ...], dtype: str) -> memoryview:
    import torch

    tensor = source.tensor(name)
    if tuple(tensor.shape) != shape:
        raise CorruptFileError(
            f"{source.path}: got tensor {name} of shape {list(tensor.shape)}, expected {list(shape)}. Fetch it again."
        )
    converted: torch.Tensor = tensor.to(getattr(torch, dtype)).contiguous()
    if converted.dtype != tensor.dtype and bool((tensor.isfinite() & ~converted.isfinite()).any()):
        raise StoreError(f"{source.path}: tensor {name} overflows {dtype}. Pack with {_WIDER[dtype]}.")
    payload: memoryview = converted.view(torch.uint8).reshape(-1).numpy().data
    return payload


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
