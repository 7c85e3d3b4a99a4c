"""RMSNorm: ``weight * (x / sqrt(mean(x²) + eps))``, alone or of ``x + residual``.

x [..., D], weight [D] -> [..., D]; bf16, fp16, fp32; D up to 32768. One row a program, in float32, rounded to
``x.dtype`` before the weight multiplies it, as transformers' LlamaRMSNorm does.

Bound by memory: x is read once and the result written once, ``2 * rows * D`` elements (twice that with a residual).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import tiles
from .launch import Jit, contiguous_like

WIDTH_MAX = 32768


@triton.jit
def rms_norm_kernel(
    p_x, p_residual, p_weight, p_out, p_total, eps, D, x_row, residual_row,
    BLOCK_D: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(p_x + row * x_row + o_d, mask=m_d, other=0.0)
    if ADD:
        b_residual = tl.load(p_residual + row * residual_row + o_d, mask=m_d, other=0.0)
        b_x = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(b_x.dtype)
        tl.store(p_total + row * D + o_d, b_x, mask=m_d)
    wide = b_x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    b_out = b_weight.to(tl.float32) * (wide * scale).to(b_x.dtype).to(tl.float32)
    tl.store(p_out + row * D + o_d, b_out.to(b_x.dtype), mask=m_d)


_kernel = Jit(rms_norm_kernel)


@cache
def _block(width: int) -> tuple[int, int]:
    """(elements of a program, warps): 16 bytes a thread and load, within 1 to 16 warps."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


def _rows(x: Tensor) -> Tensor:
    """x as [rows, D] with one row stride; a copy where no view does it."""
    return x.reshape(-1, x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D], contiguous."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and residual [..., D], weight [D] -> (normalised, x + residual), contiguous."""
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: got residual {tuple(residual.shape)}, expected {tuple(x.shape)}")
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    if weight.shape != (width,) or width > WIDTH_MAX:
        raise ValueError(f"rms_norm: got x {tuple(x.shape)}, weight {tuple(weight.shape)}, width over {WIDTH_MAX}?")
    out = contiguous_like(x)
    total = torch.empty_like(out) if residual is not None else out
    if out.numel() == 0:
        return out, total
    rows = _rows(x)
    other = rows if residual is None else _rows(residual)
    overlap = tiles.machine(x.device).overlap
    block, warps = _block(width)
    _kernel(
        (rows.shape[0], 1, 1), (rows, other, weight, out, total), (eps,), (width, rows.stride(0), other.stride(0)),
        BLOCK_D=block, ADD=residual is not None, OVERLAP=overlap, num_warps=warps,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out, total
