"""What a sublayer's compute takes by itself, its weights in the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch

from mhaffn.bench.rounds import Measurement, repeat
from mhaffn.config import KINDS, Kind, ModelConfig
from mhaffn.forecast import PHASES
from mhaffn.image import Weights
from mhaffn.inputs import FilledCache, context_of, hidden_states
from mhaffn.kernels import timing
from mhaffn.modules import FFN, MHA, Block
from mhaffn.roofs import seconds_queued
from mhaffn.trace import Phase

CALLS_IN_A_ROW = 8
"""Calls of a decode in one CUDA graph: one alone is too short for the clock of events."""


def tokens_of(phase: Phase, tokens: int) -> int:
    """Positions that go through at once: the prompt, or one token after it."""
    return tokens if phase == "prefill" else 1


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
        T = tokens_of(phase, tokens)
        context = context_of(config, T, FilledCache(config, 1, tokens, device))
        x = hidden_states(config, T, device)
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
