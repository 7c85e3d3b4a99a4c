"""``cuda/linear_few_rows.cu``: products of up to 16 rows with weights in few bits, in CUDA C++.

Its launches may overlap (programmatic dependent launch), which CuPy's own launches cannot: they go to the driver.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..quantized import Quantized
from . import nvrtc, tiles

SOURCE = "linear_few_rows.cu"
ROWS_MAX = 16
SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
WHOLE_ROW = 31
"""The shift that makes every column of a row its group 0."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Configuration(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def launch(function: Any, blocks: int, threads: int, arguments: list[Any], stream: int, shared: int = 0) -> None:
    """Launches a CuPy function; the kernel itself waits for the one before (``griddepcontrol.wait``)."""
    attribute = _Attribute(OVERLAP, 0, (ctypes.c_int * 16)(1))
    configuration = _Configuration(
        (ctypes.c_uint * 3)(blocks, 1, 1), (ctypes.c_uint * 3)(threads, 1, 1), shared, stream,
        ctypes.pointer(attribute), int(_overlaps()),
    )  # fmt: skip
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    status = _driver().cuLaunchKernelEx(
        ctypes.byref(configuration), ctypes.c_void_p(function.kernel.ptr), pointers, None
    )
    if status:
        raise RuntimeError(f"cuLaunchKernelEx: got CUDA error {status}, expected 0")


def _overlaps() -> bool:
    return tiles.gpu(torch.cuda.current_device()).overlap


def words(weight: Quantized) -> int:
    """32-bit words that a thread reads at once: four threads' lie in one group, and rows end with a thread's."""
    bits = 4 if weight.format == "int4" else 8
    row, group = weight.shape[1] * bits // 8, weight.group * bits // 8
    for count in (4, 2, 1):
        if row % (4 * count) == 0 and (group == row or group % (16 * count) == 0):
            return count
    return 0


def defines(
    dtype: torch.dtype, format: str, scale: torch.dtype, zeros: bool, gated: bool, columns: int, count: int,
    tile: tiles.Tile,
) -> tuple[str, ...]:  # fmt: skip
    """The -D options of ``linear_few_rows.cu``."""
    chosen = {name: tile[name] for name in ("TILES", "WARPS", "STEPS", "BLOCKS")}
    values = {
        "HALF": int(dtype == torch.float16), "BITS": 4 if format == "int4" else 8, "FLOAT8": int(format == "fp8"),
        "SCALE": SCALES[scale], "ZEROS": int(zeros), "GATED": int(gated), "COLUMNS": columns, "WORDS": count, **chosen,
    }  # fmt: skip
    return tuple(f"-D{name}={value}" for name, value in values.items())


def fits(x: Tensor, a: Quantized) -> bool:
    """Whether this kernel can read these tensors."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0
    return x.shape[0] <= ROWS_MAX and aligned and x.dtype != torch.float32 and words(a) > 0


def chosen(x: Tensor, a: Quantized, gated: bool) -> bool:
    """Whether this kernel, rather than its Triton sibling, is the default here."""
    return fits(x, a) and bool(_tile(x, a, gated)["DEFAULT"]) and nvrtc.available()


def _tile(x: Tensor, a: Quantized, gated: bool) -> tiles.Tile:
    machine = tiles.machine(x.device)
    kernel = "quantized_cuda_gated" if gated else "quantized_cuda"
    bits = 4 if a.format == "int4" else 8
    columns = 1 if x.shape[0] <= 8 else 2
    per_processor = a.shape[0] // machine.processors
    return tiles.tile(kernel, machine.arch, bits=bits, columns=columns, per_processor=per_processor)


def few_rows(x: Tensor, a: Quantized, b: Quantized | None, tile: tiles.Tile | None = None) -> Tensor:
    """x [M, D] with M up to 16, a (and b, alike) [ROWS, D] -> ``x aᵀ``, or ``silu(x aᵀ) * (x bᵀ)``, [M, ROWS]."""
    m, width = x.shape
    rows = a.shape[0]
    alike = b is None or (b.shape == a.shape and b.format == a.format and b.group == a.group)
    if not (fits(x, a) and a.shape[1] == width and alike):
        raise ValueError(f"few_rows: got x {tuple(x.shape)}, a {a.shape} {a.format} by {a.group}; M is at most 16")
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    tile = _tile(x, a, b is not None) if tile is None else tile
    options = defines(
        x.dtype, a.format, a.scales.dtype, a.zeros is not None, b is not None, 1 if m <= 8 else 2, words(a), tile
    )
    function = nvrtc._function("linear_few_rows", SOURCE, (*options, f"-I{nvrtc.SOURCES}"), index)
    out = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    shift = WHOLE_ROW if a.group == width else a.group.bit_length() - 1
    arguments: list[Any] = [ctypes.c_void_p(x.data_ptr())]
    for matrix in (a, a if b is None else b):
        arguments += [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (matrix.values, matrix.scales, matrix.zeros)]
    arguments += [ctypes.c_void_p(out.data_ptr()), ctypes.c_longlong(x.stride(0))]
    arguments += [ctypes.c_int(n) for n in (m, rows, width, width // a.group, shift)]
    stream = torch.cuda.current_stream(index).cuda_stream
    launch(function, -(-rows // (16 * tile["TILES"])), 32 * tile["WARPS"], arguments, stream)
    return out
