"""Products with weights in few bits against gemlite, torch's tinygemm, torchao and cuBLAS on bf16 weights.

    pytest bench/bench_linear.py -m gpu --benchmark-only
    python bench/bench_linear.py --out linear.json

Llama-3.1-70B widths, bf16 activations. In CUDA graphs; the weights do not fit L2 together. Bytes a second are packed
ones, whoever reads them: cuBLAS itself reads up to four times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from by_peer import by_peer
from timer import COLD_BYTES, Case, by_name, main_cases, randn

from mhaffn import ops
from mhaffn.quantized import Quantized, dequantize

SHAPES = {"up": (28672, 8192), "down": (8192, 28672)}
FORMATS = {"int4 g128": ("int4", 128), "int8 row": ("int8", 0), "fp8 row": ("fp8", 0)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
GEMLITE_ROWS = (1, 16, 64, 512)  # it tunes for each number of rows at its first call
TOLERANCE = 0.1  # torchao quantises anew; each row tells its error
Product = Callable[[torch.Tensor], torch.Tensor]


def random_weight(format: str, rows: int, width: int, group: int) -> Quantized:
    values = torch.randint(0, 256, (rows, width // 2 if format == "int4" else width), device="cuda", dtype=torch.uint8)
    if format == "fp8":
        values[values & 127 == 127] = 0  # no NaN
    values = values.view({"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[format])
    scales = (torch.rand(rows, width // group, device="cuda") + 0.5) * {"int4": 1e-2, "int8": 1e-3, "fp8": 3e-4}[format]
    return Quantized(format, values, scales.to(torch.bfloat16), None, group)


def ours(weight: Quantized) -> Product:
    return lambda x: ops.linear(x, weight)


def cublas(weight: Quantized) -> Product:
    plain = dequantize(weight, torch.bfloat16)
    return lambda x: F.linear(x, plain)


def gemlite(weight: Quantized) -> Product:
    from gemlite.helper import A16Wn

    if weight.format == "int4":
        values, zero, bits = torch.stack((weight.values & 15, weight.values >> 4), -1).flatten(1), 8, 4
    elif weight.format == "int8":
        values, zero, bits = (weight.values.to(torch.int16) + 128).to(torch.uint8), 128, 8
    else:
        raise NotImplementedError("timed with whole numbers alone")
    zeros = torch.full_like(weight.scales, zero)
    return A16Wn(dtype=torch.bfloat16).from_weights(values, weight.scales.clone(), zeros, bits, weight.group)


def tinygemm(weight: Quantized) -> Product:
    if weight.format != "int4":
        raise NotImplementedError("int4 alone")
    swapped = (weight.values << 4) | (weight.values >> 4)  # its even columns are in the high halves
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    scales = torch.stack((weight.scales, torch.zeros_like(weight.scales)), -1).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group, scales)


def torchao(weight: Quantized) -> Product:
    """It quantises the dequantised weight itself."""
    import torchao.quantization as quantization

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight.data = dequantize(weight, torch.bfloat16)
    if weight.format == "int4":
        config = quantization.Int4WeightOnlyConfig(group_size=weight.group, int4_packing_format="tile_packed_to_4d")
    elif weight.format == "int8":
        config = quantization.Int8WeightOnlyConfig()
    else:
        raise NotImplementedError("timed with whole numbers alone")
    quantization.quantize_(layer, config)
    return layer


PEERS: dict[str, Callable[[Quantized], Product]] = {
    "ours": ours,
    "cuBLAS bf16": cublas,
    "tinygemm": tinygemm,
    "torchao": torchao,
    "gemlite": gemlite,
}


def _made(make: Callable[[Quantized], Product], weight: Quantized) -> Product:
    """The product, or one that raises what kept it from being made."""
    try:
        return make(weight)
    except Exception as problem:
        refusal = problem

    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise refusal

    return refuse


@lru_cache(maxsize=1)
def _weights(shape: str, kind: str) -> list[tuple[Quantized, Mapping[str, Product]]]:
    (rows, width), (format, group) = SHAPES[shape], FORMATS[kind]
    first = random_weight(format, rows, width, group or width)
    count = max(2, -(-COLD_BYTES // first.nbytes))
    weights = [first, *(random_weight(format, rows, width, group or width) for _ in range(count - 1))]
    return [(weight, {name: _made(make, weight) for name, make in PEERS.items()}) for weight in weights]


def _case(shape: str, kind: str, m: int) -> Case:
    rows, width = SHAPES[shape]
    format, group = FORMATS[kind]
    packed = rows * width * (4 if format == "int4" else 8) // 8 + rows * (width // (group or width)) * 2

    def inputs() -> list[tuple[Any, ...]]:
        x = randn(m, width)
        return [(x, *weight) for weight in _weights(shape, kind)]

    def peer(name: str) -> Callable[..., torch.Tensor]:
        return lambda x, weight, products: products[name](x)

    return Case(
        name=f"linear {kind} {shape} M={m}",
        peers={name: peer(name) for name in PEERS if name != "gemlite" or m in GEMLITE_ROWS},
        inputs=inputs,
        truth=lambda x, weight, products: x.float() @ dequantize(weight).T,
        bytes_moved=packed if m <= 128 else 0,
        flops=2 * m * rows * width,
        tolerance=TOLERANCE,
    )


CASES = by_name(_case(shape, kind, m) for shape in SHAPES for kind in FORMATS for m in ROWS)


@by_peer(CASES)
def test_linear(record: Callable[[Case, str], None], case: str, peer: str) -> None:
    record(CASES[case], peer)


if __name__ == "__main__":
    main_cases("linear", CASES)
