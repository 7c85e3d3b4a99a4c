"""Rotary position embedding (RoFormer, arXiv 2104.09864): pairs of a head's elements turn by ``position * frequency``.

q [B, T, HQ, K], k [B, T, H, K]; cos, sin [B|1, T, K/2] or [T, K/2] in float32 (any frequency scaling is in them).
Pairs are ``(i, i + K/2)`` (half-split) or ``(2i, 2i + 1)`` (interleaved). Computed in float32, rounded once.

Bound by memory: q and k are read and written once. One program turns eight heads of a token or a few, q's and k's
in one launch. :func:`rope_write` puts the turned keys, and the values, straight into a cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import tiles
from .launch import Jit, contiguous_like

PAIRS, HEADS, WARPS = 1024, 8, 4  # pairs a program turns, heads it takes of a token, warps it has


@triton.jit
def turn(
    p_in, p_out, b_cos, b_sin, m_row,
    K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotates heads: p_in and p_out [BLOCK_T, BLOCK_H, 1] point at their first elements."""
    half: tl.constexpr = K // 2
    element = p_out.dtype.element_ty
    if INTERLEAVED:  # whole heads are read and written in one piece; pairs are neighbours in registers
        dim = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        m_tile = m_row & (dim < K)
        b_x = tl.load(p_in + dim, mask=m_tile, other=0.0).to(tl.float32)
        first, second = tl.split(b_x.reshape(BLOCK_T, BLOCK_H, BLOCK_HALF, 2))
        b_out = tl.join(first * b_cos - second * b_sin, second * b_cos + first * b_sin)
        tl.store(p_out + dim, b_out.reshape(BLOCK_T, BLOCK_H, 2 * BLOCK_HALF).to(element), mask=m_tile)
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, None, :]
        m_tile = m_row & (pair < half)
        first = tl.load(p_in + pair, mask=m_tile, other=0.0).to(tl.float32)
        second = tl.load(p_in + half + pair, mask=m_tile, other=0.0).to(tl.float32)
        tl.store(p_out + pair, (first * b_cos - second * b_sin).to(element), mask=m_tile)
        tl.store(p_out + half + pair, (second * b_cos + first * b_sin).to(element), mask=m_tile)


@triton.jit
def rope_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_start, p_q_out, p_k_out, p_v_out,
    N, T, HQ, H, cos_b, cos_t, sin_b, sin_t,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, ko_b, ko_t, ko_h, vo_b, vo_t, vo_h,
    K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr, CACHE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_T of the N = B * T tokens; axis 1 counts tiles of query heads, then of key heads, then (CACHE) of values'.

    All programs carry the same work: a tile of as many heads as queries have would leave keys' mostly empty.
    """
    if OVERLAP:
        gdc_launch_dependents()  # the kernel after waits for this one's end
        gdc_wait()
    part = tl.program_id(1)
    q_tiles = tl.cdiv(HQ, BLOCK_H)
    k_tiles = tl.cdiv(H, BLOCK_H)
    flat = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]
    m_token = flat < N
    batch = (flat // T).to(tl.int64)
    token = (flat % T).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[None, :, None]
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    place = token
    if CACHE:
        place += tl.load(p_start + batch, mask=m_token, other=0)

    if part < q_tiles + k_tiles:
        m_angle = m_token & (pair < K // 2)
        b_cos = tl.load(p_cos + batch * cos_b + token * cos_t + pair, mask=m_angle, other=0.0)
        b_sin = tl.load(p_sin + batch * sin_b + token * sin_t + pair, mask=m_angle, other=0.0)
        if part < q_tiles:
            head += part * BLOCK_H
            o_in = batch * q_b + token * q_t + head.to(tl.int64) * q_h
            o_out = (flat.to(tl.int64) * HQ + head) * K
            m_row = m_token & (head < HQ)
            turn(p_q + o_in, p_q_out + o_out, b_cos, b_sin, m_row, K, BLOCK_HALF, BLOCK_T, BLOCK_H, INTERLEAVED)
        else:
            head += (part - q_tiles) * BLOCK_H
            o_in = batch * k_b + token * k_t + head.to(tl.int64) * k_h
            o_out = batch * ko_b + place * ko_t + head.to(tl.int64) * ko_h
            m_row = m_token & (head < H)
            turn(p_k + o_in, p_k_out + o_out, b_cos, b_sin, m_row, K, BLOCK_HALF, BLOCK_T, BLOCK_H, INTERLEAVED)
    elif CACHE:
        head += (part - q_tiles - k_tiles) * BLOCK_H
        dim = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        m_value = m_token & (head < H) & (dim < K)
        o_value = batch * v_b + token * v_t + head.to(tl.int64) * v_h + dim
        o_place = batch * vo_b + place * vo_t + head.to(tl.int64) * vo_h + dim
        tl.store(p_v_out + o_place, tl.load(p_v + o_value, mask=m_value), mask=m_value)


_kernel = Jit(rope_kernel)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Returns rotated q and k, contiguous."""
    out_q, out_k = contiguous_like(q), contiguous_like(k)
    _launch(q, k, None, cos, sin, None, out_q, out_k, None, interleaved)
    return out_q, out_k


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """Returns rotated q; writes rotated k, and v, to rows ``start[b] + t`` of k_cache and v_cache [B, S, H, K]."""
    out_q = contiguous_like(q)
    _launch(q, k, v, cos, sin, start, out_q, k_cache, v_cache, interleaved)
    return out_q


def _launch(
    q: Tensor, k: Tensor, v: Tensor | None, cos: Tensor, sin: Tensor, start: Tensor | None,
    out_q: Tensor, out_k: Tensor, out_v: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    b, t, hq, dim = q.shape
    h = k.shape[2]
    if k.shape != (b, t, h, dim) or cos.shape[-2:] != (t, dim // 2):
        raise ValueError(f"rope: got q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}")
    if b * t == 0:
        return
    values, out_values = (k, out_k) if v is None or out_v is None else (v, out_v)
    angles = [(x.stride(0) if x.dim() == 3 and x.shape[0] > 1 else 0, x.stride(-2)) for x in (cos, sin)]
    grid, options = _sizes(tiles.machine(q.device), b * t, hq, h, dim, v is not None)
    _kernel(
        grid, (q, k, values, cos, sin, start, out_q, out_k, out_values), (),
        (
            b * t, t, hq, h, *angles[0], *angles[1], *q.stride()[:3], *k.stride()[:3], *values.stride()[:3],
            *out_k.stride()[:3], *out_values.stride()[:3],
        ),
        INTERLEAVED=interleaved, **options,
    )  # fmt: skip


@lru_cache(256)
def _sizes(
    machine: tiles.Machine, tokens: int, hq: int, h: int, dim: int, cache: bool
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """(grid, constants and options)."""
    block_half = triton.next_power_of_2(max(1, dim // 2))
    block_h = min(triton.next_power_of_2(max(hq, h)), HEADS)
    block_t = min(triton.next_power_of_2(tokens), max(1, PAIRS // (block_h * block_half)))
    parts = triton.cdiv(hq, block_h) + triton.cdiv(h, block_h) * (2 if cache else 1)
    constants = {"K": dim, "BLOCK_HALF": block_half, "BLOCK_T": block_t, "BLOCK_H": block_h, "CACHE": cache}
    options = {"OVERLAP": machine.overlap, "num_warps": WARPS, **({"launch_pdl": True} if machine.overlap else {})}
    return (triton.cdiv(tokens, block_t), parts, 1), constants | options
