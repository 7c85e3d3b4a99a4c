"""A GGUF file as the source of a pack: dequantised, renamed, its rotary rows put back in order.

GGUF stores the rows of wq and wk so that llama.cpp's interleaved RoPE is right; Hugging Face's RoPE
rotates halves. Undoing the permutation is what keeps a model right beyond its first few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhaffn.config import ModelConfig, order
from mhaffn.errors import ConfigError, CorruptFileError, StoreError, UnsupportedModelError
from mhaffn.store.format import RESIDENT_NAMES, tensor_name

if TYPE_CHECKING:
    import torch

WEIGHT_NAMES = {
    "mha": {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "norm": "attn_norm"},
    "ffn": {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down", "norm": "ffn_norm"},
}
RESIDENT = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
ROPE_FACTORS = "rope_freqs.weight"


class GgufSource:
    """One GGUF file of the llama architecture. Needs the ``gguf`` package (``pip install mhaffn[gguf]``)."""

    dtype = "bfloat16"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ConfigError(f"{path}: reading GGUF needs the gguf package: pip install 'mhaffn[gguf]'") from None
        if not path.is_file():
            raise StoreError(f"{path} does not exist")
        try:
            reader = GGUFReader(str(path))
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the parser meets hostile bytes with whatever numpy or struct raises
            raise CorruptFileError(f"{path} is no readable GGUF file ({error!r:.200}); fetch it again") from error
        self.config = ModelConfig.from_dict(self.config_values(), where=str(path))
        self._names = _names(self.config)
        missing = [name for name in self._names.values() if name not in self._tensors]
        if missing:
            raise CorruptFileError(f"{path}: tensors are missing: {', '.join(missing[:3])}")

    def fingerprint(self) -> list[list[str | int]]:
        status = self.path.stat()
        return [[self.path.name, status.st_size, status.st_mtime_ns]]

    def tensor(self, name: str) -> torch.Tensor:
        import torch
        from gguf.quants import dequantize

        stored = self._tensors[self._names[name]]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{self.path}: tensor {stored.name} is of type {stored.tensor_type.name}, which cannot be dequantised"
            ) from None
        shape = tuple(int(n) for n in reversed(stored.shape))
        values = values.reshape(shape)
        if name.endswith("q_proj.weight"):
            values = _undo_rotary_rows(values, self.config.num_heads)
        elif name.endswith("k_proj.weight"):
            values = _undo_rotary_rows(values, self.config.num_kv_heads)
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def config_values(self) -> dict[str, Any]:
        return dict(self._config_values)

    @cached_property
    def _config_values(self) -> dict[str, Any]:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as error:  # transformers raises many kinds for a GGUF it does not know
            raise UnsupportedModelError(f"{self.path}: transformers finds no configuration in it: {error}") from error
        values: dict[str, Any] = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        architecture = ARCHITECTURES.get(config.model_type)
        if architecture is None:
            raise UnsupportedModelError(f"{self.path}: got architecture {config.model_type!r}, expected llama")
        values["architectures"] = [architecture]
        values["tie_word_embeddings"] = RESIDENT["head"] not in self._tensors
        if ROPE_FACTORS in self._tensors:
            factors = np.asarray(self._tensors[ROPE_FACTORS].data, dtype=np.float64).reshape(-1)
            theta = float((values.get("rope_parameters") or values).get("rope_theta", 10000.0))
            values["rope_parameters"] = _llama3_rope(self.path, factors, theta)
        return values

    def write_side_files(self, folder: Path) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name).save_pretrained(folder)
        ids = {name: self._config_values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**{name: value for name, value in ids.items() if value is not None}).save_pretrained(folder)


def _names(config: ModelConfig) -> dict[str, str]:
    """GGUF's tensor names by Hugging Face's."""
    names = {RESIDENT_NAMES[name]: RESIDENT[name] for name in config.resident_shapes()}
    for sublayer in order(config.num_layers):
        for weight, name in WEIGHT_NAMES[sublayer.kind].items():
            names[tensor_name(sublayer, weight)] = f"blk.{sublayer.layer}.{name}.weight"
    return names


def _undo_rotary_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from pairs (0, K/2), (1, K/2+1), … back to 0, 1, …, K-1."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _llama3_rope(path: Path, factors: np.ndarray, theta: float) -> Mapping[str, Any]:
    """The llama3 scaling whose frequency divisors are ``factors``; they must fit it exactly.

    GGUF keeps the divisors, not the parameters. Llama 3.1 and later share all parameters but the factor.
    """
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    blend = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - blend) / parameters["factor"] + blend)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise UnsupportedModelError(f"{path}: {ROPE_FACTORS} is no llama3 RoPE scaling; pack the original instead")
    return parameters
