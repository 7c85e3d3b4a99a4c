"""What mhaffn must know of a model before it opens a single weight: config.json, checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mhaffn.errors import ConfigError, UnsupportedModelError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
SUPPORTED = (
    "LlamaForCausalLM (Llama 2, 3, 3.1, 3.2, SmolLM2 and others of the same shape) and "
    "MistralForCausalLM without sliding window; silu activation, no biases, unquantised weights, "
    f"RoPE of type {', '.join(ROPE_TYPES)}"
)
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
DTYPES = ("bfloat16", "float16", "float32")

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
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: {folder} is not a model folder. Give a Hugging Face folder with "
                f"config.json and safetensors files, or a folder written by `mhaffn pack`."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}. Fetch the file again.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: got a JSON {type(values).__name__}, expected an object")
        return ModelConfig.from_dict(values, where=str(path))

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Checks the fields of a Hugging Face config; ``where`` names it in errors."""
        read = _Fields(values, where)
        architecture = read.architecture()
        read.refuse_options()
        heads = read.count("num_attention_heads")
        hidden = read.count("hidden_size")
        kv_heads = read.count("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        head_dim = read.count("head_dim", hidden // heads)
        if head_dim % 2:
            raise UnsupportedModelError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even one")
        return ModelConfig(
            architecture=architecture,
            num_layers=read.count("num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=read.count("vocab_size"),
            norm_eps=read.positive("rms_norm_eps", 1e-6),
            max_position_embeddings=read.count("max_position_embeddings", 2048),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
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
    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def architecture(self) -> str:
        names = self.values.get("architectures") or []
        for name in names if isinstance(names, list) else []:
            if name in ARCHITECTURES:
                return str(name)
        raise UnsupportedModelError(
            f"{self.where}: got architectures {names!r} (model_type {self.values.get('model_type')!r}). "
            f"Supported: {SUPPORTED}."
        )

    def refuse_options(self) -> None:
        values = self.values
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{self.where}: got {rope!r} as RoPE parameters, expected an object")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        refused = {
            "attention_bias": values.get("attention_bias"),
            "mlp_bias": values.get("mlp_bias"),
            "sliding_window": "sliding_window" in values and values.get("sliding_window"),
            "quantization_config": values.get("quantization_config"),
            "hidden_act": values.get("hidden_act", "silu") not in ("silu", "swish") and values.get("hidden_act"),
            "rope_type": rope_type not in ROPE_TYPES and rope_type,
        }
        for option, value in refused.items():
            if value:
                raise UnsupportedModelError(f"{self.where}: got {option} = {value!r}. Supported: {SUPPORTED}.")

    def count(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConfigError(f"{self.where}: got {name} = {value!r}, expected a positive whole number")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self.where}: got {name} = {value!r}, expected a positive number")
        return float(value)


_UNITS = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_DECIMAL_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(text: str | int | float) -> int:
    """Bytes from ``"14GiB"``, ``"14G"`` (binary), ``"14GB"`` (decimal) or a plain number of bytes."""
    if not isinstance(text, str):
        number, unit = float(text), ""
    else:
        stripped = text.strip().lower()
        digits = stripped.rstrip("kmgtib ")
        number, unit = _number(digits, text), stripped[len(digits) :].strip()
    scale = _DECIMAL_UNITS.get(unit) or _UNITS.get(unit.removesuffix("ib"))
    if scale is None or not 0 <= number < float("inf"):
        raise ConfigError(f"got {text!r} as a size, expected a number with KiB, MiB, GiB or TiB, as in 14GiB")
    return int(number * scale)


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise ConfigError(
            f"got {text!r} as a size, expected a number with KiB, MiB, GiB or TiB, as in 14GiB"
        ) from None


def format_bytes(nbytes: float) -> str:
    """``nbytes`` in the largest binary unit that keeps it at 1 or more."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
