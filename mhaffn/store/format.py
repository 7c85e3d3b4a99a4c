"""A store: a model folder seen as sublayers whose bytes lie in safetensors files.

The folder is an ordinary Hugging Face checkpoint, read in place – ``config.json`` beside
``model.safetensors`` or ``model.safetensors.index.json`` with its shards – or one written by
``mhaffn pack``, which is the same plus ``mhaffn.json``, the manifest with a checksum for each
sublayer (:mod:`mhaffn.store.manifest`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mhaffn.config import SUPPORTED, Kind, ModelConfig, Sublayer, order
from mhaffn.errors import CorruptFileError, StoreError, UnsupportedModelError
from mhaffn.files import read_json_object, shown
from mhaffn.store.manifest import RESIDENT_KEY, UNFINISHED_NAME, Manifest
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
_DOWNLOAD_AGAIN = "Download the model again: its files do not belong together."
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
    """An opened model folder. Holds no file open; every name, offset and shape in it has been checked.

    ``resident_checksum`` is what the bytes of ``resident`` should hash to, in file order (None: unknown).
    """

    path: Path
    config: ModelConfig
    dtype: str
    sublayers: Mapping[Sublayer, SublayerRecords]
    resident: Mapping[str, TensorInfo]
    packed: bool
    resident_checksum: str | None = None

    @staticmethod
    def open(folder: str | Path, *, any_dtype: bool = False) -> Store:
        """Opens a model folder and checks every header in it.

        With ``any_dtype`` weights of mixed dtypes pass (a pack makes them one); ``dtype`` is then that
        of the most bytes. Raises :class:`ConfigError`, :class:`UnsupportedModelError`, :class:`StoreError`,
        :class:`CorruptFileError` or :class:`TruncatedFileError`.
        """
        folder = Path(folder)
        if os.path.lexists(folder / UNFINISHED_NAME):
            raise StoreError(
                f"{folder} is an unfinished pack. Run the same `mhaffn pack` again: it goes on from there."
            )
        config = ModelConfig.from_folder(folder)
        tensors = _tensors(folder)
        if config.tie_word_embeddings and RESIDENT_NAMES["head"] in tensors:
            # Written with a head of its own, which may differ from the embedding: the bytes decide.
            config = replace(config, tie_word_embeddings=False)
        manifest = Manifest.read(folder)
        resident = {
            name: _checked(folder, tensors, RESIDENT_NAMES[name], shape)
            for name, shape in config.resident_shapes().items()
        }
        sublayers = {
            sublayer: _sublayer(folder, tensors, config, sublayer, manifest) for sublayer in order(config.num_layers)
        }
        dtype = _dtype(folder, [*resident.values(), *(t for s in sublayers.values() for t in s.tensors)], any_dtype)
        if manifest is not None and manifest.dtype != dtype:
            raise CorruptFileError(
                f"{folder}: got weights in {dtype}, expected {manifest.dtype}, as the manifest says. Pack it again."
            )
        return Store(
            path=folder,
            config=config,
            dtype=dtype,
            sublayers=sublayers,
            resident=resident,
            packed=manifest is not None,
            resident_checksum=manifest.checksum(folder, RESIDENT_KEY) if manifest else None,
        )


def tensor_name(sublayer: Sublayer, weight: str) -> str:
    """The checkpoint's name of ``weight`` (Meta's name) in ``sublayer``."""
    return f"model.layers.{sublayer.layer}.{TENSOR_NAMES[sublayer.kind][weight]}"


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name; with an index, only from the shard it names."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if os.path.lexists(index):
        weight_map = _weight_map(index)
        shards = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
        found = {(shard, t.name): t for shard, header in shards.items() for t in header.tensors}
        for name, shard in weight_map.items():
            if (shard, name) not in found:
                raise CorruptFileError(
                    f"{index}: got tensor {shown(name)} in {shown(shard)}, but that file does not hold it. "
                    f"{_DOWNLOAD_AGAIN}"
                )
        return {name: found[shard, name] for name, shard in weight_map.items()}
    if os.path.lexists(single):
        return {tensor.name: tensor for tensor in read_header(single).tensors}
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".gguf", ".bin", ".pth", ".pt"))
    hint = f" It holds {', '.join(map(shown, others[:3]))}; `mhaffn pack` reads GGUF files." if others else ""
    raise StoreError(
        f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}.{hint} Download the model's safetensors files."
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, CorruptFileError, _DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CorruptFileError(f"{index}: got weight_map {shown(weight_map)}, expected an object. {_DOWNLOAD_AGAIN}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or not shard.isprintable() or "\\" in shard:
            raise CorruptFileError(
                f"{index}: got {shown(shard)} as the file of {shown(name)}, expected a file name. {_DOWNLOAD_AGAIN}"
            )
        parts = PurePosixPath(shard)
        if parts.is_absolute() or ".." in parts.parts:
            raise CorruptFileError(
                f"{index}: got {shown(shard)} as the file of {shown(name)}, expected one inside the model folder: "
                f"refusing to follow it. {_DOWNLOAD_AGAIN}"
            )
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


def _checked(folder: Path, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]) -> TensorInfo:
    tensor = tensors.get(name)
    if tensor is None:
        raise CorruptFileError(
            f"{folder}: got no tensor {name}, expected one of shape {list(shape)}. {_DOWNLOAD_AGAIN}"
        )
    if tensor.shape != shape:
        raise CorruptFileError(
            f"{tensor.path}: got tensor {name} of shape {shown(list(tensor.shape))}, expected {list(shape)}, as "
            f"config.json says. {_DOWNLOAD_AGAIN}"
        )
    return tensor


def _dtype(folder: Path, tensors: list[TensorInfo], any_dtype: bool) -> str:
    nbytes = Counter[str]()
    for tensor in tensors:
        nbytes[tensor.dtype] += tensor.nbytes
    found = [dtype for dtype, _ in nbytes.most_common()]
    unknown = [dtype for dtype in found if dtype not in TORCH_DTYPES]
    if unknown or (len(found) > 1 and not any_dtype):
        hint = (
            f" Supported: {SUPPORTED}."
            if unknown
            else f" `mhaffn pack {folder} DST --dtype bfloat16` writes such a store."
        )
        raise UnsupportedModelError(
            f"{folder}: got weights of dtype {', '.join(found)}, expected all BF16, all F16 or all F32.{hint}"
        )
    return TORCH_DTYPES[found[0]]
