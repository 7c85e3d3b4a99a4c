"""Where the weights of a pack come from: a Hugging Face folder or a GGUF file, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mhaffn.config import ModelConfig, order
from mhaffn.store.format import RESIDENT_NAMES, Store, tensor_name

if TYPE_CHECKING:
    import torch

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
NOT_SIDE_FILES = ("config.json", "mhaffn.json", "model.safetensors.index.json")


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

    def config_values(self) -> dict[str, Any]:
        """config.json as it should stand beside the weights, without its dtype."""

    def write_side_files(self, folder: Path) -> None:
        """Tokenizer, chat template and generation defaults, into ``folder``."""


class FolderSource:
    """A Hugging Face folder with safetensors files; its weights may mix float dtypes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._store = Store.open(path, any_dtype=True)
        self.config = self._store.config
        self._tensors = {t.name: t for s in self._store.sublayers.values() for t in s.tensors}
        self._tensors |= {t.name: t for t in self._store.resident.values()}

    @property
    def dtype(self) -> str:
        return self._store.dtype

    def fingerprint(self) -> list[list[str | int]]:
        paths = sorted({tensor.path for tensor in self._tensors.values()} | {str(self.path / "config.json")})
        return [[Path(p).name, Path(p).stat().st_size, Path(p).stat().st_mtime_ns] for p in paths]

    def tensor(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._tensors[name].path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def config_values(self) -> dict[str, Any]:
        import json

        values: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return values

    def write_side_files(self, folder: Path) -> None:
        for pattern in SIDE_FILES:
            for path in sorted(self.path.glob(pattern)):
                if path.name not in NOT_SIDE_FILES:
                    shutil.copyfile(path, folder / path.name)


def open_source(path: Path) -> Source:
    """The source at ``path``: a folder, or a file ending in ``.gguf``."""
    if path.suffix == ".gguf":
        from mhaffn.store.gguf import GgufSource

        return GgufSource(path)
    return FolderSource(path)


def tensors_by_file(config: ModelConfig) -> Iterator[tuple[str, str | None, dict[str, tuple[int, ...]]]]:
    """What a packed store holds: for each file its name, its sublayer's key (None: the resident
    weights) and the shapes of its tensors by their Hugging Face names, largest first."""
    for sublayer in order(config.num_layers):
        shapes = config.sublayer_shapes(sublayer.kind)
        name = f"layer-{sublayer.layer:03d}-{sublayer.kind}.safetensors"
        yield name, sublayer.key, _largest_first({tensor_name(sublayer, w): shape for w, shape in shapes.items()})
    resident = {RESIDENT_NAMES[name]: shape for name, shape in config.resident_shapes().items()}
    yield "resident.safetensors", None, _largest_first(resident)


def _largest_first(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Matrices before norms, so that matrices start at multiples of 4 KiB whenever their sizes are."""
    return dict(sorted(shapes.items(), key=lambda item: len(item[1]), reverse=True))
