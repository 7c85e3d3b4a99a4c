"""Asking for bytes before they may be read: rows into L2, while the kernel before still runs."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def prefetch_rows(p_rows, size):
    """Brings ``size`` bytes at each of p_rows into L2 (sm_90 and later); addresses and sizes are multiples of 16.

    Nothing is read: a row that an earlier kernel is still to write is written in L2, and read from there.
    """
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [p_rows.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def rows_aligned(x: Tensor) -> bool:
    """Whether x has rows (its last dimension) and each starts and ends at a multiple of 16 bytes."""
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in (*x.stride()[:-1], x.shape[-1]))
    return x.numel() > 0 and aligned
