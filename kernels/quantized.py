"""Products with weights in few bits, in Triton.

x [M, D], weights [N, D] of :class:`mhaffn.quantized.Quantized` -> [M, N]; bf16, fp16. Floors: the packed bytes read
once, ``2 * M * N * D`` operations.

- ``quantized_kernel`` (M up to 128): a tile of weight rows is the tall side of the product, the tokens its columns. A
  byte of int4 gives two tiles, of even and of odd columns, and a 32-bit word of x the two that go with them. The sum
  over a group is scaled in float32; a zero point takes ``(zero - 8) * sum(x)`` from it.
- ``dequantize_kernel``: a chunk of rows as a plain matrix, for the library's product (large M).

Unpacking is inline assembly: a byte's halves are or-ed into the mantissa of a power of two, which is then subtracted;
converting integers would cost four times the instructions. ASSEMBLY is off in Triton's interpreter alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..quantized import Quantized
from . import tiles

ROWS_MAX = 128
GATED_ROWS_MAX = 16
"""Rows up to which both products of a gate are made at once: beyond, their sums do not fit the registers."""
WHOLE_ROW = 31
"""The shift that makes every column of a row its group 0."""

# Four bytes $4 -> their low halves ($0, $1) and high halves ($2, $3), each less 8, as pairs of bf16 (128 + q - 136) or
# fp16 (1024 + q - 1032).
NIBBLES = tl.constexpr("""
{
.reg .b32 a, b, one, less;
mov.b32 one, ONE; mov.b32 less, LESS;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
lop3.b32 $0, a, 0x000F000F, MAGIC, 0xEA;
lop3.b32 $1, b, 0x000F000F, MAGIC, 0xEA;
shr.b32 a, a, 4;
shr.b32 b, b, 4;
lop3.b32 $2, a, 0x000F000F, MAGIC, 0xEA;
lop3.b32 $3, b, 0x000F000F, MAGIC, 0xEA;
fma.rn.TYPE $0, $0, one, less;
fma.rn.TYPE $1, $1, one, less;
fma.rn.TYPE $2, $2, one, less;
fma.rn.TYPE $3, $3, one, less;
}
""")
NIBBLES_BF16 = tl.constexpr(
    NIBBLES.value.replace("ONE", "0x3F803F80")
    .replace("LESS", "0xC308C308")
    .replace("MAGIC", "0x43004300")
    .replace("TYPE", "bf16x2")
)
NIBBLES_FP16 = tl.constexpr(
    NIBBLES.value.replace("ONE", "0x3C003C00")
    .replace("LESS", "0xE408E408")
    .replace("MAGIC", "0x64006400")
    .replace("TYPE", "f16x2")
)


@triton.jit
def halves(b_w, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Bytes of int4 as (even columns, odd columns), each less 8, in ``dtype``."""
    if ASSEMBLY:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                NIBBLES_BF16, "=r,=r,=r,=r,r", [b_w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                NIBBLES_FP16, "=r,=r,=r,=r,r", [b_w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        low = (b_w & 15).to(tl.int32) - 8
        high = (b_w >> 4).to(tl.int32) - 8
        return low.to(dtype), high.to(dtype)


@triton.jit
def whole(b_w, FORMAT: tl.constexpr):
    """Bytes of int8 or of fp8 in float32: e4m3 by way of fp16, whose exponent has a bias that is 8 more."""
    if FORMAT == "fp8":
        bits = b_w.to(tl.int16)
        return (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return b_w.to(tl.float32)


@triton.jit
def group_sum(
    total, p_w, p_scales, p_zeros, x_even, x_odd, o_byte, o_scale, m_byte, dtype: tl.constexpr,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """total + scale * (sum over one tile of columns, which lies in one group)."""
    b_w = tl.load(p_w + o_byte, mask=m_byte, other=0, eviction_policy="evict_first")
    scale = tl.load(p_scales + o_scale).to(tl.float32)
    if FORMAT == "int4":
        even, odd = halves(b_w, dtype, ASSEMBLY)
        part = tl.dot(even, x_even, input_precision="ieee")
        part = tl.dot(odd, x_odd, part, input_precision="ieee")
        if ZEROS:
            zero = tl.load(p_zeros + o_scale).to(tl.float32) - 8.0
            sums = tl.sum(x_even.to(tl.float32), 0) + tl.sum(x_odd.to(tl.float32), 0)
            part -= zero[:, None] * sums[None, :]
    else:
        part = tl.dot(whole(b_w, FORMAT).to(dtype), x_even, input_precision="ieee")
    return total + scale[:, None] * part


@triton.jit
def quantized_kernel(
    p_x, p_a, p_a_scales, p_a_zeros, p_b, p_b_scales, p_b_zeros, p_out, M, ROWS, D, x_m, groups, group_shift,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr,
    GATED: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """out[m, r] = a[r] · x[m], or silu of that times b[r] · x[m]. For int4, p_x points to pairs of columns, as int32,
    and x_m counts those."""
    if OVERLAP:
        gdc_wait()
    dtype: tl.constexpr = p_out.dtype.element_ty
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    row = tl.minimum(r, ROWS - 1).to(tl.int64)  # the last tile rereads a row instead of masking
    BYTES: tl.constexpr = BLOCK_D // 2 if FORMAT == "int4" else BLOCK_D
    row_bytes = D // 2 if FORMAT == "int4" else D
    gate = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        byte = (start // 2 if FORMAT == "int4" else start) + tl.arange(0, BYTES)
        o_byte = row[:, None] * row_bytes + byte[None, :]
        o_scale = row * groups + (start >> group_shift)
        if EVEN:
            m_byte = (byte >= 0)[None, :]
            m_x = (m < M)[None, :]
        else:
            m_byte = (byte < row_bytes)[None, :]
            m_x = (m < M)[None, :] & (byte < row_bytes)[:, None]
        b_x = tl.load(p_x + m[None, :].to(tl.int64) * x_m + byte[:, None], mask=m_x, other=0.0)
        if FORMAT == "int4":
            x_even = (b_x & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
            x_odd = ((b_x >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        else:
            x_even, x_odd = b_x, b_x
        gate = group_sum(
            gate, p_a, p_a_scales, p_a_zeros, x_even, x_odd, o_byte, o_scale, m_byte, dtype, FORMAT, ZEROS, ASSEMBLY,
        )  # fmt: skip
        if GATED:
            up = group_sum(
                up, p_b, p_b_scales, p_b_zeros, x_even, x_odd, o_byte, o_scale, m_byte, dtype, FORMAT, ZEROS, ASSEMBLY,
            )  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    if GATED:
        gate = gate / (1.0 + tl.exp(-gate)) * up
    p_tile = p_out + m[None, :].to(tl.int64) * ROWS + r[:, None]
    tl.store(p_tile, gate.to(dtype), mask=(m < M)[None, :] & (r < ROWS)[:, None])


@triton.jit
def dequantize_kernel(
    p_w, p_scales, p_zeros, p_out, ROWS, row_bytes, groups, group_shift,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """out[r] = the values of row r: int4 pairs of columns as int32, others one by one."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.minimum(r, ROWS - 1).to(tl.int64)[:, None]
    inside = (r < ROWS)[:, None] & (byte < row_bytes)[None, :]
    column = byte * 2 if FORMAT == "int4" else byte
    b_w = tl.load(p_w + row * row_bytes + byte[None, :], mask=inside, other=0, eviction_policy="evict_first")
    o_scale = row * groups + (column >> group_shift)[None, :]
    scale = tl.load(p_scales + o_scale, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = p_out.dtype.element_ty
    if FORMAT == "int4":
        even, odd = halves(b_w, tl.float16, ASSEMBLY)
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        if ZEROS:
            zero = tl.load(p_zeros + o_scale, mask=inside, other=0.0).to(tl.float32) - 8.0
            even -= zero
            odd -= zero
        values = tl.interleave((even * scale).to(dtype), (odd * scale).to(dtype))
        column_out = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        p_pair = p_out + row * (2 * row_bytes) + column_out[None, :]
        tl.store(p_pair, values, mask=(r < ROWS)[:, None] & (column_out < 2 * row_bytes)[None, :])
    else:
        tl.store(p_out + row * row_bytes + byte[None, :], (whole(b_w, FORMAT) * scale).to(dtype), mask=inside)


def _bytes(weight: Quantized) -> Tensor:
    return weight.values.view(torch.uint8) if weight.format == "fp8" else weight.values  # sm_80 has no fp8 type


def _shift(weight: Quantized) -> int:
    return WHOLE_ROW if weight.group == weight.shape[1] else weight.group.bit_length() - 1


def linear(x: Tensor, a: Quantized, b: Quantized | None = None, tile: tiles.Tile | None = None) -> Tensor:
    """x [M, D], a (and b, alike) [ROWS, D] -> ``x aᵀ``, or ``silu(x aᵀ) * (x bᵀ)``, [M, ROWS]; D even."""
    m, width = x.shape
    rows = a.shape[0]
    int4 = a.format == "int4"
    alike = b is None or (b.shape == a.shape and b.format == a.format and b.group == a.group)
    many = m > (ROWS_MAX if b is None else GATED_ROWS_MAX)
    paired = not int4 or (x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0)
    if a.shape[1] != width or not alike or not paired or many or x.element_size() != 2:
        got = f"x {x.dtype} {tuple(x.shape)} strides {x.stride()}, a {a.shape} {a.format} by {a.group}"
        raise ValueError(
            f"linear: got {got}; x is of two bytes, at most {ROWS_MAX} rows (gated {GATED_ROWS_MAX}), "
            "rows of x 4-byte aligned, b as a"
        )
    machine = tiles.machine(x.device)
    if tile is None:
        kernel = "quantized" if b is None else "quantized_gated"
        block_m = max(16, triton.next_power_of_2(m))
        bits = 4 if int4 else 8
        per_processor = rows // machine.processors
        tile = tiles.tile(kernel, machine.arch, bits=bits, rows=block_m, per_processor=per_processor)
    block_m = max(16, triton.next_power_of_2(m))
    block_d = min(tile["BLOCK_D"], a.group if a.group != width else tile["BLOCK_D"])
    second = a if b is None else b
    out = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    words = x.view(torch.int32) if int4 else x
    quantized_kernel[(triton.cdiv(rows, tile["BLOCK_R"]),)](
        words, _bytes(a), a.scales, a.scales if a.zeros is None else a.zeros,
        _bytes(second), second.scales, second.scales if second.zeros is None else second.zeros,
        out, m, rows, width, words.stride(0), width // a.group, _shift(a),
        BLOCK_M=block_m, BLOCK_R=tile["BLOCK_R"], BLOCK_D=block_d, FORMAT=a.format, ZEROS=a.zeros is not None,
        GATED=b is not None, EVEN=width % block_d == 0, STAGES=tile["STAGES"], OVERLAP=machine.overlap,
        ASSEMBLY=machine is not tiles.INTERPRETER, num_warps=tile["WARPS"],
        **({"launch_pdl": True} if machine.overlap else {}),
    )  # fmt: skip
    return out


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """The matrix [N, D]: computed in float32, then rounded to ``dtype``."""
    rows, width = weight.shape
    row_bytes = weight.values.shape[1]
    out = torch.empty((rows, width), dtype=dtype, device=weight.values.device)
    block = min(1024, triton.next_power_of_2(row_bytes))
    block_r = 4096 // block
    dequantize_kernel[(triton.cdiv(rows, block_r), triton.cdiv(row_bytes, block))](
        _bytes(weight), weight.scales, weight.scales if weight.zeros is None else weight.zeros, out, rows, row_bytes,
        width // weight.group, _shift(weight), BLOCK_R=block_r, BLOCK=block, FORMAT=weight.format,
        ZEROS=weight.zeros is not None, ASSEMBLY=tiles.machine(out.device) is not tiles.INTERPRETER, num_warps=4,
    )  # fmt: skip
    return out
