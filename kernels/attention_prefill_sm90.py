"""Attention of many query tokens on sm_90, in Gluon: the schedule of FlashAttention-3 (arXiv 2407.08608).

The same function as ``attention_prefill.py`` (its sibling for other GPUs, dtypes, masks and lengths), for bf16 and
fp16, K 64 or 128, S >= T, causal or not, no mask and no lengths. Floors as there.

A block owns 128 query rows of one query head. Two groups of four warps hold 64 rows each, and one more warp feeds both
with key and value tiles through the copy engine. A group issues the scores of the next tile, and the product of the
last probabilities with their values, before it computes exponentials: the tensor cores work meanwhile, and while one
group is busy with exponentials the other multiplies. Keys are walked from the diagonal backwards, so that only the
first tiles need a mask.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_prefill import LOG2E, descriptor_fits

ROWS = 64  # of one warp group
STAGES = 2


@gluon.jit
def load(d_q, d_k, d_v, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, coordinates, tiles):
    """The loading warp: both groups' queries once, then key and value tiles from the last to the first."""
    batch, query_head, head, first_row = coordinates
    rows: gl.constexpr = q_smem.shape[3]
    block_n: gl.constexpr = k_smem.shape[3]
    stages: gl.constexpr = k_smem.shape[0]
    for group in gl.static_range(2):
        mbarrier.expect(q_full.index(group), d_q.block_type.nbytes)
        place = [batch, query_head, first_row + group * rows, 0]
        tma.async_copy_global_to_shared(d_q, place, q_full.index(group), q_smem.index(group))
    for i in range(tiles):
        stage = i % stages
        free = (i // stages + 1) & 1  # the first round finds every stage free
        place = [batch, head, (tiles - 1 - i) * block_n, 0]
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), d_k.block_type.nbytes)
        tma.async_copy_global_to_shared(d_k, place, k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), d_v.block_type.nbytes)
        tma.async_copy_global_to_shared(d_v, place, v_full.index(stage), v_smem.index(stage))


