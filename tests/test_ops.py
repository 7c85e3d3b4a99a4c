"""mhaffn.ops through its public surface: values against the float64 truth, arguments, registration."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mhaffn import ops
from mhaffn.kernels import library, reference
from mhaffn.quantized import dequantize

from .kernels.weights import random_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = [(9, 3), (14, 2), (8, 8), (64, 8)]


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


def assert_as_good_as(got: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor) -> None:
    """The error against the truth is at most twice that of the same-dtype PyTorch op, plus one unit of its rounding."""
    assert got.shape == truth.shape
    assert got.dtype == peer.dtype
    assert relative_error(got, truth) <= 2 * relative_error(peer, truth) + torch.finfo(got.dtype).eps / 4


def plain_attention(q, k, v, allowed):
    groups = q.shape[2] // k.shape[2]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(groups, 1),
        v.transpose(1, 2).repeat_interleave(groups, 1),
        attn_mask=allowed,
    )
    return out.transpose(1, 2)


def angles(t: int, dim: int, *, batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    position = torch.arange(t, dtype=torch.float64)[:, None]
    angle = position * 500000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if batch is not None:
        angle = angle + torch.arange(batch)[:, None, None]
    return angle.cos().float(), angle.sin().float()


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 63, 64), (127, 8), (0, 5, 32), (3, 1)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 1e3])
def test_rms_norm(dtype, shape, magnitude):
    x = (torch.randn(shape) * magnitude).to(dtype)
    weight = torch.rand(shape[-1]).to(dtype)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-5, compute=torch.float64)
    peer = torch.nn.functional.rms_norm(x, (shape[-1],), weight, 1e-5)
    got = ops.rms_norm(x, weight, 1e-5)
    if x.numel():
        # One more rounding than F.rms_norm, by definition (LlamaRMSNorm rounds before the weight multiplies).
        assert relative_error(got, truth) <= 2 * relative_error(peer, truth) + torch.finfo(dtype).eps / 2
    assert got.shape == x.shape and got.dtype == dtype


def test_rms_norm_rounds_like_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(576, eps=1e-5).to(torch.bfloat16)
    norm.weight.copy_(torch.rand(576))
    x = torch.randn(3, 7, 576, dtype=torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_the_norm_of_the_rounded_sum(dtype):
    x, residual = torch.randn(2, 2, 5, 64).to(dtype)
    weight = torch.rand(64).to(dtype)
    normalised, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normalised, ops.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_rope(dtype, interleaved, batch):
    cos, sin = angles(63, 64, batch=batch)
    q = torch.randn(2, 9, 63, 64).to(dtype).transpose(1, 2)  # Hugging Face hands over transposed heads
    k = torch.randn(2, 63, 3, 64).to(dtype)
    got = ops.rope(q, k, cos, sin, interleaved=interleaved)
    truth = reference.rope(
        q.double(), k.double(), cos.double(), sin.double(), interleaved=interleaved, compute=torch.float64
    )
    for mine, want in zip(got, truth, strict=True):
        assert mine.is_contiguous()
        assert relative_error(mine, want) <= torch.finfo(dtype).eps


def test_rope_matches_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = angles(17, 64, batch=1)
    q, k = torch.randn(1, 17, 9, 64), torch.randn(1, 17, 3, 64)
    full = [torch.cat((t, t), -1) for t in (cos, sin)]
    want = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *full)
    for mine, theirs in zip(ops.rope(q, k, cos, sin), want, strict=True):
        torch.testing.assert_close(mine, theirs.transpose(1, 2))


def test_rope_interleaved_matches_the_complex_form():
    cos, sin = angles(17, 64)
    q, k = torch.randn(2, 17, 4, 64), torch.randn(2, 17, 2, 64)
    turn = torch.complex(cos, sin)[None, :, None, :]
    for mine, x in zip(ops.rope(q, k, cos, sin, interleaved=True), (q, k), strict=True):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 32, 2))
        torch.testing.assert_close(mine, torch.view_as_real(pairs * turn).flatten(-2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_write_fills_the_cache_in_place(interleaved):
    cos, sin = angles(5, 64, batch=2)
    q, k, v = torch.randn(2, 5, 9, 64), torch.randn(2, 5, 3, 64), torch.randn(2, 5, 3, 64)
    caches = torch.zeros(2, 2, 20, 3, 64)
    start = torch.tensor([3, 15], dtype=torch.int32)
    got = ops.rope_write(q, k, v, cos, sin, *caches, start, interleaved=interleaved)
    want_q, want_k = ops.rope(q, k, cos, sin, interleaved=interleaved)
    assert torch.equal(got, want_q)
    for i, first in enumerate(start.tolist()):
        assert torch.equal(caches[0, i, first : first + 5], want_k[i])
        assert torch.equal(caches[1, i, first : first + 5], v[i])
    assert caches.count_nonzero() == 2 * k.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 63), (5, 127), (63, 63), (127, 64)], ids=str)
def test_attention_causal(dtype, heads, t, s):
    hq, h = heads
    q, k, v = (
        torch.randn(2, t, hq, 64).to(dtype),
        torch.randn(2, s, h, 64).to(dtype),
        torch.randn(2, s, h, 64).to(dtype),
    )
    truth = reference.attention(q.double(), k.double(), v.double(), compute=torch.float64)
    allowed = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    peer = plain_attention(q, k, v, allowed).nan_to_num(0.0)
    assert_as_good_as(ops.attention(q, k, v), peer, truth)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_head_dims(dim, causal):
    q, k, v = torch.randn(1, 33, 6, dim), torch.randn(1, 40, 2, dim), torch.randn(1, 40, 2, dim)
    truth = reference.attention(q.double(), k.double(), v.double(), causal=causal, compute=torch.float64)
    assert relative_error(ops.attention(q, k, v, causal=causal), truth) < 1e-6


@pytest.mark.parametrize("t", [1, 4, 31])
def test_attention_lengths_equal_cut_sequences(t):
    q, k, v = torch.randn(3, t, 6, 64), torch.randn(3, 50, 2, 64), torch.randn(3, 50, 2, 64)
    lens = torch.tensor([50, 33, 0], dtype=torch.int32)
    k[1, 33:], v[1, 33:], k[2], v[2] = 9.0, 9.0, 9.0, 9.0
    got = ops.attention(q, k, v, kv_lens=lens)
    for i, n in enumerate(lens.tolist()[:2]):
        alone = ops.attention(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n])
        torch.testing.assert_close(got[i : i + 1], alone)
    assert torch.equal(got[2], torch.zeros_like(got[2]))


def test_attention_left_padding():
    q, k, v = torch.randn(2, 20, 6, 64), torch.randn(2, 20, 2, 64), torch.randn(2, 20, 2, 64)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1, ..., :7] = False
    got = ops.attention(q, k, v, mask=mask)
    torch.testing.assert_close(got[:1], ops.attention(q[:1], k[:1], v[:1]))
    torch.testing.assert_close(got[1:, 7:], ops.attention(q[1:, 7:], k[1:, 7:], v[1:, 7:]))
    assert torch.equal(got[1, :7], torch.zeros(7, 6, 64)), "a query that sees no key gives zeros"


def test_attention_mask_of_each_head_and_scale():
    q, k, v = torch.randn(2, 5, 6, 64), torch.randn(2, 9, 2, 64), torch.randn(2, 9, 2, 64)
    mask = torch.rand(2, 6, 5, 9) > 0.4
    truth = reference.attention(q, k, v, causal=False, mask=mask, scale=0.3, compute=torch.float64)
    torch.testing.assert_close(ops.attention(q, k, v, causal=False, mask=mask, scale=0.3), truth)


def test_attention_takes_strided_caches():
    cache = torch.randn(2, 2, 64, 3, 64)  # K and V side by side, longer than what is used
    k, v = cache.unbind(1)
    q = torch.randn(2, 9, 8, 64).transpose(1, 2)
    got = ops.attention(q, k[:, :40], v[:, :40])
    torch.testing.assert_close(got, ops.attention(q.contiguous(), k[:, :40].contiguous(), v[:, :40].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 7, 63])
def test_ffn(dtype, m):
    x = torch.randn(m, 96).to(dtype)
    w1, w3, w2 = ((torch.randn(s) * 0.1).to(dtype) for s in ((160, 96), (160, 96), (96, 160)))
    truth = reference.ffn(*(t.double() for t in (x, w1, w3, w2)), compute=torch.float64)
    linear = torch.nn.functional.linear
    peer = linear(torch.nn.functional.silu(linear(x, w1)) * linear(x, w3), w2)
    assert_as_good_as(ops.ffn(x, w1, w3, w2), peer, truth)


def test_ffn_takes_views_into_a_flat_buffer():
    buffer = torch.randn(8 + 3 * 64 * 48) * 0.1  # float32 sums of unit size
    w1, w3, w2 = (buffer[8 + i * 3072 : 8 + (i + 1) * 3072] for i in range(3))
    w1, w3, w2 = w1.view(48, 64), w3.view(48, 64), w2.view(64, 48)
    x = torch.randn(2, 3, 64)[:, ::2]
    torch.testing.assert_close(ops.ffn(x, w1, w3, w2), reference.ffn(x, w1, w3, w2))


@pytest.mark.parametrize("heads", [1, 6])
def test_heads_of_a_group_one_at_a_time_give_what_all_give_at_once(heads):
    from mhaffn.kernels import library

    q, k, v = torch.randn(2, 5, 6, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    allowed = torch.rand(2, heads, 5, 9) > 0.3
    allowed[..., 0] = True
    parts = [t.transpose(1, 2) for t in (q, k, v)]
    whole = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=allowed, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(library.by_group(q, k, v, allowed, False, 0.3), whole)


FEW_BITS = [("int4", 32, False), ("int4", 32, True), ("int8", 32, False), ("int8", 96, False), ("fp8", 96, False)]


def few_bits(rows, width, format, group, zeros, scale_dtype=torch.float32):
    return random_weight(format, rows, width, group, zeros=zeros, scale_dtype=scale_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 7, 63])
@pytest.mark.parametrize(("format", "group", "zeros"), FEW_BITS, ids=str)
def test_weights_in_few_bits(format, group, zeros, m, dtype):
    w1, w3, w2 = (few_bits(96, 96, format, group, zeros) for _ in range(3))
    x = torch.randn(m, 96).to(dtype)
    truth = [dequantize(w, torch.float64) for w in (w1, w3, w2)]
    plain = [dequantize(w, dtype) for w in (w1, w3, w2)]
    got = ops.linear(x, w1), ops.ffn(x, w1, w3, w2)
    wanted = x.double() @ truth[0].T, reference.ffn(x.double(), *truth, compute=torch.float64)
    linear = torch.nn.functional.linear
    silu = torch.nn.functional.silu
    peers = linear(x, plain[0]), linear(silu(linear(x, plain[0])) * linear(x, plain[1]), plain[2])
    for mine, peer, want in zip(got, peers, wanted, strict=True):
        if m:
            assert_as_good_as(mine, peer, want)
        assert mine.shape == want.shape


def test_a_weight_in_few_bits_is_dequantised_in_chunks(monkeypatch):
    from mhaffn.kernels import library

    weight, x = few_bits(70, 96, "int4", 32, True), torch.randn(2, 3, 96)
    whole = ops.linear(x, weight)
    monkeypatch.setattr(library, "DEQUANTIZED_BYTES", 96 * 4 * 9)
    torch.testing.assert_close(ops.linear(x, weight), whole)


def test_formats_of_an_ffn_may_differ():
    w1, w3 = few_bits(64, 96, "int4", 32, True), few_bits(64, 96, "int8", 96, False)
    w2 = few_bits(96, 64, "fp8", 64, False)
    x = torch.randn(5, 96)
    plain = [dequantize(w) for w in (w1, w3, w2)]
    wanted = reference.ffn(x, *plain)
    torch.testing.assert_close(ops.ffn(x, w1, w3, w2), wanted)
    torch.testing.assert_close(ops.ffn(x, w1, plain[1], w2), wanted)
    torch.testing.assert_close(ops.ffn(x, plain[0], plain[1], w2), wanted)
    for part, wrong in ((1, (w1, plain[1][:1], w2)), (2, (w1, plain[1], plain[2][:7])), (2, (plain[0], w3, w1))):
        with pytest.raises(ValueError, match=f"ffn: w{(1, 3, 2)[part]} shape: got .* expected"):
            ops.ffn(x, *wrong)


def test_linear_of_a_plain_weight():
    x, w = torch.randn(2, 3, 96), torch.randn(64, 96)
    assert torch.equal(ops.linear(x, w), torch.nn.functional.linear(x, w))


def test_ffn_in_row_chunks_equals_the_whole(monkeypatch):
    from mhaffn.kernels import library

    x = torch.randn(37, 32)
    w1, w3, w2 = (torch.randn(shape) * 0.1 for shape in ((48, 32), (48, 32), (32, 48)))
    whole = ops.ffn(x, w1, w3, w2)
    monkeypatch.setattr(library, "FFN_CHUNK_BYTES", 48 * 4 * 5)
    torch.testing.assert_close(ops.ffn(x, w1, w3, w2), whole)


def test_empty_batches():
    q, k = torch.randn(0, 5, 6, 64), torch.randn(0, 9, 2, 64)
    assert ops.attention(q, k, k).shape == q.shape
    assert torch.equal(
        ops.attention(torch.randn(2, 3, 6, 64), k.new_empty(2, 0, 2, 64), k.new_empty(2, 0, 2, 64)),
        torch.zeros(2, 3, 6, 64),
    )
    assert ops.ffn(torch.randn(0, 32), torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48)).shape == (0, 32)
    cos, sin = angles(5, 64)
    assert ops.rope(q, q, cos, sin)[0].shape == q.shape


# --- arguments ------------------------------------------------------------------------------------------------------


def randn(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


BAD = {
    "norm weight": lambda: ops.rms_norm(randn(2, 8), randn(7), 1e-5),
    "norm dtype": lambda: ops.rms_norm(randn(2, 8), randn(8).half(), 1e-5),
    "norm float64": lambda: ops.rms_norm(randn(2, 8).double(), randn(8).double(), 1e-5),
    "norm integer": lambda: ops.rms_norm(torch.ones(2, 8, dtype=torch.int32), randn(8), 1e-5),
    "norm device": lambda: ops.rms_norm(randn(2, 8), randn(8, device="meta"), 1e-5),
    "norm stride": lambda: ops.rms_norm(randn(8, 8).t(), randn(8), 1e-5),
    "norm residual": lambda: ops.add_rms_norm(randn(2, 8), randn(1, 8), randn(8), 1e-5),
    "rope full width": lambda: ops.rope(randn(1, 5, 2, 8), randn(1, 5, 2, 8), randn(5, 8), randn(5, 8)),
    "rope angles dtype": lambda: ops.rope(randn(1, 5, 2, 8), randn(1, 5, 2, 8), randn(5, 4).half(), randn(5, 4).half()),
    "rope odd": lambda: ops.rope(randn(1, 5, 2, 7), randn(1, 5, 2, 7), randn(5, 3), randn(5, 3)),
    "rope k": lambda: ops.rope(randn(1, 5, 2, 8), randn(1, 6, 2, 8), randn(5, 4), randn(5, 4)),
    "rope sin": lambda: ops.rope(randn(1, 5, 2, 8), randn(1, 5, 2, 8), randn(5, 4), randn(1, 5, 4)),
    "cache too short": lambda: ops.rope_write(
        *[randn(1, 5, 2, 8)] * 3, randn(5, 4), randn(5, 4), *[randn(1, 4, 2, 8)] * 2, torch.tensor([0])
    ),
    "cache start": lambda: ops.rope_write(
        *[randn(1, 5, 2, 8)] * 3, randn(5, 4), randn(5, 4), *[randn(1, 9, 2, 8)] * 2, torch.tensor([[0]])
    ),
    "attention heads": lambda: ops.attention(randn(1, 5, 5, 8), randn(1, 5, 2, 8), randn(1, 5, 2, 8)),
    "attention dims": lambda: ops.attention(randn(5, 5, 8), randn(1, 5, 2, 8), randn(1, 5, 2, 8)),
    "attention v": lambda: ops.attention(randn(1, 5, 2, 8), randn(1, 5, 2, 8), randn(1, 6, 2, 8)),
    "attention dim": lambda: ops.attention(randn(1, 5, 2, 512), randn(1, 5, 2, 512), randn(1, 5, 2, 512)),
    "attention batch": lambda: ops.attention(randn(2, 5, 2, 8), randn(1, 5, 2, 8), randn(1, 5, 2, 8)),
    "lens shape": lambda: ops.attention(*[randn(2, 5, 2, 8)] * 3, kv_lens=torch.tensor([5])),
    "lens float": lambda: ops.attention(*[randn(2, 5, 2, 8)] * 3, kv_lens=torch.tensor([5.0, 5.0])),
    "mask float": lambda: ops.attention(*[randn(2, 5, 2, 8)] * 3, mask=randn(2, 1, 5, 5)),
    "mask shape": lambda: ops.attention(*[randn(2, 5, 2, 8)] * 3, mask=torch.ones(2, 5, dtype=torch.bool)),
    "ffn w1": lambda: ops.ffn(randn(2, 8), randn(16, 9), randn(16, 9), randn(8, 16)),
    "ffn w3": lambda: ops.ffn(randn(2, 8), randn(16, 8), randn(15, 8), randn(8, 16)),
    "ffn w2": lambda: ops.ffn(randn(2, 8), randn(16, 8), randn(16, 8), randn(16, 8)),
    **{
        f"few bits {name}": lambda changes=changes: ops.linear(
            randn(2, 64), dataclasses.replace(few_bits(48, 64, "int4", 32, True), **changes)
        )
        for name, changes in {
            "format": {"format": "int3"},
            "values dtype": {"values": torch.zeros(48, 32, dtype=torch.int8)},
            "values shape": {"values": torch.zeros(48 * 32, dtype=torch.uint8)},
            "columns": {"values": torch.zeros(48, 16, dtype=torch.uint8)},
            "group": {"group": 64 * 3},
            "whole row of int4": {"format": "int4", "group": 16},
            "scales shape": {"scales": torch.zeros(48, 1)},
            "scales dtype": {"scales": torch.zeros(48, 2, dtype=torch.float64)},
            "scales strides": {"scales": torch.zeros(2, 48).t()},
            "zeros shape": {"zeros": torch.zeros(47, 2)},
            "zeros dtype": {"zeros": torch.zeros(48, 2, dtype=torch.bfloat16)},
            "zeros device": {"zeros": torch.zeros(48, 2, device="meta")},
        }.items()
    },
    "int8 zeros": lambda: ops.linear(
        randn(2, 64), dataclasses.replace(few_bits(48, 64, "int8", 32, False), zeros=torch.zeros(48, 2))
    ),
    "fp8 groups": lambda: ops.linear(randn(2, 64), few_bits(48, 64, "fp8", 32, False)),
    "linear columns": lambda: ops.linear(randn(2, 64), randn(48, 63)),
    "ffn, two kinds of weights": lambda: ops.ffn(
        randn(2, 64), few_bits(48, 64, "int8", 32, False), randn(48, 63), randn(64, 48)
    ),
    "few bits w3": lambda: ops.ffn(
        randn(2, 64), *(few_bits(n, 64, "int8", 32, False) for n in (48, 47)), few_bits(64, 48, "int8", 48, False)
    ),
    "few bits w2": lambda: ops.ffn(
        randn(2, 64), *(few_bits(n, 64, "int8", 32, False) for n in (48, 48)), few_bits(63, 48, "int8", 48, False)
    ),
    "ffn strides": lambda: ops.ffn(randn(2, 8), randn(16, 16)[:, :8], randn(16, 8), randn(8, 16)),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(call):
    with pytest.raises(ValueError, match=r"got .*, expected "):
        call()


def test_gradients_are_refused_and_parameters_are_fine():
    weight = torch.nn.Parameter(torch.ones(8))
    ops.rms_norm(torch.randn(2, 8), weight, 1e-5)
    with torch.enable_grad():
        ops.rms_norm(torch.randn(2, 8), weight.detach(), 1e-5)
        with pytest.raises(RuntimeError, match="no backward"):
            ops.rms_norm(torch.randn(2, 8), weight, 1e-5)
        x = torch.randn(1, 5, 2, 8, requires_grad=True)
        with pytest.raises(RuntimeError, match="no backward"):
            ops.attention(x, x, x)


@pytest.mark.parametrize("part", ["scales", "zeros"])
def test_gradients_are_refused_of_every_part(part):
    weight = random_weight("int4", 32, 32, 32, zeros=True)
    learned = dataclasses.replace(weight, **{part: torch.nn.Parameter(getattr(weight, part))})
    x = torch.randn(2, 32)
    ops.linear(x, learned)
    with torch.enable_grad():
        ops.linear(x, weight)
        with pytest.raises(RuntimeError, match="no backward"):
            ops.linear(x, learned)
        with pytest.raises(RuntimeError, match="no backward"):
            ops.ffn(x, weight, weight, learned)


def test_gradients_are_refused_of_caches():
    q, start, angle = torch.randn(1, 1, 2, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4)
    learned = torch.zeros(1, 4, 2, 8, requires_grad=True)
    with torch.enable_grad():
        for caches in ((learned, torch.zeros(1, 4, 2, 8)), (torch.zeros(1, 4, 2, 8), learned)):
            with pytest.raises(RuntimeError, match="no backward"):
                ops.rope_write(q, q, q, angle, angle, *caches, start)


@pytest.mark.parametrize("name", ["attention", "attention masked", "ffn", "linear_quantized", "ffn_quantized"])
def test_results_under_autocast_are_of_the_dtype_given(name):
    operator, arguments = cases()[name]
    truth = operator(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = operator(*arguments)
    torch.testing.assert_close(got, truth, rtol=0.05, atol=0.05 * truth.abs().max().item())  # and of its dtype


def test_autocast_of_a_token_and_of_rows_in_chunks(monkeypatch):
    x, w, q = torch.randn(6, 32), torch.randn(3, 48, 32) / 6, torch.randn(2, 1, 4, 8)
    w2 = w[2].t().contiguous()
    truth = ops.ffn(x, w[0], w[1], w2)
    monkeypatch.setattr(library, "FFN_CHUNK_BYTES", 2 * 48 * 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ops.ffn(x, w[0], w[1], w2), truth, rtol=0.05, atol=0.05)
        assert ops.attention(q, q, q).dtype == ops.linear(x, w[0]).dtype == torch.float32


# --- registration ---------------------------------------------------------------------------------------------------


def cases(device: str = "cpu"):
    """One call of each op, as (operator, arguments)."""
    q, k = torch.randn(2, 7, 6, 64, device=device), torch.randn(2, 9, 2, 64, device=device)
    cos, sin = (t.to(device) for t in angles(7, 64))
    w = torch.randn(3, 48, 32, device=device)
    lens, mask = torch.tensor([9, 4], device=device), torch.rand(2, 1, 7, 9, device=device) > 0.3
    namespace = torch.ops.mhaffn
    records = [random_weight("int4", 64, 64, 32, zeros=zeros, device=device) for zeros in (True, False, True)]
    parts = [[getattr(r, part) for r in records] for part in ("values", "scales", "zeros", "format", "group")]
    return {
        "rms_norm": (namespace.rms_norm, (torch.randn(3, 32, device=device), torch.rand(32, device=device), 1e-5)),
        "add_rms_norm": (
            namespace.add_rms_norm,
            (*torch.randn(2, 3, 32, device=device), torch.rand(32, device=device), 1e-5),
        ),
        "rope": (namespace.rope, (q, q[:, :, :2], cos, sin, False)),
        "rope interleaved": (namespace.rope, (q, q[:, :, :2], cos, sin, True)),
        "rope_write": (
            namespace.rope_write,
            (
                q[:, :5],
                k[:, :5],
                k[:, :5],
                cos[:5],
                sin[:5],
                k.clone(),
                k.clone(),
                torch.tensor([4, 1], device=device),
                False,
            ),
        ),
        "attention": (namespace.attention, (q, k, k, True, None, None, None)),
        "attention masked": (namespace.attention, (q, k, k, True, lens, mask, 0.2)),
        "linear_quantized": (namespace.linear_quantized, (torch.randn(3, 64, device=device), *(p[0] for p in parts))),
        "ffn_quantized": (namespace.ffn_quantized, (torch.randn(3, 64, device=device), *parts)),
        "ffn": (namespace.ffn, (torch.randn(3, 32, device=device), w[0], w[1], w[2].t().contiguous())),
    }


@pytest.mark.parametrize("name", cases().keys())
def test_opcheck(name):
    operator, arguments = cases()[name]
    torch.library.opcheck(operator.default, arguments)


def test_compiles_as_one_graph():
    def layer(x, weight, q, k, cos, sin, w):
        x, _ = ops.add_rms_norm(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
        q, k = ops.rope(q, k, cos, sin)
        return ops.ffn(x, w[0], w[1], w[2]), ops.attention(q, k, k)

    cos, sin = angles(7, 64)
    w = [torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48)]
    arguments = (torch.randn(3, 32), torch.rand(32), torch.randn(2, 7, 6, 64), torch.randn(2, 7, 2, 64), cos, sin, w)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mine, want in zip(compiled(*arguments), layer(*arguments), strict=True):
        assert torch.equal(mine, want)


def test_same_result_twice():
    for operator, arguments in cases().values():
        first, second = operator(*arguments), operator(*arguments)
        first, second = (r if isinstance(r, tuple | list) else (r,) for r in (first, second))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kernels_run_on_the_gpu_of_their_tensors(monkeypatch):
    current = [0]

    class On:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", On)
    seen = ops._on_its_gpu(lambda x, scale: (current[-1], scale))
    for index in (0, 1):
        assert seen(SimpleNamespace(device=torch.device("cuda", index)), 2.0) == (index, 2.0)
    assert current == [0]


@pytest.mark.parametrize(
    ("width", "rows", "expected"),
    [(8192, 128, "gate_up"), (8192, 512, "linear_silu_mul"), (8192, 2048, "gate_up"), (4096, 512, "gate_up")],
)
def test_who_makes_the_gate_and_up_products_of_many_rows(monkeypatch, width, rows, expected):
    pytest.importorskip("triton")
    from mhaffn.kernels import ffn as kernels
    from mhaffn.kernels import select

    called = []
    for name in ("gate_up", "linear_silu_mul"):
        monkeypatch.setattr(kernels, name, lambda x, w1, w3, name=name: called.append(name) or x @ w1.T)
    w = torch.zeros(16, width, dtype=torch.bfloat16)
    select.ffn(torch.zeros(rows, width, dtype=torch.bfloat16), w, w, w.T.contiguous())
    assert called == [expected]


class Seen(TorchDispatchMode):
    """Notes the operators that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_what_watches_operators_sees_them():
    x, weight = torch.randn(3, 8), torch.randn(8)
    expected = ops.rms_norm(x, weight, 1e-5)

    def run(x):
        return ops.rms_norm(x, weight, 1e-5)

    with Seen() as seen:
        got = run(x)
    torch.testing.assert_close(got, expected)
    assert seen.names == ["mhaffn::rms_norm"]
    with torch.profiler.profile() as profile:
        run(x)
    assert "mhaffn::rms_norm" in {event.key for event in profile.key_averages()}
    assert "mhaffn.rms_norm" in str(make_fx(run)(x).graph)
    assert "mhaffn::rms_norm" in str(torch.jit.trace(run, (x,)).graph)
    Subclass.names = []
    run(x.as_subclass(Subclass))
    assert any("rms_norm" in name for name in Subclass.names)
    watched = []
    torch.func.vmap(lambda x: watched.append(ops._watched()) or run(x))(torch.randn(2, 3, 8))
    assert watched == [True]


def test_a_call_that_nothing_watches_goes_past_the_dispatcher():
    q, k, cos, sin = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 8), *torch.rand(2, 2, 4)
    files = []
    sys.setprofile(lambda frame, event, _: files.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        got = ops.rope(q, k, cos, sin)
    finally:
        sys.setprofile(None)
    assert any(name.endswith("ops.py") for name in files)
    assert not any(name.endswith("_ops.py") for name in files)
    torch.testing.assert_close(got, torch.ops.mhaffn.rope(q, k, cos, sin, False))
