"""What a sublayer's compute takes by itself, its weights in the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch

from mhaffn.bench.rounds import Measurement, repeat
from mhaffn.config import KINDS, Kind, ModelConfig
from mhaffn.forecast import PHASES
from mhaffn.image import Weights
from mhaffn.kernels import timing
from mhaffn.modules import FFN, MHA, Block, Context
from mhaffn.roofs import seconds_queued
from mhaffn.trace import Phase

ROPE_THETA = 500000.0
CALLS_IN_A_ROW = 8
"""Calls of a decode in one CUDA graph: one alone is too short for the clock of events."""


class FilledCache:
    """Room for S keys and values a layer, full: what a pass adds takes the place of the oldest."""

    def __init__(self, config: ModelConfig, layers: int, length: int, device: torch.device) -> None:
        shape = (layers, 2, 1, config.num_kv_heads, length, config.head_dim)
        self._memory = torch.randn(shape, dtype=torch.float32).to(device, torch.bfloat16)
        self._next = [0] * layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._memory[layer_idx]
        T, S = key_states.shape[2], keys.shape[2]
        start = self._next[layer_idx] if self._next[layer_idx] + T <= S else 0
        self._next[layer_idx] = start + T
        keys[:, :, start : start + T] = key_states
        values[:, :, start : start + T] = value_states
        return keys, values


def tokens_of(phase: Phase, tokens: int) -> int:
    """Positions that go through at once: the prompt, or one token after it."""
    return tokens if phase == "prefill" else 1


def context_of(config: ModelConfig, phase: Phase, tokens: int, cache: FilledCache) -> Context:
    """A pass of the prompt, or of one token that sees ``tokens`` keys."""
    T = tokens_of(phase, tokens)
    K = config.head_dim
    device = cache._memory.device
    positions = torch.arange(tokens - T, tokens, device=device, dtype=torch.float32)
    angles = positions[:, None] * ROPE_THETA ** (-torch.arange(0, K, 2, device=device, dtype=torch.float32) / K)
    return Context(angles.cos()[None].contiguous(), angles.sin()[None].contiguous(), length=tokens, cache=cache)


def hidden_states(config: ModelConfig, phase: Phase, tokens: int, device: torch.device) -> torch.Tensor:
    """Random ``[1, T, D]``."""
    return torch.randn(1, tokens_of(phase, tokens), config.hidden_size, device=device, dtype=torch.bfloat16)


def compute_measurements(
    config: ModelConfig, weights: Mapping[Kind, Weights], tokens: int, device: torch.device
) -> tuple[list[Measurement], list[str]]:
    """MHA, FFN and the whole layer in prefill and decode; and what could not be measured as meant."""
    mha = MHA(config, 0, lambda: nullcontext(weights["mha"]))
    ffn = FFN(config, lambda: nullcontext(weights["ffn"]))
    block = Block(mha, ffn)
    found: list[Measurement] = []
    remarks: list[str] = []
    for phase in PHASES:
        cache = FilledCache(config, 1, tokens, device)
        context = context_of(config, phase, tokens, cache)
        x = hidden_states(config, phase, tokens, device)
        calls: dict[str, Callable[[], object]] = {
            KINDS[0]: lambda x=x, context=context: mha(x, context),  # type: ignore[misc]
            KINDS[1]: lambda x=x: ffn(x),  # type: ignore[misc]
            "layer": lambda x=x, context=context: block(x, context),  # type: ignore[misc]
        }
        for name, call in calls.items():
            sample, remark = sampler(call, device, CALLS_IN_A_ROW if phase == "decode" else 1)
            found.append(Measurement(f"compute.{phase}.{name}", repeat(sample)))
            remarks += [remark] if remark and remark not in remarks else []
    return found, remarks


def sampler(call: Callable[[], object], device: torch.device, calls: int) -> tuple[Callable[[], float], str]:
    """Milliseconds a call. On a GPU calls are replayed as a CUDA graph: their own time, without the host's."""
    if device.type == "cpu":
        return lambda: seconds_queued(device, call) * 1e3, ""
    try:
        graph = timing.Graph([call] * calls)
    except RuntimeError as error:  # an operation that cannot be captured
        torch.cuda.synchronize(device)
        reason = str(error).splitlines()[0][:160]
        return lambda: seconds_queued(device, call) * 1e3, f"compute_without_graph:{reason}"
    return lambda: seconds_queued(device, graph.graph.replay) * 1e3 / calls, ""
