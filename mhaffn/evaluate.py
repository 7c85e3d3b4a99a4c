"""What a model makes of a text: its perplexity, and its divergence from a reference model.

The text's tokens are cut into windows of ``context`` tokens that do not overlap, and each window is read afresh: all
its tokens but the first are predicted. Perplexity is ``exp`` of the mean of ``-log p(token)``; the divergence is the
mean over the same places of ``KL(reference ‖ model) = Σ p_ref (log p_ref - log p)``, in nats a token.

Both models take the same window in turn, and logits are made for some places at a time, so memory does not grow with
the text: beside the two models there are hidden states of one window and a few buffers of :data:`CHUNK_LOGITS`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from mhaffn.budget import free_dram, free_gpu, resolve_budget
from mhaffn.config import ModelConfig
from mhaffn.device import choose_device, memory_errors
from mhaffn.errors import ConfigError
from mhaffn.files import read_text
from mhaffn.hf import StreamedLlama, load
from mhaffn.session import Options, open_tokenizer
from mhaffn.store import Store, resolve

CONTEXT = 2048
CHUNK_LOGITS = 1 << 23
"""Logits made at once, in float32: 32 MiB."""


@dataclass(frozen=True)
class Evaluation:
    """What was found over ``tokens`` predictions of ``tokens_total`` (fewer after Ctrl-C); ``kl`` in nats a token."""

    model: str
    reference: str | None
    text: str
    context: int
    tokens: int
    tokens_total: int
    perplexity: float
    reference_perplexity: float | None
    kl: float | None
    seconds: float

    @property
    def finished(self) -> bool:
        return self.tokens == self.tokens_total

    def summary(self) -> str:
        """The figures in a few lines."""
        of = "" if self.finished else f" of {self.tokens_total}"
        lines = [
            f"perplexity {self.perplexity:.4f} over {self.tokens}{of} tokens, windows of {self.context}, "
            f"in {self.seconds:.1f} s"
        ]
        if self.reference_perplexity is not None and self.kl is not None:
            lines += [
                f"reference  {self.reference_perplexity:.4f} ({self.reference})",
                f"mean KL    {self.kl:.3e} nats a token from the reference",
            ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``finished``, ready for JSON."""
        return {**asdict(self), "finished": self.finished}


@dataclass
class _Sums:
    """Added up over tokens, in nats."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | Path | None = None,
    context: int | None = None,
    options: Options | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Perplexity of ``model`` on the text file ``text`` and, with a ``reference``, how far it is from that model.

    ``context`` is the tokens of a window: 2048, or what the models know, if less. ``options`` holds for each of the
    models; budgets of "auto" are shared by both. ``progress`` gets tokens done and in all, ``say`` where the weights of
    each model are. Ctrl-C returns what was found until then, once a window is done; earlier it goes on as
    KeyboardInterrupt.

    Raises :class:`ConfigError` for a text that cannot be read or is shorter than two tokens, models whose tokens
    differ, and logits that are not numbers; else what :func:`mhaffn.load` raises.
    """
    started_s = time.perf_counter()
    folders = [resolve(model), *([resolve(reference)] if reference is not None else [])]
    configs = [Store.open(folder).config for folder in folders]
    ids = _ids(folders, configs, Path(text))
    limit = min(config.max_position_embeddings for config in configs)
    context = min(CONTEXT, limit) if context is None else context
    if not 2 <= context <= limit:
        raise ConfigError(f"got a context of {context}, expected 2 to {limit}, the positions the model knows")
    windows = [window for window in ids.split(context) if len(window) > 1]
    total = sum(len(window) - 1 for window in windows)
    sums = _Sums()
    options = replace(_shared(options or Options(), len(folders)), context=context, tokens=min(context, len(ids)))
    try:
        with ExitStack() as stack, torch.inference_mode():
            models = []
            for folder in folders:
                models.append(stack.enter_context(load(folder, **asdict(options))))
                say(f"{folder.name}: {models[-1].runner.plan.describe()}")
            for window in windows:
                progress(sums.tokens, total)
                _add(sums, models, window)
            progress(sums.tokens, total)
    except KeyboardInterrupt:
        if not sums.tokens:
            raise
    return Evaluation(
        model=str(model), reference=None if reference is None else str(reference), text=str(text), context=context,
        tokens=sums.tokens, tokens_total=total, perplexity=_exp(sums.loss / sums.tokens),
        reference_perplexity=_exp(sums.reference_loss / sums.tokens) if reference is not None else None,
        kl=sums.kl / sums.tokens if reference is not None else None, seconds=time.perf_counter() - started_s,
    )  # fmt: skip


