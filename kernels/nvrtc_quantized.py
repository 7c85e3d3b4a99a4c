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
    arrange_gated: Function
    multiply: Function
    join: Function
    module: Any


def sm90_shared(tile: tiles.Tile) -> int:
    """Bytes of shared memory: the stages, and each group's results on their way out."""
    return int(tile["STAGES"] * tile["TOKENS"] * 128 + 2 * min(tile["TOKENS"], 128) * 144)


@cache
def _sm90(
    dtype: torch.dtype,
    format: str,
    scale: torch.dtype,
    zeros: bool,
    by_row: bool,
    tile: tuple[tuple[str, int], ...],
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
        names = ("arrange", "arrange_gated", "linear_sm90", "join")
        arrange, arrange_gated, multiply, join = (module.get_function(name).ptr for name in names)
        status = driver().cuFuncSetAttribute(ctypes.c_void_p(multiply), 8, shared)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    if status:
        raise RuntimeError(f"cuFuncSetAttribute: got CUDA error {status}, expected 0")
    return _Sm90(
        Function(arrange, "PPqiii", 128),
        Function(arrange_gated, "PPPqiii", 128),
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
    for part, to in zip(x.split(SM90_ROWS_MAX), out.split(SM90_ROWS_MAX), strict=True):
        _multiply(_arrange(part, None, a, tile), part, a, tile, cut, to)
    return out


def gate_up_down(x: Tensor, w1: Quantized, w3: Quantized, w2: Quantized) -> Tensor:
    """``w2 (silu(w1 x) * w3 x)``, x [M, D] -> [M, D]: x is arranged once, and the product of gate and up on its way."""
    out = torch.empty((x.shape[0], w2.shape[0]), dtype=x.dtype, device=x.device)
    machine, bits = tiles.machine(x.device), [4 if a.format == "int4" else 8 for a in (w1, w2)]
    for part, to in zip(x.split(SM90_ROWS_MAX), out.split(SM90_ROWS_MAX), strict=True):
        tile, tile_down = (_sm90_tile(machine, b, x.shape[0], a.shape[0]) for b, a in zip(bits, (w1, w2), strict=True))
        gate, up = (part.new_empty((part.shape[0], w1.shape[0])) for _ in range(2))
        arranged = _arrange(part, None, w1, tile)
        _multiply(arranged, part, w1, tile, None, gate)
        _multiply(arranged, part, w3, tile, None, up)
        del arranged
        _multiply(_arrange(gate, up, w2, tile_down), gate, w2, tile_down, None, to)
    return out


def gate_up_down_chosen(x: Tensor, w1: Quantized, w3: Quantized, w2: Quantized) -> bool:
    """Whether that is the default here."""
    alike = w1.shape == w3.shape and (w1.format == "int4") == (w3.format == "int4")
    return alike and all(many_rows_chosen(x, a) for a in (w1, w2)) and sm90_fits(x, w3)


def _kernels(x: Tensor, a: Quantized, tile: tiles.Tile) -> tuple[_Sm90, int]:
    """The kernels for these, and their GPU."""
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    zeros = a.zeros is not None
    by_row = a.group == a.shape[1] and not zeros
    return _sm90(x.dtype, a.format, a.scales.dtype, zeros, by_row, tuple(tile.items()), index), index


def _steps(width: int, tile: tiles.Tile) -> int:
    return -(-width // (128 * tile["AHEAD"])) * tile["AHEAD"]


def _arrange(x: Tensor, up: Tensor | None, a: Quantized, tile: tiles.Tile) -> Tensor:
    """x, or ``silu(x) * up``, in the order in which products with ``a`` take it; past the width zeros."""
    (m, width), blocks = x.shape, 2 * _steps(x.shape[1], tile)  # of 64 columns
    kernels, index = _kernels(x, a, tile)
    token_rows = -(-m // tile["TOKENS"]) * tile["TOKENS"]
    arranged = torch.empty(token_rows * blocks * 64, dtype=x.dtype, device=x.device)
    grid, rest = (blocks // 2, token_rows // 16), (arranged.data_ptr(), x.stride(0), m, width, blocks)
    if up is None:
        kernels.arrange(grid, stream_of(index), x.data_ptr(), *rest)
    else:
        kernels.arrange_gated(grid, stream_of(index), x.data_ptr(), up.data_ptr(), *rest)
    return arranged


def _multiply(
    arranged: Tensor, x: Tensor, a: Quantized, tile: tiles.Tile, cut: tuple[int, int] | None, out: Tensor
) -> None:  # fmt: skip
    (m, width), rows = x.shape, a.shape[0]
    kernels, index = _kernels(x, a, tile)
    tokens, steps = tile["TOKENS"], _steps(width, tile)
    token_tiles = -(-m // tokens)
    count = -(-rows // 128) * token_tiles
    processors = tiles.gpu(index).processors
    whole, parts = cut or division(count, steps, tile["AHEAD"], processors)
    tail = count - whole
    one_each = 0 <= tail * parts <= processors and (tail == 0 or whole % processors == 0)
    if not one_each or steps % (parts * tile["AHEAD"]):
        raise ValueError(f"many_rows: got {whole} of {count} tiles whole and {parts} parts, on {processors} processors")
    sums = torch.empty(tail * parts * tokens * 128, dtype=torch.float32, device=x.device) if tail else None
    sums_at = 0 if sums is None else sums.data_ptr()
    kernels.multiply(
        (min(processors, max(whole, tail * parts)), 1), stream_of(index), arranged.data_ptr(), *_parts(a),
        out.data_ptr(), sums_at, m, rows, width, width // a.group, _shift(a, width), 2 * steps, token_tiles, whole,
        2 * steps // parts, tail,
    )  # fmt: skip
    if tail:
        kernels.join((tail * tokens, 1), stream_of(index), sums_at, out.data_ptr(), m, rows, token_tiles, whole, parts)
