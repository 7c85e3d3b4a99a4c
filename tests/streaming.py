"""Streamed models whose sublayers lie where a test says, the tokens they give, and memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import mhaffn
from mhaffn.config import order
from mhaffn.device import HostDevice
from mhaffn.errors import EngineUnavailableError
from mhaffn.plan import Tier
from mhaffn.store import Store


class CopyingHost(HostDevice):
    """The CPU with memory of its own: streamed sublayers are copied, as to a GPU."""

    copies = True


def load_placed(folder: Path, tiers: tuple[Tier, ...], **options: Any) -> mhaffn.StreamedLlama:
    try:
        return mhaffn.load(
            folder, gpu=None, dram=None, tiers=dict(zip(order(len(tiers) // 2), tiers, strict=True)), **options
        )
    except EngineUnavailableError as error:
        pytest.skip(str(error))


def greedy(model: mhaffn.StreamedLlama, tokens: int = 6) -> list[int]:
    ids = torch.tensor([[5, 17, 101, 42, 9]], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    result: list[int] = output[0].tolist()
    return result


def resident_tokens(folder: Path, tokens: int = 6) -> list[int]:
    layers = Store.open(folder).config.num_layers
    with mhaffn.load(folder, device="cpu", tiers=dict.fromkeys(order(layers), "dram")) as model:
        return greedy(model, tokens)


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
