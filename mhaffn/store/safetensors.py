"""The headers of safetensors files, read as hostile bytes.

A file is ``u64 n | n bytes of JSON | tensor bytes``; the JSON maps a name to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the end of the header.
Only headers are parsed here: what streams is moved by :mod:`mhaffn.reader`, and what a pack converts is read by
the safetensors package.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

from mhaffn.errors import CorruptFileError, StoreError, TruncatedFileError
from mhaffn.files import open_regular, parse_json, shown

if TYPE_CHECKING:
    import torch

HEADER_BYTES_MAX = 100_000_000
DIMENSIONS_MAX = 64
FETCH_AGAIN = "It is no safetensors file, or is damaged: fetch it again."
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""torch's names of the dtypes that plain weights, and scales, may have."""
DTYPES = FLOATS | {"I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn"}
"""The same with those of values in few bits."""
CODES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes lie: ``nbytes`` from ``offset`` (both in bytes, from the start of ``path``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileHeader:
    """A checked header: tensors in file order, and the file's free-form metadata."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]


def read_header(path: str | Path) -> FileHeader:
    """Reads and checks the header of one safetensors file.

    Raises :class:`StoreError` when it cannot be opened, :class:`CorruptFileError` when it contradicts
    itself, :class:`TruncatedFileError` when tensors lie beyond the end of the file.
    """
    path = os.fspath(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = _header_bytes(file, path, size)
    except FileNotFoundError:
        if Path(path).is_symlink():
            raise StoreError(
                f"{path} is a link to {shown(os.fspath(Path(path).readlink()))}, which does not exist. Mount the disk "
                f"it lies on, or fetch the missing file again."
            ) from None
        raise StoreError(f"{path} does not exist. Fetch the missing file, or download the model again.") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}. Fetch the file again.") from error
    return _parse(path, size, header)


def _header_bytes(file: BinaryIO, path: str, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CorruptFileError(f"{path}: got a file of {size} bytes, expected a header of at least 8. {FETCH_AGAIN}")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(HEADER_BYTES_MAX, size - 8):
        raise CorruptFileError(
            f"{path}: got a header of {length} bytes, expected at most {min(HEADER_BYTES_MAX, size - 8)}: "
            f"the file has {size}, and the format's limit is {HEADER_BYTES_MAX}. {FETCH_AGAIN}"
        )
    return file.read(length)


def _parse(path: str, size: int, header: bytes) -> FileHeader:
    try:
        entries = parse_json(header)
    except ValueError as error:
        raise CorruptFileError(f"{path}: the header is not valid JSON: {error}. {FETCH_AGAIN}") from error
    if not isinstance(entries, dict):
        raise CorruptFileError(f"{path}: the header is {shown(entries)}, expected a JSON object. {FETCH_AGAIN}")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError(f"{path}: __metadata__ is {shown(metadata)}, expected strings by name. {FETCH_AGAIN}")
    start = 8 + len(header)
    tensors = sorted(
        (_tensor(path, start, name, entry) for name, entry in entries.items()), key=lambda t: (t.offset, t.nbytes)
    )
    _check_cover(path, start, size, tensors)
    return FileHeader(tuple(tensors), metadata)


def _check_cover(path: str, start: int, size: int, tensors: list[TensorInfo]) -> None:
    """Tensors must follow one another, without overlap or hole, from the header to the end of the file."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise CorruptFileError(
                f"{path}: tensor {shown(tensor.name)} {problem}: got {tensor.offset}, expected {end}. {FETCH_AGAIN}"
            )
        end += tensor.nbytes
    if end > size:
        raise TruncatedFileError(
            f"{path} is truncated: got {size} bytes, expected {end}. Fetch the file again.",
            op="open", path=path, offset=size, length=end - size,
        )  # fmt: skip
    if end < size:
        raise CorruptFileError(f"{path}: got {size} bytes, expected {end}, where its tensors end. {FETCH_AGAIN}")


def _tensor(path: str, start: int, name: str, entry: Any) -> TensorInfo:
    def corrupt(what: str) -> CorruptFileError:
        return CorruptFileError(f"{path}: tensor {shown(name)}: {what}. {FETCH_AGAIN}")

    if not isinstance(entry, dict):
        raise corrupt(f"got {shown(entry)}, expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise corrupt(f"got dtype {shown(dtype)}, expected one of {', '.join(DTYPE_BITS)}")
    if not _whole_numbers(shape) or len(shape) > DIMENSIONS_MAX:
        raise corrupt(f"got shape {shown(shape)}, expected a list of at most {DIMENSIONS_MAX} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"got data_offsets {shown(offsets)}, expected [begin, end]")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    length = offsets[1] - offsets[0]
    if bits != length * 8:
        raise corrupt(
            f"got data_offsets that span {length} bytes, expected {shown(bits)} bits: {dtype} of shape {shown(shape)}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], length)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def write_header(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str], align: int) -> bytes:
    """The bytes before the data of a file whose tensors follow one another in the order given.

    ``tensors`` maps a name to (dtype, shape, bytes). Spaces pad the JSON, as the format allows, until
    the first tensor starts at a multiple of ``align``.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % align)
    return struct.pack("<Q", len(header)) + header


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The values of a tensor, on the CPU; raises :class:`StoreError` where the file no longer gives them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(info.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(info.name)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{info.path}: tensor {info.name} cannot be read: {error}. Fetch the file again.") from error
    return tensor
