"""Replaced models against the same models as transformers runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import mhaffn
from mhaffn import huggingface
from tests.live_models import CONFIGS, FAMILIES, make, padded, pair, prompt, run_steps

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the same numbers -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, device: str) -> None:
    model, other = pair(device, **CONFIGS[name])
    ids = prompt(2, 21, device)
    expected = model(ids).logits
    assert (other(ids).logits - expected).abs().max() <= 1e-4
    cache = DynamicCache()
    parts = [other(part, past_key_values=cache).logits for part in ids.split([13, 1, 7], dim=1)]
    if name != "dynamic" and name != "longrope":  # their angles depend on the length of a call
        assert (torch.cat(parts, 1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_of_a_plain_model_is_replaced(family: str) -> None:
    model = make(family)
    report = mhaffn.replace(model)
    kinds = list(report.replaced.values())
    norms = 7 if family != "Qwen3" else 13
    counts = [kinds.count(family + kind) for kind in ("DecoderLayer", "Attention", "MLP", "RMSNorm")]
    assert counts == [3, 3, 3, norms] and len(kinds) == 9 + norms and not report.left
    assert report.replaced["model.layers.1.mlp"] == f"{family}MLP"
    assert str(report).startswith(f"replaced {9 + norms} modules: ") and f"3 {family}Attention" in str(report)
    assert "mhaffn." + family in repr(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in FAMILIES), ("Llama", torch.float16)]
)
def test_half_precision_errs_at_most_twice_as_transformers(family: str, dtype: torch.dtype, device: str) -> None:
    model = make(family, device, hidden_size=144, intermediate_size=288, num_attention_heads=9, head_dim=16)
    model.to(dtype).to(torch.float32)  # weights that both hold exactly
    ids = prompt(2, 40, device)
    truth = model(ids).logits
    theirs = copy.deepcopy(model).to(dtype)
    ours = copy.deepcopy(theirs)
    assert not mhaffn.replace(ours).left
    for parts in ((40,), (33, 7), (39, 1)):
        errors = []
        for m in (ours, theirs):
            cache = DynamicCache()
            logits = torch.cat([m(part, past_key_values=cache).logits for part in ids.split(parts, dim=1)], 1)
            errors.append((logits - truth).norm())
        assert errors[0] <= 2 * errors[1]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize(
    ("family", "positions"), [("Llama", True), ("Llama", False), *((family, True) for family in FAMILIES[1:])]
)
def test_padded_batches(side: str, cache: str | None, family: str, positions: bool, device: str) -> None:
    model, other = pair(device, family=family)
    ids, mask = padded(side, device)
    steps = [(0, 12)] if cache is None else [(0, 6), (6, 11), (11, 12)]
    expected, got = (run_steps(m, ids, mask, steps, cache, positions) for m in (model, other))
    assert (got - expected)[mask.bool()].abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bool", "additive", "biases", "broadcast"])
def test_masks_of_four_dimensions(kind: str, device: str) -> None:
    model, other = pair(device)
    ids = prompt(2, 12, device)
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool, device=device).tril()
    mask[:, :, 4:, 1] = False  # a token that later ones may not see
    mask[1, :, :, :3] = True  # a prefix that sees itself whole
    if kind in ("additive", "biases"):
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    if kind == "biases":
        mask = mask + 0.1 * torch.arange(12, device=device)
    if kind == "broadcast":  # every query sees the same keys, later ones too
        mask = mask[:, :, -1:]
    expected = model(ids, attention_mask=mask).logits
    assert (other(ids, attention_mask=mask).logits - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(device: str) -> None:
    model, other = pair(device)
    ids = prompt(1, 12, device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]], device=device)
    expected = model(ids, position_ids=positions, use_cache=False).logits
    assert (other(ids, position_ids=positions, use_cache=False).logits - expected).abs().max() <= 1e-4
    assert (expected - model(ids, use_cache=False).logits).abs().max() > 0.1


@torch.no_grad()
def test_inputs_embeds_hidden_states_and_logits_to_keep(device: str) -> None:
    model, other = pair(device)
    ids = prompt(2, 9, device)
    expected = model(ids, output_hidden_states=True)
    got = other(inputs_embeds=other.get_input_embeddings()(ids), output_hidden_states=True)
    assert len(got.hidden_states) == 4
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
    assert (other(ids, logits_to_keep=1).logits - expected.logits[:, -1:]).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_attentions_are_those_of_eager(cache: str | None, device: str) -> None:
    model, other = pair(device)
    model.set_attn_implementation("eager")
    ids, mask = padded("left", device)
    caches = {"dynamic": lambda m: DynamicCache(), "static": lambda m: StaticCache(m.config, 16), None: lambda m: None}
    pasts = [caches[cache](m) for m in (model, other)]
    for start, stop in ((0, 8), (8, 11), (11, 12)) if cache else ((0, 12),):
        expected, got = (
            m(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=past is not None,
              output_attentions=True)
            for m, past in zip((model, other), pasts, strict=True)
        )  # fmt: skip
        real = mask[:, start:stop].bool()
        assert (got.logits - expected.logits)[real].abs().max() <= 1e-4
        assert len(got.attentions) == 3
        for ours, theirs in zip(got.attentions, expected.attentions, strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).transpose(1, 2)[real].abs().max() <= 1e-5


GENERATE: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "cache_implementation": "static"},
    {"do_sample": False, "use_cache": False},
    {"do_sample": False, "prompt_lookup_num_tokens": 3},
    {"do_sample": True, "temperature": 0.8, "top_k": 20},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [("Llama", options) for options in GENERATE] + [(name, GENERATE[i]) for name in FAMILIES[1:] for i in (0, 2)],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_generate_gives_the_same_tokens(family: str, options: dict[str, Any], device: str) -> None:
    model, other = pair(device, family=family)
    ids, mask = padded("left", device)
    if "prompt_lookup_num_tokens" in options:
        ids, mask = ids[1:2], mask[1:2]
    tokens = []
    for m in (model, other):
        torch.manual_seed(3)
        tokens.append(m.generate(ids, attention_mask=mask, max_new_tokens=8, **options).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.gpu
def test_generate_with_an_offloaded_cache() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    model, other = pair("cuda")
    ids = prompt(2, 9, "cuda")
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options).tolist()
    other.model.embed_tokens.register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000))  # so that it lags
    for _ in range(3):
        assert other.generate(ids, cache_implementation="offloaded", **options).tolist() == expected


@torch.no_grad()
def test_autocast_is_left_to_transformers(device: str) -> None:
    model, other = pair(device, family="Qwen3")
    ids, mask = padded("left", device)
    x = torch.randn(2, 3, 72, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        for use_cache in (True, False):
            expected, got = (m(ids, attention_mask=mask, use_cache=use_cache).logits.float() for m in (model, other))
            with torch.autocast(device, enabled=False):
                truth = model(ids, attention_mask=mask).logits
            assert (got - truth)[mask.bool()].norm() <= 2 * (expected - truth)[mask.bool()].norm()
        for name in ("mlp", "input_layernorm"):
            ours, theirs = (getattr(m.model.layers[0], name)(x) for m in (other, model))
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)  # cuBLAS may choose by where weights lie


@torch.no_grad()
def test_a_scale_set_by_hand_counts(device: str) -> None:
    model, other = pair(device)
    for m in (model, other):
        m.model.layers[1].self_attn.scaling = 0.1
    ids = prompt(2, 9, device)
    assert (other(ids).logits - model(ids).logits).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend: str, device: str) -> None:
    model, other = pair(device, num_hidden_layers=2)
    ids, mask = padded("left", device)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    expected = model(ids, attention_mask=mask).logits
    assert (compiled(ids, attention_mask=mask).logits - expected)[mask.bool()].abs().max() <= 1e-4
    caches = [StaticCache(model.config, max_cache_len=20) for _ in range(2)]
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        expected = model(ids[:, start:stop], past_key_values=caches[0]).logits
        run = compiled if start else other  # a cache is made in the first call: transformers never compiles that one
        assert (run(ids[:, start:stop], past_key_values=caches[1]).logits - expected).abs().max() <= 1e-4


# --- nothing built, nothing waited for ------------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The masks that ``ops.attention`` is given."""
    seen: list[Any] = []
    attention = mhaffn.ops.attention

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(options.get("mask"))
        return attention(*args, **options)

    monkeypatch.setattr("mhaffn.attention_interface.ops.attention", spy)
    yield seen


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_causal_batch_has_no_mask(family: str, masks: list[Any], device: str) -> None:
    _, other = pair(device, family=family)
    ids = prompt(2, 20, device)
    masks.clear()
    cache = DynamicCache()
    for part in ids.split([10, 6, 1, 1, 2], dim=1):  # a prompt, a chunk, decoded tokens
        other(part, past_key_values=cache)
    other(ids, use_cache=False)
    other(ids, attention_mask=torch.ones_like(ids))
    other(ids, past_key_values=StaticCache(other.config, max_cache_len=30))
    other.generate(ids, max_new_tokens=4, do_sample=False)
    assert len(masks) >= 3 * 12 and masks == [None] * len(masks)


