"""Norm and RoPE against plain PyTorch, torch.compile and Liger, at 2048 and 1 tokens of Llama-3.1-70B widths, bf16.

``python bench/bench_norm_rope.py --out bench/results/norm_rope.json``. The roof is a device-to-device copy.
"""

from __future__ import annotations

import torch
from timer import COLD_BYTES, Bench, main

from mhaffn import ops
from mhaffn.kernels import library, reference

D, HQ, H, K = 8192, 64, 8, 128


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def liger_norm(x, weight, eps):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def norms(bench: Bench, t: int) -> None:
    weight = randn(D)
    sets = [randn(1, t, D) for _ in range(max(2, min(100, COLD_BYTES // (t * D * 4))))]
    compiled = torch.compile(library.rms_norm, dynamic=False)
    peers = {
        "mhaffn.ops.rms_norm": ops.rms_norm,
        "PyTorch, written out": library.rms_norm,
        "F.rms_norm": lambda x, w, eps: torch.nn.functional.rms_norm(x, (D,), w, eps),
        "torch.compile": compiled,
        "Liger": liger_norm,
    }
    calls = {n: [lambda x=x, p=p: p(x, weight, 1e-5) for x in sets] for n, p in peers.items()}
    truth = reference.rms_norm(sets[0], weight, 1e-5)
    bench.compare(f"rms_norm T={t}", calls, truth, bytes_moved=4 * t * D, roof="copy_bytes_per_s")
    peers = {"mhaffn.ops.add_rms_norm": ops.add_rms_norm, "PyTorch": library.add_rms_norm}
    pairs = list(zip(sets, sets[-1:] + sets[:-1], strict=True))
    calls = {n: [lambda x=x, r=r, p=p: p(x, r, weight, 1e-5) for x, r in pairs] for n, p in peers.items()}
    truth = reference.add_rms_norm(*pairs[0], weight, 1e-5)[0]
    bench.compare(f"add_rms_norm T={t}", calls, truth, bytes_moved=8 * t * D, roof="copy_bytes_per_s")


def ropes(bench: Bench, t: int) -> None:
    size = t * (HQ + H) * K * 4
    sets = [(randn(1, t, HQ, K), randn(1, t, H, K)) for _ in range(max(2, min(100, COLD_BYTES // size)))]
    angle = torch.rand(1, t, K // 2, device="cuda") * 100
    cos, sin = angle.cos(), angle.sin()
    peers = {
        "mhaffn.ops.rope": lambda q, k: ops.rope(q, k, cos, sin),
        "PyTorch": lambda q, k: library.rope(q, k, cos, sin, False),
        "torch.compile": torch.compile(lambda q, k: library.rope(q, k, cos, sin, False), dynamic=False),
    }
    bench_rope(bench, f"rope T={t}", sets, peers, reference.rotate(sets[0][0], cos, sin), size)
    turned = {"ops, interleaved": lambda q, k: ops.rope(q, k, cos, sin, interleaved=True)}
    truth = reference.rotate(sets[0][0], cos, sin, interleaved=True)
    bench_rope(bench, f"rope T={t}", sets, turned, truth, size)
    caches = torch.zeros(2, 1, t + 8, H, K, device="cuda", dtype=torch.bfloat16)
    start = torch.zeros(1, dtype=torch.int64, device="cuda")
    peers = {
        "mhaffn.ops.rope_write": lambda q, k: ops.rope_write(q, k, k, cos, sin, *caches, start),
        "PyTorch": lambda q, k: library.rope_write(q, k, k, cos, sin, *caches, start, False),
    }
    more = size + t * H * K * 4
    bench_rope(bench, f"rope_write T={t}", sets, peers, reference.rotate(sets[0][0], cos, sin), more)


def bench_rope(bench: Bench, shape: str, sets, peers, truth: torch.Tensor, size: int) -> None:
    calls = {n: [lambda q=q, k=k, p=p: p(q, k) for q, k in sets] for n, p in peers.items()}
    bench.compare(shape, calls, truth, bytes_moved=size, roof="copy_bytes_per_s")


def run(bench: Bench) -> None:
    for t in (2048, 1):
        norms(bench, t)
        ropes(bench, t)


if __name__ == "__main__":
    main("norm_rope", run)
