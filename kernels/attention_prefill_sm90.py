"""Attention of many query tokens on sm_90, in Gluon: the schedule of FlashAttention-3 (arXiv 2407.08608).

The same function as ``attention_prefill.py`` (its sibling for other GPUs, dtypes, masks and lengths), for bf16 and
fp16, K 64 or 128, S >= T, causal or not, no mask and no lengths. Floors as there.

Blocks stay, one a processor, and take 128 query rows of a query head after another. Two groups of four warps hold 64
rows each, and one more warp feeds both with key and value tiles through the copy engine, ahead into the next work. A
group issues the scores of the next tile, and the product of the last probabilities with their values, before it
computes exponentials: the tensor cores work meanwhile, and while one group is busy with exponentials the other
multiplies. Keys are walked from the diagonal backwards, so that only the first tiles need a mask.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import tiles
from .attention_prefill import LOG2E, descriptor_fits

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.9 renamed it

ROWS = 64  # of one warp group
BLOCK_N = 128
STAGES = 2


@gluon.jit
def locate(index, T, S, HQ, B, BLOCK_N: gl.constexpr, ROWS: gl.constexpr, CAUSAL: gl.constexpr):
    """The work of an index: (batch, query head, first row, tiles of keys, how many of them need a mask).

    The longest rows come first, and the query heads of a key head run together.
    """
    row_tiles = gl.cdiv(T, ROWS)
    rest = index // HQ
    first_row = (row_tiles - 1 - rest // B) * ROWS
    end = S
    whole = S
    if CAUSAL:
        end = gl.minimum(S, first_row + ROWS + S - T)
        whole = gl.minimum(S, first_row + S - T + 1)
    tiles = gl.cdiv(end, BLOCK_N)
    return rest % B, index % HQ, first_row, tiles, tiles - whole // BLOCK_N


@gluon.jit
def load(d_q, d_k, d_v, smem, full, empty, sizes, CAUSAL: gl.constexpr):
    """The loading warp: both groups' queries, then key and value tiles from the last to the first."""
    q_smem, k_smem, v_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    T, S, HQ, G, B, work = sizes
    rows: gl.constexpr = q_smem.shape[3]
    block_n: gl.constexpr = k_smem.shape[3]
    stages: gl.constexpr = k_smem.shape[0]
    count = 0  # key tiles so far
    for index in range(gl.program_id(0), work, gl.num_programs(0)):
        batch, query_head, first_row, tiles, _ = locate(index, T, S, HQ, B, block_n, 2 * rows, CAUSAL)
        turn = (index - gl.program_id(0)) // gl.num_programs(0)
        for group in gl.static_range(2):
            mbarrier.wait(q_empty.index(group), (turn + 1) & 1)  # the first round finds everything free
            mbarrier.expect(q_full.index(group), d_q.block_type.nbytes)
            place = [batch, query_head, first_row + group * rows, 0]
            async_load(d_q, place, q_full.index(group), q_smem.index(group))
        for i in range(tiles):
            stage = count % stages
            free = (count // stages + 1) & 1
            place = [batch, query_head // G, (tiles - 1 - i) * block_n, 0]
            mbarrier.wait(k_empty.index(stage), free)
            mbarrier.expect(k_full.index(stage), d_k.block_type.nbytes)
            async_load(d_k, place, k_full.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), free)
            mbarrier.expect(v_full.index(stage), d_v.block_type.nbytes)
            async_load(d_v, place, v_full.index(stage), v_smem.index(stage))
            count += 1


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
    group: gl.constexpr, smem, full, empty, p_out, sizes, strides, scale_log2, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A warp group: its 64 rows of every work item, through all tiles."""
    q_smem, k_smem, v_smem = smem
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    T, S, HQ, _, B, work = sizes
    o_b, o_t, o_h = strides
    rows: gl.constexpr = q_smem.shape[3]
    block_n: gl.constexpr = k_smem.shape[3]
    dim: gl.constexpr = k_smem.shape[4]
    stages: gl.constexpr = k_smem.shape[0]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    scores_row: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row: gl.constexpr = gl.SliceLayout(1, out_layout)
    dtype: gl.constexpr = p_out.dtype.element_ty

    q = q_smem.index(group).reshape([rows, dim])
    column = gl.arange(0, block_n, gl.SliceLayout(0, scores_layout))
    nothing = gl.full([rows, block_n], 0.0, gl.float32, scores_layout)
    count = 0
    for index in range(gl.program_id(0), work, gl.num_programs(0)):
        batch, query_head, first_row, tiles, masked_tiles = locate(index, T, S, HQ, B, block_n, 2 * rows, CAUSAL)
        turn = (index - gl.program_id(0)) // gl.num_programs(0)
        start = first_row + group * rows
        row = start + gl.arange(0, rows, scores_row)
        top = gl.full([rows], float("-inf"), gl.float32, scores_row)
        total = gl.full([rows], 0.0, gl.float32, scores_row)
        acc = gl.full([rows, dim], 0.0, gl.float32, out_layout)

        stage = count % stages
        mbarrier.wait(q_full.index(group), turn & 1)
        mbarrier.wait(k_full.index(stage), (count // stages) & 1)
        k = k_smem.index(stage).reshape([block_n, dim])
        scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_empty.index(stage))
        key = (tiles - 1) * block_n + column
        probabilities, top, total, factor = soften(scores, top, total, row, key, S - T, S, scale_log2, True, CAUSAL)
        left = gl.convert_layout(probabilities.to(dtype), left_layout)

        for i in range(1, tiles):
            before = count % stages
            before_phase = (count // stages) & 1
            count += 1
            stage = count % stages
            mbarrier.wait(k_full.index(stage), (count // stages) & 1)
            k = k_smem.index(stage).reshape([block_n, dim])
            scores_next = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), before_phase)
            v = v_smem.index(before).reshape([block_n, dim])
            acc_next = warpgroup_mma(left, v, acc, is_async=True)
            scores = warpgroup_mma_wait(1, [scores_next])
            mbarrier.arrive(k_empty.index(stage))
            key = (tiles - 1 - i) * block_n + column
            if i < masked_tiles:
                probabilities, top, total, factor = soften(
                    scores, top, total, row, key, S - T, S, scale_log2, True, CAUSAL
                )
            else:
                probabilities, top, total, factor = soften(
                    scores, top, total, row, key, S - T, S, scale_log2, False, CAUSAL
                )
            acc = warpgroup_mma_wait(0, [acc_next])
            mbarrier.arrive(v_empty.index(before))
            acc = acc * gl.convert_layout(factor, out_row)[:, None]
            left = gl.convert_layout(probabilities.to(dtype), left_layout)

        mbarrier.arrive(q_empty.index(group))
        last = count % stages
        mbarrier.wait(v_full.index(last), (count // stages) & 1)
        v = v_smem.index(last).reshape([block_n, dim])
        acc_next = warpgroup_mma(left, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc_next])
        mbarrier.arrive(v_empty.index(last))
        count += 1

        acc = acc / gl.convert_layout(total, out_row)[:, None]
        token = start + gl.arange(0, rows, out_row)
        o_out = batch.to(gl.int64) * o_b + query_head.to(gl.int64) * o_h + token.to(gl.int64)[:, None] * o_t
        p_tile = p_out + o_out + gl.arange(0, dim, gl.SliceLayout(0, out_layout))[None, :]
        gl.store(p_tile, acc.to(dtype), mask=(token < T)[:, None])


@gluon.jit
def prefill_sm90_kernel(
    d_q, d_k, d_v, p_out, scale_log2, T, S, HQ, G, B, work, o_b, o_t, o_h,
    K: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    rows: gl.constexpr = 64
    dtype: gl.constexpr = d_k.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, rows, K], d_q.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, K], d_k.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, K], d_v.layout)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)

    smem = (q_smem, k_smem, v_smem)
    full = (q_full, k_full, v_full)
    empty = (q_empty, k_empty, v_empty)
    sizes = (T, S, HQ, G, B, work)
    strides = (o_b, o_t, o_h)
    gl.warp_specialize(
        [
            (multiply, (0, smem, full, empty, p_out, sizes, strides, scale_log2, CAUSAL)),
            (multiply, (1, smem, full, empty, p_out, sizes, strides, scale_log2, CAUSAL)),
            (load, (d_q, d_k, d_v, smem, full, empty, sizes, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )


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
    out = torch.empty((b, t, hq, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    descriptors = [
        TensorDescriptor(x, [b, x.shape[2], x.shape[1], dim], [x.stride(i) for i in (0, 2, 1, 3)], block, layout)
        for x, (block, layout) in zip((q, k, v), _blocks(dim, q.dtype), strict=True)
    ]
    work = hq * b * triton.cdiv(t, 2 * ROWS)
    prefill_sm90_kernel[(min(work, tiles.machine(q.device).processors),)](
        *descriptors, out, scale * LOG2E, t, s, hq, hq // h, b, work, *out.stride()[:3],
        K=dim, BLOCK_N=BLOCK_N, STAGES=STAGES, CAUSAL=causal, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out


@cache
def _blocks(dim: int, dtype: torch.dtype) -> list[tuple[list[int], gl.NVMMASharedLayout]]:
    """The shared-memory tiles of q, k and v."""
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    blocks = [[1, 1, rows, dim] for rows in (ROWS, BLOCK_N, BLOCK_N)]
    return [(block, gl.NVMMASharedLayout.get_default_for(block, element)) for block in blocks]
