"""Kernels in CUDA C++, compiled at run time through CuPy (imported here only, and only when one is first used)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .launch import Function, stream_of

SOURCES = Path(__file__).parent / "cuda"
FEW_ROWS_MAX = 16


@cache
def available() -> bool:
    """Whether CuPy is installed and its compiler works here."""
    try:
        _module("ffn_few_rows.cu", few_rows_defines(False, False, 1, DEFAULT_TILE), torch.cuda.current_device())
    except Exception:  # CuPy missing, or its headers or compiler: the Triton sibling runs instead
        return False
    return True


DEFAULT_TILE = {"TILES": 1, "WARPS": 8, "STEPS": 2, "BLOCKS": 2}


def few_rows_defines(half: bool, gated: bool, columns: int, tile: tiles.Tile) -> tuple[str, ...]:
    """The -D options of ``ffn_few_rows.cu``."""
    chosen = {name: tile[name] for name in ("TILES", "WARPS", "STEPS", "BLOCKS")}
    defines = {"HALF": int(half), "GATED": int(gated), "COLUMNS": columns, **chosen}
    return tuple(f"-D{name}={value}" for name, value in defines.items())


@cache
def _module(source: str, defines: tuple[str, ...], device_index: int) -> Any:
    import cupy

    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(code=(SOURCES / source).read_text(), options=("--std=c++17", *defines))
        module.compile()
        return module


def function_pointer(name: str, source: str, defines: tuple[str, ...], device_index: int) -> int:
    """A function as the driver takes it, compiled for that GPU."""
    import cupy

    with cupy.cuda.Device(device_index):  # CuPy gives the current one's
        return int(_module(source, defines, device_index).get_function(name).kernel.ptr)


@cache
def _few_rows_kernel(
    half: bool, gated: bool, columns: int, rows: int, index: int, tile: tuple[tuple[str, int], ...] = ()
) -> tuple[Function, int]:
    """The kernel of a tile, else of the table's for so many rows, and how many rows one block of it makes."""
    sizes = dict(tile) or _tile(tiles.gpu(index), columns, rows, gated)
    pointer = function_pointer("ffn_few_rows", "ffn_few_rows.cu", few_rows_defines(half, gated, columns, sizes), index)
    return Function(pointer, "PPPPqiii", 32 * sizes["WARPS"]), 16 * sizes["TILES"]


def chosen(x: Tensor, a: Tensor, gated: bool) -> bool:
    """Whether this kernel, rather than its Triton sibling, is the default for ``few_rows(x, a, …)``."""
    m, width = x.shape
    if m > FEW_ROWS_MAX or width % 8 or x.stride(0) % 8 or x.data_ptr() % 16 or x.dtype == torch.float32:
        return False
    return bool(_tile(tiles.machine(x.device), 1 if m <= 8 else 2, a.shape[0], gated)["DEFAULT"]) and available()


@cache
def _tile(machine: tiles.Machine, columns: int, rows: int, gated: bool) -> tiles.Tile:
    kernel = "few_rows_cuda_gated" if gated else "few_rows_cuda"
    return tiles.tile(kernel, machine.arch, columns=columns, per_processor=rows // machine.processors)


def few_rows(x: Tensor, a: Tensor, b: Tensor | None, tile: tiles.Tile | None = None) -> Tensor:
    """x [M, D] with M up to 16, a (and b) [ROWS, D] -> ``x aᵀ``, or ``silu(x aᵀ) * (x bᵀ)``, [M, ROWS].

    bf16 or fp16, everything 16-byte aligned, D a multiple of 8.
    """
    m, width = x.shape
    rows = a.shape[0]
    if m > FEW_ROWS_MAX or width % 8 or a.shape != (rows, width) or (b is not None and b.shape != a.shape):
        raise ValueError(f"few_rows: got x {tuple(x.shape)}, a {tuple(a.shape)}; M is at most 16, D a multiple of 8")
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    given = () if tile is None else tuple(tile.items())
    kernel, block = _few_rows_kernel(x.dtype == torch.float16, b is not None, 1 if m <= 8 else 2, rows, index, given)
    out = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    kernel(
        (-(-rows // block), 1), stream_of(index), x.data_ptr(), a.data_ptr(),
        a.data_ptr() if b is None else b.data_ptr(), out.data_ptr(), x.stride(0), m, rows, width,
    )  # fmt: skip
    return out


def ffn_few_rows(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The whole FFN for M up to 16: x [M, D] -> [M, D]."""
    return few_rows(few_rows(x, w1, w3), w2, None)
