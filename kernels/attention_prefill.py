"""Attention of many query tokens: ``softmax(scale * q kᵀ) v`` (FlashAttention-2, arXiv 2307.08691).

q [B, T, HQ, K], k and v [B, S, H, K] -> [B, T, HQ, K]; bf16, fp16, fp32.

Bound by arithmetic: ``4 * B * HQ * T * S * K`` operations, half of that when causal and T = S. One program owns a tile
of query rows of one query head and walks the keys with a running maximum and sum. Grouped heads read their key head in
place. Causal: key tiles past the last visible key are never loaded, tiles before the first row's diagonal run without
a mask, and the longest rows start first. A padding mask and per-sequence lengths are applied in the walk. Exponentials
are base 2. Where the GPU has a copy engine for tiles (sm_90 and later) and strides allow, it loads k and v.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles

LOG2E = 1.4426950408889634


@triton.jit
def load_keys(
    p_x, batch, head, n, end, stride_s, dim,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """A tile of k or v, [BLOCK_N, BLOCK_K]; zero past the tensor; rows past ``end`` are the caller's to mask."""
    if DESCRIPTOR:
        b_x = p_x.load([batch.to(tl.int32), head.to(tl.int32), n, 0]).reshape(BLOCK_N, BLOCK_K)
    else:
        key = n + tl.arange(0, BLOCK_N)
        p_tile = p_x + key.to(tl.int64)[:, None] * stride_s + dim[None, :]
        if MASKED:
            b_x = tl.load(p_tile, mask=(key < end)[:, None] & (dim < K)[None, :], other=0.0)
        elif K == BLOCK_K:
            b_x = tl.load(p_tile)
        else:
            b_x = tl.load(p_tile, mask=(dim < K)[None, :], other=0.0)
    return b_x


@triton.jit
def walk(
    b_acc, b_sum, b_max, b_q, p_k, p_v, p_mask_row, batch, head, row, start, end, length, diagonal, scale_log2,
    k_s, v_s, m_s, dim, m_row,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    HAS_MASK: tl.constexpr, MASK_ROWS: tl.constexpr, DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys ``start`` to ``end`` in tiles. MASKED: at the diagonal or at the end of the keys."""
    for n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        key = n + tl.arange(0, BLOCK_N)
        b_k = load_keys(p_k, batch, head, n, length, k_s, dim, K, BLOCK_K, BLOCK_N, MASKED, DESCRIPTOR)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            seen = (key < length)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= (row + diagonal)[:, None])
            b_s = tl.where(seen, b_s, float("-inf"))
        if HAS_MASK:
            if MASK_ROWS:
                p_tile = p_mask_row[:, None] + key.to(tl.int64)[None, :] * m_s
                allowed = tl.load(p_tile, mask=m_row[:, None] & (key < length)[None, :], other=0) != 0
            else:
                allowed = (tl.load(p_mask_row + key.to(tl.int64) * m_s, mask=key < length, other=0) != 0)[None, :]
            b_s = tl.where(allowed, b_s, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        shift = new_max
        if MASKED or HAS_MASK:
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        b_p = tl.exp2(b_s * scale_log2 - shift[:, None])
        rescale = tl.exp2(b_max - shift)
        b_sum = b_sum * rescale + tl.sum(b_p, 1)
        b_acc = b_acc * rescale[:, None]
        b_v = load_keys(p_v, batch, head, n, length, v_s, dim, K, BLOCK_K, BLOCK_N, MASKED, DESCRIPTOR)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_max = new_max
    return b_acc, b_sum, b_max


@triton.jit
def prefill_kernel(
    p_q, p_k, p_v, p_mask, p_lens, p_out,
    scale_log2, T, S, G,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, m_b, m_h, m_t, m_s, o_b, o_t, o_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LENS: tl.constexpr, HAS_MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one query head."""
    query_head = tl.program_id(0).to(tl.int64)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows first
    batch = tl.program_id(2).to(tl.int64)
    head = query_head // G
    length = S
    if HAS_LENS:
        length = tl.load(p_lens + batch).to(tl.int32)

    row = first_row + tl.arange(0, BLOCK_M)
    m_row = row < T
    dim = tl.arange(0, BLOCK_K)
    m_q = m_row[:, None] & (dim < K)[None, :]
    o_q = batch * q_b + row.to(tl.int64)[:, None] * q_t + query_head * q_h + dim[None, :]
    b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)
    if not DESCRIPTOR:
        p_k += batch * k_b + head * k_h
        p_v += batch * v_b + head * v_h
    p_mask_row = p_mask
    if HAS_MASK:
        p_mask_row = p_mask + batch * m_b + query_head * m_h
        if MASK_ROWS:
            p_mask_row += row.to(tl.int64) * m_t

    diagonal = length - T  # row i sees keys up to i + diagonal
    end = length
    whole = length
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(length, tl.minimum(first_row + BLOCK_M, T) + diagonal))
        whole = tl.maximum(0, tl.minimum(length, first_row + diagonal + 1))
    whole = whole // BLOCK_N * BLOCK_N  # keys below it are seen by every row of the tile

    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    b_acc, b_sum, b_max = walk(
        b_acc, b_sum, b_max, b_q, p_k, p_v, p_mask_row, batch, head, row, 0, whole, length, diagonal, scale_log2,
        k_s, v_s, m_s, dim, m_row,
        K, BLOCK_K, BLOCK_N, CAUSAL, False, HAS_MASK, MASK_ROWS, DESCRIPTOR, STAGES,
    )  # fmt: skip
    b_acc, b_sum, b_max = walk(
        b_acc, b_sum, b_max, b_q, p_k, p_v, p_mask_row, batch, head, row, whole, end, length, diagonal, scale_log2,
        k_s, v_s, m_s, dim, m_row,
        K, BLOCK_K, BLOCK_N, CAUSAL, True, HAS_MASK, MASK_ROWS, DESCRIPTOR, STAGES,
    )  # fmt: skip
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_out = batch * o_b + row.to(tl.int64)[:, None] * o_t + query_head * o_h + dim[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q)


