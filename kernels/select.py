"""Which implementation runs on a GPU: the one place that decides, by dtype and shape.

The rule is the fastest measured (docs/kernels.md holds the figures); where none of our kernels won, the library runs.
The CPU always runs the library, and never imports this.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor, float32

from ..quantized import Quantized
from . import attention_decode as decode
from . import attention_prefill as prefill
from . import ffn as ffn_kernels
from . import library, nvrtc, nvrtc_attention, nvrtc_quantized, quantized, rmsnorm, tiles
from . import rope as rope_kernels

DECODE_TOKENS_MAX = 64
"""Query tokens up to which the keys are split among programs."""
FEW_ROWS_NARROW_MAX = 32
"""Rows up to which the FFN of a model less than 8192 wide streams its weights past them."""
WIDE = 8192
"""Model width from which the FFN is chosen as measured at Llama-3.1-70B's."""
EIGHT_BITS_FEW_ROWS_MAX = 8
"""Rows up to which one product streams weights of 8 bits past, whatever their format and shape."""
LIBRARY_ROWS_WIDE = range(257, 1025)
"""Rows, about the 512 measured, at which cuBLAS makes a wide model's gate and up products: ours was no faster."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.shape[-1] > rmsnorm.WIDTH_MAX:
        return library.rms_norm(x, weight, eps)
    return rmsnorm.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.shape[-1] > rmsnorm.WIDTH_MAX:
        return library.add_rms_norm(x, residual, weight, eps)
    return rmsnorm.add_rms_norm(x, residual, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rope_kernels.rope(q, k, cos, sin, interleaved)


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    return rope_kernels.rope_write(q, k, v, cos, sin, k_cache, v_cache, start, interleaved)


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, kv_lens: Tensor | None, mask: Tensor | None, scale: float | None
) -> Tensor:
    t, s = q.shape[1], k.shape[1]
    softmax_scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.dtype == float32:  # no matrix units in IEEE float32: nothing to win, and PyTorch's sums round less
        return library.attention(q, k, v, causal, kv_lens, mask, scale)
    if t <= DECODE_TOKENS_MAX:
        if nvrtc_attention.chosen(q, k, v, kv_lens, mask):
            return nvrtc_attention.launch(q, k, v, kv_lens, softmax_scale)
        return decode.attention_decode(q, k, v, causal, kv_lens, mask, softmax_scale)
    plain = kv_lens is None and mask is None
    if plain and q.numel() and _gluon(q):
        from .attention_prefill_sm90 import attention_prefill_sm90, fits

        if fits(q, k, v):
            return attention_prefill_sm90(q, k, v, causal, softmax_scale)
    if plain and (t == s or not causal):
        return library.attention(q, k, v, causal, kv_lens, mask, scale)
    return prefill.attention_prefill(q, k, v, causal, kv_lens, mask, softmax_scale)


@cache
def _gluon_installed() -> bool:
    try:
        from . import attention_prefill_sm90  # noqa: F401
    except ImportError:  # Gluon is experimental: another Triton may have moved it
        return False
    return True


def _gluon(q: Tensor) -> bool:
    return tiles.machine(q.device).gluon and _gluon_installed()


def few_rows(x: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    """``x aᵀ`` or ``silu(x aᵀ) * (x bᵀ)`` for up to 64 rows: in Triton, or in CUDA C++ where that was faster."""
    if nvrtc.chosen(x, a, b is not None):
        return nvrtc.few_rows(x, a, b)
    return ffn_kernels.few_rows(x, a, b)


def ffn(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    for name, w in (("w1", w1), ("w3", w3), ("w2", w2)):
        if w.data_ptr() % 16:
            raise ValueError(f"ffn: {name} address: got {w.data_ptr() % 16} past a multiple of 16, expected 16 bytes")
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0 or x.dtype == float32:
        return library.ffn(x, w1, w3, w2)
    narrow = rows.shape[1] < WIDE  # at 4096, cuBLAS was 3 % faster from 64 rows
    if rows.shape[0] <= (FEW_ROWS_NARROW_MAX if narrow else ffn_kernels.FEW_ROWS_MAX):
        return few_rows(few_rows(rows, w1, w3), w2, None).view(x.shape)
    fused = (narrow or rows.shape[0] not in LIBRARY_ROWS_WIDE) and ffn_kernels.gate_up_fits(rows, w1, w3)
    gate_up = ffn_kernels.gate_up if fused else ffn_kernels.linear_silu_mul
    return library.ffn(rows, w1, w3, w2, gate_up=gate_up).view(x.shape)


def ffn_of_rows(x: Tensor, w1: Quantized, w3: Quantized, w2: Quantized) -> Tensor:
    """x [M, D] -> [M, D], weights in few bits."""
    many = x.shape[0] > nvrtc_quantized.ROWS_MAX and x.dtype != float32
    if many and nvrtc_quantized.gate_up_down_chosen(x, w1, w3, w2):
        return nvrtc_quantized.gate_up_down(x, w1, w3, w2)
    return product(gate_up_quantized(x, w1, w3), w2)


def few_rows_quantized(x: Tensor, a: Quantized, b: Quantized | None) -> Tensor:
    """:func:`few_rows` of weights in few bits."""
    if nvrtc_quantized.chosen(x, a, b is not None):
        return nvrtc_quantized.few_rows(x, a, b)
    return quantized.linear(x, a, b)


def product(x: Tensor, weight: Quantized) -> Tensor:
    """x [M, D] -> [M, N]."""
    if x.shape[0] == 0 or x.dtype == float32:
        return library.linear_in_chunks(x, weight)
    few = x.shape[0] <= nvrtc_quantized.ROWS_MAX
    if (not few or _slow_past(x, weight)) and nvrtc_quantized.many_rows_chosen(x, weight):
        return nvrtc_quantized.many_rows(x, weight)
    if few:
        return few_rows_quantized(x, weight, None)
    if x.shape[0] <= quantized.ROWS_MAX:
        return quantized.linear(x, weight)
    return library.linear_in_chunks(x, weight, quantized.dequantize)


def _slow_past(x: Tensor, weight: Quantized) -> bool:
    """Whether wgmma, made for more rows, was measured faster at these few: with 9 to 16 rows, fp8 took half the time
    by it, and int8 less where a matrix has far more columns than rows, since there it is cut into parts of columns."""
    rows, columns = weight.shape
    wide = weight.format == "int8" and columns >= 2 * rows
    return x.shape[0] > EIGHT_BITS_FEW_ROWS_MAX and (weight.format == "fp8" or wide)


def gate_up_quantized(x: Tensor, w1: Quantized, w3: Quantized) -> Tensor:
    """``silu(w1 x) * w3 x``: x [M, D] -> [M, F]."""
    alike = (w1.format, w1.group, w1.scales.dtype, w1.zeros is None) == (
        w3.format, w3.group, w3.scales.dtype, w3.zeros is None,
    )  # fmt: skip
    if alike and 0 < x.shape[0] <= nvrtc_quantized.ROWS_MAX and x.dtype != float32:
        return few_rows_quantized(x, w1, w3)
    return ffn_kernels.silu_mul_(product(x, w1), product(x, w3))


def check_addresses(op: str, **weights: Quantized) -> None:
    for name, weight in weights.items():
        for part in ("values", "scales", "zeros"):
            t = getattr(weight, part)
            if t is not None and t.data_ptr() % 16:
                got = f"{t.data_ptr() % 16} past a multiple of 16"
                raise ValueError(f"{op}: {name} {part} address: got {got}, expected 16 bytes")


def linear_quantized(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, format: str, group: int
) -> Tensor:
    weight = Quantized(format, values, scales, zeros, group)
    check_addresses("linear", weight=weight)
    out = product(x.reshape(-1, x.shape[-1]), weight)
    return out.view(*x.shape[:-1], out.shape[-1])


def ffn_quantized(
    x: Tensor, values: list[Tensor], scales: list[Tensor], zeros: list[Tensor | None], format: list[str],
    group: list[int],
) -> Tensor:  # fmt: skip
    w1, w3, w2 = library.records(values, scales, zeros, format, group)
    check_addresses("ffn", w1=w1, w3=w3, w2=w2)
    return library.ffn_in_chunks(x, w1, lambda rows: ffn_of_rows(rows, w1, w3, w2))
