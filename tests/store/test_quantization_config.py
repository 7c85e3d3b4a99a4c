"""What a quantization_config says is held against the tensors: read right, or refused by a message that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhaffn.errors import ConfigError, CorruptFileError, MhaffnError, StoreError, UnsupportedModelError
from mhaffn.formats import ALL_PLAIN, Formats
from mhaffn.quantized import Quantized, dequantize
from mhaffn.store import PackProgress, Store, pack
from mhaffn.store.source import open_source
from tests.store.models import write_model
from tests.store.test_quantized_sources import (
    AWQ,
    GPTQ,
    MATRIX,
    MODULE,
    PACKED,
    Change,
    Packer,
    awq,
    by_hand,
    check,
    compressed,
    compressed_config,
    expect,
    gptq,
    is_matrix,
    put,
    scheme,
    write,
)

FIRST = "model.layers.0.self_attn.q_proj"
CHANNEL, FP8 = scheme(8, "channel"), scheme(8, "channel", type="float")
GROUP = scheme(4, "group", group_size=128)
ASYMMETRIC = GROUP | {"symmetric": False}
DENSE = {
    "format": "dense", "global_sparsity": 0.1, "ignore": [], "registry_requires_subclass": False,
    "sparsity_structure": "unstructured", "targets": [],
}  # fmt: skip


def remembered(packer: Packer) -> Packer:
    """The same, each weight packed once: these tests write the same model over and over."""
    known: dict[bytes, tuple[dict[str, Tensor], Tensor]] = {}

    def again(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        key = weight.numpy().tobytes()
        if key not in known:
            known[key] = packer(weight)
        return known[key]

    return again


AWQ_4, GPTQ_4, GPTQ_8, PACKED_4 = map(remembered, (awq(), gptq(), gptq(bits=8), by_hand))
GPTQ_SHORT, GPTQ_ZEROS = map(remembered, (gptq(32), gptq(symmetric=False)))
GPTQ_8_ZEROS = remembered(gptq(bits=8, symmetric=False))


def changed(folder: Path, change: Change) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def unchanged(_: dict[str, Tensor]) -> None:
    pass


def zero_points(value: int) -> Change:
    return lambda stored: stored.update({
        name.replace("weight_scale", "weight_zero_point"): torch.full(tensor.shape, value, dtype=torch.int8)
        for name, tensor in list(stored.items()) if name.endswith("weight_scale")
    })  # fmt: skip


def scales_of(*suffixes: str) -> Change:
    """Scales of activations and of the KV cache beside each matrix."""
    return lambda stored: stored.update({
        name.removesuffix("weight_scale") + suffix: torch.ones(1) for name in list(stored)
        if name.endswith("weight_scale") for suffix in suffixes
    })  # fmt: skip


@pytest.mark.parametrize(
    ("packer", "config", "change", "format"),
    [
        (AWQ_4, {"quant_method": "awq"}, unchanged, "int4"),  # all by default
        (AWQ_4, AWQ | {"version": "GEMM", "backend": "autoawq", "do_fuse": True}, unchanged, "int4"),
        (AWQ_4, AWQ | {"version": None, "format": "gemm", "checkpoint_format": "gemm"}, unchanged, "int4"),
        (AWQ_4, {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"}, unchanged, "int4"),
        (AWQ_4, AWQ | {"modules_to_not_convert": ["lm_head"], "sym": True}, unchanged, "int4"),
        (AWQ_4, AWQ | {"group_size": None, "dynamic": None}, unchanged, "int4"),
        (GPTQ_4, {"quant_method": "gptq", "bits": 4}, unchanged, "int4"),
        (
            GPTQ_4,
            GPTQ | {"dynamic": {}, "lm_head": False, "rotation": None, "meta": {"quantizer": []}},
            unchanged,
            "int4",
        ),
        (GPTQ_4, GPTQ | {"checkpoint_format": "GPTQ", "pack_dtype": "int32", "true_sequential": 3}, unchanged, "int4"),
        (
            GPTQ_4,
            GPTQ | {"dynamic": {"-:never": {}, "+:never": {"bits": 8}, "never": {"group_size": 32}}},
            unchanged,
            "int4",
        ),
        (GPTQ_ZEROS, GPTQ | {"sym": True, "dynamic": {".*": {"sym": False}}}, unchanged, "int4"),
        (GPTQ_8, GPTQ | {"dynamic": {".*": {"bits": 8}}}, unchanged, "int8"),
        (GPTQ_8, GPTQ | {"bits": 8, "dynamic": {"never": {"sym": False}}}, unchanged, "int8"),
        (gptq(64), GPTQ | {"dynamic": {".*": {"group_size": 64, "desc_act": True}}}, unchanged, "int4"),
        (PACKED_4, PACKED | {"sparsity_config": DENSE}, unchanged, "int4"),
        (
            PACKED_4,
            PACKED | {"sparsity_config": None, "transform_config": {}, "ignore": ["lm_head"]},
            unchanged,
            "int4",
        ),
        (PACKED_4, compressed_config("pack-quantized", GROUP | {"actorder": "weight"}), unchanged, "int4"),
        (PACKED_4, compressed_config("pack-quantized", GROUP | {"actorder": "STATIC"}), unchanged, "int4"),
        (PACKED_4, compressed_config("pack-quantized", GROUP | {"actorder": False}), unchanged, "int4"),
        (PACKED_4, compressed_config("pack-quantized", {"num_bits": 4, "group_size": 128}), unchanged, "int4"),
        (PACKED_4, compressed_config("mixed-precision", FP8, GROUP, CHANNEL), unchanged, "int4"),
        (PACKED_4, PACKED | {"kv_cache_scheme": scheme(8, "tensor")}, scales_of("k_scale", "v_scale"), None),
        (PACKED_4, PACKED, scales_of("input_scale", "output_scale"), "int4"),
    ],
)
def test_read(packer: Packer, config: dict[str, Any], change: Change, format: str | None, tmp_path: Path) -> None:
    expected = write(tmp_path, packer, config)
    if format is None:  # those of the cache lie beside the projections, not in them
        changed(tmp_path, lambda s: s.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}))
    else:
        changed(tmp_path, change)
    expect(tmp_path, expected, format=format or "int4")


@pytest.mark.parametrize(
    ("weights", "format", "change", "ours"),
    [
        (CHANNEL | {"actorder": None}, "int-quantized", zero_points(0), "int8"),
        (CHANNEL, "int-quantized", scales_of("input_scale", "input_zero_point"), "int8"),
        (FP8, "float-quantized", scales_of("input_scale"), "fp8"),
        (scheme(8, "tensor", type="float"), "float-quantized", scales_of("input_scale", "output_scale"), "fp8"),
        (scheme(4, "channel"), "int-quantized", unchanged, "int8"),  # 4 bits, a byte each
        (scheme(4, "group", group_size=64), "naive-quantized", unchanged, "int8"),
    ],
)
def test_compressed_tensors_in_bytes(
    weights: dict[str, Any], format: str, change: Change, ours: str, tmp_path: Path
) -> None:
    """W8A8 and others: int8 and fp8 per row, scales of activations left; int-quantized has a byte even for 4 bits."""
    activations = scheme(8, "token", dynamic=True)
    config = compressed_config(format, weights)
    config["config_groups"]["group_0"]["input_activations"] = activations
    expected = write(tmp_path, compressed(weights, format), config)
    changed(tmp_path, change)
    expect(tmp_path, expected, format=ours)


def left_alone(layer: str, expected: dict[str, Tensor]) -> Change:
    def change(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.startswith(layer)]:
            del stored[name]
        stored[f"{layer}.weight"] = expected[f"{layer}.weight"]

    return change


@pytest.mark.parametrize(
    ("packer", "config"),
    [
        (AWQ_4, AWQ | {"modules_to_not_convert": [FIRST]}),
        (GPTQ_4, GPTQ | {"dynamic": {f"-:{FIRST}": {}}}),
        (GPTQ_4, GPTQ | {"modules_in_block_to_quantize": [["mlp.down_proj"]]}),
        (PACKED_4, PACKED | {"ignore": [FIRST, "lm_head"]}),
    ],
)
def test_layers_that_are_not_converted(packer: Packer, config: dict[str, Any], tmp_path: Path) -> None:
    expected = write(tmp_path, packer, config)
    changed(tmp_path, left_alone(FIRST, expected))
    source = open_source(tmp_path)
    assert source.format(f"{FIRST}.weight") is None
    for name in filter(is_matrix, expected):
        assert torch.equal(source.tensor(name).half(), expected[name])
    assert pack(tmp_path, tmp_path / "packed").packed


def test_layers_of_several_widths(tmp_path: Path) -> None:
    """GPTQModel's dynamic: a layer of 8 bits, one of other groups, one with zero points, one left in floats."""
    rules = {
        r"+:.*\.0\.mlp\.up_proj": {"bits": 8, "group_size": -1},
        r".*\.0\.mlp\.gate_proj": {"group_size": 32, "sym": False},
        rf"-:{FIRST}": {},
    }
    expected = write(tmp_path, GPTQ_4, GPTQ | {"dynamic": rules})
    for other, packer in (("up", gptq(4096, 8)), ("gate", gptq(32, symmetric=False))):
        written = write(tmp_path / other, packer, GPTQ)
        stored, layer = load_file(tmp_path / other / "model.safetensors"), f"model.layers.0.mlp.{other}_proj"
        found = {name: tensor for name, tensor in stored.items() if name.startswith(layer)}
        changed(tmp_path, lambda s, found=found: s.update(found))  # type: ignore[misc]
        expected[f"{layer}.weight"] = written[f"{layer}.weight"]
    changed(tmp_path, left_alone(FIRST, expected))
    source = open_source(tmp_path)
    kinds = {}
    for name in filter(is_matrix, expected):
        weight = source.weight(name)
        if isinstance(weight, Quantized):
            kinds[check(source, name, weight).format, weight.group] = name
            assert torch.equal(dequantize(weight, torch.float16), expected[name]), name
        else:
            assert torch.equal(weight, expected[name])
    assert kinds.keys() == {("int8", 256), ("int4", 32), ("int4", 128)}


