"""Products with weights in few bits, in CUDA C++: ``linear_few_rows.cu`` up to 16 rows, ``linear_sm90.cu`` beyond.

Launches may overlap (programmatic dependent launch), which CuPy's own launches cannot: they go to the driver.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
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


def launch(
    function: int, grid: tuple[int, int], threads: int, arguments: list[Any], stream: int, *, shared: int = 0,
    overlap: bool = False,
) -> None:  # fmt: skip
    """Launches a CUDA function; with ``overlap`` the kernel itself waits for the one before it."""
    attribute = _Attribute(OVERLAP, 0, (ctypes.c_int * 16)(1))
    configuration = _Configuration(
        (ctypes.c_uint * 3)(*grid, 1), (ctypes.c_uint * 3)(threads, 1, 1), shared, stream,
        ctypes.pointer(attribute), int(overlap),
    )  # fmt: skip
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    status = _driver().cuLaunchKernelEx(ctypes.byref(configuration), ctypes.c_void_p(function), pointers, None)
    if status:
        raise RuntimeError(f"cuLaunchKernelEx: got CUDA error {status}, expected 0")


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
        parts = (matrix.values, matrix.scales, matrix.zeros)
        arguments += [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in parts]
    arguments += [ctypes.c_void_p(out.data_ptr()), ctypes.c_longlong(x.stride(0))]
    arguments += [ctypes.c_int(n) for n in (m, rows, width, width // a.group, shift)]
    stream = torch.cuda.current_stream(index).cuda_stream
    grid = (-(-rows // (16 * tile["TILES"])), 1)
    overlap = tiles.gpu(index).overlap
    launch(function.kernel.ptr, grid, 32 * tile["WARPS"], arguments, stream, overlap=overlap)
    return out


# --- many rows, sm_90 -------------------------------------------------------------------------------------------------

SOURCE_SM90 = "linear_sm90.cu"
SM90_ROWS_MAX = 2048
"""Rows of one launch: they are first copied, in the order of the weights' columns."""


def sm90_defines(dtype: torch.dtype, format: str, scale: torch.dtype, zeros: bool, tile: tiles.Tile) -> tuple[str, ...]:
    values = {
        "HALF": int(dtype == torch.float16), "BITS": 4 if format == "int4" else 8, "FLOAT8": int(format == "fp8"),
        "SCALE": SCALES[scale], "ZEROS": int(zeros), "TOKENS": tile["TOKENS"], "STAGES": tile["STAGES"],
    }  # fmt: skip
    return tuple(f"-D{name}={value}" for name, value in values.items())


def _include_folders() -> list[str]:
    import cupy

    roots = [Path(p) for p in (cupy.cuda.get_cuda_path(), *getattr(cupy, "__path__", ())) if p]
    roots += [p for r in list(roots) for p in (r.parent / "nvidia").glob("cu*")]
    roots += [p for entry in sys.path for p in Path(entry or ".").glob("nvidia/cu*")]
    return [f"-I{root / 'include'}" for root in roots if (root / "include" / "cuda_bf16.h").exists()][:1]


@cache
def _functions_sm90(defines: tuple[str, ...], shared: int, device_index: int) -> tuple[int, int, Any]:
    """(``arrange``, ``linear_sm90``, the module that holds them), for sm_90a: CuPy itself compiles for sm_90."""
    import cupy
    from cupy_backends.cuda.libs import nvrtc as compiler

    options = ("--gpu-architecture=sm_90a", "--std=c++17", f"-I{nvrtc.SOURCES}", *_include_folders(), *defines)
    program = compiler.createProgram((nvrtc.SOURCES / SOURCE_SM90).read_text(), SOURCE_SM90, (), ())
    try:
        compiler.compileProgram(program, options)
    except Exception:
        raise RuntimeError(compiler.getProgramLog(program)) from None
    module = cupy.cuda.function.Module()
    with cupy.cuda.Device(device_index):
        module.load(compiler.getCUBIN(program))
        arrange, multiply = module.get_function("arrange").ptr, module.get_function("linear_sm90").ptr
        status = _driver().cuFuncSetAttribute(ctypes.c_void_p(multiply), 8, shared)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    if status:
        raise RuntimeError(f"cuFuncSetAttribute: got CUDA error {status}, expected 0")
    return arrange, multiply, module


def sm90_fits(x: Tensor, a: Quantized) -> bool:
    """Whether ``linear_sm90.cu`` can multiply these."""
    return x.element_size() == 2 and tiles.machine(x.device).gluon and a.values.shape[1] % 16 == 0


def many_rows(x: Tensor, a: Quantized, tile: tiles.Tile) -> Tensor:
    """x [M, D], a [ROWS, D] -> ``x aᵀ`` [M, ROWS], on sm_90."""
    width, rows = x.shape[1], a.shape[0]
    if not sm90_fits(x, a) or a.shape[1] != width:
        raise ValueError(f"many_rows: got x {x.dtype} {tuple(x.shape)}, a {a.shape} {a.format}; rows of 16 bytes each")
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    for first in range(0, x.shape[0], SM90_ROWS_MAX):
        _many_rows(x[first : first + SM90_ROWS_MAX], a, out[first : first + SM90_ROWS_MAX], tile)
    return out


def _many_rows(x: Tensor, a: Quantized, out: Tensor, tile: tiles.Tile) -> None:
    (m, width), rows = x.shape, a.shape[0]
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    tokens, shared = tile["TOKENS"], tile["STAGES"] * tile["TOKENS"] * 128
    options = sm90_defines(x.dtype, a.format, a.scales.dtype, a.zeros is not None, tile)
    arrange, multiply, _ = _functions_sm90(options, shared, index)
    blocks, token_tiles = 2 * -(-width // 128), -(-m // tokens)
    arranged = torch.empty(token_tiles * tokens * blocks * 64, dtype=x.dtype, device=x.device)
    stream = torch.cuda.current_stream(index).cuda_stream
    pointer, int32 = ctypes.c_void_p, ctypes.c_int
    arguments: list[Any] = [pointer(x.data_ptr()), pointer(arranged.data_ptr()), ctypes.c_longlong(x.stride(0))]
    arguments += [int32(n) for n in (m, width, blocks)]
    launch(arrange, (blocks // 2, token_tiles * tokens // 8), 128, arguments, stream)
    parts = (a.values, a.scales, a.zeros)
    arguments = [pointer(arranged.data_ptr())]
    arguments += [pointer(None if t is None else t.data_ptr()) for t in parts]
    arguments += [pointer(out.data_ptr())]
    shift = WHOLE_ROW if a.group == width else a.group.bit_length() - 1
    arguments += [int32(n) for n in (m, rows, width, width // a.group, shift, blocks, token_tiles)]
    launch(multiply, (-(-rows // 128) * token_tiles, 1), 384, arguments, stream, shared=shared)
