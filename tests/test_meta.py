"""Meta's reference code, replaced, against itself."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

import mhaffn
from mhaffn.errors import ConfigError, UnsupportedModelError
from tests.live_models import classes

if "CI" not in os.environ:  # there it is installed
    pytest.importorskip("llama_models", reason="pip install llama-models==0.3.0 fairscale==0.4.13")

from fairscale.nn.model_parallel import initialize
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from llama_models.llama3 import model as llama3
from llama_models.llama3.args import ModelArgs

from mhaffn import meta, streamed_meta

pytestmark = pytest.mark.usefixtures("one_thread", "parallel")

CONFIGS: dict[str, dict[str, Any]] = {
    "gqa 9/3": {},
    "mha 8/8": {"dim": 64, "n_heads": 8, "n_kv_heads": None},
    "mqa 16/1": {"dim": 128, "n_heads": 16, "n_kv_heads": 1},
    "scaled rope": {"use_scaled_rope": True},
    "heads of 96": {"dim": 288, "n_heads": 3, "n_kv_heads": 1},
}


@pytest.fixture(scope="module")
def parallel() -> Iterator[None]:
    """Model parallelism over one rank, which Meta's layers want."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    initialize.initialize_model_parallel(1)
    yield
    initialize.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def make(device: str = "cpu", cls: type = llama3.Transformer, **changes: Any) -> Any:
    options = {
        "dim": 72, "n_layers": 3, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 211, "multiple_of": 16,
        "max_batch_size": 3, "max_seq_len": 64,
    } | changes  # fmt: skip
    torch.manual_seed(0)
    model = cls(ModelArgs(**options))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, *((1.0, 0.3) if "norm" in name else (0.0, 0.15)))
    return model.to(device)


def pair(device: str, **options: Any) -> tuple[Any, Any]:
    model = make(device, **options)
    other = copy.deepcopy(model)
    assert not mhaffn.replace(other).left
    return model, other


