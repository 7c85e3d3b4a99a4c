"""Decoder layers of transformers' Llama, Mistral, Qwen2 and Qwen3, live, on :mod:`mhaffn.ops`.

Each mixin is put before the class a module had (:mod:`mhaffn.swap`); where it meets what it does not cover, the
module's own code runs. Which modules are covered, and why others are not, is decided by :func:`survey`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace as replace_field
from functools import cache, partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedCache, StaticLayer

from mhaffn import ops
from mhaffn.arguments import DTYPES, HEAD_DIM_MAX
from mhaffn.attention_interface import NAME, attend, register_attention
from mhaffn.errors import ConfigError, UnsupportedModelError
from mhaffn.modules import extended
from mhaffn.swap import Found, PassMemo, Swapped, no_global_hooks, own_forward, plain_weight, swap, untouched

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
TOLERANCE = 1e-4
"""Of logits in float32, in the check at first use."""


class RMSNorm(Swapped):
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.check_inference(hidden_states)
        weight = self._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.dtype != hidden_states.dtype:
            return cast(Tensor, super().forward(hidden_states))
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon)


class MLP(Swapped):
    def forward(self, x: Tensor) -> Tensor:
        self.check_inference(x)
        parts: dict[str, Any] = self._modules  # plain lookups: a module's own are slow
        gate, up, down = parts["gate_proj"], parts["up_proj"], parts["down_proj"]
        plain = plain_weight(gate) and plain_weight(up) and plain_weight(down) and is_silu(parts["act_fn"])
        if not plain or gate.weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, super().forward(x))
        if gate.bias is not None or up.bias is not None or down.bias is not None:
            return cast(Tensor, super().forward(x))
        return ops.ffn(x, gate.weight, up.weight, down.weight)


class Attention(Swapped):
    """Takes the masks of :mod:`mhaffn.attention_interface`, so its config says ``attn_implementation="mhaffn"``."""

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    is_causal: bool
    attention_dropout: float
    memo: PassMemo
    leads: bool
    implementation: str

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        self.check_inference(hidden_states)
        refuse_quantized(past_key_values)
        if position_embeddings is None or not self._covers(hidden_states, attention_mask, kwargs):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        B, T, _ = hidden_states.shape
        K = self.head_dim
        parts: dict[str, Any] = self._modules
        q = _project(parts["q_proj"], hidden_states).view(B, T, -1, K)
        k = _project(parts["k_proj"], hidden_states).view(B, T, -1, K)
        v = _project(parts["v_proj"], hidden_states).view(B, T, -1, K)
        if "q_norm" in parts:
            q, k = parts["q_norm"](q), parts["k_norm"](k)
        cos, sin = position_embeddings
        cos, sin = self.memo.of(cos, partial(halves, sin), leads=self.leads)
        q, k = ops.rope(q, k, cos, sin)
        kv_lens = None
        if past_key_values is not None:
            k, v = extended(past_key_values, k, v, self.layer_idx)
            layer = past_key_values.layers[self.layer_idx]
            if type(layer) is StaticLayer and attention_mask is not None and attention_mask.dim() == 4:
                kv_lens = layer.cumulative_length.reshape(1).repeat(B)  # the mask says it too, but not where to stop
        y = attend(q, k, v, attention_mask, scale=self.scaling, kv_lens=kv_lens)
        return _project(parts["o_proj"], y.reshape(B, T, -1)), None

    def give_back(self) -> None:
        if self.config._attn_implementation == NAME:
            self.config._attn_implementation = self.implementation
        super().give_back()

    def _covers(self, x: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
        """Whether this call is one of those written out here; the module's own code takes the others."""
        return (
            self.config._attn_implementation == NAME
            and not options.get("output_attentions")
            and options.get("cache") is None
            and self.is_causal
            and options.get("is_causal") in (None, True)
            and (mask is None or mask.dim() != 4 or mask.dtype == torch.bool)
            and not (self.training and self.attention_dropout)
            and not torch.is_autocast_enabled(x.device.type)
        )


