"""Meta's ``llama_models.llama3.model.Transformer`` made without weights, on a stream.

Stores keep ``wq`` and ``wk`` as transformers has them: the two numbers of a rotary pair half a head apart, where Meta's
stand side by side. Scores are the same, and keys lie in the model's caches in the store's order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from llama_models.llama3 import model as llama3
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mhaffn.config import ModelConfig
from mhaffn.device import memory_errors
from mhaffn.errors import ConfigError, UnsupportedModelError
from mhaffn.hf import transformers_configs
from mhaffn.meta import try_on_tiny
from mhaffn.modules import FFN, MHA, Block, Context
from mhaffn.runner import Runner
from mhaffn.store import Store
from mhaffn.streamed import Owner, StreamedLayer, changed, fill, parts_of, require_meta, require_same
from mhaffn.swap import PassMemo, own_forward, swap


class TransformerBlock(StreamedLayer):
    """Its attention's cache is the one used."""

    block: Block
    attentions: list[Any]
    memo: PassMemo
    leads: bool

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """``mask``, where there is one, is causal; its numbers are not read."""
        self.check_inference(x)
        self.check_parts()
        make = partial(_context, self.attentions, x.shape[0], mask is not None)
        context = self.memo.of(freqs_cis, make, start_pos, x.shape[0], leads=self.leads)
        return cast(Tensor, self.block(x, context))


def _context(attentions: list[Any], batch: int, causal: bool, freqs_cis: Tensor, start_pos: int, *_: int) -> Context:
    """What the layers of a pass share."""
    cos, sin = freqs_cis.real.contiguous().unsqueeze(0), freqs_cis.imag.contiguous().unsqueeze(0)
    length = start_pos + freqs_cis.shape[0]
    return Context(cos, sin, length, causal=causal, cache=_Cache(attentions, batch, start_pos))


class _Cache:
    """The caches ``[B, S, H, K]`` of Meta's attention modules for one pass, filled from ``start`` on."""

    def __init__(self, attentions: list[Any], batch: int, start: int) -> None:
        self.attentions, self.batch, self.filled = attentions, batch, [start] * len(attentions)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        attention, start = self.attentions[layer], self.filled[layer]
        self.filled[layer] = stop = start + keys.shape[2]
        kept = attention.cache_k[: self.batch].transpose(1, 2), attention.cache_v[: self.batch].transpose(1, 2)
        for cache, new in zip(kept, (keys, values), strict=True):
            cache[:, :, start:stop] = new
        return kept[0][:, :, :stop], kept[1][:, :, :stop]


class Transformer(Owner):
    """Marks the passes, and keeps them within the plan and the caches."""

    params: Any

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a captured graph would know places, not sublayers
    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        """Meta's own, but for the mask: one on the meta device says what the shape of a mask says, in no memory."""
        model = cast(Any, self)
        batch, new = tokens.shape
        if batch > self.params.max_batch_size:
            raise ConfigError(f"got {batch} sequences, expected at most {self.params.max_batch_size}, max_batch_size")
        self.runner.check_room(batch, start_pos, new)
        with memory_errors(), self.runner.one_pass(batch, new, start_pos):
            h = model.tok_embeddings(tokens)
            freqs_cis = model.freqs_cis[start_pos : start_pos + new]
            mask = torch.empty((new, start_pos + new), device="meta") if new > 1 else None
            for layer in model.layers:
                h = layer(h, start_pos, freqs_cis, mask)
            return cast(Tensor, model.output(model.norm(h)).float())


def stream(model: nn.Module, store: Store, open_runner: Callable[..., Runner]) -> tuple[Runner, dict[str, str]]:
    """Lets ``model`` compute with the weights of ``store``; returns the runner, and the classes of layers by name.

    Raises :class:`UnsupportedModelError` for a model that it does not know, and :class:`ConfigError` for one that is
    not on the meta device, or not of the store's sizes and rotary angles; nothing is changed then.
    """
    name, transformer = _transformer(model)
    params = transformer.params
    _require_same(transformer, store)
    require_meta(model)
    with torch.device("cpu"):
        freqs_cis = llama3.precompute_freqs_cis(
            params.dim // params.n_heads, params.max_seq_len * 2, params.rope_theta, params.use_scaled_rope
        )
    _require_same_angles(freqs_cis, store)
    try_on_tiny(transformer.layers[0].attention.n_rep, _put_on_own_weights)
    runner = open_runner(context=params.max_seq_len, batch=params.max_batch_size, all_logits=True)
    attentions = [layer.attention for layer in transformer.layers]
    with ExitStack() as undo:
        undo.callback(runner.close)
        fill(undo, transformer.tok_embeddings, "weight", runner.resident["embedding"])
        fill(undo, transformer.norm, "weight", runner.resident["norm"])
        head = "embedding" if store.config.tie_word_embeddings else "head"
        fill(undo, transformer.output, "weight", runner.resident[head])
        with memory_errors():
            kept = [(transformer, "freqs_cis", freqs_cis.to(runner.device))]
            for attention in attentions:
                for cache in ("cache_k", "cache_v"):
                    old = getattr(attention, cache)
                    kept.append((attention, cache, torch.zeros(old.shape, dtype=runner.dtype, device=runner.device)))
        for module, attribute, tensor in kept:
            undo.callback(module.__dict__.__setitem__, attribute, module.__dict__[attribute])
            module.__dict__[attribute] = tensor
        _put_on(transformer, runner.blocks)
        swap(transformer, Transformer, runner=runner, undo=weakref.finalize(transformer, undo.pop_all().close))
    prefix = f"{name}." if name else ""
    return runner, {f"{prefix}layers.{n}": layer.upstream.__name__ for n, layer in enumerate(transformer.layers)}


