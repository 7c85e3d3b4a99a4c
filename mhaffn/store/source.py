"""Where the weights of a pack come from: a Hugging Face folder or a GGUF file, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mhaffn.config import ModelConfig, order
from mhaffn.errors import ConfigError, StoreError
from mhaffn.files import read_json_object
from mhaffn.store import manifest
from mhaffn.store.format import RESIDENT_NAMES, Store, tensor_name

if TYPE_CHECKING:
    import torch

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
NOT_SIDE_FILES = ("config.json", "*.index.json", manifest.NAME, manifest.UNFINISHED_NAME)


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

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        """Tokenizer, chat template and generation defaults: name and content, by name."""


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
        try:
            status = {path: Path(path).stat() for path in paths}
        except OSError as error:
            raise StoreError(f"{error.filename} cannot be read any more: {error.strerror}. Fetch it again.") from error
        return [[Path(path).name, found.st_size, found.st_mtime_ns] for path, found in status.items()]

    def tensor(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        path = self._tensors[name].path
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: tensor {name} cannot be read: {error}. Fetch the file again.") from error
        return tensor

    def config_values(self) -> dict[str, Any]:
        values = read_json_object(self.path / "config.json", ConfigError, "Fetch the model again.")
        return values | {"tie_word_embeddings": self.config.tie_word_embeddings}

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        paths = {path.name: path for pattern in SIDE_FILES for path in self.path.glob(pattern) if path.is_file()}
        for name in sorted(paths):
            if not any(fnmatchcase(name, pattern) for pattern in NOT_SIDE_FILES):
                yield name, paths[name].read_bytes()


def open_source(path: Path) -> Source:
    """The source at ``path``: a folder, or a file ending in ``.gguf``."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        from mhaffn.store.gguf import GgufSource

        return GgufSource(path)
    return FolderSource(path)


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
