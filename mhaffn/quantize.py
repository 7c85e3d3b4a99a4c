"""Matrices to few bits: rounded to nearest, or with the scales that a search finds best.

The search minimises ``sum_j importance[j] * (w[j] - dequantised[j])²`` in each group by itself: it tries scales around
the one that spans the group, fits each by least squares to the levels it gave, and keeps the best. Importance is 1,
or the mean square of what the matrix multiplies (:mod:`mhaffn.calibrate`): then this is the error of its output, for
inputs that do not correlate.

Without importance, the best scale for symmetric ``int4`` by this measure cuts off the largest weights. There the
square of an error counts ``sqrt(mean(w²) + w[j]²)``, so they are cut off less: llama.cpp's formula (``ggml-quants.c``,
with the mean of a row, here of the group), which is not derived but measured to bring a model's outputs nearer
(``docs/quality.md``). Beside a measured importance it brought nothing.

Rows are worked on a few at a time, so beside matrix and result this needs :data:`WORKING_BYTES` of memory at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mhaffn.errors import ConfigError
from mhaffn.formats import Format
from mhaffn.quantized import INT4_ZERO, Quantized

ROWS_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Elements worked on at once: on a CPU they and what is made of them stay in its caches."""
WORKING_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
FP8_MAX = 448.0
SEARCH = 1
"""Raised whenever the same matrix, importance and device come to give other bits: an unfinished pack names it."""

Levels = Callable[[Tensor], Tensor]
"""Rounds ``w / scale`` to the nearest value that the format has."""


