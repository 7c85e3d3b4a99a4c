"""SwiGLU feed-forward: ``y = w2 (silu(w1 x) * w3 x)``, in Triton.

x [M, D], w1 and w3 [F, D], w2 [D, F] -> [M, D]; bf16, fp16 (fp32 where said). Floors: ``6 * M * D * F`` operations,
``3 * D * F`` elements read once.

Three kernels:

- ``few_rows_kernel`` (M up to 64): bound by reading the weights. A tile of weight rows is the tall side of the product
  and the tokens its 16 to 64 columns, so the matrix units see a full tile for a single token, and the weights stream
  through shared memory, many stages deep. GATED reads w1 and w3 side by side and multiplies in registers.
- ``gate_up_kernel`` (large M): both products of a tile share their x; SiLU·mul happens before anything is stored.
- ``silu_mul_kernel``: the elementwise step after two library products.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .launch import Jit

FEW_ROWS_MAX = 64


@triton.jit
def few_rows_kernel(
    p_x, p_a, p_b, p_out, M, ROWS, D, x_m,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[m, r] = a[r] · x[m], or silu of that times b[r] · x[m]; a and b [ROWS, D]."""
    if OVERLAP:
        gdc_wait()
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    o_row = tl.minimum(r, ROWS - 1).to(tl.int64)[:, None] * D  # the last tile rereads a row instead of masking
    m_x = (m < M)[None, :]
    gate = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        if EVEN:
            b_x = tl.load(p_x + m[None, :] * x_m + d[:, None], mask=m_x, other=0.0)
            b_a = tl.load(p_a + o_row + d[None, :], eviction_policy="evict_first")
        else:
            b_x = tl.load(p_x + m[None, :] * x_m + d[:, None], mask=m_x & (d < D)[:, None], other=0.0)
            b_a = tl.load(p_a + o_row + d[None, :], mask=(d < D)[None, :], other=0.0)
        gate = tl.dot(b_a, b_x, gate, input_precision="ieee")
        if GATED:
            if EVEN:
                b_b = tl.load(p_b + o_row + d[None, :], eviction_policy="evict_first")
            else:
                b_b = tl.load(p_b + o_row + d[None, :], mask=(d < D)[None, :], other=0.0)
            up = tl.dot(b_b, b_x, up, input_precision="ieee")
    if OVERLAP:
        gdc_launch_dependents()  # not sooner: the next product's programs would crowd the first free processors
    if GATED:
        gate = gate / (1.0 + tl.exp(-gate)) * up
    p_tile = p_out + m[None, :].to(tl.int64) * ROWS + r[:, None]
    tl.store(p_tile, gate.to(p_out.dtype.element_ty), mask=m_x & (r < ROWS)[:, None])


