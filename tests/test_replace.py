"""Replaced models against the same models as transformers runs them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama import modeling_llama

import mhaffn
from mhaffn import huggingface
from mhaffn.errors import ConfigError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa 9/3": {},
    "gqa 15/3": {"hidden_size": 120, "num_attention_heads": 15},
    "mha 8/8": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
    "mqa 16/1": {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 1},
    "wide heads": WIDE,
    "heads of 96": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 96},
    "tied": {"tie_word_embeddings": True},
    "attention biases": {"attention_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0],
        }
    },
    "mistral": {"family": "Mistral", "sliding_window": None},
    "mistral, wide heads": {"family": "Mistral", "sliding_window": None, **WIDE},
    "qwen2": {"family": "Qwen2"},
    "qwen3": {"family": "Qwen3", **WIDE},
    "qwen3, biases": {"family": "Qwen3", "attention_bias": True, **WIDE},
}  # fmt: skip
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def make(family: str = "Llama", device: str = "cpu", kind: str = "ForCausalLM", **changes: Any) -> Any:
    """A small random model in float32."""
    options = {
        "hidden_size": 72, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 211, "max_position_embeddings": 256, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
    } | changes  # fmt: skip
    if family == "Mistral":
        options.setdefault("sliding_window", None)
    torch.manual_seed(0)
    model = getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**options))
    for name, parameter in model.named_parameters():  # biases of nought and norms of one would hide much
        nn.init.normal_(parameter, *((1.0, 0.3) if "norm" in name else (0.0, 0.15)))
    return model.to(device).eval()


def pair(device: str, **options: Any) -> tuple[Any, Any]:
    """A model, and the same replaced."""
    model = make(device=device, **options)
    other = copy.deepcopy(model)
    mhaffn.replace(other)
    return model, other


def prompt(batch: int = 1, length: int = 21, device: str = "cpu") -> Tensor:
    return torch.randint(3, 211, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def padded(side: str, device: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of three prompts of different lengths."""
    ids = prompt(3, 12, device)
    mask = torch.ones_like(ids)
    for row, missing in ((0, 5), (2, 9)):
        mask[row, slice(0, missing) if side == "left" else slice(12 - missing, 12)] = 0
    return ids, mask


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models this small, several threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def run_steps(
    model: Any, ids: Tensor, mask: Tensor, steps: list[tuple[int, int]], cache: str | None, positions: bool
) -> Tensor:
    places = (mask.cumsum(1) - 1).clamp(min=0)
    past = {"dynamic": DynamicCache(), "static": StaticCache(model.config, max_cache_len=20), None: None}[cache]
    logits = []
    for start, stop in steps:
        options: dict[str, Any] = {"position_ids": places[:, start:stop]} if positions else {}
        options |= {"attention_mask": mask[:, :stop], "use_cache": past is not None}
        logits.append(model(ids[:, start:stop], past_key_values=past, **options).logits)
    return torch.cat(logits, 1)


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


# --- what is left alone ---------------------------------------------------------------------------------------------


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


def widen(model: Any) -> None:
    model.model.layers[0].input_layernorm.double()
    model.model.layers[0].mlp.double()


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
