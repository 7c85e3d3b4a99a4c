"""Where the files of a packed store lie: in its folder, or in folders on other devices with links from there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mhaffn.config import KINDS
from mhaffn.errors import ConfigError, StoreError
from mhaffn.formats import Part
from mhaffn.store.format import SUFFIXES

ALIGN = 4096


@dataclass(frozen=True)
class PackedFile:
    """One file of a store: its key in the manifest, its weights' parts by their names, and the folder it lies in."""

    name: str
    key: str
    weights: dict[str, dict[str, Part]]
    folder: Path

    @property
    def tensors(self) -> dict[str, Part]:
        """What the file holds, by name, in file order."""
        return {name + SUFFIXES[part]: found for name, parts in self.weights.items() for part, found in parts.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.tensors.values())

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

    def files(self, contents: Iterable[tuple[str, str, dict[str, dict[str, Part]]]]) -> list[PackedFile]:
        """The files of a store, in pass order as ``contents`` gives name, key and weights; each with its folder.

        The resident part always lies in ``target``.

        A stripe gives each sublayer to the folder that has got the fewest bytes so far, so after any number
        of sublayers of a pass no folder is ahead of another by more than one sublayer.
        """
        got = dict.fromkeys(self.places.get("stripe", ()), 0)
        files = []
        for name, key, weights in contents:
            file = PackedFile(name, key, weights, self.target)
            kind = key.rpartition(".")[2]
            if kind in KINDS and got:
                folder = min(got, key=lambda place: got[place])
                got[folder] += file.nbytes
                file = replace(file, folder=folder)
            elif kind in KINDS:
                file = replace(file, folder=self.places.get(kind, (self.target,))[0])
            files.append(file)
        return files

    def to_json(self) -> dict[str, list[str]]:
        return {kind: [os.fspath(folder) for folder in folders] for kind, folders in self.places.items()}
