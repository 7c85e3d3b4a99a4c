"""``attn_implementation="mhaffn"`` against sdpa, eager, and what a mask should let through."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import causal_mask_function

import mhaffn
from mhaffn.attention_interface import attention_function, mask_function
from mhaffn.errors import ConfigError
from tests.live_models import FAMILIES, make, padded, prompt, run_steps

pytestmark = pytest.mark.usefixtures("one_thread", "registered")


@pytest.fixture(scope="module")
def registered() -> None:
    mhaffn.register_attention()
    mhaffn.register_attention()


def pair(device: str, **options: Any) -> tuple[Any, Any]:
    """A model with sdpa, and the same with mhaffn."""
    model = make(device=device, **options)
    other = copy.deepcopy(model)
    other.set_attn_implementation("mhaffn")
    return model, other


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options that ``ops.attention`` is called with."""
    seen: list[Any] = []
    attention = mhaffn.ops.attention
    monkeypatch.setattr(mhaffn.ops, "attention", lambda *args, **given: seen.append(given) or attention(*args, **given))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches(side: str, cache: str | None, family: str, calls: list[Any], device: str) -> None:
    model, other = pair(device, family=family)
    ids, mask = padded(side, device)
    steps = [(0, 12)] if cache is None else [(0, 6), (6, 11), (11, 12)]
    expected, got = (run_steps(m, ids, mask, steps, cache, True) for m in (model, other))
    assert (got - expected)[mask.bool()].abs().max() <= 1e-4
    assert len(calls) == 3 * len(steps)


WINDOWS: dict[str, dict[str, Any]] = {
    "mistral, all layers": {"family": "Mistral", "sliding_window": 4},
    "qwen2, some layers": {
        "family": "Qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2,
    },
    "gemma2, every other layer": {"family": "Gemma2", "sliding_window": 4, "attn_logit_softcapping": None},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_kept(name: str, cache: str | None, device: str) -> None:
    model, other = pair(device, **WINDOWS[name])
    ids, mask = padded("left", device)
    caches = {"dynamic": lambda: DynamicCache(config=model.config), "static": lambda: StaticCache(model.config, 16)}
    pasts = [caches[cache]() if cache else None for _ in range(2)]
    for start, stop in ((0, 8), (8, 11), (11, 12)) if cache else ((0, 12),):
        options = {"attention_mask": mask[:, :stop], "use_cache": cache is not None}
        expected, got = (
            m(ids[:, start:stop], past_key_values=past, **options).logits
            for m, past in zip((model, other), pasts, strict=True)
        )
        assert (got - expected)[mask[:, start:stop].bool()].abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(options: dict[str, Any], family: str, device: str) -> None:
    model, other = pair(device, family=family)
    ids, mask = padded("left", device)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False} | options
    expected, got = (m.generate(ids, **options).tolist() for m in (model, other))
    assert got == expected


