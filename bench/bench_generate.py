"""A resident Hugging Face Llama of 8B width: replaced, unmodified (SDPA), and with Liger's patch, by turns in one run.

    python bench/bench_generate.py --out generate.json
    pytest bench/bench_generate.py -m gpu --benchmark-only

Random bf16 weights, made on the GPU and shared by the contenders. Three figures each, by the wall clock around whole
calls, since host time is part of what a user waits for:

- prefill: one forward over the prompt, into a dynamic cache, logits of the last token;
- generate: greedy ``generate()`` from that prompt, and the milliseconds of each token after the first;
- step, host: from calling one decoding forward to its return, the GPU idle before: what launching costs.

Two layers of the same weights are checked first: error against float32 at most twice that of the unmodified model.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from by_peer import CLOCK
from timer import DEVICE, environment
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import mhaffn

WIDTHS = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 32, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 4, "vocab_size": 1000,
    },
}  # fmt: skip


def random_model(width: str, layers: int | None, device: str) -> Any:
    options = WIDTHS[width] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(
        **options, max_position_embeddings=131072, rms_norm_eps=1e-5, pad_token_id=0, eos_token_id=None,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def twin(model: Any) -> Any:
    """Other modules on the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


WARM_UP_TOKENS = 8


class Contender:
    """A model, and the names in transformers' module that its patch puts in place while it runs."""

    def __init__(self, name: str, model: Any, patch: Callable[[Any], object] = lambda model: None) -> None:
        self.name, self.model = name, model
        self._own = dict(vars(modeling_llama))
        patch(model)
        self._patched = {k: v for k, v in vars(modeling_llama).items() if self._own.get(k) is not v}
        self._put({k: self._own[k] for k in self._patched if k in self._own})

    @staticmethod
    def _put(names: dict[str, Any]) -> None:
        vars(modeling_llama).update(names)

    @contextmanager
    def active(self) -> Iterator[Any]:
        self._put(self._patched)
        try:
            yield self.model
        finally:
            self._put({k: self._own[k] for k in self._patched if k in self._own})


def contenders(model: Any) -> Iterator[Contender]:
    yield Contender("unmodified", model)
    yield Contender("mhaffn.replace", twin(model), lambda m: print(mhaffn.replace(m), flush=True))
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        yield Contender("Liger", twin(model), lambda m: apply_liger_kernel_to_llama(model=m))
    except Exception as problem:
        print(f"without Liger (pip install liger-kernel): {type(problem).__name__}: {problem}", flush=True)


