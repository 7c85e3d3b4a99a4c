"""Attention of one query token over many keys in CUDA C++, ``attention_decode.cu``: the sibling of what
``attention_decode.py`` does in Triton, for groups of up to 8 heads of 64 or 128, bf16 and fp16, without a mask.

The splits of the keys are joined by a second kernel. Lengths are read on the device and grids depend on shapes only.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import nvrtc, tiles
from .launch import INT32_MAX, Function, contiguous_like, stream_of

SOURCE = "attention_decode.cu"
DIMS = (64, 128)
GROUP_MAX = 8
SPLITS_MAX = 128
GRID_MAX = 65535
STEP = 16
"""Keys that a warp takes at a time."""
COMPILED = ("WARPS", "BLOCKS", "DEPTH", "AHEAD")
"""What of a tile the kernel is compiled with. INTERLEAVED and WAVES only change how it is launched."""
LOG2E = 1.4426950408889634


def defines(half: bool, dim: int, tile: tiles.Tile) -> tuple[str, ...]:
    """The -D options of ``attention_decode.cu``."""
    values = {"HALF": int(half), "DIM": dim, **{name: tile[name] for name in COMPILED}}
    return tuple(f"-D{name}={value}" for name, value in values.items())


class Plan(NamedTuple):
    """What is launched for calls of one kind."""

    split: Function
    combine: Function | None
    splits: int
    interleaved: int


@cache
def _kernels(options: tuple[str, ...], warps: int, index: int) -> tuple[Function, Function]:
    split, combine = (nvrtc.function_pointer(n, SOURCE, options, index) for n in ("attention_decode", "combine"))
    overlap = tiles.gpu(index).overlap
    return (
        Function(split, "PPPPPPPqqqqqqqqqqfiiiiii", 32 * warps, overlap=overlap),
        Function(combine, "PPPqqiii", 128, overlap=overlap),
    )


def split_count(programs: int, keys: int, processors: int, tile: tiles.Tile) -> int:
    """Splits of the keys: as many as give each processor WAVES blocks, each with a step a warp at least."""
    wanted = max(1, processors * tile["WAVES"] // programs)
    return max(1, min(wanted, -(-keys // (STEP * tile["WARPS"])), SPLITS_MAX))


def plan(half: bool, dim: int, programs: int, keys: int, index: int, tile: tiles.Tile) -> Plan:
    split, combine = _kernels(defines(half, dim, tile), tile["WARPS"], index)
    splits = split_count(programs, keys, tiles.gpu(index).processors, tile)
    return Plan(split, combine if splits > 1 else None, splits, tile["INTERLEAVED"])


def _tile(machine: tiles.Machine, dim: int, programs: int, keys: int) -> tiles.Tile:
    return tiles.tile("attention_decode_cuda", machine.arch, dim=dim, programs=programs, keys=keys)


@lru_cache(256)
def _plan(half: bool, dim: int, programs: int, keys: int, index: int) -> Plan:
    return plan(half, dim, programs, keys, index, _tile(tiles.gpu(index), dim, programs, keys))


@lru_cache(256)
def _default(machine: tiles.Machine, dim: int, programs: int, keys: int) -> bool:
    return bool(_tile(machine, dim, programs, keys)["DEFAULT"])


def fits(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, mask: Tensor | None) -> bool:
    """Whether this kernel can read these tensors."""
    b, t, heads, dim = q.shape
    if t != 1 or mask is not None or q.element_size() != 2 or dim not in DIMS or k.numel() == 0:
        return False
    if heads > GROUP_MAX * k.shape[2] or b * k.shape[2] > GRID_MAX or k.shape[1] > INT32_MAX - 128 * STEP:
        return False
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return False
    (q_b, _, q_h, _), (k_b, k_s, k_h, _), (v_b, v_s, v_h, _) = q.stride(), k.stride(), v.stride()
    if (q_b | q_h | k_b | k_s | k_h | v_b | v_s | v_h) % 8:
        return False
    return kv_lens is None or (kv_lens.dtype in (torch.int32, torch.int64) and kv_lens.is_contiguous())


def chosen(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, mask: Tensor | None) -> bool:
    """Whether this kernel, rather than its Triton sibling, is the default here."""
    if not fits(q, k, v, kv_lens, mask):
        return False
    b, s, h, dim = k.shape
    return _default(tiles.machine(q.device), dim, b * h, s) and nvrtc.available()


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, scale: float, chosen_plan: Plan | None = None
) -> Tensor:
    """q [B, 1, HQ, K], k and v [B, S, H, K] (unit last stride) -> [B, 1, HQ, K]; as :func:`fits` wants them."""
    b, _, h, dim = k.shape
    heads = q.shape[2]
    if v.shape != k.shape or q.shape != (b, 1, heads, dim) or heads % h or not fits(q, k, v, kv_lens, None):
        raise ValueError(
            f"attention_decode: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} of {q.dtype}; one "
            f"token, groups of at most {GROUP_MAX}, heads of {DIMS}, 16-byte aligned rows, lengths in int32 or int64"
        )
    return launch(q, k, v, kv_lens, scale, chosen_plan)


def launch(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, scale: float, chosen_plan: Plan | None = None
) -> Tensor:
    """:func:`attention_decode` of what :func:`chosen` has looked at."""
    b, s, h, dim = k.shape
    heads = q.shape[2]
    index = torch.cuda.current_device() if q.device.index is None else q.device.index
    half = q.dtype == torch.float16
    found = _plan(half, dim, b * h, s, index) if chosen_plan is None else chosen_plan
    split, combine, splits, interleaved = found
    group = heads // h
    out = contiguous_like(q)
    partial_at = lse_at = 0
    if combine is not None:
        partial = torch.empty(splits * b * heads * (dim + 1), dtype=torch.float32, device=q.device)
        partial_at = partial.data_ptr()
        lse_at = partial_at + splits * b * heads * dim * 4
    lens_at, lens_words = (0, 0) if kv_lens is None else (kv_lens.data_ptr(), kv_lens.element_size() // 4)
    (q_b, _, q_h, _), (k_b, k_s, k_h, _), (v_b, v_s, v_h, _) = q.stride(), k.stride(), v.stride()
    stream = stream_of(index)
    split(
        (splits, b * h), stream, q.data_ptr(), k.data_ptr(), v.data_ptr(), lens_at,
        out.data_ptr(), partial_at, lse_at, q_b, q_h, k_b, k_s, k_h, v_b, v_s, v_h, heads * dim, dim, scale * LOG2E, s,
        h, group, splits, interleaved, lens_words,
    )  # fmt: skip
    if combine is not None:
        combine((group, b * h), stream, partial_at, lse_at, out.data_ptr(), heads * dim, dim, h, group, splits)
    return out
