"""Products with weights in few bits, in CUDA C++: ``linear_few_rows.cu`` up to 16 rows, ``linear_sm90.cu`` beyond.

Launches may overlap (programmatic dependent launch), which CuPy's own launches cannot: they go to the driver.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantized import Quantized
from . import nvrtc, tiles
from .launch import Function, driver, stream_of

SOURCE = "linear_few_rows.cu"
ROWS_MAX = 16
SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
FEW_ROWS_ARGUMENTS = "PPPPPPPPqiiiii"
WHOLE_ROW = 31
"""The shift that makes every column of a row its group 0."""


def _parts(weight: Quantized) -> tuple[int, int, int]:
    zeros = weight.zeros
    return weight.values.data_ptr(), weight.scales.data_ptr(), 0 if zeros is None else zeros.data_ptr()


def _shift(weight: Quantized, width: int) -> int:
    return WHOLE_ROW if weight.group == width else weight.group.bit_length() - 1


def words(weight: Quantized) -> int:
    """32-bit words that a thread reads at once: four threads' lie in one group, and rows end with a thread's."""
    return _words(4 if weight.format == "int4" else 8, weight.values.shape[1], weight.group)


@cache
def _words(bits: int, row: int, group_columns: int) -> int:
    group = group_columns * bits // 8
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
    if not fits(x, a):
        return False
    columns = 1 if x.shape[0] <= 8 else 2
    tile = _table_tile(tiles.machine(x.device), 4 if a.format == "int4" else 8, columns, a.shape[0], gated)
    return bool(tile["DEFAULT"]) and nvrtc.available()


@cache
def _table_tile(machine: tiles.Machine, bits: int, columns: int, rows: int, gated: bool) -> tiles.Tile:
    kernel = "quantized_cuda_gated" if gated else "quantized_cuda"
    return tiles.tile(kernel, machine.arch, bits=bits, columns=columns, per_processor=rows // machine.processors)


@cache
def _few_rows_kernel(options: tuple[str, ...], threads: int, index: int) -> Function:
    pointer = nvrtc.function_pointer("linear_few_rows", SOURCE, (*options, f"-I{nvrtc.SOURCES}"), index)
    return Function(pointer, FEW_ROWS_ARGUMENTS, threads, overlap=tiles.gpu(index).overlap)


@cache
def _few_rows_choice(
    dtype: torch.dtype, format: str, scale: torch.dtype, zeros: bool, gated: bool, columns: int, count: int, rows: int,
    index: int,
) -> tuple[Function, int]:  # fmt: skip
    """(kernel, its tiles of 16 rows a block) from the tile table."""
    tile = _table_tile(tiles.gpu(index), 4 if format == "int4" else 8, columns, rows, gated)
    options = defines(dtype, format, scale, zeros, gated, columns, count, tile)
    return _few_rows_kernel(options, 32 * tile["WARPS"], index), tile["TILES"]


def few_rows(x: Tensor, a: Quantized, b: Quantized | None, tile: tiles.Tile | None = None) -> Tensor:
    """x [M, D] with M up to 16, a (and b, alike) [ROWS, D] -> ``x aᵀ``, or ``silu(x aᵀ) * (x bᵀ)``, [M, ROWS]."""
    m, width = x.shape
    rows, columns_of_a = a.shape
    alike = b is None or (b.shape == a.shape and b.format == a.format and b.group == a.group)
    if not (fits(x, a) and columns_of_a == width and alike):
        raise ValueError(f"few_rows: got x {tuple(x.shape)}, a {a.shape} {a.format} by {a.group}; M is at most 16")
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    kind = (x.dtype, a.format, a.scales.dtype, a.zeros is not None, b is not None, 1 if m <= 8 else 2, words(a))
    if tile is None:
        kernel, tiles_a_block = _few_rows_choice(*kind, rows, index)
    else:
        kernel, tiles_a_block = _few_rows_kernel(defines(*kind, tile), 32 * tile["WARPS"], index), tile["TILES"]
    out = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    kernel(
        (-(-rows // (16 * tiles_a_block)), 1), stream_of(index), x.data_ptr(), *_parts(a),
        *_parts(a if b is None else b), out.data_ptr(), x.stride(0), m, rows, width, width // a.group,
        _shift(a, width),
    )  # fmt: skip
    return out


# --- many rows, sm_90 -------------------------------------------------------------------------------------------------

SOURCE_SM90 = "linear_sm90.cu"
SM90_ROWS_MAX = 2048
"""Rows of one launch: they are first copied, in the order of the weights' columns."""
SHARE_MIN = 8
"""Steps of 128 columns: fewer than these are not worth a processor's start and the joining of its sums."""


