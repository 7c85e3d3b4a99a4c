"""A store: a model folder seen as sublayers whose bytes lie in safetensors files.

The folder is an ordinary Hugging Face checkpoint, read in place – ``config.json`` beside
``model.safetensors`` or ``model.safetensors.index.json`` with its shards – or one written by
``mhaffn pack``, which is the same plus ``mhaffn.json``, the manifest with a checksum for each
sublayer (:mod:`mhaffn.store.manifest`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mhaffn.config import Kind, ModelConfig, Sublayer, order
from mhaffn.errors import CorruptFileError, StoreError, UnsupportedModelError
from mhaffn.store.manifest import Manifest
from mhaffn.store.safetensors import TensorInfo, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

TENSOR_NAMES: dict[Kind, dict[str, str]] = {
    "mha": {
        "wq": "self_attn.q_proj.weight",
        "wk": "self_attn.k_proj.weight",
        "wv": "self_attn.v_proj.weight",
        "wo": "self_attn.o_proj.weight",
        "norm": "input_layernorm.weight",
    },
    "ffn": {
        "w1": "mlp.gate_proj.weight",
        "w3": "mlp.up_proj.weight",
        "w2": "mlp.down_proj.weight",
        "norm": "post_attention_layernorm.weight",
    },
}
RESIDENT_NAMES = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


@dataclass(frozen=True)
class Record:
    """One weight: a format and the tensors it is made of, by part.

    Format "plain" has the one part "values". Compressed formats add parts (scales, zero points).
    """

    name: str
    format: str
    parts: Mapping[str, TensorInfo]

    @property
    def values(self) -> TensorInfo:
        return self.parts["values"]


@dataclass(frozen=True)
class SublayerRecords:
    """A sublayer's records in file order, and what its bytes should hash to (None: unknown)."""

    sublayer: Sublayer
    records: tuple[Record, ...]
    checksum: str | None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(part for record in self.records for part in record.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without alignment."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Store:
    """An opened model folder. Holds no file open; every name, offset and shape in it has been checked."""

    path: Path
    config: ModelConfig
    dtype: str
    sublayers: Mapping[Sublayer, SublayerRecords]
    resident: Mapping[str, TensorInfo]
    packed: bool

    @staticmethod
    def open(folder: str | Path, *, any_dtype: bool = False) -> Store:
        """Opens a model folder and checks every header in it.

        With ``any_dtype`` weights of mixed dtypes pass (a pack makes them one); ``dtype`` is then that
        of the most bytes. Raises :class:`ConfigError`, :class:`UnsupportedModelError`, :class:`StoreError`,
        :class:`CorruptFileError` or :class:`TruncatedFileError`.
        """
        folder = Path(folder)
        config = ModelConfig.from_folder(folder)
        tensors = _tensors(folder)
        manifest = Manifest.read(folder)
        resident = {
            name: _checked(folder, tensors, RESIDENT_NAMES[name], shape)
            for name, shape in config.resident_shapes().items()
        }
        sublayers = {
            sublayer: _sublayer(folder, tensors, config, sublayer, manifest) for sublayer in order(config.num_layers)
        }
        return Store(
            path=folder,
            config=config,
            dtype=_dtype(folder, [*resident.values(), *(t for s in sublayers.values() for t in s.tensors)], any_dtype),
            sublayers=sublayers,
            resident=resident,
            packed=manifest is not None,
        )


def tensor_name(sublayer: Sublayer, weight: str) -> str:
    """The checkpoint's name of ``weight`` (Meta's name) in ``sublayer``."""
    return f"model.layers.{sublayer.layer}.{TENSOR_NAMES[sublayer.kind][weight]}"


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name; with an index, only from the shard it names."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists():
        weight_map = _weight_map(index)
        shards = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
        found = {(shard, t.name): t for shard, header in shards.items() for t in header.tensors}
        missing = [f"{name} in {shard}" for name, shard in weight_map.items() if (shard, name) not in found]
        if missing:
            raise CorruptFileError(f"{index} names tensors that are not there: {', '.join(missing[:3])}")
        return {name: found[shard, name] for name, shard in weight_map.items()}
    if single.exists():
        return {tensor.name: tensor for tensor in read_header(single).tensors}
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".gguf", ".bin", ".pth", ".pt"))
    hint = f" It holds {', '.join(others[:3])}; `mhaffn pack` reads GGUF files." if others else ""
    raise StoreError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}.{hint}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptFileError(f"{index} is not a JSON object with a weight_map ({error!r})") from error
    if not isinstance(weight_map, dict):
        raise CorruptFileError(f"{index}: weight_map is a {type(weight_map).__name__}, expected an object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or "\0" in shard or "\\" in shard:
            raise CorruptFileError(f"{index}: got {shard!r:.80} as the shard of {name!r}, expected a file name")
        parts = PurePosixPath(shard)
        if parts.is_absolute() or ".." in parts.parts:
            raise CorruptFileError(f"{index}: shard {shard!r} leaves the model folder; refusing to follow it")
    return weight_map


def _sublayer(
    folder: Path, tensors: Mapping[str, TensorInfo], config: ModelConfig, sublayer: Sublayer, manifest: Manifest | None
) -> SublayerRecords:
    records = [
        Record(name, "plain", {"values": _checked(folder, tensors, tensor_name(sublayer, name), shape)})
        for name, shape in config.sublayer_shapes(sublayer.kind).items()
    ]
    records.sort(key=lambda record: (record.values.path, record.values.offset))
    checksum = manifest.checksum(folder, sublayer.key) if manifest else None
    return SublayerRecords(sublayer, tuple(records), checksum)


def _checked(
    folder: Path, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]
) -> TensorInfo:
    tensor = tensors.get(name)
    if tensor is None:
        raise CorruptFileError(f"{folder}: tensor {name} is missing; config.json and the weights do not belong together")
    if tensor.shape != shape:
        raise CorruptFileError(
            f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
        )
    return tensor


def _dtype(folder: Path, tensors: list[TensorInfo], any_dtype: bool) -> str:
    nbytes = Counter[str]()
    for tensor in tensors:
        nbytes[tensor.dtype] += tensor.nbytes
    found = [dtype for dtype, _ in nbytes.most_common()]
    unknown = [dtype for dtype in found if dtype not in TORCH_DTYPES]
    if unknown or (len(found) > 1 and not any_dtype):
        hint = "" if unknown else f" `mhaffn pack {folder} DST --dtype bfloat16` writes such a store."
        raise UnsupportedModelError(
            f"{folder}: got weights of dtype {', '.join(found)}, expected all BF16, all F16 or all F32.{hint}"
        )
    return TORCH_DTYPES[found[0]]