@gluon.jit
def soften(scores, top, total, row, key, diagonal, keys, scale_log2, MASKED: gl.constexpr, CAUSAL: gl.constexpr):
    """Exponentials of a tile under the running maximum: (probabilities, maximum, sum, factor for what came before)."""
    if MASKED:
        seen = key[None, :] < keys
        if CAUSAL:
            seen = seen & (key[None, :] <= (row + diagonal)[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    shift = new_top
    if MASKED:
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    probabilities = gl.exp2(scores * scale_log2 - shift[:, None])
    factor = gl.exp2(top - shift)
    return probabilities, new_top, total * factor + gl.sum(probabilities, 1), factor


@gluon.jit
def multiply(
    group: gl.constexpr, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, p_out, coordinates, tiles,
    masked_tiles, sizes, strides, scale_log2, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A warp group: 64 rows through all tiles."""
    batch, query_head, _, first_row = coordinates
    tokens, keys = sizes
    rows: gl.constexpr = q_smem.shape[3]
    block_n: gl.constexpr = k_smem.shape[3]
    dim: gl.constexpr = k_smem.shape[4]
    stages: gl.constexpr = k_smem.shape[0]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    scores_row: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row: gl.constexpr = gl.SliceLayout(1, out_layout)

    start = first_row + group * rows
    diagonal = keys - tokens
    row = start + gl.arange(0, rows, scores_row)
    column = gl.arange(0, block_n, gl.SliceLayout(0, scores_layout))
    top = gl.full([rows], float("-inf"), gl.float32, scores_row)
    total = gl.full([rows], 0.0, gl.float32, scores_row)
    acc = gl.full([rows, dim], 0.0, gl.float32, out_layout)
    nothing = gl.full([rows, block_n], 0.0, gl.float32, scores_layout)

    q = q_smem.index(group).reshape([rows, dim])
    mbarrier.wait(q_full.index(group), 0)
    mbarrier.wait(k_full.index(0), 0)
    k = k_smem.index(0).reshape([block_n, dim])
    scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_empty.index(0))
    key = (tiles - 1) * block_n + column
    probabilities, top, total, factor = soften(
        scores, top, total, row, key, diagonal, keys, scale_log2, True, CAUSAL
    )  # fmt: skip
    left = gl.convert_layout(probabilities.to(p_out.dtype.element_ty), left_layout)

    for i in range(1, tiles):
        stage = i % stages
        before = (i - 1) % stages
        mbarrier.wait(k_full.index(stage), (i // stages) & 1)
        k = k_smem.index(stage).reshape([block_n, dim])
        scores_next = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // stages) & 1)
        v = v_smem.index(before).reshape([block_n, dim])
        acc_next = warpgroup_mma(left, v, acc, is_async=True)
        scores = warpgroup_mma_wait(1, [scores_next])
        mbarrier.arrive(k_empty.index(stage))
        key = (tiles - 1 - i) * block_n + column
        if i < masked_tiles:
            probabilities, top, total, factor = soften(
                scores, top, total, row, key, diagonal, keys, scale_log2, True, CAUSAL
            )  # fmt: skip
        else:
            probabilities, top, total, factor = soften(
                scores, top, total, row, key, diagonal, keys, scale_log2, False, CAUSAL
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, [acc_next])
        mbarrier.arrive(v_empty.index(before))
        acc = acc * gl.convert_layout(factor, out_row)[:, None]
        left = gl.convert_layout(probabilities.to(p_out.dtype.element_ty), left_layout)

    last = (tiles - 1) % stages
    mbarrier.wait(v_full.index(last), ((tiles - 1) // stages) & 1)
    v = v_smem.index(last).reshape([block_n, dim])
    acc_next = warpgroup_mma(left, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc_next])

    acc = acc / gl.convert_layout(total, out_row)[:, None]
    o_b, o_t, o_h = strides
    token = start + gl.arange(0, rows, out_row)
    o_out = batch.to(gl.int64) * o_b + query_head * o_h
    p_tile = (
        p_out + o_out + token.to(gl.int64)[:, None] * o_t + gl.arange(0, dim, gl.SliceLayout(0, out_layout))[None, :]
    )
    gl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=(token < tokens)[:, None])


@gluon.jit
def prefill_sm90_kernel(
    d_q, d_k, d_v, p_out, scale_log2, T, S, G, o_b, o_t, o_h,
    K: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    rows: gl.constexpr = 64
    query_head = gl.program_id(0)
    first_row = (gl.num_programs(1) - 1 - gl.program_id(1)) * (2 * rows)  # the longest rows first
    batch = gl.program_id(2)
    end = S
    whole = S
    if CAUSAL:
        end = gl.minimum(S, first_row + 2 * rows + S - T)
        whole = gl.minimum(S, first_row + S - T + 1)
    tiles = gl.cdiv(end, BLOCK_N)
    masked_tiles = tiles - whole // BLOCK_N

    dtype: gl.constexpr = d_k.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, rows, K], d_q.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, K], d_k.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, K], d_v.layout)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)

    place = (batch, query_head, query_head // G, first_row)
    sizes = (T, S)
    strides = (o_b, o_t, o_h)
    gl.warp_specialize(
        [
            (multiply, (0, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, p_out, place, tiles,
                        masked_tiles, sizes, strides, scale_log2, CAUSAL)),
            (multiply, (1, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, p_out, place, tiles,
                        masked_tiles, sizes, strides, scale_log2, CAUSAL)),
            (load, (d_q, d_k, d_v, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, place, tiles)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`attention_prefill_sm90` takes these tensors."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] not in (64, 128):
        return False
    return k.shape[1] >= q.shape[1] and all(descriptor_fits(x) for x in (q, k, v))


def attention_prefill_sm90(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """q [B, T, HQ, K], k and v [B, S, H, K] with S >= T -> [B, T, HQ, K], for tensors that :func:`fits`."""
    b, t, hq, dim = q.shape
    s, h = k.shape[1], k.shape[2]
    if not fits(q, k, v) or k.shape != (b, s, h, dim) or v.shape != k.shape or hq % h:
        raise ValueError(f"attention_prefill_sm90: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    block_n = 128
    element = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    descriptors = []
    for x, rows in ((q, ROWS), (k, block_n), (v, block_n)):
        block = [1, 1, rows, dim]
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        descriptors.append(TensorDescriptor.from_tensor(x.transpose(1, 2), block, layout))
    out = torch.empty((b, t, hq, dim), dtype=q.dtype, device=q.device)
    prefill_sm90_kernel[(hq, triton.cdiv(t, 2 * ROWS), b)](
        *descriptors, out, scale * LOG2E, t, s, hq // h, *out.stride()[:3],
        K=dim, BLOCK_N=block_n, STAGES=STAGES, CAUSAL=causal, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out
