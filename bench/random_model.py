"""Random checkpoints of real widths, written fast: for measuring streams without real weights."""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
import xxhash

from mhaffn.config import ModelConfig
from mhaffn.store.safetensors import write_header
from mhaffn.store.source import tensors_by_file

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
        "num_hidden_layers": 80, "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 32, "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 4, "vocab_size": 1000,
    },
}  # fmt: skip


def write_random_model(folder: Path, shape: str, layers: int | None = None) -> int:
    """Writes a packed store of random bfloat16 weights into ``folder``; returns the bytes of its layers.

    Layers repeat the values of the first one, in files of their own.
    """
    config = _write_config(folder, shape, layers)
    payloads = _Payloads(config)
    checksums, weight_map, total = {}, {}, 0
    for name, key, shapes in tensors_by_file(config):
        payload = payloads.of(key.rpartition(".")[2], shapes)
        digest = xxhash.xxh3_64(payload).hexdigest()
        _write_file(folder / name, shapes, [payload], {"format": "pt", "xxh3_64": digest})
        checksums[key] = digest
        if "." in key:
            total += len(payload)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    manifest = {"version": 1, "dtype": "bfloat16", "source": "random", "checksums": checksums}
    (folder / "mhaffn.json").write_text(json.dumps(manifest))
    return total


def write_random_shards(folder: Path, shape: str, layers: int) -> int:
    """The same as a plain Hugging Face folder, a shard a layer, with a tokenizer of words: what other tools read."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = _write_config(folder, shape, layers)
    payloads = _Payloads(config)
    shards: dict[int, list[tuple[dict[str, tuple[int, ...]], bytes]]] = {}
    total = 0
    for _, key, shapes in tensors_by_file(config):
        payload = payloads.of(key.rpartition(".")[2], shapes)
        shard = int(key.partition(".")[0]) + 2 if "." in key else 1
        shards.setdefault(shard, []).append((shapes, payload))
        if shard > 1:
            total += len(payload)
    weight_map = {}
    for shard, parts in shards.items():
        name = f"model-{shard:05d}-of-{layers + 1:05d}.safetensors"
        joined = {tensor: size for shapes, _ in parts for tensor, size in shapes.items()}
        _write_file(folder / name, joined, [payload for _, payload in parts], {"format": "pt"})
        weight_map |= dict.fromkeys(joined, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", pad_token="w2").save_pretrained(
        folder
    )
    return total


def _write_config(folder: Path, shape: str, layers: int | None) -> ModelConfig:
    values = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    values |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return ModelConfig.from_folder(folder)


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], payloads: list[bytes], about: dict[str, str]) -> None:
    entries = {tensor: ("BF16", size, math.prod(size) * 2) for tensor, size in shapes.items()}
    with path.open("wb") as file:
        file.write(write_header(entries, about, 4096))
        for payload in payloads:
            file.write(payload)
        file.flush()
        os.fsync(file.fileno())


class _Payloads:
    """Random values, made once for each kind of file."""

    def __init__(self, config: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(1 << 24, generator=generator).mul_(config.hidden_size**-0.5).bfloat16()
        self._made: dict[str, bytes] = {}

    def of(self, kind: str, shapes: dict[str, tuple[int, ...]]) -> bytes:
        if kind not in self._made:
            self._made[kind] = b"".join(_values(tensor, size, self._pool) for tensor, size in shapes.items())
        return self._made[kind]


def _values(tensor: str, size: tuple[int, ...], pool: torch.Tensor) -> bytes:
    count = math.prod(size)
    if len(size) == 1:
        return torch.ones(count, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    start = zlib.crc32(tensor.encode()) % 4096
    rolled = pool.roll(start)
    return rolled.repeat(-(-count // rolled.numel()))[:count].contiguous().view(torch.uint8).numpy().tobytes()