@pytest.mark.gpu
@torch.no_grad()
def test_a_plain_causal_batch_waits_for_nothing() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    _, other = pair("cuda")
    ids = prompt(2, 20, "cuda")
    other(ids)  # kernels are compiled
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache = DynamicCache()
        for part in ids.split([10, 6, 1, 1, 2], dim=1):
            other(part, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@torch.no_grad()
def test_angles_refilled_in_place_count(device: str) -> None:
    _, other = pair(device)
    other.to(torch.bfloat16)
    attention, x = other.model.layers[0].self_attn, torch.randn(1, 4, 72, device=device, dtype=torch.bfloat16)
    places = torch.arange(4, device=device)[None]
    cos, sin = other.model.rotary_emb(x, 2 * places)
    first, _ = attention(x, position_embeddings=(cos, sin), attention_mask=None)
    for kept, new in zip((cos, sin), other.model.rotary_emb(x, places), strict=True):
        kept.copy_(new)
    second, _ = attention(x, position_embeddings=(cos, sin), attention_mask=None)
    fresh, _ = attention(x, position_embeddings=(cos.clone(), sin.clone()), attention_mask=None)
    assert torch.equal(second, fresh) and not torch.equal(first, fresh)


@torch.no_grad()
def test_every_part_runs_fused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    _, other = pair(device, family="Qwen3")
    calls = dict.fromkeys(("rms_norm", "add_rms_norm", "rope", "attention", "ffn"), 0)

    def count(name: str, function: Any) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        return counting

    for name in calls:
        monkeypatch.setattr(mhaffn.ops, name, count(name, getattr(mhaffn.ops, name)))
    other(prompt(1, 5, device))
    assert calls == {"rms_norm": 3 * 3 + 1, "add_rms_norm": 3, "rope": 3, "attention": 3, "ffn": 3}


@torch.no_grad()
def test_angles_are_made_once_a_pass(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    _, other = pair(device)
    made = []
    halves = huggingface.halves
    monkeypatch.setattr(huggingface, "halves", lambda *angles: made.append(1) or halves(*angles))
    other(prompt(1, 5, device))
    other(prompt(1, 5, device))
    assert len(made) == 2
