"""Attention against cuDNN and FlashAttention-2 through SDPA, and against FlashAttention-4: Llama-3.1-70B heads, bf16.

    pytest bench/bench_attention.py -m gpu --benchmark-only
    python bench/bench_attention.py --out attention.json

64 query heads, 8 key heads, K 128. Decode runs in CUDA graphs over buffers that do not fit L2. "ops" is what a user
gets; the kernels are listed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from by_peer import by_peer
from timer import COLD_BYTES, DEVICE, Case, by_name, main_cases, randn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhaffn import ops
from mhaffn.kernels import attention_decode, attention_prefill, attention_prefill_sm90, reference

HQ, H, K = 64, 8, 128
SCALE = K**-0.5
BACKENDS = {"cuDNN SDPA": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2 SDPA": SDPBackend.FLASH_ATTENTION}
PADDING = (0, 200, 700, 1500)


def sdpa(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def through(backend: SDPBackend, **options: Any) -> Callable[..., torch.Tensor]:
    def call(q, k, v, *rest):
        with sdpa_kernel(backend):
            return sdpa(q, k, v, **options)

    return call


def flash_attention_4(causal: bool) -> Callable[..., torch.Tensor]:
    def call(q, k, v, *rest):
        from flash_attn.cute import flash_attn_func

        out = flash_attn_func(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return call


def qkv(b: int, t: int, s: int, hq: int = HQ, h: int = H, k: int = K) -> tuple[torch.Tensor, ...]:
    return randn(b, t, hq, k), randn(b, s, h, k), randn(b, s, h, k)


def tiny() -> Iterator[Case]:
    """What a CPU can do too: four query heads on two key heads, K 64."""
    peers = {"mhaffn.ops.attention": ops.attention, "SDPA": lambda q, k, v: sdpa(q, k, v, is_causal=q.shape[1] > 1)}
    for t, s in ((128, 128), (1, 512)):
        yield Case(
            f"tiny T={t} S={s}", peers, lambda t=t, s=s: [qkv(1, t, s, 4, 2, 64) for _ in range(4)],
            reference.attention, bytes_moved=0 if t > 1 else s * 2 * 64 * 4, flops=4 * t * (s - t / 2) * 4 * 64,
            small=True,
        )  # fmt: skip


def prefill() -> Iterator[Case]:
    for t in (2048, 8192, 16384):
        peers = {
            "mhaffn.ops.attention": ops.attention,
            "Triton prefill": lambda q, k, v: attention_prefill.attention_prefill(q, k, v, True, None, None, SCALE),
            "Gluon prefill": lambda q, k, v: attention_prefill_sm90.attention_prefill_sm90(q, k, v, True, SCALE),
            **{name: through(backend, is_causal=True) for name, backend in BACKENDS.items()},
            "FlashAttention-4": flash_attention_4(True),
        }
        truth = reference.attention if t == 2048 else through(BACKENDS["FlashAttention-2 SDPA"], is_causal=True)
        yield Case(f"prefill causal T={t}", peers, lambda t=t: [qkv(1, t, t)], truth, flops=2 * t * t * HQ * K)


def chunked_prefill() -> Iterator[Case]:
    t, s = 512, 8192
    peers = {
        "mhaffn.ops.attention": lambda q, k, v, allowed: ops.attention(q, k, v),
        "SDPA with mask": lambda q, k, v, allowed: sdpa(q, k, v, attn_mask=allowed),
    }

    def inputs():
        return [(*qkv(1, t, s), torch.ones(t, s, dtype=torch.bool, device=DEVICE).tril(s - t))]

    truth = lambda q, k, v, allowed: reference.attention(q, k, v)  # noqa: E731
    yield Case(f"chunk T={t} of S={s}", peers, inputs, truth, flops=4 * t * (s - t / 2) * HQ * K)


def padded() -> Iterator[Case]:
    b, t = len(PADDING), 2048

    def inputs():
        padding = torch.ones(b, 1, 1, t, dtype=torch.bool, device=DEVICE)
        for i, n in enumerate(PADDING):
            padding[i, ..., :n] = False
        full = padding & torch.ones(t, t, dtype=torch.bool, device=DEVICE).tril()
        seen = full.any(-1).transpose(1, 2)[..., None]  # rows that see nothing: NaN or an average, by library
        return [(*qkv(b, t, t), padding, full, seen)]

    def truth(q, k, v, padding, full, seen):
        one = (slice(i, i + 1) for i in range(b))
        return torch.cat([reference.attention(q[i], k[i], v[i], mask=padding[i]) for i in one])

    def repeated(q, k, v, padding, full, seen):  # as Hugging Face models do: a key head for every query head
        r = [x.repeat_interleave(HQ // H, 2).transpose(1, 2) for x in (k, v)]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), *r, attn_mask=full).transpose(1, 2)
        return torch.where(seen, out, 0)

    peers = {
        "ops, padding mask": lambda q, k, v, padding, full, seen: ops.attention(q, k, v, mask=padding),
        "ops, full mask": lambda q, k, v, padding, full, seen: ops.attention(q, k, v, mask=full, causal=False),
        "ops, full mask and causal": lambda q, k, v, padding, full, seen: ops.attention(q, k, v, mask=full),
        "SDPA, mask and repeat": repeated,
        "SDPA, mask, GQA": lambda q, k, v, padding, full, seen: torch.where(seen, sdpa(q, k, v, attn_mask=full), 0),
    }
    yield Case(f"left-padded B={b} T={t}", peers, inputs, truth, flops=2 * b * t * t * HQ * K)


def decode() -> Iterator[Case]:
    for b in (1, 8):
        for s in (2048, 8192, 32768):
            size = b * s * H * K * 4

            def inputs(b=b, s=s, size=size):
                q, lens = randn(b, 1, HQ, K), torch.full((b,), s, device=DEVICE)
                return [(q, *qkv(b, 1, s)[1:], lens) for _ in range(max(2, COLD_BYTES // size))]

            peers = {
                "mhaffn.ops.attention": lambda q, k, v, lens: ops.attention(q, k, v),
                "ops, device lengths": lambda q, k, v, lens: ops.attention(q, k, v, kv_lens=lens),
                **{name: through(backend) for name, backend in BACKENDS.items()},
                "FlashAttention-4": flash_attention_4(False),
            }
            truth = lambda q, k, v, lens: reference.attention(q, k, v)  # noqa: E731
            yield Case(f"decode B={b} S={s}", peers, inputs, truth, bytes_moved=size)


def few_tokens() -> Iterator[Case]:
    s = 8192
    size = s * H * K * 4
    kernels = {
        "decode kernel": attention_decode.attention_decode,
        "prefill kernel": attention_prefill.attention_prefill,
    }
    peers = {
        name: lambda q, k, v, kernel=kernel: kernel(q, k, v, True, None, None, SCALE)
        for name, kernel in kernels.items()
    }
    for t in (4, 16, 64):

        def inputs(t=t):
            q = randn(1, t, HQ, K)
            return [(q, *qkv(1, 1, s)[1:]) for _ in range(max(2, COLD_BYTES // size))]

        yield Case(f"{t} tokens S={s}", peers, inputs, reference.attention, bytes_moved=size)


CASES = by_name(
    case for make in (tiny, decode, few_tokens, prefill, chunked_prefill, padded) for case in make()
)  # fmt: skip


@by_peer(CASES)
def test_attention(case, peer, record):
    record(CASES[case], peer)


if __name__ == "__main__":
    main_cases("attention", CASES)