def _transformer(model: nn.Module) -> tuple[str, Any]:
    """Meta's ``Transformer`` in ``model``, and its name."""
    if (ranks := get_model_parallel_world_size()) != 1:
        raise UnsupportedModelError(f"got a model spread over {ranks} ranks, expected 1")
    for name, module in model.named_modules():
        if isinstance(module, llama3.Transformer):
            if own_forward(module, llama3.Transformer) and all(
                own_forward(layer, llama3.TransformerBlock) and changed(parts_of(layer)) is None
                for layer in module.layers
            ):
                return name, module
            raise UnsupportedModelError(
                f"got a {type(module).__name__} with a forward of its own, or layers with one or hooks in them, "
                "expected those of Meta's Transformer; undo patches, hooks and mhaffn.replace first"
            )
    raise UnsupportedModelError(f"got a {type(model).__name__}, expected Meta's Transformer, or what holds one")


def _require_same(model: Any, store: Store) -> None:
    params, config = model.params, store.config
    require_same(
        {
            "dim": params.dim, "n_layers": params.n_layers, "n_heads": params.n_heads, "vocab_size": params.vocab_size,
            "n_kv_heads": params.n_heads if params.n_kv_heads is None else params.n_kv_heads,
            "an FFN": model.layers[0].feed_forward.w1.weight.shape[0],
            "heads": params.dim // params.n_heads, "norm_eps": params.norm_eps,
        },
        {
            "dim": config.hidden_size, "n_layers": config.num_layers, "n_heads": config.num_heads,
            "vocab_size": config.vocab_size, "n_kv_heads": config.num_kv_heads, "an FFN": config.intermediate_size,
            "heads": config.head_dim, "norm_eps": config.norm_eps,
        },
        store.path,
    )  # fmt: skip


def _require_same_angles(freqs_cis: Tensor, store: Store) -> None:
    config, _ = transformers_configs(store.path)
    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(cast(Any, config))
    ours, theirs = freqs_cis[1].angle(), rotary.inv_freq
    if rotary.attention_scaling != 1 or not torch.allclose(ours, theirs, rtol=1e-3, atol=0):
        raise ConfigError(
            f"got a model whose rotary angles are not those of {store.path}/config.json; give ModelArgs the same "
            "rope_theta, and use_scaled_rope where its rope_type is llama3 with a factor of 8"
        )


def _put_on(transformer: Any, blocks: list[Block]) -> None:
    memo, attentions = PassMemo(), [layer.attention for layer in transformer.layers]
    for index, (layer, block) in enumerate(zip(transformer.layers, blocks, strict=True)):
        leads, parts = index == 0, parts_of(layer)
        swap(layer, TransformerBlock, block=block, parts=parts, attentions=attentions, memo=memo, leads=leads)


def _put_on_own_weights(model: Any) -> None:
    """Lets the layers of ``model`` run as blocks, with the weights that they have, in the order of a store."""
    p = model.params
    config = ModelConfig(
        architecture="LlamaForCausalLM", num_layers=p.n_layers, hidden_size=p.dim, num_heads=p.n_heads,
        num_kv_heads=p.n_kv_heads, head_dim=p.dim // p.n_heads, vocab_size=p.vocab_size, norm_eps=p.norm_eps,
        intermediate_size=model.layers[0].feed_forward.w1.weight.shape[0], max_position_embeddings=p.max_seq_len,
        tie_word_embeddings=False,
    )  # fmt: skip
    _put_on(model, [_block(config, index, layer) for index, layer in enumerate(model.layers)])


def _block(config: ModelConfig, index: int, layer: Any) -> Block:
    a, f = layer.attention, layer.feed_forward
    mha = SimpleNamespace(
        wq=halves_apart(a.wq.weight, config.head_dim), wk=halves_apart(a.wk.weight, config.head_dim),
        wv=a.wv.weight, wo=a.wo.weight, norm=layer.attention_norm.weight,
    )  # fmt: skip
    ffn = SimpleNamespace(w1=f.w1.weight, w3=f.w3.weight, w2=f.w2.weight, norm=layer.ffn_norm.weight)
    return Block(MHA(config, index, lambda: nullcontext(mha)), FFN(config, lambda: nullcontext(ffn)))


def halves_apart(weight: Tensor, head_dim: int) -> Tensor:
    """Meta's ``wq`` or ``wk``, ``[out, in]``, in the order of transformers."""
    rows, columns = weight.shape
    pairs = weight.view(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
