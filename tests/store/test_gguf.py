"""GGUF files through pack: against the weights they were made from, and against transformers' own reading."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mhaffn.errors import ConfigError, CorruptFileError, MhaffnError, StoreError, UnsupportedModelError
from mhaffn.formats import ALL_PLAIN
from mhaffn.store import Store, pack
from tests.store.killed import pack_and_die
from tests.store.models import CONFIG, hashes, random_weights

gguf = pytest.importorskip("gguf")

VOCABULARY = ["<unk>", "<s>", "</s>"]
MERGES = ["t h", "th e", "Ġ the"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
DIMENSIONS = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}


def vocabulary() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*VOCABULARY, *bytes_to_unicode().values(), "th", "the", "Ġthe"]


def gguf_name(name: str) -> str:
    resident = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in resident:
        return f"{resident[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of wq and wk."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    *,
    kind: str = "F32",
    tied: bool = False,
    tokenizer: bool = True,
    change: Callable[[Any], None] = lambda writer: None,
    tensors: dict[str, np.ndarray | None] | None = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Writes a random Llama as GGUF, matrices of type ``kind``; gives the weights before quantisation.

    ``tensors`` replaces or adds (or, if None, leaves out) tensors by GGUF name; ``change`` adds entries.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    config = CONFIG | DIMENSIONS | {"vocab_size": len(vocabulary()), "tie_word_embeddings": tied} | changes
    weights = random_weights(config)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    if tokenizer:
        add_tokenizer(writer)
    change(writer)
    quantisation = gguf.GGMLQuantizationType[kind]
    stored: dict[str, np.ndarray | None] = {}
    for name, weight in weights.items():
        values = weight.numpy()
        if "q_proj" in name:
            values = permuted(values, config["num_attention_heads"])
        elif "k_proj" in name:
            values = permuted(values, config["num_key_value_heads"])
        stored[gguf_name(name)] = values
    for name, array in (stored | (tensors or {})).items():
        if array is None:
            continue
        if array.ndim < 2 or kind == "F32" or name in (tensors or {}):
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def add_tokenizer(writer: Any) -> None:
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3] * len(VOCABULARY) + [1] * (len(tokens) - len(VOCABULARY)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")


def packed_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("F32", {}, 0.0),
        ("F32", {"tied": True}, 0.0),
        ("F32", {"num_key_value_heads": 4}, 0.0),
        ("F32", {"num_key_value_heads": 1, "num_hidden_layers": 1}, 0.0),
        ("F32", {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}, 0.0),
        ("F16", {}, 2**-11),
        ("BF16", {}, 2**-8),
        ("Q8_0", {"tied": True}, 1 / 127),
        ("Q4_1", {}, 1 / 7),
        ("Q5_0", {"num_key_value_heads": 1}, 1 / 8),
    ],
)
def test_pack_equals_transformers_and_the_original(
    kind: str, options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    original = write_gguf(tmp_path / "model.gguf", kind=kind, **options)
    store = pack(tmp_path / "model.gguf", tmp_path / "packed", dtype="float32", formats=ALL_PLAIN)
    ours = packed_weights(tmp_path / "packed")
    assert ours.keys() == original.keys()
    for name, weight in original.items():  # within the quantisation's step of the largest value
        assert (ours[name] - weight).abs().max() <= tolerance * weight.abs().max()
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    found = LlamaForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert found.dtype == torch.float32
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    ids = torch.arange(3, 40).unsqueeze(0)
    assert torch.equal(found(ids).logits, theirs(ids).logits)
    assert found.generation_config.eos_token_id == 2
    assert store.config.tie_word_embeddings is options.get("tied", False)


def test_bfloat16_unless_another_dtype_is_asked_for(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "model.gguf")
    assert pack(tmp_path / "model.gguf", tmp_path / "packed").dtype == "bfloat16"
    ours = packed_weights(tmp_path / "packed")
    assert all(torch.equal(ours[name], weight.bfloat16()) for name, weight in original.items())


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "model.gguf")
    pack(tmp_path / "model.gguf", tmp_path / "packed")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = AutoTokenizer.from_pretrained(tmp_path / "packed")
    text = "the three thés\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.eos_token == "</s>"
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_packing_a_gguf_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", kind="Q8_0")
    pack(tmp_path / "model.gguf", tmp_path / "a")
    pack(tmp_path / "model.gguf", tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.slow
def test_a_killed_pack_of_a_gguf_goes_on(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    pack(tmp_path / "model.gguf", tmp_path / "whole")
    assert pack_and_die(tmp_path / "model.gguf", tmp_path / "packed", 22)
    assert list((tmp_path / "packed").glob("layer-*.safetensors"))
    pack(tmp_path / "model.gguf", tmp_path / "packed")
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "whole")


def llama3_divisors(head_dim: int, theta: float, factor: float, low: float = 1.0, high: float = 4.0) -> np.ndarray:
    """As llama.cpp's converter computes rope_freqs.weight for an original context of 8192."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / high:
            divisors.append(1.0)
        elif wavelength > 8192 / low:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@torch.no_grad()
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(factor: float, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    divisors = llama3_divisors(32, 500000.0, factor)
    original = write_gguf(tmp_path / "model.gguf", rope_theta=500000.0, tensors={"rope_freqs.weight": divisors})
    pack(tmp_path / "model.gguf", tmp_path / "packed", dtype="float32")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert {key: found.config.rope_parameters[key] for key in rope} == rope
    values = CONFIG | DIMENSIONS | {"vocab_size": len(vocabulary()), "rope_parameters": rope, "rms_norm_eps": 1e-5}
    theirs = LlamaForCausalLM(LlamaConfig(**values)).eval()
    theirs.load_state_dict(original)
    ids = torch.arange(3, 100).unsqueeze(0)
    assert (found(ids).logits - theirs(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(32, 10000.0, 8.0),  # fits another theta
        llama3_divisors(32, 500000.0, 8.0, high=8.0),
        llama3_divisors(64, 500000.0, 8.0),  # fits another head
        llama3_divisors(32, 500000.0, 8.0)[:-1],
        np.full(16, np.nan, dtype=np.float32),
        np.full(16, -1, dtype=np.float32),
        np.linspace(1, 8, 16, dtype=np.float32),
    ],
)
def test_other_rope_divisors_are_refused(divisors: np.ndarray, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", rope_theta=500000.0, tensors={"rope_freqs.weight": divisors}, tokenizer=False)
    refused(tmp_path / "model.gguf", UnsupportedModelError, "rope_freqs.weight", "expected those of a llama3 scaling")


def refused(path: Path, kind: type[MhaffnError], *words: str) -> None:
    target = path.with_name("packed")
    with pytest.raises(kind) as caught:
        pack(path, target)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert not (target / "mhaffn.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), ("llama.rope.scaling.type", "'yarn'", "'none'")),
        (lambda w: w.add_float32("llama.rope.scale_linear", 2.0), ("llama.rope.scale_linear", "2.0")),
        (lambda w: w.add_rope_scaling_factor(4.0), ("llama.rope.scaling.factor", "4.0")),
        (lambda w: w.add_rope_scaling_attn_factors(2.0), ("llama.rope.scaling.attn_factor", "2.0")),
        (lambda w: w.add_sliding_window(512), ("llama.attention.sliding_window", "512")),
        (lambda w: w.add_expert_count(8), ("llama.expert_count", "8")),
        (lambda w: w.add_causal_attention(False), ("llama.attention.causal", "False")),
    ],
)
def test_options_transformers_would_pass_over(
    change: Callable[[Any], None], words: tuple[str, ...], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", change=change, tokenizer=False)
    refused(tmp_path / "model.gguf", UnsupportedModelError, *words, "Supported")


def test_neutral_options_pass(tmp_path: Path) -> None:
    def neutral(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_expert_count(0)

    write_gguf(tmp_path / "model.gguf", change=neutral)
    assert pack(tmp_path / "model.gguf", tmp_path / "packed").packed


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blk.0.attn_q.bias": np.zeros(128, np.float32)}, ("blk.0.attn_q.bias", "expected none", "Supported")),
        ({"blk.0.ffn_gate_inp.weight": np.zeros((4, 128), np.float32)}, ("blk.0.ffn_gate_inp.weight", "Supported")),
        ({"blk.1.ffn_up.weight": None}, ("blk.1.ffn_up.weight", "[160, 128]", "merged")),
        ({"blk.1.attn_q.weight": np.zeros((96, 128), np.float32)}, ("blk.1.attn_q", "[96, 128], expected [128, 128]")),
        ({"blk.1.attn_norm.weight": np.zeros(96, np.float32)}, ("blk.1.attn_norm.weight", "[96], expected [128]")),
        ({"token_embd.weight": np.zeros((200, 128), np.float32)}, ("token_embd.weight", "[200, 128]")),
        ({"blk.1.ffn_up.weight": np.zeros((160, 128), np.int32)}, ("blk.1.ffn_up.weight", "I32")),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tensors: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tensors=tensors)
    refused(tmp_path / "model.gguf", MhaffnError, *words)


def test_no_tokenizer_is_found_out_before_any_weight_is_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tokenizer=False)
    refused(tmp_path / "model.gguf", UnsupportedModelError, "tokenizer", "Pack the original model")
    assert not list((tmp_path / "packed").glob("*.safetensors"))


def test_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "phi3")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "model.gguf", UnsupportedModelError, "phi3", "Supported")


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", tokenizer=False)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(tmp_path / "model.gguf", ConfigError, "pip install 'mhaffn[gguf]'")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["missing", "pipe", "device"])
def test_no_file_at_all(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    refused(path, StoreError, "Give a GGUF file")


def test_a_folder_named_like_a_gguf_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    refused(tmp_path / "model.gguf", ConfigError, "config.json does not exist")


def header(version: int = 3, tensors: int = 0, entries: int = 0, rest: bytes = b"", magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


KEY = text(b"general.name")
CORRUPT: dict[str, bytes] = {
    "empty": b"",
    "three bytes": b"GGU",
    "another magic": header(magic=b"GGML") + bytes(64),
    "version 1": header(version=1) + bytes(64),
    "version 2**31": header(version=2**31) + bytes(64),
    "big endian": header(version=3 << 24) + bytes(64),
    "nothing in it": header() + bytes(64),
    "2**63 entries": header(entries=2**63),
    "2**63 tensors": header(tensors=2**63),
    "a key without end": header(entries=1, rest=text(b"a", 2**63)),
    "a text without end": header(entries=1, rest=KEY + struct.pack("<I", 8) + text(b"a", 2**62)),
    "an array without end": header(entries=1, rest=KEY + struct.pack("<IIQ", 9, 0, 2**60)),
    "an array of texts without end": header(entries=1, rest=KEY + struct.pack("<IIQ", 9, 8, 2**60)),
    "an array of arrays": header(entries=1, rest=KEY + struct.pack("<IIQ", 9, 9, 1) + bytes(64)),
    "an unknown type": header(entries=1, rest=KEY + struct.pack("<I", 99)),
    "a tensor of 2**31 dimensions": header(tensors=1, rest=text(b"a") + struct.pack("<I", 2**31)),
    "a tensor of unknown type": header(tensors=1, rest=text(b"a") + struct.pack("<IQIQ", 1, 1, 999, 0) + bytes(64)),
    "2**64 values": header(tensors=1, rest=text(b"a") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0) + bytes(64)),
    "a tensor beyond the end": header(tensors=1, rest=text(b"a") + struct.pack("<IQIQ", 1, 8, 0, 2**40) + bytes(64)),
    "a name that is no UTF-8": header(tensors=1, rest=text(b"\xff") + struct.pack("<IQIQ", 1, 1, 0, 0) + bytes(64)),
    "two tensors of one name": header(tensors=2, rest=(text(b"a") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2 + bytes(64)),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(CORRUPT[name])
    began = time.monotonic()
    with pytest.raises(MhaffnError) as caught:
        pack(path, tmp_path / "packed")
    assert isinstance(caught.value, CorruptFileError | UnsupportedModelError)
    assert str(path) in str(caught.value)
    assert time.monotonic() - began < 10


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tokenizer=False, num_hidden_layers=1)
    size = path.stat().st_size
    for cut in (1, 4096, size // 2, size - 600, size - 100, size - 10):
        write_gguf(path, tokenizer=False, num_hidden_layers=1)
        os.truncate(path, size - cut)
        refused(path, CorruptFileError, "etch")


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, tokenizer=False, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    return path.read_bytes()


@given(flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_damaged_file(flips: list[tuple[float, int]], whole_gguf: bytes, tmp_path_factory: Any) -> None:
    """A store that opens, or a typed error that names the file, wherever the damage is."""
    folder = tmp_path_factory.mktemp("gguf")
    content = bytearray(whole_gguf)
    for place, value in flips:
        content[int(place * len(content))] = value
    (folder / "model.gguf").write_bytes(content)
    try:
        store = pack(folder / "model.gguf", folder / "packed")
    except MhaffnError as error:
        assert str(folder) in str(error)
    else:
        assert len(store.sublayers) == 2


@given(flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_damaged_header(flips: list[tuple[int, int]], small_gguf: bytes, tmp_path_factory: Any) -> None:
    """Read or refused with a typed error; the tokenizer is missing, so that nothing is ever written."""
    folder = tmp_path_factory.mktemp("gguf")
    content = bytearray(small_gguf)
    for position, value in flips:
        content[position] = value
    (folder / "model.gguf").write_bytes(content)
    with pytest.raises(MhaffnError) as caught:
        pack(folder / "model.gguf", folder / "packed")
    assert str(folder / "model.gguf") in str(caught.value)


def test_a_packed_gguf_opens_as_a_store(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", kind="Q8_0", num_hidden_layers=3)
    pack(tmp_path / "model.gguf", tmp_path / "packed")
    store = Store.open(tmp_path / "packed")
    assert store.packed
    assert store.config.num_layers == 3
    assert store.config.norm_eps == pytest.approx(1e-5)
