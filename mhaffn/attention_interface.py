"""``attn_implementation="mhaffn"`` for transformers: an attention function and the mask function that belongs to it.

Masks, from the second to the first:

============== ====================================================================================================
None           causal, aligned to the end of the keys
``[B, S]``     the same over the first S keys (a static cache hands over more), of which True may be seen: padding
``[0, S]``     the same over the first S keys, all of which may be seen
4 dimensions   as given: bool, True where a query may look; or added to the scores
============== ====================================================================================================

A batch without padding gets no mask at all, in chunks and in decoding too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from mhaffn import ops
from mhaffn.errors import ConfigError
from mhaffn.kernels.reference import attended

NAME = "mhaffn"
REFUSED = ("softcap", "position_bias", "cache", "s_aux")
"""Arguments of other attention functions that change the result."""


def register_attention() -> None:
    """Makes ``attn_implementation="mhaffn"`` known to transformers; more than once is fine."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls once a pass, as it calls ``sdpa_mask``; returns a mask of the table above.

    It reads the device once, where a 2-D ``attention_mask`` is given and no graph is traced or captured: whether that
    mask hides anything.
    """
    plain = mask_function is causal_mask_function and allow_is_causal_skip
    if not plain or isinstance(q_offset, Tensor) or kv_offset != 0 or q_offset + q_length > kv_length:
        whole: Tensor = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False, device=device, **kwargs,
        )  # fmt: skip
        return whole
    length = q_offset + q_length
    if attention_mask is not None and attention_mask.shape[0] > 0:
        missing = length - attention_mask.shape[1]
        padding = pad(attention_mask, (0, missing)) if missing > 0 else attention_mask[:, :length]
        if is_tracing(padding) or not padding.all():
            return padding
    return None if length == kv_length else torch.empty((0, length), dtype=torch.bool, device=device)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers calls it: query ``[B, HQ, T, K]``, key and value ``[B, H, S, K]`` -> ``[B, T, HQ, K]``.

    With ``output_attentions`` it also returns what the eager implementation would, ``[B, HQ, T, S]``. Raises
    :class:`ConfigError` for dropout and for :data:`REFUSED` arguments.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ConfigError(f'attn_implementation="{NAME}" does not take {name}; choose "sdpa" or "eager"')
    if dropout:
        raise ConfigError(f'attn_implementation="{NAME}" has no dropout, got {dropout}: put the model in eval() mode')
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kwargs.get("output_attentions"):
        return _eager(query, key, value, attention_mask, scaling, causal)
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype != torch.bool:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=causal)
        return out, None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, attention_mask, scale=scaling, causal=causal), None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    causal: bool = True,
    kv_lens: Tensor | None = None,
) -> Tensor:
    """:func:`mhaffn.ops.attention` with a mask of the table above; 4-D masks in bool."""
    if mask is None:
        return ops.attention(q, k, v, causal=causal, kv_lens=kv_lens, scale=scale)
    if mask.dim() == 4:
        return ops.attention(q, k, v, causal=False, kv_lens=kv_lens, mask=mask, scale=scale)
    length = mask.shape[1]
    seen = mask[:, None, None, :] if mask.shape[0] else None
    return ops.attention(q, k[:, :length], v[:, :length], causal=causal, mask=seen, scale=scale)


def as_bool(mask: Tensor) -> Tensor:
    """A 4-D mask in bool, True where a query may look.

    Raises :class:`ConfigError` for one that adds anything but 0 or the least number of its dtype to the scores, and
    for one of whole numbers.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ConfigError(f"got a 4-D attention_mask of {mask.dtype}, expected torch.bool or what is added to scores")
    least = torch.finfo(mask.dtype).min / 2
    if not ((mask == 0) | (mask <= least)).all():
        raise ConfigError("got an attention_mask with biases, expected 0 or the least number of its dtype")
    return mask == 0


def _eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention with its weights, as ``eager_attention_forward`` of transformers computes them."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    t, s = query.shape[2], key.shape[2]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    else:
        seen = _seen(mask, t, s, causal, query.device)
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _seen(mask: Tensor | None, t: int, s: int, causal: bool, device: torch.device) -> Tensor | None:
    """A mask of the table above as a bool tensor that broadcasts to ``[B, HQ, T, S]``."""
    if mask is not None and mask.dim() == 4:
        return mask
    length = s if mask is None else mask.shape[1]
    padding = None if mask is None or mask.shape[0] == 0 else mask[:, None, None, :]
    seen = attended(1, t, length, causal=causal, kv_lens=None, mask=padding, device=device)
    return seen if seen is None or length == s else pad(seen, (0, s - length))