def _add(sums: _Sums, models: list[StreamedLlama], window: torch.Tensor) -> None:
    """Counts one window ``[T]``, all of it or none."""
    targets = window[1:]
    hidden = [model.hidden(window.unsqueeze(0).to(model.device), use_cache=False)[0][0, :-1] for model in models]
    loss = reference_loss = kl = 0.0
    for places in _chunks(len(targets), models[0].runner.config.vocab_size):
        with memory_errors():
            logs = [_logs(model, states[places]) for model, states in zip(models, hidden, strict=True)]
            wanted = targets[places].to(logs[0].device).unsqueeze(-1)
            loss -= logs[0].gather(-1, wanted).double().sum().item()
            if len(logs) > 1:
                reference_loss -= logs[1].gather(-1, wanted).double().sum().item()
                kl += kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(-1).double().sum().item()
    for value, model in ((loss, models[0]), (reference_loss + kl, models[-1])):
        if not math.isfinite(value):
            raise ConfigError(
                f"{model.runner.store.path}: got logits that are not finite in {model.runner.store.dtype}, expected "
                f"numbers. Pack the model with --dtype bfloat16 or float32."
            )
    sums.tokens, sums.loss = sums.tokens + len(targets), sums.loss + loss
    sums.reference_loss, sums.kl = sums.reference_loss + reference_loss, sums.kl + kl


def _chunks(places: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, CHUNK_LOGITS // vocabulary)
    for start in range(0, places, rows):
        yield slice(start, start + rows)


def _logs(model: StreamedLlama, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, float32 ``[T, vocabulary]``, of hidden states ``[T, D]``."""
    return log_softmax(model.runner.head(states).float(), dim=-1)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # of 1e304 nothing more is to be known


def _ids(folders: list[Path], configs: list[ModelConfig], text: Path) -> torch.Tensor:
    """The text's token ids, int64 ``[T]``, the same to all models."""
    vocabularies = [config.vocab_size for config in configs]
    if len(set(vocabularies)) > 1:
        raise ConfigError(
            f"got a vocabulary of {vocabularies[0]} in {folders[0]} and of {vocabularies[1]} in {folders[1]}, "
            f"expected the same. Give the model that the first was made of as the reference."
        )
    content = read_text(text, ConfigError)
    found = [open_tokenizer(folder)(content, verbose=False)["input_ids"] for folder in folders]
    if any(ids != found[0] for ids in found):
        raise ConfigError(
            f"{folders[0]} and {folders[1]} make different tokens of {text}, expected the same. "
            f"Give the model that the first was made of as the reference."
        )
    ids = torch.tensor(found[0], dtype=torch.int64)
    if len(ids) < 2:
        raise ConfigError(f"{text}: got a text of {len(ids)} tokens, expected 2 or more. Give a longer one.")
    if int(ids.max()) >= vocabularies[0]:
        raise ConfigError(
            f"{folders[0]}: got token {int(ids.max())} from its tokenizer, expected fewer than {vocabularies[0]}, the "
            f"model's vocabulary. Fetch the model's own tokenizer."
        )
    return ids


def _shared(options: Options, models: int) -> Options:
    """``options`` with what is free now divided where the budget is "auto" and there are two models to share it."""
    if models == 1:
        return options
    device = choose_device(options.device)
    dram = resolve_budget("auto", free_dram) if options.dram == "auto" else None
    gpu = resolve_budget("auto", partial(free_gpu, device)) if options.gpu == "auto" and device.type == "cuda" else None
    return replace(
        options,
        dram=options.dram if dram is None else dram // models,
        gpu=options.gpu if gpu is None else gpu // models,
    )
