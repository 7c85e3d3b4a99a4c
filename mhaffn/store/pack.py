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

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mhaffn.config import DTYPES, format_bytes
from mhaffn.errors import ConfigError, CorruptFileError, StoreError
from mhaffn.store import manifest
from mhaffn.store.format import INDEX_NAME, TORCH_DTYPES, Store
from mhaffn.store.safetensors import read_header, write_header
from mhaffn.store.source import Source, open_source, tensors_by_file

if TYPE_CHECKING:
    import torch

ALIGN = 4096
STATE_NAME = "mhaffn-pack.json"
CHECKSUM_KEY = "xxh3_64"
SAFETENSORS_DTYPES = {name: code for code, name in TORCH_DTYPES.items()}
HEADROOM_BYTES = 64 << 20


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
    dtype = dtype or origin.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"got dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    try:
        _begin(origin, target, dtype)
        return _write(origin, target, dtype, progress)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{target} cannot be written: {error}. What is done is kept: pack again to go on.") from error


def _begin(source: Source, target: Path, dtype: str) -> None:
    """Claims ``target`` for this source and dtype, or finds that an earlier try did."""
    if target.exists() and source.path.resolve() == target.resolve():
        raise StoreError(f"{target}: source and target are the same folder; give another target")
    state = json.dumps({"version": manifest.VERSION, "dtype": dtype, "files": source.fingerprint()}, indent=1)
    target.mkdir(parents=True, exist_ok=True)
    state_path = target / STATE_NAME
    names = {path.name for path in target.iterdir()}
    if STATE_NAME not in names and names - {f"{STATE_NAME}.partial"}:
        raise StoreError(
            f"{target} is not empty and no unfinished pack of this model: it holds {', '.join(sorted(names)[:3])}. "
            f"Give a new folder, or remove this one."
        )
    if STATE_NAME in names and state_path.read_text(encoding="utf-8") != state:
        raise StoreError(f"{target} holds an unfinished pack of another model or dtype. Remove it, or finish that one.")
    if STATE_NAME not in names:
        _replace(state_path, state.encode())
    total = sum(_file_bytes(shapes, dtype) for _, _, shapes in tensors_by_file(source.config))
    done = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    needed, free = total - done + HEADROOM_BYTES, shutil.disk_usage(target).free
    if needed > free:
        raise StoreError(f"{target}: {format_bytes(needed)} needed, {format_bytes(free)} free. Free some, or go elsewhere.")


def _file_bytes(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * _itemsize(dtype) + ALIGN


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _write(source: Source, target: Path, dtype: str, progress: Callable[[PackProgress], None]) -> Store:
    files = list(tensors_by_file(source.config))
    total = sum(_file_bytes(shapes, dtype) for _, _, shapes in files)
    done, checksums, weight_map, data_bytes = 0, {}, {}, 0
    for name, key, shapes in files:
        progress(PackProgress(name, done, total))
        checksum = _finished_checksum(target / name) or _write_file(source, target / name, shapes, dtype)
        if key is not None:
            checksums[key] = checksum
        weight_map |= dict.fromkeys(shapes, name)
        done += _file_bytes(shapes, dtype)
        data_bytes += _file_bytes(shapes, dtype) - ALIGN
    source.write_side_files(target)
    config = {key: value for key, value in source.config_values().items() if key != "torch_dtype"}
    config["dtype"] = dtype
    _replace(target / "config.json", _json({key: config[key] for key in sorted(config)}))
    _replace(target / INDEX_NAME, _json({"metadata": {"total_size": data_bytes}, "weight_map": weight_map}))
    record = manifest.Manifest(dtype=dtype, source=source.path.name, checksums=checksums)
    _replace(target / manifest.NAME, record.to_json().encode())
    (target / STATE_NAME).unlink()
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
        raise CorruptFileError(f"{path} was not written by this pack; remove it and pack again")
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
        raise CorruptFileError(f"{source.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    converted: torch.Tensor = tensor.to(getattr(torch, dtype)).contiguous()
    if dtype == "float16" and not bool(converted.isfinite().all()) and bool(tensor.isfinite().all()):
        raise StoreError(f"{source.path}: tensor {name} overflows float16; pack with --dtype bfloat16 or float32")
    return memoryview(converted.view(torch.uint8).reshape(-1).numpy()).cast("B")


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
