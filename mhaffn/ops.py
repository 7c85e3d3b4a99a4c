"""Fused operations of a Llama layer, as plain functions.

======================= ==========================================================================
:func:`rms_norm`        normalise and scale
:func:`add_rms_norm`    the same, of a sum that is returned too
:func:`rope`            rotate queries and keys by their positions
:func:`rope_write`      the same, with keys and values put into a cache
:func:`attention`       softmax attention: causal, grouped heads, padding masks, ragged lengths
:func:`ffn`             SwiGLU feed-forward, also of weights in few bits
:func:`linear`          product with a weight, also of one in few bits
======================= ==========================================================================

Shapes: ``B`` batch, ``T`` query length, ``S`` key length, ``D`` model width, ``F`` FFN width, ``HQ``/``H`` query and
key heads, ``K`` head dim. dtypes: bfloat16, float16, float32, the same for all tensors of a call unless said
otherwise; sums are kept in float32. CPU and CUDA.

Every function checks its arguments first and raises ``ValueError`` (what it got, what it expected). They are for
inference: one raises ``RuntimeError`` when gradients are enabled and an input requires them.

Each is a registered PyTorch operator (``torch.ops.mhaffn.*``) with a fake implementation, so ``torch.compile``,
``torch.export`` and CUDA graphs take it whole; a call that nothing traces, transforms or profiles goes past the
dispatcher. Which implementation runs is decided in ``kernels/select.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from .arguments import (
    PLAIN,
    check_attention,
    check_cache,
    check_ffn,
    check_ffn_shapes,
    check_inference,
    check_linear,
    check_norm,
    check_quantized,
    check_rope,
    check_tensors,
)
from .kernels import library
from .quantized import Quantized

__all__ = ["add_rms_norm", "attention", "ffn", "linear", "rms_norm", "rope", "rope_write"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x²) + eps))`` over the last dimension.

    x ``[..., D]``, weight ``[D]`` -> ``[..., D]``. Computed in float32, rounded to ``x.dtype``, then multiplied by the
    weight: the rounding order of transformers' ``LlamaRMSNorm`` (RMSNorm: arXiv 1910.07467).
    """
    check_inference("rms_norm", x, weight)
    plain = check_tensors("rms_norm", x=x, weight=weight)
    check_norm("rms_norm", x, weight)
    return cast(Tensor, _rms_norm(plain, x, weight, eps))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; returns ``(rms_norm(s, weight, eps), s)``.

    x and residual ``[..., D]``, weight ``[D]``. The sum is rounded to ``x.dtype`` before it is normalised.
    """
    check_inference("add_rms_norm", x, residual, weight)
    plain = check_tensors("add_rms_norm", x=x, residual=residual, weight=weight)
    check_norm("add_rms_norm", x, weight, residual)
    return cast("tuple[Tensor, Tensor]", _add_rms_norm(plain, x, residual, weight, eps))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of queries and keys; returns new tensors.

    q ``[B, T, HQ, K]``, k ``[B, T, H, K]``, unit last stride; cos and sin ``[B, T, K/2]``, ``[1, T, K/2]`` or
    ``[T, K/2]``, float32: one angle a pair (scaling such as llama3's is in the angles). Pairs are ``(i, i + K/2)``
    (half-split: Hugging Face checkpoints) or, with ``interleaved``, ``(2i, 2i + 1)`` (Meta checkpoints).
    """
    check_inference("rope", q, k, cos, sin)
    plain = check_tensors("rope", q=q, k=k)
    check_rope("rope", q, k, cos, sin)
    plain = plain and type(cos) in PLAIN and type(sin) in PLAIN
    return cast("tuple[Tensor, Tensor]", _rope(plain, q, k, cos, sin, interleaved))


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """:func:`rope`, with the keys and values written where attention reads them; returns the rotated q.

    q ``[B, T, HQ, K]``, k and v ``[B, T, H, K]``, cos and sin as for :func:`rope`. Rotated k and v go to rows
    ``start[b] + t`` of k_cache and v_cache ``[B, S, H, K]``, any strides with unit last stride, changed in place.
    start ``[B]``, int32 or int64, on q's device: read there, and ``start + T <= S`` is the caller's to keep.
    """
    op = "rope_write"
    check_inference(op, q, k, v, cos, sin, k_cache, v_cache)
    check_tensors(op, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    check_rope(op, q, k, cos, sin)
    check_cache(op, q, k, v, k_cache, v_cache, start)
    return cast(Tensor, torch.ops.mhaffn.rope_write(q, k, v, cos, sin, k_cache, v_cache, start, interleaved))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    kv_lens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``softmax(scale * q kᵀ) v`` over the keys each query may see; a query that sees none gives zeros.

    q ``[B, T, HQ, K]``, k and v ``[B, S, H, K]``, any strides with unit last stride -> ``[B, T, HQ, K]``, contiguous.
    HQ is a multiple of H: query head ``h`` reads key head ``h // (HQ / H)``.

    - ``causal``: aligned to the end, query ``t`` sees keys up to ``S - T + t``. That is the prompt (T = S), a chunk of
      it after a cache (T < S), and a decoded token (T = 1).
    - ``kv_lens`` ``[B]``, int32 or int64, on q's device: the keys that exist, of a cache that holds S. It takes S's
      place above, per sequence. Values are read on the device and must lie in 0..S.
    - ``mask``: bool, broadcastable to ``[B, 1 or HQ, T, S]``, True where a key may be seen; it further restricts.
    - ``scale``: 1 / sqrt(K) where not given.
    """
    check_inference("attention", q, k, v)
    plain = check_tensors("attention", q=q, k=k, v=v)
    check_attention(q, k, v, kv_lens, mask)
    plain = plain and (kv_lens is None or type(kv_lens) in PLAIN) and (mask is None or type(mask) in PLAIN)
    return cast(Tensor, _attention(plain, q, k, v, causal, kv_lens, mask, scale))


def linear(x: Tensor, weight: Tensor | Quantized) -> Tensor:
    """``x weightᵀ``: x ``[..., D]``, weight ``[N, D]`` as ``nn.Linear`` stores it -> ``[..., N]``.

    A weight in few bits is multiplied as its dequantised values are, without their being stored whole: its parts are
    contiguous, may be views into a larger buffer at any 16-byte aligned offset on CUDA, and x keeps its own dtype.
    """
    if isinstance(weight, Quantized):
        check_inference("linear", x, weight)
        plain = check_tensors("linear", x=x)
        plain = check_quantized("linear", "weight", weight, x, x.shape[-1]) and plain
        parts = (weight.values, weight.scales, weight.zeros, weight.format, weight.group)
        return cast(Tensor, _linear_quantized(plain, x, *parts))
    check_inference("linear", x, weight)
    check_tensors("linear", x=x, weight=weight)
    check_linear(x, weight)
    return torch.nn.functional.linear(x, weight).to(x.dtype)  # which autocast would change


def ffn(x: Tensor, w1: Tensor | Quantized, w3: Tensor | Quantized, w2: Tensor | Quantized) -> Tensor:
    """SwiGLU feed-forward (arXiv 2002.05202): ``w2 (silu(w1 x) * w3 x)``.

    x ``[..., D]``, w1 (gate) and w3 (up) ``[F, D]``, w2 (down) ``[D, F]``, as ``nn.Linear`` stores them, contiguous;
    they may be views into a larger buffer, at any 16-byte aligned offset on CUDA. -> ``[..., D]``, contiguous.
    Intermediates are bounded: a long x goes through in chunks of rows. Tensors are of x's dtype; weights in few bits
    are of any formats. Where only some are in few bits, it is one product after another, without bound.
    """
    if isinstance(w1, Tensor) and isinstance(w3, Tensor) and isinstance(w2, Tensor):
        check_inference("ffn", x, w1, w3, w2)
        plain = check_tensors("ffn", x=x, w1=w1, w3=w3, w2=w2)
        check_ffn(x, w1, w3, w2)
        return cast(Tensor, _ffn(plain, x, w1, w3, w2))
    if isinstance(w1, Tensor) or isinstance(w3, Tensor) or isinstance(w2, Tensor):
        check_ffn_shapes(x, w1, w3, w2)
        return linear(torch.nn.functional.silu(linear(x, w1)).mul_(linear(x, w3)), w2)
    records = [w1, w3, w2]
    check_inference("ffn", x, *records)
    plain = check_tensors("ffn", x=x)
    for name, record in zip(("w1", "w3", "w2"), records, strict=True):
        width = records[0].shape[0] if name == "w2" else x.shape[-1]
        plain = check_quantized("ffn", name, record, x, width) and plain
    check_ffn_shapes(x, w1, w3, w2)
    return cast(
        Tensor,
        _ffn_quantized(
            plain,
            x,
            [r.values for r in records],
            [r.scales for r in records],
            [r.zeros for r in records],
            [r.format for r in records],
            [r.group for r in records],
        ),
    )


# --- registration ---------------------------------------------------------------------------------------------------
# torch.library.define + impl is what torch.library.custom_op builds on; without that wrapper a call costs 3 µs of
# host time instead of 13. The dispatcher's way to an implementation in Python and back takes 8 µs more, and a decoded
# token makes hundreds of calls: those that nothing else has to see go to the implementation itself.

try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack

    def _watched() -> bool:
        """Whether something traces, compiles, transforms or profiles what is called now."""
        return (
            torch.compiler.is_compiling()
            or _len_torch_dispatch_stack() > 0
            or _len_torch_function_stack() > 0
            or _get_tracing_state() is not None
            or peek_interpreter_stack() is not None
            or _profiler_enabled()
        )

except ImportError:  # a PyTorch that tells it otherwise

    def _watched() -> bool:
        return True


@cache
def _on_gpu(op: str) -> Callable[..., Any]:
    """The CUDA implementation; kernels are imported at the first call of one, and a machine may have no Triton."""
    from .kernels import select

    return cast("Callable[..., Any]", getattr(select, op))


def _on_its_gpu(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, on the GPU of its first tensor: a model may lie on several, and launches go to the current one."""

    def guarded(x: Tensor, *arguments: Any) -> Any:
        if x.device.index == torch.cuda.current_device():
            return run(x, *arguments)
        with torch.cuda.device(x.device):
            return run(x, *arguments)

    return guarded


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an operator; returns what calls it, given whether all tensors are :data:`PLAIN`, and its arguments."""
    op = schema.partition("(")[0]
    on_cpu = getattr(library, op)
    on_gpu = _on_its_gpu(lambda *arguments: _on_gpu(op)(*arguments))
    torch.library.define(f"mhaffn::{op}", schema.removeprefix(op))
    torch.library.impl(f"mhaffn::{op}", "cpu", on_cpu)
    torch.library.impl(f"mhaffn::{op}", "cuda", on_gpu)
    torch.library.register_fake(f"mhaffn::{op}", fake)
    dispatched = getattr(torch.ops.mhaffn, op)

    def call(plain: bool, x: Tensor, *arguments: Any) -> Any:
        if not plain or _watched():
            return dispatched(x, *arguments)
        return on_gpu(x, *arguments) if x.is_cuda else on_cpu(x, *arguments)

    return call


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_rms_norm = _operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: _like(x),
)
_add_rms_norm = _operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (_like(x), _like(x)),
)
_rope = _operator(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    lambda q, k, cos, sin, interleaved: (_like(q), _like(k)),
)
_operator(
    "rope_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor start, bool interleaved) -> Tensor",
    lambda q, k, v, cos, sin, k_cache, v_cache, start, interleaved: _like(q),
)
_attention = _operator(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, Tensor? kv_lens, Tensor? mask, float? scale) -> Tensor",
    lambda q, k, v, causal, kv_lens, mask, scale: _like(q),
)
_ffn = _operator(
    "ffn(Tensor x, Tensor w1, Tensor w3, Tensor w2) -> Tensor",
    lambda x, w1, w3, w2: _like(x),
)
_linear_quantized = _operator(
    "linear_quantized(Tensor x, Tensor values, Tensor scales, Tensor? zeros, str format, int group) -> Tensor",
    lambda x, values, scales, zeros, format, group: x.new_empty((*x.shape[:-1], values.shape[0])),
)
_ffn_quantized = _operator(
    "ffn_quantized(Tensor x, Tensor[] values, Tensor[] scales, Tensor?[] zeros, str[] format, int[] group) -> Tensor",
    lambda x, values, scales, zeros, format, group: _like(x),
)
