"""Norm and RoPE against plain PyTorch, torch.compile and Liger, at 2048 and 1 tokens of Llama-3.1-70B widths, bf16.

    pytest bench/bench_norm_rope.py -m gpu --benchmark-only
    python bench/bench_norm_rope.py --out norm-rope.json

The roof is a device-to-device copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from by_peer import by_peer
from timer import COLD_BYTES, DEVICE, Case, by_name, main_cases, randn

from mhaffn import ops
from mhaffn.kernels import library, reference

EPS = 1e-5
ROOF = "copy_bytes_per_s"


@dataclass(frozen=True)
class Width:
    """A model's D, query and key heads, head dim; ``name`` goes before a case's."""

    name: str
    D: int
    HQ: int
    H: int
    K: int
    small: bool = False

    def case(self, op: str, t: int) -> str:
        return f"{op}{self.name} T={t}"


WIDTHS = {Width("", 8192, 64, 8, 128): (2048, 1), Width(" tiny", 256, 4, 2, 64, small=True): (64, 1)}


def liger_norm(x, weight):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def copies(nbytes: int) -> int:
    return max(2, min(100, COLD_BYTES // nbytes))


def norms(w: Width, t: int) -> Iterator[Case]:
    def inputs():
        weight = randn(w.D)
        return [(randn(1, t, w.D), weight) for _ in range(copies(t * w.D * 4))]

    def pairs():
        weight = randn(w.D)
        return [(randn(1, t, w.D), randn(1, t, w.D), weight) for _ in range(copies(t * w.D * 8))]

    peers = {
        "mhaffn.ops.rms_norm": lambda x, weight: ops.rms_norm(x, weight, EPS),
        "PyTorch, written out": lambda x, weight: library.rms_norm(x, weight, EPS),
        "F.rms_norm": lambda x, weight: torch.nn.functional.rms_norm(x, (w.D,), weight, EPS),
    }
    if not w.small:
        compiled = torch.compile(library.rms_norm, dynamic=False)
        peers |= {"torch.compile": lambda x, weight: compiled(x, weight, EPS), "Liger": liger_norm}
    truth = lambda x, weight: reference.rms_norm(x, weight, EPS)  # noqa: E731
    yield Case(w.case("rms_norm", t), peers, inputs, truth, bytes_moved=4 * t * w.D, roof=ROOF, small=w.small)
    peers = {
        "mhaffn.ops.add_rms_norm": lambda x, r, weight: ops.add_rms_norm(x, r, weight, EPS),
        "PyTorch": lambda x, r, weight: library.add_rms_norm(x, r, weight, EPS),
    }
    truth = lambda x, r, weight: reference.add_rms_norm(x, r, weight, EPS)[0]  # noqa: E731
    yield Case(w.case("add_rms_norm", t), peers, pairs, truth, bytes_moved=8 * t * w.D, roof=ROOF, small=w.small)


def ropes(w: Width, t: int) -> Iterator[Case]:
    size = t * (w.HQ + w.H) * w.K * 4

    def inputs():
        angle = torch.rand(1, t, w.K // 2, device=DEVICE) * 100
        cos, sin = angle.cos(), angle.sin()
        return [(randn(1, t, w.HQ, w.K), randn(1, t, w.H, w.K), cos, sin) for _ in range(copies(size))]

    def with_caches():
        shared = torch.zeros(2, 1, t + 8, w.H, w.K, device=DEVICE, dtype=torch.bfloat16)
        start = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        return [(*given, *shared, start) for given in inputs()]

    peers = {"mhaffn.ops.rope": ops.rope, "PyTorch": lambda *given: library.rope(*given, False)}
    if not w.small:
        peers["torch.compile"] = torch.compile(lambda *given: library.rope(*given, False), dynamic=False)
    truth = lambda q, k, cos, sin: reference.rotate(q, cos, sin)  # noqa: E731
    yield Case(w.case("rope", t), peers, inputs, truth, bytes_moved=size, roof=ROOF, small=w.small)
    turned = {
        "ops, interleaved": lambda *given: ops.rope(*given, interleaved=True),
        "PyTorch, interleaved": lambda *given: library.rope(*given, True),
    }
    truth = lambda q, k, cos, sin: reference.rotate(q, cos, sin, interleaved=True)  # noqa: E731
    yield Case(w.case("rope interleaved", t), turned, inputs, truth, bytes_moved=size, roof=ROOF, small=w.small)
    peers = {
        "mhaffn.ops.rope_write": lambda q, k, cos, sin, *cache: ops.rope_write(q, k, k, cos, sin, *cache),
        "PyTorch": lambda q, k, cos, sin, *cache: library.rope_write(q, k, k, cos, sin, *cache, False),
    }
    truth = lambda q, k, cos, sin, *cache: reference.rotate(q, cos, sin)  # noqa: E731
    more = size + t * w.H * w.K * 4
    yield Case(w.case("rope_write", t), peers, with_caches, truth, bytes_moved=more, roof=ROOF, small=w.small)


CASES = by_name(
    case for w, lengths in WIDTHS.items() for t in lengths for make in (norms, ropes) for case in make(w, t)
)


@by_peer(CASES)
def test_norm_rope(case, peer, record):
    record(CASES[case], peer)


if __name__ == "__main__":
    main_cases("norm_rope", CASES)
