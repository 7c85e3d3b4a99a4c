"""Every op through what PyTorch ships (cuBLAS, cuDNN, FlashAttention-2, oneDNN): the CPU path, and the CUDA path
wherever no kernel of ours was measured faster. Arguments were checked by :mod:`mhaffn.ops`. Under autocast the
products of float32 tensors are made in its dtype, as PyTorch's are; results are always of the dtype of what was given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantized import Quantized, dequantize
from . import reference

DEQUANTIZED_BYTES = 128 << 20
"""Bound on the weight rows that are dequantised at a time: enough of them that a product fills a GPU."""
DEQUANTIZING_BYTES = 16
"""What PyTorch holds of each weight meanwhile, at most: its value, in float32 twice, and in the dtype wanted."""
DEQUANTIZED_ROWS = 256
"""Their number is a multiple of this: at others the products are several times slower."""
FFN_CHUNK_BYTES = 1 << 30  # bound on each [M, F] intermediate: a long prompt goes through in row chunks


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return reference.rms_norm(total, weight, eps), total


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    rotated_q, rotated_k = reference.rope(q, k, cos, sin, interleaved=interleaved)
    return rotated_q.contiguous(), rotated_k.contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, kv_lens: Tensor | None, mask: Tensor | None, scale: float | None
) -> Tensor:
    """``F.scaled_dot_product_attention``, with the causal mask aligned to the end and masked rows zeroed."""
    b, t, hq, dim = q.shape
    s, h = k.shape[1], k.shape[2]
    if 0 in (b, t, s):
        return q.new_zeros(q.shape)
    if kv_lens is None and mask is None and t == 1:
        # The heads of one group share their keys: as query rows of one head they are read once.
        grouped = q.reshape(b, h, hq // h, dim)
        out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return out.reshape(b, 1, hq, dim).contiguous().to(q.dtype)
    square = causal and t == s and kv_lens is None and mask is None
    allowed = None
    if not square:
        allowed = reference.attended(b, t, s, causal=causal, kv_lens=kv_lens, mask=mask, device=q.device)
    if q.is_cuda and q.dtype == torch.float32:
        out = by_group(q, k, v, allowed, square, scale)
    else:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=allowed,
            is_causal=square,
            scale=scale,
            enable_gqa=hq != h,
        )
    may_be_empty = kv_lens is not None or mask is not None or (causal and t > s)
    if allowed is not None and may_be_empty:
        out = out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2).contiguous().to(q.dtype)


def by_group(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """q [B, T, HQ, K], k and v [B, S, H, K] -> [B, HQ, T, K], one head of each group at a time.

    PyTorch's fused float32 kernels on CUDA take no groups; what it falls back on writes the scores of all heads out.
    """
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.unflatten(2, (k.shape[2], -1)).unbind(3)
    masks = [allowed] * len(grouped)
    if allowed is not None and allowed.shape[1] > 1:  # one a head
        masks = list(allowed.unflatten(1, (k.shape[2], -1)).unbind(2))
    heads = [
        F.scaled_dot_product_attention(
            one.transpose(1, 2), keys, values, attn_mask=seen, is_causal=causal, scale=scale
        ).transpose(1, 2)
        for one, seen in zip(grouped, masks, strict=True)
    ]
    return torch.stack(heads, 3).flatten(2, 3).transpose(1, 2)


def gated(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """``silu(w1 x) * w3 x``: x [M, D], w1 and w3 [F, D] -> [M, F]."""
    return F.silu(F.linear(x, w1), inplace=True).mul_(F.linear(x, w3))


def ffn(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, gate_up: Callable[..., Tensor] = gated) -> Tensor:
    """``gate_up``, then the product with w2; in chunks of rows where an intermediate would pass its bound."""
    rows = x.reshape(-1, x.shape[-1])
    chunk = max(1, FFN_CHUNK_BYTES // (w1.shape[0] * x.element_size()))
    if rows.shape[0] <= chunk:
        return F.linear(gate_up(rows, w1, w3), w2).to(x.dtype).view(x.shape)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for start in range(0, rows.shape[0], chunk):
        part = slice(start, start + chunk)
        torch.mm(gate_up(rows[part], w1, w3).to(x.dtype), w2.t(), out=out[part])
    return out.view(x.shape)


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """Rotates q and k; puts k and v at ``start[b] + t`` of their caches."""
    rotated_q, rotated_k = rope(q, k, cos, sin, interleaved)
    b, t = q.shape[:2]
    batch = torch.arange(b, device=q.device)[:, None]
    place = start.to(torch.int64)[:, None] + torch.arange(t, device=q.device)
    k_cache[batch, place] = rotated_k
    v_cache[batch, place] = v
    return rotated_q


def rows_of(weight: Quantized, first: int, last: int) -> Quantized:
    """Some rows of a weight, as views."""
    part = slice(first, last)
    zeros = None if weight.zeros is None else weight.zeros[part]
    return Quantized(weight.format, weight.values[part], weight.scales[part], zeros, weight.group)


def linear_in_chunks(
    x: Tensor, weight: Quantized, kernel: Callable[[Quantized, torch.dtype], Tensor] | None = None
) -> Tensor:
    """x [M, D] -> [M, N]: dequantises a chunk of rows, by ``kernel`` where there is one, multiplies, and so on."""
    rows, width = weight.shape
    dequantized, held = (dequantize, DEQUANTIZING_BYTES) if kernel is None else (kernel, x.element_size())
    chunk = max(1, DEQUANTIZED_BYTES // (width * held))
    chunk = chunk // DEQUANTIZED_ROWS * DEQUANTIZED_ROWS or chunk
    if rows <= chunk:
        return F.linear(x, dequantized(weight, x.dtype)).to(x.dtype)
    out = x.new_empty((x.shape[0], rows))
    for first in range(0, rows, chunk):
        part = dequantized(rows_of(weight, first, first + chunk), x.dtype)
        torch.mm(x, part.t(), out=out[:, first : first + chunk])
    return out


def linear_quantized(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, format: str, group: int
) -> Tensor:
    out = linear_in_chunks(x.reshape(-1, x.shape[-1]), Quantized(format, values, scales, zeros, group))
    return out.view(*x.shape[:-1], out.shape[-1])


def records(
    values: list[Tensor], scales: list[Tensor], zeros: list[Tensor | None], format: list[str], group: list[int]
) -> list[Quantized]:
    return [Quantized(*parts) for parts in zip(format, values, scales, zeros, group, strict=True)]


def ffn_quantized(
    x: Tensor, values: list[Tensor], scales: list[Tensor], zeros: list[Tensor | None], format: list[str],
    group: list[int],
) -> Tensor:  # fmt: skip
    w1, w3, w2 = records(values, scales, zeros, format, group)

    def gate_up(rows: Tensor) -> Tensor:
        return F.silu(linear_in_chunks(rows, w1), inplace=True).mul_(linear_in_chunks(rows, w3))

    return ffn_in_chunks(x, w1, lambda rows: linear_in_chunks(gate_up(rows), w2))


def ffn_in_chunks(x: Tensor, w1: Quantized, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run`` of all rows of x, as many at a time as keep the [M, F] intermediates within their bound."""
    rows = x.reshape(-1, x.shape[-1])
    chunk = max(1, FFN_CHUNK_BYTES // (w1.shape[0] * x.element_size()))
    if rows.shape[0] <= chunk:
        return run(rows).view(x.shape)
    return torch.cat([run(part) for part in rows.split(chunk)]).view(x.shape)
