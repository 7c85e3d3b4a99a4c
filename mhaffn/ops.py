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

from .formats import GROUPS, VALUES_DTYPES
from .kernels import library
from .quantized import SCALE_DTYPES, Quantized

__all__ = ["add_rms_norm", "attention", "ffn", "linear", "rms_norm", "rope", "rope_write"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ("cpu", "cuda")
HEAD_DIM_MAX = 256
PLAIN = (Tensor, torch.nn.Parameter)
"""Kinds of tensors that know no other way to call an operator."""
VALUES = {name: getattr(torch, dtype) for name, dtype in VALUES_DTYPES.items()}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x²) + eps))`` over the last dimension.

    x ``[..., D]``, weight ``[D]`` -> ``[..., D]``. Computed in float32, rounded to ``x.dtype``, then multiplied by the
    weight: the rounding order of transformers' ``LlamaRMSNorm`` (RMSNorm: arXiv 1910.07467).
    """
    _check_inference("rms_norm", x, weight)
    plain = _check_tensors("rms_norm", x=x, weight=weight)
    _check_norm("rms_norm", x, weight)
    return cast(Tensor, _rms_norm(plain, x, weight, eps))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; returns ``(rms_norm(s, weight, eps), s)``.

    x and residual ``[..., D]``, weight ``[D]``. The sum is rounded to ``x.dtype`` before it is normalised.
    """
    _check_inference("add_rms_norm", x, residual, weight)
    plain = _check_tensors("add_rms_norm", x=x, residual=residual, weight=weight)
    _check_norm("add_rms_norm", x, weight)
    if residual.shape != x.shape:
        _expect(False, "add_rms_norm", "residual shape", tuple(residual.shape), tuple(x.shape))
    return cast("tuple[Tensor, Tensor]", _add_rms_norm(plain, x, residual, weight, eps))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of queries and keys; returns new tensors.

    q ``[B, T, HQ, K]``, k ``[B, T, H, K]``, unit last stride; cos and sin ``[B, T, K/2]``, ``[1, T, K/2]`` or
    ``[T, K/2]``, float32: one angle a pair (scaling such as llama3's is in the angles). Pairs are ``(i, i + K/2)``
    (half-split: Hugging Face checkpoints) or, with ``interleaved``, ``(2i, 2i + 1)`` (Meta checkpoints).
    """
    _check_inference("rope", q, k, cos, sin)
    plain = _check_tensors("rope", q=q, k=k)
    _check_rope("rope", q, k, cos, sin)
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
    _check_inference(op, q, k, v, cos, sin, k_cache, v_cache)
    _check_tensors(op, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    _check_rope(op, q, k, cos, sin)
    _expect(v.shape == k.shape, op, "v shape", tuple(v.shape), f"{tuple(k.shape)}, that of k")
    b, t, h, dim = k.shape
    fits = k_cache.dim() == 4 and k_cache.shape[::2] == (b, h) and k_cache.shape[3] == dim and k_cache.shape[1] >= t
    _expect(fits, op, "k_cache shape", tuple(k_cache.shape), f"[{b}, S, {h}, {dim}] with S at least {t}")
    _expect(v_cache.shape == k_cache.shape, op, "v_cache shape", tuple(v_cache.shape), tuple(k_cache.shape))
    _check_lengths(op, "start", start, q)
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
    _check_inference("attention", q, k, v)
    plain = _check_tensors("attention", q=q, k=k, v=v)
    _check_attention(q, k, v, kv_lens, mask)
    plain = plain and (kv_lens is None or type(kv_lens) in PLAIN) and (mask is None or type(mask) in PLAIN)
    return cast(Tensor, _attention(plain, q, k, v, causal, kv_lens, mask, scale))


def linear(x: Tensor, weight: Tensor | Quantized) -> Tensor:
    """``x weightᵀ``: x ``[..., D]``, weight ``[N, D]`` as ``nn.Linear`` stores it -> ``[..., N]``.

    A weight in few bits is multiplied as its dequantised values are, without their being stored whole: its parts are
    contiguous, may be views into a larger buffer at any 16-byte aligned offset on CUDA, and x keeps its own dtype.
    """
    if isinstance(weight, Quantized):
        _check_inference("linear", x, weight)
        plain = _check_tensors("linear", x=x)
        plain = _check_quantized("linear", "weight", weight, x, x.shape[-1]) and plain
        parts = (weight.values, weight.scales, weight.zeros, weight.format, weight.group)
        return cast(Tensor, _linear_quantized(plain, x, *parts))
    _check_inference("linear", x, weight)
    _check_tensors("linear", x=x, weight=weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        _expect(False, "linear", "weight shape", tuple(weight.shape), f"[N, D] with D {x.shape[-1]}")
    return torch.nn.functional.linear(x, weight).to(x.dtype)  # which autocast would change


def ffn(x: Tensor, w1: Tensor | Quantized, w3: Tensor | Quantized, w2: Tensor | Quantized) -> Tensor:
    """SwiGLU feed-forward (arXiv 2002.05202): ``w2 (silu(w1 x) * w3 x)``.

    x ``[..., D]``, w1 (gate) and w3 (up) ``[F, D]``, w2 (down) ``[D, F]``, as ``nn.Linear`` stores them, contiguous;
    they may be views into a larger buffer, at any 16-byte aligned offset on CUDA. -> ``[..., D]``, contiguous.
    Intermediates are bounded: a long x goes through in chunks of rows. Tensors are of x's dtype; weights in few bits
    are of any formats. Where only some are in few bits, it is one product after another, without bound.
    """
    if isinstance(w1, Tensor) and isinstance(w3, Tensor) and isinstance(w2, Tensor):
        _check_inference("ffn", x, w1, w3, w2)
        plain = _check_tensors("ffn", x=x, w1=w1, w3=w3, w2=w2)
        _check_ffn(x, w1, w3, w2)
        return cast(Tensor, _ffn(plain, x, w1, w3, w2))
    if isinstance(w1, Tensor) or isinstance(w3, Tensor) or isinstance(w2, Tensor):
        _check_ffn_shapes(x, w1, w3, w2)
        return linear(torch.nn.functional.silu(linear(x, w1)).mul_(linear(x, w3)), w2)
    records = [w1, w3, w2]
    _check_inference("ffn", x, *records)
    plain = _check_tensors("ffn", x=x)
    for name, record in zip(("w1", "w3", "w2"), records, strict=True):
        width = records[0].shape[0] if name == "w2" else x.shape[-1]
        plain = _check_quantized("ffn", name, record, x, width) and plain
    _check_ffn_shapes(x, w1, w3, w2)
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


# --- checks ---------------------------------------------------------------------------------------------------------


def _expect(holds: bool, op: str, what: str, got: object, expected: object) -> None:
    if not holds:
        raise ValueError(f"{op}: {what}: got {got}, expected {expected}")


def _requires_grad(t: Tensor | Quantized) -> bool:
    if isinstance(t, Quantized):
        return any(part is not None and part.requires_grad for part in (t.values, t.scales, t.zeros))
    return t.requires_grad


def _check_inference(op: str, *inputs: Tensor | Quantized) -> None:
    if torch.is_grad_enabled() and any(map(_requires_grad, inputs)):
        raise RuntimeError(
            f"mhaffn.ops.{op} is for inference and has no backward: an input requires grad while gradients are "
            "enabled. Call it under torch.no_grad() or torch.inference_mode(), or detach the input."
        )


def _check_tensors(op: str, **tensors: Tensor) -> bool:
    """One dtype, one device, unit last stride. Returns whether all are :data:`PLAIN`."""
    first = next(iter(tensors.values()))
    dtype, device = first.dtype, first.device
    fits = dtype in DTYPES and device.type in DEVICES
    plain = True
    for t in tensors.values():
        strides = t.stride()
        if t.dtype != dtype or t.device != device or not strides or (strides[-1] != 1 and t.shape[-1] > 1):
            fits = False
        if type(t) not in PLAIN:
            plain = False
    if not fits:  # messages are made here alone: making them costs more host time than the checks
        _refuse_tensors(op, tensors)
    return plain


def _unit(t: Tensor) -> bool:
    return t.stride(-1) == 1 or t.shape[-1] <= 1


def _refuse_tensors(op: str, tensors: dict[str, Tensor]) -> None:
    (first_name, first), *_ = tensors.items()
    _expect(first.dtype in DTYPES, op, f"{first_name} dtype", first.dtype, "bfloat16, float16 or float32")
    _expect(first.device.type in DEVICES, op, f"{first_name} device", first.device, "cpu or cuda")
    for name, t in tensors.items():
        _expect(t.dtype == first.dtype, op, f"{name} dtype", t.dtype, f"{first.dtype}, that of {first_name}")
        _expect(t.device == first.device, op, f"{name} device", t.device, f"{first.device}, that of {first_name}")
        _expect(t.dim() > 0, op, f"{name} dimensions", 0, "at least 1")
        _expect(_unit(t), op, f"{name} strides", t.stride(), "a last stride of 1")


def _check_norm(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        _expect(False, op, "weight shape", tuple(weight.shape), f"[D] = {tuple(x.shape[-1:])}")


def _check_rope(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4:
        _expect(False, op, "q shape", tuple(q.shape), "[B, T, HQ, K]")
    b, t, _, dim = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (b, t, dim):
        _expect(False, op, "k shape", tuple(k.shape), f"[B, T, H, K] with B {b}, T {t}, K {dim}")
    if dim % 2:
        _expect(False, op, "head dim K", dim, "an even number")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.dtype != torch.float32 or angle.device != q.device:
            _expect(angle.dtype == torch.float32, op, f"{name} dtype", angle.dtype, torch.float32)
            _expect(False, op, f"{name} device", angle.device, q.device)
        shape = angle.shape
        if shape[-2:] != (t, dim // 2) or not (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, b))):
            wanted = f"[{t}, {dim // 2}], [1, {t}, {dim // 2}] or [{b}, {t}, {dim // 2}] (half the head dim)"
            _expect(False, op, f"{name} shape", tuple(shape), wanted)
        if not _unit(angle):
            _expect(False, op, f"{name} strides", angle.stride(), "a last stride of 1")
    if cos.shape != sin.shape:
        _expect(False, op, "sin shape", tuple(sin.shape), f"{tuple(cos.shape)}, that of cos")


def _check_lengths(op: str, name: str, lengths: Tensor, q: Tensor) -> None:
    _expect(lengths.shape == q.shape[:1], op, f"{name} shape", tuple(lengths.shape), f"[B] = ({q.shape[0]},)")
    _expect(lengths.dtype in (torch.int32, torch.int64), op, f"{name} dtype", lengths.dtype, "int32 or int64")
    _expect(lengths.device == q.device, op, f"{name} device", lengths.device, q.device)
    _expect(lengths.is_contiguous(), op, f"{name} strides", lengths.stride(), "a contiguous vector")


def _check_attention(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, mask: Tensor | None) -> None:
    op = "attention"
    if q.dim() != 4:
        _expect(False, op, "q shape", tuple(q.shape), "[B, T, HQ, K]")
    b, t, hq, dim = q.shape
    if k.dim() != 4 or k.shape[0] != b or k.shape[3] != dim:
        _expect(False, op, "k shape", tuple(k.shape), f"[B, S, H, K] with B {b}, K {dim}")
    if v.shape != k.shape:
        _expect(False, op, "v shape", tuple(v.shape), f"{tuple(k.shape)}, that of k")
    s, h = k.shape[1], k.shape[2]
    if h == 0 or hq % h:
        _expect(False, op, "query heads HQ", hq, f"a multiple of the key heads, {h}")
    if not 0 < dim <= HEAD_DIM_MAX:
        _expect(False, op, "head dim K", dim, f"1 to {HEAD_DIM_MAX}")
    if kv_lens is not None:
        _check_lengths(op, "kv_lens", kv_lens, q)
    if mask is not None:
        _expect(mask.dtype == torch.bool, op, "mask dtype", mask.dtype, "bool, True where a key may be seen")
        _expect(mask.device == q.device, op, "mask device", mask.device, q.device)
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, (b, hq, t, s), strict=True))
        _expect(fits, op, "mask shape", tuple(mask.shape), f"broadcastable to [B, 1 or HQ, T, S] = {(b, hq, t, s)}")


def _check_ffn_shapes(x: Tensor, w1: Tensor | Quantized, w3: Tensor | Quantized, w2: Tensor | Quantized) -> None:
    width = x.shape[-1]
    if len(w1.shape) != 2 or w1.shape[1] != width:
        _expect(False, "ffn", "w1 shape", tuple(w1.shape), f"[F, D] with D {width}")
    if w3.shape != w1.shape:
        _expect(False, "ffn", "w3 shape", tuple(w3.shape), f"{tuple(w1.shape)}, that of w1")
    transposed = (w1.shape[1], w1.shape[0])
    if w2.shape != transposed:
        _expect(False, "ffn", "w2 shape", tuple(w2.shape), f"[D, F] = {transposed}")


def _check_ffn(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> None:
    _check_ffn_shapes(x, w1, w3, w2)
    for name, w in (("w1", w1), ("w3", w3), ("w2", w2)):
        if not w.is_contiguous():
            _expect(False, "ffn", f"{name} strides", w.stride(), "a contiguous matrix")


def _check_quantized(op: str, name: str, weight: Quantized, x: Tensor, width: int) -> bool:
    """The parts of a weight agree with its format, with one another and with a product of ``width`` columns.

    Returns whether all are :data:`PLAIN`.
    """
    values, scales, zeros, group = weight.values, weight.scales, weight.zeros, weight.group
    if weight.format not in VALUES:
        _expect(False, op, f"{name} format", weight.format, "int4, int8 or fp8")
    expected = VALUES[weight.format]
    if values.dtype != expected or values.dim() != 2:
        got = f"{values.dtype} {tuple(values.shape)}"
        _expect(False, op, f"{name} values", got, f"{expected}, two dimensions")
    rows, columns = weight.shape
    if columns != width:
        _expect(False, op, f"{name} shape", weight.shape, f"{width} columns")
    whole = group == width and weight.format != "int4"
    grouped = group in GROUPS and width % group == 0 and weight.format != "fp8"
    if not (whole or grouped):
        groups = {"int4": f"one of {GROUPS}", "int8": f"one of {GROUPS}, or {width}", "fp8": str(width)}
        _expect(False, op, f"{name} group", group, f"{groups[weight.format]}, a divisor of {width}")
    if zeros is not None and weight.format != "int4":
        _expect(False, op, f"{name} zeros", tuple(zeros.shape), f"none: {weight.format} is symmetric")
    for part, t in (("scales", scales), ("zeros", scales if zeros is None else zeros)):
        if t.shape != (rows, width // group):
            _expect(False, op, f"{name} {part} shape", tuple(t.shape), (rows, width // group))
        if t.dtype not in SCALE_DTYPES or t.dtype != scales.dtype:
            _expect(
                False, op, f"{name} {part} dtype", t.dtype, "float16, bfloat16 or float32, one for scales and zeros"
            )
    plain = True
    for part, t in (("values", values), ("scales", scales), ("zeros", scales if zeros is None else zeros)):
        plain = plain and type(t) in PLAIN
        if t.device != x.device:
            _expect(False, op, f"{name} {part} device", t.device, f"{x.device}, that of x")
        if not t.is_contiguous():
            _expect(False, op, f"{name} {part} strides", t.stride(), "a contiguous matrix")
    return plain


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
