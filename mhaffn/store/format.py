"""A store: a model folder seen as sublayers whose bytes lie in safetensors files.

The folder is an ordinary Hugging Face checkpoint, read in place – ``config.json`` beside
``model.safetensors``, or the only file of another name, or ``model.safetensors.index.json`` with its
shards – or one written by ``mhaffn pack``, which is the same plus ``mhaffn.json``, the manifest with a
checksum for each sublayer (:mod:`mhaffn.store.manifest`). There a matrix may be in few bits: its values
then go by the weight's own name, scales and zero points by that name and a suffix.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mhaffn.config import KINDS, SUPPORTED, Kind, ModelConfig, Sublayer, order
from mhaffn.errors import CorruptFileError, MhaffnError, StoreError, TruncatedFileError, UnsupportedModelError
from mhaffn.files import read_json_object, shown
from mhaffn.formats import GROUPS, PLAIN, VALUES_DTYPES, Format
from mhaffn.store.manifest import RESIDENT_KEY, Manifest, refuse_unfinished
from mhaffn.store.safetensors import CODES, DTYPES, FLOATS, TensorInfo, read_header

if TYPE_CHECKING:
    import torch

    from mhaffn.quantized import Quantized

INDEX_NAME = "model.safetensors.index.json"
FEW_BITS_INDEX_NAME = "mhaffn.index.json"
"""The index of a store with weights in few bits: no other tool looks for it, and takes whole numbers for weights."""
SINGLE_NAME = "model.safetensors"
NAMES_OF_VALUES = {CODES[dtype]: name for name, dtype in VALUES_DTYPES.items()}
"""Formats in few bits, by the dtype of their values."""
SUFFIXES = {"values": "", "scales": ".scales", "zeros": ".zeros"}
"""What a part's tensor is called, after the weight's own name."""

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
_PACK_AGAIN = "Pack it again."
RESIDENT_NAMES = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


@dataclass(frozen=True)
class Record:
    """One weight: a format and the tensors it is made of, by part: values, and in few bits scales and zero points."""

    name: str
    format: Format
    parts: Mapping[str, TensorInfo]

    @property
    def values(self) -> TensorInfo:
        return self.parts["values"]

    def weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | Quantized:
        """The weight that tensors, by part, make."""
        if self.format == PLAIN:
            return parts["values"]
        from mhaffn.quantized import Quantized

        columns = self.values.shape[1] * (2 if self.format.name == "int4" else 1)
        group = self.format.group or columns
        return Quantized(self.format.name, parts["values"], parts["scales"], parts.get("zeros"), group)


@dataclass(frozen=True)
class SublayerRecords:
    """A sublayer's records, and what its bytes should hash to (None: unknown)."""

    sublayer: Sublayer
    records: tuple[Record, ...]
    checksum: str | None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The parts of all records, in file order."""
        parts = (part for record in self.records for part in record.parts.values())
        return tuple(sorted(parts, key=lambda part: (part.path, part.offset)))

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
        store, damaged = survey(folder, any_dtype=any_dtype)
        for error in damaged.values():
            raise error
        return store

    def formats(self) -> dict[Kind, dict[str, int]]:
        """How many matrices of each kind of sublayer are in each format, the most common first."""
        found: dict[Kind, Counter[str]] = {kind: Counter() for kind in KINDS}
        for sublayer, records in self.sublayers.items():
            found[sublayer.kind].update(str(r.format) for r in records.records if len(r.values.shape) > 1)
        return {kind: dict(counts.most_common()) for kind, counts in found.items()}

    def stored(self) -> dict[Sublayer, tuple[int, ...]]:
        """Bytes of each tensor of each sublayer."""
        return {s: tuple(tensor.nbytes for tensor in records.tensors) for s, records in self.sublayers.items()}

    def places(self) -> dict[Path, int]:
        """Bytes of sublayers by the folder they really lie in, links followed, in pass order."""
        nbytes = Counter[Path]()
        for records in self.sublayers.values():
            for tensor in records.tensors:
                nbytes[Path(tensor.path).resolve().parent] += tensor.nbytes
        return dict(nbytes)


def survey(folder: str | Path, *, any_dtype: bool = False) -> tuple[Store, dict[str, MhaffnError]]:
    """The store in ``folder`` as far as its headers stand, and what is wrong with each other part.

    Parts are named as in the manifest: ``"<layer>.<kind>"`` and ``"resident"``; a tensor that belongs to no
    part goes by its own name. Raises as :meth:`Store.open` where the folder as a whole cannot be used.
    """
    folder = Path(folder)
    refuse_unfinished(folder)
    config = ModelConfig.from_folder(folder)
    manifest = Manifest.read(folder)
    checkpoint = _Checkpoint.read(folder, manifest)
    if config.tie_word_embeddings and checkpoint.names(RESIDENT_NAMES["head"]):
        # Written with a head of its own, which may differ from the embedding: the bytes decide.
        config = replace(config, tie_word_embeddings=False)
    damaged: dict[str, MhaffnError] = {}
    sublayers: dict[Sublayer, SublayerRecords] = {}
    resident: dict[str, TensorInfo] = {}
    resident_checksum = None
    try:
        resident = {
            name: checkpoint.find(RESIDENT_NAMES[name], shape) for name, shape in config.resident_shapes().items()
        }
        resident_checksum = manifest.checksum(folder, RESIDENT_KEY) if manifest else None
    except (StoreError, TruncatedFileError) as error:
        resident, damaged[RESIDENT_KEY] = {}, error
    for sublayer in order(config.num_layers):
        try:
            sublayers[sublayer] = _sublayer(checkpoint, config, sublayer)
        except (StoreError, TruncatedFileError) as error:
            damaged[sublayer.key] = error
    if manifest is None and damaged and (packed := checkpoint.quantized()) is not None:
        raise UnsupportedModelError(
            f"{folder}: got a quantised tensor {shown(packed)}, expected floats. `mhaffn pack {folder} DST` keeps "
            f"AWQ and GPTQ, where config.json, quantize_config.json or quant_config.json says how it is quantised."
        )
    names = {
        tensor_name(sublayer, weight) + suffix
        for sublayer in order(config.num_layers)
        for weight in TENSOR_NAMES[sublayer.kind]
        for suffix in SUFFIXES.values()
    }
    damaged |= checkpoint.broken_besides(names | set(RESIDENT_NAMES.values()))
    found = [*resident.values(), *(t for records in sublayers.values() for t in records.tensors)]
    if not found and manifest is None:
        raise next(iter(damaged.values()))
    dtype = manifest.dtype if manifest is not None else _dtype(folder, found, any_dtype)
    return Store(folder, config, dtype, sublayers, resident, manifest is not None, resident_checksum), damaged


def checkpoint_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor in the files of a checkpoint, by name; raises for the first file or tensor that cannot be used."""
    return _Checkpoint.read(folder, None).tensors()


