"""Live modules given another ``forward``, and given their own back.

A swap changes the class of one module object, as ``fully_shard`` and ``parametrize`` of PyTorch do: to a class derived
from a mixin of ours and the class it had. Parameters, buffers, hooks, names in ``state_dict`` and whoever holds the
module stay as they are; other modules of the same class do not notice; ``super().forward`` is the original code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as calls


class Swapped(nn.Module):
    """Base of the mixins. ``upstream`` is the class the module had, and has again after :meth:`give_back`."""

    upstream: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Swapped]]

    def check_inference(self, x: Tensor) -> None:
        """Raises ``RuntimeError`` where gradients would be needed."""
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise RuntimeError(
                f"this {self.upstream.__name__} runs on mhaffn, which is for inference and has no backward, and "
                "gradients are enabled. Call the model under torch.no_grad() or torch.inference_mode(), or undo the "
                "replacement with mhaffn.restore(model)."
            )

    def give_back(self) -> None:
        """Gives the module its own class back."""
        for name in (*self.__dict__["_swapped_attributes"], "_swapped_attributes"):
            self.__dict__.pop(name, None)
        self.__class__ = self.upstream  # type: ignore[assignment]

    def _get_name(self) -> str:
        return f"mhaffn.{self.upstream.__name__}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (self.mixin, self.upstream), self.__dict__


_classes: dict[tuple[type, type], type[Swapped]] = {}


def _swapped_class(mixin: type[Swapped], upstream: type[nn.Module]) -> type[Swapped]:
    """Named as upstream: accelerate and others find classes by name."""
    if (mixin, upstream) not in _classes:
        body = {"__module__": upstream.__module__, "__qualname__": upstream.__qualname__, "__doc__": upstream.__doc__}
        made = type(upstream.__name__, (mixin, upstream), {**body, "upstream": upstream, "mixin": mixin})
        _classes[mixin, upstream] = made
    return _classes[mixin, upstream]


def _new(mixin: type[Swapped], upstream: type[nn.Module]) -> Swapped:
    return nn.Module.__new__(_swapped_class(mixin, upstream))


def swap(module: nn.Module, mixin: type[Swapped], **attributes: object) -> None:
    """Gives ``module`` the forward of ``mixin``, and plain attributes that go again when it gets its own back."""
    module.__class__ = _swapped_class(mixin, type(module))
    module.__dict__["_swapped_attributes"] = tuple(attributes)
    module.__dict__.update(attributes)


@dataclass(frozen=True)
class Found:
    """A module that is, or looks like, one of the kinds replaced.

    ``upstream`` is the class of the other code base it is of, None if of none; ``why`` says why it is left alone.
    """

    name: str
    module: Any
    mixin: type[Swapped]
    upstream: type[nn.Module] | None
    why: str | None


def own_forward(module: nn.Module, upstream: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs the forward that ``upstream`` was defined with: not overridden, not patched."""
    if "forward" in module.__dict__ or type(module).forward is not upstream.forward:
        return False
    forward = upstream.__dict__.get("forward")
    return (
        getattr(forward, "__module__", None) == upstream.__module__
        and getattr(forward, "__qualname__", None) == f"{upstream.__qualname__}.forward"
    )


def untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the forward of its class and nothing else: no hook of its own, no patch."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def no_global_hooks() -> bool:
    """Whether there are none that all modules call."""
    return not (calls._global_forward_hooks or calls._global_forward_pre_hooks)


def plain_weight(linear: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> bool:
    """Whether ``linear`` is no more than a product with its weight: no adapter, hook, quantised or sharded weight."""
    if type(linear) not in kinds or not untouched(linear) or not no_global_hooks():
        return False
    return type(linear._parameters.get("weight")) in (nn.Parameter, Tensor)


class PassMemo:
    """What every layer of one pass would make anew from a tensor they share: made by the first layer, for all.

    Threads may share one: the worst is that something is made twice.
    """

    def __init__(self) -> None:
        self._last: tuple[Callable[[], Any], tuple[int, ...], Any] = (lambda: None, (), None)

    def of(self, key: Tensor, make: Callable[..., Any], *numbers: int, leads: bool) -> Any:
        """``make(key, *numbers)``, or what the layer that ``leads`` got from them if ``key`` was this same tensor.

        That layer always makes it anew: between passes, or under a captured graph, the tensor may have been refilled.
        """
        if torch.compiler.is_compiling():  # a compiler shares equal expressions by itself
            return make(key, *numbers)
        last, seen, value = self._last
        if leads or last() is not key or seen != numbers:
            value = make(key, *numbers)
            self._last = (weakref.ref(key), numbers, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return PassMemo, ()
