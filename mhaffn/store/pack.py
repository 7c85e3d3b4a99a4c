"""Writing a packed store: one safetensors file a sublayer, tensors aligned, each with its checksum.

::

    DST/config.json, tokenizer files, generation_config.json
        layer-000-mha.safetensors, layer-000-ffn.safetensors, …    (data at a multiple of 4 KiB)
        resident.safetensors                                       embedding, final norm, head
        model.safetensors.index.json                               what other tools open; in few bits mhaffn.index.json
        mhaffn.json                                                version and checksums, written last

Sublayers may lie in folders on other devices; then DST holds links to them.

Every file is written as ``NAME.partial``, synced and renamed, so a file without that suffix is whole.
A pack that was killed goes on where it stopped, and ends byte for byte as if it had not been.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mhaffn.config import DTYPES, FEW_BITS
from mhaffn.errors import ConfigError, CorruptFileError, MhaffnError, StoreError
from mhaffn.files import shown
from mhaffn.formats import Formats
from mhaffn.store import manifest
from mhaffn.store.claim import claim, held, links_to, refuse_occupied, release, sync_folder
from mhaffn.store.format import FEW_BITS_INDEX_NAME, INDEX_NAME, Store
from mhaffn.store.maker import Maker
from mhaffn.store.places import ALIGN, PackedFile, Placement
from mhaffn.store.safetensors import CODES, read_header, write_header
from mhaffn.store.source import Source, open_source

if TYPE_CHECKING:
    import torch

CHECKSUM_KEY = "xxh3_64"


@dataclass(frozen=True)
class PackProgress:
    """How far a pack is, in bytes of the finished store."""

    file: str
    done_bytes: int
    total_bytes: int


def pack(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    formats: Formats | None = None,
    importance: Callable[[Source], Mapping[str, torch.Tensor]] | None = None,
    device: str | None = None,
    mha_dir: str | Path | None = None,
    ffn_dir: str | Path | None = None,
    stripe: Sequence[str | Path] = (),
    progress: Callable[[PackProgress], None] = lambda _: None,
    remark: Callable[[str], None] = lambda _: None,
) -> Store:
    """Packs the model at ``source`` (a Hugging Face folder or a GGUF file) into the folder ``target``.

    ``dtype`` is bfloat16, float16 or float32; by default the source's own (bfloat16 for GGUF). ``formats`` says which
    sublayers are written in few bits (or plain, where the source has few); the others stay as they are in the source.
    ``importance`` gives for the opened source, by a matrix's name, the mean squares ``[D]`` of what it multiplies: then
    the scales make the error of its output least. ``device`` is what searches scales, by default a GPU if there is one.

    The files of MHA sublayers go to ``mha_dir``, those of FFN sublayers to ``ffn_dir``, or both kinds in turn to the
    folders of ``stripe``, so that in pass order each gets the same share of bytes; ``target`` then holds links
    to them. ``remark`` gets a sentence where weights that are kept change in value all the same. Memory used: about
    three times the largest tensor in float32. Returns the opened store.

    Raises :class:`ConfigError` for an unknown dtype, formats that do not fit the model or folders that contradict
    each other, :class:`StoreError` when a folder cannot be written, lacks room or holds something else, and what
    reading the source raises.
    """
    source, target = Path(source), Path(target)
    try:
        placement = Placement.of(target, mha_dir, ffn_dir, stripe)
        refuse_occupied(source, target)
        placement.check(source.resolve())
        origin = open_source(source)
        dtype = origin.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise ConfigError(f"got dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
        maker = Maker(origin, dtype, formats or Formats(), device)
        if importance is not None and not maker.quantises:
            raise ConfigError(
                "got what columns matter (--calibrate), but no format to quantise to: give one too, as --ffn int4 does"
            )
        files = placement.files(maker.contents())
        for sentence in maker.remarks():
            remark(sentence)
        with held(placement, files) as states:
            if importance is not None:
                maker = maker.told(importance)
            claim(states, origin, dtype, maker.made(), placement, files)
            _write(maker, placement.target, files, progress)
            release(placement)
    except OSError as error:
        if isinstance(error, MhaffnError):
            raise
        raise StoreError(
            f"{error.filename or target} cannot be read or written: {error.strerror or error}. "
            f"Give a folder that can be written; what is packed is kept, and the same command goes on from there."
        ) from error
    return Store.open(target)


def _write(maker: Maker, target: Path, files: list[PackedFile], progress: Callable[[PackProgress], None]) -> None:
    source = maker.source
    begun = source.fingerprint()
    for name, content in source.side_files():
        _replace(target / name, content)
    total = sum(file.most_bytes for file in files)
    checksums: dict[str, str] = {}
    done = 0
    for file in files:
        progress(PackProgress(file.name, done, total))
        checksums[file.key] = _finished_checksum(file.path) or _write_file(maker, file, done, total, progress)
        if file.folder != target:
            _link(target / file.name, file.path)
        done += file.most_bytes
    if source.fingerprint() != begun:
        raise StoreError(f"{source.path} changed while it was packed. Remove {target} and pack again.")
    config = {key: value for key, value in source.config_values().items() if key != "torch_dtype"}
    config["dtype"] = maker.dtype
    few_bits = any(len(parts) > 1 for file in files for parts in file.weights.values())
    if few_bits:
        config["quantization_config"] = FEW_BITS
    _replace(target / "config.json", _json({key: config[key] for key in sorted(config)}))
    weight_map = {tensor: file.name for file in files for tensor in file.tensors}
    total_size = sum(file.nbytes for file in files)
    index = target / (FEW_BITS_INDEX_NAME if few_bits else INDEX_NAME)
    _replace(index, _json({"metadata": {"total_size": total_size}, "weight_map": weight_map}))
    record = manifest.Manifest(dtype=maker.dtype, source=source.path.name, checksums=checksums)
    _replace(target / manifest.NAME, record.to_json().encode())
    sync_folder(target)
    progress(PackProgress("done", total, total))


def _json(values: dict[str, Any]) -> bytes:
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # half a surrogate pair, which JSON can have and UTF-8 cannot


def _finished_checksum(path: Path) -> str | None:
    """The checksum of a file an earlier try finished; None if there is none."""
    if not path.exists():
        return None
    checksum = read_header(path).metadata.get(CHECKSUM_KEY)
    if checksum is None:
        raise CorruptFileError(
            f"{path}: got no checksum in its header: another tool wrote it. Remove it and pack again."
        )
    return checksum


def _write_file(maker: Maker, file: PackedFile, done: int, total: int, progress: Callable[[PackProgress], None]) -> str:
    """Writes one file, weight by weight; the checksum stands in the header, which is written last."""
    entries = {name: (CODES[part.dtype], part.shape, part.nbytes) for name, part in file.tensors.items()}
    digest = xxhash.xxh3_64()

    def header() -> bytes:
        return write_header(entries, {"format": "pt", CHECKSUM_KEY: digest.hexdigest()}, ALIGN)

    with file.partial.open("wb") as output:
        output.seek(len(header()))
        for name, parts in file.weights.items():
            for payload in maker.payloads(file.key, name, parts):
                digest.update(payload)
                output.write(payload)
                done += len(payload)
            progress(PackProgress(file.name, done, total))
        output.seek(0)
        output.write(header())
        output.flush()
        os.fsync(output.fileno())
    file.partial.rename(file.path)
    sync_folder(file.folder)
    return digest.hexdigest()


def _link(link: Path, path: Path) -> None:
    """Makes ``link`` a symbolic link to ``path``, at once and durably."""
    if links_to(link, path):
        return
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(path)
    partial.rename(link)
    sync_folder(link.parent)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
