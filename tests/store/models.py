"""Tiny checkpoints written by hand, right or wrong in one chosen place."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 59,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
INDEX = "model.safetensors.index.json"


def raw_safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (bytes, or what JSON makes of it), claiming ``length`` for it if given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def random_weights(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights by Hugging Face's names, of the shapes ``config`` asks for."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    k = d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * k, config["num_key_value_heads"] * k
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "self_attn.q_proj.weight": (q, d), prefix + "self_attn.k_proj.weight": (kv, d)}
        shapes |= {prefix + "self_attn.v_proj.weight": (kv, d), prefix + "self_attn.o_proj.weight": (d, q)}
        shapes |= {prefix + f"mlp.{w}_proj.weight": (f, d) for w in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (d, f)}
        shapes |= {prefix + "input_layernorm.weight": (d,), prefix + "post_attention_layernorm.weight": (d,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul_(0.2).to(dtype) for name, shape in shapes.items()}


def write_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    weights: dict[str, torch.Tensor] | None = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Writes a Hugging Face folder and gives its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = random_weights(config, dtype) if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return weights
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return weights


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