def quantize(
    matrix: Tensor, format: Format, *, importance: Tensor | None = None, nearest: bool = False, device: str = "cpu"
) -> Quantized:
    """``matrix`` ``[N, D]``, of any float dtype, in ``format``; its parts lie on the CPU.

    ``importance`` ``[D]``, not negative, weighs errors by column; ``nearest`` leaves the search out. ``device`` is
    where it is computed: same matrix, importance and device give the same bits.

    Raises :class:`ConfigError` where the format does not fit the shape, the matrix is not finite, or its scales are
    beyond the format's.
    """
    rows, columns = matrix.shape
    if not format.fits((rows, columns)):
        raise ConfigError(f"got format {format} for {rows} x {columns}, expected a group that divides {columns}")
    parts = format.parts((rows, columns), "float32")
    made = {name: torch.empty(part.shape, dtype=getattr(torch, part.dtype)) for name, part in parts.items()}
    group = format.group or columns
    weights = None if importance is None else _weights(importance, columns, group).to(device)
    step = max(1, ROWS_ELEMENTS[torch.device(device).type] // columns)
    for start in range(0, rows, step):
        piece = matrix[start : start + step].to(device, torch.float32).view(-1, columns // group, group)
        if not bool(piece.isfinite().all()):
            raise ConfigError("got a matrix with values that are not finite, expected finite ones: keep it plain")
        scales, zeros, values = _piece(piece, format, weights, nearest)
        found = {"scales": scales.squeeze(-1), "values": _packed(values, format)} | (
            {} if zeros is None else {"zeros": zeros.squeeze(-1)}
        )
        for name, part in found.items():
            made[name][start : start + step].copy_(part)
    return Quantized(format.name, made["values"], made["scales"], made.get("zeros"), group)


def _weights(importance: Tensor, columns: int, group: int) -> Tensor:
    """``[1, G, group]``, 1 on average in each group; a group that nothing is known of weighs all the same."""
    if importance.shape != (columns,) or not bool((importance.isfinite() & (importance >= 0)).all()):
        raise ConfigError(f"got importance {tuple(importance.shape)}, expected {columns} finite numbers, none negative")
    groups = importance.to(torch.float32).view(1, -1, group)
    mean = groups.mean(-1, keepdim=True)
    # An input that was never seen may still come: a little of the mean goes to each.
    return torch.where(mean > 0, groups / mean.clamp_min(1e-30), 1.0) * 0.99 + 0.01


def _sizes(w: Tensor) -> Tensor:
    """``sqrt(mean(w²) + w²)``, ``[n, G, group]``, in units of each group's widest value."""
    squares = _divided(w, w.abs().amax(-1, keepdim=True)).square_()
    return (squares + squares.mean(-1, keepdim=True)).sqrt_()


def _packed(values: Tensor, format: Format) -> Tensor:
    """Levels ``[n, G, group]`` as the format stores them, ``[n, columns]``."""
    flat = values.flatten(1)
    if format.name == "fp8":
        return flat.to(torch.float8_e4m3fn)
    if format.name == "int8":
        return flat.to(torch.int8)
    codes = (flat if format.zeros else flat + INT4_ZERO).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _piece(w: Tensor, format: Format, h: Tensor | None, nearest: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scales and zero points ``[n, G, 1]`` as stored, and levels ``[n, G, group]``, of groups ``w``."""
    stored: torch.dtype = getattr(torch, format.scale_dtype)
    if format.zeros:
        return _with_zeros(w, h, nearest, stored)
    levels, most, ratios = _LEVELS[format.name]
    widest = w.abs().amax(-1, keepdim=True)
    _check_scales(widest / most, stored)
    if nearest:
        scales = (widest / most).to(stored)
        return scales, None, levels(_divided(w, scales))
    if format.name == "int4" and h is None:
        h = _sizes(w)
    best = _Best(w, h)
    if format.name == "int4":  # there is one level more below zero than above: the widest value may have it
        signed = torch.where(w.amax(-1, keepdim=True) == widest, widest, -widest)
        tried: Iterator[Tensor] = (signed / -(8.0 * ratio) for ratio in ratios)
        tried = (s for pair in zip(tried, (widest / (7.0 * ratio) for ratio in ratios), strict=True) for s in pair)
    else:
        tried = (widest / (most * ratio) for ratio in ratios)
    for scale in tried:
        q = best.consider(scale.to(stored), None, levels)
        fitted = _mean(w * q, h) / _mean(q * q, h).clamp_min(1e-30)
        best.consider(fitted.to(stored), None, levels)
    return best.scales, None, levels(_divided(w, best.scales))


def _with_zeros(w: Tensor, h: Tensor | None, nearest: bool, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    _check_scales((high - low) / 15, stored)
    if nearest:
        scales = ((high - low) / 15).to(stored)
        zeros = _divided(-low, scales).round().clamp(0, 15).to(stored)
        return scales, zeros, _codes(_divided(w, scales) + zeros)
    best = _Best(w, h)
    for ratio in _ZERO_RATIOS:
        scale = (high - low) / (15 * ratio)
        q = best.consider(scale.to(stored), (_divided(-low / ratio, scale)).to(stored), _codes)
        # Least squares of w = scale * q + offset.
        mean_q, mean_w = _mean(q, h), _mean(w, h)
        spread = _mean((q - mean_q).square(), h)
        fitted = _mean((q - mean_q) * (w - mean_w), h) / spread.clamp_min(1e-30)
        fitted = torch.where(fitted > 0, fitted, scale)
        best.consider(fitted.to(stored), (mean_q - _divided(mean_w, fitted)).clamp(-16, 31).to(stored), _codes)
    assert best.zeros is not None
    return best.scales, best.zeros, _codes(_divided(w, best.scales) + best.zeros)


class _Best:
    """The best scales so far, and zero points where there are any, of groups ``w`` ``[n, G, group]``."""

    def __init__(self, w: Tensor, h: Tensor | None) -> None:
        self._w, self._h = w, h
        self._error: Tensor | None = None
        self.scales: Tensor
        self.zeros: Tensor | None = None

    def consider(self, scales: Tensor, zeros: Tensor | None, levels: Levels) -> Tensor:
        """Keeps these where they are better; returns the levels they give."""
        exact = _divided(self._w, scales)
        q = levels(exact if zeros is None else exact + zeros.to(torch.float32))
        back = (q if zeros is None else q - zeros.to(torch.float32)) * scales.to(torch.float32)
        error = _mean((self._w - back).square(), self._h)
        finite = scales.isfinite() if zeros is None else scales.isfinite() & zeros.isfinite()
        error = torch.where(finite, error, torch.inf).nan_to_num(nan=torch.inf)
        if self._error is None:
            self._error, self.scales, self.zeros = error, scales, zeros
            return q
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = None if zeros is None or self.zeros is None else torch.where(better, zeros, self.zeros)
        return q


def _check_scales(scales: Tensor, stored: torch.dtype) -> None:
    """Raises for values that ``stored`` has no scales for; rows as good as empty beside the others become zeros."""
    kept = scales.to(stored)
    if not bool(kept.isfinite().all()):
        raise ConfigError(f"got values whose scales are beyond {stored}: keep the matrix plain")
    lost = scales[kept == 0]
    if lost.numel() and float(lost.amax()) > _NEGLIGIBLE * float(scales.amax()):
        raise ConfigError(f"got values too small for scales in {stored}: keep the matrix plain")


def _mean(x: Tensor, h: Tensor | None) -> Tensor:
    return (x if h is None else x * h).mean(-1, keepdim=True)


def _divided(w: Tensor, scales: Tensor) -> Tensor:
    """``w / scales``, 0 where a scale is 0, or so small that 1 over it is no number."""
    inverse = 1 / scales.to(torch.float32)
    return w * torch.where(inverse.isfinite(), inverse, 0.0)


def _codes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 15)


def _fp8(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32)


_NEGLIGIBLE = 2.0**-10
_INT4_RATIOS = tuple(1 + 0.04 * step for step in range(-3, 10))
_INT8_RATIOS = (
    *(1.06, 1.03),
    *(1.004 - 0.005 * step for step in range(12)),
    *(0.94 - 0.01 * step for step in range(11)),
)
"""A scale a little wider than need be costs little, and each step lets others of the weights fall near its levels."""
_ZERO_RATIOS = tuple(1 + 0.05 * step for step in range(-2, 9))
_LEVELS: dict[str, tuple[Levels, float, tuple[float, ...]]] = {
    "int4": (lambda x: x.round().clamp(-8, 7), 7.0, _INT4_RATIOS),
    "int8": (lambda x: x.round().clamp(-127, 127), 127.0, _INT8_RATIOS),
    "fp8": (_fp8, FP8_MAX, (1.0, 0.84, 0.71, 0.59, 0.53)),
}
