"""Passes over the weights that speculative decoding saves: SmolLM2, streamed, five prompts.

python bench/speculation.py            measures, into bench/results/speculation.json, and writes docs/speculation.md
python bench/speculation.py --render   writes the table alone
python bench/speculation.py --check    exits with 1 where docs/speculation.md differs from the results

A pass over the weights is what streaming pays for, however many tokens it verifies, so passes are counted, not seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mhaffn
from mhaffn.demo import PACKAGE, fetch_gguf
from mhaffn.formats import ALL_PLAIN
from mhaffn.machine import describe
from mhaffn.store import pack

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "bench" / "results" / "speculation.json", ROOT / "docs" / "speculation.md"
DTYPES = ("float32", "bfloat16")
TOKENS = 64
DRAFT_LAYERS = 15
PROMPTS = {
    "a question": "What is the capital of France?",
    "a list": "List the numbers from one to twenty, separated by commas.",
    "code": "Write a Python function that adds two numbers, and one that multiplies them.",
    "a copy": "Repeat this sentence three times: The weights stream from the disk to the GPU while it computes.",
    "prose": "Write a short story about a lighthouse keeper.",
}
WAYS = {
    "plain": "plain",
    "lookup": "`prompt_lookup_num_tokens=10`",
    "draft": f"`assistant_model=` its first {DRAFT_LAYERS} layers",
    "copy": "`assistant_model=` a resident copy",
}


def main() -> int:
    if "--check" in sys.argv:
        return DOCUMENT.read_text(encoding="utf-8") != rendered()
    if "--render" not in sys.argv:
        measure()
    DOCUMENT.write_text(rendered(), encoding="utf-8")
    return 0


def measure() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for dtype in DTYPES:
            store = pack(fetch_gguf(folder), folder / dtype, dtype=dtype, formats=ALL_PLAIN).path
            for row in model_rows(store):
                rows.append({"dtype": dtype, **row})
                print(" ".join(f"{row[key]!s:9}" for key in ("prompt", "way", "tokens", "passes", "same")), flush=True)
    values = {"machine": describe(), "model": f"SmolLM2-135M-Instruct, Q4_1 in {PACKAGE}", "rows": rows}
    RESULTS.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def model_rows(store: Path) -> Iterator[dict[str, Any]]:
    """Each prompt and way: tokens made, passes they took, and whether they are those of plain greedy decoding."""
    with mhaffn.load(store, gpu=None, dram=None, device="cpu") as model:
        helpers = ways(store)
        for name, prompt in PROMPTS.items():
            ids = encode(store, prompt)
            plain: list[int] = []
            for way, options in helpers.items():
                tokens, passes = decode(model, ids, options)
                plain = plain or tokens
                yield {"prompt": name, "way": way, "tokens": len(tokens), "passes": passes, "same": tokens == plain}


def ways(store: Path) -> dict[str, dict[str, Any]]:
    """What ``generate()`` takes for each of :data:`WAYS`; the assistants are ordinary resident models."""
    copy, draft = (AutoModelForCausalLM.from_pretrained(store, dtype="auto") for _ in range(2))
    draft.model.layers = draft.model.layers[:DRAFT_LAYERS]
    draft.config.num_hidden_layers = DRAFT_LAYERS
    return {
        "plain": {},
        "lookup": {"prompt_lookup_num_tokens": 10},
        "draft": {"assistant_model": draft},
        "copy": {"assistant_model": copy},
    }


def encode(store: Path, prompt: str) -> torch.Tensor:
    """Ids ``[1, T]`` in the model's chat template."""
    messages = [{"role": "user", "content": prompt}]
    encoded = AutoTokenizer.from_pretrained(store).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )
    return encoded if isinstance(encoded, torch.Tensor) else encoded["input_ids"]


@torch.no_grad()
def decode(
    model: mhaffn.StreamedLlama, ids: torch.Tensor, options: Mapping[str, Any], tokens: int = TOKENS
) -> tuple[list[int], int]:
    """``tokens`` new ones at most, greedily, and the passes over the weights that they took."""
    before = model.runner.trace.number
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options)
    return output[0, ids.shape[1] :].tolist(), model.runner.trace.number - before


def rendered() -> str:
    """docs/speculation.md with the table between its marks made of the results."""
    values = json.loads(RESULTS.read_text(encoding="utf-8"))
    page, begin, end = DOCUMENT.read_text(encoding="utf-8"), "<!-- passes -->\n", "<!-- /passes -->\n"
    head, _, rest = page.partition(begin)
    return head + begin + "\n" + table(values["rows"]) + "\n" + end + rest.partition(end)[2]


def table(rows: list[dict[str, Any]]) -> str:
    at = {(row["dtype"], row["prompt"], row["way"]): row for row in rows}
    lines = [
        "| prompt | tokens | " + " | ".join(WAYS.values()) + " |",
        "|---" * (2 + len(WAYS)) + "|",
    ]
    for name, prompt in PROMPTS.items():
        found = [at["float32", name, way] for way in WAYS]
        lines.append(f"| {prompt} | {found[0]['tokens']} | " + " | ".join(str(row["passes"]) for row in found) + " |")
    for dtype in DTYPES:
        helped = [row for row in rows if row["dtype"] == dtype and row["way"] != "plain"]
        same = sum(row["same"] for row in helped)
        lines += ["", f"Runs in {dtype} with exactly the tokens of plain greedy decoding: {same} of {len(helped)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
