"""The two sublayers of a Llama decoder layer, and the layer they make. Names are Meta's.

A sublayer asks its provider for weights and does not know where they come from::

    with self.weights() as w:   # resident parameters, or a stream
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from mhaffn import ops
from mhaffn.config import ModelConfig
from mhaffn.image import Weights
from mhaffn.sizes import CHUNK_TOKENS

Provider = Callable[[], AbstractContextManager[Weights]]


class KVCache(Protocol):
    """What MHA needs of a cache; any ``transformers.Cache`` has it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values ``[B, H, T, K]``; returns all of them, ``[B, H, S, K]``."""


def extended(cache: KVCache, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of ``layer``, ``[B, S, H, K]``: those in ``cache``, then the new ``k`` and ``v``.

    An offloaded cache fetches the next layer's meanwhile. In transformers 5.17 that waits for nothing queued before,
    not for the same keys to leave, nor for the memory to be read that it writes to: wrong keys where a GPU lags.
    """
    fetching = getattr(cache, "prefetch_stream", None)
    if fetching is not None:
        fetching.wait_stream(torch.cuda.current_stream(k.device))
    keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
    return keys.transpose(1, 2), values.transpose(1, 2)


@dataclass(frozen=True)
class Context:
    """What all layers of one pass share.

    ``cos`` and ``sin`` are ``[1 or B, T, K/2]`` float32. ``length`` is S, the keys there are once this pass has added
    its own; a cache may return room for more. ``mask`` is bool, True where a query may look: ``[B, 1, 1, S]`` beside
    ``causal`` (padding), or ``[B, 1, T, S]`` by itself; None lets it look at all keys, up to its own if ``causal``.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    length: int
    mask: torch.Tensor | None = None
    causal: bool = True
    cache: KVCache | None = None

    def steps(self) -> Iterator[tuple[slice, Context]]:
        """The positions in steps of at most :data:`CHUNK_TOKENS`, and what each step sees.

        A step sees no keys of later ones, so only causal contexts have several; and only those with a cache, which
        keeps the keys of the steps before.
        """
        total = self.cos.shape[1]
        size = CHUNK_TOKENS if self.causal and self.cache is not None else total
        for start in range(0, total, size):
            stop = min(start + size, total)
            length = self.length - total + stop if self.causal else self.length
            mask = None if self.mask is None else self.mask[..., :length]
            part = slice(start, stop)
            yield part, Context(self.cos[:, part], self.sin[:, part], length, mask, self.causal, self.cache)


class MHA(nn.Module):
    """Norm and multi-head attention: ``wo · attention(rope(wq x), rope(wk x), wv x)``."""

    def __init__(self, config: ModelConfig, layer: int, weights: Provider) -> None:
        super().__init__()
        self.config, self.layer, self.weights = config, layer, weights

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        with self.weights() as w:
            return _joined(x, ((part, self._step(x[:, part], step, w)) for part, step in context.steps()))

    def _step(self, x: torch.Tensor, context: Context, w: Weights) -> torch.Tensor:
        B, T, _ = x.shape
        K = self.config.head_dim
        h = ops.rms_norm(x, w.norm, self.config.norm_eps)
        q = ops.linear(h, w.wq).view(B, T, -1, K)
        k = ops.linear(h, w.wk).view(B, T, -1, K)
        v = ops.linear(h, w.wv).view(B, T, -1, K)
        q, k = ops.rope(q, k, context.cos, context.sin)
        if context.cache is not None:
            k, v = (each[:, : context.length] for each in extended(context.cache, k, v, self.layer))
        y = ops.attention(q, k, v, causal=context.causal, mask=context.mask)
        return ops.linear(y.reshape(B, T, -1), w.wo)


class FFN(nn.Module):
    """Norm and SwiGLU: ``w2 · (silu(w1 x) * (w3 x))``."""

    def __init__(self, config: ModelConfig, weights: Provider) -> None:
        super().__init__()
        self.config, self.weights = config, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        steps = (slice(start, start + CHUNK_TOKENS) for start in range(0, x.shape[1], CHUNK_TOKENS))
        with self.weights() as w:
            return _joined(x, ((part, self._step(x[:, part], w)) for part in steps))

    def _step(self, x: torch.Tensor, w: Weights) -> torch.Tensor:
        return ops.ffn(ops.rms_norm(x, w.norm, self.config.norm_eps), w.w1, w.w3, w.w2)


def _joined(x: torch.Tensor, parts: Iterator[tuple[slice, torch.Tensor]]) -> torch.Tensor:
    """The parts along T as one tensor shaped as ``x``; a single part as it is."""
    part, y = next(parts)
    if y.shape == x.shape:
        return y
    joined = torch.empty_like(x)
    joined[:, part] = y
    for part, y in parts:
        joined[:, part] = y
    return joined


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