def prompt(batch: int, length: int, device: str) -> Tensor:
    return torch.randint(3, 211, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def compare(model: Any, other: Any, device: str) -> None:
    """A prompt and 32 decoded tokens of two sequences."""
    ids = prompt(2, 10, device)
    start = 0
    for _ in range(33):
        expected, got = model(ids, start), other(ids, start)
        assert (got - expected).abs().max() <= 1e-4
        start += ids.shape[1]
        ids = expected[:, -1:].argmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_and_32_decoded_tokens(name: str, device: str) -> None:
    model, other = pair(device, **CONFIGS[name])
    compare(model, other, device)
    for ours, theirs in zip(other.layers, model.layers, strict=True):
        assert (ours.attention.cache_k - theirs.attention.cache_k).abs().max() <= 1e-4


def generate(model: Any, prompts: list[list[int]], steps: int, device: str) -> tuple[Tensor, Tensor]:
    """Meta's own loop: the shortest prompt at once, then token by token; a longer prompt overrules what is decoded."""
    total = max(map(len, prompts)) + steps
    tokens = torch.full((len(prompts), total), -1, device=device)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = torch.tensor(ids, device=device)
    given = tokens != -1
    logits, previous = [], 0
    for place in range(min(map(len, prompts)), total):
        out = model(tokens[:, previous:place], previous)
        logits.append(out[:, -1])
        tokens[:, place] = torch.where(given[:, place], tokens[:, place], out[:, -1].argmax(-1))
        previous = place
    return tokens, torch.stack(logits, 1)


def test_a_batch_of_three_lengths(device: str) -> None:
    model, other = pair(device)
    prompts = [prompt(1, n, "cpu")[0].tolist() for n in (5, 12, 8)]
    (theirs, expected), (ours, got) = (generate(m, prompts, 32, device) for m in (model, other))
    assert torch.equal(ours, theirs) and (got - expected).abs().max() <= 1e-4


def test_chunks_and_smaller_batches(device: str) -> None:
    model, other = pair(device)
    for batch, parts in ((3, [7, 5, 1, 2]), (1, [4, 4])):
        start = 0
        for part in prompt(batch, sum(parts), device).split(parts, dim=1):
            assert (other(part, start) - model(part, start)).abs().max() <= 1e-4
            start += part.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_meta(dtype: torch.dtype, device: str) -> None:
    model = make(device, dim=144).to(dtype).float()
    theirs = copy.deepcopy(model).to(dtype)
    ours = copy.deepcopy(theirs)
    mhaffn.replace(ours)
    ids = prompt(2, 40, device)
    for part, start in ((ids[:, :32], 0), (ids[:, 32:39], 32), (ids[:, 39:], 39)):
        truth = model(part, start)
        assert (ours(part, start) - truth).norm() <= 2 * (theirs(part, start) - truth).norm()
    assert ours.layers[0].attention.cache_k.dtype == dtype


def test_everything_is_replaced_and_comes_back(device: str) -> None:
    model = make(device)
    ids = prompt(2, 6, device)
    expected = model(ids, 0)
    before = classes(model), {n: set(m.__dict__) for n, m in model.named_modules()}
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    report = mhaffn.replace(model)
    assert mhaffn.replace(model) == report and not report.left
    assert str(report) == "replaced 13 modules: 3 Attention, 3 FeedForward, 7 RMSNorm"
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert list(model.state_dict()) == list(make().state_dict()) and "mhaffn.Attention" in repr(model)
    assert (model(ids, 0) - expected).abs().max() <= 1e-4
    mhaffn.restore(model)
    assert dict(model.named_modules()) == modules
    assert (classes(model), {n: set(m.__dict__) for n, m in model.named_modules()}) == before
    assert torch.equal(model(ids, 0), expected)


def test_a_sequence_without_room_is_the_same_error(device: str) -> None:
    for model in pair(device):
        with pytest.raises(RuntimeError, match="must match"):
            model(prompt(2, 65, device), 0)
        model(prompt(2, 60, device), 0)
        with pytest.raises(RuntimeError, match="must match"):
            model(prompt(2, 5, device), 60)
        with pytest.raises(RuntimeError, match="must match"):
            model(prompt(4, 5, device), 0)


@torch.no_grad()
def test_attention_without_a_mask_sees_all(device: str) -> None:
    model, other = pair(device)
    x = torch.randn(2, 5, 72, device=device)
    angles = model.freqs_cis[:5].to(device)
    expected, got = (m.layers[0].attention(x, 0, angles, None) for m in (model, other))
    assert (got - expected).abs().max() <= 1e-4
    expected, got = (
        m.layers[0].attention(x, 0, angles, torch.zeros(1, 1, 5, 5, device=device)) for m in (model, other)
    )
    assert (got - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_angles_that_are_used_again_or_refilled_count(device: str) -> None:
    model, other = pair(device)
    x = torch.randn(2, 5, 72, device=device)
    angles = model.freqs_cis[:5].to(device)
    for layer in range(2):
        for batch, start in ((2, 0), (2, 5), (1, 10)):
            expected, got = (m.layers[layer].attention(x[:batch], start, angles, None) for m in (model, other))
            assert (got - expected).abs().max() <= 1e-5
    angles.copy_(model.freqs_cis[7:12])
    expected, got = (m.layers[0].attention(x[:1], 10, angles, None) for m in (model, other))
    assert (got - expected).abs().max() <= 1e-5


def test_gradients_are_refused(device: str) -> None:
    model = make(device)
    mhaffn.replace(model)
    layer, x = model.layers[0], torch.randn(1, 2, 72, device=device)
    for call in (layer.feed_forward, layer.ffn_norm, lambda x: layer.attention(x, 0, model.freqs_cis[:2], None)):
        with pytest.raises(RuntimeError, match=r"runs on mhaffn, which is for inference.*mhaffn.restore"):
            call(x)
    mhaffn.restore(model)
    layer.feed_forward(x).sum().backward()


class OwnMasks(llama3.Transformer):
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        return super().forward(tokens, start_pos)


class Quantised(ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1))


def quantise(model: Any) -> None:
    model.layers[0].feed_forward.w1.__class__ = Quantised
    model.layers[1].attention.wk.__class__ = Quantised


def patch(model: Any) -> None:
    feed_forward, block = model.layers[0].feed_forward, model.layers[1]
    feed_forward.forward = lambda x, forward=feed_forward.forward: -forward(x)
    block.forward = lambda *args, forward=block.forward: 2 * forward(*args)


ATTENTION = [f"layers.{i}.attention" for i in range(3)]
LEFT: dict[str, tuple[type, dict[str, Any], Callable[[Any], None], dict[str, str]]] = {
    "own masks": (OwnMasks, {}, lambda m: None, dict.fromkeys(ATTENTION, "its masks may be others")),
    "quantised": (llama3.Transformer, {}, quantise, {
        "layers.0.feed_forward": "w1 is a Quantised, expected a parallel linear layer",
        "layers.1.attention": "wk is a Quantised"}),
    "patched": (llama3.Transformer, {}, patch, {
        "layers.0.feed_forward": "forward is not that of Meta's FeedForward"} | dict.fromkeys(ATTENTION, "masks")),
    "wide heads": (llama3.Transformer, {"dim": 544, "n_heads": 2, "n_kv_heads": 1}, lambda m: None,
        dict.fromkeys(ATTENTION, "head dim of 272")),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_cover_is_left_alone(name: str, device: str) -> None:
    cls, options, change, left = LEFT[name]
    model = make(device, cls, **options)
    change(model)
    ids = prompt(2, 6, device)
    expected = model(ids, 0)
    before = classes(model)
    report = mhaffn.replace(model)
    assert set(report.left) == set(left)
    for module, reason in left.items():
        assert reason in report.left[module] and type(model.get_submodule(module)) is before[module]
    assert report.replaced and all(type(model.get_submodule(name)) is not before[name] for name in report.replaced)
    assert (model(ids, 0) - expected).abs().max() <= 1e-4


def test_a_model_over_several_ranks_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    before = classes(model)
    monkeypatch.setattr(meta, "get_model_parallel_world_size", lambda: 2)
    report = mhaffn.replace(model)
    assert set(report.left.values()) == {"the model is spread over 2 ranks, expected 1"}
    assert not report.replaced and classes(model) == before


def test_what_is_added_afterwards_counts(device: str) -> None:
    model, other = pair(device)
    for m in (model, other):
        for part in (m.layers[0].feed_forward.w3, m.layers[1].attention.wv, m.layers[1].attention.wo):
            part.register_forward_hook(lambda module, args, output: output * 1.5)
    ids = prompt(2, 6, device)
    assert (other(ids, 0) - model(ids, 0)).abs().max() <= 1e-4


# --- without weights, on a stream -------------------------------------------------------------------------------------

SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def store_of(model: Any, folder: Path) -> Path:
    """The weights of ``model`` as a folder of transformers, which is what stores are made of."""
    from transformers import LlamaConfig, LlamaForCausalLM

    p, head_dim = model.params, model.params.dim // model.params.n_heads
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=p.dim, intermediate_size=model.layers[0].feed_forward.w1.weight.shape[0], vocab_size=p.vocab_size,
        num_hidden_layers=p.n_layers, num_attention_heads=p.n_heads, num_key_value_heads=p.n_kv_heads or p.n_heads,
        rms_norm_eps=p.norm_eps, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
        rope_parameters={"rope_theta": p.rope_theta, **(SCALED if p.use_scaled_rope else {"rope_type": "default"})},
    ))  # fmt: skip
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    for i in range(p.n_layers):
        ours = f"model.layers.{i}"
        names |= {
            f"layers.{i}.{meta}": f"{ours}.{name}"
            for meta, name in {
                "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv":
                "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
                "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
                "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            }.items()
        }  # fmt: skip
    state = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("wq.weight", "wk.weight")):  # numbers of a pair: side by side here, half a head apart there
            weight = torch.cat([h for w in weight.split(head_dim) for h in (w[0::2], w[1::2])])
        state[names[name.removesuffix(".weight")] + ".weight"] = weight
    theirs.load_state_dict(state)
    theirs.to(model.tok_embeddings.weight.dtype).save_pretrained(folder)
    return folder


