"""Quantised checkpoints as the source of a pack: each layout kept at its width, hostile tensors refused.

AWQ's and GPTQ's packers are written out here, so that these tests need no registry: test_interop.py compares them with
the libraries' own, byte for byte. compressed-tensors and gguf pack for themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import mhaffn
from mhaffn.errors import CorruptFileError, MhaffnError, UnsupportedModelError
from mhaffn.formats import GROUPS
from mhaffn.quantized import Quantized, dequantize
from mhaffn.store import pack
from mhaffn.store.awq import PARTS
from mhaffn.store.source import Source, open_source
from tests.store.models import CONFIG, random_weights, write_model
from tests.store.test_gguf import permuted, write_gguf

WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
MATRIX = "model.layers.1.mlp.down_proj.weight"
Packer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""A weight to the tensors that stand for it by suffix, and the values that they stand for."""


def is_matrix(name: str) -> bool:
    return name.endswith("_proj.weight")


def write(folder: Path, packer: Packer, config: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    """A folder whose layers are quantised by ``packer``; gives the values it stands for."""
    weights = write_model(folder, dtype=torch.float16, **(WIDTHS | changes))
    stored, expected = {}, {}
    for name, weight in weights.items():
        if is_matrix(name):
            parts, expected[name] = packer(weight.float())
            stored |= {f"{name.removesuffix('.weight')}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name] = expected[name] = weight
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return expected


def check(source: Source, name: str, weight: Any) -> Quantized:
    """What the contract says of a record, and what its form promised."""
    form = source.format(name)
    assert isinstance(weight, Quantized) and form is not None
    n, d = weight.shape
    assert (form.name, form.group or d, form.zeros) == (weight.format, weight.group, weight.zeros is not None)
    assert weight.group in GROUPS or (weight.group == d and weight.format != "int4")
    assert weight.values.dtype == {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}[weight.format]
    for part in (weight.scales, weight.zeros):
        assert part is None or (part.shape == (n, d // weight.group) and str(part.dtype) == f"torch.{form.scale_dtype}")
        assert part is None or part.is_contiguous()
    assert weight.values.is_contiguous()
    return weight


def expect(folder: Path, expected: dict[str, Tensor], *, format: str, group: int | None = None) -> Source:
    """Every matrix kept, in ``format``, to the bit; everything else as it was."""
    source = open_source(folder)
    for name, values in expected.items():
        weight = source.weight(name)
        if not is_matrix(name):
            assert isinstance(weight, Tensor) and torch.equal(weight, values)
            continue
        kept = check(source, name, weight)
        assert kept.format == format and group in (None, kept.group)
        assert torch.equal(dequantize(kept, values.dtype), values), name
        assert torch.equal(source.tensor(name).to(values.dtype), values), name
    return source


def affine(weight: Tensor, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, D]``, scales and zero points ``[N, G]``, all that AWQ's and GPTQ's packers are given."""
    grouped = weight.view(weight.shape[0], -1, group)
    most = 2**bits - 1
    if symmetric:
        scales = (grouped.abs().amax(-1) / (most // 2)).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales = ((high - low) / most).half()
        zeros = (-low / scales).round().clamp(1, most)  # version 1 of GPTQ cannot store 0 beside others
    codes = ((grouped / scales.unsqueeze(-1).float()) + zeros.unsqueeze(-1)).round().clamp(0, most)
    return codes.view_as(weight).to(torch.int32), scales, zeros.to(torch.int32)


def values_of(codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    return ((codes - zeros[:, index]).float() * scales.float()[:, index]).half()


def awq(group: int = 128) -> Packer:
    def pack_columns(numbers: np.ndarray) -> Tensor:  # [R, N] → int32 [R, N / 8]
        packed = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
        for column in range(packed.shape[1]):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, column] |= numbers[:, column * 8 + place].astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(packed.view(np.int32))

    def packer(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales, zeros = affine(weight, group, 4, symmetric=False)
        index = torch.arange(weight.shape[1]) // group
        parts = {"qweight": pack_columns(codes.T.numpy()), "qzeros": pack_columns(zeros.T.numpy()), "scales": scales.T}
        return parts, values_of(codes, scales, zeros, index)

    return packer


def gptq(
    group: int = 128, bits: int = 4, symmetric: bool = True, first: bool = True, order: bool = True, bias: bool = False
) -> Packer:
    factor = 32 // bits

    def packer(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        index = torch.arange(columns) // min(group, columns)
        place = torch.arange(columns) if order else torch.randperm(columns, generator=torch.Generator().manual_seed(3))
        codes, scales, zeros = affine(weight[:, place], min(group, columns), bits, symmetric)
        back = place.argsort()
        codes, index = codes[:, back], index[back]
        numbers = codes.T.numpy().astype(np.uint32)
        qweight = np.zeros((columns // factor, rows), np.uint32)
        for row in range(qweight.shape[0]):
            for j in range(factor):
                qweight[row] |= numbers[row * factor + j] << np.uint32(bits * j)
        stored = zeros.T.numpy().astype(np.uint32)
        qzeros = np.zeros((stored.shape[0], rows // factor), np.uint32)
        for column in range(qzeros.shape[1]):
            for j in range(factor):
                qzeros[:, column] |= stored[:, column * factor + j] << np.uint32(bits * j)
        if first:  # as convert_gptq_v2_to_v1_format: one less in each number, taken off the whole word
            qzeros -= np.uint32(0x11111111 if bits == 4 else 0x01010101)
        parts = {
            "qweight": torch.from_numpy(qweight.view(np.int32)), "qzeros": torch.from_numpy(qzeros.view(np.int32)),
            "scales": scales.T, "g_idx": index.to(torch.int32),
        }  # fmt: skip
        if bias:
            parts["bias"] = torch.zeros(rows, dtype=torch.float16)
        return parts, values_of(codes, scales, zeros, index)

    return packer


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group: int, tmp_path: Path) -> None:
    expect(tmp_path, write(tmp_path, awq(group), AWQ | {"group_size": group}), format="int4", group=group)


@pytest.mark.parametrize(
    ("options", "config", "format", "group"),
    [
        ({}, {}, "int4", 128),
        ({"group": 32}, {"group_size": 32}, "int4", 32),
        ({"first": False}, {"checkpoint_format": "gptq_v2"}, "int4", 128),
        ({"symmetric": False}, {"sym": False}, "int4", 128),
        ({"symmetric": False, "first": False}, {"sym": False, "format": "gptq_v2"}, "int4", 128),
        ({"first": False}, {"format": "gptq_v2", "checkpoint_format": "gptq_v2"}, "int4", 128),
        ({"symmetric": False, "first": False}, {"sym": False, "checkpoint_format": "gptq_v2"}, "int4", 128),
        ({"group": 4096}, {"group_size": -1}, "int4", 256),  # a row's scale, for each group of it
        ({"bits": 8}, {"bits": 8}, "int8", 128),
        ({"bits": 8, "group": 4096}, {"bits": 8, "group_size": -1}, "int8", None),
        ({"bias": True}, {"desc_act": True}, "int4", 128),  # columns that turn out to be in order; a bias of zeros
    ],
)
def test_gptq(options: dict[str, Any], config: dict[str, Any], format: str, group: int | None, tmp_path: Path) -> None:
    expect(tmp_path, write(tmp_path, gptq(**options), GPTQ | config), format=format, group=group)


def test_gptq_of_the_first_version_borrows_across_numbers(tmp_path: Path) -> None:
    """A zero point of 0, less 1, takes from the next number in its word, and comes back exactly."""
    write(tmp_path, gptq(symmetric=False), GPTQ | {"sym": False})
    stored = load_file(tmp_path / "model.safetensors")
    name = MATRIX.replace("weight", "qzeros")
    zeros = np.full(stored[name].shape, 0x8F10F3A0, np.uint32)
    stored[name] = torch.from_numpy((zeros - np.uint32(0x11111111)).view(np.int32))
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    weight = open_source(tmp_path).weight(MATRIX)
    assert isinstance(weight, Quantized) and weight.zeros is not None
    assert weight.zeros[:8, 0].tolist() == [0, 10, 3, 15, 0, 1, 15, 8]


def test_gptq_with_columns_out_of_order_gives_its_values_only(tmp_path: Path) -> None:
    expected = write(tmp_path, gptq(order=False), GPTQ | {"desc_act": True})
    source = open_source(tmp_path)
    assert torch.equal(source.tensor(MATRIX).half(), expected[MATRIX])
    with pytest.raises(UnsupportedModelError, match=r"desc_act.*Quantise its values anew"):
        source.weight(MATRIX)


def compressed(scheme: dict[str, Any], format: str, dtype: torch.dtype = torch.bfloat16) -> Packer:
    """compressed-tensors' own compressor, and its own values."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(**scheme)
    compressor, whole = BaseCompressor.get_value_from_registry(format), QuantizationScheme(
        targets=["Linear"], weights=arguments
    )  # fmt: skip

    def packer(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, d = weight.shape
        if scheme["strategy"] == "tensor":
            grouped = weight.reshape(1, 1, -1)
        else:
            grouped = weight.view(n, -1, scheme.get("group_size") or d)
        span = 448.0 if scheme["type"] == "float" else 2 ** (scheme["num_bits"] - 1) - 1
        scales = (grouped.abs().amax(-1) / span).to(dtype)
        state = {"weight": weight.to(dtype), "weight_scale": scales.view(1) if scales.numel() == 1 else scales}
        if not scheme["symmetric"]:
            low, high = grouped.amin(-1), grouped.amax(-1)
            state["weight_scale"] = ((high - low) / 15).to(dtype)
            state["weight_zero_point"] = (-8 - low / state["weight_scale"]).round().clamp(-8, 7).to(torch.int8)
        parts = compressor.compress(state, whole)
        return parts, compressor.decompress(parts, whole)["weight"]

    return packer


def scheme(bits: int, strategy: str, **changes: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy} | changes


@pytest.mark.parametrize(
    ("weights", "format", "ours", "group"),
    [
        (scheme(4, "group", group_size=128), "pack-quantized", "int4", 128),
        (scheme(4, "group", group_size=32), "pack-quantized", "int4", 32),
        (scheme(4, "channel"), "pack-quantized", "int4", 256),
        (scheme(4, "group", group_size=128, symmetric=False), "pack-quantized", "int4", 128),
        (scheme(4, "channel", symmetric=False), "pack-quantized", "int4", 256),
        (scheme(8, "group", group_size=64), "pack-quantized", "int8", 64),
        (scheme(8, "channel"), "pack-quantized", "int8", None),
        (scheme(8, "channel"), "int-quantized", "int8", None),
        (scheme(8, "channel"), "naive-quantized", "int8", None),
        (scheme(8, "group", group_size=128), "naive-quantized", "int8", 128),
        (scheme(8, "tensor"), "naive-quantized", "int8", None),
        (scheme(8, "channel", type="float"), "float-quantized", "fp8", None),
        (scheme(8, "tensor", type="float"), "naive-quantized", "fp8", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_compressed_tensors(
    weights: dict[str, Any], format: str, ours: str, group: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    expect(tmp_path, write(tmp_path, compressed(weights, format, dtype), config), format=ours, group=group)


def by_hand(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """int4 in groups of 128 by compressed-tensors' formula, without the library: ``q + 8`` at bit ``4 (j mod 8)``."""
    grouped = weight.view(weight.shape[0], -1, 128)
    scales = (grouped.abs().amax(-1) / 7).half()
    q = (grouped / scales.unsqueeze(-1).float()).round().clamp(-8, 7).view_as(weight)
    words = ((q + 8).to(torch.int64).view(weight.shape[0], -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    packed = words.to(torch.uint32).view(torch.int32)
    parts = {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
    return parts, (q * scales.float().repeat_interleave(128, 1)).half()


def compressed_config(format: str, *weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": w} for i, w in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups} | changes


PACKED = compressed_config("pack-quantized", scheme(4, "group", group_size=128))


def test_compressed_tensors_by_hand_and_layers_left_alone(tmp_path: Path) -> None:
    expected = write(tmp_path, by_hand, PACKED)
    stored = load_file(tmp_path / "model.safetensors")
    module = MATRIX.removesuffix(".weight")
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(module)} | {
        MATRIX: expected[MATRIX]
    }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path)
    assert source.format(MATRIX) is None
    found = source.weight(MATRIX)
    assert isinstance(found, Tensor) and torch.equal(found, expected[MATRIX])
    other = MATRIX.replace("down", "up")
    assert torch.equal(dequantize(check(source, other, source.weight(other)), torch.float16), expected[other])


def test_a_quantised_folder_packs_to_floats_and_does_not_run_in_place(tmp_path: Path) -> None:
    expected = write(tmp_path / "model", awq(), AWQ)
    with pytest.raises(UnsupportedModelError) as caught:
        mhaffn.load(tmp_path / "model", device="cpu")
    assert f"mhaffn pack {tmp_path / 'model'} DST" in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="mhaffn pack"):
        mhaffn.store.Store.open(tmp_path / "model")
    source = open_source(tmp_path / "model")
    assert source.dtype == "float16" and "quantization_config" not in source.config_values()
    assert torch.equal(source.tensor(MATRIX), dequantize(source.weight(MATRIX)))  # type: ignore[arg-type]
    assert expected.keys() == {name for name in expected if source.weight(name) is not None}


Change = Callable[[dict[str, Tensor]], Any]
MODULE = MATRIX.removesuffix("weight")


def put(suffix: str, value: Callable[[Tensor], Tensor]) -> Change:
    def change(stored: dict[str, Tensor]) -> None:
        stored[MODULE + suffix] = value(stored[MODULE + suffix]).contiguous()

    return change


def with_value(bad: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = bad
        return tensor

    return change


HOSTILE: list[tuple[Packer, dict[str, Any], Change, type[MhaffnError], str]] = [
    (awq(), AWQ, put("scales", with_value(float("nan"))), CorruptFileError, "got nan, expected finite"),
    (awq(), AWQ, put("scales", with_value(float("inf"))), CorruptFileError, "got inf"),
    (awq(), AWQ, put("scales", lambda t: t[:3]), CorruptFileError, "got scales of shape"),
    (awq(), AWQ, put("scales", lambda t: t[:0]), CorruptFileError, "got scales of shape"),
    (awq(), AWQ, put("scales", lambda t: t.to(torch.int16)), CorruptFileError, "scales in I16, expected F16"),
    (awq(), AWQ, put("qzeros", lambda t: t[:2]), CorruptFileError, r"got qzeros of shape \[2, 32\], expected \[4, 32"),
    (awq(), AWQ, put("qweight", lambda t: t[:-1]), CorruptFileError, r"qweight of shape \[511, 32\], expected \[512"),
    (awq(), AWQ, put("qweight", lambda t: t.to(torch.int64)), CorruptFileError, "qweight in I64, expected I32"),
    (awq(), AWQ, lambda s: s.pop(MODULE + "qzeros"), CorruptFileError, "got no qzeros"),
    (awq(), AWQ, lambda s: [s.pop(MODULE + p) for p in PARTS], CorruptFileError, "no tensors of"),
    (awq(), AWQ, lambda s: s.update({MODULE + "bias": torch.ones(256)}), UnsupportedModelError, "bias"),
    (awq(), AWQ, lambda s: s.update({MODULE + "perm": torch.ones(2)}), UnsupportedModelError, "'perm'"),
    (awq(16), AWQ | {"group_size": 16}, lambda s: None, UnsupportedModelError, "groups of 16 columns, expected a mul"),
    (awq(), AWQ | {"version": "gemv"}, lambda s: None, UnsupportedModelError, "'gemv', expected 'gemm'"),
    (awq(), AWQ | {"bits": 3}, lambda s: None, UnsupportedModelError, "got bits = 3, expected 4"),
    (awq(), {"quant_method": "bitsandbytes"}, lambda s: None, UnsupportedModelError, "bitsandbytes"),
    (awq(), {"quant_method": ["awq"]}, lambda s: None, UnsupportedModelError, "expected one of awq"),
    (gptq(), GPTQ, put("g_idx", with_value(4)), CorruptFileError, "g_idx from 0 to 4, expected 0 to 3"),
    (gptq(), GPTQ, put("g_idx", with_value(-1)), CorruptFileError, "g_idx from -1 to 3"),
    (gptq(), GPTQ, put("g_idx", lambda t: t[:-1]), CorruptFileError, r"g_idx of shape \[511\], expected \[512\]"),
    (gptq(), GPTQ, put("scales", with_value(float("nan"))), CorruptFileError, "got nan"),
    (gptq(), GPTQ, put("qzeros", with_value(0)), CorruptFileError, "got a zero point of 1, expected 8"),
    (gptq(), GPTQ, put("qweight", lambda t: t[::3]), CorruptFileError, "got qweight of shape"),
    (gptq(), GPTQ | {"desc_act": True}, lambda s: s.pop(MODULE + "g_idx"), CorruptFileError, "got no g_idx"),
    (gptq(), GPTQ | {"checkpoint_format": "marlin"}, lambda s: None, UnsupportedModelError, "'marlin'"),
    (gptq(bits=8, symmetric=False), GPTQ | {"bits": 8, "sym": False}, lambda s: None, UnsupportedModelError, "8 bits"),
    (gptq(), GPTQ | {"format": "marlin"}, lambda s: None, UnsupportedModelError, "'marlin'"),
    (gptq(), GPTQ | {"format": "gptq_v2", "checkpoint_format": "gptq"}, lambda s: 0, UnsupportedModelError, "differ"),
    (gptq(), GPTQ, lambda s: s.update({MATRIX: torch.ones(256, 512)}), UnsupportedModelError, "got a tensor"),
    (gptq(), GPTQ, lambda s: s.update({"lm_head.qweight": torch.ones(2)}), UnsupportedModelError, "'qweight'"),
    (gptq(), GPTQ, lambda s: s.update({"model.norm.bias": torch.ones(2)}), UnsupportedModelError, "bias"),
    (by_hand, PACKED, put("weight_scale", with_value(float("nan"))), CorruptFileError, "got nan"),
    (by_hand, PACKED, put("weight_scale", lambda t: t[:, :3]), CorruptFileError, "scales of 3 groups, expected 4"),
    (by_hand, PACKED, put("weight_scale", lambda t: t[1:]), CorruptFileError, r"weight_scale of shape \[255, 4\]"),
    (by_hand, PACKED, put("weight_shape", with_value(7)), CorruptFileError, r"got weight_shape \[256, 7\]"),
    (by_hand, PACKED, put("weight_packed", lambda t: t.view(torch.uint8)), CorruptFileError, "in U8, expected I32"),
    (by_hand, PACKED, lambda s: s.update({MODULE + "weight_g_idx": torch.ones(2)}), UnsupportedModelError, "g_idx"),
    (by_hand, PACKED | {"format": "marlin-24"}, lambda s: None, UnsupportedModelError, "'marlin-24'"),
    (by_hand, PACKED | {"transform_config": {"a": 1}}, lambda s: None, UnsupportedModelError, "transform_config"),
]  # fmt: skip


@pytest.mark.parametrize(("packer", "config", "change", "kind", "words"), HOSTILE)
def test_hostile_checkpoints(
    packer: Packer, config: dict[str, Any], change: Change, kind: type[MhaffnError], words: str, tmp_path: Path
) -> None:
    write(tmp_path, packer, config)
    stored = load_file(tmp_path / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(kind, match=words) as caught:
        open_source(tmp_path).weight(MATRIX)
    assert str(tmp_path) in str(caught.value)


def test_fp8_that_is_not_a_number(tmp_path: Path) -> None:
    def packer(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values = weight.to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": torch.ones(len(weight), 1)}, values.float()

    config = compressed_config("float-quantized", scheme(8, "channel", type="float"))
    expect(tmp_path, write(tmp_path, packer, config), format="fp8")
    stored = load_file(tmp_path / "model.safetensors")
    octets = stored[MATRIX].view(torch.uint8)
    octets[-1, -1] = 0x7F
    save_file(stored | {MATRIX: octets.view(torch.float8_e4m3fn)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match="got nan"):
        open_source(tmp_path).weight(MATRIX)


def test_a_truncated_file(tmp_path: Path) -> None:
    write(tmp_path, awq(), AWQ)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(MhaffnError, match="truncated"):
        open_source(tmp_path)


gguf = pytest.importorskip("gguf")
K_WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def k_blocks(rows: int, columns: int, kind: str, seed: int) -> np.ndarray:
    """Random blocks of a kind that gguf reads and does not write; their scales of an ordinary size."""
    generator = np.random.default_rng(seed)
    size, halves = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}[kind]
    blocks = generator.integers(0, 256, (rows * columns // 256, size), dtype=np.uint8)
    for offset in halves:
        values = generator.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write_k(path: Path, kind: str) -> None:
    """A GGUF whose matrices are all blocks of ``kind``, rows of q and k in llama.cpp's order as they come."""
    write_gguf(path, tokenizer=False, **K_WIDTHS)
    reader = gguf.GGUFReader(str(path))
    quantisation = gguf.GGMLQuantizationType[kind]
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    arrays = {t.name: np.array(t.data) for t in reader.tensors}
    raw = {name: k_blocks(*shape, kind, i) for i, (name, shape) in enumerate(shapes.items()) if len(shape) == 2}
    del reader
    original = gguf.GGUFWriter.add_tensor

    def add(self: Any, name: str, array: np.ndarray, **options: Any) -> None:
        if name in raw and "blk" in name:
            original(self, name, raw[name], raw_dtype=quantisation)
        else:
            original(self, name, arrays[name], **options)

    patch = pytest.MonkeyPatch()
    with patch.context() as inside:
        inside.setattr(gguf.GGUFWriter, "add_tensor", add)
        write_gguf(path, tokenizer=False, **K_WIDTHS)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q5_0"])
def test_gguf_kept_at_its_width(kind: str, tmp_path: Path) -> None:
    """gguf's own values, rows of q and k put back; exact, or within what float16 or the new width rounds."""
    path = tmp_path / "model.gguf"
    if kind in ("Q4_K", "Q6_K"):
        write_k(path, kind)
    else:
        write_gguf(path, kind=kind, tokenizer=False, **K_WIDTHS)
    source = open_source(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    expected_format = {"Q8_0": "int8", "Q6_K": "int8", "Q5_0": "int8"}.get(kind, "int4")
    for name, theirs_name in (
        (MATRIX, "blk.1.ffn_down.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight"),
    ):
        found = check(source, name, source.weight(name))
        assert (found.format, found.group) == (expected_format, 32)
        theirs = gguf.quants.dequantize(stored[theirs_name].data, stored[theirs_name].tensor_type)
        ours = dequantize(found).numpy()
        if "k_proj" in name or "q_proj" in name:
            ours = permuted(ours, 2 if "k_proj" in name else 4)
        error, groups = np.abs(ours - theirs), theirs.reshape(-1, 32)
        if kind in ("Q8_0", "Q4_0"):
            assert not error.any()
        elif kind in ("Q4_1", "Q4_K"):  # |q d| and |m| are each at most their sum's range and least value
            low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
            bound = (2 * np.abs(low) + 2 * (high - low)) / 1024 + 1e-6
            assert (error.reshape(-1, 32) <= bound).all()
            assert error.any()
        else:
            bound = np.abs(groups).max(1, keepdims=True) * (1 / 254 + 1 / 2048)
            assert (error.reshape(-1, 32) <= bound + 1e-9).all()
    assert bool(source.remarks()) is (kind in ("Q6_K", "Q5_0"))
    assert all(kind in line and "int8" in line for line in source.remarks())
    assert source.format("model.embed_tokens.weight") is None
    assert isinstance(source.weight("model.embed_tokens.weight"), Tensor)


def blocks_of(kind: str, d: float, m: float, code: int, count: int) -> np.ndarray:
    halves = np.array([d, m] if kind == "Q4_1" else [d], np.float16).view(np.uint8)
    size = {"Q8_0": 32, "Q4_0": 16, "Q4_1": 16}[kind]
    return np.tile(np.concatenate((halves, np.full(size, code, np.uint8))), (count, 1))


@pytest.mark.parametrize(("d", "m"), [(0.0, 0.0), (0.0, 0.37), (0.0, -2.5), (6e-8, 1.0), (1e-7, -3.0), (0.5, 0.0)])
def test_flat_blocks_of_q4_1(d: float, m: float) -> None:
    """A scale that is 0, or nothing beside the minimum: no division by it, and values within float16's rounding."""
    from mhaffn.store.gguf_blocks import keep

    rows = blocks_of("Q4_1", d, m, 0xF3, 4)
    found = dequantize(keep("Q4_1", rows, 32, "here")).numpy()
    theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q4_1)
    assert np.abs(found - theirs).max() <= abs(m) / 2048


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_hostile_blocks(kind: str, bad: float) -> None:
    from mhaffn.store.gguf_blocks import keep

    with pytest.raises(CorruptFileError, match=r"model: got .*expected finite"):
        keep(kind, blocks_of(kind, bad, 1.0, 0, 2), 32, "model")
    if kind == "Q4_1":
        with pytest.raises(CorruptFileError, match="expected finite"):
            keep(kind, blocks_of(kind, 1.0, bad, 0, 2), 32, "model")


def test_packing_a_quantised_folder(tmp_path: Path) -> None:
    """Whatever pack makes of it by default, the store opens and is the model's size or less."""
    write(tmp_path / "model", awq(), AWQ)
    store = pack(tmp_path / "model", tmp_path / "packed")
    assert store.packed and store.config.hidden_size == 256


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of one layer in each layout."""
    folder = tmp_path_factory.mktemp("small")
    short = {"group_size": 32}
    for name, packer, config in (
        ("awq", awq(32), AWQ | short), ("gptq", gptq(32), GPTQ | short), ("compressed", by_hand, PACKED),
    ):  # fmt: skip
        write(folder / name, packer, config, num_hidden_layers=1)
    return {path.name: path for path in folder.iterdir()}


SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 32, 64, 128, 256, 512, 2**40]), max_size=3)


@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_headers(layout: str, data: st.DataObject, small: dict[str, Path], tmp_path_factory: Any) -> None:
    """Parts of other shapes and dtypes, gone, or of other bytes: kept or refused with a typed error."""
    folder = tmp_path_factory.mktemp("damaged")
    stored = load_file(small[layout] / "model.safetensors")
    values = json.loads((small[layout] / "config.json").read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(n for n in stored if "proj" in n)), max_size=4, unique=True)):
        shape = data.draw(SHAPES)
        dtype = data.draw(st.sampled_from([torch.int32, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn]))
        tensor = torch.full(tuple(shape), 3).to(dtype) if math.prod(max(n, 1) for n in shape) < 2**20 else None
        choice = data.draw(st.sampled_from(["gone", "reshaped", "renamed", "bits"]))
        if choice == "gone" or tensor is None:
            del stored[name]
        elif choice == "reshaped":
            stored[name] = tensor
        elif choice == "renamed":
            stored[name + data.draw(st.sampled_from(["x", "_g_idx", ".weight"]))] = stored.pop(name)
        else:
            octets = stored[name].reshape(-1).view(torch.uint8)
            octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    anything = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
    settings_ = values["quantization_config"]
    known = [*sorted(settings_), "sym", "desc_act", "format", "dynamic", "zero_point", "sparsity_config"]
    for name in data.draw(st.lists(st.sampled_from(known), max_size=2)):
        settings_[name] = data.draw(anything)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    try:
        source = open_source(folder)
        for name in random_weights(CONFIG | WIDTHS | {"num_hidden_layers": 1}):
            weight = source.weight(name)
            if isinstance(weight, Quantized):
                assert bool(dequantize(check(source, name, weight)).isfinite().all())
    except MhaffnError as error:
        assert str(folder) in str(error)
