"""Which implementation runs: the one place that decides, by device, dtype and shape.

The rule is the fastest measured (docs/kernels.md holds the figures); where none of our kernels won, the library runs.
"""

from __future__ import annotations

from torch import Tensor

from . import library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return library.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return library.add_rms_norm(x, residual, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return library.rope(q, k, cos, sin, interleaved)


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, kv_lens: Tensor | None, mask: Tensor | None, scale: float | None
) -> Tensor:
    return library.attention(q, k, v, causal, kv_lens, mask, scale)


def ffn(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    return library.ffn(x, w1, w3, w2)
