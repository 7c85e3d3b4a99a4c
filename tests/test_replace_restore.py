"""The model around what was replaced: it is named, hooked, moved, saved and restored as before."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, StaticCache
from transformers.models.llama import modeling_llama

import mhaffn
from mhaffn import huggingface
from mhaffn.errors import UnsupportedModelError
from tests.live_models import CONFIGS, WIDE, classes, make, pair, prompt

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the model around it --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parameters_names_and_hooks_stay(device: str) -> None:
    model = make(device=device)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    before = classes(model)
    heard: list[str] = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: heard.append(name))
    model(prompt(device=device))
    expected, heard[:] = sorted(heard), []
    mhaffn.replace(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert list(model.state_dict()) == list(make().state_dict())
    model(prompt(device=device))
    assert sorted(heard) == expected
    mhaffn.restore(model)
    assert dict(model.named_modules()) == modules and classes(model) == before


@torch.no_grad()
def test_restore_undoes_it_exactly(device: str) -> None:
    model = make(device=device)
    before = classes(model), {n: set(m.__dict__) for n, m in model.named_modules()}, model.config.to_dict()
    ids = prompt(device=device)
    expected = model(ids).logits
    for _ in range(2):
        mhaffn.replace(model)
        mhaffn.replace(model)  # once more changes nothing
        assert model.config._attn_implementation == "mhaffn"
        mhaffn.restore(model)
        assert model.config._attn_implementation == "sdpa"
        after = classes(model), {n: set(m.__dict__) for n, m in model.named_modules()}, model.config.to_dict()
        assert after == before
        assert torch.equal(model(ids).logits, expected)
    mhaffn.restore(model)


def test_the_attention_implementation_comes_back_unless_it_was_set_since() -> None:
    model = make(attn_implementation="eager")
    mhaffn.replace(model)
    mhaffn.restore(model)
    assert model.config._attn_implementation == "eager"
    mhaffn.replace(model)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            expected, got = (
                m(prompt(), past_key_values=StaticCache(m.config, max_cache_len=30)).logits for m in (make(), model)
            )
            assert (got - expected).abs().max() <= 1e-4
    model.set_attn_implementation("sdpa")
    mhaffn.restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_other_models_do_not_notice() -> None:
    def upstream() -> tuple[Any, Any]:
        names = dict(vars(modeling_llama))
        return names, {name: cls.forward for name, cls in names.items() if hasattr(cls, "forward")}

    before = upstream()
    bystander = make()
    known = classes(bystander)
    mhaffn.replace(make())
    assert upstream() == before and classes(bystander) == known == classes(make())
    assert bystander.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_moved_after_replacement(device: str) -> None:
    model, other = pair("cpu", family="Qwen3")
    ids = prompt(2, 9)
    other(ids)
    model, other = model.to(device), other.to(device)
    ids = ids.to(device)
    assert (other(ids).logits - model(ids).logits).abs().max() <= 1e-4
    truth = model(ids).logits
    model, other = model.to(torch.bfloat16), other.to(torch.bfloat16)
    got = other(ids).logits
    assert got.dtype == torch.bfloat16
    assert (got - truth).norm() <= 2 * (model(ids).logits - truth).norm()
    assert other.model.layers[0].mlp.gate_proj.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_saved_loaded_copied_and_pickled(tmp_path: Path, device: str) -> None:
    model, other = pair(device, family="Qwen3")
    ids = prompt(2, 9, device)
    expected = model(ids).logits
    other.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(device).eval()
    assert classes(again) == classes(model) and again.config._attn_implementation == "sdpa"
    assert torch.equal(again(ids).logits, expected)
    fresh = make("Qwen3", device)
    mhaffn.replace(fresh)
    fresh.load_state_dict(other.state_dict())
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (fresh, copy.deepcopy(other), loaded):
        assert classes(twin) == classes(other)
        assert (twin(ids).logits - expected).abs().max() <= 1e-4
    copied = copy.deepcopy(other)
    mhaffn.restore(copied)
    assert classes(copied) == classes(model) and classes(other) != classes(model)


def test_subclasses_and_models_within_models() -> None:
    class Mine(LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args, **options)

    class Holder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    plain = make()
    mine = Mine(plain.config).eval()
    mine.load_state_dict(plain.state_dict())
    ids = prompt()
    with torch.no_grad():
        for model, run in (
            (mine, lambda: mine(ids).logits),
            (Holder(plain.model), lambda: plain.model(ids).last_hidden_state),
            (other := make(kind="ForSequenceClassification"), lambda: other(ids).logits),
        ):
            expected = run()
            assert len(mhaffn.replace(model).replaced) == 16
            assert (run() - expected).abs().max() <= 1e-4


# --- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_are_refused_and_come_back(device: str) -> None:
    model = make(device=device)
    ids = prompt(device=device)
    mhaffn.replace(model)
    with pytest.raises(RuntimeError, match=r"LlamaRMSNorm runs on mhaffn, which is for inference.*mhaffn.restore"):
        model(ids)
    layer = model.model.layers[0]
    for module in (layer.mlp, layer.input_layernorm):
        with pytest.raises(RuntimeError, match="for inference"):
            module(torch.randn(1, 2, 72, device=device))
    with pytest.raises(RuntimeError, match="LlamaAttention runs on mhaffn"):
        layer.self_attn(torch.randn(1, 2, 72, device=device), position_embeddings=None)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(ids)
    model.requires_grad_(False)
    model(ids)
    with pytest.raises(RuntimeError, match="LlamaRMSNorm runs on mhaffn"):
        model(inputs_embeds=torch.randn(1, 3, 72, device=device, requires_grad=True))
    model.requires_grad_(True)
    mhaffn.restore(model)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


# --- the check at first use -----------------------------------------------------------------------------------------


@pytest.fixture
def unchecked() -> Iterator[None]:
    huggingface.try_on_tiny.cache_clear()
    yield
    huggingface.try_on_tiny.cache_clear()


@pytest.mark.parametrize("slip", ["padding", "scale", "raises"])
def test_it_refuses_where_its_check_fails(slip: str, unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = huggingface.attend

    def slipping(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        if slip == "raises":
            raise TypeError("another signature")
        if slip == "padding":
            return attend(q, k, v, None if q.shape[1] > 1 else mask, **options)
        return attend(q, k, v, mask, **options | {"scale": 0.9 * options["scale"]})

    monkeypatch.setattr(huggingface, "attend", slipping)
    model = make()
    before = classes(model)
    got = "TypeError: another signature" if slip == "raises" else "logits that differ by"
    with pytest.raises(UnsupportedModelError, match=rf"tiny Llama model and got {got}.*nothing was replaced"):
        mhaffn.replace(model)
    assert classes(model) == before and model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    mhaffn.replace(model)


def test_its_check_runs_once_and_leaves_no_trace(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    logits = huggingface._logits
    monkeypatch.setattr(huggingface, "_logits", lambda model: runs.append(1) or logits(model))
    state = torch.get_rng_state()
    models = [make(), make(), make("Qwen3")]
    torch.set_rng_state(state)
    for model in models:
        mhaffn.replace(model)
    assert len(runs) == 4  # two a kind
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_its_check_shares_what_matters_with_the_model() -> None:
    config = make("Qwen3", attention_bias=True, **CONFIGS["yarn"], **WIDE).config
    tiny = huggingface.tiny_options(config)
    assert tiny["attention_bias"] is True and tiny["rope_parameters"]["rope_type"] == "yarn"
    assert tiny["head_dim"] == 32 and tiny["num_attention_heads"] == 2 * tiny["num_key_value_heads"]
