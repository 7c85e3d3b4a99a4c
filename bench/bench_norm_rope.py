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
    for name, peer in peers.items():
        calls = [lambda x=x, peer=peer: peer(x, weight, 1e-5) for x in sets]
        bench.row(f"rms_norm T={t}", name, calls, reference.rms_norm(sets[0], weight, 1e-5),
                  bytes_moved=4 * t * D, graph=True, roof="copy_bytes_per_s")  # fmt: skip
    residual = randn(1, t, D)
    for name, peer in {"mhaffn.ops.add_rms_norm": ops.add_rms_norm, "PyTorch": library.add_rms_norm}.items():
        calls = [lambda x=x, peer=peer: peer(x, residual, weight, 1e-5) for x in sets]
        truth = reference.add_rms_norm(sets[0], residual, weight, 1e-5)[0]
        bench.row(f"add_rms_norm T={t}", name, calls, truth,
                  bytes_moved=8 * t * D, graph=True, roof="copy_bytes_per_s")  # fmt: skip


def ropes(bench: Bench, t: int) -> None:
    size = t * (HQ + H) * K * 4
    sets = [(randn(1, t, HQ, K), randn(1, t, H, K)) for _ in range(max(2, min(100, COLD_BYTES // size)))]
    angle = torch.rand(1, t, K // 2, device="cuda") * 100
    cos, sin = angle.cos(), angle.sin()
    peers = {
        "mhaffn.ops.rope": lambda q, k: ops.rope(q, k, cos, sin),
        "ops, interleaved": lambda q, k: ops.rope(q, k, cos, sin, interleaved=True),
        "PyTorch": lambda q, k: library.rope(q, k, cos, sin, False),
        "torch.compile": torch.compile(lambda q, k: library.rope(q, k, cos, sin, False), dynamic=False),
    }
    for name, peer in peers.items():
        calls = [lambda q=q, k=k, peer=peer: peer(q, k) for q, k in sets]
        truth = reference.rotate(sets[0][0], cos, sin, interleaved="interleaved" in name)
        bench.row(f"rope T={t}", name, calls, truth, bytes_moved=size, graph=True, roof="copy_bytes_per_s")
    caches = torch.zeros(2, 1, t + 8, H, K, device="cuda", dtype=torch.bfloat16)
    start = torch.zeros(1, dtype=torch.int64, device="cuda")
    for name, peer in {"mhaffn.ops.rope_write": ops.rope_write, "PyTorch": library.rope_write}.items():
        more = (False,) if peer is library.rope_write else ()
        calls = [lambda q=q, k=k, peer=peer, m=more: peer(q, k, k, cos, sin, *caches, start, *m) for q, k in sets]
        bench.row(f"rope_write T={t}", name, calls, reference.rotate(sets[0][0], cos, sin),
                  bytes_moved=size + t * H * K * 4, graph=True, roof="copy_bytes_per_s")  # fmt: skip


def run(bench: Bench) -> None:
    for t in (2048, 1):
        norms(bench, t)
        ropes(bench, t)


if __name__ == "__main__":
    main("norm_rope", run)
