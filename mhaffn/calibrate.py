"""How much each column of a matrix matters: the mean square of what it multiplies when the model reads something.

A text tells most. Tokens drawn at random need none, and tell much of the same: the few channels that are hundreds of
times as strong as the rest are strong whatever is read (``docs/quality.md``).

Of a product ``w x`` an error ``e_j`` in column j adds ``e_j² x_j²``, so with the mean of ``x_j²`` the search of
:mod:`mhaffn.quantize` makes the error of the output least, for inputs that do not correlate. The model is read from its
source a layer at a time, once, so memory holds one layer and the hidden states of the text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from mhaffn import ops
from mhaffn.config import KINDS, Sublayer
from mhaffn.device import choose_device, memory_errors
from mhaffn.errors import ConfigError
from mhaffn.files import read_text
from mhaffn.store.format import RESIDENT_NAMES, tensor_name
from mhaffn.store.source import Source

TOKENS = 4096
WINDOW = 512
"""Tokens that are read at most, and how many see each other."""
RANDOM_TOKENS = 1024

Progress = Callable[[int, int], None]


def importance_of(
    source: Source,
    text: Path,
    *,
    device: str | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Tensor]:
    """For each matrix of ``source``, what the file ``text`` makes of its columns.

    Mean squares, float32 ``[D]``, by the matrix's name, over the first :data:`TOKENS` tokens of it;
    ``progress`` gets layers done and in all. The same file on the same ``device`` gives the same bits.

    Raises :class:`ConfigError` for a text that cannot be read or is too short, and what reading the source raises.
    """
    content = read_text(text, ConfigError)
    tokenizer, config = _transformers_of(source)
    ids = tokenizer(content, return_tensors="pt", truncation=True, max_length=TOKENS)["input_ids"][0]
    if len(ids) < WINDOW // 8:
        raise ConfigError(f"{text}: got {len(ids)} tokens, expected at least {WINDOW // 8}: give a longer text")
    return mean_squares(source, config, ids, choose_device(device), progress)


def random_importance(
    source: Source, *, device: str | None = None, progress: Progress = lambda done, total: None
) -> dict[str, Tensor]:
    """As :func:`importance_of`, of :data:`RANDOM_TOKENS` tokens that are drawn at random, always the same."""
    with tempfile.TemporaryDirectory() as scratch:
        config = _config_of(source, Path(scratch))
    ids = torch.randint(source.config.vocab_size, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0))
    return mean_squares(source, config, ids, choose_device(device), progress)


@torch.inference_mode()
def mean_squares(
    source: Source, config: Any, ids: Tensor, device: torch.device, progress: Progress = lambda done, total: None
) -> dict[str, Tensor]:
    """As :func:`importance_of`, of tokens ``ids`` ``[T]``; ``config`` is transformers'."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    window = min(WINDOW, len(ids))
    ids = ids[: len(ids) // window * window].view(-1, window)
    embedding = source.tensor(RESIDENT_NAMES["embedding"])
    if int(ids.max()) >= embedding.shape[0]:
        raise ConfigError(f"got a token {int(ids.max())}, expected one of the model's {embedding.shape[0]}")
    found: dict[str, Tensor] = {}
    with memory_errors():
        x = embedding[ids].to(device, dtype)
        del embedding
        positions = torch.arange(window, device=device).unsqueeze(0)
        cos, sin = LlamaRotaryEmbedding(config).to(device)(x.float(), positions)
        half = cos.shape[-1] // 2
        angles = cos[..., :half].float().contiguous(), sin[..., :half].float().contiguous()
        for layer in range(source.config.num_layers):
            progress(layer, source.config.num_layers)
            for kind in KINDS:
                weights = _Weights(source, Sublayer(layer, kind), device, dtype, found)
                h = ops.rms_norm(x, weights.norm, source.config.norm_eps)
                x = x + (_mha(h, weights, angles, source.config.head_dim) if kind == "mha" else _ffn(h, weights))
    progress(source.config.num_layers, source.config.num_layers)
    return found


class _Weights:
    """Products with a sublayer's matrices, each read when it is used; notes what they multiply."""

    def __init__(
        self, source: Source, sublayer: Sublayer, device: torch.device, dtype: torch.dtype, found: dict[str, Tensor]
    ) -> None:
        self._source, self._sublayer, self._device, self._dtype, self._found = source, sublayer, device, dtype, found
        self.norm = self._read("norm")

    def _read(self, weight: str) -> Tensor:
        return self._source.tensor(tensor_name(self._sublayer, weight)).to(self._device, self._dtype)

    def product(self, weight: str, x: Tensor) -> Tensor:
        """``x weightᵀ``."""
        squares = x.float().square().flatten(0, -2).mean(0)
        self._found[tensor_name(self._sublayer, weight)] = squares.cpu()
        return linear(x, self._read(weight))


def _mha(h: Tensor, weights: _Weights, angles: tuple[Tensor, Tensor], head_dim: int) -> Tensor:
    q, k, v = (weights.product(name, h).unflatten(-1, (-1, head_dim)) for name in ("wq", "wk", "wv"))
    q, k = ops.rope(q, k, *angles)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return weights.product("wo", y.transpose(1, 2).flatten(2))


def _ffn(h: Tensor, weights: _Weights) -> Tensor:
    gate = silu(weights.product("w1", h))
    return weights.product("w2", gate * weights.product("w3", h))


def _transformers_of(source: Source) -> tuple[Any, Any]:
    """The tokenizer of a source, and its configuration."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        for name, content in source.side_files():
            (Path(scratch) / name).write_bytes(content)
        config = _config_of(source, Path(scratch))
        try:
            return AutoTokenizer.from_pretrained(scratch), config
        except Exception as error:  # transformers raises many kinds
            raise ConfigError(
                f"{source.path}: transformers finds no tokenizer there ({error!r:.200}), which a text to calibrate "
                f"with needs; `--calibrate random` does not"
            ) from error


def _config_of(source: Source, scratch: Path) -> Any:
    """transformers' configuration of a source, by way of a file in ``scratch``."""
    from transformers import AutoConfig

    (scratch / "config.json").write_text(json.dumps(source.config_values()), encoding="utf-8")
    try:
        return AutoConfig.from_pretrained(scratch)
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"{source.path}: transformers cannot read its config.json ({error!r:.200})") from error
