"""``mhaffn.replace(model)``: a live model of existing code, its layers on mhaffn's fused operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, Unpack

from torch import nn

from mhaffn.errors import ConfigError, UnsupportedModelError
from mhaffn.opening import Options, open_runner
from mhaffn.runner import Runner
from mhaffn.store import Store, resolve
from mhaffn.swap import Found, Swapped


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace` did: ``replaced``, names of modules and their classes; ``left``, names and the reasons.

    ``runner`` streams the weights, with its plan, trace and store; None where the model has its own.
    """

    replaced: Mapping[str, str]
    left: Mapping[str, str]
    runner: Runner | None = None

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} modules: {_counts(self.replaced)}"]
        if self.runner is not None:
            lines.append(f"streamed from {self.runner.store.path}: {self.runner.plan.describe()}")
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left {names[0]}{more}: {reason}")
        return "\n".join(lines)


def replace(model: nn.Module, *, store: str | Path | None = None, **options: Unpack[Options]) -> Replacement:
    """Lets attention, MLPs and RMSNorms of ``model`` run on :mod:`mhaffn.ops`; :func:`restore` undoes it.

    ``model`` is a Llama, Mistral, Qwen2 or Qwen3 of transformers, or Meta's ``llama_models.llama3.model.Transformer``,
    or holds one. Module objects, parameters, hooks and names stay: only the class of each module changes, to one
    derived from it. In transformers it also sets ``attn_implementation="mhaffn"``, which models that share a config
    object share. What it does not cover is left alone and listed: sliding windows, dropout, quantised weights and the
    like. For inference: a forward that would need gradients raises ``RuntimeError``.

    At first use it compares logits on a tiny random model of the same family. Raises :class:`UnsupportedModelError`
    if they differ, or if there is nothing in ``model`` that it knows; nothing is replaced then.

    With ``store``, a folder or hub id as :func:`mhaffn.load` takes them, ``model`` is one without weights, made under
    ``with torch.device("meta")`` from the same config: a Llama or Mistral of transformers, or Meta's. Its layers then
    compute with weights streamed from there, by the ``options`` of :func:`mhaffn.load`, in the store's dtype;
    embedding, norm and head are loaded. Meta's model itself says the context and the batch. :func:`restore` ends the
    stream and frees its memory, and so does the end of the model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"got a {type(model).__name__}, expected a model; mhaffn.load(path) makes one from a folder")
    if store is not None:
        return _stream(model, Store.open(resolve(store)), options)
    if options:
        raise ConfigError(f"got {', '.join(options)} without store, which is what they are about; give store too")
    base = _code_base(model)
    found = base.survey(model)
    if not any(f.upstream for f in found):
        raise UnsupportedModelError(_unknown(model))
    base.check(found)
    base.replace(found)
    replaced = {f.name: f.upstream.__name__ for f in found if f.upstream is not None and f.why is None}
    return Replacement(replaced, {f.name: f.why for f in found if f.why is not None})


def _stream(model: nn.Module, store: Store, options: Options) -> Replacement:
    stream = partial(open_runner, store, **options)
    runner, replaced = _streamed(model).stream(model, store, stream)
    return Replacement(replaced, {}, runner)


def restore(model: nn.Module) -> None:
    """Undoes :func:`replace`; does nothing to a model that was not replaced."""
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            module.give_back()


class CodeBase(Protocol):
    """What :mod:`mhaffn.huggingface` and :mod:`mhaffn.meta` have in common."""

    def survey(self, model: nn.Module) -> list[Found]:
        """The modules that could be replaced, and those that only look like it."""

    def check(self, found: list[Found]) -> None:
        """Tries the replacement on a tiny model; raises :class:`UnsupportedModelError` if logits differ."""

    def replace(self, found: list[Found]) -> None:
        """Swaps those with no reason against it."""


class StreamedCodeBase(Protocol):
    """What :mod:`mhaffn.streamed_huggingface` and :mod:`mhaffn.streamed_meta` have in common."""

    def stream(
        self, model: nn.Module, store: Store, open_runner: Callable[..., Runner]
    ) -> tuple[Runner, dict[str, str]]:
        """Lets ``model`` compute with the weights of ``store``; the runner, and what was replaced."""


def _code_base(model: nn.Module) -> CodeBase:
    if _origin(model) == "llama_models":
        from mhaffn import meta

        return meta
    from mhaffn import huggingface

    return huggingface


def _streamed(model: nn.Module) -> StreamedCodeBase:
    if _origin(model) == "llama_models":
        from mhaffn import streamed_meta

        return streamed_meta
    from mhaffn import streamed_huggingface

    return streamed_huggingface


def _origin(model: nn.Module) -> str:
    """The package whose model it is; raises :class:`UnsupportedModelError` for one that is not known."""
    origins = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    for known in ("llama_models", "transformers"):
        if known in origins:
            return known
    raise UnsupportedModelError(_unknown(model))


def _unknown(model: nn.Module) -> str:
    return (
        f"got a {type(model).__name__}, which holds nothing that mhaffn.replace knows, expected a Llama, Mistral, "
        "Qwen2 or Qwen3 of transformers, or a Transformer of Meta's llama_models"
    )


def _counts(names: Mapping[str, str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names.values()).items()) or "none"
