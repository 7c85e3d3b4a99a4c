"""A sublayer's weights as one run of bytes in memory, and the typed views into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from mhaffn.errors import ChecksumError, CorruptFileError
from mhaffn.reader import Extent
from mhaffn.sizes import DEVICE_ALIGN
from mhaffn.store import SublayerRecords
from mhaffn.store.safetensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    import torch

Weights = SimpleNamespace
"""A sublayer's weights by Meta's names, of layout ``[out, in]``, plain or in few bits, and ``norm`` ``[D]``."""


@dataclass(frozen=True)
class Segment:
    """A run of bytes that is one in both images: ``nbytes`` from ``source`` go to ``target``."""

    source: int
    target: int
    nbytes: int


class Image:
    """The layout of one sublayer in memory of our own: each tensor at a multiple of 256 bytes."""

    def __init__(self, records: SublayerRecords) -> None:
        self.records = records
        self.offsets: list[int] = []
        end = 0
        for tensor in records.tensors:
            self.offsets.append(end)
            end = -(-(end + tensor.nbytes) // DEVICE_ALIGN) * DEVICE_ALIGN
        self.nbytes = end

    @property
    def extents(self) -> list[Extent]:
        return [extent_of(tensor) for tensor in self.records.tensors]

    def segments(self, placements: Sequence[int]) -> list[Segment]:
        """What to copy from a host image whose tensors lie at ``placements``, neighbours merged."""
        merged: list[Segment] = []
        for tensor, source, target in zip(self.records.tensors, placements, self.offsets, strict=True):
            last = merged[-1] if merged else None
            if last and last.source + last.nbytes == source and last.target + last.nbytes == target:
                merged[-1] = Segment(last.source, last.target, last.nbytes + tensor.nbytes)
            else:
                merged.append(Segment(source, target, tensor.nbytes))
        return merged

    def chunks(self, placements: Sequence[int], nbytes: int) -> Iterator[Segment]:
        """:meth:`segments` in pieces of at most ``nbytes``."""
        for segment in self.segments(placements):
            for start in range(0, segment.nbytes, nbytes):
                length = min(nbytes, segment.nbytes - start)
                yield Segment(segment.source + start, segment.target + start, length)

    def check(self, digest: str) -> None:
        """Raises :class:`ChecksumError` unless ``digest`` is what was packed."""
        if self.records.checksum is not None:
            check_digest(self.records.sublayer, self.records.tensors[0].path, digest, self.records.checksum)

    def check_scales(self, memory: torch.Tensor, placements: Sequence[int] | None = None) -> None:
        """Raises :class:`CorruptFileError` where a scale or zero point in ``memory`` (uint8) is not finite."""
        offsets = self.offsets if placements is None else placements
        places = {tensor.name: offset for tensor, offset in zip(self.records.tensors, offsets, strict=True)}
        for record in self.records.records:
            for part, tensor in record.parts.items():
                if part != "values" and not bool(view(memory, places[tensor.name], tensor).isfinite().all()):
                    raise CorruptFileError(
                        f"{tensor.path}: got {part} of {self.records.sublayer}, {record.name}, that are not finite, "
                        f"expected numbers. Pack the model again."
                    )

    def views(self, memory: torch.Tensor, placements: Sequence[int] | None = None) -> Weights:
        """Typed views into ``memory`` (uint8), at ``placements`` or, by default, in this layout."""
        offsets = self.offsets if placements is None else placements
        found = {
            tensor.name: view(memory, offset, tensor)
            for tensor, offset in zip(self.records.tensors, offsets, strict=True)
        }
        return Weights(**{
            record.name: record.weight({part: found[tensor.name] for part, tensor in record.parts.items()})
            for record in self.records.records
        })  # fmt: skip


def extent_of(tensor: TensorInfo) -> Extent:
    return Extent(tensor.path, tensor.offset, tensor.nbytes)


def view(memory: torch.Tensor, offset: int, tensor: TensorInfo) -> torch.Tensor:
    """``tensor``'s bytes at ``offset`` of ``memory`` (uint8), typed and shaped.

    A checkpoint may place tensors at odd offsets, where no typed view exists; those bytes are copied.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[tensor.dtype])
    raw = memory[offset : offset + tensor.nbytes]
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(tensor.shape)


def as_buffer(memory: torch.Tensor) -> memoryview:
    """The bytes of a host tensor (uint8), for hashing."""
    return memoryview(memory.numpy())  # type: ignore[arg-type]


def check_digest(what: object, path: str, digest: str, expected: str) -> None:
    """Raises :class:`ChecksumError` unless ``digest`` (XXH3-64, hex) is what was packed."""
    if digest != expected:
        raise ChecksumError(
            f"{path}: {what} is damaged: got checksum {digest}, expected {expected}. "
            f"Pack the model again; --no-verify reads it regardless."
        )