REFUSED: list[tuple[Packer, dict[str, Any], Change, type[MhaffnError], str]] = [
    (AWQ_4, {"bits": 4}, unchanged, UnsupportedModelError, "quant_method = None, expected one of awq"),
    (AWQ_4, {"quant_method": "fp8"}, unchanged, UnsupportedModelError, "quant_method = 'fp8'"),
    (AWQ_4, {"quant_method": "AWQ"}, unchanged, UnsupportedModelError, "quant_method = 'AWQ'"),
    (AWQ_4, AWQ | {"bits": "4"}, unchanged, UnsupportedModelError, "bits = '4', expected 4"),
    (AWQ_4, AWQ | {"bits": True}, unchanged, UnsupportedModelError, "bits = True, expected 4"),
    (AWQ_4, AWQ | {"w_bit": 8}, unchanged, UnsupportedModelError, r"bits and w_bit = \[4, 8\], expected one"),
    (AWQ_4, AWQ | {"version": "gemv_fast"}, unchanged, UnsupportedModelError, "version = 'gemv_fast', expected 'gemm'"),
    (AWQ_4, AWQ | {"version": "llm-awq"}, unchanged, UnsupportedModelError, "version = 'llm-awq'"),
    (AWQ_4, AWQ | {"format": "gemv"}, unchanged, UnsupportedModelError, "version and format = .*differ"),
    (AWQ_4, AWQ | {"backend": "llm-awq"}, unchanged, UnsupportedModelError, "backend = 'llm-awq'"),
    (AWQ_4, AWQ | {"zero_point": "no"}, unchanged, UnsupportedModelError, "zero_point = 'no', expected True or False"),
    (AWQ_4, AWQ | {"zero_point": False}, unchanged, CorruptFileError, "expected 8 everywhere, as zero_point = false"),
    (AWQ_4, AWQ | {"group_size": 64}, unchanged, CorruptFileError, "scales of 2 groups, expected 4: .*group_size = 64"),
    (AWQ_4, AWQ | {"group_size": -1}, unchanged, CorruptFileError, "scales of 2 groups, expected 1: .*group_size = -1"),
    (AWQ_4, AWQ | {"group_size": 0}, unchanged, UnsupportedModelError, "group_size = 0, expected a number of columns"),
    (AWQ_4, AWQ | {"group_size": 128.0}, unchanged, UnsupportedModelError, "group_size = 128.0"),
    (AWQ_4, AWQ | {"group_size": [128]}, unchanged, UnsupportedModelError, r"group_size = \[128\]"),
    (AWQ_4, AWQ | {"group_size": 96}, unchanged, UnsupportedModelError, "group_size = 96 .*expected one that divides"),
    (AWQ_4, AWQ | {"dynamic": {"a": {"version": "gemv"}}}, unchanged, UnsupportedModelError, "version = 'gemv'"),
    (GPTQ_4, {"quant_method": "gptq"}, unchanged, UnsupportedModelError, "bits = None, expected 4 or 8"),
    (GPTQ_4, GPTQ | {"bits": 3}, unchanged, UnsupportedModelError, "bits = 3, expected 4 or 8"),
    (GPTQ_4, GPTQ | {"bits": 8}, unchanged, CorruptFileError, r"\[32, 256\], 4 bits, expected bits = 8"),
    (GPTQ_8, GPTQ, unchanged, CorruptFileError, r"\[64, 256\], 8 bits, expected bits = 4"),
    (GPTQ_4, GPTQ | {"group_size": 64}, unchanged, CorruptFileError, "scales of 2 groups, expected 4"),
    (GPTQ_4, GPTQ | {"group_size": None, "desc_act": None}, unchanged, UnsupportedModelError, "desc_act = None"),
    (GPTQ_4, GPTQ | {"sym": "true"}, unchanged, UnsupportedModelError, "sym = 'true', expected True or False"),
    (GPTQ_ZEROS, GPTQ, unchanged, CorruptFileError, "expected 8 everywhere, as sym = true says"),
    (GPTQ_4, GPTQ | {"checkpoint_format": "gptq_p"}, unchanged, UnsupportedModelError, "format = 'gptq_p', expected"),
    (GPTQ_4, GPTQ | {"is_marlin_format": True}, unchanged, UnsupportedModelError, "is_marlin_format = True"),
    (GPTQ_4, GPTQ | {"rotation": "hadamard"}, unchanged, UnsupportedModelError, "rotation = 'hadamard', expected None"),
    (GPTQ_4, GPTQ | {"adapter": {"path": "lora"}}, unchanged, UnsupportedModelError, "adapter = "),
    (
        GPTQ_4, GPTQ | {"lm_head": True}, lambda s: s.update({"lm_head.qweight": torch.ones(2)}),
        UnsupportedModelError, "lm_head: got a tensor 'qweight'",
    ),
    (GPTQ_4, GPTQ | {"dynamic": ["-:a"]}, unchanged, UnsupportedModelError, "dynamic = .*an object of objects"),
    (GPTQ_4, GPTQ | {"dynamic": {"a": 8}}, unchanged, UnsupportedModelError, "dynamic = .*an object of objects"),
    (GPTQ_4, GPTQ | {"dynamic": {"a": {"bits": 3}}}, unchanged, UnsupportedModelError, "bits = 3, expected 4 or 8"),
    (GPTQ_4, GPTQ | {"dynamic": {"a": {"format": "gptq_v2"}}}, unchanged, UnsupportedModelError, "one for all layers"),
    (GPTQ_8, GPTQ | {"dynamic": {"a": {"group_size": 64}}}, unchanged, CorruptFileError, "expected bits = 4"),
    (GPTQ_SHORT, GPTQ | {"dynamic": {"a": {"group_size": 64}}}, unchanged, CorruptFileError, "expected 2 or 4: "),
    (
        GPTQ_8_ZEROS, GPTQ | {"bits": 8, "dynamic": {"a": {"sym": False}}}, unchanged,
        UnsupportedModelError, "zero points .* at 8 bits",
    ),
    (PACKED_4, PACKED | {"sparsity_config": DENSE | {"format": "sparse-24-bitmask"}}, unchanged, UnsupportedModelError,
     "sparsity_config.format = 'sparse-24-bitmask', expected 'dense'"),
    (PACKED_4, PACKED | {"sparsity_config": {"a": 1}}, unchanged, UnsupportedModelError, "format = None"),
    (PACKED_4, PACKED | {"sparsity_config": "dense"}, unchanged, UnsupportedModelError, "sparsity_config = 'dense'"),
    (PACKED_4, PACKED | {"config_groups": None}, unchanged, UnsupportedModelError, "config_groups = None"),
    (PACKED_4, PACKED | {"config_groups": [GROUP]}, unchanged, UnsupportedModelError, "config_groups = "),
    (PACKED_4, PACKED | {"config_groups": {}}, unchanged, CorruptFileError, "4 bits of int, expected none quantised"),
    (PACKED_4, PACKED | {"config_groups": {"W4A16": ["Linear"]}}, unchanged, UnsupportedModelError,
     r"config_groups\['W4A16'\] = \['Linear'\], expected an object with weights"),
    (PACKED_4, PACKED | {"config_groups": {"a": {"weights": [4]}}}, unchanged, UnsupportedModelError, "an object"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"num_bits": 7}), unchanged, UnsupportedModelError,
     r"config_groups\['group_0'\].weights.num_bits = 7, expected 4 or 8"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"num_bits": "4"}), unchanged, UnsupportedModelError, "'4'"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"num_bits": 8}), unchanged, CorruptFileError,
     "values of 4 bits of int, expected 8 bits of int"),
    (PACKED_4, compressed_config("pack-quantized", FP8), unchanged, CorruptFileError, "expected 8 bits of float"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"type": "float", "num_bits": 4}), unchanged,
     UnsupportedModelError, "num_bits = 4, expected 8"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"type": 4}), unchanged, UnsupportedModelError, "type = 4"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"group_size": 64}), unchanged, CorruptFileError,
     "scales of 2 groups, expected 4"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"group_size": None}), unchanged, UnsupportedModelError,
     "group_size = None, expected a number of columns"),
    (PACKED_4, compressed_config("pack-quantized", scheme(4, "channel")), unchanged, CorruptFileError, "expected 1"),
    (PACKED_4, compressed_config("pack-quantized", scheme(4, "tensor_group", group_size=128)), unchanged,
     UnsupportedModelError, "strategy = 'tensor_group', expected 'tensor' or 'channel' or 'group'"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"actorder": "group"}), unchanged, UnsupportedModelError,
     "actorder = 'group', expected 'weight' or 'static'"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"actorder": True}), unchanged, UnsupportedModelError,
     "actorder = True, expected"),
    (PACKED_4, compressed_config("pack-quantized", GROUP | {"dynamic": True}), unchanged, UnsupportedModelError,
     "dynamic = True, expected False"),
    (PACKED_4, compressed_config("pack-quantized", ASYMMETRIC), unchanged, CorruptFileError,
     "got no weight_zero_point, expected one, as symmetric = false says"),
    (PACKED_4, PACKED, lambda s: s.update({MODULE + "weight_zero_point": torch.zeros(32, 4, dtype=torch.int32)}),
     CorruptFileError, "got weight_zero_point, expected none, as symmetric = true says"),
    (PACKED_4, PACKED, lambda s: s.update({MATRIX: torch.zeros(256, 512, dtype=torch.int8)}), CorruptFileError,
     "got both weight and weight_packed"),
    (PACKED_4, compressed_config("nvfp4-pack-quantized", GROUP), unchanged, UnsupportedModelError, "nvfp4-pack"),
    (PACKED_4, compressed_config("mixed-precision", GROUP) | {"config_groups": {"a": {"format": "mxfp4-pack-quantized",
     "weights": GROUP}}}, unchanged, UnsupportedModelError, r"\['a'\].format = 'mxfp4-pack-quantized'"),
]  # fmt: skip


