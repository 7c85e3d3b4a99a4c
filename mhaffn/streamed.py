"""What live models of other code have in common when their layers run on a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Never, Self

import torch
from torch import Tensor, nn

from mhaffn.errors import ConfigError
from mhaffn.runner import Runner
from mhaffn.swap import Swapped, untouched


class Streamed(Swapped):
    """A module that computes with weights of a stream instead of its own, which have no memory."""

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise ConfigError("a streamed model cannot be copied or pickled; make another and give it the same store")


class StreamedLayer(Streamed):
    """A decoder layer; its own ``parts``, the modules within it, are not called."""

    parts: list[nn.Module]

    def check_parts(self) -> None:
        """Raises :class:`ConfigError` for hooks on parts, which would not run."""
        part = changed(self.parts)
        if part is not None:
            raise ConfigError(
                f"got a hook on, or a forward of its own in, a {type(part).__name__} inside a streamed layer, "
                "whose parts are not called: put it on the layer"
            )


class Owner(Streamed):
    """The module around the layers. ``undo`` takes the stream away again; so does the end of the module itself."""

    runner: Runner
    undo: Callable[[], None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to()``, ``half()``, ``cuda()`` and the like call for every parameter."""
        require_stay(self.runner, fn)
        return self

    def give_back(self) -> None:
        undo = self.undo
        for layer in self.layers:  # type: ignore[union-attr]
            if isinstance(layer, Swapped):
                layer.give_back()
        super().give_back()
        undo()


def fill(undo: ExitStack, module: nn.Module, name: str, tensor: Tensor) -> None:
    """Makes ``tensor`` the parameter ``name`` of ``module``, until ``undo`` is closed."""
    undo.callback(module._parameters.__setitem__, name, module._parameters[name])
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def parts_of(layer: nn.Module) -> list[nn.Module]:
    """The modules within ``layer``."""
    return [module for module in layer.modules() if module is not layer]


def changed(parts: list[nn.Module]) -> nn.Module | None:
    """The first of ``parts`` with a hook or a forward of its own; None if there is none."""
    return next((part for part in parts if not untouched(part) and not _only_recorded(part)), None)


def _only_recorded(part: nn.Module) -> bool:
    """Whether what ``part`` gives is only looked at: transformers records attentions so, asked for or not."""
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return "forward" not in part.__dict__ and all(
        str(getattr(hook, "__module__", "")).startswith("transformers.utils.") for hook in hooks
    )


def require_stay(runner: Runner, change: Callable[[Tensor], Tensor]) -> None:
    """Raises :class:`ConfigError` if ``change`` takes tensors to another dtype or device than the stream's."""
    own = torch.empty(0, dtype=runner.dtype, device=runner.device)
    changed = change(own)
    if (changed.dtype, changed.device) != (own.dtype, own.device):
        raise ConfigError(
            f"got a move to {changed.dtype} on {changed.device} of a streamed model, whose weights arrive in "
            f"{own.dtype} on {own.device}; load it with device= for another, or `mhaffn pack` it with --dtype"
        )


def require_meta(model: nn.Module) -> None:
    """Raises :class:`ConfigError` unless every parameter is on the meta device."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            raise ConfigError(
                f"got a model with {name} on {parameter.device}, expected one without weights: make it under "
                '`with torch.device("meta"):`, and then move it .to("meta"), as some code makes parameters elsewhere. '
                "A model that holds its weights needs no store."
            )


def require_same(model: Mapping[str, object], store: Mapping[str, object], path: object) -> None:
    """Raises :class:`ConfigError` where the two say different things."""
    differing = [f"{name} of {model[name]}, not {value}" for name, value in store.items() if model[name] != value]
    if differing:
        raise ConfigError(f"got a model with {'; '.join(differing)}, as {path} has; make the model from its config")
