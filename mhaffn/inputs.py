"""What a pass works on where only its time is wanted: random states, and a cache that is full already."""

from __future__ import annotations

import torch

from mhaffn.config import ModelConfig
from mhaffn.modules import Context

ROPE_THETA = 500000.0


class FilledCache:
    """Room for ``length`` keys and values a layer, full: what a pass adds takes the place of the oldest."""

    def __init__(self, config: ModelConfig, layers: int, length: int, device: torch.device) -> None:
        shape = (layers, 2, 1, config.num_kv_heads, length, config.head_dim)
        self._memory = torch.randn(shape, dtype=torch.float32).to(device, torch.bfloat16)
        self._next = [0] * layers
        self.length, self.device = length, device

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._memory[layer_idx]
        T = key_states.shape[2]
        start = self._next[layer_idx] if self._next[layer_idx] + T <= self.length else 0
        self._next[layer_idx] = start + T
        keys[:, :, start : start + T] = key_states
        values[:, :, start : start + T] = value_states
        return keys, values


def context_of(config: ModelConfig, tokens: int, cache: FilledCache) -> Context:
    """A pass of the last ``tokens`` positions, which sees all that the cache holds."""
    S, K = cache.length, config.head_dim
    positions = torch.arange(S - tokens, S, device=cache.device, dtype=torch.float32)
    angles = positions[:, None] * ROPE_THETA ** (-torch.arange(0, K, 2, device=cache.device, dtype=torch.float32) / K)
    return Context(angles.cos()[None].contiguous(), angles.sin()[None].contiguous(), length=S, cache=cache)


def hidden_states(config: ModelConfig, tokens: int, device: torch.device) -> torch.Tensor:
    """Random ``[1, T, D]`` in bfloat16."""
    return torch.randn(1, tokens, config.hidden_size, device=device, dtype=torch.bfloat16)
