"""A GGUF file as the source of a pack: dequantised or kept, renamed, its rotary rows put back in order.

GGUF stores the rows of wq and wk so that llama.cpp's interleaved RoPE is right; Hugging Face's RoPE
rotates halves. Undoing the permutation is what keeps a model right beyond its first few tokens.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhaffn.config import SUPPORTED, ModelConfig, order
from mhaffn.errors import ConfigError, CorruptFileError, StoreError, UnsupportedModelError
from mhaffn.files import shown
from mhaffn.store import gguf_blocks as blocks
from mhaffn.store.format import RESIDENT_NAMES, tensor_name, tensor_shapes
from mhaffn.store.gguf_header import check_header

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

    from mhaffn.formats import Format
    from mhaffn.quantized import Quantized

WEIGHT_NAMES = {
    "mha": {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "norm": "attn_norm"},
    "ffn": {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down", "norm": "ffn_norm"},
}
RESIDENT = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
ROPE_FACTORS = "rope_freqs.weight"
NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "expert_count": (0,),
}


class GgufSource:
    """One GGUF file of the llama architecture. Needs the ``gguf`` package (``pip install mhaffn[gguf]``)."""

    dtype = "bfloat16"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ConfigError(f"{path}: reading GGUF needs the gguf package: pip install 'mhaffn[gguf]'") from None
        try:
            check_header(path)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}. Give a GGUF file or a model folder.") from error
        try:
            reader = GGUFReader(str(path))
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the parser meets hostile bytes with whatever numpy or struct raises
            raise CorruptFileError(f"{path} is no readable GGUF file ({error!r:.200}). Fetch it again.") from error
        _refuse_options(path, reader)
        self.config = ModelConfig.from_dict(self.config_values(), where=str(path))
        self._names, self._shapes = _names(self.config), tensor_shapes(self.config)
        self._check_tensors()

    def _check_tensors(self) -> None:
        for name, stored_name in self._names.items():
            if stored_name not in self._tensors:
                raise CorruptFileError(
                    f"{self.path}: got no tensor {stored_name}, expected one of shape {list(self._shapes[name])}. "
                    f"Parts of a split GGUF must be merged first; otherwise fetch the file again."
                )
            shape = _shape(self._tensors[stored_name])
            if shape != self._shapes[name]:
                raise CorruptFileError(
                    f"{self.path}: got tensor {stored_name} of shape {list(shape)}, expected "
                    f"{list(self._shapes[name])}. Fetch the file again."
                )
        unknown = sorted(self._tensors.keys() - set(self._names.values()) - {ROPE_FACTORS})
        if unknown:
            raise UnsupportedModelError(
                f"{self.path}: got tensor {shown(unknown[0])}, expected none such in a Llama. Supported: {SUPPORTED}."
            )

    def fingerprint(self) -> list[list[str | int]]:
        try:
            status = self.path.stat()
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read any more: {error.strerror}. Fetch it again.") from error
        return [[self.path.name, status.st_size, status.st_mtime_ns]]

    def tensor(self, name: str) -> torch.Tensor:
        import torch
        from gguf.quants import dequantize

        stored, rows = self._tensors[self._names[name]], self._rows(name)
        try:
            values = dequantize(rows, stored.tensor_type)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{self.path}: got tensor {stored.name} of type {stored.tensor_type.name}, expected one that the gguf "
                f"package dequantises. Pack another quantisation of the model."
            ) from None
        return torch.from_numpy(np.array(values.reshape(self._shapes[name]), dtype=np.float32))

    def format(self, name: str) -> Format | None:
        shape = self._shapes[name]
        if len(shape) != 2 or name in RESIDENT_NAMES.values():
            return None
        return blocks.format(self._tensors[self._names[name]].tensor_type.name, shape[1])

    def weight(self, name: str) -> torch.Tensor | Quantized:
        if self.format(name) is None:
            return self.tensor(name)
        stored = self._tensors[self._names[name]]
        where = f"{self.path}: {stored.name}"
        if stored.tensor_type.name in blocks.KEPT:
            return blocks.keep(stored.tensor_type.name, self._rows(name), self._shapes[name][1], where)
        return blocks.nearest(self.tensor(name), where)

    def remarks(self) -> list[str]:
        kinds = Counter(
            self._tensors[stored].tensor_type.name for name, stored in self._names.items() if self.format(name)
        )
        return [
            f"{count} matrices of type {kind} were rounded anew, to int8 in groups of {blocks.GROUP}"
            for kind, count in kinds.items()
            if kind not in blocks.KEPT
        ]

    def _rows(self, name: str) -> np.ndarray:
        """What is stored for each row, ``[N, …]``, with the rows of wq and wk back in order."""
        stored: np.ndarray = self._tensors[self._names[name]].data
        if name.endswith("q_proj.weight"):
            return _undo_rotary_rows(stored, self.config.num_heads)
        if name.endswith("k_proj.weight"):
            return _undo_rotary_rows(stored, self.config.num_kv_heads)
        return stored

    def config_values(self) -> dict[str, Any]:
        return dict(self._config_values)

    @cached_property
    def _config_values(self) -> dict[str, Any]:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as error:  # transformers raises many kinds for a GGUF it does not know
            raise UnsupportedModelError(
                f"{self.path}: transformers finds no configuration in it: {error}. Supported: {SUPPORTED}."
            ) from error
        values: dict[str, Any] = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        architecture = ARCHITECTURES.get(config.model_type)
        if architecture is None:
            raise UnsupportedModelError(
                f"{self.path}: got architecture {shown(config.model_type)}, expected llama. Supported: {SUPPORTED}."
            )
        values["architectures"] = [architecture]
        values["tie_word_embeddings"] = RESIDENT["head"] not in self._tensors
        if ROPE_FACTORS in self._tensors:
            factors = np.asarray(self._tensors[ROPE_FACTORS].data, dtype=np.float64).reshape(-1)
            pairs = ModelConfig.from_dict(values, where=str(self.path)).head_dim // 2
            theta = float(config.rope_parameters["rope_theta"])
            values["rope_parameters"] = _llama3_rope(self.path, factors, pairs, theta)
        return values

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        from transformers import AutoTokenizer, GenerationConfig

        ids = {name: self._config_values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        with tempfile.TemporaryDirectory() as scratch:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
                tokenizer.save_pretrained(scratch)
                known = {name: value for name, value in ids.items() if value is not None}
                GenerationConfig(**known).save_pretrained(scratch)
            except Exception as error:  # transformers raises many kinds for a vocabulary it does not know
                raise UnsupportedModelError(
                    f"{self.path}: transformers finds no tokenizer in it: {error!r:.300}. Pack the original model."
                ) from error
            for path in sorted(Path(scratch).iterdir()):
                yield path.name, path.read_bytes()


def _refuse_options(path: Path, reader: GGUFReader) -> None:
    """Raises for what a GGUF can ask of a Llama and transformers would pass over in silence."""
    for key, field in reader.fields.items():
        expected = NEUTRAL_OPTIONS.get(key.partition(".")[2])
        if expected is not None and field.contents() not in expected:
            raise UnsupportedModelError(
                f"{path}: got {key} = {shown(field.contents())}, expected {expected[0]!r}. Supported: {SUPPORTED}."
            )


def _names(config: ModelConfig) -> dict[str, str]:
    """GGUF's tensor names by Hugging Face's."""
    names = {RESIDENT_NAMES[name]: RESIDENT[name] for name in config.resident_shapes()}
    for sublayer in order(config.num_layers):
        for weight, name in WEIGHT_NAMES[sublayer.kind].items():
            names[tensor_name(sublayer, weight)] = f"blk.{sublayer.layer}.{name}.weight"
    return names


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _undo_rotary_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from pairs (0, K/2), (1, K/2+1), … back to 0, 1, …, K-1."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _llama3_rope(path: Path, factors: np.ndarray, pairs: int, theta: float) -> Mapping[str, Any]:
    """The llama3 scaling whose frequency divisors are ``factors``; they must fit it exactly.

    GGUF keeps the divisors, not the parameters. Llama 3.1 and later share all parameters but the factor.
    """
    factor = float(factors.max(initial=1.0))
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelengths = 2 * np.pi * theta ** (np.arange(pairs) / pairs)
    blend = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{path}: got {len(factors)} RoPE divisors, {np.array2string(factors, threshold=4)}, in {ROPE_FACTORS}, "
            f"expected those of a llama3 scaling for {pairs}. Pack the original model instead."
        )
    return parameters
