"""config.json: what is run, what is refused, and sizes as people write them."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhaffn.config import BYTES_MAX, LAYERS_MAX, ModelConfig, Sublayer, format_bytes, order, parse_bytes
from mhaffn.errors import ConfigError, MhaffnError, UnsupportedModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
}  # fmt: skip
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ABSENT = object()


def read(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(
        {key: value for key, value in values.items() if value is not ABSENT}, where="a/config.json"
    )


def test_dimensions_and_shapes() -> None:
    config = read(LLAMA | {"head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-5})
    assert (config.architecture, config.num_layers, config.head_dim, config.norm_eps) == (
        "LlamaForCausalLM",
        2,
        32,
        1e-5,
    )
    assert config.sublayer_shapes("mha") == {
        "wq": (128, 64), "wk": (64, 64), "wv": (64, 64), "wo": (64, 128), "norm": (64,)
    }  # fmt: skip
    assert config.sublayer_shapes("ffn") == {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96), "norm": (64,)}
    assert config.resident_shapes() == {"embedding": (97, 64), "norm": (64,)}
    assert read(LLAMA).resident_shapes()["head"] == (97, 64)


def test_sublayers_in_order() -> None:
    assert [s.key for s in order(2)] == ["0.mha", "0.ffn", "1.mha", "1.ffn"]
    assert str(Sublayer(3, "ffn")) == "layer 3 ffn"


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"num_key_value_heads": ABSENT}, {"num_key_value_heads": None}, {"head_dim": None}, {"rope_scaling": None},
        {"rope_parameters": None}, {"rope_scaling": {}}, {"rope_theta": 500000}, {"hidden_act": "swish"},
        {"attention_bias": False}, {"mlp_bias": False}, {"quantization_config": None}, {"quantization_config": {}},
        {"sliding_window": None}, {"tie_word_embeddings": True}, {"max_position_embeddings": 7},
        {"eos_token_id": [1, 2]}, {"architectures": ["Other", "LlamaForCausalLM"]}, {"partial_rotary_factor": 1.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": None}},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}, {"rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "attention_factor": None}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)  # fmt: skip
def test_what_is_accepted_means_to_transformers_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    for base in (LLAMA, MISTRAL):
        values = {key: value for key, value in {**base, **changes}.items() if value is not ABSENT}
        if base is MISTRAL and changes.keys() & {"architectures", "num_key_value_heads"}:
            continue  # its own below
        (tmp_path / "config.json").write_text(json.dumps(values))
        ours, theirs = ModelConfig.from_folder(tmp_path), AutoConfig.from_pretrained(tmp_path)
        assert (ours.num_layers, ours.hidden_size, ours.intermediate_size, ours.num_heads, ours.num_kv_heads) == (
            theirs.num_hidden_layers, theirs.hidden_size, theirs.intermediate_size, theirs.num_attention_heads,
            theirs.num_key_value_heads,
        )  # fmt: skip
        assert (ours.head_dim, ours.vocab_size, ours.norm_eps, ours.tie_word_embeddings) == (
            theirs.head_dim, theirs.vocab_size, theirs.rms_norm_eps, theirs.tie_word_embeddings,
        )  # fmt: skip
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert getattr(theirs, "sliding_window", None) is None


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["Phi3ForCausalLM"]}, "architectures"),
    ({"architectures": ABSENT}, "architectures = None"),
    ({"architectures": None}, "architectures"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": []}, "architectures"),
    ({"architectures": [["LlamaForCausalLM"], {}, None, 1]}, "architectures"),
    ({"architectures": {"LlamaForCausalLM": 1}}, "architectures"),
    ({"model_type": "phi3"}, "model_type = 'phi3'"),
    ({"model_type": ABSENT}, "model_type = None, expected 'llama'"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 4096}, "sliding_window = 4096, expected null"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"quantization_config": []}, "quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_act": None}, "hidden_act"),
    ({"hidden_act": ""}, "hidden_act"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type = 'longrope'"),
    ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope_type = None"),
    ({"rope_scaling": {"rope_type": ""}}, "rope_type = ''"),
    ({"rope_scaling": {"rope_type": []}}, "rope_type = []"),
    ({"rope_scaling": {"type": {"linear": 1}}}, "RoPE"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "mrope"}}, "rope_type = 'mrope'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, "the same for all layers"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"head_dim": 15}, "head_dim = 15, expected an even number"),
]


@pytest.mark.parametrize(("changes", "words"), UNSUPPORTED)
def test_unsupported_models(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(LLAMA | changes)
    assert str(caught.value).startswith("a/config.json: got ")
    assert words in str(caught.value)
    for supported in ("LlamaForCausalLM", "MistralForCausalLM without sliding window", "llama3"):
        assert supported in str(caught.value)


def test_mistral_without_the_key_has_a_sliding_window() -> None:
    """transformers takes 4096 where config.json is silent."""
    with pytest.raises(UnsupportedModelError, match="sliding_window = 4096"):
        read(MISTRAL | {"sliding_window": ABSENT})
    assert read(MISTRAL).architecture == "MistralForCausalLM"


def test_mistral_without_the_key_has_eight_heads_of_keys_and_values() -> None:
    """So transformers has it, which takes no null there."""
    assert read(MISTRAL | {"num_key_value_heads": ABSENT, "num_attention_heads": 16}).num_kv_heads == 8
    with pytest.raises(ConfigError, match="num_key_value_heads = None"):
        read(MISTRAL | {"num_key_value_heads": None})


ODD: list[Any] = [None, True, "64", 64.0, [64], {"a": 64}, 0, -1, 2**31, 10**400, math.nan, math.inf]
WRONG: list[tuple[dict[str, Any], str]] = [
    *[({name: value}, name) for name in ("hidden_size", "num_attention_heads", "vocab_size") for value in ODD],
    *[({"num_key_value_heads": value}, "num_key_value_heads") for value in ODD if value is not None],
    *[({"head_dim": value}, "head_dim") for value in ODD if value is not None],
    *[({"max_position_embeddings": value}, "max_position_embeddings") for value in ODD],
    *[({"rms_norm_eps": value}, "rms_norm_eps")
      for value in (None, True, 1, 0.0, -1e-5, "1e-5", math.nan, math.inf, [1e-5], 10**400)],
    *[({"tie_word_embeddings": value}, "tie_word_embeddings") for value in (None, 1, "false", [])],
    *[({"attention_bias": value}, "attention_bias") for value in (None, 0, "no")],
    *[({name: value}, name) for name in ("rope_scaling", "rope_parameters") for value in ([1], "linear", 1, True)],
    *[({"rope_theta": value}, "rope_theta") for value in (None, "1e4", 0, -1, 1, math.nan, math.inf, 10**400, [1e4])],
    *[({"rope_scaling": LLAMA3 | {name: value}}, name) for name in ("factor", "low_freq_factor", "high_freq_factor")
      for value in (None, "8", 0, -1.0, math.nan, True)],
    ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "yarn"}}, "factor"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor = 4.0, expected less than high_freq_factor"),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}}, "original_max_position_embeddings"),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "8192"}}, "original_max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "beta_fast"),
    ({"num_hidden_layers": LAYERS_MAX + 1}, "num_hidden_layers"),
    ({"num_hidden_layers": ABSENT}, "num_hidden_layers = None, expected a whole number from 1"),
    ({"intermediate_size": ABSENT}, "intermediate_size"),
    ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size = 64, expected a multiple of num_"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3, expected a divisor of num_attention_heads 4"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_wrong_values(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(LLAMA | changes)
    message = str(caught.value)
    assert message.startswith("a/config.json: got ")
    assert words in message
    assert "expected" in message
    assert "config.json again" in message
    assert len(message) < 600


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["llama3", "linear", "yarn", "silu", "llama", "LlamaForCausalLM"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta", "x"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
FIELDS = [
    *LLAMA, "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "hidden_act", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "quantization_config", "max_position_embeddings", "partial_rotary_factor",
]  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
@settings(max_examples=500, deadline=None)
def test_any_value_anywhere_is_read_or_refused_with_a_typed_error(changes: dict[str, Any]) -> None:
    try:
        config = read(LLAMA | changes)
    except ConfigError as error:
        assert str(error).startswith("a/config.json: got ")
        assert str(error).isprintable()
        return
    shapes = [shape for kind in ("mha", "ffn") for shape in config.sublayer_shapes(kind).values()]
    assert all(n > 0 for shape in shapes for n in shape)


def test_config_files(tmp_path: Path) -> None:
    def refused(*words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            ModelConfig.from_folder(tmp_path)
        assert all(word in str(caught.value) for word in (str(tmp_path / "config.json"), *words))

    refused("does not exist", "mhaffn pack")
    path = tmp_path / "config.json"
    for content in (b"", b"{", b"\xff", b"[" * 10**5, b'{"a": 1, "a": 2}'):
        path.write_bytes(content)
        refused("not valid JSON", "Fetch the model again")
    for content in (b"[]", b"null", b"3"):
        path.write_bytes(content)
        refused("expected a JSON object")
    path.write_bytes(b"{}")
    refused("architectures")
    path.unlink()
    path.mkdir()
    refused("directory")


@pytest.mark.timeout(10)
def test_a_pipe_is_no_config_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="expected a regular file"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("14GiB", 14 << 30), ("14gib", 14 << 30), ("14 GiB ", 14 << 30), ("14G", 14 << 30),
        ("14GB", 14 * 10**9), ("14Gi", 14 << 30),
        ("1.5k", 1536), (".5M", 1 << 19), ("2.", 2), ("0", 0), ("7B", 7), ("1TB", 10**12), ("1TiB", 1 << 40),
        (0, 0), (2**53 + 1, 2**53 + 1), ("9007199254740993", 2**53 + 1), (5.9, 5), (BYTES_MAX, BYTES_MAX),
    ],
)  # fmt: skip
def test_sizes(text: Any, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "GiB", "-1", "1e9", "nan", "inf", "14GiBB", "14 G i B", "1,5G", "1_000", "0x10", "5ib", "١٤", "all",
     "1 2", "9" * 50, "8388608TiB", "9" * 5000, -1, -0.5, math.nan, math.inf, 2**63, 10**400, True, None, [1], b"1"],
)  # fmt: skip
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"as a size, expected a number with KiB, MiB, GiB or TiB"):
        parse_bytes(text)


@given(text=st.text(alphabet="0123456789.kKmMgGtTiIbB -+e_", max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    with suppress(ConfigError):
        assert 0 <= parse_bytes(text) <= BYTES_MAX


@given(nbytes=st.integers(0, 2**62))
@settings(max_examples=300, deadline=None)
def test_sizes_round_trip(nbytes: int) -> None:
    assert parse_bytes(nbytes) == parse_bytes(str(nbytes)) == nbytes
    shown = format_bytes(nbytes)
    assert abs(parse_bytes(shown) - nbytes) <= nbytes * 0.005 + 1
    assert float(shown.split()[0]) < 1024 or shown.endswith("TiB")
    assert float(shown.split()[0]) >= 1 or nbytes == 0


def test_every_error_is_of_one_tree() -> None:
    assert issubclass(UnsupportedModelError, ConfigError)
    assert issubclass(ConfigError, MhaffnError)
