"""GPTQ's layout, as AutoGPTQ and GPTQModel write it: 4 or 8 bits, with or without zero points.

========== ======================= ===================================================================
tensor     dtype, shape            holds
========== ======================= ===================================================================
qweight    int32 [D b / 32, N]     b bits j of word r: column ``32 r / b + j`` of the weight ``[N, D]``
qzeros     int32 [G, N b / 32]     zero points, packed along N
scales     float [G, N]
g_idx      int32 [D]               the group of each column; may be left out where they are in order
========== ======================= ===================================================================

Dequantised: ``(q - zero) * scale``. Version 1 of the format ("gptq") stores each zero point less 1, and takes that
away of whole words, borrowing across numbers; version 2 ("gptq_v2") stores them as they are
(``gptqmodel/utils/model.py``). Columns out of order (``desc_act``) have no groups of neighbours: such a matrix can be
quantised anew from its values, not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mhaffn.formats import Format
from mhaffn.quantized import INT4_ZERO, Quantized
from mhaffn.store.layout import (
    Linear,
    allowed,
    by_group,
    check_groups,
    group_kept,
    group_sizes,
    named,
    nibbles,
    refused,
    require_middle,
    setting,
    variants,
)
from mhaffn.store.safetensors import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_INT8_ZERO = 128


class Gptq:
    """Checkpoints whose quant_method is "gptq"."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        configs = variants(config)
        for found in configs:
            setting(found, "is_marlin_format", False, False)
            setting(found, "rotation", None, None)  # needs its inverse at run time
            setting(found, "adapter", None, None)
        versions = {
            allowed("format", named(found, "gptq", "checkpoint_format", "format"), "gptq", "gptq_v2")
            for found in configs
        }
        if len(versions) > 1:
            raise refused("format", sorted(versions), "one for all layers")
        self._first_version = versions == {"gptq"}
        self._bits: set[int] = {setting(found, "bits", None, 4, 8) for found in configs}
        self._group_sizes = group_sizes(configs, "group_size")
        symmetric = {setting(found, "sym", True, True, False) for found in configs}
        self._symmetric, self._some_symmetric = False not in symmetric, True in symmetric
        self._in_order = not any(setting(found, "desc_act", False, True, False) for found in configs)

    def format(self, linear: Linear) -> Format:
        bits, groups = self._sizes(linear)
        group = group_kept(linear, bits, linear.shape[1] // groups)
        zeros = bits == 4 and not self._symmetric
        return Format(f"int{bits}", group, zeros, FLOATS[linear.tensors["scales"].dtype])

    def _sizes(self, linear: Linear) -> tuple[int, int]:
        """Bits of a value and number of groups, by the shapes stored."""
        n, d = linear.shape
        linear.refuse_others(PARTS)
        found = linear.expect("qweight", ("I32",), (d // 8, n), (d // 4, n))
        bits = 4 if found.shape[0] == d // 8 else 8
        if bits not in self._bits:
            says = " or ".join(map(str, sorted(self._bits)))
            raise linear.corrupt(f"got qweight of shape {list(found.shape)}, {bits} bits, expected bits = {says}")
        scales = linear.header("scales", FLOATS)
        groups = scales.shape[0] if scales.shape else 0
        if d % 8 or n % 8 or groups == 0:
            raise linear.corrupt(f"got scales of shape {list(scales.shape)} for a weight of {[n, d]}")
        linear.expect("scales", FLOATS, (groups, n))
        linear.expect("qzeros", ("I32",), (groups, n * bits // 32))
        check_groups(linear, groups, self._group_sizes)
        if "g_idx" in linear.tensors or not self._in_order:
            linear.expect("g_idx", ("I32",), (d,))
        if bits == 8 and not self._some_symmetric:
            raise linear.unsupported("got zero points (sym = false) at 8 bits, expected none")
        return bits, groups

    def weight(self, linear: Linear) -> Quantized:
        format, (bits, stored) = self.format(linear), self._sizes(linear)
        index = self._columns(linear, stored)
        if index is not None:
            raise linear.unsupported(
                "got columns out of order in g_idx (desc_act), expected groups of neighbouring columns",
                "Quantise its values anew: pack with --ffn and --mha of your choice.",
            )
        group = format.group or linear.shape[1]
        groups = linear.shape[1] // group
        scales, zeros = by_group(linear.finite("scales").T, groups), self._zeros(linear, bits)
        octets = _octets(linear)
        if bits == 8:
            return Quantized("int8", _signed(octets), scales, None, group)
        kept = None if self._symmetric else by_group(zeros.T.to(scales.dtype), groups)
        return Quantized("int4", octets, scales, kept, group)

    def floats(self, linear: Linear) -> Tensor:
        import torch

        bits, groups = self._sizes(linear)
        index = self._columns(linear, groups)
        if index is None:
            index = torch.arange(linear.shape[1]) // (linear.shape[1] // groups)
        codes = _octets(linear)
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        zeros = self._zeros(linear, bits).T.to(torch.float32)[:, index]
        scales = linear.finite("scales").T.to(torch.float32)[:, index]
        return codes.to(torch.float32).sub_(zeros).mul_(scales)

    def _zeros(self, linear: Linear, bits: int) -> Tensor:
        """Zero points, uint8 ``[G, N]``."""
        import torch

        words = linear.read("qzeros")
        if self._first_version:
            one = 0x11111111 if bits == 4 else 0x01010101
            words = ((words.to(torch.int64) + one) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        zeros = nibbles(words) if bits == 4 else words.contiguous().view(torch.uint8)
        middle = INT4_ZERO if bits == 4 else _INT8_ZERO
        if self._symmetric:
            require_middle(linear, zeros, middle, "sym = true")
        elif bits == 8 and bool((zeros != middle).any()):
            raise linear.unsupported("got zero points (sym = false) at 8 bits, expected none")
        return zeros

    def _columns(self, linear: Linear, groups: int) -> Tensor | None:
        """The group of each column, int64 ``[D]``; None where they are in order."""
        import torch

        if "g_idx" not in linear.tensors:
            return None
        index = linear.read("g_idx").to(torch.int64)
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise linear.corrupt(f"got g_idx from {int(index.min())} to {int(index.max())}, expected 0 to {groups - 1}")
        in_order = torch.arange(len(index)) // (len(index) // groups)
        return None if torch.equal(index, in_order) else index


def _octets(linear: Linear) -> Tensor:
    """qweight as bytes in the order of columns, uint8 ``[N, D b / 8]``: two columns a byte at 4 bits, as in ours."""
    import torch

    words = linear.read("qweight")
    rows, n = words.shape
    return words.contiguous().view(torch.uint8).view(rows, n, 4).permute(1, 0, 2).reshape(n, rows * 4)


def _signed(octets: Tensor) -> Tensor:
    """Numbers with their zero at 128, uint8, as int8."""
    import torch

    return (octets ^ _INT8_ZERO).view(torch.int8)
