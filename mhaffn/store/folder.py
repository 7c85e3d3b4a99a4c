"""Hugging Face folders as the source of a pack: weights in float dtypes, or quantised by AWQ, GPTQ and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhaffn.config import FEW_BITS, SUPPORTED, ModelConfig
from mhaffn.errors import ConfigError, CorruptFileError, StoreError, UnsupportedModelError
from mhaffn.files import read_json_object, shown
from mhaffn.formats import PLAIN, Format
from mhaffn.store import manifest
from mhaffn.store.format import RESIDENT_NAMES, Record, Store, checkpoint_tensors, tensor_shapes
from mhaffn.store.layout import Layout, Linear, require_finite
from mhaffn.store.safetensors import FLOATS, TensorInfo, read_tensor

if TYPE_CHECKING:
    import torch

    from mhaffn.quantized import Quantized

SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ said how they quantised before config.json had a quantization_config: names no method."""
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
NOT_SIDE_FILES = ("config.json", "*.index.json", manifest.NAME, manifest.UNFINISHED_NAME, *SETTINGS)
_FETCH_AGAIN = "Fetch the model again."


class FolderSource:
    """A Hugging Face folder with safetensors files, its weights in any mix of float dtypes, or a packed store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings = path / "config.json"
        self._store = Store.open(path, any_dtype=True)
        self.config = self._store.config
        self._tensors = {t.name: t for s in self._store.sublayers.values() for t in s.tensors}
        self._tensors |= {t.name: t for t in self._store.resident.values()}
        records = (record for s in self._store.sublayers.values() for record in s.records)
        self._narrow: dict[str, Record] = {record.values.name: record for record in records if record.format != PLAIN}

    @property
    def dtype(self) -> str:
        return self._store.dtype

    def fingerprint(self) -> list[list[str | int]]:
        paths = sorted(
            {tensor.path for tensor in self._tensors.values()} | {str(self.path / "config.json"), str(self._settings)}
        )
        try:
            status = {path: Path(path).stat() for path in paths}
        except OSError as error:
            raise StoreError(f"{error.filename} cannot be read any more: {error.strerror}. Fetch it again.") from error
        return [[Path(path).name, found.st_size, found.st_mtime_ns] for path, found in status.items()]

    def tensor(self, name: str) -> torch.Tensor:
        from mhaffn.quantized import Quantized, dequantize

        kept = FolderSource.weight(self, name)
        return dequantize(kept) if isinstance(kept, Quantized) else kept

    def format(self, name: str) -> Format | None:
        return self._narrow[name].format if name in self._narrow else None

    def weight(self, name: str) -> torch.Tensor | Quantized:
        record = self._narrow.get(name)
        if record is None:
            return read_tensor(self._tensors[name])
        parts = {part: read_tensor(info) for part, info in record.parts.items()}
        for part, info in record.parts.items():
            if part != "values":
                require_finite(parts[part], f"{info.path}: {info.name}")
        return record.weight(parts)

    def remarks(self) -> list[str]:
        return []

    def config_values(self) -> dict[str, Any]:
        values = read_json_object(self.path / "config.json", ConfigError, "Fetch the model again.")
        if values.get("quantization_config") == FEW_BITS:
            del values["quantization_config"]
        return values | {"tie_word_embeddings": self.config.tie_word_embeddings}

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        paths = {path.name: path for pattern in SIDE_FILES for path in self.path.glob(pattern) if path.is_file()}
        for name in sorted(paths):
            if not any(fnmatchcase(name, pattern) for pattern in NOT_SIDE_FILES):
                yield name, paths[name].read_bytes()


class QuantizedFolderSource(FolderSource):
    """A Hugging Face folder quantised as ``config`` in ``settings`` says; layers left alone are read as they are."""

    def __init__(self, path: Path, settings: Path, config: object) -> None:
        self.path = path
        self._settings = settings
        values = read_json_object(path / "config.json", ConfigError, _FETCH_AGAIN)
        values.pop("quantization_config", None)
        self._layout = _layout(settings, config)
        self._tensors = checkpoint_tensors(path)
        tied = bool(values.get("tie_word_embeddings")) and RESIDENT_NAMES["head"] not in self._tensors
        model = ModelConfig.from_dict(values, where=str(path / "config.json"))
        self.config = replace(model, tie_word_embeddings=tied)
        self._narrow = {}
        self._linears: dict[str, Linear] = {}
        suffixes = _by_module(self._tensors)
        for name, shape in tensor_shapes(self.config).items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and name not in RESIDENT_NAMES.values() and not _is_float(suffixes, module):
                if module not in suffixes:
                    raise CorruptFileError(f"{path}: got no tensors of {module}, expected those of a quantised layer")
                self._linears[name] = Linear(module, (shape[0], shape[1]), suffixes[module])
            else:
                Linear(module, shape, suffixes.get(module, {})).refuse_others(("weight",))
                self._check_plain(name, shape)
        head = RESIDENT_NAMES["head"].removesuffix(".weight")
        Linear(head, (), suffixes.get(head, {})).refuse_others(("weight",))
        for linear in self._linears.values():
            self._layout.format(linear)

    def _check_plain(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._tensors.get(name)
        if found is None:
            raise CorruptFileError(f"{self.path}: got no tensor {name}, expected one of {list(shape)}. {_FETCH_AGAIN}")
        if found.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{found.path}: got {name} in {found.dtype}, expected {', '.join(FLOATS)}. Supported: {SUPPORTED}."
            )
        if found.shape != shape:
            raise CorruptFileError(
                f"{found.path}: got tensor {name} of shape {shown(list(found.shape))}, expected {list(shape)}, as "
                f"config.json says. {_FETCH_AGAIN}"
            )

    @property
    def dtype(self) -> str:
        return FLOATS[self._tensors[RESIDENT_NAMES["embedding"]].dtype]

    def tensor(self, name: str) -> torch.Tensor:
        linear = self._linears.get(name)
        return self._layout.floats(linear) if linear is not None else super().tensor(name)

    def format(self, name: str) -> Format | None:
        linear = self._linears.get(name)
        return self._layout.format(linear) if linear is not None else None

    def weight(self, name: str) -> torch.Tensor | Quantized:
        linear = self._linears.get(name)
        return self._layout.weight(linear) if linear is not None else super().weight(name)

    def config_values(self) -> dict[str, Any]:
        values = super().config_values()
        values.pop("quantization_config", None)
        return values


def quantization(path: Path) -> tuple[Path, object] | None:
    """How the folder's weights are quantised, and the file that says so: config.json, or one of :data:`SETTINGS`.

    None where no file says it, or it is a packed store. Raises :class:`UnsupportedModelError` where two contradict
    each other.
    """
    try:
        found = read_json_object(path / "config.json", ConfigError, _FETCH_AGAIN).get("quantization_config")
    except FileNotFoundError:
        return None
    if found == FEW_BITS or (path / manifest.NAME).exists():
        return None
    if found not in (None, {}):
        return path / "config.json", found
    beside = []
    for name, method in SETTINGS.items():
        try:
            values = read_json_object(path / name, ConfigError, _FETCH_AGAIN)
        except FileNotFoundError:
            continue
        beside.append((path / name, {"quant_method": method} | values))
    methods = {shown(values["quant_method"]): file.name for file, values in beside}
    if len(methods) > 1:
        said = " and ".join(f"{method} in {name}" for method, name in methods.items())
        raise UnsupportedModelError(
            f"{path}: got quant_method = {said}, expected one. Remove the file that its weights are not made by."
        )
    return beside[0] if beside else None


def _layout(settings: Path, config: object) -> Layout:
    from mhaffn.store.awq import Awq
    from mhaffn.store.compressed_tensors import CompressedTensors
    from mhaffn.store.gptq import Gptq

    layouts: dict[str, Callable[[Mapping[str, Any]], Layout]] = {
        "awq": Awq, "gptq": Gptq, "compressed-tensors": CompressedTensors,
    }  # fmt: skip
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(method, str) or method not in layouts:
        got = f"quant_method = {shown(method)}" if isinstance(config, Mapping) else shown(config)
        raise UnsupportedModelError(
            f"{settings}: got quantization_config with {got}, expected one of {', '.join(layouts)}. "
            f"Pack the original model instead."
        )
    try:
        return layouts[method](config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{settings}: {error}") from None


def _by_module(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by the module they belong to, then by suffix."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = info
    return modules


def _is_float(modules: Mapping[str, Mapping[str, TensorInfo]], module: str) -> bool:
    """Whether the module's weight lies there as floats: a layer that was not quantised."""
    found = modules.get(module, {}).get("weight")
    return found is not None and found.dtype in FLOATS
