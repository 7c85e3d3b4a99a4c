"""The two sublayers of a Llama decoder layer, and the layer they make. Names are Meta's.

A sublayer asks its provider for weights and does not know where they come from::

    with self.weights() as w:   # resident parameters, or a stream
        ...
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from mhaffn import ops
from mhaffn.config import ModelConfig
from mhaffn.image import Weights

Provider = Callable[[], AbstractContextManager[Weights]]


class KVCache(Protocol):
    """What MHA needs of a cache; any ``transformers.Cache`` has it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values ``[B, H, T, K]``; returns all of them, ``[B, H, S, K]``."""


@dataclass(frozen=True)
class Context:
    """What all layers of one pass share.

    ``cos`` and ``sin`` are ``[1 or B, T, K/2]`` float32. ``mask`` is bool ``[B, 1, T, S]``, True where a query
    may look; None means plainly causal: a prompt that sees itself alone, or one token that sees all.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None = None
    cache: KVCache | None = None


class MHA(nn.Module):
    """Norm and multi-head attention: ``wo · attention(rope(wq x), rope(wk x), wv x)``."""

    def __init__(self, config: ModelConfig, layer: int, weights: Provider) -> None:
        super().__init__()
        self.config, self.layer, self.weights = config, layer, weights

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        B, T, _ = x.shape
        K = self.config.head_dim
        with self.weights() as w:
            h = ops.rms_norm(x, w.norm, self.config.norm_eps)
            q = linear(h, w.wq).view(B, T, -1, K)
            k = linear(h, w.wk).view(B, T, -1, K)
            v = linear(h, w.wv).view(B, T, -1, K)
            q, k = ops.rope(q, k, context.cos, context.sin)
            if context.cache is not None:
                keys, values = context.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer)
                k, v = keys.transpose(1, 2), values.transpose(1, 2)
                if context.mask is None and T > 1:  # a static cache returns room for more than was written
                    k, v = k[:, :T], v[:, :T]
            y = ops.attention(q, k, v, causal=context.mask is None, mask=context.mask)
            return linear(y.reshape(B, T, -1), w.wo)


class FFN(nn.Module):
    """Norm and SwiGLU: ``w2 · (silu(w1 x) * (w3 x))``."""

    def __init__(self, config: ModelConfig, weights: Provider) -> None:
        super().__init__()
        self.config, self.weights = config, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        with self.weights() as w:
            return ops.ffn(ops.rms_norm(x, w.norm, self.config.norm_eps), w.w1, w.w3, w.w2)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, mha: MHA, ffn: FFN) -> None:
        super().__init__()
        self.mha, self.ffn = mha, ffn

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        h: torch.Tensor = x + self.mha(x, context)
        h = h + self.ffn(h)
        return h
