"""What a quantised checkpoint stores for one matrix, and what every such layout is held to.

A layout says from headers alone what a matrix will be (:class:`~mhaffn.formats.Format`), then makes it of the stored
tensors. Values keep their width; groups that :class:`~mhaffn.quantized.Quantized` does not know are cut into shorter
ones with the same scale, which changes no value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mhaffn.errors import CorruptFileError, StoreError, UnsupportedModelError
from mhaffn.files import shown
from mhaffn.formats import GROUPS
from mhaffn.store.safetensors import TensorInfo, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from mhaffn.formats import Format
    from mhaffn.quantized import Quantized

_FETCH_AGAIN = "Fetch the model again."


@dataclass(frozen=True)
class Linear:
    """One linear layer of a checkpoint: its name, the shape ``(N, D)`` of its weight, its tensors by suffix."""

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def path(self) -> str:
        return next(iter(self.tensors.values())).path

    def corrupt(self, what: str) -> CorruptFileError:
        return CorruptFileError(f"{self.path}: {self.name}: {what}. {_FETCH_AGAIN}")

    def unsupported(self, what: str, advice: str = "Pack the original model instead.") -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {self.name}: {what}. {advice}")

    def header(self, suffix: str, dtypes: Collection[str]) -> TensorInfo:
        """The header of a part that must be there, in one of ``dtypes``."""
        found = self.tensors.get(suffix)
        if found is None:
            raise self.corrupt(f"got no {suffix}, expected one beside {', '.join(sorted(self.tensors))}")
        if found.dtype not in dtypes:
            raise self.corrupt(f"got {suffix} in {found.dtype}, expected {' or '.join(dtypes)}")
        return found

    def expect(self, suffix: str, dtypes: Collection[str], *shapes: tuple[int, ...]) -> TensorInfo:
        """The header of a part that must have one of ``shapes``."""
        found = self.header(suffix, dtypes)
        if found.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.corrupt(
                f"got {suffix} of shape {shown(list(found.shape))}, expected {expected}: "
                f"the weight is {list(self.shape)}"
            )
        return found

    def refuse_others(self, known: tuple[str, ...]) -> None:
        """Raises for a part that would change what the layer computes; a bias may be there if it is all zeros."""
        for suffix in sorted(self.tensors.keys() - set(known)):
            if suffix != "bias":
                raise self.unsupported(f"got a tensor {shown(suffix)}, expected {', '.join(known)}")
            if bool(self.read("bias").count_nonzero()):
                raise self.unsupported("got a bias that is not all zeros, expected none")

    def read(self, suffix: str) -> Tensor:
        return read_tensor(self.tensors[suffix])

    def finite(self, suffix: str) -> Tensor:
        """A part's values; raises where one is NaN or infinite."""
        values = self.read(suffix)
        require_finite(values, f"{self.path}: {self.name}.{suffix}")
        return values


class Layout(Protocol):
    """How a family of checkpoints stores its matrices."""

    def format(self, linear: Linear) -> Format:
        """What :meth:`weight` will give; raises what the headers show to be wrong."""

    def weight(self, linear: Linear) -> Quantized:
        """The matrix as stored; raises :class:`CorruptFileError` or :class:`UnsupportedModelError`."""

    def floats(self, linear: Linear) -> Tensor:
        """The matrix dequantised to float32, also where :meth:`weight` has no way to keep it."""


def require_finite(values: Tensor, where: str) -> None:
    """Raises :class:`CorruptFileError` where a value is NaN or infinite."""
    import torch

    wide = values.to(torch.float32)  # float8 has no isfinite
    if not bool(wide.isfinite().all()):
        bad = wide[~wide.isfinite()][0].item()
        raise CorruptFileError(f"{where}: got {bad}, expected finite numbers. {_FETCH_AGAIN}")


def require_middle(linear: Linear, zeros: Tensor, middle: int, says: str) -> None:
    """Raises where a zero point is not ``middle``, though the config says that all are."""
    if bool((zeros != middle).any()):
        got = int(zeros[zeros != middle][0])
        raise linear.corrupt(f"got a zero point of {got}, expected {middle} everywhere, as {says} says")


