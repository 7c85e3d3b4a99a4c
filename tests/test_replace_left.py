"""What of a model is left to transformers: parts not covered, and parts changed before or afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import QuantizedCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama import modeling_llama

import mhaffn
from mhaffn.errors import ConfigError, UnsupportedModelError
from tests.live_models import classes, make, padded, pair, prompt

pytestmark = pytest.mark.usefixtures("one_thread")


class FakeQuantised(nn.Linear):
    """Stands for the layers of quantisation libraries, which derive from nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1))


class FakeTensor(Tensor):
    """Stands for the weights of quantisation libraries, which derive from Tensor."""


def quantise(model: Any) -> None:
    for layer in model.model.layers[:2]:
        for part, name in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
            old = getattr(part, name)
            new = FakeQuantised(old.in_features, old.out_features, bias=False)
            new.weight = old.weight
            setattr(part, name, new)


def quantise_tensors(model: Any) -> None:
    for layer in model.model.layers[:2]:
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.as_subclass(FakeTensor), requires_grad=False)


def patch_forwards(model: Any) -> None:
    mlp, attention = model.model.layers[1].mlp, model.model.layers[0].self_attn
    mlp.forward = lambda x, forward=mlp.forward: 2 * forward(x)
    attention.forward = lambda *args, forward=attention.forward, **options: forward(*args, **options)


