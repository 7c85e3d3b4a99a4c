"""A store opened for streaming: from what a user asks for to a plan and its runner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypedDict

import torch

from mhaffn.budget import Budget, free_dram, free_gpu, resolve_budget
from mhaffn.config import ModelConfig, Sublayer
from mhaffn.device import choose_device, memory_errors
from mhaffn.errors import ConfigError
from mhaffn.plan import Tier, make_plan
from mhaffn.reader import Direct, Engine, check_modes
from mhaffn.runner import Runner
from mhaffn.sizes import Workload
from mhaffn.store import Store

CONTEXT = 4096


class Options(TypedDict, total=False):
    """How a model is streamed; what each means, and what it is unless given, says :func:`mhaffn.load`."""

    gpu: Budget
    dram: Budget
    context: int | None
    tokens: int | None
    batch: int
    all_logits: bool
    device: str | torch.device | None
    engine: Engine
    direct: Direct
    strict: bool
    verify: bool
    tiers: dict[Sublayer, Tier] | None
    progress: Callable[[int, int], None]


def open_runner(
    store: Store,
    *,
    gpu: Budget = "auto",
    dram: Budget = "auto",
    context: int | None = None,
    tokens: int | None = None,
    batch: int = 1,
    all_logits: bool = False,
    device: str | torch.device | None = None,
    engine: Engine = "auto",
    direct: Direct = "auto",
    strict: bool = False,
    verify: bool = True,
    tiers: dict[Sublayer, Tier] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Runner:
    """Plans and opens ``store``; options and errors as of :func:`mhaffn.load`."""
    check_modes(engine, direct)
    limits = {"context": CONTEXT if context is None else context, "tokens": CONTEXT if tokens is None else tokens}
    for name, count in (limits | {"batch": batch}).items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"got {name} = {count!r}, expected a whole number of at least 1")
    context = _context_length(store.config, context)
    device = choose_device(device)
    copies = device.type == "cuda"
    if not copies and gpu != "auto" and resolve_budget(gpu, lambda: 0):
        raise ConfigError(f"got gpu = {gpu!r}, but the device is the CPU; give dram instead, or a CUDA device")
    tokens = min(tokens or context, context)
    plan = make_plan(
        store.config,
        store.dtype,
        gpu=resolve_budget(gpu, partial(free_gpu, device)) if copies else None,
        dram=resolve_budget(dram, free_dram),
        copies=copies,
        work=Workload(tokens, context, batch, logits=tokens if all_logits else 1),
        tiers=tiers,
        stored=store.stored(),
    )
    with memory_errors():
        return Runner(
            store, plan, device=device, engine=engine, direct=direct, strict=strict, verify=verify, progress=progress
        )


def _context_length(config: ModelConfig, context: int | None) -> int:
    limit = config.max_position_embeddings
    if context is not None and context > limit:
        raise ConfigError(f"got context = {context}, expected 1 to {limit}, the positions this model knows")
    return context or min(CONTEXT, limit)
