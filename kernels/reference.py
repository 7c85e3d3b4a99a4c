"""The truth of every op, in plain PyTorch: what the kernels compute, without saying how.

Each function computes in the dtype ``compute`` (float32, or float64 for a stricter truth) and rounds once, at the
places where the op's definition rounds, to ``x.dtype``. Tests and benches compare against these; nothing here is fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COMPUTE = torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, compute: torch.dtype = COMPUTE) -> Tensor:
    """``weight * (x / sqrt(mean(x²) + eps))``: x [..., D], weight [D] -> [..., D].

    The normalised value is rounded to ``x.dtype`` before the weight multiplies it, as in transformers' LlamaRMSNorm.
    """
    wide = x.to(compute)
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, compute: torch.dtype = COMPUTE
) -> tuple[Tensor, Tensor]:
    """``s = x + residual`` (rounded to ``x.dtype``); returns ``(rms_norm(s), s)``."""
    total = (x.to(compute) + residual.to(compute)).to(x.dtype)
    return rms_norm(total, weight, eps, compute=compute), total


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, compute: torch.dtype = COMPUTE) -> Tensor:
    """Rotates pairs of x [B, T, H, K] by the angles of cos, sin [B|1, T, K/2] or [T, K/2].

    Pairs are ``(i, i + K/2)`` (half-split, Hugging Face) or ``(2i, 2i + 1)`` (interleaved, Meta).
    """
    cos, sin = (t.to(compute).reshape(-1, *t.shape[-2:]).unsqueeze(2) for t in (cos, sin))
    wide = x.to(compute)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        out = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return out.to(x.dtype)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, compute: torch.dtype = COMPUTE
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (RoFormer, arXiv 2104.09864): see :func:`rotate`."""
    return (
        rotate(q, cos, sin, interleaved=interleaved, compute=compute),
        rotate(k, cos, sin, interleaved=interleaved, compute=compute),
    )


def attended(
    batch: int, t: int, s: int, *, causal: bool, kv_lens: Tensor | None, mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys each query sees, as a bool tensor that broadcasts to [B, HQ, T, S]; None where it sees all.

    The causal mask is aligned to the end: query ``i`` sees keys ``j <= length - T + i``, with ``length`` the
    sequence's ``kv_lens`` entry, or S.
    """
    allowed: Tensor | None = None
    if causal or kv_lens is not None:
        key = torch.arange(s, device=device)
        query = torch.arange(t, device=device)
        lens = torch.full((1,), s, device=device) if kv_lens is None else kv_lens.to(torch.int64)
        allowed = (key < lens[:, None])[:, None, None, :]
        if causal:
            allowed = allowed & (key <= lens[:, None, None] - t + query[:, None])[:, None]
    if mask is not None:
        allowed = mask if allowed is None else allowed & mask
    return allowed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    kv_lens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    compute: torch.dtype = COMPUTE,
) -> Tensor:
    """``softmax(scale * q kᵀ + mask) v``: q [B, T, HQ, K], k and v [B, S, H, K] -> [B, T, HQ, K].

    Query head ``h`` reads key head ``h // (HQ / H)``. A row that sees no key is zero.
    """
    b, t, hq, dim = q.shape
    s, h = k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    wide_q = q.to(compute).transpose(1, 2)
    wide_k, wide_v = (x.to(compute).transpose(1, 2).repeat_interleave(hq // h, dim=1) for x in (k, v))
    scores = wide_q @ wide_k.transpose(-1, -2) * scale
    allowed = attended(b, t, s, causal=causal, kv_lens=kv_lens, mask=mask, device=q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    probabilities = torch.softmax(scores, dim=-1)
    if allowed is not None:
        probabilities = probabilities.masked_fill(~allowed, 0.0)
    return (probabilities @ wide_v).transpose(1, 2).to(q.dtype).contiguous()


def ffn(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, *, compute: torch.dtype = COMPUTE) -> Tensor:
    """SwiGLU (arXiv 2002.05202): ``w2 (silu(w1 x) * w3 x)``: x [..., D], w1 and w3 [F, D], w2 [D, F] -> [..., D]."""
    gate = x.to(compute) @ w1.to(compute).T
    up = x.to(compute) @ w3.to(compute).T
    return ((torch.nn.functional.silu(gate) * up) @ w2.to(compute).T).to(x.dtype)