def sm90_defines(
    dtype: torch.dtype, format: str, scale: torch.dtype, zeros: bool, by_row: bool, tile: tiles.Tile
) -> tuple[str, ...]:  # fmt: skip
    """The -D options of ``linear_sm90.cu``; ``by_row``: one scale a row, and no zeros."""
    values = {
        "HALF": int(dtype == torch.float16), "BITS": 4 if format == "int4" else 8, "FLOAT8": int(format == "fp8"),
        "SCALE": SCALES[scale], "ZEROS": int(zeros), "BY_ROW": int(by_row), "TOKENS": tile["TOKENS"],
        "STAGES": tile["STAGES"], "AHEAD": tile["AHEAD"],
    }  # fmt: skip
    return tuple(f"-D{name}={value}" for name, value in values.items())


def _include_folders() -> list[str]:
    import cupy

    roots = [Path(p) for p in (cupy.cuda.get_cuda_path(), *getattr(cupy, "__path__", ())) if p]
    roots += [p for r in list(roots) for p in (r.parent / "nvidia").glob("cu*")]
    roots += [p for entry in sys.path for p in Path(entry or ".").glob("nvidia/cu*")]
    return [f"-I{root / 'include'}" for root in roots if (root / "include" / "cuda_bf16.h").exists()][:1]


@dataclass(frozen=True)
class _Sm90:
    """The kernels of ``linear_sm90.cu``, and the module that holds them."""

    arrange: Function
    multiply: Function
    join: Function
    module: Any


def sm90_shared(tile: tiles.Tile) -> int:
    """Bytes of shared memory: the stages, and each group's results on their way out."""
    return int(tile["STAGES"] * tile["TOKENS"] * 128 + 2 * min(tile["TOKENS"], 128) * 144)


@cache
def _sm90(
    dtype: torch.dtype, format: str, scale: torch.dtype, zeros: bool, by_row: bool, tile: tuple[tuple[str, int], ...],
    index: int,
) -> _Sm90:
    """Compiled for sm_90a, which CuPy itself does not."""
    import cupy
    from cupy_backends.cuda.libs import nvrtc as compiler

    sizes = dict(tile)
    shared = sm90_shared(sizes)
    defined = sm90_defines(dtype, format, scale, zeros, by_row, sizes)
    options = ("--gpu-architecture=sm_90a", "--std=c++17", f"-I{nvrtc.SOURCES}", *_include_folders(), *defined)
    program = compiler.createProgram((nvrtc.SOURCES / SOURCE_SM90).read_text(), SOURCE_SM90, (), ())
    try:
        compiler.compileProgram(program, options)
    except Exception:
        raise RuntimeError(compiler.getProgramLog(program)) from None
    module = cupy.cuda.function.Module()
    with cupy.cuda.Device(index):
        module.load(compiler.getCUBIN(program))
        arrange, multiply, join = (module.get_function(name).ptr for name in ("arrange", "linear_sm90", "join"))
        status = driver().cuFuncSetAttribute(ctypes.c_void_p(multiply), 8, shared)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    if status:
        raise RuntimeError(f"cuFuncSetAttribute: got CUDA error {status}, expected 0")
    return _Sm90(
        Function(arrange, "PPqiii", 128),
        Function(multiply, "PPPPPPiiiiiiiiii", 384, shared, overlap=True),
        Function(join, "PPiiiii", 128, overlap=True),
        module,
    )


def sm90_fits(x: Tensor, a: Quantized) -> bool:
    """Whether ``linear_sm90.cu`` can multiply these."""
    return x.element_size() == 2 and tiles.machine(x.device).gluon and a.values.shape[1] % 16 == 0


