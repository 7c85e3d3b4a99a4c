"""Attention, FeedForward and RMSNorm of Meta's reference code, ``llama_models.llama3.model``, on :mod:`mhaffn.ops`.

As in :mod:`mhaffn.huggingface`, a mixin is put before the class a module had. Rotary pairs are interleaved here, and
the cache is a tensor ``[B, S, H, K]`` of each attention module: keys and values are rotated straight into it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from llama_models.llama3 import model as llama3
from llama_models.llama3.args import ModelArgs
from torch import Tensor, nn
from torch.nn.functional import linear

from mhaffn import ops
from mhaffn.arguments import DTYPES, HEAD_DIM_MAX
from mhaffn.errors import UnsupportedModelError
from mhaffn.swap import Found, PassMemo, Swapped, own_forward, plain_weight, swap

PARALLEL = (ColumnParallelLinear, RowParallelLinear)
TOLERANCE = 1e-4
"""Of logits in float32, in the check at first use."""


class RMSNorm(Swapped):
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        self.check_inference(x)
        weight = self._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.dtype != x.dtype:
            return cast(Tensor, super().forward(x))
        return ops.rms_norm(x, weight, self.eps)


class FeedForward(Swapped):
    def forward(self, x: Tensor) -> Tensor:
        self.check_inference(x)
        parts: dict[str, Any] = self._modules
        w1, w2, w3 = parts["w1"], parts["w2"], parts["w3"]
        plain = all(plain_weight(w, PARALLEL) for w in (w1, w2, w3))
        if not plain or w1.weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, super().forward(x))
        return ops.ffn(x, w1.weight, w3.weight, w2.weight)


class Attention(Swapped):
    head_dim: int
    cache_k: Tensor
    cache_v: Tensor
    memo: PassMemo
    leads: bool

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` is the causal one that ``Transformer.forward`` makes, or None: then a query sees every key."""
        self.check_inference(x)
        B, T, _ = x.shape
        sequences, places = self.cache_k.shape[:2]
        room = sequences >= B and 0 <= start_pos <= places - T
        square = mask is None or mask.shape == (T, start_pos + T)
        if not room or not square or torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, super().forward(x, start_pos, freqs_cis, mask))
        K, length = self.head_dim, start_pos + T
        parts: dict[str, Any] = self._modules
        q = _project(parts["wq"], x).view(B, T, -1, K)
        k = _project(parts["wk"], x).view(B, T, -1, K)
        v = _project(parts["wv"], x).view(B, T, -1, K)
        self.cache_k, self.cache_v = self.cache_k.to(q), self.cache_v.to(q)
        keys, values = self.cache_k[:B], self.cache_v[:B]
        cos, sin, start = self.memo.of(freqs_cis, _angles, start_pos, B, leads=self.leads)
        q = ops.rope_write(q, k, v, cos, sin, keys, values, start, interleaved=True)
        y = ops.attention(q, keys[:, :length], values[:, :length], causal=mask is not None)
        return _project(parts["wo"], y.view(B, T, -1))


def _project(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight) if plain_weight(layer, PARALLEL) else cast(Tensor, layer(x))


