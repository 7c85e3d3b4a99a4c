"""Attention against cuDNN and FlashAttention-2 through SDPA, and against FlashAttention-4: Llama-3.1-70B heads, bf16.

``python bench/bench_attention.py --out bench/results/attention.json``. 64 query heads, 8 key heads, K 128. Decode runs
in CUDA graphs over buffers that do not fit L2. "ops" is what a user gets; the kernels are listed beside it.
"""

# ruff: noqa: B023  (the calls of a row run before the loop goes on)

from __future__ import annotations

import torch
import torch.nn.functional as F
from timer import COLD_BYTES, Bench, main
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhaffn import ops
from mhaffn.kernels import attention_decode, attention_prefill, attention_prefill_sm90, reference

HQ, H, K = 64, 8, 128
BACKENDS = {"cuDNN SDPA": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2 SDPA": SDPBackend.FLASH_ATTENTION}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def sdpa(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def single(peers):
    return {name: [call] for name, call in peers.items()}


def through(backend, q, k, v, **options):
    with sdpa_kernel(backend):
        return sdpa(q, k, v, **options)


def flash_attention_4(q, k, v, causal):
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v, causal=causal)
    return out[0] if isinstance(out, tuple) else out


def prefill(bench: Bench) -> None:
    for t in (2048, 8192, 16384):
        q, k, v = randn(1, t, HQ, K), randn(1, t, H, K), randn(1, t, H, K)
        truth = (
            reference.attention(q, k, v)
            if t == 2048
            else through(BACKENDS["FlashAttention-2 SDPA"], q, k, v, is_causal=True)
        )
        flops = 2 * t * t * HQ * K
        peers = {
            "mhaffn.ops.attention": lambda: ops.attention(q, k, v),
            "Triton prefill": lambda: attention_prefill.attention_prefill(q, k, v, True, None, None, K**-0.5),
            "Gluon prefill": lambda: attention_prefill_sm90.attention_prefill_sm90(q, k, v, True, K**-0.5),
            **{n: (lambda b=b: through(b, q, k, v, is_causal=True)) for n, b in BACKENDS.items()},
            "FlashAttention-4": lambda: flash_attention_4(q, k, v, True),
        }
        bench.compare(f"prefill causal T={t}", single(peers), truth, flops=flops)


def chunked_prefill(bench: Bench) -> None:
    t, s = 512, 8192
    q, k, v = randn(1, t, HQ, K), randn(1, s, H, K), randn(1, s, H, K)
    allowed = torch.ones(t, s, dtype=torch.bool, device="cuda").tril(s - t)
    truth = reference.attention(q, k, v)
    flops = 4 * t * (s - t / 2) * HQ * K
    peers = {
        "mhaffn.ops.attention": lambda: ops.attention(q, k, v),
        "SDPA with mask": lambda: sdpa(q, k, v, attn_mask=allowed),
    }
    bench.compare(f"chunk T={t} of S={s}", single(peers), truth, flops=flops)


def padded(bench: Bench) -> None:
    b, t = 4, 2048
    q, k, v = randn(b, t, HQ, K), randn(b, t, H, K), randn(b, t, H, K)
    padding = torch.ones(b, 1, 1, t, dtype=torch.bool, device="cuda")
    for i, n in enumerate((0, 200, 700, 1500)):
        padding[i, ..., :n] = False
    full = padding & torch.ones(t, t, dtype=torch.bool, device="cuda").tril()
    truth = torch.cat(
        [reference.attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask=padding[i : i + 1]) for i in range(b)]
    )
    seen = full.any(-1).transpose(1, 2)[..., None]  # rows that see nothing: NaN or an average, by library

    def repeated():  # what Hugging Face models do: keys repeated for every query head, a mask of [B, 1, T, T]
        r = [x.repeat_interleave(HQ // H, 2).transpose(1, 2) for x in (k, v)]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), *r, attn_mask=full).transpose(1, 2)
        return torch.where(seen, out, 0)

    flops = 2 * b * t * t * HQ * K
    peers = {
        "ops, padding mask": lambda: ops.attention(q, k, v, mask=padding),
        "ops, full mask": lambda: ops.attention(q, k, v, mask=full, causal=False),
        "ops, full mask and causal": lambda: ops.attention(q, k, v, mask=full),
        "SDPA, mask and repeat": repeated,
        "SDPA, mask, GQA": lambda: torch.where(seen, sdpa(q, k, v, attn_mask=full), 0),
    }
    bench.compare(f"left-padded B={b} T={t}", single(peers), truth, flops=flops)


def decode(bench: Bench) -> None:
    for b in (1, 8):
        for s in (2048, 8192, 32768):
            size = b * s * H * K * 4
            sets = [(randn(b, s, H, K), randn(b, s, H, K)) for _ in range(max(2, COLD_BYTES // size))]
            q = randn(b, 1, HQ, K)
            lens = torch.full((b,), s, device="cuda")
            truth = reference.attention(q, *sets[0])
            peers = {
                "mhaffn.ops.attention": ops.attention,
                "ops, device lengths": lambda q, k, v: ops.attention(q, k, v, kv_lens=lens),
                **{n: (lambda q, k, v, w=w: through(w, q, k, v)) for n, w in BACKENDS.items()},
                "FlashAttention-4": lambda q, k, v: flash_attention_4(q, k, v, False),
            }
            calls = {n: [lambda k=k, v=v, p=p: p(q, k, v) for k, v in sets] for n, p in peers.items()}
            bench.compare(f"decode B={b} S={s}", calls, truth, bytes_moved=size)
            for tokens in (4, 16, 64) if b == 1 and s == 8192 else ():
                few = randn(b, tokens, HQ, K)
                kernels = {
                    "decode kernel": attention_decode.attention_decode,
                    "prefill kernel": attention_prefill.attention_prefill,
                }
                calls = {
                    n: [lambda k=k, v=v, p=p: p(few, k, v, True, None, None, K**-0.5) for k, v in sets]
                    for n, p in kernels.items()
                }
                bench.compare(f"{tokens} tokens S={s}", calls, reference.attention(few, *sets[0]), bytes_moved=size)


def run(bench: Bench) -> None:
    decode(bench)
    prefill(bench)
    chunked_prefill(bench)
    padded(bench)


if __name__ == "__main__":
    main("attention", run)
