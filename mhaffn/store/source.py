"""Where the weights of a pack come from: a Hugging Face folder or a GGUF file, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mhaffn.config import ModelConfig, order
from mhaffn.store import manifest
from mhaffn.store.folder import FolderSource, QuantizedFolderSource, quantization
from mhaffn.store.format import RESIDENT_NAMES, tensor_name

if TYPE_CHECKING:
    import torch

    from mhaffn.formats import Format
    from mhaffn.quantized import Quantized


class Source(Protocol):
    """A checkpoint that gives its tensors by their Hugging Face names."""

    path: Path
    config: ModelConfig

    @property
    def dtype(self) -> str:
        """The dtype a pack takes unless another is asked for."""

    def fingerprint(self) -> list[list[str | int]]:
        """[name, bytes, mtime in ns] of every file read: a resumed pack must find the same."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype it is stored in (dequantised: float32)."""

    def format(self, name: str) -> Format | None:
        """What :meth:`weight` gives in few bits, told from headers; None where it gives a plain tensor."""

    def weight(self, name: str) -> torch.Tensor | Quantized:
        """One tensor as it is stored: a matrix of a sublayer in few bits where :meth:`format` says so.

        Embedding and head are always dequantised. Raises :class:`UnsupportedModelError` for a matrix whose layout
        cannot be kept; :meth:`tensor` may still give its values.
        """

    def remarks(self) -> list[str]:
        """Where :meth:`weight` gives other values than the stored ones, a sentence each."""

    def config_values(self) -> dict[str, Any]:
        """config.json as it should stand beside the weights, without its dtype."""

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        """Tokenizer, chat template and generation defaults: name and content, by name."""


def open_source(path: Path) -> Source:
    """The source at ``path``: a folder, its weights quantised or not, or a file ending in ``.gguf``."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        from mhaffn.store.gguf import GgufSource

        return GgufSource(path)
    quantized = quantization(path)
    return FolderSource(path) if quantized is None else QuantizedFolderSource(path, *quantized)


def tensors_by_file(config: ModelConfig) -> Iterator[tuple[str, str, dict[str, tuple[int, ...]]]]:
    """What a packed store holds: for each file its name, its key in the manifest
    and the shapes of its tensors by their Hugging Face names, largest first."""
    for sublayer in order(config.num_layers):
        shapes = config.sublayer_shapes(sublayer.kind)
        name = f"layer-{sublayer.layer:03d}-{sublayer.kind}.safetensors"
        yield name, sublayer.key, _largest_first({tensor_name(sublayer, w): shape for w, shape in shapes.items()})
    resident = {RESIDENT_NAMES[name]: shape for name, shape in config.resident_shapes().items()}
    yield "resident.safetensors", manifest.RESIDENT_KEY, _largest_first(resident)


def _largest_first(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Matrices before norms, so that matrices start at multiples of 4 KiB whenever their sizes are."""
    return dict(sorted(shapes.items(), key=lambda item: len(item[1]), reverse=True))