def group_kept(linear: Linear, bits: int, group: int) -> int | None:
    """The group to keep a stored group of ``group`` columns in: itself, or the longest known one that divides it.

    None, the whole row, where that is the group and 8 bits can have it.
    """
    if bits == 8 and group == linear.shape[1]:
        return None
    fits = [known for known in GROUPS if group % known == 0]
    if not fits:
        raise linear.unsupported(f"got groups of {group} columns, expected a multiple of {GROUPS[0]}")
    return max(fits)


def by_group(values: Tensor, groups: int) -> Tensor:
    """``[N, G]`` stretched to ``[N, groups]``, each value for as many groups as its own is cut into."""
    return values.repeat_interleave(groups // values.shape[1], dim=1).contiguous()


def nibbles(words: Tensor) -> Tensor:
    """int32 ``[R, C]`` to its 4-bit numbers, uint8 ``[R, 8 C]``, lowest bits first."""
    import torch

    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def pairs(codes: Tensor) -> Tensor:
    """Numbers below 16, uint8 ``[N, D]``, two to a byte: uint8 ``[N, D / 2]``, the even column in the low half."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()


def setting(config: Mapping[str, Any], name: str, default: Any, *expected: Any) -> Any:
    """``config[name]``, which must be one of ``expected``; of what is not, the error says so."""
    return allowed(name, config.get(name, default), *expected)


def allowed(name: str, value: Any, *expected: Any) -> Any:
    """``value``, found in the config as ``name``, which must be one of ``expected``."""
    if not any(type(value) is type(known) and value == known for known in expected):
        raise refused(name, value, " or ".join(map(repr, expected)))
    return value


def refused(name: str, value: Any, expected: str) -> UnsupportedModelError:
    """The error for a quantization_config that asks for something else than what is read here."""
    return UnsupportedModelError(
        f"quantization_config: got {name} = {shown(value)}, expected {expected}. Pack the original model instead."
    )


def named(config: Mapping[str, Any], default: Any, *names: str) -> Any:
    """What the config has under any of ``names``, in lower case; ``default`` where it has none, or null."""
    found = {name: value for name in names if (value := config.get(name)) is not None}
    found = {name: value.lower() if isinstance(value, str) else value for name, value in found.items()}
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise refused(" and ".join(found), values, "one: they differ")
    return values[0] if values else default


def variants(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """``config``, and what ``dynamic``, of GPTQModel, makes of it for some layers.

    Which layers those are is not asked: tensors tell what lies there, and each must fit one of these. Patterns that
    begin with ``-:`` name layers left in floats.
    """
    overrides = config.get("dynamic") or {}
    if not isinstance(overrides, Mapping) or not all(isinstance(value, Mapping) for value in overrides.values()):
        raise refused("dynamic", overrides, "an object of objects")
    return [config, *({**config, **found} for name, found in overrides.items() if not name.startswith("-:"))]


def group_sizes(configs: Iterable[Mapping[str, Any]], *names: str) -> set[int]:
    """Columns of a group by each of ``configs``, -1 for a whole row; 128 where one does not say, as in transformers."""
    return {group_size(names[0], named(config, 128, *names)) for config in configs}


def group_size(name: str, value: Any) -> int:
    """``value``, found in the config as ``name``: columns of a group, or -1, a whole row."""
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise refused(name, value, "a number of columns, or -1")
    return value


def check_groups(linear: Linear, groups: int, sizes: Collection[int]) -> None:
    """Raises where ``groups`` of scales in a row are not what a group size of ``sizes``, -1 a whole row, makes."""
    columns = linear.shape[1]
    lengths = {columns if size == -1 else min(size, columns) for size in sizes}
    divide = {length for length in lengths if columns % length == 0}
    says = f"group_size = {' or '.join(map(shown, sorted(sizes)))}"
    if not divide:
        raise linear.unsupported(f"got {says} for rows of {columns} columns, expected one that divides them")
    if groups not in {columns // length for length in divide}:
        expected = " or ".join(str(columns // length) for length in sorted(divide, reverse=True))
        raise linear.corrupt(f"got scales of {groups} groups, expected {expected}: rows of {columns} columns, {says}")


def too_large(where: str, dtype: str) -> StoreError:
    """The error for a scale that its dtype cannot hold."""
    return StoreError(f"{where}: got a scale that overflows {dtype}, expected a smaller one. {_FETCH_AGAIN}")
