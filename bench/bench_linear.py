"""Products with weights in few bits against gemlite, torch's tinygemm, torchao and cuBLAS on bf16 weights.

``pytest bench/bench_linear.py -m gpu --benchmark-only``: Llama-3.1-70B widths, bf16 activations. A figure is a
call's share of a CUDA graph of 16 calls and more, whose weights do not fit L2 together; ``extra_info`` holds the packed
bytes a second. A result is checked against the dequantised weights before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mhaffn import ops
from mhaffn.quantized import Quantized, dequantize

pytestmark = pytest.mark.gpu
COLD_BYTES = 240 << 20
CALLS_MIN = 16
SHAPES = {"up": (28672, 8192), "down": (8192, 28672)}
FORMATS = {"int4-g128": ("int4", 128), "int8-row": ("int8", 8192), "fp8-row": ("fp8", 8192)}
PIP = {"gemlite": "gemlite", "torchao": "torchao"}
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
        pytest.skip("gemlite: timed with whole numbers alone")
    zeros = torch.full_like(weight.scales, zero)
    return A16Wn(dtype=torch.bfloat16).from_weights(values, weight.scales.clone(), zeros, bits, weight.group)


def tinygemm(weight: Quantized) -> Product:
    if weight.format != "int4":
        pytest.skip("tinygemm: int4 alone")
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
        pytest.skip("torchao: timed with whole numbers alone")
    quantization.quantize_(layer, config)
    return layer


PEERS = {"ours": ours, "cuBLAS bf16": cublas, "gemlite": gemlite, "tinygemm": tinygemm, "torchao": torchao}


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", PEERS)
@torch.no_grad()
def test_linear(benchmark, peer, shape, kind, m):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    from mhaffn.kernels import timing

    torch.manual_seed(0)
    rows, width = SHAPES[shape]
    format, group = FORMATS[kind]
    group = min(group, width) if format == "int4" else width
    first = random_weight(format, rows, width, group)
    count = max(2, -(-COLD_BYTES // first.nbytes))
    weights = [first, *(random_weight(format, rows, width, group) for _ in range(count - 1))]
    try:
        products = [PEERS[peer](weight) for weight in weights]
    except ModuleNotFoundError as problem:
        pytest.skip(f"pip install {PIP[(problem.name or '').partition('.')[0]]}")
    x = torch.randn(m, width, device="cuda", dtype=torch.bfloat16)
    truth = x.float() @ dequantize(first).T
    error = ((products[0](x).float() - truth).norm() / truth.norm()).item()
    assert error < (0.1 if peer == "torchao" else 1e-2), error
    rounds = -(-CALLS_MIN // count) if m <= 128 else 1
    graph = timing.Graph([lambda product=product: product(x) for product in products] * rounds)

    def replay():
        graph.graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=20, warmup_rounds=2)
    seconds = timing.by_turns({peer: graph}, 20)[peer].median_ms / 1e3
    benchmark.extra_info |= {
        "peer": peer,
        "device_us": seconds * 1e6,
        "packed_bytes_per_s": first.nbytes / seconds,
        "flop_per_s": 2 * m * rows * width / seconds,
        "relative_error": error,
    }
