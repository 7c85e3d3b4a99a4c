"""How weights are kept: plain, or in few bits; and which sublayer in which format.

A format is written ``int4``, ``int4:64`` (64 neighbouring columns share a scale) or ``int4:64:zeros`` (and a zero
point); ``plain`` is the store's own dtype. What the parts mean is in :mod:`mhaffn.quantized`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mhaffn.config import KINDS, Kind, ModelConfig, Sublayer, order
from mhaffn.errors import ConfigError
from mhaffn.files import shown

GROUPS = (32, 64, 128, 256)
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}
"""Bytes of the dtypes that parts of weights have, by torch's names."""
VALUES_DTYPES = {"int8": "int8", "int4": "uint8", "fp8": "float8_e4m3fn"}
EXAMPLES = "plain, int8, int4, fp8, or with a group int4:64, and with zero points int4:64:zeros"


@dataclass(frozen=True)
class Part:
    """One tensor of a weight: torch's name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Format:
    """``name`` is plain, int8, int4 or fp8; ``group`` columns share a scale (None: the whole row).

    ``scale_dtype`` is that of the zero points too.
    """

    name: str
    group: int | None = None
    zeros: bool = False
    scale_dtype: str = "float16"

    @staticmethod
    def parse(text: str) -> Format:
        """The format that ``text`` names; raises :class:`ConfigError`."""
        name, *options = text.split(":")
        zeros = options[-1:] == ["zeros"]
        sizes = options[:-1] if zeros else options
        group = 128 if name == "int4" else None
        if sizes:
            group = int(sizes[0]) if sizes[0] in map(str, GROUPS) else -1
        fits = {"plain": not options, "fp8": not options, "int8": not zeros, "int4": True}.get(name, False)
        if not fits or len(sizes) > 1 or group == -1:
            groups = ", ".join(map(str, GROUPS))
            raise ConfigError(f"got format {shown(text)}, expected {EXAMPLES}; groups are {groups}")
        return Format(name, group, zeros)

    def __str__(self) -> str:
        return ":".join([self.name, *([str(self.group)] if self.group else []), *(["zeros"] if self.zeros else [])])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether matrices of ``shape`` can be kept so."""
        columns = shape[-1]
        return columns % (self.group or 1) == 0 and (self.name != "int4" or columns % 2 == 0)

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, Part]:
        """The parts of a weight of ``shape`` in a store of ``dtype``; vectors (norms) are always plain."""
        if self.name == "plain" or len(shape) == 1:
            return {"values": Part(dtype, shape)}
        rows, columns = shape
        values = Part(VALUES_DTYPES[self.name], (rows, columns // 2 if self.name == "int4" else columns))
        scales = Part(self.scale_dtype, (rows, columns // (self.group or columns)))
        return {"values": values, "scales": scales} | ({"zeros": scales} if self.zeros else {})


PLAIN = Format("plain")


@dataclass(frozen=True)
class Formats:
    """The format of each sublayer: by kind, or by layer and kind, where the last that is given counts.

    A sublayer without any stays as its source has it.
    """

    kinds: Mapping[Kind, Format] = field(default_factory=dict)
    layers: tuple[tuple[str, Mapping[Sublayer, Format]], ...] = ()

    @staticmethod
    def parse(mha: str | None = None, ffn: str | None = None, layers: Sequence[str] = ()) -> Formats:
        """``layers`` are of the form ``0-1,78-79=plain`` or ``0-1:ffn=int8``. Raises :class:`ConfigError`."""
        given: dict[Kind, str | None] = {"mha": mha, "ffn": ffn}
        kinds = {kind: Format.parse(text) for kind, text in given.items() if text is not None}
        return Formats(kinds, tuple((text, dict(_layers(text))) for text in layers))

    def __bool__(self) -> bool:
        return bool(self.kinds or self.layers)

    def of(self, sublayer: Sublayer) -> Format | None:
        for _, chosen in reversed(self.layers):
            if sublayer in chosen:
                return chosen[sublayer]
        return self.kinds.get(sublayer.kind)

    def check(self, config: ModelConfig) -> None:
        """Raises :class:`ConfigError` for layers that the model has not, and groups that do not divide its widths."""
        for text, chosen in self.layers:
            if max(sublayer.layer for sublayer in chosen) >= config.num_layers:
                raise ConfigError(f"got --layers {text}, expected layers from 0 to {config.num_layers - 1}")
        for sublayer in order(config.num_layers):
            if (format := self.of(sublayer)) is not None:
                _check_shapes(format, config.sublayer_shapes(sublayer.kind))

    def options(self) -> list[str]:
        """What :meth:`parse` took, as options of a command."""
        found = [word for kind, format in self.kinds.items() for word in (f"--{kind}", str(format))]
        return found + [word for text, _ in self.layers for word in ("--layers", text)]


def _check_shapes(format: Format, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises :class:`ConfigError` where ``format`` cannot hold one of the matrices in ``shapes``."""
    for name, shape in shapes.items():
        if len(shape) > 1 and not format.fits(shape):
            fitting = [group for group in GROUPS if all(s[-1] % group == 0 for s in shapes.values() if len(s) > 1)]
            advice = f"Take {format.name}:{fitting[-1]}." if fitting else "Take int8, with a scale for each row."
            raise ConfigError(
                f"got format {format} for {name} {list(shape)}, expected a group that divides its {shape[-1]} columns. "
                f"{advice}"
            )


_LAYERS = re.compile(r"(\d{1,5}(?:-\d{1,5})?(?:,\d{1,5}(?:-\d{1,5})?)*)(?::(mha|ffn))?=(.+)", re.ASCII)


def _layers(text: str) -> Iterator[tuple[Sublayer, Format]]:
    found = _LAYERS.fullmatch(text)
    if found is None:
        raise ConfigError(f"got --layers {shown(text)}, expected layers and a format, as 0-1,78-79=plain or 3:ffn=int8")
    ranges, only, name = found.groups()
    format = Format.parse(name)
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        if int(last or first) < int(first):
            raise ConfigError(f"got --layers {shown(text)}, expected a range that goes up, as 0-1, not {item}")
        for layer in range(int(first), int(last or first) + 1):
            yield from ((Sublayer(layer, kind), format) for kind in KINDS if only in (None, kind))


ALL_PLAIN = Formats(dict.fromkeys(KINDS, PLAIN))
"""Everything in the store's own dtype, also what its source has in few bits."""