@triton.jit
def gate_up_kernel(
    d_x, d_w1, d_w3, d_out, M, F, D,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """out[m, f] = silu(w1[f] · x[m]) * (w3[f] · x[m]), PROGRAMS persistent programs over tiles."""
    m_tiles = tl.cdiv(M, BLOCK_M)
    f_tiles = tl.cdiv(F, BLOCK_F)
    for tile in tl.range(tl.program_id(0), m_tiles * f_tiles, PROGRAMS):
        # GROUP row tiles walk the columns together, so that weights and x are found in L2.
        group = tile // (GROUP * f_tiles)
        group_rows = tl.minimum(m_tiles - group * GROUP, GROUP)
        o_m = (group * GROUP + tile % (GROUP * f_tiles) % group_rows) * BLOCK_M
        o_f = tile % (GROUP * f_tiles) // group_rows * BLOCK_F
        gate = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            b_x = d_x.load([o_m, d])
            gate = tl.dot(b_x, d_w1.load([o_f, d]).T, gate)
            up = tl.dot(b_x, d_w3.load([o_f, d]).T, up)
        d_out.store([o_m, o_f], (gate / (1.0 + tl.exp(-gate)) * up).to(d_out.dtype))


@triton.jit
def silu_mul_kernel(p_gate, p_up, n, BLOCK: tl.constexpr):
    """gate = silu(gate) * up, in place."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(p_gate + o, mask=o < n, other=0.0).to(tl.float32)
    up = tl.load(p_up + o, mask=o < n, other=0.0).to(tl.float32)
    tl.store(p_gate + o, (gate / (1.0 + tl.exp(-gate)) * up).to(p_gate.dtype.element_ty), mask=o < n)


_few_rows = Jit(few_rows_kernel)


def few_rows(x: Tensor, a: Tensor, b: Tensor | None, tile: tiles.Tile | None = None) -> Tensor:
    """x [M, D] with M up to 64, a (and b) [ROWS, D] -> ``x aᵀ``, or ``silu(x aᵀ) * (x bᵀ)``, [M, ROWS]."""
    m, width = x.shape
    rows = a.shape[0]
    if m > FEW_ROWS_MAX or a.shape != (rows, width) or (b is not None and b.shape != a.shape):
        raise ValueError(f"few_rows: got x {tuple(x.shape)}, a {tuple(a.shape)}; M is at most {FEW_ROWS_MAX}")
    machine = tiles.machine(x.device)
    block_m = max(16, triton.next_power_of_2(m))
    if tile is None:
        kernel = "few_rows" if b is None else "few_rows_gated"
        per_processor = rows // machine.processors
        tile = tiles.tile(kernel, machine.arch, element=x.element_size(), rows=block_m, per_processor=per_processor)
    out = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    _few_rows(
        (triton.cdiv(rows, tile["BLOCK_R"]), 1, 1), (x, a, a if b is None else b, out), (),
        (m, rows, width, x.stride(0)),
        BLOCK_M=block_m, BLOCK_R=tile["BLOCK_R"], BLOCK_D=tile["BLOCK_D"], GATED=b is not None,
        EVEN=width % tile["BLOCK_D"] == 0, STAGES=tile["STAGES"], OVERLAP=machine.overlap,
        num_warps=tile["WARPS"], **({"launch_pdl": True} if machine.overlap else {}),
    )  # fmt: skip
    return out


def ffn_few_rows(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The whole FFN for M up to 64: x [M, D] -> [M, D]."""
    return few_rows(few_rows(x, w1, w3), w2, None)


def gate_up_fits(x: Tensor, w1: Tensor, w3: Tensor) -> bool:
    """Whether :func:`gate_up` has a tile here, and its copy engine can address these tensors."""
    rules = tiles.table(tiles.machine(x.device).arch)["gate_up"]
    size = x.element_size()
    addresses = all(t.data_ptr() % 16 == 0 and t.stride(0) * size % 16 == 0 for t in (x, w1, w3))
    return bool(rules) and size == 2 and addresses and w1.shape[0] * size % 16 == 0


def gate_up(x: Tensor, w1: Tensor, w3: Tensor, tile: tiles.Tile | None = None) -> Tensor:
    """``silu(x w1ᵀ) * (x w3ᵀ)``: x [M, D], w1 and w3 [F, D] -> [M, F]; 16-byte aligned rows."""
    m, width = x.shape
    f = w1.shape[0]
    if w1.shape != (f, width) or w3.shape != w1.shape or f * x.element_size() % 16:
        raise ValueError(f"gate_up: got x {tuple(x.shape)}, w1 {tuple(w1.shape)}, w3 {tuple(w3.shape)}")
    machine = tiles.machine(x.device)
    if tile is None:
        tile = tiles.tile("gate_up", machine.arch, element=x.element_size())
    out = torch.empty((m, f), dtype=x.dtype, device=x.device)
    block_m, block_f, block_d = tile["BLOCK_M"], tile["BLOCK_F"], tile["BLOCK_D"]
    programs = min(machine.processors, triton.cdiv(m, block_m) * triton.cdiv(f, block_f))
    gate_up_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, block_d]), TensorDescriptor.from_tensor(w1, [block_f, block_d]),
        TensorDescriptor.from_tensor(w3, [block_f, block_d]), TensorDescriptor.from_tensor(out, [block_m, block_f]),
        m, f, width, BLOCK_M=block_m, BLOCK_F=block_f, BLOCK_D=block_d, GROUP=tile["GROUP"], STAGES=tile["STAGES"],
        PROGRAMS=programs, num_warps=tile["WARPS"],
    )  # fmt: skip
    return out


def silu_mul_(gate: Tensor, up: Tensor) -> Tensor:
    """``gate = silu(gate) * up`` in place, contiguous tensors of one shape; returns gate."""
    if gate.shape != up.shape or not (gate.is_contiguous() and up.is_contiguous()):
        raise ValueError(f"silu_mul_: got {tuple(gate.shape)} and {tuple(up.shape)}, expected one contiguous shape")
    if gate.numel():
        silu_mul_kernel[(triton.cdiv(gate.numel(), 4096),)](gate, up, gate.numel(), BLOCK=4096, num_warps=8)
    return gate


def linear_silu_mul(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """:func:`gate_up` through two library products and one elementwise kernel."""
    return silu_mul_(linear(x, w1), linear(x, w3))