@pytest.mark.parametrize(("packer", "config", "change", "kind", "words"), REFUSED)
def test_refused(
    packer: Packer, config: dict[str, Any], change: Change, kind: type[MhaffnError], words: str, tmp_path: Path
) -> None:
    write(tmp_path, packer, config)
    changed(tmp_path, change)
    with pytest.raises(kind, match=words) as caught:
        open_source(tmp_path).weight(MATRIX)
    assert str(tmp_path) in str(caught.value)


BLOCKS = scheme(8, "block", type="float", block_structure=[128, 128])


@pytest.mark.parametrize(
    ("weights", "format", "change", "kind", "words"),
    [
        (
            scheme(3, "group", group_size=128),
            "pack-quantized",
            unchanged,
            UnsupportedModelError,
            "num_bits = 3, expected 4",
        ),
        (scheme(2, "channel"), "pack-quantized", unchanged, UnsupportedModelError, "num_bits = 2, expected 4 or 8"),
        (scheme(7, "channel"), "pack-quantized", unchanged, UnsupportedModelError, "num_bits = 7, expected 4 or 8"),
        (CHANNEL, "int-quantized", zero_points(1), UnsupportedModelError, "zero points beside int8 values"),
        (
            FP8,
            "float-quantized",
            put("weight", lambda t: t.view(torch.int8)),
            CorruptFileError,
            "expected 8 bits of float",
        ),
        (
            FP8,
            "float-quantized",
            put("weight", lambda t: t.view(torch.float8_e5m2)),
            CorruptFileError,
            "F8_E5M2, expected",
        ),
        (
            CHANNEL,
            "int-quantized",
            put("weight_scale", lambda t: t[:100]),
            CorruptFileError,
            r"weight_scale of shape \[100",
        ),
        (
            FP8,
            "float-quantized",
            put("weight_scale", lambda t: t[:2].expand(2, 4)),
            CorruptFileError,
            "weight_scale of shape",
        ),
    ],
)
def test_what_compressed_tensors_writes_and_is_refused(
    weights: dict[str, Any], format: str, change: Change, kind: type[MhaffnError], words: str, tmp_path: Path
) -> None:
    write(tmp_path, compressed(weights, format), compressed_config(format, weights))
    changed(tmp_path, change)
    with pytest.raises(kind, match=words) as caught:
        open_source(tmp_path).weight(MATRIX)
    assert str(tmp_path) in str(caught.value)


