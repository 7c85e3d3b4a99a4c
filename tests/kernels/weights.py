"""Random weights in few bits."""

from __future__ import annotations

import torch

from mhaffn.quantized import Quantized

UNIT = {"int4": 0.01, "int8": 0.001, "fp8": 0.0003}


def random_weight(
    format: str,
    rows: int,
    width: int,
    group: int,
    *,
    zeros: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    unit: float = 1.0,
    device: str = "cpu",
) -> Quantized:
    """Random bits; scales that keep values at about a tenth of ``unit``; zero points that are not whole.

    Every part starts 16 bytes into a buffer of its own.
    """
    columns = width // 2 if format == "int4" else width
    values = torch.randint(0, 256, (16 + rows * columns,), dtype=torch.uint8, device=device)[16:].view(rows, columns)
    if format == "int8":
        values = values.view(torch.int8)
    if format == "fp8":
        values[values & 127 == 127] = 0  # no NaN
        values = values.view(torch.float8_e4m3fn)
    count = width // group
    scales, zero = torch.rand(2, 8 + rows * count, device=device)
    scales = ((scales + 0.5) * UNIT[format] * unit).to(scale_dtype)[8:].view(rows, count)
    zero = (zero * 15).to(scale_dtype)[8:].view(rows, count)
    return Quantized(format, values, scales, zero if zeros else None, group)
