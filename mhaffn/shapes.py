"""Widths of models by name: for plans and measurements before any checkpoint is there."""

from __future__ import annotations

import os
from pathlib import Path

from mhaffn.config import ModelConfig
from mhaffn.errors import ConfigError
from mhaffn.store.resolve import resolve


def _config(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", num_layers=layers, hidden_size=hidden, intermediate_size=intermediate,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads, vocab_size=vocabulary, norm_eps=1e-5,
        max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip


SHAPES: dict[str, ModelConfig] = {
    "llama3-70b": _config(80, 8192, 28672, 64, 8, 128256),
    "llama3-8b": _config(32, 4096, 14336, 32, 8, 128256),
    "seed": _config(80, 8192, 12288, 64, 8, 128256),  # widths that a first measurement of this kind was taken with
    "tiny": _config(4, 256, 1024, 4, 2, 1000),
}

PUBLISHED = {"seed": "llama3-70b"}
"""Shapes that stand for a published model of another FFN width: by that model's name in :data:`SHAPES`."""


def shape_of(name: str) -> ModelConfig:
    """A shape by name, or that of a model folder or hub id, of which only config.json is read.

    Raises :class:`ConfigError`, and what :func:`~mhaffn.store.resolve` and :meth:`ModelConfig.from_folder` raise.
    """
    if name in SHAPES:
        return SHAPES[name]
    return ModelConfig.from_folder(folder_of(name))


def folder_of(name: str) -> Path:
    """The folder with the config.json of a model that is no shape by name; raises as :func:`shape_of` does."""
    if "/" not in name and not name.startswith("~") and not os.path.lexists(name):
        raise ConfigError(f"got {name}, expected {', '.join(SHAPES)}, a model folder or a hub id (org/name)")
    return resolve(name, enough="config.json")
