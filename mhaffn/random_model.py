"""Random checkpoints of real widths, written fast: for measuring without real weights."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import xxhash

from mhaffn.config import ModelConfig, order
from mhaffn.formats import PLAIN, Format, Formats, Part
from mhaffn.shapes import SHAPES
from mhaffn.store.format import INDEX_NAME, SUFFIXES
from mhaffn.store.manifest import NAME, Manifest
from mhaffn.store.safetensors import CODES, write_header
from mhaffn.store.source import tensors_by_file

POOL_ELEMENTS = 1 << 24
VOCABULARY_MAX = 32000
"""Embedding and head are resident and are not what is measured: a random model writes no more rows of them."""

Tensors = Mapping[str, Part]


def write_random_model(
    folder: Path,
    shape: str | ModelConfig,
    layers: int | None = None,
    *,
    formats: Formats | None = None,
    vocabulary: int = VOCABULARY_MAX,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> int:
    """Writes a packed store of random bfloat16 weights, or in ``formats``, into ``folder``; returns its layers' bytes.

    ``shape`` is a name in :data:`mhaffn.shapes.SHAPES` or a config. Layers repeat the values of the first one, in
    files of their own. ``progress`` gets the bytes of each piece written. Needs about 100 MiB of memory.
    """
    config = _write_config(folder, shape, layers, vocabulary)
    values = _Values(config.hidden_size)
    digests: dict[str, str] = {}
    checksums: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    total = 0
    of = {s.key: (formats or Formats()).of(s) or PLAIN for s in order(config.num_layers)}
    for name, key, shapes in tensors_by_file(config):
        format = of.get(key, PLAIN)
        parts, alike = _parts(shapes, format), f"{key.rpartition('.')[2]} {format}"
        if alike not in digests:
            digests[alike] = values.digest(parts)
        _write_file(folder / name, [parts], values, {"format": "pt", "xxh3_64": digests[alike]}, progress)
        checksums[key] = digests[alike]
        if key in of:
            total += _nbytes(parts)
        weight_map |= dict.fromkeys(parts, name)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / NAME).write_text(Manifest("bfloat16", "random", checksums).to_json())
    return total


def write_random_shards(folder: Path, shape: str, layers: int) -> int:
    """The same as a plain Hugging Face folder, a shard a layer, with a tokenizer of words: what other tools read."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = _write_config(folder, shape, layers, VOCABULARY_MAX)
    values = _Values(config.hidden_size)
    shards: dict[int, list[Tensors]] = {}
    for _, key, shapes in tensors_by_file(config):
        shard = int(key.partition(".")[0]) + 2 if "." in key else 1
        shards.setdefault(shard, []).append(_parts(shapes, PLAIN))
    weight_map: dict[str, str] = {}
    for shard, parts in shards.items():
        name = f"model-{shard:05d}-of-{layers + 1:05d}.safetensors"
        _write_file(folder / name, parts, values, {"format": "pt"}, lambda nbytes: None)
        weight_map |= {tensor: name for tensors in parts for tensor in tensors}
    total = sum(_nbytes(tensors) for shard, parts in shards.items() if shard > 1 for tensors in parts)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", pad_token="w2").save_pretrained(
        folder
    )
    return total


def _write_config(folder: Path, shape: str | ModelConfig, layers: int | None, vocabulary: int) -> ModelConfig:
    config = SHAPES[shape] if isinstance(shape, str) else shape
    config = replace(config, num_layers=layers or config.num_layers, vocab_size=min(config.vocab_size, vocabulary))
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps, "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings, "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "bos_token_id": 1, "eos_token_id": None,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "num_hidden_layers": config.num_layers, "vocab_size": config.vocab_size,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return ModelConfig.from_folder(folder)


def _parts(shapes: Mapping[str, tuple[int, ...]], format: Format) -> Tensors:
    return {
        name + SUFFIXES[part]: found
        for name, shape in shapes.items()
        for part, found in format.parts(shape, "bfloat16").items()
    }


def _write_file(
    path: Path, parts: Sequence[Tensors], values: _Values, about: dict[str, str], progress: Callable[[int], None]
) -> None:
    entries = {
        name: (CODES[part.dtype], part.shape, part.nbytes) for tensors in parts for name, part in tensors.items()
    }  # fmt: skip
    with path.open("wb") as file:
        file.write(write_header(entries, about, 4096))
        for tensors in parts:
            for piece in values.pieces(tensors):
                file.write(piece)
                progress(len(piece))
        file.flush()
        os.fsync(file.fileno())


def _nbytes(tensors: Tensors) -> int:
    return sum(part.nbytes for part in tensors.values())


class _Values:
    """Random values, by tensor: one pool read round and round, from a place that the tensor's name decides."""

    def __init__(self, hidden_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(POOL_ELEMENTS, generator=generator).mul_(hidden_size**-0.5).bfloat16()
        codes = torch.randint(0, 120, (POOL_ELEMENTS,), generator=generator, dtype=torch.uint8)  # no NaN of float8
        self._pools = {name: _bytes(codes) for name in ("int8", "uint8", "float8_e4m3fn")} | {
            "bfloat16": _bytes(weights),
            # As large as weights are: codes of int4 and int8 are some tens at most.
            "scales": _bytes(torch.full((POOL_ELEMENTS,), hidden_size**-0.5 / 64, dtype=torch.float16)),
            "zeros": _bytes(torch.full((POOL_ELEMENTS,), 8.0, dtype=torch.float16)),
        }

    def digest(self, tensors: Tensors) -> str:
        """XXH3-64 of all pieces."""
        digest = xxhash.xxh3_64()
        for piece in self.pieces(tensors):
            digest.update(piece)
        return digest.hexdigest()

    def pieces(self, tensors: Tensors) -> Iterator[memoryview]:
        """The tensors' bytes one after another; norms are ones."""
        for name, part in tensors.items():
            left = part.nbytes
            if len(part.shape) == 1:
                yield _bytes(torch.ones(part.shape, dtype=torch.bfloat16))
                continue
            pool = self._pools[part.dtype if name.endswith(".weight") else name.rpartition(".")[2]]
            start = zlib.crc32(name.rpartition("layers.")[2].partition(".")[2].encode()) % 4096 * 2
            while left:
                piece = pool[start : start + left]
                yield piece
                left -= len(piece)
                start = 0


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
