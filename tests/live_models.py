"""Small random models of transformers, and what they are given."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import mhaffn

WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa 9/3": {},
    "gqa 15/3": {"hidden_size": 120, "num_attention_heads": 15},
    "mha 8/8": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
    "mqa 16/1": {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 1},
    "wide heads": WIDE,
    "heads of 96": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 96},
    "tied": {"tie_word_embeddings": True},
    "attention biases": {"attention_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0],
        }
    },
    "mistral": {"family": "Mistral", "sliding_window": None},
    "mistral, wide heads": {"family": "Mistral", "sliding_window": None, **WIDE},
    "qwen2": {"family": "Qwen2"},
    "qwen3": {"family": "Qwen3", **WIDE},
    "qwen3, biases": {"family": "Qwen3", "attention_bias": True, **WIDE},
}  # fmt: skip
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def make(family: str = "Llama", device: str = "cpu", kind: str = "ForCausalLM", **changes: Any) -> Any:
    """A small random model in float32."""
    options = {
        "hidden_size": 72, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 211, "max_position_embeddings": 256, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
    } | changes  # fmt: skip
    if family == "Mistral":
        options.setdefault("sliding_window", None)
    torch.manual_seed(0)
    model = getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**options))
    for name, parameter in model.named_parameters():  # biases of nought and norms of one would hide much
        nn.init.normal_(parameter, *((1.0, 0.3) if "norm" in name else (0.0, 0.15)))
    return model.to(device).eval()


def pair(device: str, **options: Any) -> tuple[Any, Any]:
    """A model, and the same replaced."""
    model = make(device=device, **options)
    other = copy.deepcopy(model)
    mhaffn.replace(other)
    return model, other


def prompt(batch: int = 1, length: int = 21, device: str = "cpu") -> Tensor:
    return torch.randint(3, 211, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def padded(side: str, device: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of three prompts of different lengths."""
    ids = prompt(3, 12, device)
    mask = torch.ones_like(ids)
    for row, missing in ((0, 5), (2, 9)):
        mask[row, slice(0, missing) if side == "left" else slice(12 - missing, 12)] = 0
    return ids, mask


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def run_steps(
    model: Any, ids: Tensor, mask: Tensor, steps: list[tuple[int, int]], cache: str | None, positions: bool
) -> Tensor:
    places = (mask.cumsum(1) - 1).clamp(min=0)
    past = {"dynamic": DynamicCache(), "static": StaticCache(model.config, max_cache_len=20), None: None}[cache]
    logits = []
    for start, stop in steps:
        options: dict[str, Any] = {"position_ids": places[:, start:stop]} if positions else {}
        options |= {"attention_mask": mask[:, :stop], "use_cache": past is not None}
        logits.append(model(ids[:, start:stop], past_key_values=past, **options).logits)
    return torch.cat(logits, 1)
