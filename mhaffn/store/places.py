"""Where the files of a packed store lie: in its folder, or in folders on other devices with links from there."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mhaffn.config import DTYPES, KINDS, ModelConfig
from mhaffn.errors import ConfigError, StoreError
from mhaffn.store.source import tensors_by_file

ALIGN = 4096
ITEM_BYTES = dict(zip(DTYPES, (2, 2, 4), strict=True))


@dataclass(frozen=True)
class PackedFile:
    """One file of a store: its key in the manifest, the shapes of its tensors, and the folder it lies in.

    ``nbytes`` are those of its tensors.
    """

    name: str
    key: str
    shapes: dict[str, tuple[int, ...]]
    nbytes: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.name}.partial"

    @property
    def most_bytes(self) -> int:
        """Bytes of the whole file, its header counted as one page."""
        return self.nbytes + ALIGN


@dataclass(frozen=True)
class Placement:
    """The folders asked for, by what goes there: "mha", "ffn", or "stripe" for sublayers of both kinds.

    All paths are absolute and hold no links. What is placed nowhere lies in ``target``, the store's folder.
    """

    target: Path
    places: dict[str, tuple[Path, ...]]

    @staticmethod
    def of(
        target: Path, mha_dir: str | Path | None, ffn_dir: str | Path | None, stripe: Sequence[str | Path]
    ) -> Placement:
        """Raises :class:`ConfigError` where the folders contradict each other."""
        given = {
            "mha": [] if mha_dir is None else [mha_dir],
            "ffn": [] if ffn_dir is None else [ffn_dir],
            "stripe": stripe,
        }
        places = {kind: tuple(Path(folder).resolve() for folder in folders) for kind, folders in given.items()}
        if places["stripe"] and (places["mha"] or places["ffn"]):
            raise ConfigError(
                "got --stripe beside --mha-dir or --ffn-dir, expected one or the other. Stripe sublayers of both kinds "
                "over all devices, or give each kind a device of its own."
            )
        if len(places["stripe"]) == 1 or len(set(places["stripe"])) < len(places["stripe"]):
            raise ConfigError(
                f"got --stripe {', '.join(map(str, places['stripe']))}, expected two folders or more, all different. "
                f"Give each device's folder once."
            )
        return Placement(target.resolve(), {kind: folders for kind, folders in places.items() if folders})

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that files go to, the store's own first."""
        return tuple(dict.fromkeys((self.target, *(f for folders in self.places.values() for f in folders))))

    def check(self, source: Path) -> None:
        """Raises :class:`StoreError` for a folder that must not get weights."""
        for folder in self.folders[1:]:
            if folder == source:
                raise StoreError(f"{folder} is the source. Give another folder for the packed files.")
            if self.target in folder.parents:
                raise StoreError(f"{folder} lies inside the store {self.target}. Give a folder outside of it.")
            if folder.exists() and not folder.is_dir():
                raise StoreError(f"{folder} is a file, expected a folder. Give another one.")

    def files(self, config: ModelConfig, dtype: str) -> list[PackedFile]:
        """The files of a store in pass order, the resident part last and always in ``target``.

        A stripe gives each sublayer to the folder that has got the fewest bytes so far, so after any number
        of sublayers of a pass no folder is ahead of another by more than one sublayer.
        """
        got = dict.fromkeys(self.places.get("stripe", ()), 0)
        files = []
        for name, key, shapes in tensors_by_file(config):
            nbytes = sum(math.prod(shape) for shape in shapes.values()) * ITEM_BYTES[dtype]
            kind = key.rpartition(".")[2]
            if kind not in KINDS:
                folder = self.target
            elif got:
                folder = min(got, key=lambda place: got[place])
                got[folder] += nbytes
            else:
                (folder,) = self.places.get(kind, (self.target,))
            files.append(PackedFile(name, key, shapes, nbytes, folder))
        return files

    def to_json(self) -> dict[str, list[str]]:
        return {kind: [os.fspath(folder) for folder in folders] for kind, folders in self.places.items()}
