"""Existing models made without weights, streaming from a store: ``mhaffn.replace(model, store=…)``."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, QuantizedCache, StaticCache

import mhaffn
from mhaffn.config import order
from mhaffn.errors import ConfigError, StreamError, UnsupportedModelError
from mhaffn.store.pack import pack
from tests.conftest import Model

IDS = torch.tensor([[5, 17, 101, 42, 9, 3, 77]])
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa 9/3": {},
    "tied": {"tie_word_embeddings": True},
    "mqa 16/1": {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 1},
    "head_dim of its own": {"head_dim": 16},
    "mistral": {"kind": "mistral", "head_dim": 8},
    **{name: {"rope_parameters": rope} for name, rope in ROPES.items()},
}


def empty(folder: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()


def resident(folder: Path, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).to(device).eval()


def pair(folder: Path, device: str, **options: Any) -> tuple[Any, Any]:
    model = empty(folder)
    mhaffn.replace(model, store=folder, device=device, **{"gpu": None, "dram": None, **options})
    return resident(folder, device), model


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_equal_transformers(name: str, tiny_model: Model, device: str) -> None:
    theirs, ours = pair(tiny_model(**CONFIGS[name]), device)
    ids = IDS.to(device)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_half_precision_errs_at_most_twice_as_transformers(dtype: str, tiny_model: Model, device: str) -> None:
    theirs, ours = pair(tiny_model(dtype=dtype, hidden_size=144), device)
    assert ours.dtype == theirs.dtype == getattr(torch, dtype)
    ids = torch.randint(3, 211, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    got, expected = ours(ids).logits, theirs(ids).logits
    truth = theirs.float()(ids).logits
    assert (got - truth).norm() <= 2 * (expected - truth).norm()


@pytest.mark.parametrize("tiers", ["ssd", "dram", "mixed", "gpu"])
@torch.inference_mode()
def test_wherever_sublayers_lie(tiers: str, tiny_model: Model, device: str) -> None:
    if tiers == "gpu" and device == "cpu":
        tiers = "dram"
    folder = tiny_model()
    cycle = ("ssd", "dram") if tiers == "mixed" else (tiers,)
    placed = {s: cycle[i % len(cycle)] for i, s in enumerate(order(3))}
    theirs, ours = pair(folder, device, tiers=placed)
    ids = IDS.to(device)
    for _ in range(3):  # the stream goes on from pass to pass
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@torch.inference_mode()
def test_padded_batches(side: str, cache: str | None, tiny_model: Model, device: str) -> None:
    theirs, ours = pair(tiny_model(), device, batch=2)
    ids = torch.randint(3, 211, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    found = []
    for model in (theirs, ours):
        kept: Any = DynamicCache() if cache == "dynamic" else None
        if cache == "static":
            kept = StaticCache(model.config, max_cache_len=16)
        parts = ((0, 8), (8, 11), (11, 12)) if cache else ((0, 12),)
        logits = [
            model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=kept, use_cache=cache is not None).logits
            for a, b in parts
        ]
        found.append(torch.cat(logits, 1)[mask.bool()])
    assert (found[1] - found[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["bool", "additive"])
@torch.inference_mode()
def test_masks_of_four_dimensions(kind: str, tiny_model: Model, device: str) -> None:
    theirs, ours = pair(tiny_model(), device)
    ids = IDS.to(device)
    mask = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(0)).to(device) < 0.6
    mask |= torch.eye(7, dtype=torch.bool, device=device)
    given = mask if kind == "bool" else torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo().min)
    got, expected = (m(ids, attention_mask=given, use_cache=False).logits for m in (ours, theirs))
    assert (got - expected).abs().max() <= 1e-4
    with pytest.raises(ConfigError, match="biases"):
        ours(ids, attention_mask=torch.rand(1, 1, 7, 7, device=device), use_cache=False)


@torch.inference_mode()
def test_embeddings_hidden_states_positions_and_fewer_logits(tiny_model: Model, device: str) -> None:
    theirs, ours = pair(tiny_model(), device)
    ids = IDS.to(device)
    options: list[dict[str, Any]] = [
        {"inputs_embeds": theirs.model.embed_tokens(ids)},
        {"input_ids": ids, "logits_to_keep": 2},
        {"input_ids": ids, "position_ids": torch.arange(3, 10, device=device)[None]},
    ]
    for given in options:
        assert (ours(**given).logits - theirs(**given).logits).abs().max() <= 1e-4
    got, expected = (m(ids, output_hidden_states=True).hidden_states for m in (ours, theirs))
    assert len(got) == len(expected) == 4
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4


@pytest.mark.parametrize("use_cache", [True, False])
@torch.inference_mode()
def test_a_long_prompt_takes_several_steps(
    use_cache: bool, tiny_model: Model, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = pair(tiny_model(), device)
    for module in ("modules", "streamed_huggingface"):
        monkeypatch.setattr(f"mhaffn.{module}.CHUNK_TOKENS", 3)
    ids = IDS.to(device)
    output = ours(ids, use_cache=use_cache)
    assert (output.logits - theirs(ids).logits).abs().max() <= 1e-4
    assert (output.past_key_values is not None) == use_cache
    kinds = [list(map(type, m.model(ids, use_cache=use_cache, return_dict=False))) for m in (ours, theirs)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3},
     {"prefill_chunk_size": 4}, {"use_cache": False},
     pytest.param({"cache_implementation": "offloaded"}, marks=pytest.mark.gpu)],
    ids=str,
)  # fmt: skip
def test_generate_gives_the_tokens_of_transformers(options: dict[str, Any], tiny_model: Model, device: str) -> None:
    if device == "cpu" and options.get("cache_implementation") == "offloaded":
        pytest.skip("caches are offloaded from a GPU")
    theirs, ours = pair(tiny_model(), device, batch=3)
    ids = IDS.to(device)
    found = []
    plain = {} if "offloaded" in options.values() else options  # its transfers overtake each other in transformers 5.17
    for model, given in ((theirs, plain), (ours, options)):
        torch.manual_seed(3)
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **given))
    assert torch.equal(*found)
    assert not ours._valid_auto_compile_criteria({}, ours.generation_config)


@pytest.mark.parametrize("format", ["int8", "int4:32"])
@torch.inference_mode()
def test_weights_in_few_bits(format: str, tiny_model: Model, tmp_path: Path, device: str) -> None:
    from mhaffn.formats import Formats

    source = tiny_model(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    pack(source, tmp_path / "store", formats=Formats.parse(format, format))
    model = empty(source)
    mhaffn.replace(model, store=tmp_path / "store", device=device, gpu=None, dram=None)
    with mhaffn.load(tmp_path / "store", device=device, gpu=None, dram=None) as loaded:
        ids = IDS.to(device)
        difference = (model(ids).logits - loaded(ids).logits).abs().max()
        assert difference <= (0 if device == "cpu" else 1e-4)  # the last norm is transformers' here


def test_the_report_and_restore(tiny_model: Model, device: str) -> None:
    folder = tiny_model()
    model = empty(folder)
    names = list(model.state_dict())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    report = mhaffn.replace(model, store=folder, device=device, gpu=None, dram=None)
    assert str(report).splitlines()[0] == "replaced 3 modules: 3 LlamaDecoderLayer"
    assert str(folder) in str(report) and "6 on SSD" in str(report)
    assert list(model.state_dict()) == names and not report.left
    assert model.dtype == torch.float32 and model.device.type == device
    assert report.runner is not None
    with torch.inference_mode():
        model(IDS.to(device))
    assert [p.phase for p in report.runner.trace.passes] == ["prefill"]
    mhaffn.restore(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert model.config._attn_implementation == "sdpa" and model.model.rotary_emb.inv_freq.is_meta
    with pytest.raises(StreamError, match="closed"):
        report.runner.embed(IDS.to(device))
    mhaffn.replace(model, store=folder, device=device, gpu=None, dram=None)  # and again
    with torch.inference_mode():
        assert model(IDS.to(device)).logits.isfinite().all()


def test_the_stream_ends_with_the_model(tiny_model: Model, device: str) -> None:
    model = empty(tiny_model())
    runner = mhaffn.replace(model, store=tiny_model(), device=device, gpu=None, dram=None).runner
    assert runner is not None
    there = weakref.ref(model.model)
    del model
    gc.collect()
    assert there() is None
    with pytest.raises(StreamError, match="closed"):
        runner.sweep()


def test_a_model_within_a_model(tiny_model: Model, device: str) -> None:
    folder = tiny_model()

    class Judge(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = LlamaForCausalLM(AutoConfig.from_pretrained(folder))

        def forward(self, ids: Tensor) -> Tensor:
            return self.llama(ids).logits[:, -1].log_softmax(-1)  # type: ignore[no-any-return]

    with torch.device("meta"):
        judge = Judge()
    report = mhaffn.replace(judge, store=folder, device=device)
    assert list(report.replaced) == [f"llama.model.layers.{n}" for n in range(3)]
    with torch.inference_mode():
        expected = resident(folder, device)(IDS.to(device)).logits[:, -1].log_softmax(-1)
        assert (judge(IDS.to(device)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiled_it_gives_the_same(backend: str, tiny_model: Model, device: str) -> None:
    theirs, ours = pair(tiny_model(), device)
    compiled = torch.compile(ours, backend=backend)
    for _ in range(2):
        assert (compiled(IDS.to(device)).logits - theirs(IDS.to(device)).logits).abs().max() <= 1e-4


def test_it_is_for_inference_and_cannot_be_copied(tiny_model: Model, tmp_path: Path, device: str) -> None:
    _, ours = pair(tiny_model(), device)
    with pytest.raises(RuntimeError, match="no backward"):
        ours(IDS.to(device))
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="cannot be copied"):
            act(ours.model)
    with pytest.raises(ConfigError, match="no weights to save"):
        ours.save_pretrained(tmp_path)
    with torch.no_grad():
        with pytest.raises(ConfigError, match="output_attentions"):
            ours(IDS.to(device), output_attentions=True)
        quantized = QuantizedCache.__new__(QuantizedCache)
        with pytest.raises(ConfigError, match="QuantizedCache"):
            ours(IDS.to(device), past_key_values=quantized)
        with pytest.raises(ConfigError, match="context"):
            ours(torch.full((1, 257), 5, device=device))


@torch.no_grad()
def test_what_transformers_hooks_to_record_is_no_hook_against_it(tiny_model: Model, device: str) -> None:
    theirs, ours = pair(tiny_model(), device)
    expected = theirs(IDS.to(device), output_hidden_states=True).hidden_states[1]
    ours(IDS.to(device), output_hidden_states=True)
    assert ours.model.layers[0].self_attn._forward_hooks, "transformers puts its hooks there"
    mhaffn.restore(ours)
    mhaffn.replace(ours, store=tiny_model(), device=device, gpu=None, dram=None)
    assert (ours(IDS.to(device), output_hidden_states=True).hidden_states[1] - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_it_stays_in_its_dtype_and_on_its_device(tiny_model: Model, device: str) -> None:
    _, ours = pair(tiny_model(), device)
    expected = ours(IDS.to(device)).logits
    for move in (ours.half, partial(ours.to, "meta")):
        with pytest.raises(ConfigError, match=r"a move to .* of a streamed model"):
            move()
    assert ours.to(device).to(ours.dtype) is ours
    assert torch.equal(ours(IDS.to(device)).logits, expected)


def test_what_it_refuses(tiny_model: Model, device: str) -> None:
    folder, other = tiny_model(), tiny_model(intermediate_size=96)
    rope = tiny_model(rope_parameters=ROPES["llama3"])

    def nothing_changed(model: Any, message: str, kind: type[Exception] = ConfigError, **options: Any) -> None:
        before = {name: (type(m), dict(m._parameters)) for name, m in model.named_modules()}
        with pytest.raises(kind, match=message):
            mhaffn.replace(model, device=device, **{"store": folder, **options})
        assert {name: (type(m), dict(m._parameters)) for name, m in model.named_modules()} == before

    nothing_changed(resident(folder, "cpu"), "without weights")
    nothing_changed(empty(other), "intermediate_size of 96, not 112")
    nothing_changed(empty(rope), "rope_parameters")
    nothing_changed(empty(folder), "1.00 KiB is too small", mhaffn.errors.BudgetError, gpu=None, dram="1KiB")
    nothing_changed(empty(folder), "batch", batch=0)
    nothing_changed(empty(folder), "without store", store=None)
    nothing_changed(torch.nn.Linear(2, 2), "expected a Llama", UnsupportedModelError)
    patched = empty(folder)
    patched.model.layers[1].forward = lambda *args, **kwargs: args[0]
    nothing_changed(patched, "forward of its own", UnsupportedModelError)
    hooked = empty(folder)
    hooked.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: output)
    nothing_changed(hooked, "hooks in them", UnsupportedModelError)
    streamed = empty(folder)
    mhaffn.replace(streamed, store=folder, device=device)
    handle = streamed.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ConfigError, match="LlamaMLP inside a streamed layer"), torch.no_grad():
        streamed(IDS.to(device))
    handle.remove()
    with pytest.raises(UnsupportedModelError):
        mhaffn.replace(streamed, store=folder, device=device)
    mhaffn.restore(streamed)


def test_it_refuses_where_its_check_fails(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from mhaffn import huggingface, streamed_huggingface

    huggingface.try_on_tiny.cache_clear()
    make = streamed_huggingface._context
    monkeypatch.setattr(streamed_huggingface, "_context", lambda sin, *rest: make(-sin, *rest))
    model = empty(tiny_model())
    with pytest.raises(UnsupportedModelError, match="logits that differ"):
        mhaffn.replace(model, store=tiny_model(), device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    huggingface.try_on_tiny.cache_clear()
