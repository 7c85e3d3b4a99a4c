"""AWQ's GEMM layout, as AutoAWQ writes it (``awq/modules/linear/gemm.py``): 4 bits with zero points.

========== ================ ==================================================================
tensor     dtype, shape     holds
========== ================ ==================================================================
qweight    int32 [D, N / 8] 4 bits i of word c: row ``8 c + ORDER[i]`` of the weight ``[N, D]``
qzeros     int32 [G, N / 8] zero points, packed alike
scales     float [G, N]     one for D / G neighbouring columns
========== ================ ==================================================================

Dequantised: ``(q - zero) * scale``. ``zero_point = false`` says that every zero point is 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mhaffn.formats import Format
from mhaffn.quantized import INT4_ZERO, Quantized, dequantize
from mhaffn.store.layout import (
    Linear,
    allowed,
    by_group,
    check_groups,
    group_kept,
    group_sizes,
    named,
    nibbles,
    pairs,
    refused,
    require_middle,
    setting,
    variants,
)
from mhaffn.store.safetensors import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("qweight", "qzeros", "scales")
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word row 0, 1, … of its eight lies: the inverse of ``ORDER`` = 0, 2, 4, 6, 1, 3, 5, 7."""


class Awq:
    """Checkpoints whose quant_method is "awq"."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        configs = variants(config)
        for found in configs:
            allowed("bits", named(found, 4, "bits", "w_bit"), 4)
            allowed("version", named(found, "gemm", "version", "format", "checkpoint_format"), "gemm")
            if named(found, None, "backend") == "llm-awq":  # another layout than its version names
                raise refused("backend", "llm-awq", "'autoawq'")
        self._group_sizes = group_sizes(configs, "group_size", "q_group_size")
        self._symmetric = not any(setting(found, "zero_point", True, True, False) for found in configs)

    def format(self, linear: Linear) -> Format:
        n, d = linear.shape
        linear.refuse_others(PARTS)
        linear.expect("qweight", ("I32",), (d, n // 8))
        scales = linear.header("scales", FLOATS)
        groups = scales.shape[0] if scales.shape else 0
        if n % 8 or groups == 0 or d % groups:
            raise linear.corrupt(f"got scales of shape {list(scales.shape)} for a weight of {[n, d]}")
        linear.expect("scales", FLOATS, (groups, n))
        linear.expect("qzeros", ("I32",), (groups, n // 8))
        check_groups(linear, groups, self._group_sizes)
        return Format("int4", group_kept(linear, 4, d // groups), not self._symmetric, FLOATS[scales.dtype])

    def weight(self, linear: Linear) -> Quantized:
        format = self.format(linear)
        group = format.group or linear.shape[1]
        scales, groups = linear.finite("scales").T, linear.shape[1] // group
        zeros = _rows(linear.read("qzeros")).T
        if self._symmetric:
            require_middle(linear, zeros, INT4_ZERO, "zero_point = false")
        values = pairs(_rows(linear.read("qweight")).T)
        kept = None if self._symmetric else by_group(zeros.to(scales.dtype), groups)
        return Quantized("int4", values, by_group(scales, groups), kept, group)

    def floats(self, linear: Linear) -> Tensor:
        return dequantize(self.weight(linear))


def _rows(words: Tensor) -> Tensor:
    """int32 ``[R, N / 8]`` to uint8 ``[R, N]``, rows of the weight in order."""
    eights = nibbles(words).view(words.shape[0], -1, 8)
    return eights[:, :, list(_PLACES)].flatten(1)
