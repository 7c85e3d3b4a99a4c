"""The kernels on a GPU: ``pytest -m gpu tests/kernels``; ``-k small`` is what compute-sanitizer runs."""

from __future__ import annotations

import pytest
import torch

from mhaffn import ops
from mhaffn.kernels import library, reference

from .checks import poison, relative_error

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
if HOPPER:
    from mhaffn.kernels import attention_prefill_sm90
if torch.cuda.is_available():
    from mhaffn.kernels import attention_decode, attention_prefill, ffn, nvrtc, rmsnorm, rope


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """What a kernel does not write stays NaN."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.manual_seed(0)
    poison(monkeypatch)
    with torch.no_grad():
        yield


def up(*tensors):
    """The dtype of the truth: float64 for float32, float32 for the halves."""
    return [t.to(torch.float64 if t.dtype == torch.float32 else torch.float32) for t in tensors]


def randn(*shape, dtype, scale: float = 1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def assert_as_good_as(got, peer, truth):
    """At most twice the error of the same-dtype PyTorch op, plus a quarter unit of rounding."""
    mine, theirs = relative_error(got, truth), relative_error(peer, truth)
    assert mine <= 2 * theirs + torch.finfo(got.dtype).eps / 4, f"error {mine:.2e}, PyTorch's {theirs:.2e}"


def check_attention(kernel, q, k, v, **options):
    wide = {"causal": True, "kv_lens": None, "mask": None, **options}
    truth = reference.attention(
        *up(q, k, v), **wide, compute=torch.float64 if q.dtype == torch.float32 else torch.float32
    )
    peer = library.attention(q, k, v, wide["causal"], wide["kv_lens"], wide["mask"], None)
    got = kernel(q, k, v, wide["causal"], wide["kv_lens"], wide["mask"], q.shape[-1] ** -0.5)
    assert_as_good_as(got, peer, truth)
    again = kernel(q, k, v, wide["causal"], wide["kv_lens"], wide["mask"], q.shape[-1] ** -0.5)
    assert torch.equal(got, again), "bit for bit the same"


def qkv(b, t, s, hq, h, dim, dtype, scale=1.0):
    q = randn(b, t, hq, dim, dtype=dtype, scale=scale)
    return q, randn(b, s, h, dim, dtype=dtype, scale=scale), randn(b, s, h, dim, dtype=dtype)


@pytest.mark.parametrize(("t", "s"), [(1024, 1024), (512, 1024)])
def test_float32_attention_of_grouped_heads_never_holds_the_scores_of_all_of_them(t, s):
    q, k, v = qkv(1, t, s, 32, 8, 128, torch.float32)
    ops.attention(q, k, v)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = ops.attention(q, k, v)
    held = torch.cuda.max_memory_allocated() - before
    assert held < 32 * t * s * 4 / 2, held
    truth = reference.attention(*up(q, k, v), causal=True, kv_lens=None, mask=None, compute=torch.float64)
    assert relative_error(got, truth) < 1e-5


def options_of(case, b, t, s):
    if case == "lens":
        return {"kv_lens": torch.tensor([s, max(1, s // 3), 0][:b], device="cuda")}
    if case == "left padding":
        mask = torch.ones(b, 1, 1, s, dtype=torch.bool, device="cuda")
        mask[-1, ..., : s // 3] = False
        return {"mask": mask}
    if case == "mask":
        mask = torch.rand(b, 1, t, s, device="cuda") > 0.4
        mask[0, :, 0] = False
        return {"mask": mask, "causal": False}
    return {}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", ["", "lens", "left padding", "mask"])
@pytest.mark.parametrize(
    ("t", "s", "heads", "dim"),
    [
        (1, 1, (8, 8), 64),
        (1, 63, (9, 3), 64),
        (1, 2049, (64, 8), 128),
        (1, 1000, (14, 2), 96),
        (5, 1000, (64, 8), 128),
        (16, 127, (9, 3), 64),
        (63, 1000, (8, 8), 128),
        (7, 300, (8, 1), 160),
    ],
    ids=str,
)
def test_attention_decode(t, s, heads, dim, case, dtype):
    q, k, v = qkv(3, t, s, *heads, dim, dtype)
    check_attention(attention_decode.attention_decode, q, k, v, **options_of(case, 3, t, s))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", ["", "lens", "left padding", "mask"])
@pytest.mark.parametrize(
    ("t", "s", "heads", "dim"),
    [
        (63, 63, (9, 3), 64),
        (127, 1000, (64, 8), 128),
        (1000, 1000, (14, 2), 96),
        (2049, 2049, (8, 8), 128),
        (300, 200, (4, 1), 256),
        (1, 5, (2, 2), 64),
    ],
    ids=str,
)
def test_attention_prefill(t, s, heads, dim, case, dtype):
    q, k, v = qkv(2, t, s, *heads, dim, dtype)
    check_attention(attention_prefill.attention_prefill, q, k, v, **options_of(case, 2, t, s))


@pytest.mark.skipif(not HOPPER, reason="for sm_90")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("t", "s"), [(1, 5), (63, 63), (127, 1000), (128, 128), (200, 300), (2049, 2049)], ids=str)
def test_attention_prefill_sm90(t, s, dim, causal, dtype):
    def kernel(q, k, v, causal, kv_lens, mask, scale):
        return attention_prefill_sm90.attention_prefill_sm90(q, k, v, causal, scale)

    check_attention(kernel, *qkv(2, t, s, 14, 2, dim, dtype), causal=causal)


@pytest.mark.parametrize("t", [1, 100])
def test_attention_float32_through_the_op(t):
    q, k, v = qkv(2, t, 300, 6, 2, 128, torch.float32)
    lens = torch.tensor([300, 150], device="cuda")
    truth = reference.attention(*up(q, k, v), kv_lens=lens, compute=torch.float64)
    assert relative_error(ops.attention(q, k, v, kv_lens=lens), truth) < 2e-6


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_attention_magnitudes(scale):
    check_attention(attention_prefill.attention_prefill, *qkv(1, 200, 200, 8, 2, 128, torch.bfloat16, scale))
    check_attention(attention_decode.attention_decode, *qkv(1, 2, 200, 8, 2, 128, torch.bfloat16, scale))


@pytest.mark.parametrize("t", [1, 200])
def test_attention_strides(t):
    cache = randn(2, 2, 8, 512, 128, dtype=torch.bfloat16)  # [B, k or v, H, S, K]: heads before positions
    k, v = (x.transpose(1, 2)[:, 3:403] for x in cache.unbind(1))
    q = randn(2, 64, t, 128, dtype=torch.bfloat16).transpose(1, 2)
    for options in ({}, {"kv_lens": torch.tensor([400, 333], device="cuda")}):
        kernel = attention_decode.attention_decode if t == 1 else attention_prefill.attention_prefill
        check_attention(kernel, q, k, v, **options)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16, 17, 63, 64])
@pytest.mark.parametrize(("width", "inner"), [(576, 1536), (4096, 14336), (72, 200)], ids=str)
@pytest.mark.parametrize("implementation", ["triton", "cuda"])
def test_ffn_few_rows(implementation, width, inner, m, dtype):
    if implementation == "cuda" and m > nvrtc.FEW_ROWS_MAX:
        pytest.skip("the CUDA kernel is for at most 16 rows")
    if implementation == "cuda" and not nvrtc.available():
        pytest.skip("CuPy does not work here")
    run = nvrtc.ffn_few_rows if implementation == "cuda" else ffn.ffn_few_rows
    check_ffn(run, m, width, inner, dtype)


def check_ffn(run, m, width, inner, dtype):
    x = randn(m, width, dtype=dtype)
    buffer = randn(8 + 3 * width * inner, dtype=dtype, scale=0.02)[8:]  # a view, 16 bytes into a buffer
    w1, w3, w2 = buffer.view(3, -1).unbind(0)
    w1, w3, w2 = w1.view(inner, width), w3.view(inner, width), w2.view(width, inner)
    wide = up(x, w1, w3, w2)
    truth = reference.ffn(*wide, compute=wide[0].dtype)
    got = run(x, w1, w3, w2)
    assert_as_good_as(got, library.ffn(x, w1, w3, w2), truth)
    assert torch.equal(got, run(x, w1, w3, w2))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("m", "width", "inner"), [(127, 576, 1536), (1000, 512, 1032), (257, 8192, 1024)], ids=str)
def test_gate_up(m, width, inner, dtype):
    x, w1, w3 = (randn(n, width, dtype=dtype, scale=s) for n, s in ((m, 1), (inner, 0.02), (inner, 0.02)))
    truth = torch.nn.functional.silu(x.float() @ w1.float().T) * (x.float() @ w3.float().T)
    for run in (ffn.gate_up, ffn.linear_silu_mul):
        assert_as_good_as(run(x, w1, w3), library.gated(x, w1, w3), truth)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("m", [1, 7, 16, 63, 127, 1000])
def test_ffn_op(m, dtype):
    check_ffn(ops.ffn, m, 576, 1536, dtype)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(1, 576), (63, 8192), (1000, 4096), (3, 5, 100), (2, 20000)], ids=str)
def test_rms_norm(shape, dtype):
    x, residual = randn(2, *shape, dtype=dtype)
    weight = randn(shape[-1], dtype=dtype)
    compute = torch.float64 if dtype == torch.float32 else torch.float32
    truth = reference.rms_norm(x, weight, 1e-5, compute=compute)
    assert_as_good_as(rmsnorm.rms_norm(x, weight, 1e-5), library.rms_norm(x, weight, 1e-5), truth)
    got, total = rmsnorm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    truth = reference.rms_norm(total, weight, 1e-5, compute=compute)
    assert_as_good_as(got, library.rms_norm(total, weight, 1e-5), truth)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("t", "heads", "dim"), [(1, (64, 8), 128), (63, (9, 3), 64), (1000, (14, 2), 96)], ids=str)
def test_rope(t, heads, dim, interleaved, dtype):
    q, k, v = qkv(2, t, t, *heads, dim, dtype)
    angle = torch.rand(2, t, dim // 2, device="cuda") * 100
    cos, sin = angle.cos(), angle.sin()
    truth = reference.rope(q, k, cos, sin, interleaved=interleaved)
    for got, want in zip(rope.rope(q, k, cos, sin, interleaved), truth, strict=True):
        assert relative_error(got, want) <= torch.finfo(dtype).eps / 2
    caches = torch.zeros(2, 2, t + 9, heads[1], dim, device="cuda", dtype=dtype)
    start = torch.tensor([9, 2], device="cuda")
    assert relative_error(rope.rope_write(q, k, v, cos, sin, *caches, start, interleaved), truth[0]) < 1e-2
    for i, first in enumerate((9, 2)):
        assert relative_error(caches[0, i, first : first + t], truth[1][i]) <= torch.finfo(dtype).eps / 2
        assert torch.equal(caches[1, i, first : first + t], v[i])


def small_calls():
    """Every op once, small, at odd sizes."""
    bf = torch.bfloat16
    q, k, v = qkv(2, 5, 70, 9, 3, 64, bf)
    long_q, long_k, long_v = qkv(1, 130, 130, 4, 2, 96, bf)
    square = qkv(2, 130, 130, 4, 2, 64, bf)
    lens = torch.tensor([70, 33], device="cuda")
    mask = torch.rand(2, 1, 5, 70, device="cuda") > 0.3
    x, weight = randn(7, 72, dtype=bf), randn(72, dtype=bf)
    w1, w3, w2 = (randn(*s, dtype=bf) for s in ((200, 72), (200, 72), (72, 200)))
    cos, sin = torch.rand(2, 5, 32, device="cuda")
    caches = torch.zeros(2, 2, 80, 3, 64, device="cuda", dtype=bf)
    start = torch.tensor([3, 70], device="cuda")
    return {
        "decode": lambda: ops.attention(q, k, v),
        "decode with lengths": lambda: ops.attention(q, k, v, kv_lens=lens, mask=mask),
        "prefill": lambda: attention_prefill.attention_prefill(long_q, long_k, long_v, True, None, None, 0.1),
        "prefill with a mask": lambda: ops.attention(long_q, long_k, long_v, mask=torch.ones_like(mask[:1, :, :1, :1])),
        "prefill, no mask": lambda: ops.attention(*square),
        "ffn": lambda: ops.ffn(x, w1, w3, w2),
        "ffn of more rows": lambda: ops.ffn(x.repeat(5, 1), w1, w3, w2),
        "ffn of many rows": lambda: ops.ffn(x.repeat(20, 1), w1, w3, w2),
        "gate_up": lambda: ffn.gate_up(x.repeat(20, 1), w1, w3),
        "rms_norm": lambda: ops.rms_norm(x, weight, 1e-5),
        "add_rms_norm": lambda: ops.add_rms_norm(x, x, weight, 1e-5),
        "rope": lambda: ops.rope(q, k[:, :5], cos, sin),
        "rope_write": lambda: ops.rope_write(q, k[:, :5], v[:, :5], cos, sin, *caches, start),
    }


def test_small_calls_alone():
    """No graph and no caching allocator needed: for compute-sanitizer."""
    for call in small_calls().values():
        call()
    torch.cuda.synchronize()


def test_small_calls_and_their_graph_capture():
    calls = small_calls()
    eager = {name: call() for name, call in calls.items()}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = {name: call() for name, call in calls.items()}
    graph.replay()
    torch.cuda.synchronize()
    for name in calls:
        pairs = zip(*(r if isinstance(r, tuple | list) else (r,) for r in (eager[name], captured[name])), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_compiles_as_one_graph():
    calls = small_calls()
    for name in ("decode with lengths", "ffn", "add_rms_norm", "rope"):
        torch.testing.assert_close(torch.compile(calls[name], fullgraph=True)(), calls[name]())


def test_lengths_grow_under_one_graph():
    q, k, v = qkv(2, 1, 1024, 8, 2, 128, torch.bfloat16)
    lens = torch.tensor([1, 1], device="cuda")
    ops.attention(q, k, v, kv_lens=lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(q, k, v, kv_lens=lens)
    for lengths in ([5, 700], [1024, 0]):
        lens.copy_(torch.tensor(lengths))
        graph.replay()
        truth = reference.attention(q.float(), k.float(), v.float(), kv_lens=lens)
        assert relative_error(out, truth) < 1e-2


def test_steps_that_overlap_see_what_was_written(monkeypatch):
    """Each step of one graph writes a key, then attends: the launches after it have asked for those lines before."""
    monkeypatch.undo()  # poison is written by kernels, which would keep the launches apart
    dtype = torch.bfloat16
    caches = randn(2, 2, 1100, 8, 128, dtype=dtype)
    inputs = [qkv(2, 1, 1, 64, 8, 128, dtype) for _ in range(20)]
    cos, sin = torch.rand(2, 1, 64, device="cuda")
    first = torch.tensor([[999, 36], [1000, 37]], device="cuda")  # where a key goes, and how many there are then

    def steps(attend, k_cache, v_cache, places):
        outs = []
        for q, k, v in inputs:
            places += 1
            turned = ops.rope_write(q, k, v, cos, sin, k_cache, v_cache, places[0])
            outs += [attend(turned, k_cache, v_cache, kv_lens=places[1]) for _ in range(2)]
        return outs

    def exact(q, k, v, kv_lens):
        return reference.attention(*up(q, k, v), kv_lens=kv_lens)

    truth = steps(exact, *caches.clone(), first.clone())
    captured, places = caches.clone(), first.clone()
    steps(ops.attention, *captured, places)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = steps(ops.attention, *captured, places)
    for _ in range(3):
        captured.copy_(caches)
        places.copy_(first)
        graph.replay()
        for got, want in zip(outs, truth, strict=True):
            assert relative_error(got, want) < 1e-2


def test_keys_that_cannot_be_prefetched():
    q, k, v = qkv(2, 1, 300, 8, 2, 128, torch.bfloat16)
    odd = torch.zeros(2, 300, 2, 129, device="cuda", dtype=torch.bfloat16)[..., 1:]
    odd.copy_(k)
    check_attention(attention_decode.attention_decode, q, odd, v)


def test_offsets_past_two_to_the_31():
    keys = (1 << 31) // (8 * 128) + 1000
    k = torch.randn(1, keys, 8, 128, device="cuda", dtype=torch.bfloat16)
    q = randn(1, 1, 8, 128, dtype=torch.bfloat16)
    # The last keys are far more alike to the query than the rest: they are what the result is made of.
    k[:, -500:] += 2 * q
    got = attention_decode.attention_decode(q, k, k, True, None, None, 128**-0.5)
    near = attention_decode.attention_decode(q, k[:, -500:], k[:, -500:], True, None, None, 128**-0.5)
    assert relative_error(got, near) < 2e-2
    q = randn(1, 128, 8, 128, dtype=torch.bfloat16)
    got = attention_prefill.attention_prefill(q, k[:, -1000:], k[:, -1000:], True, None, None, 128**-0.5)
    want = attention_prefill.attention_prefill(
        q, k[:, -1000:].clone(), k[:, -1000:].clone(), True, None, None, 128**-0.5
    )
    assert torch.equal(got, want)


def test_ffn_weights_past_two_to_the_31():
    inner, width = (1 << 31) // 8192 + 16, 8192
    w1 = torch.randn(inner, width, device="cuda", dtype=torch.bfloat16) * 0.02
    x = randn(2, width, dtype=torch.bfloat16)
    tail = slice(inner - 64, inner)
    for run in (ffn.few_rows, nvrtc.few_rows) if nvrtc.available() else (ffn.few_rows,):
        assert relative_error(run(x, w1, w1)[:, tail], library.gated(x, w1[tail], w1[tail]).float()) < 1e-2


def test_misaligned_weights_are_refused():
    buffer = randn(1 + 64 * 64, dtype=torch.bfloat16)
    w = buffer[1:].view(64, 64)
    with pytest.raises(ValueError, match="got 2 past a multiple of 16"):
        ops.ffn(randn(2, 64, dtype=torch.bfloat16), w, w, w)
