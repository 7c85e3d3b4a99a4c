"""compressed-tensors: int4 and int8 packed into words, int8 and fp8 as they are; per tensor, row or group.

================= ======================= ==================================================================
tensor            dtype, shape            holds
================= ======================= ==================================================================
weight_packed     int32 [N, D b / 32]     pack-quantized: b bits j of word c are column ``32 c / b + j``, stored
                                          with ``2 ** (b - 1)`` added
weight_shape      int [2]                 beside it: N, D
weight            int8 or fp8 [N, D]      naive-, int- and float-quantized
weight_scale      float [N, G], [N], [1]  one for D / G neighbouring columns, for a row, for all
weight_zero_point int32 [N b / 32, G]     packed along N where the weight is packed, otherwise int8 [N, G]
================= ======================= ==================================================================

Dequantised: ``(value - zero_point) * scale``. Which of these a layer has is read from its tensors, and must be what one
of the config's groups says; which layers a group is for is not asked. Scales of activations are left: activations stay
as they are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhaffn.files import shown
from mhaffn.formats import Format
from mhaffn.quantized import Quantized, dequantize
from mhaffn.store.layout import (
    Linear,
    allowed,
    by_group,
    check_groups,
    group_kept,
    group_size,
    named,
    nibbles,
    refused,
    setting,
)
from mhaffn.store.safetensors import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision")
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
PARTS = ("weight_packed", "weight_shape", "weight", "weight_scale", "weight_zero_point", "weight_g_idx")
_STRATEGIES = ("tensor", "channel", "group")
_PLAIN = {"I8": "int8", "F8_E4M3": "fp8"}


@dataclass(frozen=True)
class Scheme:
    """How a group of the config has its weights; ``group`` counts the columns of a scale, -1 where it has the row."""

    type: str
    bits: int
    group: int
    symmetric: bool

    @staticmethod
    def of(name: str, group: Mapping[str, Any], format: str) -> Scheme | None:
        """The scheme of a group in ``config_groups``; None where it leaves weights alone.

        Raises :class:`UnsupportedModelError` for what no tensor would tell: bits of which as many fit in a word, blocks
        of rows, columns out of order.
        """
        format = named(group, format, "format")
        allowed(f"{name}.format", format, *FORMATS)
        weights = group.get("weights")
        if weights is None:
            return None
        if not isinstance(weights, Mapping):
            raise refused(f"{name}.weights", weights, "an object")
        kind = allowed(f"{name}.weights.type", named(weights, "int", "type"), "int", "float")
        plain = kind == "int" and format in ("int-quantized", "naive-quantized")  # a byte a value, however many bits
        bits = weights.get("num_bits", 8)
        allowed(f"{name}.weights.num_bits", bits, *((8,) if kind == "float" else range(1, 9) if plain else (4, 8)))
        allowed(f"{name}.weights.dynamic", weights.get("dynamic", False), False)
        order = weights.get("actorder") or None
        if order is not None:
            allowed(f"{name}.weights.actorder", order.lower() if isinstance(order, str) else order, "weight", "static")
        given = weights.get("group_size")
        columns = None if given is None else group_size(f"{name}.weights.group_size", given)
        implied = "tensor" if columns is None else "channel" if columns == -1 else "group"
        strategy = allowed(f"{name}.weights.strategy", named(weights, implied, "strategy"), *_STRATEGIES)
        if strategy == "group" and (columns is None or columns == -1):
            raise refused(f"{name}.weights.group_size", columns, "a number of columns")
        symmetric = allowed(f"{name}.weights.symmetric", weights.get("symmetric", True), True, False)
        return Scheme(kind, bits, columns if strategy == "group" and columns else -1, symmetric)


class CompressedTensors:
    """Checkpoints whose quant_method is "compressed-tensors"."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        format = setting(config, "format", "pack-quantized", *FORMATS)
        setting(config, "quantization_status", "compressed", "compressed", "frozen")
        sparsity = config.get("sparsity_config") or {"format": "dense"}
        if not isinstance(sparsity, Mapping):
            raise refused("sparsity_config", sparsity, "an object")
        allowed("sparsity_config.format", sparsity.get("format"), "dense")
        if config.get("transform_config") not in (None, {}):
            raise refused("transform_config", config["transform_config"], "none")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping):
            raise refused("config_groups", groups, "an object")
        found = []
        for key, group in groups.items():
            name = f"config_groups[{shown(key)}]"
            if not isinstance(group, Mapping):
                raise refused(name, group, "an object with weights")
            found.append(Scheme.of(name, group, format))
        self._schemes = [scheme for scheme in found if scheme is not None]

    def format(self, linear: Linear) -> Format:
        return self._format(linear)[0]

    def _format(self, linear: Linear) -> tuple[Format, bool]:
        """The format, and whether the weight is packed into words."""
        n, d = linear.shape
        linear.refuse_others(PARTS + ACTIVATIONS)
        if "weight_g_idx" in linear.tensors:
            raise linear.unsupported("got weight_g_idx (actorder = group), expected groups of neighbouring columns")
        packed = "weight_packed" in linear.tensors
        if packed and "weight" in linear.tensors:
            raise linear.corrupt("got both weight and weight_packed, expected one of them")
        if packed:
            found = linear.expect("weight_packed", ("I32",), (n, -(-d // 8)), (n, -(-d // 4)))
            linear.expect("weight_shape", ("I64", "I32"), (2,))
            name = "int4" if found.shape[1] == -(-d // 8) else "int8"
        else:
            name = _PLAIN[linear.expect("weight", tuple(_PLAIN), (n, d)).dtype]
        scales = linear.header("weight_scale", FLOATS)
        groups = scales.shape[1] if len(scales.shape) == 2 else 1
        if groups == 0:
            raise linear.corrupt(f"got weight_scale of shape {list(scales.shape)} for a weight of {[n, d]}")
        linear.expect("weight_scale", FLOATS, (n, groups), (n,), (1,), (1, 1), ())
        zeros = "weight_zero_point" in linear.tensors
        self._check_scheme(linear, name, packed, groups, zeros)
        if name == "fp8" and groups > 1:
            raise linear.unsupported(f"got fp8 in groups of {d // groups} columns, expected a scale for each row")
        if name == "int4":
            if d % 8:
                raise linear.unsupported(f"got rows of {d} columns at 4 bits, expected a multiple of 8")
            if zeros and (n % 8 or scales.shape[:1] != (n,)):
                raise linear.unsupported("got zero points for a whole tensor, expected them for rows or groups")
            if zeros:
                linear.expect("weight_zero_point", ("I32",), (n // 8, groups))
        group = None if name == "fp8" else group_kept(linear, 8 if name == "int8" else 4, d // groups)
        return Format(name, group, name == "int4" and zeros, FLOATS[scales.dtype]), packed

    def _check_scheme(self, linear: Linear, name: str, packed: bool, groups: int, zeros: bool) -> None:
        """Raises where no scheme is one of tensors like these."""
        kind, bits = ("float", 8) if name == "fp8" else ("int", 4 if name == "int4" else 8)
        fits = [s for s in self._schemes if s.type == kind and (s.bits == bits or (not packed and kind == "int"))]
        if not fits:
            says = " or ".join(sorted({f"{s.bits} bits of {s.type}" for s in self._schemes})) or "none quantised"
            raise linear.corrupt(f"got values of {bits} bits of {kind}, expected {says}, as config_groups says")
        check_groups(linear, groups, {scheme.group for scheme in fits})
        if not zeros and all(not scheme.symmetric for scheme in fits):
            raise linear.corrupt("got no weight_zero_point, expected one, as symmetric = false says")
        if zeros and packed and all(scheme.symmetric for scheme in fits):
            raise linear.corrupt("got weight_zero_point, expected none, as symmetric = true says")

    def weight(self, linear: Linear) -> Quantized:
        import torch

        format, packed = self._format(linear)
        n, d = linear.shape
        group = format.group or d
        groups = d // group
        scales = linear.finite("weight_scale")
        scales = by_group((scales.reshape(-1, 1) if scales.dim() < 2 else scales).expand(n, -1), groups)
        if format.name == "int4":
            zeros = self._zeros(linear).to(scales.dtype) if format.zeros else None
            octets = linear.read("weight_packed").view(torch.uint8)
            self._check_shape(linear)
            return Quantized("int4", octets, scales, by_group(zeros, groups) if zeros is not None else None, group)
        if "weight_zero_point" in linear.tensors and bool(linear.read("weight_zero_point").to(torch.float32).any()):
            raise linear.unsupported(f"got zero points beside {format.name} values, expected none or 0")
        if packed:
            self._check_shape(linear)
            octets = linear.read("weight_packed").view(torch.uint8)[:, :d].contiguous()
            return Quantized("int8", (octets ^ 128).view(torch.int8), scales, None, group)
        return Quantized(
            format.name, linear.finite("weight") if format.name == "fp8" else linear.read("weight"), scales, None,
            group,
        )  # fmt: skip

    def floats(self, linear: Linear) -> Tensor:
        return dequantize(self.weight(linear))

    def _zeros(self, linear: Linear) -> Tensor:
        """Zero points, uint8 ``[N, G]``: with 8 added as stored, so that they count from our zero."""
        return nibbles(linear.read("weight_zero_point").T).T

    def _check_shape(self, linear: Linear) -> None:
        got = linear.read("weight_shape").tolist()
        if tuple(got) != linear.shape:
            raise linear.corrupt(f"got weight_shape {got}, expected {list(linear.shape)}")
