"""What mhaffn must know of a model before it opens a single weight: config.json, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mhaffn.errors import ConfigError, UnsupportedModelError
from mhaffn.files import read_json_object, shown

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
SUPPORTED = (
    "LlamaForCausalLM (Llama 2, 3, 3.1, 3.2, SmolLM2 and others of the same shape) and "
    "MistralForCausalLM without sliding window; silu activation, no biases, unquantised weights, "
    f"RoPE of type {', '.join(ROPE_TYPES)}"
)
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
# What transformers takes where config.json is silent.
_DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
DTYPES = ("bfloat16", "float16", "float32")
LAYERS_MAX = 4096

Kind = Literal["mha", "ffn"]
KINDS: tuple[Kind, Kind] = ("mha", "ffn")


class Sublayer(NamedTuple):
    """The unit of placement, transfer and timing."""

    layer: int
    kind: Kind

    @property
    def key(self) -> str:
        """The name used in manifests: ``"<layer>.<kind>"``."""
        return f"{self.layer}.{self.kind}"

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"


def order(num_layers: int) -> Iterator[Sublayer]:
    """The sublayers of one pass, in the order it visits them."""
    for layer in range(num_layers):
        for kind in KINDS:
            yield Sublayer(layer, kind)


FEW_BITS = {"quant_method": "mhaffn"}
"""``quantization_config`` of a packed store with weights in few bits: so other tools refuse it, and do not take scaled
whole numbers for weights."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's dimensions, as its config.json gives them.

    In the dimension alphabet: D ``hidden_size``, F ``intermediate_size``, HQ ``num_heads``,
    H ``num_kv_heads``, K ``head_dim``.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @staticmethod
    def from_folder(folder: str | Path) -> ModelConfig:
        """Reads ``folder/config.json``; raises :class:`ConfigError` or :class:`UnsupportedModelError`."""
        path = Path(folder) / "config.json"
        try:
            values = read_json_object(path, ConfigError, "Fetch the model again.")
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: {folder} is not a model folder. Give a Hugging Face folder with "
                f"config.json and safetensors files, or a folder written by `mhaffn pack`."
            ) from None
        return ModelConfig.from_dict(values, where=str(path))

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Checks the fields of a Hugging Face config; ``where`` names it in errors."""
        read = _Fields(values, where)
        architecture = read.architecture()
        defaults = _DEFAULTS[ARCHITECTURES[architecture]]
        read.refuse_options(defaults["sliding_window"])
        read.check_rope()
        heads, hidden = read.count("num_attention_heads"), read.count("hidden_size")
        kv_default = defaults["num_key_value_heads"]
        kv_heads = read.count("num_key_value_heads", kv_default, null=heads if kv_default is None else None)
        if heads % kv_heads:
            raise read.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
        if hidden % heads and (values.get("head_dim") is None or architecture == "LlamaForCausalLM"):
            raise read.error("hidden_size", hidden, f"a multiple of num_attention_heads {heads}")
        head_dim = read.count("head_dim", hidden // heads, null=hidden // heads)
        if head_dim % 2:
            raise read.error("head_dim", head_dim, "an even number: rotary embeddings need one", UnsupportedModelError)
        return ModelConfig(
            architecture=architecture,
            num_layers=read.count("num_hidden_layers", most=LAYERS_MAX),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=read.count("vocab_size"),
            norm_eps=read.epsilon("rms_norm_eps", 1e-6),
            max_position_embeddings=read.count("max_position_embeddings", defaults["max_position_embeddings"]),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
        )

    def sublayer_shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes ``[out, in]`` of a sublayer's weights by Meta's names; ``kind`` is "mha" or "ffn"."""
        d, f, k = self.hidden_size, self.intermediate_size, self.head_dim
        if kind == "mha":
            q, kv = self.num_heads * k, self.num_kv_heads * k
            return {"wq": (q, d), "wk": (kv, d), "wv": (kv, d), "wo": (d, q), "norm": (d,)}
        return {"w1": (f, d), "w3": (f, d), "w2": (d, f), "norm": (d,)}

    def resident_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is always resident: ``embedding``, ``norm`` and, unless tied, ``head``."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {"embedding": table, "norm": (self.hidden_size,)}
        return shapes if self.tie_word_embeddings else {**shapes, "head": table}


