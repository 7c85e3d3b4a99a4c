"""GGUF's blocks of quantised weights as ours, group 32, scales and zero points in float16.

===== =================================== =====================================================================
type  a block, dequantised                becomes
===== =================================== =====================================================================
Q8_0  32 weights, ``q d``                 int8, the same values
Q4_0  32 weights, ``(q - 8) d``           int4, the same values
Q4_1  32 weights, ``q d + m``             int4 with zero points ``-m / d``
Q4_K  256 in 8 groups, ``q (d s) - e m``  int4 with scales ``d s`` and zero points ``e m / (d s)``
Q6_K  256 in 16 groups of 16              int8, the nearest values: 6 bits are a width we have not
===== =================================== =====================================================================

float16 rounds scales and zero points: a weight of Q4_1 moves by at most ``|m| / 2048``, one of Q4_K by
``(q d s + e m) / 2048``, a fraction of their own rounding. Every other quantised type becomes int8 as Q6_K does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mhaffn.formats import Format
from mhaffn.quantized import Quantized
from mhaffn.store.layout import by_group, require_finite, too_large

GROUP = 32
FLOATS = ("F64", "F32", "F16", "BF16")
_FLOAT16_MAX = 65504.0


def format(kind: str, columns: int) -> Format | None:
    """What rows of ``columns`` weights of type ``kind`` become; None for floats and for rows of no whole groups."""
    if kind in FLOATS or columns % GROUP:
        return None
    if kind in KEPT:
        return Format("int8" if kind == "Q8_0" else "int4", GROUP, kind in ("Q4_1", "Q4_K"), "float16")
    return Format("int8", GROUP, False, "float16")


def keep(kind: str, rows: np.ndarray, columns: int, where: str) -> Quantized:
    """Rows of blocks, uint8 ``[N, bytes]``, at their width. Raises :class:`CorruptFileError` naming ``where``."""
    n = rows.shape[0]
    values, scales, zeros = KEPT[kind](np.ascontiguousarray(rows))
    for part in (scales, zeros):
        if part is not None:
            require_finite(torch.from_numpy(part), where)
    halves = [None if part is None else _float16(torch.from_numpy(part), where).view(n, -1) for part in (scales, zeros)]
    assert halves[0] is not None  # scales are never left out
    kept = torch.from_numpy(np.ascontiguousarray(values)).view(n, -1)
    return Quantized("int8" if kind == "Q8_0" else "int4", kept, halves[0], halves[1], GROUP)


def nearest(matrix: torch.Tensor, where: str) -> Quantized:
    """float32 ``[N, D]`` as int8, group 32, each value rounded to the nearest step."""
    require_finite(matrix, where)
    n, columns = matrix.shape
    groups = matrix.view(n, -1, GROUP)
    scales = _float16(groups.abs().amax(-1) / 127, where)
    steps = by_group(scales.float(), columns // GROUP).unsqueeze(-1)
    values = (groups / steps.where(steps > 0, 1.0)).round_().clamp_(-127, 127).to(torch.int8)
    return Quantized("int8", values.view(n, columns), scales, None, GROUP)


def _float16(values: torch.Tensor, where: str) -> torch.Tensor:
    if bool((values.abs() > _FLOAT16_MAX).any()):
        raise too_large(where, "float16")
    return values.to(torch.float16)


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Values as in :class:`Quantized`, scales and zero points as float32, block after block."""


def _q8_0(rows: np.ndarray) -> _Parts:
    blocks = rows.reshape(-1, 34)
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _q4_0(rows: np.ndarray) -> _Parts:
    blocks = rows.reshape(-1, 18)
    return _pairs(_split(blocks[:, 2:])), _half(blocks, 0), None


def _q4_1(rows: np.ndarray) -> _Parts:
    blocks = rows.reshape(-1, 20)
    return _affine(_split(blocks[:, 4:]), _half(blocks, 0), -_half(blocks, 2))


def _q4_k(rows: np.ndarray) -> _Parts:
    blocks = rows.reshape(-1, 144)
    scales, minima = _six_bits(blocks[:, 4:16])
    halves = blocks[:, 16:].reshape(-1, 4, 32)  # 32 bytes: a group in the low halves, the next in the high ones
    codes = np.stack((halves & 15, halves >> 4), axis=2).reshape(-1, GROUP)
    return _affine(codes, (_half(blocks, 0) * scales).reshape(-1, 1), (_half(blocks, 2) * minima).reshape(-1, 1))


KEPT: dict[str, Callable[[np.ndarray], _Parts]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at ``offset`` of each block, as float32 ``[blocks, 1]``."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).astype(np.float32)


def _split(octets: np.ndarray) -> np.ndarray:
    """16 bytes to 32 numbers: the low halves, then the high ones."""
    return np.concatenate((octets & 15, octets >> 4), axis=1)


def _pairs(codes: np.ndarray) -> np.ndarray:
    packed: np.ndarray = codes[:, ::2] | codes[:, 1::2] << 4
    return packed


def _affine(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray) -> _Parts:
    """``codes * scales - minima`` as ``(codes - zeros) * scales``, by groups.

    Where a scale is nothing beside its minimum – all values of a group are one, to float16 – the minimum itself
    becomes the scale.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = scales.astype(np.float16).astype(np.float32)
        flat = np.abs(minima) > _FLOAT16_MAX * np.abs(rounded)
    flat &= np.isfinite(minima)
    zeros = np.divide(minima, rounded, out=np.zeros_like(minima), where=~flat & (rounded != 0))
    return (
        _pairs(np.where(flat, np.uint8(0), codes)),
        np.where(flat, minima, scales),
        np.where(flat, 1.0, zeros).astype(np.float32),
    )


def _six_bits(octets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes to the 8 scales and 8 minima of a Q4_K block, 6 bits each."""
    first, second, third = octets[:, :4], octets[:, 4:8], octets[:, 8:]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6) << 4), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6) << 4), axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)
