"""Models of transformers made without weights, on a stream: each decoder layer runs as a block of a runner.

The model's own loop goes over its layers, so that hidden states, hooks on layers, ``generate()`` and the caches are
those of transformers; embedding, norm and head become ordinary parameters.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from mhaffn import huggingface
from mhaffn.attention_interface import NAME, as_bool, register_attention
from mhaffn.cache import Room, reserve, rooms_of
from mhaffn.config import ARCHITECTURES, ModelConfig
from mhaffn.device import memory_errors
from mhaffn.errors import ConfigError, UnsupportedModelError
from mhaffn.hf import transformers_configs
from mhaffn.huggingface import FAMILIES, halves, refuse_quantized, tiny_options, try_on_tiny
from mhaffn.modules import FFN, MHA, Block, Context
from mhaffn.runner import Runner
from mhaffn.sizes import CHUNK_TOKENS
from mhaffn.store import Store
from mhaffn.streamed import Owner, Streamed, StreamedLayer, changed, fill, parts_of, require_meta, require_same
from mhaffn.swap import PassMemo, own_forward, swap


class Layer(StreamedLayer):
    block: Block
    memo: PassMemo
    leads: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        self.check_inference(hidden_states)
        self.check_parts()
        assert position_embeddings is not None  # transformers' own loop gives them
        cos, sin = position_embeddings
        make = partial(_context, sin, attention_mask, past_key_values)
        context = self.memo.of(cos, make, id(attention_mask), id(past_key_values), leads=self.leads)
        return cast(Tensor, self.block(hidden_states, context))


def _context(sin: Tensor, mask: Tensor | None, cache: Cache | None, cos: Tensor, *_: int) -> Context:
    """What the layers of a pass share, from what transformers hands each of them."""
    cos, sin = halves(sin, cos)
    if mask is not None and mask.dim() == 4:
        return Context(cos, sin, mask.shape[-1], as_bool(mask), causal=False, cache=cache)
    seen = int(cache.get_seq_length()) if cache is not None else 0
    padding = mask[:, None, None, :] if mask is not None and mask.shape[0] else None
    return Context(cos, sin, seen + cos.shape[1], padding, cache=cache)


class Base(Owner):
    """``LlamaModel`` and its like: marks the passes, and keeps them within the plan."""

    config: Any
    rooms: list[Room]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a captured graph would know places, not sublayers
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ConfigError("a streamed model does not take output_attentions: its attention keeps no scores")
        refuse_quantized(past_key_values)
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ConfigError("give exactly one of input_ids and inputs_embeds")
        batch, new = given.shape[:2]
        seen = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        self.runner.check_room(batch, seen, new)
        keeps = self.config.use_cache if use_cache is None else use_cache
        steps = past_key_values is None and not keeps and new > CHUNK_TOKENS  # later ones need the keys of the first
        if past_key_values is None and (keeps or steps):
            past_key_values = DynamicCache(config=self.config)
        reserve(past_key_values, self.rooms)
        with memory_errors(), self.runner.one_pass(batch, new, seen):
            output = super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
            )  # fmt: skip
        if steps and isinstance(output, tuple):
            return output[:1] + output[2:]
        if steps:
            output.past_key_values = None
        return output


class Head(Streamed):
    """``LlamaForCausalLM`` and its like."""

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Never: a captured CUDA graph would read places in memory where other sublayers lie by then."""
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the weights are on disk already, and not in this model."""
        raise ConfigError("a streamed model holds no weights to save; copy the folder of its store")


def stream(model: nn.Module, store: Store, open_runner: Callable[[], Runner]) -> tuple[Runner, dict[str, str]]:
    """Lets ``model`` compute with the weights of ``store``; returns the runner, and the classes of layers by name.

    Raises :class:`UnsupportedModelError` for a model that it does not know, and :class:`ConfigError` for one that is
    not on the meta device, or not of the store's config; nothing is changed then.
    """
    name, base = _base(model)
    config = base.config
    _require_same(config, store)
    require_meta(model)
    try_on_tiny(FAMILIES[config.model_type], json.dumps(tiny_options(config), sort_keys=True), _put_on_own_weights)
    runner = open_runner()
    with ExitStack() as undo:
        undo.callback(runner.close)
        for module, key in ((base.embed_tokens, "embedding"), (base.norm, "norm")):
            fill(undo, module, "weight", runner.resident[key])
        heads: list[Any] = [m for m in model.modules() if getattr(m, "lm_head", None) is not None]
        for head in heads:
            if config.tie_word_embeddings:
                fill(undo, head.lm_head, "weight", base.embed_tokens.weight)
            else:
                fill(undo, head.lm_head, "weight", runner.resident["head"])
        undo.callback(base._modules.__setitem__, "rotary_emb", base.rotary_emb)
        with torch.device("cpu"):
            base.rotary_emb = type(base.rotary_emb)(config).to(runner.device)
        undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        _put_on(base, runner.blocks)
        rooms = rooms_of(runner.plan.work, config.num_hidden_layers)
        swap(base, Base, runner=runner, rooms=rooms, undo=weakref.finalize(base, undo.pop_all().close))
    for head in heads:
        swap(head, Head)
    prefix = f"{name}." if name else ""
    return runner, {f"{prefix}layers.{n}": layer.upstream.__name__ for n, layer in enumerate(base.layers)}


def _base(model: nn.Module) -> tuple[str, Any]:
    """The module around the layers, and its name."""
    for name, module in model.named_modules():
        for family in ARCHITECTURES.values():
            upstream = next((c for c in type(module).__mro__ if c.__name__ == f"{FAMILIES[family]}Model"), None)
            if upstream is None or upstream.__module__ != f"transformers.models.{family}.modeling_{family}":
                continue
            layers = [huggingface.upstream_of(type(layer)) for layer in module.layers]
            if not own_forward(module, upstream) or not all(
                known is not None and own_forward(layer, known) and changed(parts_of(layer)) is None
                for layer, known in zip(module.layers, layers, strict=True)
            ):
                raise UnsupportedModelError(
                    f"got a {type(module).__name__} with a forward of its own, or layers with one or hooks in them, "
                    f"expected those of transformers' {upstream.__name__}; undo patches, hooks, mhaffn.replace first"
                )
            return name, module
    known = " or ".join(f"{FAMILIES[family]}Model" for family in ARCHITECTURES.values())
    raise UnsupportedModelError(f"got a {type(model).__name__}, expected a {known} of transformers, or what holds one")


def _require_same(config: Any, store: Store) -> None:
    architecture = next(name for name, family in ARCHITECTURES.items() if family == config.model_type)
    values = {**config.to_dict(), "architectures": [architecture]}
    theirs, _ = transformers_configs(store.path)
    require_same(
        asdict(ModelConfig.from_dict(values, where="the model's config")) | {"rope_parameters": config.rope_parameters},
        asdict(store.config) | {"rope_parameters": theirs.rope_parameters},
        store.path,
    )


def _put_on(base: Any, blocks: list[Block]) -> None:
    register_attention()
    base.config._attn_implementation = NAME
    memo = PassMemo()
    for index, (layer, block) in enumerate(zip(base.layers, blocks, strict=True)):
        swap(layer, Layer, block=block, parts=parts_of(layer), memo=memo, leads=index == 0)


def _put_on_own_weights(model: Any) -> None:
    """Lets the layers of ``model`` run as blocks, with the weights that they have."""
    architecture = f"{FAMILIES[model.config.model_type]}ForCausalLM"
    config = ModelConfig.from_dict({**model.config.to_dict(), "architectures": [architecture]})
    _put_on(model.model, [_block(config, index, layer) for index, layer in enumerate(model.model.layers)])


def _block(config: ModelConfig, index: int, layer: Any) -> Block:
    a, m = layer.self_attn, layer.mlp
    mha = SimpleNamespace(
        wq=a.q_proj.weight, wk=a.k_proj.weight, wv=a.v_proj.weight, wo=a.o_proj.weight,
        norm=layer.input_layernorm.weight,
    )  # fmt: skip
    ffn = SimpleNamespace(
        w1=m.gate_proj.weight, w3=m.up_proj.weight, w2=m.down_proj.weight, norm=layer.post_attention_layernorm.weight
    )
    return Block(MHA(config, index, lambda: nullcontext(mha)), FFN(config, lambda: nullcontext(ffn)))
