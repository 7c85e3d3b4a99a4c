"""The streamed model against transformers' own on the same weights."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

import mhaffn
from mhaffn.config import Sublayer, order
from mhaffn.errors import BudgetError, ConfigError, StreamError
from tests.conftest import Model
from tests.test_evaluate import WORDS, with_tokenizer

CONFIGS: dict[str, dict[str, Any]] = {
    "gqa 9/3": {},
    "mha 8/8": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
    "mqa 8/1": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "three shards": {"shards": 3},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 32,
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"kind": "mistral"},
}  # fmt: skip


def open_reference(folder: Path, device: str, dtype: str = "float32") -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()


def streamed(folder: Path, device: str, **options: Any) -> mhaffn.StreamedLlama:
    return mhaffn.load(folder, gpu=None, dram=None, device=device, **options)


def prompt(batch: int = 1, length: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 211, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_in_fp32(name: str, tiny_model: Model, device: str) -> None:
    folder = tiny_model(**CONFIGS[name])
    ids = prompt(2).to(device)
    expected = open_reference(folder, device)(ids).logits
    with streamed(folder, device, batch=2) as model:
        for _ in range(3):  # the cycle runs on through the pass boundary
            assert (model(ids).logits - expected).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_at_most_twice_as_transformers(dtype: str, tiny_model: Model, device: str) -> None:
    folder = tiny_model(dtype=dtype, hidden_size=576, intermediate_size=1536, num_attention_heads=9)
    ids = prompt(2, 40).to(device)
    truth = open_reference(folder, "cpu")(ids.cpu()).logits
    theirs = open_reference(folder, device, dtype)(ids).logits.cpu().float()
    with streamed(folder, device) as model:
        ours = model(ids).logits.cpu().float()
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


@torch.no_grad()
def test_left_padded_batch(tiny_model: Model, device: str) -> None:
    folder = tiny_model()
    ids = prompt(3, 12).to(device)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :9] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = open_reference(folder, device)(ids, attention_mask=mask, position_ids=positions).logits
    with streamed(folder, device) as model:
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (got - expected)[mask.bool()].abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunked_prefill_with_caches(kind: str, tiny_model: Model, device: str) -> None:
    folder = tiny_model()
    reference, ids = open_reference(folder, device), prompt(2, 24).to(device)
    expected = reference(ids).logits
    with streamed(folder, device) as model:
        cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([10, 1, 8, 5], dim=1)]
    assert (torch.cat(parts, 1) - expected).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cache", ["none", "dynamic", "static", "padded"])
def test_a_long_prompt_takes_several_steps_but_reads_each_sublayer_once(
    cache: str, tiny_model: Model, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhaffn.modules.CHUNK_TOKENS", 7)
    monkeypatch.setattr("mhaffn.hf.CHUNK_TOKENS", 7)
    folder = tiny_model()
    ids = prompt(2, 24).to(device)
    mask = torch.ones_like(ids)
    if cache == "padded":
        mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = open_reference(folder, device)(ids, attention_mask=mask, position_ids=positions).logits
    with streamed(folder, device) as model:
        caches = {"dynamic": DynamicCache(), "static": StaticCache(model.config, max_cache_len=40)}
        options = {"past_key_values": caches.get(cache), "use_cache": cache in caches}
        got = model(ids, attention_mask=mask, position_ids=positions, **options).logits
        if cache in caches:
            assert caches[cache].get_seq_length() == 24
        model.runner.sweep()  # on a GPU spans are reported once they have passed, each lane's in their order
        spans = sorted(model.runner.trace.spans, key=lambda span: span.start_s)
    assert [s.sublayer for s in spans if s.lane in ("mha", "ffn") and s.number == 1] == list(order(3))
    assert (got - expected)[mask.bool()].abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_four_dimensions_is_taken_as_it_is(kind: str, tiny_model: Model, device: str) -> None:
    folder = tiny_model()
    ids = prompt(2, 12).to(device)
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool, device=device).tril()
    mask[:, :, 4:, 1] = False  # a token that later ones may not see
    mask[1, :, :, :3] |= torch.ones(12, 3, dtype=torch.bool, device=device)  # a prefix that sees itself whole
    additive = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    given = mask if kind == "bool" else additive
    expected = open_reference(folder, device)(ids, attention_mask=given).logits
    with streamed(folder, device) as model:
        assert (model(ids, attention_mask=given).logits - expected).abs().max() <= 1e-4
        with pytest.raises(ConfigError, match="biases"):
            model(ids, attention_mask=additive + 0.5)
        with pytest.raises(ConfigError, match=r"attention_mask of shape \(2, 11\), expected \(2, 12\)"):
            model(ids, attention_mask=torch.ones(2, 11, device=device))


def test_the_batch_has_room_or_says_what_to_ask_for(tiny_model: Model) -> None:
    with streamed(tiny_model(), "cpu", context=16) as model:
        assert model(prompt(2, 4)).logits.shape == (2, 4, 211)
        with pytest.raises(ConfigError, match=r"4 sequences of 4 tokens in a pass.* at most batch=4"):
            model(prompt(4, 4))
        with pytest.raises(ConfigError, match=r"4 sequences of 5 tokens, expected at most 16.*batch=4"):
            model(prompt(4, 5))
        with pytest.raises(ConfigError, match="no tokens"):
            model(prompt(1, 0))
        one = model.runner.plan.fixed_bytes
    with streamed(tiny_model(), "cpu", context=16, batch=4) as model:
        assert model(prompt(4, 16)).logits.shape == (4, 16, 211)
        cache = DynamicCache()
        model(prompt(4, 16), past_key_values=cache)
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert model.runner.plan.fixed_bytes >= one + held * 3 // 4
    with pytest.raises(ConfigError, match="batch = 0"):
        streamed(tiny_model(), "cpu", batch=0)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_return_sequences": 4, "do_sample": True}], ids=str)
def test_sequences_that_generate_adds_count_too(options: dict[str, Any], tiny_model: Model) -> None:
    """Each has logits of its own, which a small plan has no room for."""
    folder, ids = tiny_model(vocab_size=20_000), prompt(1, 8)
    with streamed(folder, "cpu", context=64) as model:
        with pytest.raises(ConfigError, match=r"4 sequences of 8 tokens in a pass, .* at most batch=4"):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **options)
        assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape == (1, 10)
    with streamed(folder, "cpu", context=64, batch=4) as model:
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **options)
        assert written.shape[1] == 10


@pytest.mark.gpu
@torch.no_grad()
def test_memory_that_runs_out_is_a_clear_error(tiny_model: Model) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    with streamed(tiny_model(), "cuda", batch=1 << 20) as model:
        expected = model(prompt().cuda()).logits
        rest = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.98), dtype=torch.uint8, device="cuda")
        with pytest.raises(BudgetError, match="ran out of memory"):
            model(torch.ones(1 << 14, 200, dtype=torch.long, device="cuda"), use_cache=False)
        del rest
        torch.cuda.empty_cache()
        assert torch.equal(model(prompt().cuda()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        pytest.param({"do_sample": False, "cache_implementation": "offloaded"}, marks=pytest.mark.gpu),
        # transformers compiles its own model for this cache, which crashes PyTorch 2.11
        pytest.param(
            {"do_sample": False, "cache_implementation": "offloaded_static", "disable_compile": True},
            marks=pytest.mark.gpu,
        ),
    ],
    ids=lambda options: ",".join(map(str, options.items())),
)
def test_generate_gives_the_tokens_of_transformers(options: dict[str, Any], tiny_model: Model, device: str) -> None:
    if device == "cpu" and "offloaded" in options.get("cache_implementation", ""):
        pytest.skip("caches are offloaded from a GPU")
    folder = tiny_model()
    ids = prompt(1, 9).to(device)
    reference = open_reference(folder, device)
    torch.manual_seed(3)
    theirs = dict(options)
    if "offloaded" in theirs.get("cache_implementation", ""):
        del theirs["cache_implementation"]  # whose transfers overtake each other in transformers 5.17
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **theirs)
    with streamed(folder, device) as model:
        torch.manual_seed(3)
        got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options)
    assert got.tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_keys_stay_in_order_on_a_gpu_that_lags(cache: str, tiny_model: Model) -> None:
    if not torch.cuda.is_available():
        pytest.skip("caches are offloaded from a GPU")
    ids = prompt(2, 9).cuda()
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    with streamed(tiny_model(), "cuda", batch=2) as model:
        expected = model.generate(ids, **options)
        embed = model.runner.embed

        def late(ids: torch.Tensor) -> torch.Tensor:
            torch.cuda._sleep(20_000_000)  # 10 ms, in which the whole pass is queued
            return embed(ids)

        model.runner.embed = late  # type: ignore[method-assign]
        for _ in range(3):
            got = model.generate(ids, cache_implementation=cache, disable_compile=True, **options)
            assert got.tolist() == expected.tolist()


def test_a_pipeline_chats(tiny_model: Model, tmp_path: Path, device: str) -> None:
    folder = with_tokenizer(tiny_model(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"
    asked = [{"role": "user", "content": "w5 w9"}]
    with streamed(folder, device) as model:
        texts = []
        for each in (model, open_reference(folder, device)):
            answer = pipeline("text-generation", model=each, tokenizer=tokenizer)
            said = answer(asked, max_new_tokens=6, do_sample=False)[0]["generated_text"][-1]
            texts.append(said["content"])
    assert texts[0] == texts[1] and len(texts[0].split()) == 6


@pytest.mark.parametrize("way", ["copy", "draft", "lookup"])
@torch.no_grad()
def test_guesses_change_no_token_and_save_passes(way: str, tiny_model: Model, device: str) -> None:
    folder = tiny_model(seed=1)
    ids = torch.tensor([[5, 17, 101, 42, 9, 5, 17, 101]], device=device)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if way != "lookup":
        assistant = open_reference(folder, device)
        if way == "draft":
            assistant.model.layers, assistant.config.num_hidden_layers = assistant.model.layers[:2], 2
        options = {"assistant_model": assistant}
    with mhaffn.load(folder, gpu=None, dram=None, device=device) as model:
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
        plain = model.generate(ids, **given)
        passes = model.runner.trace.number
        assert torch.equal(model.generate(ids, **given, **options), plain)
        saved = 2 * passes - model.runner.trace.number
    assert passes == 40 and (saved >= 20 if way == "copy" else saved >= 0)


def test_several_end_of_text_ids_come_from_generation_config(tiny_model: Model, tmp_path: Path) -> None:
    folder = tiny_model()
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    ids = prompt(1, 9)
    with streamed(copy, "cpu") as model:
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    stop = plain[0, 9 + 3].item()
    (copy / "generation_config.json").unlink(missing_ok=True)
    (copy / "generation_config.json").write_text(f'{{"eos_token_id": [210, {stop}]}}')
    with streamed(copy, "cpu") as model:
        short = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert short[0].tolist() == plain[0, : short.shape[1]].tolist() and short[0, -1] == stop and short.shape[1] <= 13


@pytest.mark.parametrize("content", ['{"eos_token_id": "abc"}', '{"eos_token', '{"eos_token_id": [1, null]}'])
def test_a_bad_generation_config_is_named(content: str, tiny_model: Model, tmp_path: Path) -> None:
    for path in tiny_model().iterdir():
        if path.name != "generation_config.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").write_text(content)
    if "null" in content:
        streamed(tmp_path, "cpu").close()
        return
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        streamed(tmp_path, "cpu")


def test_streamer_in_a_thread(tiny_model: Model, device: str) -> None:
    class Letters:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"<{int(i)}> " for i in ids)

    ids = prompt(1, 9).to(device)
    with streamed(tiny_model(), device) as model:
        streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options | {"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        expected = model.generate(ids, **options)[0, 9:].tolist()
    assert text.split() == [f"<{i}>" for i in expected]


def test_a_sequence_longer_than_the_context_is_an_error(tiny_model: Model) -> None:
    with streamed(tiny_model(), "cpu", context=16) as model:
        with pytest.raises(ConfigError, match=r"17 tokens, expected at most 16.*context=17"):
            model(prompt(1, 17))
        with pytest.raises(ConfigError, match="17 tokens"):
            model.generate(prompt(1, 14), max_new_tokens=8, do_sample=False)
        assert model(prompt(1, 16)).logits.shape == (1, 16, 211)
    with pytest.raises(ConfigError, match="got context = 257, expected 1 to 256"):
        streamed(tiny_model(), "cpu", context=257)


def test_a_quantized_cache_is_refused(tiny_model: Model, device: str) -> None:
    cache = QuantizedCache.__new__(QuantizedCache)  # its constructor wants a quantisation library
    with streamed(tiny_model(), device) as model, pytest.raises(ConfigError, match="QuantizedCache"):
        model(prompt().to(device), past_key_values=cache)


@torch.no_grad()
def test_outputs_are_what_the_config_and_the_call_ask_for(tiny_model: Model, device: str) -> None:
    reference = open_reference(tiny_model(), device)
    with streamed(tiny_model(), device) as model:
        ids = prompt().to(device)
        for each in (reference, model):
            assert [type(part).__name__ for part in each(ids, return_dict=False)] == ["Tensor", "DynamicCache"]
            each.config.use_cache = False
            assert each(ids).past_key_values is None
            assert each(ids, use_cache=True).past_key_values is not None
            each.config.use_cache = True
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(embeds, reference.get_input_embeddings()(ids))
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@torch.no_grad()
def test_a_pass_under_autocast(tiny_model: Model, device: str) -> None:
    folder, ids = tiny_model(), prompt(2, 12).to(device)
    reference = open_reference(folder, device)
    expected = reference(ids).logits
    with streamed(folder, device) as model, torch.autocast(device, torch.bfloat16):
        errors = [(m(ids).logits.float() - expected).abs().mean() for m in (model, reference)]
    assert errors[0] <= 2 * errors[1]


def test_a_stop_string_ends_the_text(tiny_model: Model, tmp_path: Path, device: str) -> None:
    words = ["abcdef", *(f"w{i}" for i in range(WORDS - 1))]  # transformers tries tokens behind the first
    folder = with_tokenizer(tiny_model(), tmp_path / "model", words)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = prompt().to(device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    with streamed(folder, device) as model:
        whole = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
        stop = tokenizer.decode([whole[4]])
        got = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)[0, ids.shape[1] :].tolist()
    assert got == whole[: whole.index(whole[4]) + 1] and len(got) < len(whole)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiled_it_gives_the_same_and_no_graph_is_captured(backend: str, tiny_model: Model, device: str) -> None:
    with streamed(tiny_model(), device) as model:
        ids = prompt().to(device)
        expected = model(ids).logits
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            assert torch.equal(compiled(ids).logits, expected)
        options = {"max_new_tokens": 4, "cache_implementation": "static"}
        config, _ = model._prepare_generation_config(None, **options)
        assert not model._valid_auto_compile_criteria({"past_key_values": None}, config)
        model.get_compiled_call = lambda *_: pytest.fail("compiled for a static cache")
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.gpu
def test_close_gives_the_memory_of_the_gpu_back(tiny_model: Model) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    folder, ids = tiny_model(), prompt().cuda()
    with mhaffn.load(folder, device="cuda", gpu="2GiB") as model:
        model(ids)  # libraries take their workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    for tiers in (None, dict.fromkeys(order(3), "gpu"), dict.fromkeys(order(3), "dram")):
        with mhaffn.load(folder, device="cuda", gpu=None, dram=None, tiers=tiers) as model:
            model(ids)
            assert torch.cuda.memory_allocated() > before
        assert torch.cuda.memory_allocated() <= before + 4096  # the rotary angles are the model's own


def test_it_stays_in_its_dtype_and_on_its_device(tiny_model: Model, device: str) -> None:
    with streamed(tiny_model(), device) as model, torch.no_grad():
        ids = prompt().to(device)
        expected = model(ids).logits
        for move in (model.half, partial(model.to, torch.bfloat16), partial(model.to, "meta")):
            with pytest.raises(ConfigError, match=r"a move to .* of a streamed model"):
                move()
        assert model.to(device).to(model.dtype) is model
        assert torch.equal(model(ids).logits, expected)


def test_what_it_cannot_do_it_refuses(tiny_model: Model) -> None:
    with streamed(tiny_model(), "cpu") as model:
        for option in ("output_attentions", "output_hidden_states"):
            with pytest.raises(ConfigError, match=option):
                model(prompt(), **{option: True})
        with pytest.raises(ConfigError, match="labels"):
            model(prompt(), labels=prompt())
        with pytest.raises(ConfigError, match="is_causal=False"):
            model(prompt(), is_causal=False)
        whole = torch.ones(1, 1, 21, 21, dtype=torch.int64)
        with pytest.raises(ConfigError, match=r"4-D attention_mask of torch\.int64"):
            model(prompt(), attention_mask=whole)
        for act in (copy.deepcopy, pickle.dumps):
            with pytest.raises(ConfigError, match="cannot be copied or pickled"):
                act(model)
        with pytest.raises(ConfigError, match="keeps its vocabulary"):
            model.resize_token_embeddings(300)
        model.config.output_hidden_states = True
        with pytest.raises(ConfigError, match="output_hidden_states"):
            model(prompt())
        model(prompt(), output_hidden_states=False)
        model.config.output_hidden_states = False
        with pytest.raises(ConfigError, match="exactly one"):
            model()
        with pytest.raises(ConfigError, match="holds no weights to save"):
            model.save_pretrained("/tmp")


def test_an_interrupt_at_the_end_of_loading_leaves_no_stream(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mhaffn.hf, "StreamedLlama", interrupted)
    before = {thread for thread in threading.enumerate() if thread.name.startswith("mhaffn")}
    with pytest.raises(KeyboardInterrupt):
        mhaffn.load(tiny_model(), device="cpu", dram=None)
    assert {thread for thread in threading.enumerate() if thread.name.startswith("mhaffn")} <= before


def test_closed_model_says_so(tiny_model: Model) -> None:
    model = streamed(tiny_model(), "cpu")
    model.close()
    model.close()
    with pytest.raises(StreamError, match="closed"):
        model(prompt())


@torch.no_grad()
def test_inputs_embeds_and_logits_to_keep(tiny_model: Model, device: str) -> None:
    ids = prompt().to(device)
    with streamed(tiny_model(), device) as model:
        whole = model(ids).logits
        assert torch.equal(model(inputs_embeds=model.runner.embed(ids)).logits, whole)
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_logits_of_the_last_token_take_no_copy_of_the_head(batch: int, tiny_model: Model) -> None:
    """No budget counts one: a pass holds the logits themselves, and much less besides."""
    with streamed(tiny_model(dtype="bfloat16", vocab_size=20_000), "cpu", batch=batch) as model:
        head = model.runner.resident["head"].nbytes
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            logits = model(prompt(batch), logits_to_keep=1).logits
        assert logits.nbytes < head / 10
        assert 0 < max(event.self_cpu_memory_usage for event in seen.key_averages()) < head / 2


@pytest.mark.parametrize("name", ["context", "tokens", "batch"])
@pytest.mark.parametrize("value", [0, -5, 1.5, "7", True])
def test_limits_are_whole_numbers(name: str, value: object, tiny_model: Model) -> None:
    with pytest.raises(ConfigError, match=f"got {name} = {value!r}, expected a whole number of at least 1"):
        streamed(tiny_model(), "cpu", **{name: value})


def test_gpu_tier_and_devices_are_checked(tiny_model: Model) -> None:
    with pytest.raises(ConfigError, match="the device is the CPU"):
        mhaffn.load(tiny_model(), gpu="1GiB", device="cpu")
    with pytest.raises(ConfigError, match="expected cpu or cuda"):
        mhaffn.load(tiny_model(), gpu=None, device="meta")
    with pytest.raises(ConfigError, match="nonsense"):
        mhaffn.load(tiny_model(), gpu=None, device="nonsense")


@torch.no_grad()
def test_auto_budgets_keep_a_small_model_in_memory(tiny_model: Model, device: str) -> None:
    folder = tiny_model()
    with mhaffn.load(folder, device=device) as model:
        assert model.runner.plan.streamed("ssd") == []
        expected = open_reference(folder, device)(prompt().to(device)).logits
        assert (model(prompt().to(device)).logits - expected).abs().max() <= 1e-4


@pytest.mark.gpu
@torch.no_grad()
def test_copies_overlap_compute(tiny_model: Model) -> None:
    """On a GPU some copy runs while a sublayer computes."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    folder = tiny_model(dtype="bfloat16", hidden_size=1024, intermediate_size=4096, num_attention_heads=8,
                        num_key_value_heads=4, num_hidden_layers=8, max_position_embeddings=4096)  # fmt: skip
    ids = prompt(4, 2048).cuda()
    tiers = dict.fromkeys(order(8), "dram")
    with mhaffn.load(folder, gpu=None, dram=None, device="cuda", tiers=tiers, batch=4) as model:
        for _ in range(3):
            model(ids, use_cache=False)
        model.runner.sweep()
        spans = list(model.runner.trace.spans)
    copies = [s for s in spans if s.lane == "h2d"]
    compute = [s for s in spans if s.lane in ("mha", "ffn")]
    overlap = sum(max(0.0, min(a.end_s, b.end_s) - max(a.start_s, b.start_s)) for a in copies for b in compute)
    assert overlap > 0.05 * sum(s.end_s - s.start_s for s in copies)  # one after the other would be none
    assert Sublayer(0, "mha") in {s.sublayer for s in copies}