@cache
def division(count: int, steps: int, ahead: int, processors: int) -> tuple[int, int]:
    """(tiles left whole, equal parts that each of the others is cut into), for a full last round.

    ``count`` tiles of results are of ``steps`` times 128 columns, loaded ``ahead`` at a time. Each processor gets one
    part at most, and all parts run through their columns together: x then comes from L2 for all at once. Sums of
    parts in float32 take a tile a processor: 17 MiB.
    """
    whole = count // processors * processors
    parts = (
        p for p in range(steps // SHARE_MIN, 1, -1) if steps % (p * ahead) == 0 and (count - whole) * p <= processors
    )
    return next(((whole, p) for p in parts if whole < count), (count, 1))


@cache
def _sm90_tile(machine: tiles.Machine, bits: int, tokens: int, rows: int) -> tiles.Tile:
    per_processor = rows // machine.processors
    return tiles.tile("quantized_sm90", machine.arch, bits=bits, rows=tokens, per_processor=per_processor)


def many_rows_chosen(x: Tensor, a: Quantized) -> bool:
    """Whether ``linear_sm90.cu`` is the default here."""
    if not sm90_fits(x, a):
        return False
    tile = _sm90_tile(tiles.machine(x.device), 4 if a.format == "int4" else 8, x.shape[0], a.shape[0])
    return bool(tile["DEFAULT"]) and nvrtc.available()


def many_rows(x: Tensor, a: Quantized, tile: tiles.Tile | None = None, cut: tuple[int, int] | None = None) -> Tensor:
    """x [M, D], a [ROWS, D] -> ``x aᵀ`` [M, ROWS], on sm_90; ``cut`` as :func:`division` gives it."""
    width, rows = x.shape[1], a.shape[0]
    if not sm90_fits(x, a) or a.shape[1] != width:
        raise ValueError(f"many_rows: got x {x.dtype} {tuple(x.shape)}, a {a.shape} {a.format}; rows of 16 bytes each")
    if tile is None:
        tile = _sm90_tile(tiles.machine(x.device), 4 if a.format == "int4" else 8, x.shape[0], rows)
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    for first in range(0, x.shape[0], SM90_ROWS_MAX):
        _many_rows(x[first : first + SM90_ROWS_MAX], a, out[first : first + SM90_ROWS_MAX], tile, cut)
    return out


def _many_rows(x: Tensor, a: Quantized, out: Tensor, tile: tiles.Tile, cut: tuple[int, int] | None) -> None:
    (m, width), rows = x.shape, a.shape[0]
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    tokens, ahead = tile["TOKENS"], tile["AHEAD"]
    zeros = a.zeros is not None
    by_row = a.group == width and not zeros
    kernels = _sm90(x.dtype, a.format, a.scales.dtype, zeros, by_row, tuple(tile.items()), index)
    steps, token_tiles = -(-width // (128 * ahead)) * ahead, -(-m // tokens)
    count, columns = -(-rows // 128) * token_tiles, 2 * steps  # blocks of 64, past the width zeros
    processors = tiles.gpu(index).processors
    whole, parts = cut or division(count, steps, ahead, processors)
    tail = count - whole
    one_each = 0 <= tail * parts <= processors and (tail == 0 or whole % processors == 0)
    if not one_each or steps % (parts * ahead):
        raise ValueError(f"many_rows: got {whole} of {count} tiles whole and {parts} parts, on {processors} processors")
    arranged = torch.empty(token_tiles * tokens * columns * 64, dtype=x.dtype, device=x.device)
    sums = torch.empty(tail * parts * tokens * 128, dtype=torch.float32, device=x.device) if tail else None
    sums_at = 0 if sums is None else sums.data_ptr()
    stream = stream_of(index)
    kernels.arrange(
        (columns // 2, token_tiles * tokens // 8), stream, x.data_ptr(), arranged.data_ptr(), x.stride(0), m, width,
        columns,
    )  # fmt: skip
    kernels.multiply(
        (min(processors, max(whole, tail * parts)), 1), stream, arranged.data_ptr(), *_parts(a), out.data_ptr(),
        sums_at, m, rows, width, width // a.group, _shift(a, width), columns, token_tiles, whole, columns // parts,
        tail,
    )  # fmt: skip
    if tail:
        kernels.join((tail * tokens, 1), stream, sums_at, out.data_ptr(), m, rows, token_tiles, whole, parts)
