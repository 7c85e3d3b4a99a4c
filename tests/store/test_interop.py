"""Quantised formats against the libraries that define them: their packers write a checkpoint, and its values are what
their own code dequantises, to the bit, through ``mhaffn pack`` and the store.

compressed-tensors and gguf are installed; AutoAWQ, AutoGPTQ and GPTQModel are fetched, see libraries.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhaffn.cli
from mhaffn.errors import UnsupportedModelError
from mhaffn.formats import ALL_PLAIN
from mhaffn.quantized import Quantized, dequantize
from mhaffn.store import Store, pack
from mhaffn.store.source import open_source
from tests.store.libraries import LIBRARIES, fetched, load
from tests.store.test_few_bits import weights_of
from tests.store.test_gguf import gguf, gguf_name, permuted, write_gguf
from tests.store.test_quantized_sources import (
    AWQ,
    GPTQ,
    Packer,
    affine,
    awq,
    compressed,
    compressed_config,
    expect,
    gptq,
    is_matrix,
    scheme,
    write,
)

MODEL = {
    "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
MATRIX = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """Every module that is taken from the libraries, by its name."""
    archives, scratch = fetched(), tmp_path_factory.mktemp("libraries")
    return {name: module for one in LIBRARIES for name, module in load(one, archives, scratch).items()}


Parts = tuple[dict[str, Tensor], Tensor]


def quantised(weight: Tensor, group: int, bits: int, symmetric: bool, least: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The weight as it stands after rounding, float32 ``[N, D]``, and scales and zero points ``[N, G]``.

    The libraries pack what they have quantised before: AutoAWQ and AutoGPTQ round again without looking at the range.
    """
    group = weight.shape[1] if group == -1 else group
    codes, scales, zeros = affine(weight, group, bits, symmetric)
    if least == 0:  # rows of no negative weight, as the words of version 1 cannot hold each by itself
        zeros[::3] = 0
    index = torch.arange(weight.shape[1]) // group
    return (codes - zeros[:, index]) * scales.float()[:, index], scales.float(), zeros


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


