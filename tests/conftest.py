"""Tiny models and the devices tests run on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# Where tests run in the background, a shell has them ignore SIGINT, and their children would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A change is judged by the same examples each time; new ones are looked for on developers' machines.
hypothesis.settings.register_profile("ci", derandomize=True)
if "CI" in os.environ:
    hypothesis.settings.load_profile("ci")

Model = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Makes random Llamas: ``tiny_model(dtype="float32", shards=1, **config)`` gives the folder, made once each."""
    made: dict[str, Path] = {}

    def make(*, dtype: str = "float32", shards: int = 1, seed: int = 0, kind: str = "llama", **changes: Any) -> Path:
        key = json.dumps([dtype, shards, seed, kind, changes], sort_keys=True)
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp("model"), dtype, shards, seed, kind, changes)
        return made[key]

    return make


def _save(folder: Path, dtype: str, shards: int, seed: int, kind: str, changes: dict[str, Any]) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    options: dict[str, Any] = {
        "hidden_size": 72,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 211,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | changes
    torch.manual_seed(seed)
    if kind == "mistral":
        model: Any = MistralForCausalLM(MistralConfig(**options, sliding_window=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**options))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is forgotten
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    total = sum(p.numel() * 4 for p in model.parameters())
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=total // shards + 1 if shards > 1 else "5GB")
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device the product runs on; CUDA under the marker ``gpu``."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return str(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models this small, several threads wait for each other: time lost, and on a busy machine much noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sublayers are copied to the CPU as they are to a GPU."""
    from mhaffn.plan import make_plan
    from tests.streaming import CopyingHost

    monkeypatch.setattr("mhaffn.runner.open_device", lambda device, trace: CopyingHost(trace))
    monkeypatch.setattr("mhaffn.opening.make_plan", lambda *a, **options: make_plan(*a, **(options | {"copies": True})))
