"""How products with weights in few bits are launched: what needs no GPU."""

from __future__ import annotations

import pytest
import torch

from mhaffn.kernels import library, nvrtc_quantized
from mhaffn.quantized import dequantize
from mhaffn.sizes import ARRANGED_ROWS, DEQUANTIZING_BYTES, PARTIAL_SUMS_BYTES, SCRATCH_BYTES

from .weights import random_weight


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [
        (64, 224, (0, 2)),
        (224, 64, (224, 1)),
        (8, 64, (0, 8)),
        (8, 4, (8, 1)),
        (448, 64, (396, 2)),
        (1344, 64, (1320, 4)),
        (1792, 64, (1792, 1)),
        (132, 64, (132, 1)),
    ],
)
def test_tiles_that_do_not_fill_the_last_round_are_cut(count, steps, expected):
    """Of [8192, 28672], [28672, 8192], [1024, 8192], [1024, 512] past 64 tokens, then of 512 to 2048, on 132."""
    whole, parts = nvrtc_quantized.division(count, steps, 4, 132)
    assert (whole, parts) == expected


def test_chunks_of_dequantised_rows_are_round(monkeypatch):
    a, x = random_weight("int4", 700, 96, 32), torch.randn(3, 96)
    monkeypatch.setattr(library, "DEQUANTIZED_BYTES", 300 * 96 * 4)
    sizes = []

    def counted(weight, dtype):
        sizes.append(weight.shape[0])
        return dequantize(weight, dtype)

    got = library.linear_in_chunks(x, a, counted)
    assert sizes == [256, 256, 188]
    torch.testing.assert_close(got, x @ dequantize(a).T)


def test_a_plan_keeps_room_for_what_products_hold_besides():
    """Dequantised rows, or the arranged inputs of 2048 rows of the widest FFN and a tile of sums for each of an H100's
    processors; CUDA allocators round up."""
    arranged, sums = nvrtc_quantized.SM90_ROWS_MAX * 28672 * 2, 132 * 256 * 128 * 4
    assert max(library.DEQUANTIZED_BYTES, arranged + sums) + (2 << 20) <= SCRATCH_BYTES
    assert (nvrtc_quantized.SM90_ROWS_MAX, library.DEQUANTIZING_BYTES) == (ARRANGED_ROWS, DEQUANTIZING_BYTES)
    assert sums + (2 << 20) <= PARTIAL_SUMS_BYTES