def auto_awq(modules: dict[str, ModuleType], group: int, symmetric: bool = False) -> Packer:
    gemm, packing = modules["awq.modules.linear.gemm"], modules["awq.utils.packing_utils"]

    def packer(weight: Tensor) -> Parts:
        weight, scales, zeros = quantised(weight, group, 4, symmetric)
        length = weight.shape[1] if group == -1 else group
        layer = gemm.WQLinear_GEMM.from_linear(
            linear_of(weight), 4, length, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        parts = {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
        values = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, length)
        return parts, values.T

    return packer


def auto_gptq(modules: dict[str, ModuleType], group: int, bits: int, symmetric: bool) -> Packer:
    layout = modules["auto_gptq.nn_modules.qlinear.qlinear_cuda_old"]

    def packer(weight: Tensor) -> Parts:
        weight, scales, zeros = quantised(weight, group, bits, symmetric)
        n, d = weight.shape
        layer = layout.QuantLinear(bits, group, d, n, False)
        layer.pack(linear_of(weight), scales, zeros.float(), None)
        layer.scales = layer.scales.half()  # as AutoGPTQ has them where the model it quantises is in float16
        # What it multiplies by, read off its own product with the identity.
        return dict(layer.state_dict()), layer(torch.eye(d, dtype=torch.float16)).T

    return packer


def gptq_model(
    modules: dict[str, ModuleType],
    group: int,
    bits: int,
    symmetric: bool,
    first: bool,
    *,
    shuffled: bool = False,
    least: int = 1,
) -> Packer:
    """``first``: of version 1; ``shuffled``: columns in an order that g_idx tells; ``least``: the least zero point."""
    layout, conversion = modules["gptqmodel.nn_modules.qlinear.torch"], modules["gptqmodel.utils.model"]

    def packer(weight: Tensor) -> Parts:
        n, d = weight.shape
        place = torch.randperm(d, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(d)
        weight, scales, zeros = quantised(weight[:, place], group, bits, symmetric, least)
        back = place.argsort()
        index = (torch.arange(d) // (d if group == -1 else group))[back].to(torch.int32)
        layer = layout.TorchLinear(
            bits=bits, group_size=group, sym=symmetric, desc_act=shuffled, in_features=d, out_features=n
        )
        layer.pack_original(linear_of(weight[:, back].contiguous()), scales, zeros, index)
        layer.training = False
        layer.qzero_format(format=2)
        values = layer.dequantize_weight().T
        if first:
            second = layer.qzeros.clone()
            config = SimpleNamespace(bits=bits, pack_dtype=torch.int32)
            conversion.convert_gptq_v2_to_v1_format_module(layer, config)
            stored = layer.qzeros.clone()
            conversion.convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
            assert torch.equal(layer.qzeros, second)
            layer.qzeros = stored
        parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        return parts, values

    return packer


def check_kept(store: Store, expected: dict[str, Tensor], format: str, dtype: torch.dtype = torch.float16) -> None:
    """Each matrix of the store is in ``format`` and stands for ``expected``, of ``dtype``, to the bit."""
    kept = weights_of(store)
    for name in filter(is_matrix, expected):
        weight = kept[name]
        assert isinstance(weight, Quantized) and weight.format == format
        assert expected[name].dtype == dtype
        assert torch.equal(dequantize(weight, dtype), expected[name]), name


def check_plain(store: Store, expected: dict[str, Tensor]) -> None:
    plain = weights_of(store)
    for name in filter(is_matrix, expected):
        weight = plain[name]
        assert isinstance(weight, Tensor) and torch.equal(weight, expected[name]), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("group", "symmetric"), [(32, False), (64, False), (128, False), (-1, False), (128, True)]
)  # fmt: skip
def test_auto_awq(group: int, symmetric: bool, modules: dict[str, ModuleType], tmp_path: Path) -> None:
    config = AWQ | {"group_size": group, "zero_point": not symmetric}
    expected = write(tmp_path, auto_awq(modules, group, symmetric), config, **MODEL)
    weight = expect(tmp_path, expected, format="int4").weight(MATRIX)
    assert isinstance(weight, Quantized) and (weight.zeros is None) is symmetric
    check_kept(pack(tmp_path, tmp_path / "packed"), expected, "int4")


GPTQ_CASES = [
    (4, 128, True),
    (4, 32, True),
    (4, -1, True),
    (4, 128, False),
    (4, 64, False),
    (8, 128, True),
    (8, -1, True),
]


@torch.no_grad()
@pytest.mark.parametrize(("bits", "group", "symmetric"), GPTQ_CASES)
def test_auto_gptq(bits: int, group: int, symmetric: bool, modules: dict[str, ModuleType], tmp_path: Path) -> None:
    config = GPTQ | {"bits": bits, "group_size": group, "sym": symmetric}
    expected = write(tmp_path, auto_gptq(modules, group, bits, symmetric), config, **MODEL)
    expect(tmp_path, expected, format=f"int{bits}")
    check_kept(pack(tmp_path, tmp_path / "packed"), expected, f"int{bits}")


@torch.no_grad()
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group", "symmetric"), GPTQ_CASES)
def test_gptq_model(
    bits: int, group: int, symmetric: bool, version: str, modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    config = GPTQ | {"bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": version}
    expected = write(tmp_path, gptq_model(modules, group, bits, symmetric, version == "gptq"), config, **MODEL)
    expect(tmp_path, expected, format=f"int{bits}")
    check_kept(pack(tmp_path, tmp_path / "packed"), expected, f"int{bits}")


@torch.no_grad()
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_model_with_zero_points_of_0(version: str, modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """Version 1 has them borrow from their neighbours; what GPTQModel gets back, so do we."""
    config = GPTQ | {"sym": False, "checkpoint_format": version}
    expected = write(tmp_path, gptq_model(modules, 128, 4, False, version == "gptq", least=0), config, **MODEL)
    weight = expect(tmp_path, expected, format="int4").weight(MATRIX)
    assert isinstance(weight, Quantized) and weight.zeros is not None and not weight.zeros[::3].any()
    check_kept(pack(tmp_path, tmp_path / "packed"), expected, "int4")


@torch.no_grad()
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_gptq_model_with_columns_out_of_order(
    bits: int, symmetric: bool, modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    config = GPTQ | {"bits": bits, "sym": symmetric, "desc_act": True}
    expected = write(tmp_path, gptq_model(modules, 128, bits, symmetric, True, shuffled=True), config, **MODEL)
    with pytest.raises(UnsupportedModelError, match=r"out of order in g_idx.*pack with --ffn and --mha"):
        pack(tmp_path, tmp_path / "kept")
    check_plain(pack(tmp_path, tmp_path / "plain", formats=ALL_PLAIN), expected)


@torch.no_grad()
def test_gptq_model_with_zero_points_at_8_bits(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    config = GPTQ | {"bits": 8, "sym": False, "checkpoint_format": "gptq_v2"}
    write(tmp_path, gptq_model(modules, 128, 8, False, first=False), config, **MODEL)
    with pytest.raises(UnsupportedModelError, match=r"zero points \(sym = false\) at 8 bits"):
        open_source(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("library", "ours", "config"),
    [
        (auto_awq, awq, (128,)),
        (auto_gptq, gptq, (128, 4, True)),
        (auto_gptq, gptq, (32, 4, False)),
        (auto_gptq, gptq, (64, 8, True)),
        (gptq_model, gptq, (128, 4, False, False)),
        (gptq_model, gptq, (128, 4, False, True)),
        (gptq_model, gptq, (64, 8, True, True)),
    ],
)
def test_packers_of_other_tests_write_what_the_libraries_do(
    library: Callable[..., Packer], ours: Callable[..., Packer], config: tuple[Any, ...], modules: dict[str, ModuleType]
) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    theirs, _ = library(modules, *config)(weight)
    written, _ = ours(*config)(weight)
    assert theirs.keys() == written.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in written.items())


@torch.no_grad()
def test_from_the_command_line(modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(tmp_path / "model", auto_gptq(modules, 128, 4, False), GPTQ | {"sym": False}, **MODEL)
    monkeypatch.setattr("sys.argv", ["mhaffn", "pack", str(tmp_path / "model"), str(tmp_path / "packed")])
    with pytest.raises(SystemExit) as stop:
        mhaffn.cli.main()
    assert not stop.value.code
    check_kept(Store.open(tmp_path / "packed"), expected, "int4")


@pytest.mark.parametrize(
    ("weights", "format", "ours"),
    [
        (scheme(4, "group", group_size=32), "pack-quantized", "int4"),
        (scheme(4, "group", group_size=64, symmetric=False), "pack-quantized", "int4"),
        (scheme(8, "channel"), "pack-quantized", "int8"),
        (scheme(8, "channel"), "int-quantized", "int8"),
        (scheme(8, "channel", type="float"), "float-quantized", "fp8"),
    ],
)
def test_compressed_tensors(weights: dict[str, Any], format: str, ours: str, tmp_path: Path) -> None:
    packer = compressed(weights, format)
    expected = write(tmp_path, packer, compressed_config(format, weights), **MODEL)
    check_kept(pack(tmp_path, tmp_path / "packed"), expected, ours, torch.bfloat16)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", kind=kind, **MODEL)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tmp_path / "model.gguf")).tensors}
    kept = weights_of(pack(tmp_path / "model.gguf", tmp_path / "packed"))
    matrices = [name for name in kept if is_matrix(name)]
    assert len(matrices) == 7
    for name in matrices:
        weight, theirs = kept[name], stored[gguf_name(name)]
        assert isinstance(weight, Quantized) and weight.format == ("int8" if kind == "Q8_0" else "int4")
        ours = dequantize(weight).numpy()
        if "q_proj" in name or "k_proj" in name:
            ours = permuted(ours, MODEL["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        assert (ours == gguf.quants.dequantize(theirs.data, theirs.tensor_type)).all()
