"""Products with weights in few bits on a GPU: ``pytest -m gpu tests/kernels``."""

from __future__ import annotations

import pytest
import torch

from mhaffn import ops
from mhaffn.kernels import library
from mhaffn.quantized import dequantize

from .checks import poison, relative_error
from .weights import random_weight

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
if torch.cuda.is_available():
    from mhaffn.kernels import nvrtc, nvrtc_quantized, quantized, tiles

FORMATS = [
    ("int4", 32, False),
    ("int4", 64, False),
    ("int4", 64, True),
    ("int4", 128, False),
    ("int4", 128, True),
    ("int4", 256, True),
    ("int8", 32, False),
    ("int8", 128, False),
    ("int8", 0, False),
    ("fp8", 0, False),
]
SM90_TILES = [
    {"TOKENS": 64, "STAGES": 8, "AHEAD": 4},
    {"TOKENS": 128, "STAGES": 8, "AHEAD": 4},
    {"TOKENS": 256, "STAGES": 4, "AHEAD": 2},
    {"TOKENS": 256, "STAGES": 4, "AHEAD": 1},
]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """What a kernel does not write stays NaN."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.manual_seed(0)
    poison(monkeypatch)
    with torch.no_grad():
        yield


def check(run, x, weights, truth_of):
    """At most twice the error of dequantising in x's dtype and multiplying, plus a quarter unit of rounding."""
    truth = truth_of(x.double(), *(dequantize(w, torch.float64) for w in weights))
    peer = truth_of(x, *(dequantize(w, x.dtype) for w in weights))
    got = run()
    mine, theirs = relative_error(got, truth), relative_error(peer, truth)
    assert mine <= 2 * theirs + torch.finfo(x.dtype).eps / 4, f"error {mine:.2e}, PyTorch's {theirs:.2e}"
    assert torch.equal(got, run()), "bit for bit the same"


def product(x, w):
    return x @ w.T


def gated(x, a, b):
    return torch.nn.functional.silu(x @ a.T) * (x @ b.T)


def randn(m, width, dtype):
    return torch.randn(m, width, device="cuda").to(dtype)


def weight(format, rows, width, group, zeros, scale_dtype=torch.bfloat16):
    return random_weight(
        format, rows, width, group or width, zeros=zeros, scale_dtype=scale_dtype, unit=3.0, device="cuda"
    )


def divisions(m, rows, width, tile):
    """The one chosen, all tiles whole, and every number of parts that may be."""
    ahead, processors = tile["AHEAD"], tiles.gpu(torch.cuda.current_device()).processors
    steps = -(-width // (128 * ahead)) * ahead
    count = -(-rows // 128) * -(-m // tile["TOKENS"])
    tail = count % processors
    parts = [p for p in range(1, steps + 1) if steps % (p * ahead) == 0 and 0 < tail * p <= processors]
    return [None, (count, 1), *((count - tail, p) for p in parts)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("format", "group", "zeros"), FORMATS, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1536, 576), (70, 1536), (520, 8192)], ids=str)
@pytest.mark.parametrize("implementation", ["triton", "cuda", "sm90"])
def test_products(implementation, rows, width, format, group, zeros, dtype):
    if width % (group or 1):
        pytest.skip("the group does not divide the width")
    if implementation == "cuda" and not nvrtc.available():
        pytest.skip("CuPy does not work here")
    if implementation == "sm90" and not (HOPPER and nvrtc.available()):
        pytest.skip("for sm_90, through CuPy")
    a, b = (weight(format, rows, width, group, zeros) for _ in range(2))
    if implementation == "sm90":
        for m, number in ((9, 0), (63, 0), (17, 0), (128, 1), (300, 2), (257, 3)):
            x, tile = randn(m, width, dtype), SM90_TILES[number]
            for cut in divisions(m, rows, width, tile):
                check(lambda x=x, t=tile, c=cut: nvrtc_quantized.many_rows(x, a, t, c), x, [a], product)
        return
    run = quantized.linear if implementation == "triton" else nvrtc_quantized.few_rows
    for m in (1, 7, 16) if implementation == "cuda" else (1, 16, 100):
        x = randn(m, width, dtype)
        check(lambda x=x: run(x, a, None), x, [a], product)
        if m <= 16:
            check(lambda x=x: run(x, a, b), x, [a, b], gated)


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("dtype", HALVES)
def test_many_rows_do_not_differ_from_run_to_run(dtype, format):
    """Of enough blocks to fill the GPU, so that their timing differs."""
    if not (HOPPER and nvrtc.available()):
        pytest.skip("for sm_90, through CuPy")
    a = weight(format, 28672, 4096, 128 if format == "int4" else 0, False)
    for m, number in ((64, 0), (128, 1), (600, 2), (600, 3)):
        x, tile = randn(m, 4096, dtype), SM90_TILES[number]
        for cut in divisions(m, 28672, 4096, tile):
            first = nvrtc_quantized.many_rows(x, a, tile, cut)
            assert relative_error(first, x @ dequantize(a, dtype).T) < 1e-2
            assert all(torch.equal(first, nvrtc_quantized.many_rows(x, a, tile, cut)) for _ in range(20))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [17, 513, 2049, 4100])
