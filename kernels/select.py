"""Which implementation runs on a GPU: the one place that decides, by dtype and shape.

The rule is the fastest measured (docs/kernels.md holds the figures); where none of our kernels won, the library runs.
The CPU always runs the library. Kernels are imported when first used, so that a machine without Triton can import ops.
"""

from __future__ import annotations

from torch import Tensor, float32

from . import library

DECODE_TOKENS_MAX = 64
"""Query tokens up to which the keys are split among programs."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from . import rmsnorm

    if x.shape[-1] > rmsnorm.WIDTH_MAX:
        return library.rms_norm(x, weight, eps)
    return rmsnorm.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from . import rmsnorm

    if x.shape[-1] > rmsnorm.WIDTH_MAX:
        return library.add_rms_norm(x, residual, weight, eps)
    return rmsnorm.add_rms_norm(x, residual, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    from . import rope

    return rope.rope(q, k, cos, sin, interleaved)


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    from . import rope

    return rope.rope_write(q, k, v, cos, sin, k_cache, v_cache, start, interleaved)


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, kv_lens: Tensor | None, mask: Tensor | None, scale: float | None
) -> Tensor:
    t, s = q.shape[1], k.shape[1]
    if t <= DECODE_TOKENS_MAX:
        from .attention_decode import attention_decode as kernel
    elif kv_lens is None and mask is None and (t == s or not causal):
        return library.attention(q, k, v, causal, kv_lens, mask, scale)  # cuDNN: 1.3 times our Triton kernel
    else:
        from .attention_prefill import attention_prefill as kernel
    return kernel(q, k, v, causal, kv_lens, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def ffn(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    from . import ffn, nvrtc

    for name, w in (("w1", w1), ("w3", w3), ("w2", w2)):
        if w.data_ptr() % 16:
            raise ValueError(f"ffn: {name} address: got {w.data_ptr() % 16} past a multiple of 16, expected 16 bytes")
    rows = x.reshape(-1, x.shape[-1])
    m, width = rows.shape
    if m == 0 or x.dtype == float32:
        return library.ffn(x, w1, w3, w2)
    vectors = width % 8 == 0 and w1.shape[0] % 8 == 0 and rows.data_ptr() % 16 == 0 and rows.stride(0) % 8 == 0
    if m <= nvrtc.FEW_ROWS_MAX and vectors and nvrtc.available():
        return nvrtc.ffn_few_rows(rows, w1, w3, w2).view(x.shape)
    if m <= ffn.FEW_ROWS_MAX:
        return ffn.ffn_few_rows(rows, w1, w3, w2).view(x.shape)
    return library.ffn(x, w1, w3, w2, gate_up=ffn.linear_silu_mul)
