"""Checks of what operations are given: the first thing amiss is a ``ValueError``, which says what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import GROUPS, VALUES_DTYPES
from .quantized import SCALE_DTYPES, Quantized

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ("cpu", "cuda")
HEAD_DIM_MAX = 256
PLAIN = (Tensor, torch.nn.Parameter)
"""Kinds of tensors that know no other way to call an operator."""
VALUES = {name: getattr(torch, dtype) for name, dtype in VALUES_DTYPES.items()}


def expect(holds: bool, op: str, what: str, got: object, expected: object) -> None:
    if not holds:
        raise ValueError(f"{op}: {what}: got {got}, expected {expected}")


def _requires_grad(t: Tensor | Quantized) -> bool:
    if isinstance(t, Quantized):
        return any(part is not None and part.requires_grad for part in (t.values, t.scales, t.zeros))
    return t.requires_grad


def check_inference(op: str, *inputs: Tensor | Quantized) -> None:
    if torch.is_grad_enabled() and any(map(_requires_grad, inputs)):
        raise RuntimeError(
            f"mhaffn.ops.{op} is for inference and has no backward: an input requires grad while gradients are "
            "enabled. Call it under torch.no_grad() or torch.inference_mode(), or detach the input."
        )


def check_tensors(op: str, **tensors: Tensor) -> bool:
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
    expect(first.dtype in DTYPES, op, f"{first_name} dtype", first.dtype, "bfloat16, float16 or float32")
    expect(first.device.type in DEVICES, op, f"{first_name} device", first.device, "cpu or cuda")
    for name, t in tensors.items():
        expect(t.dtype == first.dtype, op, f"{name} dtype", t.dtype, f"{first.dtype}, that of {first_name}")
        expect(t.device == first.device, op, f"{name} device", t.device, f"{first.device}, that of {first_name}")
        expect(t.dim() > 0, op, f"{name} dimensions", 0, "at least 1")
        expect(_unit(t), op, f"{name} strides", t.stride(), "a last stride of 1")


def check_norm(op: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    if weight.shape != x.shape[-1:]:
        expect(False, op, "weight shape", tuple(weight.shape), f"[D] = {tuple(x.shape[-1:])}")
    if residual is not None and residual.shape != x.shape:
        expect(False, op, "residual shape", tuple(residual.shape), tuple(x.shape))


def check_rope(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4:
        expect(False, op, "q shape", tuple(q.shape), "[B, T, HQ, K]")
    b, t, _, dim = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (b, t, dim):
        expect(False, op, "k shape", tuple(k.shape), f"[B, T, H, K] with B {b}, T {t}, K {dim}")
    if dim % 2:
        expect(False, op, "head dim K", dim, "an even number")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.dtype != torch.float32 or angle.device != q.device:
            expect(angle.dtype == torch.float32, op, f"{name} dtype", angle.dtype, torch.float32)
            expect(False, op, f"{name} device", angle.device, q.device)
        shape = angle.shape
        if shape[-2:] != (t, dim // 2) or not (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, b))):
            wanted = f"[{t}, {dim // 2}], [1, {t}, {dim // 2}] or [{b}, {t}, {dim // 2}] (half the head dim)"
            expect(False, op, f"{name} shape", tuple(shape), wanted)
        if not _unit(angle):
            expect(False, op, f"{name} strides", angle.stride(), "a last stride of 1")
    if cos.shape != sin.shape:
        expect(False, op, "sin shape", tuple(sin.shape), f"{tuple(cos.shape)}, that of cos")


def check_cache(op: str, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor) -> None:
    """Caches that k and v fit into."""
    expect(v.shape == k.shape, op, "v shape", tuple(v.shape), f"{tuple(k.shape)}, that of k")
    b, t, h, dim = k.shape
    fits = k_cache.dim() == 4 and k_cache.shape[::2] == (b, h) and k_cache.shape[3] == dim and k_cache.shape[1] >= t
    expect(fits, op, "k_cache shape", tuple(k_cache.shape), f"[{b}, S, {h}, {dim}] with S at least {t}")
    expect(v_cache.shape == k_cache.shape, op, "v_cache shape", tuple(v_cache.shape), tuple(k_cache.shape))
    check_lengths(op, "start", start, q)


def check_lengths(op: str, name: str, lengths: Tensor, q: Tensor) -> None:
    expect(lengths.shape == q.shape[:1], op, f"{name} shape", tuple(lengths.shape), f"[B] = ({q.shape[0]},)")
    expect(lengths.dtype in (torch.int32, torch.int64), op, f"{name} dtype", lengths.dtype, "int32 or int64")
    expect(lengths.device == q.device, op, f"{name} device", lengths.device, q.device)
    expect(lengths.is_contiguous(), op, f"{name} strides", lengths.stride(), "a contiguous vector")


def check_attention(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, mask: Tensor | None) -> None:
    op = "attention"
    if q.dim() != 4:
        expect(False, op, "q shape", tuple(q.shape), "[B, T, HQ, K]")
    b, t, hq, dim = q.shape
    if k.dim() != 4 or k.shape[0] != b or k.shape[3] != dim:
        expect(False, op, "k shape", tuple(k.shape), f"[B, S, H, K] with B {b}, K {dim}")
    if v.shape != k.shape:
        expect(False, op, "v shape", tuple(v.shape), f"{tuple(k.shape)}, that of k")
    s, h = k.shape[1], k.shape[2]
    if h == 0 or hq % h:
        expect(False, op, "query heads HQ", hq, f"a multiple of the key heads, {h}")
    if not 0 < dim <= HEAD_DIM_MAX:
        expect(False, op, "head dim K", dim, f"1 to {HEAD_DIM_MAX}")
    if kv_lens is not None:
        check_lengths(op, "kv_lens", kv_lens, q)
    if mask is not None:
        expect(mask.dtype == torch.bool, op, "mask dtype", mask.dtype, "bool, True where a key may be seen")
        expect(mask.device == q.device, op, "mask device", mask.device, q.device)
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, (b, hq, t, s), strict=True))
        expect(fits, op, "mask shape", tuple(mask.shape), f"broadcastable to [B, 1 or HQ, T, S] = {(b, hq, t, s)}")


def check_linear(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        expect(False, "linear", "weight shape", tuple(weight.shape), f"[N, D] with D {x.shape[-1]}")


def check_ffn_shapes(x: Tensor, w1: Tensor | Quantized, w3: Tensor | Quantized, w2: Tensor | Quantized) -> None:
    width = x.shape[-1]
    if len(w1.shape) != 2 or w1.shape[1] != width:
        expect(False, "ffn", "w1 shape", tuple(w1.shape), f"[F, D] with D {width}")
    if w3.shape != w1.shape:
        expect(False, "ffn", "w3 shape", tuple(w3.shape), f"{tuple(w1.shape)}, that of w1")
    transposed = (w1.shape[1], w1.shape[0])
    if w2.shape != transposed:
        expect(False, "ffn", "w2 shape", tuple(w2.shape), f"[D, F] = {transposed}")


def check_ffn(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> None:
    check_ffn_shapes(x, w1, w3, w2)
    for name, w in (("w1", w1), ("w3", w3), ("w2", w2)):
        if not w.is_contiguous():
            expect(False, "ffn", f"{name} strides", w.stride(), "a contiguous matrix")


def check_quantized(op: str, name: str, weight: Quantized, x: Tensor, width: int) -> bool:
    """The parts of a weight agree with its format, with one another and with a product of ``width`` columns.

    Returns whether all are :data:`PLAIN`.
    """
    values, scales, zeros, group = weight.values, weight.scales, weight.zeros, weight.group
    if weight.format not in VALUES:
        expect(False, op, f"{name} format", weight.format, "int4, int8 or fp8")
    expected = VALUES[weight.format]
    if values.dtype != expected or values.dim() != 2:
        got = f"{values.dtype} {tuple(values.shape)}"
        expect(False, op, f"{name} values", got, f"{expected}, two dimensions")
    rows, columns = weight.shape
    if columns != width:
        expect(False, op, f"{name} shape", weight.shape, f"{width} columns")
    whole = group == width and weight.format != "int4"
    grouped = group in GROUPS and width % group == 0 and weight.format != "fp8"
    if not (whole or grouped):
        groups = {"int4": f"one of {GROUPS}", "int8": f"one of {GROUPS}, or {width}", "fp8": str(width)}
        expect(False, op, f"{name} group", group, f"{groups[weight.format]}, a divisor of {width}")
    if zeros is not None and weight.format != "int4":
        expect(False, op, f"{name} zeros", tuple(zeros.shape), f"none: {weight.format} is symmetric")
    for part, t in (("scales", scales), ("zeros", scales if zeros is None else zeros)):
        if t.shape != (rows, width // group):
            expect(False, op, f"{name} {part} shape", tuple(t.shape), (rows, width // group))
        if t.dtype not in SCALE_DTYPES or t.dtype != scales.dtype:
            expect(False, op, f"{name} {part} dtype", t.dtype, "float16, bfloat16 or float32, one for scales and zeros")
    plain = True
    for part, t in (("values", values), ("scales", scales), ("zeros", scales if zeros is None else zeros)):
        plain = plain and type(t) in PLAIN
        if t.device != x.device:
            expect(False, op, f"{name} {part} device", t.device, f"{x.device}, that of x")
        if not t.is_contiguous():
            expect(False, op, f"{name} {part} strides", t.stride(), "a contiguous matrix")
    return plain