def descriptor_fits(x: Tensor) -> bool:
    """Whether the copy engine can address x [B, S, H, K]: 16-byte aligned base and strides, no broadcast."""
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 and stride > 0 for stride in x.stride()[:3])
    return aligned and x.numel() > 0


def attention_prefill(
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
        raise ValueError(f"attention_prefill: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    out = torch.empty((b, t, hq, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    arch = tiles.machine(q.device).arch
    block_k = max(16, triton.next_power_of_2(dim))  # tl.dot needs 16
    if tile is None:
        tile = tiles.tile("attention_prefill", arch, element=q.element_size(), dim=block_k)
    block_n = tile["BLOCK_N"]
    descriptor = bool(tile["DESCRIPTOR"]) and descriptor_fits(k) and descriptor_fits(v)
    keys, values = k, v
    if descriptor:
        block = [1, 1, block_n, block_k]
        keys, values = (TensorDescriptor.from_tensor(x.transpose(1, 2), block) for x in (k, v))
    wide_mask = None if mask is None else mask.expand(b, hq, t, s)
    mask_rows = wide_mask is not None and wide_mask.stride(2) != 0
    prefill_kernel[(hq, triton.cdiv(t, tile["BLOCK_M"]), b)](
        q, keys, values, None if wide_mask is None else wide_mask.view(torch.uint8), kv_lens, out,
        scale * LOG2E, t, s, hq // h,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(wide_mask.stride() if wide_mask is not None else (0, 0, 0, 0)), *out.stride()[:3],
        K=dim, BLOCK_K=block_k, BLOCK_M=tile["BLOCK_M"], BLOCK_N=block_n,
        CAUSAL=causal, HAS_LENS=kv_lens is not None, HAS_MASK=mask is not None, MASK_ROWS=mask_rows,
        DESCRIPTOR=descriptor, STAGES=tile["STAGES"], num_warps=tile["WARPS"],
    )  # fmt: skip
    return out