def empty(model: Any) -> Any:
    with torch.device("meta"):
        return llama3.Transformer(model.params).to("meta")  # fairscale makes parameters on the CPU


def streamed_pair(device: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    model = make(device, **options)
    other = empty(model)
    mhaffn.replace(other, store=store_of(model, folder), device=device, gpu=None, dram=None)
    return model, other


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_a_prompt_and_32_decoded_tokens(name: str, tmp_path: Path, device: str) -> None:
    compare(*streamed_pair(device, tmp_path, **CONFIGS[name]), device)


def test_streamed_a_batch_of_three_lengths(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhaffn.modules.CHUNK_TOKENS", 4)  # so that a prompt takes several steps
    model, other = streamed_pair(device, tmp_path)
    prompts = [prompt(1, n, "cpu")[0].tolist() for n in (5, 12, 8)]
    (theirs, expected), (ours, got) = (generate(m, prompts, 32, device) for m in (model, other))
    assert torch.equal(ours, theirs) and (got - expected).abs().max() <= 1e-4


def test_streamed_and_restored(tmp_path: Path, device: str) -> None:
    model = make(device)
    store = store_of(model, tmp_path)
    other = empty(model)
    before, parameters = classes(other), dict(other.named_parameters())
    report = mhaffn.replace(other, store=store, device=device, gpu=None, dram=None)
    assert str(report).splitlines()[0] == "replaced 3 modules: 3 TransformerBlock"
    assert report.runner is not None and report.runner.plan.work.logits == 64
    assert (other(prompt(1, 5, device), 0) - model(prompt(1, 5, device), 0)).abs().max() <= 1e-4
    for ids, start, message in ((prompt(1, 60, device), 5, "context"), (prompt(4, 2, device), 0, "max_batch_size")):
        with pytest.raises(ConfigError, match=message):
            other(ids, start)
    mhaffn.restore(other)
    assert classes(other) == before and other.freqs_cis.is_meta and other.layers[0].attention.cache_k.is_meta
    assert all(p is parameters[name] for name, p in other.named_parameters())


def test_streamed_it_refuses_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(make(), tmp_path)
    refused = [
        ({"dim": 144}, ConfigError, "dim of 144, not 72"),
        ({"use_scaled_rope": True}, ConfigError, "rotary angles"),
        ({"rope_theta": 1e6}, ConfigError, "rotary angles"),
        ({"cls": OwnMasks}, UnsupportedModelError, "forward of its own"),
    ]
    for changes, kind, message in refused:
        model = make(**changes).to("meta")
        before = classes(model)
        with pytest.raises(kind, match=message):
            mhaffn.replace(model, store=store, device="cpu")
        assert classes(model) == before
    with pytest.raises(ConfigError, match="without weights"):
        mhaffn.replace(make(), store=store, device="cpu")
    monkeypatch.setattr(streamed_meta, "get_model_parallel_world_size", lambda: 2)
    with pytest.raises(UnsupportedModelError, match="2 ranks"):
        mhaffn.replace(empty(make()), store=store, device="cpu")


@pytest.mark.parametrize("slip", ["rope", "raises"])
def test_it_refuses_where_its_check_fails(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = meta._angles

    def slipping(*args: Any) -> tuple[Tensor, ...]:
        if slip == "raises":
            raise TypeError("another signature")
        cos, sin, start = angles(*args)
        return cos, -sin, start

    meta.try_on_tiny.cache_clear()
    monkeypatch.setattr(meta, "_angles", slipping)
    model = make()
    before = classes(model)
    got = "TypeError: another signature" if slip == "raises" else "logits that differ by"
    with pytest.raises(UnsupportedModelError, match=rf"Meta's code and got {got}.*nothing was replaced"):
        mhaffn.replace(model)
    assert classes(model) == before
    monkeypatch.undo()
    state = torch.get_rng_state()
    mhaffn.replace(model)
    assert torch.equal(torch.get_rng_state(), state)