@torch.no_grad()
def test_encoders_and_cross_attention(device: str) -> None:
    """Masks that are not causal, from models it was not made for."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=211, **options)).to(device).eval()
    other = copy.deepcopy(bert)
    other.set_attn_implementation("mhaffn")
    ids, mask = padded("right", device)
    for given in (mask, None):
        expected, got = (m(ids, attention_mask=given).last_hidden_state for m in (bert, other))
        assert (got - expected)[mask.bool()].abs().max() <= 1e-4
    config = transformers.BartConfig(
        vocab_size=211, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    bart = transformers.BartModel(config).to(device).eval()
    other = copy.deepcopy(bart)
    other.set_attn_implementation("mhaffn")
    expected, got = (m(ids, attention_mask=mask, decoder_input_ids=ids[:, :5]).last_hidden_state for m in (bart, other))
    assert (got - expected).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_the_module_says_whether_it_is_causal(causal: bool, device: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, device=device)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    module = torch.nn.Module()
    module.is_causal = causal  # type: ignore[assignment]
    for options in ({}, {"is_causal": causal}):
        got, weights = attention_function(module, q, k, v, None, **options)
        assert (got - expected).abs().max() <= 1e-5 and weights is None


@torch.no_grad()
def test_a_model_with_another_causality(device: str) -> None:
    model, other = pair(device, is_causal=False)
    ids, mask = padded("left", device)
    expected, got = (m(ids, attention_mask=mask).logits for m in (model, other))
    assert (got - expected)[mask.bool()].abs().max() <= 1e-4


@torch.no_grad()
def test_attentions_are_those_of_eager(device: str) -> None:
    model, other = pair(device)
    model.set_attn_implementation("eager")
    ids, mask = padded("left", device)
    expected, got = (m(ids, attention_mask=mask, output_attentions=True) for m in (model, other))
    for ours, theirs in zip(got.attentions, expected.attentions, strict=True):
        assert (ours - theirs).transpose(1, 2)[mask.bool()].abs().max() <= 1e-5


def test_it_is_for_inference(device: str) -> None:
    _, other = pair(device, attention_dropout=0.5)
    with pytest.raises(RuntimeError, match="for inference"):
        other(prompt(device=device))
    other.train()
    with torch.no_grad(), pytest.raises(ConfigError, match=r"no dropout, got 0\.5"):
        other(prompt(device=device))
    q = torch.randn(1, 2, 3, 8, device=device)
    for name in ("softcap", "position_bias", "cache", "s_aux"):
        with pytest.raises(ConfigError, match=f"does not take {name}"):
            attention_function(other, q, q, q, None, **{name: 1.0})


# --- the masks themselves -------------------------------------------------------------------------------------------


def ask(t: int, s: int, offset: Any = 0, padding: Tensor | None = None, **options: Any) -> Tensor | None:
    batch = 2 if padding is None else padding.shape[0]
    return mask_function(batch, t, s, offset, 0, causal_mask_function, padding, **options)


def test_no_mask_where_causal_says_it_all() -> None:
    assert ask(5, 5) is None
    assert ask(1, 8, 7) is None and ask(3, 8, 5) is None
    ones = torch.ones(2, 8, dtype=torch.bool)
    assert ask(3, 8, 5, ones) is None and ask(8, 8, 0, ones) is None


def test_a_static_cache_hands_over_more_keys_than_there_are() -> None:
    for given in (None, torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)):
        mask = ask(5, 16, 0, given)
        assert mask is not None and mask.shape == (0, 5) and mask.dtype == torch.bool
        again = ask(5, 16, 0, mask)  # generate() makes masks ahead, and hands them in as attention_mask
        assert again is not None and again.shape == (0, 5)
    whole = ask(1, 16, torch.tensor(7), allow_is_causal_skip=False)
    assert whole is not None and whole.shape == (2, 1, 1, 16)
    assert whole[0, 0, 0].tolist() == [True] * 8 + [False] * 8
    chunk = ask(2, 4, torch.tensor(1))
    assert chunk is not None and chunk[1, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_padding_is_handed_on_and_the_rest_is_built() -> None:
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, :2] = False
    assert torch.equal(ask(6, 6, 0, padding), padding)
    assert torch.equal(ask(1, 6, 5, padding), padding)
    assert torch.equal(ask(4, 16, 0, padding), padding[:, :4])
    short = ask(6, 6, 0, padding[:, :5])  # missing entries hide, as in sdpa_mask
    assert short is not None and short[:, 5].tolist() == [False, False]
    assert ask(6, 6, 0, padding, allow_is_causal_skip=False).shape == (2, 1, 6, 6)
    later = mask_function(2, 3, 6, 0, 2, causal_mask_function, padding)  # keys from the third on
    assert later.shape == (2, 1, 3, 6) and later[0, 0, :, 0].tolist() == [False, False, True]
    assert mask_function(2, 6, 6, 0, 0, lambda b, h, q, k: k <= q).shape == (2, 1, 6, 6)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_static_cache_is_read_as_far_as_it_is_filled(batch: int, calls: list[Any], device: str) -> None:
    """``replace`` knows the cache: its attention says how many keys there are, beside the mask."""
    other = make(device=device)
    mhaffn.replace(other)
    calls.clear()
    cache = StaticCache(other.config, max_cache_len=32)
    ids = prompt(batch, 9, device)
    for part in ids.split([6, 2, 1], dim=1):
        other(part, past_key_values=cache)
    lens = [options.get("kv_lens") for options in calls]
    assert lens[:3] == [None] * 3
    assert [n.tolist() for n in lens[3:]] == [[8] * batch] * 3 + [[9] * batch] * 3
