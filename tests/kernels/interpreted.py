"""Every Triton kernel in Triton's interpreter, on the CPU, against the float64 truth.

Run as ``python interpreted.py NAME`` with TRITON_INTERPRET=1: the interpreter needs a process of its own. Shapes are
small and odd, outputs are poisoned with NaN; bfloat16 is left to the GPU (the interpreter's dot is wrong for it).
"""

from __future__ import annotations

import sys

import torch
from checks import poisoned
from weights import random_weight

from mhaffn.kernels import attention_decode, attention_prefill, ffn, quantized, reference, rmsnorm, rope
from mhaffn.quantized import dequantize

DTYPES = (torch.float32, torch.float16)
TINY_PREFILL = {"BLOCK_M": 32, "BLOCK_N": 16, "STAGES": 1, "WARPS": 4}


_makers = torch.empty, torch.empty_like
torch.empty, torch.empty_like = map(poisoned, _makers)


def close(got: torch.Tensor, truth: torch.Tensor) -> None:
    """One rounding of the result, and float32 sums (fp16 products keep fp16 probabilities: two roundings)."""
    bound = 2e-6 if got.dtype == torch.float32 else 1e-3
    error = (got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-20)
    assert error <= bound, f"relative error {error:.2e}, allowed {bound:.0e}"  # NaN fails too