class _Fields:
    """Typed access to a config's values; every error names the file, the value got and the one expected."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, name: str, value: object, expected: str, kind: type[ConfigError] = ConfigError) -> ConfigError:
        advice = f"Supported: {SUPPORTED}." if kind is UnsupportedModelError else "Fetch the model's config.json again."
        return kind(f"{self.where}: got {name} = {shown(value)}, expected {expected}. {advice}")

    def architecture(self) -> str:
        names = self.values.get("architectures")
        known = (
            [name for name in names if isinstance(name, str) and name in ARCHITECTURES]
            if isinstance(names, list)
            else []
        )
        if not known:
            raise self.error("architectures", names, f"one of {', '.join(ARCHITECTURES)}", UnsupportedModelError)
        model_type, expected = self.values.get("model_type"), ARCHITECTURES[known[0]]
        if model_type != expected:
            raise self.error("model_type", model_type, f"{expected!r}, as of a {known[0]}", UnsupportedModelError)
        return known[0]

    def refuse_options(self, sliding_window: int | None) -> None:
        for name in ("attention_bias", "mlp_bias"):
            if self.flag(name):
                raise self.error(name, True, "false", UnsupportedModelError)
        if self.values.get("quantization_config") not in (None, {}, FEW_BITS):
            packing = (
                f"none: `mhaffn pack {Path(self.where).parent} DST` first, which keeps AWQ, GPTQ, compressed-tensors"
            )
            raise self.error("quantization_config", self.values["quantization_config"], packing, UnsupportedModelError)
        window = self.values.get("sliding_window", sliding_window)
        if window is not None:
            raise self.error("sliding_window", window, "null", UnsupportedModelError)
        activation = self.values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.error("hidden_act", activation, "'silu'", UnsupportedModelError)

    def check_rope(self) -> None:
        for name in ("rope_scaling", "rope_parameters"):
            if not isinstance(self.values.get(name), Mapping | None):
                raise self.error(name, self.values[name], "an object or null")
        rope = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise self.error("RoPE parameters", rope, "the same for all layers", UnsupportedModelError)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            raise self.error("rope_type", rope_type, f"one of {', '.join(ROPE_TYPES)}", UnsupportedModelError)
        partial = rope.get("partial_rotary_factor", self.values.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise self.error("partial_rotary_factor", partial, "1", UnsupportedModelError)
        numbers = _Fields({"rope_theta": self.values.get("rope_theta", 1e4), **rope}, self.where)
        for name in ("rope_theta", *_ROPE_REQUIRED[rope_type]):
            numbers.positive(name)
        for name in _ROPE_OPTIONAL:
            if rope.get(name) is not None:
                numbers.positive(name)
        if rope.get("original_max_position_embeddings", 1) is not None or rope_type in ("llama3", "yarn"):
            numbers.positive("original_max_position_embeddings", 1)
        if numbers.positive("rope_theta") <= 1:
            raise self.error("rope_theta", numbers.values["rope_theta"], "more than 1")
        if rope_type == "llama3" and numbers.positive("low_freq_factor") >= numbers.positive("high_freq_factor"):
            raise self.error("low_freq_factor", rope["low_freq_factor"], "less than high_freq_factor")

    def count(self, name: str, default: int | None = None, *, null: int | None = None, most: int = 2**31 - 1) -> int:
        """A whole number from 1 to ``most``; ``default`` where it is absent, ``null`` where it is null."""
        value = self.values.get(name, default)
        value = null if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self.error(name, value, f"a whole number from 1 to {most}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(name, value, "a positive number")
        return float(value)

    def epsilon(self, name: str, default: float) -> float:
        """A float: transformers takes no whole number here."""
        value = self.values.get(name, default)
        if not isinstance(value, float) or not 0 < value < 1:
            raise self.error(name, value, "a number between 0 and 1, as 1e-05")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value


BYTES_MAX = 2**63 - 1
_SIZE = re.compile(r"(\d{1,19}\.?\d{0,19}|\.\d{1,19})\s*(?:([kmgt])(?:ib?)?|([kmgt])b|b?)", re.ASCII)
_SCALES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str | int | float) -> int:
    """Bytes from ``"14GiB"``, ``"14G"`` (binary), ``"14GB"`` (decimal) or a plain number of bytes.

    Raises :class:`ConfigError` for anything else, negative numbers and more than 2**63 - 1 bytes too.
    """
    nbytes = _parse_size(text) if isinstance(text, str) else text
    if isinstance(nbytes, bool) or not isinstance(nbytes, int | float) or not 0 <= nbytes <= BYTES_MAX:
        raise ConfigError(f"got {shown(text)} as a size, expected a number with KiB, MiB, GiB or TiB, as in 14GiB")
    return int(nbytes)


def _parse_size(text: str) -> int | float | None:
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None:
        return None
    digits, binary, decimal = found.groups()
    scale: int = 1000 ** _SCALES[decimal] if decimal else 1024 ** _SCALES[binary or ""]
    number = int(digits) if digits.isdigit() else float(digits)
    return number * scale


def format_bytes(nbytes: float) -> str:
    """``nbytes`` in the largest binary unit that keeps it at 1 or more."""
    for unit, digits in (("B", 0), ("KiB", 2), ("MiB", 2), ("GiB", 2)):
        if abs(round(nbytes, digits)) < 1024:
            return f"{nbytes:.{digits}f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
