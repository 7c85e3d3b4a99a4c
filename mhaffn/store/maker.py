"""What goes into a packed store: the tensors of each weight, converted, kept in few bits or quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import xxhash

from mhaffn.config import order
from mhaffn.errors import ConfigError, CorruptFileError, StoreError
from mhaffn.files import shown
from mhaffn.formats import PLAIN, Format, Formats, Part
from mhaffn.store.source import Source, tensors_by_file

if TYPE_CHECKING:
    import torch

    from mhaffn.quantized import Quantized

_WIDER = {"float16": "--dtype bfloat16 or float32", "bfloat16": "--dtype float32"}


@dataclass(frozen=True)
class Maker:
    """Makes the weights of ``source`` as a store of ``dtype`` with ``formats`` has them; see :func:`mhaffn.pack`."""

    source: Source
    dtype: str
    formats: Formats
    device: str | None = None
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.formats.check(self.source.config)

    def told(self, importance: Callable[[Source], Mapping[str, torch.Tensor]]) -> Maker:
        """The same with what columns matter.

        Raises :class:`ConfigError` where the names are not those of the source's matrices.
        """
        found = importance(self.source)
        known = {name for _, _, weights in self.contents() for name in weights}
        if strangers := found.keys() - known:
            raise ConfigError(f"got importance of {shown(sorted(strangers))}, which {self.source.path} does not hold")
        return replace(self, importance=found)

    @property
    def quantises(self) -> bool:
        """Whether a format other than plain is asked for anywhere."""
        return any(format != PLAIN for format in self._asked.values())

    @cached_property
    def _asked(self) -> dict[str, Format]:
        """The format asked for, by the key of a sublayer."""
        found = {s.key: self.formats.of(s) for s in order(self.source.config.num_layers)}
        return {key: format for key, format in found.items() if format is not None}

    def contents(self) -> Iterator[tuple[str, str, dict[str, dict[str, Part]]]]:
        """Name and key of every file, and its weights' parts."""
        for file, key, shapes in tensors_by_file(self.source.config):
            weights = {name: self._format(key, name).parts(shape, self.dtype) for name, shape in shapes.items()}
            yield file, key, weights

    def made(self) -> dict[str, object]:
        """What a pack in few bits depends on beside source and dtype, ready for JSON."""
        found: dict[str, object] = {"formats": self.formats.options()} if self.formats else {}
        if self.quantises:
            import torch

            from mhaffn.quantize import SEARCH

            # Sums of another torch may come in another order, and decide near ties otherwise.
            found |= {"device": self._device(), "search": f"{SEARCH}, torch {torch.__version__}"}
        if self.importance:
            digest = xxhash.xxh3_64()
            for name in sorted(self.importance):
                digest.update(name.encode() + self.importance[name].numpy().tobytes())
            found["importance"] = digest.hexdigest()
        return found

    def remarks(self) -> list[str]:
        """Where weights kept as they are get other values all the same, a sentence each."""
        kept = any(s.key not in self._asked for s in order(self.source.config.num_layers))
        return self.source.remarks() if kept else []

    def payloads(self, key: str, name: str, parts: Mapping[str, Part]) -> Iterator[memoryview]:
        """The bytes of a weight's parts, one after another."""
        import torch

        if len(parts) == 1:
            made: dict[str, torch.Tensor | None] = {"values": self._plain(name)}
        else:
            weight = self._narrow(key, name)
            made = {"values": weight.values, "scales": weight.scales, "zeros": weight.zeros}
        for part, expected in parts.items():
            tensor = made[part]
            assert tensor is not None
            if tuple(tensor.shape) != expected.shape or tensor.dtype != getattr(torch, expected.dtype):
                raise CorruptFileError(
                    f"{self.source.path}: got {part} of {name} of shape {list(tensor.shape)} in {tensor.dtype}, "
                    f"expected {list(expected.shape)} in {expected.dtype}. Fetch it again."
                )
            payload: memoryview = tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data
            yield payload

    def _format(self, key: str, name: str) -> Format:
        return self._asked.get(key) or self.source.format(name) or PLAIN

    def _device(self) -> str:
        """Where scales are searched: on a GPU if it has room for that beside what it holds."""
        import torch

        from mhaffn.quantize import WORKING_BYTES

        if self.device is not None:
            return self.device
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
        return "cuda" if free >= 2 * WORKING_BYTES["cuda"] else "cpu"

    def _plain(self, name: str) -> torch.Tensor:
        import torch

        tensor = self.source.tensor(name)
        converted: torch.Tensor = tensor.to(getattr(torch, self.dtype))
        if converted.dtype != tensor.dtype and bool((tensor.isfinite() & ~converted.isfinite()).any()):
            raise StoreError(
                f"{self.source.path}: tensor {name} overflows {self.dtype}. Pack with {_WIDER[self.dtype]}."
            )
        return converted

    def _narrow(self, key: str, name: str) -> Quantized:
        """A matrix in few bits: as the source has it, or quantised."""
        from mhaffn.quantize import quantize
        from mhaffn.quantized import Quantized

        asked = self._asked.get(key)
        if asked is None:
            kept: Any = self.source.weight(name)
            assert isinstance(kept, Quantized), f"{name}: the source told of few bits and gave none"
            return kept
        importance = self.importance.get(name)
        try:
            return quantize(self.source.tensor(name), asked, importance=importance, device=self._device())
        except ConfigError as error:
            raise StoreError(f"{self.source.path}: tensor {name}: {error}") from error