def check(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Relative errors of the first two layers against float32; raises where ours is over twice the unmodified."""
    short = twin(model)
    short.model.layers = short.model.layers[:2]
    short.config = copy.deepcopy(short.config)
    short.config.num_hidden_layers = short.model.config.num_hidden_layers = 2
    truth = copy.deepcopy(short).float()(ids).logits
    errors = {}
    for contender in contenders(short):
        with contender.active() as m:
            try:
                got = m(ids).logits.float()
            except Exception as problem:
                print(f"{contender.name} fails: {type(problem).__name__}: {problem}"[:300], flush=True)
                continue
        errors[contender.name] = ((got - truth).norm() / truth.norm()).item()
    if not errors["mhaffn.replace"] <= 2 * errors["unmodified"]:
        raise ArithmeticError(f"errors against float32: {errors}: not timed")
    return errors


def seconds(call: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def prefill(model: Any, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def launch(model: Any, ids: torch.Tensor, cache: DynamicCache, device: str) -> float:
    """Seconds from the call of one decoding step to its return."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(ids[:, -1:], past_key_values=cache)
    return time.perf_counter() - start


def summary(samples: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(samples, n=5) if len(samples) > 1 else samples * 4
    found = {"median_ms": statistics.median(samples) * 1e3, "p20_ms": cuts[0] * 1e3, "p80_ms": cuts[3] * 1e3}
    return found | {"samples_ms": [sample * 1e3 for sample in samples]}


def measure(models: list[Contender], ids: torch.Tensor, tokens: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each contender, the unmodified one first.

    ``times_unmodified`` are medians of the ratios of each round, in which all were measured one after the other: a
    shared host is slow for seconds at a time, for all of them.
    """
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    samples: dict[str, dict[str, list[list[float]]]] = {
        c.name: {"prefill": [], "generate": [], "step": [], "decode": []} for c in models
    }
    for turn in range(-1, rounds):  # the first turn compiles, and counts for nothing
        options["max_new_tokens"] = tokens if turn >= 0 else min(tokens, WARM_UP_TOKENS)
        for contender in models[turn % len(models) :] + models[: turn % len(models)]:
            with contender.active() as model:
                cache = prefill(model, ids)
                taken = {
                    "prefill": [seconds(lambda model=model: prefill(model, ids), device) for _ in range(3)],
                    "step": [launch(model, ids, cache, device) for _ in range(10)],
                    "generate": [seconds(lambda model=model: model.generate(ids, **options), device)],
                }
            prompt = statistics.median(taken["prefill"])
            taken["decode"] = [(whole - prompt) / max(1, tokens - 1) for whole in taken["generate"]]
            if turn >= 0:
                for figure, values in taken.items():
                    samples[contender.name][figure].append(values)
    first = samples[models[0].name]
    rows = []
    for name, figures in samples.items():
        row: dict[str, Any] = {"implementation": name} | {k: summary([*chain(*v)]) for k, v in figures.items()}
        row["decode_ms_a_token"] = row.pop("decode")["median_ms"]
        row["times_unmodified"] = {
            figure: statistics.median(
                statistics.median(theirs) / statistics.median(own)
                for theirs, own in zip(first[figure], figures[figure], strict=True)
            )
            for figure in ("prefill", "step", "decode", "generate")
        }
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    times = row["times_unmodified"]
    generate = row["generate"]["median_ms"]
    return (
        f"{row['implementation']:16} prefill {row['prefill']['median_ms']:8.2f} ms ({times['prefill']:.2f}x)  "
        f"decode {row['decode_ms_a_token']:7.3f} ms a token ({times['decode']:.2f}x), launching it "
        f"{row['step']['median_ms']:7.3f} ms  generate {generate:8.1f} ms ({times['generate']:.2f}x)"
    )


def facts(device: str) -> dict[str, Any]:
    found = environment() if device == "cuda" else {"gpu": None, "versions": {"torch": torch.__version__}}
    found["versions"]["transformers"] = version("transformers")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="bench generate")
    parser.add_argument("--width", choices=WIDTHS, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the width has")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    with torch.inference_mode():
        model = random_model(given.width, given.layers, given.device)
        ids = torch.randint(3, model.config.vocab_size, (given.batch, given.prompt), device=given.device)
        errors = check(model, ids[:1, :256])
        running = [c for c in contenders(model) if c.name in errors]
        rows = measure(running, ids, given.tokens, given.rounds, given.device)
    for row in rows:
        row["relative_error"] = errors[row["implementation"]]
        print(line(row), flush=True)
    report = {
        "bench": "generate", "width": given.width, "layers": model.config.num_hidden_layers, "batch": given.batch,
        "prompt": given.prompt, "tokens": given.tokens, "rounds": given.rounds, "environment": facts(given.device),
        "seconds": time.perf_counter() - started, "rows": rows,
    }  # fmt: skip
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=1) + "\n")


CASES = {"tiny": (64, 8, 2), "8b": (2048, 128, 9)}
"""Prompt, tokens to generate, and rounds, by width."""


@cache
def measured(width: str) -> dict[str, dict[str, Any]]:
    """By implementation what :func:`measure` finds."""
    prompt, tokens, rounds = CASES[width]
    torch.manual_seed(0)
    with torch.inference_mode():
        model = random_model(width, None, DEVICE.type)
        ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=DEVICE)
        errors = check(model, ids[:, :256])
        running = [c for c in contenders(model) if c.name in errors]
        rows = measure(running, ids, tokens, rounds, DEVICE.type)
    return {row["implementation"]: row | {"relative_error": errors[row["implementation"]]} for row in rows}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("peer", ["unmodified", "mhaffn.replace", "Liger"])
@pytest.mark.parametrize("case", ["prefill", "step", "generate"])
@pytest.mark.parametrize("width", ["tiny", pytest.param("8b", marks=pytest.mark.gpu)])
def test_generate(benchmark, width, case, peer):
    rows = measured(width)
    if peer not in rows:
        pytest.skip("not here: pip install liger-kernel, and a GPU")
    row, about = rows[peer], environment()
    benchmark.extra_info.update({name: row[name] for name in ("relative_error", "times_unmodified")})
    benchmark.extra_info.update({name: about[name] for name in ("versions", "clocks", "commit")})
    CLOCK.report(benchmark, f"{width}, {case}", [ms / 1e3 for ms in row[case]["samples_ms"]])


if __name__ == "__main__":
    main()
