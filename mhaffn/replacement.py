"""``mhaffn.replace(model)``: a live model of existing code, its layers on mhaffn's fused operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from mhaffn.errors import UnsupportedModelError
from mhaffn.swap import Found, Swapped


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace` did: ``replaced``, names of modules and their classes; ``left``, names and the reasons."""

    replaced: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} modules: {_counts(self.replaced)}"]
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left {names[0]}{more}: {reason}")
        return "\n".join(lines)


def replace(model: nn.Module) -> Replacement:
    """Lets attention, MLPs and RMSNorms of ``model`` run on :mod:`mhaffn.ops`; :func:`restore` undoes it.

    ``model`` is a Llama, Mistral, Qwen2 or Qwen3 of transformers, or Meta's ``llama_models.llama3.model.Transformer``,
    or holds one. Module objects, parameters, hooks and names stay: only the class of each module changes, to one
    derived from it. In transformers it also sets ``attn_implementation="mhaffn"``, which models that share a config
    object share. What it does not cover is left alone and listed: sliding windows, dropout, quantised weights and the
    like. For inference: a forward that would need gradients raises ``RuntimeError``.

    At first use it compares logits on a tiny random model of the same family. Raises :class:`UnsupportedModelError`
    if they differ, or if there is nothing in ``model`` that it knows; nothing is replaced then.
    """
    base = _code_base(model)
    found = base.survey(model)
    if not any(f.upstream for f in found):
        raise UnsupportedModelError(_unknown(model))
    base.check(found)
    base.replace(found)
    replaced = {f.name: f.upstream.__name__ for f in found if f.upstream is not None and f.why is None}
    return Replacement(replaced, {f.name: f.why for f in found if f.why is not None})


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


def _code_base(model: nn.Module) -> CodeBase:
    origins = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    if "llama_models" in origins:
        from mhaffn import meta

        return meta
    if "transformers" in origins:
        from mhaffn import huggingface

        return huggingface
    raise UnsupportedModelError(_unknown(model))


def _unknown(model: nn.Module) -> str:
    return (
        f"got a {type(model).__name__}, which holds nothing that mhaffn.replace knows, expected a Llama, Mistral, "
        "Qwen2 or Qwen3 of transformers, or a Transformer of Meta's llama_models"
    )


def _counts(names: Mapping[str, str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names.values()).items()) or "none"