def blocks_of(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    n, d = weight.shape
    blocks = weight.view(n // 128, 128, d // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).view(n, d).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scales}, values.float()


def test_fp8_in_blocks(tmp_path: Path) -> None:
    write(tmp_path, blocks_of, compressed_config("float-quantized", BLOCKS))
    with pytest.raises(UnsupportedModelError, match="strategy = 'block', expected 'tensor' or 'channel' or 'group'"):
        open_source(tmp_path)


def test_fp8_in_blocks_as_deepseek_has_it(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    write(tmp_path, blocks_of, config)
    with pytest.raises(
        UnsupportedModelError, match="quant_method = 'fp8', expected one of awq, gptq, compressed-tensors"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize("layout", ["gptq", "compressed"])
def test_groups_that_do_not_divide_the_columns(layout: str, tmp_path: Path) -> None:
    """192 columns in groups of 128 have 2 scales, as two groups of 96 would: no g_idx tells them apart."""
    widths = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}

    def packer(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, values = gptq(96 if weight.shape[1] == 192 else 128)(weight)
        if layout == "gptq":
            return {name: part for name, part in parts.items() if name != "g_idx"}, values
        packed = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32)
        shape = torch.tensor(weight.shape)
        return {"weight_packed": packed, "weight_scale": parts["scales"].T, "weight_shape": shape}, values

    write(tmp_path, packer, GPTQ if layout == "gptq" else PACKED, **widths)
    with pytest.raises(
        UnsupportedModelError, match="group_size = 128 for rows of 192 columns, expected one that divides"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize("config", ["awq", 3, ["awq"], True])
def test_no_object_at_all(config: Any, tmp_path: Path) -> None:
    write(tmp_path, AWQ_4, config)
    with pytest.raises(UnsupportedModelError, match=r"quantization_config with .*expected one of awq"):
        open_source(tmp_path)


OLD_GPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip
OLD_AWQ = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
GPTQ_FILE, AWQ_FILE = "quantize_config.json", "quant_config.json"


def write_beside(folder: Path, packer: Packer, file: str, config: Any) -> dict[str, Tensor]:
    """As checkpoints were before config.json had a quantization_config: ``config`` lies in ``file`` beside it."""
    expected = write(folder, packer, {})
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    (folder / file).write_text(config if isinstance(config, str) else json.dumps(config))
    return expected


@pytest.mark.parametrize(
    ("packer", "file", "config"),
    [
        (GPTQ_4, GPTQ_FILE, OLD_GPTQ),
        (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"quant_method": "gptq", "is_marlin_format": False}),
        (GPTQ_8, GPTQ_FILE, OLD_GPTQ | {"bits": 8}),
        (GPTQ_ZEROS, GPTQ_FILE, OLD_GPTQ | {"sym": False}),
        (AWQ_4, AWQ_FILE, OLD_AWQ),
        (AWQ_4, AWQ_FILE, {}),
    ],
)
def test_settings_beside_the_config(packer: Packer, file: str, config: dict[str, Any], tmp_path: Path) -> None:
    expected = write_beside(tmp_path / "model", packer, file, config)
    expect(tmp_path / "model", expected, format=f"int{config.get('bits', 4)}")
    with pytest.raises(UnsupportedModelError, match=r"got a quantised tensor '.*qweight', .*`mhaffn pack .*model DST`"):
        Store.open(tmp_path / "model")
    plain = pack(tmp_path / "model", tmp_path / "plain", formats=ALL_PLAIN).path
    assert not (plain / file).exists()
    assert open_source(plain).format(MATRIX) is None
    assert pack(plain, tmp_path / "again", formats=Formats.parse("int8", "int8")).packed


REFUSED_BESIDE: list[tuple[Packer, str, Any, type[MhaffnError], str]] = [
    (GPTQ_4, GPTQ_FILE, {}, UnsupportedModelError, "bits = None, expected 4 or 8"),
    (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"bits": 3}, UnsupportedModelError, "bits = 3, expected 4 or 8"),
    (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"bits": 8}, CorruptFileError, "4 bits, expected bits = 8"),
    (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"group_size": 64}, CorruptFileError, "scales of 2 groups, expected 4"),
    (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"group_size": 10**4000}, CorruptFileError, r"group_size = 10+\.\.\.0+\."),
    (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"bits": float("nan")}, UnsupportedModelError, "bits = nan, expected 4 or 8"),
    (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"bits": "4"}, UnsupportedModelError, "bits = '4', expected 4 or 8"),
    (GPTQ_ZEROS, GPTQ_FILE, OLD_GPTQ, CorruptFileError, "expected 8 everywhere, as sym = true says"),
    (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"quant_method": "marlin"}, UnsupportedModelError, "quant_method = 'marlin'"),
    (GPTQ_4, GPTQ_FILE, OLD_GPTQ | {"is_marlin_format": True}, UnsupportedModelError, "is_marlin_format = True"),
    (GPTQ_4, GPTQ_FILE, "[]", ConfigError, "expected a JSON object"),
    (GPTQ_4, GPTQ_FILE, "{", ConfigError, "not valid JSON"),
    (GPTQ_4, AWQ_FILE, OLD_AWQ, UnsupportedModelError, "tensor 'g_idx', expected qweight"),
    (AWQ_4, GPTQ_FILE, OLD_GPTQ, CorruptFileError, "qweight"),
    (AWQ_4, AWQ_FILE, OLD_AWQ | {"version": "GEMV"}, UnsupportedModelError, "version = 'gemv', expected 'gemm'"),
    (AWQ_4, AWQ_FILE, OLD_AWQ | {"q_group_size": 64}, CorruptFileError, "scales of 2 groups, expected 4"),
    (AWQ_4, AWQ_FILE, OLD_AWQ | {"zero_point": False}, CorruptFileError, "as zero_point = false says"),
]


