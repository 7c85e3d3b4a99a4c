"""mhaffn eval: perplexity and divergence against transformers and PyTorch, on random models."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import mhaffn.evaluate as module
from mhaffn.cli import main
from mhaffn.errors import ConfigError, MhaffnError, StoreError
from mhaffn.evaluate import evaluate
from mhaffn.hf import StreamedLlama
from mhaffn.session import Options
from tests.conftest import Model
from tests.processes import running

WORDS = 200
OPTIONS = Options(device="cpu", dram=0)


def with_tokenizer(model: Path, folder: Path, words: list[str] | None = None) -> Path:
    """A copy of a model, in the folder ``folder``, with a tokenizer that knows ``words``."""
    shutil.copytree(model, folder)
    names = words or [f"w{i}" for i in range(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(["[UNK]", *names])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def write_text(path: Path, tokens: int) -> torch.Tensor:
    """A text of random words; gives its token ids."""
    ids = torch.randint(1, WORDS + 1, (tokens,), generator=torch.Generator().manual_seed(5))
    path.write_text(" ".join(f"w{int(i) - 1}" for i in ids), encoding="utf-8")
    return ids


@pytest.fixture
def pair(tiny_model: Model, tmp_path: Path) -> tuple[Path, Path]:
    return (
        with_tokenizer(tiny_model(seed=1), tmp_path / "model"),
        with_tokenizer(tiny_model(seed=2), tmp_path / "reference"),
    )


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "context"), [(150, 64), (128, 64), (129, 64), (50, 64), (2, 64), (300, None)])
def test_perplexity_is_that_of_transformers(
    tokens: int,
    context: int | None,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    ids = write_text(tmp_path / "text", tokens)
    theirs = AutoModelForCausalLM.from_pretrained(pair[0])
    windows = [window.unsqueeze(0) for window in ids.split(context or 256) if len(window) > 1]  # it knows 256 places
    losses = [(theirs(window, labels=window).loss.double().item(), window.shape[1] - 1) for window in windows]
    count = sum(n for _, n in losses)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 211 * 7)  # several chunks a window, the last one shorter
    found = evaluate(pair[0], tmp_path / "text", context=context, options=Options(device=device, dram=0))
    assert (found.tokens, found.context, found.finished) == (count, context or 256, True)
    assert found.perplexity == pytest.approx(
        math.exp(sum(loss * n for loss, n in losses) / count), rel=1e-5 if device == "cpu" else 1e-4
    )
    assert found.kl is None and found.reference_perplexity is None


@torch.no_grad()
def test_divergence_is_that_of_full_logits(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ids = write_text(tmp_path / "text", 150)
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in pair]
    summed, count = 0.0, 0
    for window in ids.split(64):
        ours, reference = (log_softmax(m(window.unsqueeze(0)).logits[0, :-1].double(), -1) for m in loaded)
        summed += kl_div(ours, reference, log_target=True, reduction="sum").item()
        count += len(window) - 1
    found = evaluate(*[pair[0], tmp_path / "text"], reference=pair[1], context=64, options=OPTIONS)
    assert found.kl == pytest.approx(summed / count, rel=1e-5)
    assert found.kl > 0.1
    alone = evaluate(pair[1], tmp_path / "text", context=64, options=OPTIONS)
    assert found.reference_perplexity == pytest.approx(alone.perplexity, rel=1e-9)
    other_way = evaluate(pair[1], tmp_path / "text", reference=pair[0], context=64, options=OPTIONS)
    assert other_way.kl != pytest.approx(found.kl, rel=1e-3)


def test_a_model_is_no_distance_from_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_text(tmp_path / "text", 100)
    done: list[tuple[int, int]] = []
    found = evaluate(
        pair[0], tmp_path / "text", reference=pair[0], context=32, options=Options(device="cpu"),
        progress=lambda *counts: done.append(counts),
    )  # fmt: skip
    assert found.kl == 0.0 and found.perplexity == found.reference_perplexity
    assert done == [(0, 96), (31, 96), (62, 96), (93, 96), (96, 96)]


def refused(kind: type[MhaffnError], words: str, *arguments: Path, **options: object) -> None:
    with pytest.raises(kind, match=words):
        evaluate(*arguments, options=OPTIONS, **options)  # type: ignore[arg-type]


def test_texts_and_models_that_do_not_do(pair: tuple[Path, Path], tiny_model: Model, tmp_path: Path) -> None:
    text, model = tmp_path / "text", pair[0]
    refused(ConfigError, "text cannot be read: No such file", model, text)
    refused(ConfigError, "cannot be read: Is a directory", model, tmp_path)
    text.write_bytes(b"w1 \xff")
    refused(ConfigError, "not UTF-8 at 3", model, text)
    for tokens in ("", "w1"):
        text.write_text(tokens)
        refused(ConfigError, f"got a text of {len(tokens) // 2} tokens, expected 2", model, text)
    write_text(text, 50)
    refused(ConfigError, "got a context of 257, expected 2 to 256", model, text, context=257)
    refused(ConfigError, "got a context of 1, ", model, text, context=1)
    refused(StoreError, "no tokenizer", tiny_model(seed=1), text)
    wider = with_tokenizer(tiny_model(vocab_size=219), tmp_path / "wider")
    refused(ConfigError, "vocabulary of 211 in .* and of 219", model, text, reference=wider)
    names = [f"w{i}" for i in range(WORDS)]
    shifted = with_tokenizer(tiny_model(seed=1), tmp_path / "shifted", names[::-1])
    refused(ConfigError, "make different tokens of", model, text, reference=shifted)
    text.write_text("w299 w298")
    larger = with_tokenizer(tiny_model(seed=1), tmp_path / "larger", [f"w{i}" for i in range(300)])
    refused(ConfigError, "got token 300 from its tokenizer, expected fewer than 211", larger, text)


def test_logits_that_are_no_numbers(tiny_model: Model, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = with_tokenizer(tiny_model(seed=1), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_text(tmp_path / "text", 20)
    refused(ConfigError, "logits that are not finite", folder, tmp_path / "text")


def test_the_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_text(tmp_path / "text", 100)
    words = ("eval", pair[0], "--text", tmp_path / "text", "--reference", pair[1], "--context", 50, "--device", "cpu")
    with running(*words, "--json", "-") as process:
        assert process.wait() == 0, process.told
        values = json.loads(process.printed)
        assert values["finished"] and values["tokens"] == 98
        assert f"perplexity {values['perplexity']:.4f}" in process.told and "nats a token" in process.told
    with running("eval", pair[0], "--text", tmp_path / "none") as process:
        assert process.wait() == 2 and "cannot be read" in process.told and "Traceback" not in process.told


def test_ctrl_c_ends_with_what_was_measured(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "text", 300)
    calls = most = 0
    hidden = StreamedLlama.hidden

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > most:
            raise KeyboardInterrupt
        return hidden(*arguments, **options)

    monkeypatch.setattr(StreamedLlama, "hidden", interrupted)
    arguments = ["--text", str(tmp_path / "text"), "--context", "64", "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", ["mhaffn", "eval", str(pair[0]), *arguments, str(tmp_path / "out.json")])
    for windows, tokens in ((2, 126), (0, 0)):
        calls, most = 0, windows
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 130
        out, errors = capsys.readouterr()
        assert "Traceback" not in errors
        assert "model: 6 sublayers" in " ".join(errors.split()), "where its weights are"
        assert ("interrupted" in errors) is bool(tokens)
        assert (f"over {tokens} of 295 tokens" in out) is bool(tokens)
    values = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (values["finished"], values["tokens"]) == (False, 126)
