"""A weight matrix in few bits: values, scales and, where a format has them, zero points.

========== ============================ ======================= =====================================
format     values                       dequantised             group
========== ============================ ======================= =====================================
``int8``   int8 ``[N, D]``              ``value * scale``       32, 64, 128, 256, or the whole row
``int4``   uint8 ``[N, D / 2]``         ``(q - 8) * scale``     32, 64, 128, 256
``int4``   the same, with zero points   ``(q - zero) * scale``  32, 64, 128, 256
``fp8``    float8_e4m3fn ``[N, D]``     ``value * scale``       the whole row
========== ============================ ======================= =====================================

``scales`` and ``zeros`` are ``[N, D / group]``: one for ``group`` neighbouring columns of a row. A byte of ``int4``
holds two columns, the even one in its low half: column ``2i`` is ``values[n, i] & 15``, column ``2i + 1`` is
``values[n, i] >> 4``. Zero points are of the scales' dtype, so they need not be whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT4_ZERO = 8


@dataclass(frozen=True, eq=False)
class Quantized:
    """One weight ``[N, D]`` in the layout of ``nn.Linear``; ``group`` is D where a scale covers the whole row."""

    format: str
    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, D)``: rows and columns of the matrix that this stands for."""
        n, columns = self.values.shape
        return n, columns * 2 if self.format == "int4" else columns

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.values, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)


def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix ``[N, D]``: computed in float32, then rounded to ``dtype``."""
    values = weight.values
    if weight.format == "int4":
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
    n, columns = weight.shape
    groups = values.to(torch.float32).view(n, columns // weight.group, weight.group)
    scales = weight.scales.to(torch.float32).unsqueeze(-1)
    if weight.format == "int4":
        groups = groups - (INT4_ZERO if weight.zeros is None else weight.zeros.to(torch.float32).unsqueeze(-1))
    return (groups * scales).view(n, columns).to(dtype)