@pytest.mark.parametrize(("packer", "file", "config", "kind", "words"), REFUSED_BESIDE)
def test_settings_beside_the_config_are_held_to_the_same(
    packer: Packer, file: str, config: Any, kind: type[MhaffnError], words: str, tmp_path: Path
) -> None:
    write_beside(tmp_path, packer, file, config)
    with pytest.raises(kind, match=words) as caught:
        open_source(tmp_path).weight(MATRIX)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("packer", "file", "config"), [(GPTQ_4, GPTQ_FILE, OLD_GPTQ), (AWQ_4, AWQ_FILE, OLD_AWQ)])
def test_two_settings_beside_the_config(packer: Packer, file: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Of two methods none is guessed at; of one method, the first counts."""
    expected = write_beside(tmp_path, packer, file, config)
    other = AWQ_FILE if file == GPTQ_FILE else GPTQ_FILE
    (tmp_path / other).write_text("{}")
    words = r"quant_method = 'gptq' in quantize_config.json and 'awq' in quant_config.json, expected one\. Remove"
    with pytest.raises(UnsupportedModelError, match=words):
        open_source(tmp_path)
    method = "gptq" if file == GPTQ_FILE else "awq"
    (tmp_path / GPTQ_FILE).write_text(json.dumps(config | {"quant_method": method}))
    (tmp_path / AWQ_FILE).write_text(json.dumps({"quant_method": method}))
    expect(tmp_path, expected, format="int4")


def test_weights_in_a_file_of_another_name(tmp_path: Path) -> None:
    """As AutoGPTQ named it: by bits and group size."""
    expected = write_beside(tmp_path / "model", GPTQ_4, GPTQ_FILE, OLD_GPTQ)
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/gptq_model-4bit-128g.safetensors")
    expect(tmp_path / "model", expected, format="int4")
    assert pack(tmp_path / "model", tmp_path / "packed").packed


def test_the_config_counts_before_what_lies_beside_it(tmp_path: Path) -> None:
    expected = write(tmp_path, GPTQ_4, GPTQ)
    (tmp_path / GPTQ_FILE).write_text(json.dumps(OLD_GPTQ | {"bits": 8}))
    (tmp_path / AWQ_FILE).write_text(json.dumps(OLD_AWQ))
    expect(tmp_path, expected, format="int4")


def test_settings_without_weights_that_they_are_for(tmp_path: Path) -> None:
    """Left beside a model that was dequantised, or never quantised: it is read as it is."""
    weights = write_model(tmp_path / "model", dtype=torch.float16)
    (tmp_path / "model" / GPTQ_FILE).write_text(json.dumps(OLD_GPTQ))
    assert Store.open(tmp_path / "model").dtype == "float16"
    store = pack(tmp_path / "model", tmp_path / "packed")
    found = load_file(store.path / "layer-001-ffn.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


def test_quantised_tensors_that_nothing_tells_of(tmp_path: Path) -> None:
    write_beside(tmp_path, GPTQ_4, GPTQ_FILE, OLD_GPTQ)
    (tmp_path / GPTQ_FILE).unlink()
    for read in (Store.open, open_source):
        with pytest.raises(
            UnsupportedModelError, match=r"qweight', expected floats.*quantize_config.json or quant_con"
        ):
            read(tmp_path)


def test_settings_that_change_between_tries(tmp_path: Path) -> None:
    def stop(progress: PackProgress) -> None:
        if progress.file == "layer-001-mha.safetensors":
            raise KeyboardInterrupt

    write_beside(tmp_path / "model", GPTQ_4, GPTQ_FILE, OLD_GPTQ)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "model", tmp_path / "packed", progress=stop)
    (tmp_path / "model" / GPTQ_FILE).write_text(json.dumps(OLD_GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}))
    with pytest.raises(StoreError, match="files that changed since"):
        pack(tmp_path / "model", tmp_path / "packed")
