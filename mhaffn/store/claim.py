"""Holding the folders of a pack: nothing of others is overwritten, and no two packs write to one folder.

Every folder that gets files holds ``mhaffn-pack.json`` while the pack is unfinished: what is packed, as what,
and to where. Only a pack of the same may go on there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mhaffn.config import format_bytes
from mhaffn.errors import StoreError
from mhaffn.files import parse_json, shown
from mhaffn.store import manifest
from mhaffn.store.places import PackedFile, Placement
from mhaffn.store.source import Source

HEADROOM_BYTES = 64 << 20


def refuse_occupied(source: Path, target: Path) -> None:
    """Raises :class:`StoreError` where ``target`` cannot become, or go on becoming, a store; looks at names only."""
    if target.exists() and source.resolve() == target.resolve():
        raise StoreError(f"{target}: source and target are the same folder. Give another target.")
    if not target.exists():
        return
    if not target.is_dir():
        raise StoreError(f"{target} is a file, expected a folder. Give another target.")
    names = {path.name for path in target.iterdir()}
    if not names or manifest.UNFINISHED_NAME in names:
        return
    if manifest.NAME in names:
        raise StoreError(
            f"{target} is not empty: it holds a finished store. Check it with `mhaffn verify "
            f"{shlex.quote(os.fspath(target))}`. To pack once more, give a new folder, or remove this one."
        )
    raise StoreError(
        f"{target} is not empty and no unfinished pack of this model: it holds "
        f"{', '.join(map(shown, sorted(names)[:3]))}. Give a new folder, or remove this one."
    )


@contextmanager
def held(placement: Placement, files: list[PackedFile]) -> Iterator[dict[Path, BinaryIO]]:
    """Holds all folders, made where they are missing: no other pack can take them. Their state files, by folder.

    Those that are not claimed then are given back. Raises :class:`StoreError` where another pack has one of them, or it
    has no room.
    """
    with ExitStack() as locks, ExitStack() as undo:
        for folder in placement.folders:
            if not folder.exists():
                undo.callback(_remove_empty, folder)
            folder.mkdir(parents=True, exist_ok=True)
        _check_space(files)
        states = {}
        for folder in placement.folders:
            states[folder] = locks.enter_context(_locked(folder))
            undo.callback(_give_back, folder, states[folder])
        yield states
        undo.pop_all()


def _give_back(folder: Path, state: BinaryIO) -> None:
    """Removes the state file of ``folder`` if nothing was claimed there."""
    found = os.fstat(state.fileno())
    if found.st_size == 0 and found.st_nlink:  # else another pack may have made one of the same name by now
        (folder / manifest.UNFINISHED_NAME).unlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def claim(
    states: Mapping[Path, BinaryIO],
    source: Source,
    dtype: str,
    made: Mapping[str, object],
    placement: Placement,
    files: list[PackedFile],
) -> None:
    """Takes the folders of ``states`` for this source, dtype and placement: new, or left by an unfinished earlier try.

    ``made`` says how weights in few bits are made: what must be the same for an earlier try to go on.

    Raises :class:`StoreError` where one of them is another pack's, or holds files in the way.
    """
    claimed: dict[str, Any] = {
        "version": manifest.VERSION, "dtype": dtype, "source": os.path.abspath(source.path),  # noqa: PTH100 – kept links
        "files": source.fingerprint(), **made,
    }  # fmt: skip
    if placement.places:
        claimed |= {"store": os.fspath(placement.target), "places": placement.to_json()}
    content = json.dumps(claimed, indent=1).encode()
    found = {folder: state.read() for folder, state in states.items()}
    # Empty, or torn by a kill: then no file was written yet.
    new = [folder for folder in states if len(found[folder]) < len(content) and content.startswith(found[folder])]
    try:
        for folder in states:
            if folder not in new:
                _check_same(folder, found[folder], claimed, placement)
            elif folder != placement.target:
                _refuse_strangers(folder, placement.target, files)
    except BaseException:
        for folder in new:
            (folder / manifest.UNFINISHED_NAME).unlink()
        raise
    for folder in new:
        states[folder].seek(0)
        states[folder].write(content)
        states[folder].flush()
        os.fsync(states[folder].fileno())
        sync_folder(folder)


def release(placement: Placement) -> None:
    """Marks the pack as finished. The store's own folder comes last: until then the same command goes on."""
    for folder in reversed(placement.folders):
        (folder / manifest.UNFINISHED_NAME).unlink()
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(files: list[PackedFile]) -> None:
    """Room on each device for what it does not hold yet."""
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, dict[Path, None]] = defaultdict(dict)
    for file in files:
        device = device_of(file.folder)
        held = max((path.stat().st_size for path in (file.path, file.partial) if path.exists()), default=0)
        needed[device] += file.most_bytes - held
        folders[device][file.folder] = None
    for device, places in folders.items():
        expected, free = needed[device] + HEADROOM_BYTES, shutil.disk_usage(next(iter(places))).free
        if expected > free:
            raise StoreError(
                f"{', '.join(map(str, places))}: got {format_bytes(free)} free, expected {format_bytes(expected)}. "
                f"Free some, or go elsewhere."
            )