class OwnMLP(modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class SameMLP(modeling_llama.LlamaMLP):
    pass


def derive(model: Any) -> None:
    model.model.layers[0].mlp.__class__ = OwnMLP
    model.model.layers[1].mlp.__class__ = SameMLP


MIXED = {"family": "Qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
LEFT: dict[str, tuple[dict[str, Any], Callable[[Any], None], dict[str, str]]] = {
    "sliding window": ({"family": "Mistral", "sliding_window": 4}, lambda m: None, {
        f"model.layers.{i}.self_attn": "sliding window of 4 keys" for i in range(3)}),
    "one sliding layer": (MIXED, lambda m: None, {
        "model.layers.0.self_attn": "shares its masks with model.layers.2.self_attn",
        "model.layers.1.self_attn": "shares its masks", "model.layers.2.self_attn": "sliding window of 4"}),
    "dropout": ({"attention_dropout": 0.5}, lambda m: None, {
        f"model.layers.{i}.self_attn": "attention dropout of 0.5" for i in range(3)}),
    "soft cap": ({}, lambda m: setattr(m.config, "attn_logit_softcapping", 30.0), {
        f"model.layers.{i}.self_attn": "capped at 30" for i in range(3)}),
    "output_attentions": ({"attn_implementation": "eager", "output_attentions": True}, lambda m: None, {
        f"model.layers.{i}.self_attn": "output_attentions" for i in range(3)}),
    "gelu": ({"hidden_act": "gelu"}, lambda m: None, {
        f"model.layers.{i}.mlp": "activation is GELUActivation, expected SiLU" for i in range(3)}),
    "mlp biases": ({"mlp_bias": True}, lambda m: None, {f"model.layers.{i}.mlp": "has biases" for i in range(3)}),
    "quantised": ({}, quantise, {
        "model.layers.0.self_attn": "q_proj is a FakeQuantised, expected nn.Linear",
        "model.layers.1.self_attn": "q_proj is a FakeQuantised", "model.layers.2.self_attn": "shares its masks with",
        "model.layers.0.mlp": "down_proj is a FakeQuantised", "model.layers.1.mlp": "down_proj is a FakeQuantised"}),
    "quantised tensors": ({}, quantise_tensors, {
        f"model.layers.{i}.mlp": r"up_proj.weight is a FakeTensor, expected a Parameter" for i in range(2)}),
    "patched": ({}, patch_forwards, {
        "model.layers.0.self_attn": "forward is not that of transformers' LlamaAttention",
        "model.layers.1.self_attn": "shares its masks", "model.layers.2.self_attn": "shares its masks",
        "model.layers.1.mlp": "forward is not that of transformers' LlamaMLP"}),
    "derived": ({}, derive, {"model.layers.0.mlp": "overridden"}),
    "wide heads": ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 272}, lambda m: None, {
        f"model.layers.{i}.self_attn": "head dim of 272" for i in range(3)}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_cover_is_left_alone(name: str, device: str) -> None:
    options, change, left = LEFT[name]
    model = make(device=device, **options)
    change(model)
    model.to(device)
    ids, mask = padded("left", device)
    expected = model(ids, attention_mask=mask).logits
    before = classes(model)
    report = mhaffn.replace(model)
    assert set(report.left) == set(left)
    for module, reason in left.items():
        assert reason in report.left[module]
        assert type(model.get_submodule(module)) is before[module]
    assert report.replaced and all(type(model.get_submodule(name)) is not before[name] for name in report.replaced)
    attention_left = any(module.endswith("self_attn") for module in left)
    assert (model.config._attn_implementation == "mhaffn") is not attention_left
    assert next(iter(left)) in str(report)
    assert (model(ids, attention_mask=mask).logits - expected)[mask.bool()].abs().max() <= 1e-4
    mhaffn.restore(model)
    assert classes(model) == before


@torch.no_grad()
def test_dropout_set_later_is_refused(device: str) -> None:
    _, other = pair(device)
    other.model.layers[1].self_attn.attention_dropout = 0.5
    other(prompt(device=device))
    other.train()
    with pytest.raises(ConfigError, match=r"no dropout, got 0\.5"):
        other(prompt(device=device))


def lora(model: Any) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.weight = base.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * 1.5

    layer = model.model.layers[1]
    layer.mlp.gate_proj, layer.self_attn.k_proj = Adapter(layer.mlp.gate_proj), Adapter(layer.self_attn.k_proj)


def hook(model: Any) -> None:
    layer = model.model.layers[1]
    for part in (layer.mlp.up_proj, layer.self_attn.o_proj, layer.self_attn.v_proj):
        part.register_forward_hook(lambda module, args, output: output * 1.5)


def pre_hook(model: Any) -> None:
    for part in (model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.q_proj):
        part.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


def parametrized(model: Any) -> None:
    layer = model.model.layers[0]
    for part in (layer.mlp.gate_proj, layer.self_attn.q_proj, layer.input_layernorm):
        parametrize.register_parametrization(part, "weight", Scaled())


class Louder(Tensor):
    """A weight that products see otherwise than it is stored, as those of quantisation libraries."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(Tensor) * 1.5 if func is nn.functional.linear else out


def weight_subclass(model: Any) -> None:
    for part in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].self_attn.q_proj):
        part.weight = nn.Parameter(part.weight.detach().as_subclass(Louder), requires_grad=False)


def instance_forward(model: Any) -> None:
    for part in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].self_attn.o_proj):
        part.forward = lambda x, forward=part.forward: forward(x) * 1.5


def biased(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj.bias = nn.Parameter(torch.ones_like(layer.mlp.up_proj.weight[:, 0]), requires_grad=False)


def other_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def activation_hook(model: Any) -> None:
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: output * 1.5)


def norm_forward(model: Any) -> None:
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = lambda x, forward=norm.forward: forward(x) * 1.5


def bidirectional(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


CHANGES = [
    lora, hook, pre_hook, parametrized, weight_subclass, instance_forward, biased, other_activation, activation_hook,
    norm_forward, bidirectional,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", [activation_hook, bidirectional, biased, norm_forward], ids=lambda f: f.__name__)
def test_what_was_changed_before_counts(change: Callable[[Any], None], device: str) -> None:
    model, other = make(device=device), make(device=device)
    plain = model(ids := prompt(2, 9, device)).logits
    change(model)
    change(other)
    expected = model(ids).logits
    assert (expected - plain).abs().max() > 0.1
    mhaffn.replace(other)
    assert (other(ids).logits - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_hooks_of_all_modules_count(device: str) -> None:
    model, other = pair(device)
    ids = prompt(2, 9, device)
    plain = model(ids).logits

    def louder(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 1.5 if type(module) is nn.Linear or type(module).__name__.endswith("RMSNorm") else None

    handle = torch.nn.modules.module.register_module_forward_hook(louder)
    try:
        expected = model(ids).logits
        assert (expected - plain).abs().max() > 0.1
        assert (other(ids).logits - expected).abs().max() <= 1e-4
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_is_added_afterwards_counts(change: Callable[[Any], None], device: str) -> None:
    model, other = pair(device)
    ids = prompt(2, 9, device)
    plain = model(ids).logits
    change(model)
    change(other)
    expected = model(ids).logits
    assert (expected - plain).abs().max() > 0.1
    assert (other(ids).logits - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_norms_in_another_dtype_run_as_they_did(device: str) -> None:
    model = make(device=device).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    other = copy.deepcopy(model)
    mhaffn.replace(other)
    h = torch.randn(1, 3, 72, device=device, dtype=torch.bfloat16)
    norm = model.model.layers[0].input_layernorm
    assert torch.equal(other.model.layers[0].input_layernorm(h), norm(h))


@torch.no_grad()
def test_a_quantized_cache_is_refused(device: str) -> None:
    _, other = pair(device)
    cache = QuantizedCache.__new__(QuantizedCache)  # its constructor wants a quantisation library
    Cache.__init__(cache, layer_class_to_replicate=DynamicLayer)
    with pytest.raises(ConfigError, match=r"QuantizedCache, expected a dynamic, static or offloaded cache.*restore"):
        other(prompt(device=device), past_key_values=cache)
    layer, x = other.model.layers[0].self_attn, torch.randn(1, 2, 72, device=device)
    angles = other.model.rotary_emb(x, torch.arange(2, device=device)[None])
    with pytest.raises(ConfigError, match="does not take cache"):  # that of continuous batching
        layer(x, position_embeddings=angles, attention_mask=None, cache=object())


def test_models_it_does_not_know() -> None:
    for model in (
        nn.Linear(2, 2),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9)),
    ):
        before = classes(model)
        with pytest.raises(UnsupportedModelError, match=r"got a .*, which holds nothing .* expected a Llama.*Meta"):
            mhaffn.replace(model)
        assert classes(model) == before
        mhaffn.restore(model)
    with pytest.raises(ConfigError, match=r"got a str, expected a model; mhaffn.load\(path\)"):
        mhaffn.replace("a/folder")  # type: ignore[arg-type]