def tensor_name(sublayer: Sublayer, weight: str) -> str:
    """The checkpoint's name of ``weight`` (Meta's name) in ``sublayer``."""
    return f"model.layers.{sublayer.layer}.{TENSOR_NAMES[sublayer.kind][weight]}"


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by their Hugging Face names."""
    shapes = {RESIDENT_NAMES[name]: shape for name, shape in config.resident_shapes().items()}
    for sublayer in order(config.num_layers):
        for weight, shape in config.sublayer_shapes(sublayer.kind).items():
            shapes[tensor_name(sublayer, weight)] = shape
    return shapes


class _Checkpoint:
    """The tensors of a folder by name; where a file cannot be used, the error instead of its tensors."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest | None,
        tensors: Mapping[str, TensorInfo],
        broken: Mapping[str, MhaffnError],
        whole: MhaffnError | None = None,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._tensors, self._broken, self._whole = tensors, broken, whole

    @staticmethod
    def read(folder: Path, manifest: Manifest | None) -> _Checkpoint:
        """Every header in ``folder``; with an index, tensors only from the shard it names for them."""
        index, single = folder / INDEX_NAME, folder / SINGLE_NAME
        if manifest is not None and not os.path.lexists(index):
            index = folder / FEW_BITS_INDEX_NAME
        if os.path.lexists(index):
            return _Checkpoint(folder, manifest, *_indexed(folder, index))
        if manifest is None and not os.path.lexists(single):
            single = _only_file(folder) or single
        if os.path.lexists(single):
            try:
                return _Checkpoint(folder, manifest, {t.name: t for t in read_header(single).tensors}, {})
            except (StoreError, TruncatedFileError) as error:
                return _Checkpoint(folder, manifest, {}, {}, whole=error)
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".gguf", ".bin", ".pth", ".pt"))
        hint = f" It holds {', '.join(map(shown, others[:3]))}; `mhaffn pack` reads GGUF files." if others else ""
        raise StoreError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}.{hint} Download the model's safetensors files."
        )

    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors; raises the first error of any."""
        for error in (self._whole, *self._broken.values()):
            if error is not None:
                raise error
        return dict(self._tensors)

    def quantized(self) -> str | None:
        """The name of a tensor that AWQ or GPTQ has instead of a weight; None where there is none."""
        return next((name for name in self._tensors if name.endswith(".qweight")), None)

    def names(self, name: str) -> bool:
        """Whether there is, or should be, a tensor of that name."""
        return name in self._tensors or name in self._broken

    def record(self, weight: str, name: str, shape: tuple[int, ...]) -> Record:
        """The weight whose values are the tensor ``name``, with its other parts."""
        if self.manifest is None or len(shape) == 1:
            return Record(weight, PLAIN, {"values": self.find(name, shape)})
        format = self._format(name, shape)
        parts = format.parts(shape, self.manifest.dtype)
        return Record(
            weight, format, {part: self.find(name + SUFFIXES[part], p.shape, p.dtype) for part, p in parts.items()}
        )

    def _format(self, name: str, shape: tuple[int, ...]) -> Format:
        """What the headers of a matrix's parts make of it; whether they all fit is left to :meth:`find`."""
        values = self._named(name, shape)
        if values.dtype not in NAMES_OF_VALUES:
            return PLAIN
        format, columns = NAMES_OF_VALUES[values.dtype], shape[1]
        scales = self._named(name + SUFFIXES["scales"], (shape[0], "groups"))
        groups = scales.shape[1] if len(scales.shape) == 2 else 0
        group = columns // groups if groups and columns % groups == 0 else 0
        whole = group == columns and format != "int4"
        if not whole and (group not in GROUPS or format == "fp8"):
            groups_of = f"groups of {', '.join(map(str, GROUPS))}"
            expected = {"int4": groups_of, "int8": f"{groups_of}, or the whole row", "fp8": "the whole row as a group"}
            raise CorruptFileError(
                f"{scales.path}: got scales of shape {shown(list(scales.shape))} for {name}, {format} {list(shape)}, "
                f"expected {expected[format]}. {_PACK_AGAIN}"
            )
        if scales.dtype not in FLOATS:
            raise CorruptFileError(
                f"{scales.path}: got scales of {name} in {scales.dtype}, expected {', '.join(FLOATS)}. {_PACK_AGAIN}"
            )
        zeros = self.names(name + SUFFIXES["zeros"])
        if zeros and format != "int4":
            raise CorruptFileError(f"{values.path}: got zero points for {name}, {format}, expected none. {_PACK_AGAIN}")
        return Format(format, None if whole else group, zeros, FLOATS[scales.dtype])

    def _named(self, name: str, shape: tuple[object, ...]) -> TensorInfo:
        error = self._whole or self._broken.get(name)
        if error is not None:
            raise error
        tensor = self._tensors.get(name)
        if tensor is None:
            expected = f"[{', '.join(map(str, shape))}]"
            raise CorruptFileError(
                f"{self.folder}: got no tensor {name}, expected one of shape {expected}. {_DOWNLOAD_AGAIN}"
            )
        return tensor

    def find(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> TensorInfo:
        """The tensor, of that shape and, in a packed store, of ``dtype`` (torch's name; by default the store's)."""
        tensor = self._named(name, shape)
        if tensor.shape != shape:
            raise CorruptFileError(
                f"{tensor.path}: got tensor {name} of shape {shown(list(tensor.shape))}, expected {list(shape)}, as "
                f"config.json says. {_DOWNLOAD_AGAIN}"
            )
        expected = self.manifest and (dtype or self.manifest.dtype)
        if expected is not None and DTYPES.get(tensor.dtype) != expected:
            raise CorruptFileError(
                f"{tensor.path}: got {name} in {DTYPES.get(tensor.dtype, tensor.dtype)}, expected {expected}. "
                f"{_PACK_AGAIN}"
            )
        return tensor

    def broken_besides(self, names: set[str]) -> dict[str, MhaffnError]:
        """What is wrong with tensors of other names."""
        return {name: error for name, error in self._broken.items() if name not in names}


def _only_file(folder: Path) -> Path | None:
    """The one safetensors file of a folder, whatever its name, as AutoGPTQ has it: gptq_model-4bit-128g.safetensors."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) > 1:
        raise StoreError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}, and {len(found)} safetensors files: "
            f"{', '.join(map(shown, found[:3]))}. Fetch the index, or leave one file there that holds the whole model."
        )
    return folder / found[0] if found else None


def _indexed(folder: Path, index: Path) -> tuple[dict[str, TensorInfo], dict[str, MhaffnError]]:
    weight_map = _weight_map(index)
    found: dict[str, dict[str, TensorInfo]] = {}
    unread: dict[str, MhaffnError] = {}
    for shard in sorted(set(weight_map.values())):
        try:
            found[shard] = {tensor.name: tensor for tensor in read_header(folder / shard).tensors}
        except (StoreError, TruncatedFileError) as error:
            unread[shard] = error
    tensors: dict[str, TensorInfo] = {}
    broken: dict[str, MhaffnError] = {}
    for name, shard in weight_map.items():
        if shard in unread:
            broken[name] = unread[shard]
        elif name in found[shard]:
            tensors[name] = found[shard][name]
        else:
            broken[name] = CorruptFileError(
                f"{index}: got tensor {shown(name)} in {shown(shard)}, but that file does not hold it. "
                f"{_DOWNLOAD_AGAIN}"
            )
    return tensors, broken


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


def _sublayer(checkpoint: _Checkpoint, config: ModelConfig, sublayer: Sublayer) -> SublayerRecords:
    records = [
        checkpoint.record(name, tensor_name(sublayer, name), shape)
        for name, shape in config.sublayer_shapes(sublayer.kind).items()
    ]
    manifest = checkpoint.manifest
    checksum = manifest.checksum(checkpoint.folder, sublayer.key) if manifest else None
    return SublayerRecords(sublayer, tuple(records), checksum)


def _dtype(folder: Path, tensors: list[TensorInfo], any_dtype: bool) -> str:
    nbytes = Counter[str]()
    for tensor in tensors:
        nbytes[tensor.dtype] += tensor.nbytes
    found = [dtype for dtype, _ in nbytes.most_common()]
    unknown = [dtype for dtype in found if dtype not in FLOATS]
    if unknown or (len(found) > 1 and not any_dtype):
        hint = (
            f" Supported: {SUPPORTED}."
            if unknown
            else f" `mhaffn pack {folder} DST --dtype bfloat16` writes such a store."
        )
        raise UnsupportedModelError(
            f"{folder}: got weights of dtype {', '.join(found)}, expected all BF16, all F16 or all F32.{hint}"
        )
    return FLOATS[found[0]]
