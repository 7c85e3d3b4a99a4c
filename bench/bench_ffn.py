"""FFN against cuBLAS (eager), torch.compile, Liger and gemlite (16-bit weights), Llama-3.1-70B and 8B widths, bf16.

    pytest bench/bench_ffn.py -m gpu --benchmark-only
    python bench/bench_ffn.py --out ffn.json

In CUDA graphs; the weights do not fit L2. "three cuBLAS products" is the time of the three cuBLAS products alone: what
a free epilogue would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from by_peer import by_peer
from timer import COLD_BYTES, Case, by_name, main_cases, randn

from mhaffn import ops
from mhaffn.kernels import ffn, library, nvrtc, reference

WIDTHS = {"70B": (8192, 28672), "8B": (4096, 14336), "tiny": (256, 1024)}
ROWS = {
    "70B": (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192),
    "8B": (1, 2, 4, 8, 16, 64, 512, 2048),
    "tiny": (1, 64),
}


@cache
def weights(model: str) -> list[tuple[torch.Tensor, ...]]:
    """Sets of w1, w3, w2; kept, since gemlite prepares weights once."""
    width, inner = WIDTHS[model]
    count = max(1, COLD_BYTES // nbytes(model))
    shapes = ((inner, width), (inner, width), (width, inner))
    return [tuple(randn(*shape) * 0.02 for shape in shapes) for _ in range(count)]


def nbytes(model: str) -> int:
    width, inner = WIDTHS[model]
    return 3 * width * inner * 2


def liger(x, w1, w3, w2):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return F.linear(LigerSiLUMulFunction.apply(F.linear(x, w1), F.linear(x, w3)), w2)


class Gemlite:
    """Its Triton products of 16-bit weights, which it tunes at the first call of a shape; SiLU·mul by PyTorch."""

    def __init__(self) -> None:
        self.layers: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def linear(self, x, w):
        if w.data_ptr() not in self.layers:
            from gemlite.core import DType, GemLiteLinearTriton

            bf16 = DType.BF16
            layer = GemLiteLinearTriton(16, None, w.shape[1], w.shape[0], input_dtype=bf16, output_dtype=bf16)
            layer.pack(w, None, None, None)
            self.layers[w.data_ptr()] = layer
        return self.layers[w.data_ptr()](x)

    def __call__(self, x, w1, w3, w2):
        return self.linear(F.silu(self.linear(x, w1)) * self.linear(x, w3), w2)


GEMLITE = Gemlite()


def gate_up(x, w1, w3, w2):
    return F.linear(ffn.gate_up(x, w1, w3), w2)


def written_out(x, w1, w3, w2):
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


def truth(x, w1, w3, w2):
    if x.shape[0] > 2048:  # float32 of those would take minutes and memory
        return library.ffn(x, w1, w3, w2)
    return reference.ffn(x, w1.float(), w3.float(), w2.float())


def peers(m: int) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"mhaffn.ops.ffn": ops.ffn, "cuBLAS eager": library.ffn}
    if m <= ffn.FEW_ROWS_MAX:
        found["Triton few rows"] = ffn.ffn_few_rows
    if m <= nvrtc.FEW_ROWS_MAX:
        found["CUDA few rows"] = nvrtc.ffn_few_rows
    if m in (1, 16, 64, 512):
        found["gemlite, 16-bit"] = GEMLITE
    if m >= 128:
        found["Triton gate_up + cuBLAS"] = gate_up
        found["Liger SiLU·mul + cuBLAS"] = liger
    if m >= 512:
        found["torch.compile"] = torch.compile(written_out, dynamic=False)
    return found


def cases() -> Iterator[Case]:
    for model, (width, inner) in WIDTHS.items():
        small = model == "tiny"
        for m in ROWS[model]:
            yield Case(
                f"ffn {model} M={m}", {"mhaffn.ops.ffn": ops.ffn, "PyTorch": written_out} if small else peers(m),
                lambda m=m, model=model, width=width: [(randn(m, width), *w) for w in weights(model)], truth,
                bytes_moved=nbytes(model) if m <= 64 else 0, flops=6 * m * width * inner, small=small,
            )  # fmt: skip
            if m >= 512:
                yield products(model, m)


def products(model: str, m: int) -> Case:
    width, inner = WIDTHS[model]
    found = {
        "mhaffn.ops.ffn": lambda x, hidden, w1, w3, w2: ops.ffn(x, w1, w3, w2),
        "three cuBLAS products": lambda x, hidden, w1, w3, w2: (F.linear(x, w1), F.linear(x, w3), F.linear(hidden, w2)),
    }
    return Case(
        f"ffn {model} M={m}, products", found, lambda: [(randn(m, width), randn(m, inner), *weights(model)[0])], None,
        flops=6 * m * width * inner,
    )  # fmt: skip


CASES = by_name(cases())


@by_peer(CASES)
def test_ffn(case, peer, record):
    record(CASES[case], peer)


if __name__ == "__main__":
    main_cases("ffn", CASES)