def attention_cases(sizes):
    for dtype in DTYPES:
        for b, t, hq, h, s, dim in sizes:
            q = torch.randn(b, t, hq, dim).to(dtype)
            k, v = torch.randn(2, b, s, h, dim).to(dtype)
            lens = torch.tensor([s, s // 3][:b])
            per_query = torch.rand(b, 1, t, s) > 0.3
            per_query[0, :, 0] = False
            per_head = torch.rand(b, hq, t, s) > 0.5
            padding = torch.ones(b, 1, 1, s, dtype=torch.bool)
            padding[-1, ..., : s // 4] = False
            for causal, kv_lens, mask in (
                (True, None, None),
                (False, None, None),
                (True, lens, None),
                (True, None, per_query),
                (False, lens, padding),
                (True, None, per_head),
            )[: 6 if dtype == torch.float32 else 3]:
                options = {"causal": causal, "kv_lens": kv_lens, "mask": mask}
                truth = reference.attention(q.double(), k.double(), v.double(), compute=torch.float64, **options)
                yield (q, k, v, causal, kv_lens, mask, dim**-0.5), truth


def check_attention_decode() -> None:
    sizes = (
        (1, 1, 8, 2, 100, 64),
        (2, 1, 9, 3, 65, 96),
        (2, 5, 14, 2, 130, 64),
        (1, 40, 4, 2, 70, 64),
        (1, 7, 2, 2, 5, 64),
    )
    for arguments, truth in attention_cases(sizes):
        close(attention_decode.attention_decode(*arguments), truth)


def check_attention_prefill() -> None:
    for descriptor in (0, 1):
        for arguments, truth in attention_cases(((2, 33, 6, 2, 70, 64), (1, 40, 2, 2, 20, 96))):
            tile = {**TINY_PREFILL, "DESCRIPTOR": descriptor}
            close(attention_prefill.attention_prefill(*arguments, tile), truth)


def check_ffn() -> None:
    tile = {"BLOCK_M": 16, "BLOCK_F": 16, "BLOCK_D": 32, "GROUP": 2, "STAGES": 1, "WARPS": 4}
    for dtype in DTYPES:
        w1, w3, w2 = ((torch.randn(s) * 0.1).to(dtype) for s in ((72, 96), (72, 96), (96, 72)))
        for m in (1, 7, 20, 63):
            x = torch.randn(m, 96).to(dtype)
            gate, up = x.double() @ w1.double().T, x.double() @ w3.double().T
            product = torch.nn.functional.silu(gate) * up
            close(ffn.ffn_few_rows(x, w1, w3, w2), product @ w2.double().T)
            close(ffn.gate_up(x, w1, w3, tile), product)
            narrow_gate, narrow_up = gate.to(dtype), up.to(dtype)
            product = torch.nn.functional.silu(narrow_gate.double()) * narrow_up.double()
            close(ffn.silu_mul_(narrow_gate, narrow_up), product)


def check_quantized() -> None:
    for format, width, group, zeros in (
        ("int4", 192, 32, True),
        ("int4", 192, 64, False),
        ("int4", 256, 128, True),
        ("int8", 192, 64, False),
        ("int8", 72, 72, False),
        ("fp8", 200, 200, False),
    ):
        a, b = (random_weight(format, 70, width, group, zeros=zeros, unit=5) for _ in range(2))
        wide = [dequantize(w, torch.float64) for w in (a, b)]
        for dtype in DTYPES:
            close(quantized.dequantize(a, dtype), wide[0])
        for m in (1, 20):
            x = torch.randn(m, width).half()
            gate, up = (x.double() @ w.T for w in wide)
            close(quantized.linear(x, a), gate)
            if m <= quantized.GATED_ROWS_MAX:
                close(quantized.linear(x, a, b), torch.nn.functional.silu(gate) * up)


def check_model() -> None:
    """Logits of whole models, replaced, with every operation a Triton kernel: a left-padded prompt, then a token."""
    from mhaffn.kernels import library

    assert "mhaffn.ops" not in sys.modules, "operations are registered on import"

    tile = {**TINY_PREFILL, "DESCRIPTOR": 0}

    def attention(q, k, v, causal, kv_lens, mask, scale):
        if q.shape[1] <= 8:
            return attention_decode.attention_decode(q, k, v, causal, kv_lens, mask, scale)
        return attention_prefill.attention_prefill(q, k, v, causal, kv_lens, mask, scale, tile)

    used = {"rms_norm": rmsnorm.rms_norm, "add_rms_norm": rmsnorm.add_rms_norm, "rope": rope.rope}
    used |= {"attention": attention, "ffn": lambda x, *w: ffn.ffn_few_rows(x.flatten(0, -2), *w).view(x.shape)}
    calls = dict.fromkeys(used, 0)

    def counted(name):
        def call(*arguments):
            calls[name] += 1
            return used[name](*arguments)

        return call

    for name in used:
        setattr(library, name, counted(name))
    import mhaffn
    from mhaffn import huggingface

    import transformers  # isort: skip

    huggingface.check = lambda found: None  # the same in float32, on larger shapes
    torch.empty, torch.empty_like = _makers  # transformers' own need not fill what they make
    for family in ("Llama", "Qwen3"):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(
            hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            head_dim=16, vocab_size=61, attn_implementation="sdpa", pad_token_id=None,
        )  # fmt: skip
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        ids = torch.randint(0, 61, (2, 11))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        logits = []
        with torch.no_grad():
            for change in (lambda: None, lambda: mhaffn.replace(model)):  # noqa: B023
                change()
                past = transformers.DynamicCache()
                for stop, start in ((10, 0), (11, 10)):
                    part = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past)
                    logits.append(part.logits[mask[:, start:stop].bool()])
        assert all(calls.values()), calls
        for got, want in zip(logits[2:], logits[:2], strict=True):
            assert (got - want).abs().max() <= 1e-4


def check_rmsnorm() -> None:
    for dtype in DTYPES:
        for width in (96, 576):
            x, residual = torch.randn(2, 2, 3, width).to(dtype)
            weight = torch.rand(width).to(dtype)
            close(rmsnorm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5, compute=torch.float64))
            got = rmsnorm.add_rms_norm(x, residual, weight, 1e-5)
            truth = reference.add_rms_norm(x, residual, weight, 1e-5)
            close(got[0], truth[0])
            assert torch.equal(got[1], truth[1])


def check_rope() -> None:
    for dtype in DTYPES:
        for dim in (64, 96):
            for interleaved in (False, True):
                q = torch.randn(2, 9, 5, dim).to(dtype).transpose(1, 2)
                k, v = torch.randn(2, 2, 5, 3, dim).to(dtype)
                for shape in ((5, dim // 2), (1, 5, dim // 2), (2, 5, dim // 2)):
                    cos, sin = torch.randn(2, *shape)
                    truth = reference.rope(q, k, cos, sin, interleaved=interleaved, compute=torch.float64)
                    for got, want in zip(rope.rope(q, k, cos, sin, interleaved), truth, strict=True):
                        close(got, want)
                k_cache, v_cache = (
                    torch.zeros(2, 20, 3, dim).to(dtype),
                    torch.zeros(2, 3, 20, dim).to(dtype).transpose(1, 2),
                )
                start = torch.tensor([3, 7])
                close(rope.rope_write(q, k, v, cos, sin, k_cache, v_cache, start, interleaved), truth[0])
                for i, first in enumerate(start.tolist()):
                    close(k_cache[i, first : first + 5], truth[1][i])
                    assert torch.equal(v_cache[i, first : first + 5], v[i])
                    k_cache[i, first : first + 5], v_cache[i, first : first + 5] = 0, 0
                assert not k_cache.any() and not v_cache.any(), "nothing else of the caches is written"


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    torch.manual_seed(0)
    CHECKS[sys.argv[1]]()