@pytest.mark.parametrize(("format", "group", "zeros"), [("int4", 64, True), ("int8", 0, False)], ids=str)
def test_an_ffn_as_one_chain(format, group, zeros, m, dtype):
    """By itself: beyond 512 rows so narrow a matrix would not choose it."""
    if not (HOPPER and nvrtc.available()):
        pytest.skip("for sm_90, through CuPy")
    w1, w3 = (weight(format, 1536, 576, group, zeros) for _ in range(2))
    w2 = weight(format, 576, 1536, group, zeros)
    x = randn(m, 576, dtype)
    truth_of = lambda x, w1, w3, w2: gated(x, w1, w3) @ w2.T  # noqa: E731
    check(lambda: nvrtc_quantized.gate_up_down(x, w1, w3, w2), x, [w1, w3, w2], truth_of)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_scales_of_other_types(dtype, zeros, scale_dtype):
    a = weight("int4", 520, 1536, 128, zeros, scale_dtype)
    x = randn(130, 1536, dtype)
    check(lambda: quantized.linear(x[:5], a), x[:5], [a], product)
    if nvrtc.available():
        check(lambda: nvrtc_quantized.few_rows(x[:5], a, None), x[:5], [a], product)
        if HOPPER:
            check(lambda: nvrtc_quantized.many_rows(x, a, SM90_TILES[1]), x, [a], product)


@pytest.mark.parametrize(("format", "group", "zeros"), FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_dequantized_is_the_formula(dtype, format, group, zeros):
    a = weight(format, 70, 768, group, zeros)
    assert torch.equal(quantized.dequantize(a, dtype), dequantize(a, dtype))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("m", [1, 3, 16, 17, 63, 129, 511, 2049])
@pytest.mark.parametrize(("format", "group", "zeros"), [("int4", 64, True), ("int8", 0, False)], ids=str)
def test_ops(format, group, zeros, m, dtype):
    w1, w3 = (weight(format, 1536, 576, group, zeros) for _ in range(2))
    w2 = weight(format, 576, 1536, group, zeros)
    x = randn(m, 576, dtype)
    check(lambda: ops.linear(x, w1), x, [w1], product)
    truth_of = lambda x, w1, w3, w2: gated(x, w1, w3) @ w2.T  # noqa: E731
    check(lambda: ops.ffn(x, w1, w3, w2), x, [w1, w3, w2], truth_of)


@pytest.mark.parametrize("m", [17, 300])
def test_ffn_in_two_formats_of_rows_that_are_not_aligned(m):
    w1, w3 = (weight("int4", 1536, 576, 64, False) for _ in range(2))
    w2 = weight("int8", 576, 1536, 0, False)
    x = randn(m, 577, torch.bfloat16)[:, 1:]
    truth_of = lambda x, w1, w3, w2: gated(x, w1, w3) @ w2.T  # noqa: E731
    check(lambda: ops.ffn(x, w1, w3, w2), x, [w1, w3, w2], truth_of)
    check(lambda: ops.linear(x, w1), x, [w1], product)


def test_weights_past_two_to_the_31():
    width = 8192
    a = weight("int8", (1 << 31) // width + 16, width, 0, False)
    x = randn(2, width, torch.bfloat16)
    tail = library.rows_of(a, a.shape[0] - 64, a.shape[0])
    want = x.float() @ dequantize(tail).T
    runs = [lambda: quantized.linear(x, a), lambda: ops.linear(x.repeat(80, 1), a)[:2]]
    if nvrtc.available():
        runs.append(lambda: nvrtc_quantized.few_rows(x, a, None))
    for run in runs:
        assert relative_error(run()[:, -64:], want) < 1e-2


def test_graph_capture_and_compile():
    w1, w3 = (weight("int4", 1536, 576, 64, False) for _ in range(2))
    w2 = weight("int4", 576, 1536, 64, False)
    for m in (1, 40, 300):
        x = randn(m, 576, torch.bfloat16)
        eager = ops.ffn(x, w1, w3, w2)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.ffn(x, w1, w3, w2)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, eager)
        compiled = torch.compile(lambda x: ops.ffn(x, w1, w3, w2), fullgraph=True)
        assert torch.equal(compiled(x), eager)


def test_misaligned_weights_are_refused():
    a = random_weight("int8", 64, 64, 64, device="cuda")
    buffer = torch.zeros(1 + 64 * 64, dtype=torch.int8, device="cuda")
    moved = type(a)("int8", buffer[1:].view(64, 64), a.scales, None, 64)
    with pytest.raises(ValueError, match="got 1 past a multiple of 16"):
        ops.linear(randn(2, 64, torch.bfloat16), moved)
