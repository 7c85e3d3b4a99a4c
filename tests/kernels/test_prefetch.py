"""Which tensors' rows may be asked for in whole pieces of 16 bytes."""

from __future__ import annotations

import pytest
import torch

prefetch = pytest.importorskip("mhaffn.kernels.prefetch")


@pytest.mark.parametrize(
    ("rows", "aligned"),
    [
        (torch.zeros(2, 5, 3, 64, dtype=torch.bfloat16), True),
        (torch.zeros(2, 3, 5, 64, dtype=torch.bfloat16).transpose(1, 2), True),
        (torch.zeros(2, 5, 3, 65, dtype=torch.bfloat16)[..., :64], False),
        (torch.zeros(641, dtype=torch.bfloat16)[1:].view(1, 5, 2, 64), False),
        (torch.zeros(1, 5, 2, 60, dtype=torch.bfloat16), False),
        (torch.zeros(1, 0, 2, 64, dtype=torch.bfloat16), False),
    ],
    ids=["contiguous", "heads first", "long rows", "an odd address", "short rows", "none"],
)
def test_rows_aligned(rows, aligned):
    assert prefetch.rows_aligned(rows) is aligned