class DecoderLayer(Swapped):
    """Only adds attention's output and normalises the sum in one step; its parts are replaced for themselves."""

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
        parts: dict[str, Any] = self._modules
        norm = parts["post_attention_layernorm"]
        y, _ = parts["self_attn"](
            hidden_states=parts["input_layernorm"](hidden_states), attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache,
            position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
        weight = norm._parameters.get("weight")
        plain = isinstance(norm, RMSNorm) and untouched(norm) and no_global_hooks()
        if plain and type(weight) is nn.Parameter and y.dtype == hidden_states.dtype == weight.dtype:
            y, residual = ops.add_rms_norm(y, hidden_states, weight, norm.variance_epsilon)
        else:
            residual = hidden_states + y
            y = norm(residual)
        return cast(Tensor, residual + parts["mlp"](y))


def refuse_quantized(cache: Cache | None) -> None:
    """Raises :class:`ConfigError` for a cache whose keys come back other than they went in."""
    if isinstance(cache, QuantizedCache):
        raise ConfigError(
            "got a QuantizedCache, expected a dynamic, static or offloaded cache; a model that mhaffn.replace changed "
            "takes one after mhaffn.restore(model), where it holds its weights"
        )


def _project(layer: Any, x: Tensor) -> Tensor:
    """``layer(x)``, without the cost of a module call where there is nothing to it but the product."""
    return linear(x, layer.weight, layer.bias) if plain_weight(layer) else cast(Tensor, layer(x))


def is_silu(activation: Any) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation") and untouched(activation)


def halves(sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """Transformers repeats the angle of each pair; ``ops.rope`` takes it once, in float32."""
    half = cos.shape[-1] // 2
    return cos[..., :half].float(), sin[..., :half].float()


# --- which modules ----------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Swapped]] = {
    "DecoderLayer": DecoderLayer, "Attention": Attention, "MLP": MLP, "RMSNorm": RMSNorm,
}  # fmt: skip


def survey(model: nn.Module) -> list[Found]:
    """Every module of ``model`` that is, or is named like, a decoder layer, attention, MLP or RMSNorm, in its order."""
    return list(_all_or_none([f for name, module in model.named_modules() if (f := _find(name, module)) is not None]))


def _find(name: str, module: nn.Module) -> Found | None:
    cls = module.upstream if isinstance(module, Swapped) else type(module)
    upstream = upstream_of(cls)
    mixin = next((mixin for kind, mixin in KINDS.items() if (upstream or cls).__name__.endswith(kind)), None)
    if mixin is None:
        return None
    why: str | None
    if upstream is None:
        why = f"{cls.__name__} is of no model that mhaffn replaces: {', '.join(FAMILIES.values())}"
    else:
        why = None if isinstance(module, Swapped) else _why_not(module, upstream)
    return Found(name, module, mixin, upstream, why)


def upstream_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of transformers that ``cls`` is, or derives from."""
    for base in cls.__mro__:
        for family, prefix in FAMILIES.items():
            known = base.__name__ in {prefix + kind for kind in KINDS}
            if known and base.__module__ == f"transformers.models.{family}.modeling_{family}":
                return base
    return None


def _all_or_none(found: list[Found]) -> Iterator[Found]:
    """Attention modules of one config get their masks from one place: if one stays as it was, all do."""
    attention = [f for f in found if f.mixin is Attention and "config" in f.module.__dict__]
    left = {id(f.module.config): f.name for f in reversed(attention) if f.why is not None}
    for f in found:
        if f.mixin is Attention and f.why is None and id(f.module.config) in left:
            f = replace_field(f, why=f"it shares its masks with {left[id(f.module.config)]}, which is left alone")
        yield f


def _why_not(module: nn.Module, upstream: type[nn.Module]) -> str | None:
    if not own_forward(module, upstream):
        return f"its forward is not that of transformers' {upstream.__name__}: overridden, patched or wrapped by a hook"
    reasons = {"Attention": _why_not_attention, "MLP": _why_not_mlp, "RMSNorm": _why_not_norm}
    return next((why_not(module) for kind, why_not in reasons.items() if upstream.__name__.endswith(kind)), None)


def _why_not_norm(norm: nn.Module) -> str | None:
    weight = norm._parameters.get("weight")
    return None if type(weight) is nn.Parameter else f"its weight is a {type(weight).__name__}, expected a Parameter"


def _why_not_linear(module: nn.Module, names: tuple[str, ...]) -> str | None:
    for name in names:
        part = module._modules[name]
        if type(part) is not nn.Linear:
            return f"{name} is a {type(part).__name__}, expected nn.Linear: quantised or adapted layers stay"
        weight = part._parameters.get("weight")
        if type(weight) is not nn.Parameter:
            return (
                f"{name}.weight is a {type(weight).__name__}, expected a Parameter: quantised or sharded weights stay"
            )
        if weight.dtype not in DTYPES or not weight.is_contiguous():
            kind = f"{weight.dtype} with strides {weight.stride()}"
            return f"{name}.weight is {kind}, expected contiguous bfloat16, float16 or float32"
    return None


def _why_not_mlp(mlp: nn.Module) -> str | None:
    names = ("gate_proj", "up_proj", "down_proj")
    if (reason := _why_not_linear(mlp, names)) is not None:
        return reason
    if any(getattr(mlp, name).bias is not None for name in names):
        return "it has biases, which mhaffn.ops.ffn does not take"
    if not is_silu(mlp.act_fn):
        return f"its activation is {type(mlp.act_fn).__name__}, expected SiLU without hooks"
    return None


def _why_not_attention(attention: Any) -> str | None:
    if (reason := _why_not_linear(attention, ("q_proj", "k_proj", "v_proj", "o_proj"))) is not None:
        return reason
    config = attention.config
    holder = attention if "sliding_window" in attention.__dict__ else config
    window = getattr(holder, "sliding_window", None)
    if window is not None:
        return f"sliding window of {window} keys"
    if attention.attention_dropout:
        return f"attention dropout of {attention.attention_dropout}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"attention logits capped at {config.attn_logit_softcapping}"
    if getattr(config, "output_attentions", False):
        return "the config asks for output_attentions, which transformers' own code returns"
    if attention.head_dim > HEAD_DIM_MAX or attention.head_dim % 2:
        return f"head dim of {attention.head_dim}, expected an even number up to {HEAD_DIM_MAX}"
    return None


# --- replacing them ---------------------------------------------------------------------------------------------------


def replace(found: list[Found]) -> None:
    """Swaps the modules of ``found`` that have no reason against it; attention takes its configs along."""
    register_attention()
    memos: dict[int, PassMemo] = {}
    for f in found:
        if f.why is not None or isinstance(f.module, Swapped):
            continue
        if f.mixin is not Attention:
            swap(f.module, f.mixin)
            continue
        config = f.module.config
        leads = id(config) not in memos
        memo = memos.setdefault(id(config), PassMemo())
        swap(f.module, Attention, memo=memo, leads=leads, implementation=config._attn_implementation)
    for f in found:
        if isinstance(f.module, Attention):
            f.module.config._attn_implementation = NAME


# --- the check at first use -------------------------------------------------------------------------------------------

KEPT = ("attention_bias", "mlp_bias", "rms_norm_eps", "rope_parameters", "max_position_embeddings")
"""Settings that the tiny model of :func:`check` shares with the real one."""


def check(found: list[Found]) -> None:
    """Compares logits on a tiny random model of each family and kind of config found, once in a process.

    Raises :class:`UnsupportedModelError` where they differ: this transformers is not one that the mixins know.
    """
    configs: dict[str, dict[str, Any]] = {}
    for f in found:
        if f.upstream is not None and f.why is None and not isinstance(f.module, Swapped):
            family = next(prefix for prefix in FAMILIES.values() if f.upstream.__name__.startswith(prefix))
            config = f.module.__dict__.get("config")
            if config is not None or family not in configs:
                configs[family] = tiny_options(config)
    for family, options in configs.items():
        try_on_tiny(family, json.dumps(options, sort_keys=True), _replace_all)


def _replace_all(model: Any) -> None:
    replace(survey(model))


def tiny_options(config: Any) -> dict[str, Any]:
    groups, head_dim = 2, 16
    if config is not None:
        groups = config.num_attention_heads // config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "hidden_size": 32 * groups, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61,
        "num_attention_heads": 2 * groups, "num_key_value_heads": 2, "head_dim": head_dim, "sliding_window": None,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        **{name: getattr(config, name) for name in KEPT if hasattr(config, name)},
    }  # fmt: skip


@cache
def try_on_tiny(family: str, options: str, change: Callable[[Any], None]) -> None:
    """Compares logits of a tiny random model before and after ``change``; raises :class:`UnsupportedModelError`."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**json.loads(options), attn_implementation="sdpa")
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        for name, parameter in model.named_parameters():  # wide enough that a slip of any part shows in the logits
            torch.nn.init.normal_(parameter, *((1.0, 0.3) if "norm" in name else (0.0, 0.15)))
        expected = _logits(model)
        try:
            change(model)
            error = (_logits(model) - expected).abs().max().item()
        except Exception as problem:
            raise UnsupportedModelError(_disagreement(family, f"{type(problem).__name__}: {problem}")) from problem
    if not error <= TOLERANCE:
        raise UnsupportedModelError(_disagreement(family, f"logits that differ by {error:.1e}"))


def _disagreement(family: str, got: str) -> str:
    return (
        f"mhaffn.replace tried itself on a tiny {family} model and got {got}, expected the logits of transformers "
        f"{transformers.__version__} within {TOLERANCE:.0e}; nothing was replaced. Install a transformers that this "
        "mhaffn supports (its requirements name them)."
    )


def _logits(model: Any) -> Tensor:
    """A left-padded batch: a prompt, some more tokens, one token; into a cache that grows, and one that does not."""
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for past in (DynamicCache(), StaticCache(model.config, max_cache_len=16)):
        for start, stop in ((0, 8), (8, 11), (11, 12)):
            part = slice(start, stop)
            places = positions[:, part]
            out = model(ids[:, part], attention_mask=mask[:, :stop], position_ids=places, past_key_values=past)
            logits.append(out.logits[mask[:, part].bool()])
    return torch.cat(logits)