def device_of(folder: Path) -> int:
    return folder.stat().st_dev


@contextmanager
def _locked(folder: Path) -> Iterator[BinaryIO]:
    """The state file of ``folder``, created where it is missing; the kernel frees the lock when the process ends."""
    descriptor = os.open(folder / manifest.UNFINISHED_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "r+b") as file:  # noqa: PTH123 – never truncates
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(descriptor).st_nlink > 0  # else it was removed between opening and locking
        except BlockingIOError:
            ours = False
        if not ours:
            raise StoreError(f"{folder} is being written by another pack. Wait for it, or give another folder.")
        yield file


def _check_same(folder: Path, content: bytes, claimed: dict[str, Any], placement: Placement) -> None:
    """``content``, what an earlier try left in ``folder``, must be of this pack; its source may have moved."""
    try:
        found = parse_json(content)
    except ValueError:
        found = None
    found = found if isinstance(found, dict) else {}
    differing = {key for key in found.keys() | claimed.keys() if found.get(key) != claimed.get(key)} - {"source"}
    if not differing:
        return
    if folder != placement.target:
        raise StoreError(
            f"{folder} holds files of another unfinished pack, into {shown(found.get('store', 'no known folder'))}. "
            f"Finish that one, or remove its files here and {manifest.UNFINISHED_NAME}, or give another folder."
        )
    if differing <= {"places", "store"}:
        raise StoreError(
            f"{folder} holds an unfinished pack {_described(found)}, got one {_described(claimed)}. Go on with the "
            f"same folders, or remove those files and {folder} to begin again."
        )
    if differing <= {"device", "search", "importance"} and "device" in found and "device" in claimed:
        raise StoreError(f"{folder} holds an unfinished pack whose scales {_other_scales(found, claimed)}")
    raise StoreError(
        f"{folder} holds an unfinished pack of another model, another dtype or other formats, or files that changed "
        f"since. Remove it, or finish that one."
    )


def _other_scales(found: dict[str, Any], claimed: dict[str, Any]) -> str:
    """What makes scales that are searched now others than those before: the first reason, since each may bring more."""
    if found.get("search") != claimed["search"]:
        begun = shown(found["search"]) if "search" in found else "an earlier one"
        return (
            f"were found by search {begun}, and would go on by {shown(claimed['search'])}, which may give other bits. "
            f"Go on with the version that it began with, or remove it."
        )
    if found["device"] != claimed["device"]:
        return (
            f"were searched on {shown(found['device'])}, and would go on on {shown(claimed['device'])}, which gives "
            f"other bits. Go on as it began, or remove it."
        )
    return (
        f"were chosen {_calibrated(found)}, and would go on {_calibrated(claimed)}. Go on with the same --calibrate, "
        f"on as many cores, or remove it."
    )


def _calibrated(claimed: dict[str, Any]) -> str:
    told = claimed.get("importance")
    return "by weights alone" if told is None else f"by which columns matter ({shown(told)})"


def _described(claimed: dict[str, Any]) -> str:
    options = manifest.place_options(claimed.get("places"))
    if not options:
        return "with all files in its own folder"
    text = " ".join(map(str, options))
    return f"into {shown(claimed.get('store'))} with {text if text.isprintable() else shown(text)}"


def _refuse_strangers(folder: Path, target: Path, files: list[PackedFile]) -> None:
    """``folder`` is claimed for the first time, or this pack had all but finished: then its links are there."""
    for file in files:
        if file.folder != folder:
            continue
        linked = links_to(target / file.name, file.path)
        if linked and not file.path.exists():
            raise StoreError(
                f"{file.path} is gone, which an earlier try wrote. Mount its disk again; if it is lost, remove the "
                f"link {target / file.name} too, and it is written again."
            )
        there = next((path for path in (file.path, file.partial) if os.path.lexists(path)), None)
        if there is not None and not linked:
            raise StoreError(f"{there} is in the way: another pack wrote it. Give another folder, or remove it.")


def links_to(link: Path, path: Path) -> bool:
    """Whether ``link`` is a symbolic link to just ``path``."""
    return link.is_symlink() and Path(os.readlink(link)) == path  # noqa: PTH115 – as it was written
