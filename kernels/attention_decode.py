"""Attention of few query tokens over many keys: ``softmax(scale * q kᵀ) v``.

q [B, T, HQ, K], k and v [B, S, H, K] -> [B, T, HQ, K]; bf16, fp16, fp32; T of 1 to 64 or so.

Bound by memory: k and v are read once, ``2 * B * S * H * K`` elements. So the ``G = HQ / H`` query heads of a key head,
and the T tokens, are the rows of one tile (row ``t * G + g``), and the keys are split among enough programs to keep
every processor loading, also for short S. Each split leaves its normalised sum and log2-sum-exp in float32; a second,
small kernel weighs them together. Lengths are read on the device and the grid depends on shapes only, so a CUDA graph
stays valid while a sequence grows.

Where the GPU can, launches overlap (programmatic dependent launch): a program comes when the kernel before drains, and
while it must not read yet it asks for its first AHEAD keys and values in L2. With START the next launch may come as
soon as every program here runs, so its programs take processors one by one as they are left. No write can come too
soon: a kernel writes only after its own wait, and that waits for the whole chain before it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import tiles
from .launch import Jit, contiguous_like
from .prefetch import prefetch_rows, rows_aligned

LOG2E = 1.4426950408889634


@triton.jit
def split_range(split, splits, length, BLOCK_N: tl.constexpr):
    """The keys of a split, in whole tiles but for the last: (first, end)."""
    per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    return split * per_split, tl.minimum(split * per_split + per_split, length)


@triton.jit
def split_kernel(
    p_q, p_k, p_v, p_mask, p_lens, p_out, p_lse,
    scale_log2, T, S, H, G, rows, splits,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, m_b, m_h, m_t, m_s, o_b, o_t, o_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LENS: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One split of the keys for one tile of rows of one key head."""
    split = tl.program_id(0)
    first_row = tl.program_id(1) * BLOCK_M
    head_index = tl.program_id(2)
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)

    if AHEAD > 0:
        likely = S
        if HAS_LENS:  # may still change: it only chooses what to ask for, and must not stay in L1
            likely = tl.load(p_lens + batch, cache_modifier=".cg").to(tl.int32)
            likely = tl.maximum(tl.minimum(likely, S), 1)
        first, end = split_range(split, splits, likely, BLOCK_N)
        ahead = tl.maximum(tl.minimum(first + tl.arange(0, AHEAD), end - 1), 0).to(tl.int64)
        size = tl.full((AHEAD,), K * p_k.dtype.element_ty.primitive_bitwidth // 8, tl.int32)
        prefetch_rows(p_k + batch * k_b + head * k_h + ahead * k_s, size)
        prefetch_rows(p_v + batch * v_b + head * v_h + ahead * v_s, size)
    if OVERLAP:
        if START:
            gdc_launch_dependents()
        gdc_wait()

    length = S
    if HAS_LENS:
        length = tl.load(p_lens + batch, volatile=True).to(tl.int32)  # not the value from before the wait
    row = first_row + tl.arange(0, BLOCK_M)
    token = row // G
    query_head = head * G + row % G
    m_row = row < rows
    dim = tl.arange(0, BLOCK_K)
    m_dim = dim < K
    o_q = batch * q_b + token.to(tl.int64)[:, None] * q_t + query_head[:, None] * q_h + dim[None, :]
    b_q = tl.load(p_q + o_q, mask=m_row[:, None] & m_dim[None, :], other=0.0)

    start, end = split_range(split, splits, length, BLOCK_N)
    last = length - T + token  # the last key a row may see
    if CAUSAL:
        end = tl.minimum(end, length - T + tl.minimum(first_row + BLOCK_M - 1, rows - 1) // G + 1)

    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    p_k += batch * k_b + head * k_h
    p_v += batch * v_b + head * v_h
    for n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        key = n + tl.arange(0, BLOCK_N)
        m_key = key < end
        o_key = key.to(tl.int64)[:, None]
        m_tile = m_key[:, None] & m_dim[None, :]
        b_k = tl.load(p_k + o_key * k_s + dim[None, :], mask=m_tile, other=0.0)
        b_v = tl.load(p_v + o_key * v_s + dim[None, :], mask=m_tile, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        seen = m_key[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= last[:, None])
        if HAS_MASK:
            o_mask = batch * m_b + query_head[:, None] * m_h + token.to(tl.int64)[:, None] * m_t
            allowed = tl.load(p_mask + o_mask + o_key.trans(1, 0) * m_s, mask=m_row[:, None] & m_key[None, :], other=0)
            seen = seen & (allowed != 0)
        b_s = tl.where(seen, b_s, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        b_p = tl.exp2(b_s - shift[:, None])
        rescale = tl.exp2(b_max - shift)
        b_sum = b_sum * rescale + tl.sum(b_p, 1)
        b_acc = b_acc * rescale[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_max = new_max

    if OVERLAP and not START:
        gdc_launch_dependents()  # the combining kernel gets ready and waits for this one's end
    empty = b_sum == 0.0
    b_sum = tl.where(empty, 1.0, b_sum)
    b_out = b_acc / b_sum[:, None]
    m_out = m_row[:, None] & m_dim[None, :]
    if SPLIT:
        o_row = (split * tl.num_programs(2) + head_index).to(tl.int64) * rows + row
        tl.store(p_lse + o_row, tl.where(empty, float("-inf"), b_max + tl.log2(b_sum)), mask=m_row)
        tl.store(p_out + o_row[:, None] * K + dim[None, :], b_out, mask=m_out)
    else:
        o_out = batch * o_b + token.to(tl.int64)[:, None] * o_t + query_head[:, None] * o_h + dim[None, :]
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def combine_kernel(
    p_partial, p_lse, p_out, H, G, rows, splits, o_b, o_t, o_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: the splits' sums, weighed by their share of the softmax."""
    if OVERLAP:
        gdc_launch_dependents()  # the kernel after waits for this one's end, and so for the splits'
        gdc_wait()
    row = tl.program_id(0)
    head_index = tl.program_id(1)
    split = tl.arange(0, BLOCK_SPLITS)
    dim = tl.arange(0, BLOCK_K)
    o_row = (split * tl.num_programs(1) + head_index).to(tl.int64) * rows + row
    b_lse = tl.load(p_lse + o_row, mask=split < splits, other=float("-inf"))
    m_tile = (split < splits)[:, None] & (dim < K)[None, :]
    b_partial = tl.load(p_partial + o_row[:, None] * K + dim[None, :], mask=m_tile, other=0.0)
    top = tl.max(b_lse, 0)
    b_weight = tl.exp2(b_lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(b_weight, 0)
    b_weight = b_weight / tl.where(total == 0.0, 1.0, total)
    # A split of no weight is left out rather than multiplied by zero: its sum may not be finite.
    b_out = tl.sum(tl.where(b_weight[:, None] > 0, b_partial, 0.0) * b_weight[:, None], 0)
    batch = (head_index // H).to(tl.int64)
    query_head = (head_index % H).to(tl.int64) * G + row % G
    o_out = batch * o_b + (row // G).to(tl.int64) * o_t + query_head * o_h + dim
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=dim < K)


_split, _combine = Jit(split_kernel), Jit(combine_kernel)


@lru_cache(256)
def _blocks(
    machine: tiles.Machine, heads: int, rows: int, dim: int, s: int, element: int
) -> tuple[int, int, tiles.Tile]:
    """(BLOCK_K, BLOCK_M, tile from the table)."""
    block_k = max(16, triton.next_power_of_2(dim))  # tl.dot needs 16
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    sizes = {"element": element, "dim": block_k, "rows": block_m, "keys": s, "programs": heads}
    return block_k, block_m, tiles.tile("attention_decode", machine.arch, **sizes)


def split_count(programs: int, keys: int, block_n: int, processors: int, waves: int) -> int:
    """Splits of the keys that fill the processors ``waves`` times, none shorter than a tile."""
    wanted = max(1, processors * waves // max(1, programs))
    return max(1, min(wanted, -(-keys // block_n), 128))


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    kv_lens: Tensor | None,
    mask: Tensor | None,
    scale: float,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """q [B, T, HQ, K], k and v [B, S, H, K] (unit last stride) -> [B, T, HQ, K]. Arguments as in ``mhaffn.ops``."""
    b, t, hq, dim = q.shape
    s, h = k.shape[1], k.shape[2]
    if k.shape != (b, s, h, dim) or v.shape != k.shape or hq % h:
        raise ValueError(f"attention_decode: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    out = contiguous_like(q)
    if out.numel() == 0:
        return out
    machine = tiles.machine(q.device)
    group = hq // h
    rows = t * group
    block_k, block_m, found = _blocks(machine, b * h, rows, dim, s, q.element_size())
    tile = found if tile is None else tile
    row_tiles = -(-rows // block_m)
    splits = split_count(b * h * row_tiles, s, tile["BLOCK_N"], machine.processors, tile["WAVES"])
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty((splits, b * h, rows, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((splits, b * h, rows), dtype=torch.float32, device=q.device)
    ahead = tile.get("AHEAD", 0) if machine.overlap and rows_aligned(k) and rows_aligned(v) else 0
    wide_mask = None if mask is None else mask.expand(b, hq, t, s)
    extra = {"launch_pdl": True} if machine.overlap else {}
    _split(
        (splits, row_tiles, b * h),
        (q, k, v, wide_mask if wide_mask is None else wide_mask.view(torch.uint8), kv_lens, partial, lse),
        (scale * LOG2E,),
        (
            t, s, h, group, rows, splits, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *(wide_mask.stride() if wide_mask is not None else (0, 0, 0, 0)), *out.stride()[:3],
        ),
        K=dim, BLOCK_K=block_k, BLOCK_M=block_m, BLOCK_N=tile["BLOCK_N"],
        CAUSAL=causal and t > 1, HAS_LENS=kv_lens is not None, HAS_MASK=mask is not None, SPLIT=splits > 1,
        OVERLAP=machine.overlap, STAGES=tile["STAGES"], AHEAD=ahead, START=bool(tile.get("START", 0)),
        num_warps=tile["WARPS"], **extra,
    )  # fmt: skip
    if splits > 1:
        _combine(
            (rows, b * h, 1), (partial, lse, out), (), (h, group, rows, splits, *out.stride()[:3]),
            K=dim, BLOCK_K=block_k, BLOCK_SPLITS=triton.next_power_of_2(splits), OVERLAP=machine.overlap,
            num_warps=tile.get("COMBINE_WARPS", 2), **extra,
        )  # fmt: skip
    return out
