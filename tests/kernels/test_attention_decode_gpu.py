"""``attention_decode.cu`` on a GPU, whatever the tile table makes the default: ``pytest -m gpu tests/kernels``."""

from __future__ import annotations

import pytest
import torch

from mhaffn.kernels import library, reference

from .checks import poison, relative_error

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
if torch.cuda.is_available():
    from mhaffn.kernels import attention_decode, nvrtc, nvrtc_attention, tiles

SHAPES = [
    # B, S, query heads, key heads, K
    (1, 1, 8, 8, 128),
    (3, 63, 14, 2, 64),
    (1, 127, 9, 3, 128),
    (3, 1000, 7, 1, 128),
    (1, 2049, 64, 8, 128),
    (3, 2049, 8, 8, 64),
    (1, 32768, 64, 8, 128),
]
VARIANTS = {
    "table": {},
    "one split": {"WAVES": 0},
    "two steps in registers": {"WARPS": 8, "BLOCKS": 1, "DEPTH": 2},
    "interleaved": {"WARPS": 4, "BLOCKS": 4, "DEPTH": 1, "WAVES": 4, "INTERLEAVED": 1},
    "one step in registers": {"WARPS": 8, "BLOCKS": 2, "DEPTH": 1, "AHEAD": 2},
    "16 warps": {"WARPS": 16, "BLOCKS": 1, "DEPTH": 1, "AHEAD": 0},
}


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """What a kernel does not write stays NaN."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if not nvrtc.available():
        pytest.skip("CuPy does not work here")
    torch.manual_seed(0)
    poison(monkeypatch)
    with torch.no_grad():
        yield


def randn(*shape, dtype, scale: float = 1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def run(q, k, v, lens=None, variant="table"):
    b, s, h, dim = k.shape
    machine = tiles.machine(q.device)
    tile = tiles.tile("attention_decode_cuda", machine.arch, dim=dim, programs=b * h, keys=s) | VARIANTS[variant]
    plan = nvrtc_attention.plan(q.dtype == torch.float16, dim, b * h, s, q.device.index, tile)
    return nvrtc_attention.attention_decode(q, k, v, lens, dim**-0.5, plan)


def check(q, k, v, lens=None, variant="table"):
    """At most twice the error of PyTorch's op in the same dtype, plus a quarter unit of rounding; the same bits twice.

    Caches keep what was there: NaN past the lengths, which PyTorch gets as zeros.
    """
    clean = [torch.nan_to_num(x, nan=0.0) for x in (k, v)] if lens is not None else [k, v]
    truth = reference.attention(q.float(), *(x.float() for x in clean), kv_lens=lens)
    peer = library.attention(q, *clean, True, lens, None, None)
    got = run(q, k, v, lens, variant)
    mine, theirs = relative_error(got, truth), relative_error(peer, truth)
    assert mine <= 2 * theirs + torch.finfo(q.dtype).eps / 4, f"error {mine:.2e}, PyTorch's {theirs:.2e}"
    assert torch.equal(got, run(q, k, v, lens, variant)), "bit for bit the same"


def qkv(b, s, hq, h, dim, dtype, scale=1.0):
    q, k, v = randn(b, 1, hq, dim, dtype=dtype, scale=scale), *randn(2, b, s, h, dim, dtype=dtype)
    return q, k * scale, v


def caches(b, s, h, dim, dtype, lens):
    """Static caches [B, H, S, K], NaN past each length, as views [B, S, H, K]."""
    both = randn(2, b, h, s + 8, dim, dtype=dtype)
    for i, n in enumerate(lens):
        both[:, i, :, n:] = float("nan")
    return [x.transpose(1, 2)[:, :s] for x in both]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, variant, dtype):
    if dtype == torch.float16 and variant != "table":
        pytest.skip("one variant in fp16 tells")
    check(*qkv(*shape, dtype), variant=variant)


@pytest.mark.parametrize("lens_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lens", [(1000, 333, 0), (1, 17, 999)], ids=str)
def test_lengths_past_which_caches_hold_nothing(lens, variant, lens_dtype):
    k, v = caches(3, 1000, 2, 128, torch.bfloat16, lens)
    q = randn(3, 14, 1, 128, dtype=torch.bfloat16).transpose(1, 2)
    check(q, k, v, torch.tensor(lens, device="cuda", dtype=lens_dtype), variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_calls_alone(variant):
    """No graph, and few keys: for compute-sanitizer."""
    for dtype in HALVES:
        for b, s, hq, h, dim in ((1, 1, 8, 8, 128), (3, 63, 14, 2, 64), (2, 300, 7, 1, 128), (1, 517, 16, 2, 128)):
            q, k, v = qkv(b, s, hq, h, dim, dtype)
            for lens in (None, [s] + [0] * (b - 1), [max(1, s // 2)] * b):
                run(q, k, v, None if lens is None else torch.tensor(lens, device="cuda"), variant)
    torch.cuda.synchronize()


def test_nothing_past_the_keys_is_read_into_the_sums():
    buffer = torch.full((2, 1, 400, 8, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
    buffer[:, :, :333] = randn(2, 1, 333, 8, 128, dtype=torch.bfloat16)
    q = randn(1, 1, 64, 128, dtype=torch.bfloat16)
    check(q, *buffer[:, :, :333])


@pytest.mark.parametrize("scale", [1e-3, 10.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_magnitudes(scale, dtype):
    check(*qkv(1, 2049, 64, 8, 128, dtype, scale))


def test_scores_that_rise_all_along():
    q, k, v = qkv(1, 3000, 64, 8, 128, torch.bfloat16)
    k = k + q.view(1, 1, 8, 8, 128).mean(3) * torch.linspace(0, 40, 3000, device="cuda")[None, :, None, None]
    check(q, k.bfloat16(), v)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_one_graph_see_what_was_written(variant):
    """Each step writes q and a key, then attends: launches overlap, and have asked for those lines before."""
    k_cache, v_cache = randn(2, 2, 1100, 8, 128, dtype=torch.bfloat16)
    inputs = [randn(2, 80, 128, dtype=torch.bfloat16) for _ in range(12)]
    q, lens = randn(2, 1, 64, 128, dtype=torch.bfloat16), torch.tensor([1000, 37], device="cuda")
    rows = torch.arange(2, device="cuda")

    def steps(attend, k, v, lens):
        outs = []
        for x in inputs:
            q.copy_(x[:, None, :64])
            k[rows, lens], v[rows, lens] = x[:, 64:72], x[:, 72:]
            lens += 1
            outs.append(attend(q, k, v, lens))
        return outs

    def exact(q, k, v, lens):
        return reference.attention(q.float(), k.float(), v.float(), kv_lens=lens)

    truth = steps(exact, k_cache.clone(), v_cache.clone(), lens.clone())
    captured = [x.clone() for x in (k_cache, v_cache, lens)]
    steps(lambda *x: run(*x, variant), *captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = steps(lambda *x: run(*x, variant), *captured)
    for _ in range(3):
        for x, y in zip(captured, (k_cache, v_cache, lens), strict=True):
            x.copy_(y)
        graph.replay()
        for got, want in zip(outs, truth, strict=True):
            assert relative_error(got, want) < 1e-2


def test_what_it_cannot_read_stays_with_the_sibling():
    q, k, v = qkv(2, 300, 8, 2, 128, torch.bfloat16)
    odd = torch.zeros(2, 300, 2, 129, device="cuda", dtype=torch.bfloat16)[..., 1:]
    mask = torch.ones(2, 1, 1, 300, device="cuda", dtype=torch.bool)
    assert nvrtc_attention.fits(q, k, v, None, None)
    assert not nvrtc_attention.fits(q, odd, v, None, None) and not nvrtc_attention.fits(q, k, v, None, mask)
    assert not nvrtc_attention.fits(q.expand(2, 2, 8, 128), k, v, None, None)
    with pytest.raises(ValueError, match="16-byte aligned"):
        nvrtc_attention.attention_decode(q, odd, v, None, 0.1)
    near = attention_decode.attention_decode(q, k, v, True, None, None, 128**-0.5)
    assert relative_error(run(q, k, v), near.float()) < 1e-2