def _angles(freqs_cis: Tensor, start_pos: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines as ``ops.rope_write`` takes them, and where each sequence of the batch starts to write."""
    start = torch.full((batch,), start_pos, dtype=torch.int32, device=freqs_cis.device)
    return freqs_cis.real.contiguous(), freqs_cis.imag.contiguous(), start


# --- which modules ----------------------------------------------------------------------------------------------------

MIXINS: dict[type[nn.Module], type[Swapped]] = {
    llama3.Attention: Attention,
    llama3.FeedForward: FeedForward,
    llama3.RMSNorm: RMSNorm,
}


def survey(model: nn.Module) -> list[Found]:
    """Every attention, feed-forward and RMSNorm of ``model`` that is Meta's, in its order."""
    masked = {id(module) for owner in model.modules() if _makes_causal_masks(owner) for module in owner.modules()}
    return [
        Found(name, module, mixin, upstream, _why_not(module, upstream, id(module) in masked))
        for name, module in model.named_modules()
        for upstream, mixin in MIXINS.items()
        if isinstance(module, upstream)
    ]


def _makes_causal_masks(owner: nn.Module) -> bool:
    """Whether attention within ``owner`` is called with the masks, and so on, of Meta's own forward."""
    if not isinstance(owner, llama3.Transformer) or not own_forward(owner, llama3.Transformer):
        return False
    return all(isinstance(b, llama3.TransformerBlock) and own_forward(b, llama3.TransformerBlock) for b in owner.layers)


def _why_not(module: Any, upstream: type[nn.Module], masked: bool) -> str | None:
    if isinstance(module, Swapped):
        return None
    if not own_forward(module, upstream):
        return f"its forward is not that of Meta's {upstream.__name__}: overridden, patched or wrapped by a hook"
    if (ranks := get_model_parallel_world_size()) != 1:
        return f"the model is spread over {ranks} ranks, expected 1"
    if upstream is llama3.RMSNorm:
        return None
    for name, part in module.named_children():
        weight = part._parameters.get("weight")
        if type(part) not in PARALLEL or type(weight) is not nn.Parameter or part.bias is not None:
            return f"{name} is a {type(part).__name__}, expected a parallel linear layer without bias or quantisation"
        if weight.dtype not in DTYPES or not weight.is_contiguous():
            kind = f"{weight.dtype} with strides {weight.stride()}"
            return f"{name}.weight is {kind}, expected contiguous bfloat16, float16 or float32"
    if upstream is llama3.Attention:
        if not masked:
            return "the forward around it is not that of Meta's Transformer, so its masks may be others"
        if module.head_dim > HEAD_DIM_MAX or module.head_dim % 2:
            return f"head dim of {module.head_dim}, expected an even number up to {HEAD_DIM_MAX}"
    return None


# --- replacing them ---------------------------------------------------------------------------------------------------


def replace(found: list[Found]) -> None:
    """Swaps the modules of ``found`` that have no reason against it."""
    memo, leads = PassMemo(), True
    for f in found:
        if f.why is not None or isinstance(f.module, Swapped):
            continue
        if f.mixin is Attention:
            swap(f.module, Attention, memo=memo, leads=leads)
            leads = False
        else:
            swap(f.module, f.mixin)


def check(found: list[Found]) -> None:
    """Compares logits on a tiny random model, once in a process for each ratio of query heads to key heads.

    Raises :class:`UnsupportedModelError` where they differ.
    """
    ratios = {f.module.n_rep for f in found if f.mixin is Attention and f.why is None}
    for ratio in ratios or ({2} if any(f.why is None for f in found) else ()):
        try_on_tiny(ratio, _replace_all)


def _replace_all(model: nn.Module) -> None:
    replace(survey(model))


@cache
def try_on_tiny(ratio: int, change: Callable[[Any], None]) -> None:
    """Compares logits of a tiny random model before and after ``change``; raises :class:`UnsupportedModelError`."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        sizes = {"dim": 32 * ratio, "n_layers": 2, "n_heads": 2 * ratio, "n_kv_heads": 2, "vocab_size": 61}
        args = ModelArgs(**sizes, multiple_of=16, max_batch_size=2, max_seq_len=16)
        model = llama3.Transformer(args).to("cpu", torch.float32)
        for name, parameter in model.named_parameters():  # wide enough that a slip of any part shows in the logits
            torch.nn.init.normal_(parameter, *((1.0, 0.3) if "norm" in name else (0.0, 0.15)))
        expected = _logits(model)
        try:
            change(model)
            error = (_logits(model) - expected).abs().max().item()
        except Exception as problem:
            raise UnsupportedModelError(_disagreement(f"{type(problem).__name__}: {problem}")) from problem
    if not error <= TOLERANCE:
        raise UnsupportedModelError(_disagreement(f"logits that differ by {error:.1e}"))


def _disagreement(got: str) -> str:
    return (
        f"mhaffn.replace tried itself on a tiny model of Meta's code and got {got}, expected its logits within "
        f"{TOLERANCE:.0e}; nothing was replaced. Install llama-models 0.3.0, which this mhaffn was tested with."
    )


def _logits(model: nn.Module) -> Tensor:
    """A prompt, some more tokens, one token."""
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    return torch.cat([model(ids[:, start:stop], start) for start, stop in ((0, 8), (8, 11), (11, 12))], 1)
