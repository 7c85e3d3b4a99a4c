"""What mhaffn finds on this machine, and how to mend what is amiss."""

from __future__ import annotations

import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console, RenderableType
from rich.table import Table

from mhaffn.budget import free_dram
from mhaffn.config import ModelConfig, format_bytes
from mhaffn.errors import MhaffnError
from mhaffn.machine import version_of

if TYPE_CHECKING:
    from mhaffn.profile import Profile

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")
OPTIONAL_PACKAGES = {"gguf": "pip install 'mhaffn[gguf]', to pack GGUF files"}
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEMLOCK_BYTES = 64 << 20
LLAMA_1B = ModelConfig("LlamaForCausalLM", 16, 2048, 8192, 32, 8, 64, 128256, 1e-5, 131072, True)


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``fix`` says what to do, empty where nothing need be done."""

    status: Literal["ok", "warn", "fail"]
    name: str
    detail: str
    fix: str = ""


def examine(folder: Path) -> list[Finding]:
    """Everything that decides how fast mhaffn runs here; reads are tried in ``folder``."""
    return [*_versions(), *_reader(folder), *_memory(), *_gpu()]


def _versions() -> Iterator[Finding]:
    yield Finding("ok", "system", f"Linux {platform.release()}, Python {sys.version.split()[0]}, {platform.machine()}")
    yield Finding("ok", "versions", ", ".join(f"{name} {version_of(name)}" for name in PACKAGES))
    for name, fix in OPTIONAL_PACKAGES.items():
        if not version_of(name):
            yield Finding("warn", name, "not installed", fix)


def _reader(folder: Path) -> Iterator[Finding]:
    try:
        from mhaffn.reader import Extent, PinnedArena, Reader
    except ImportError as error:
        yield Finding(
            "fail", "reader", f"the extension is not built ({error})", "pip install -e . in the source folder"
        )
        return
    if not folder.is_dir():
        yield Finding("fail", "read", f"{folder} is no folder", "give the folder that models lie in")
        return
    try:
        with (
            tempfile.NamedTemporaryFile(dir=folder, prefix=".mhaffn-doctor-") as file,
            PinnedArena(4 << 20, cuda=False) as arena,
            Reader(arena=arena) as reader,
        ):
            file.write(bytes(1 << 20))
            file.flush()
            with arena.lease(1 << 20) as slot:
                reader.submit([Extent(file.name, 0, 1 << 20)], slot).wait(10)
            info = reader.info()
    except (OSError, MhaffnError) as error:
        yield Finding("warn", "read", f"no trial read in {folder}: {error}", "give a folder that can be written")
        return
    linkage = f"liburing {info.liburing}"
    if info.engine == "io_uring":
        yield Finding("ok", "engine", f"io_uring ({linkage})")
    else:
        fix = "apt-get install liburing-dev, then install mhaffn again" if info.liburing == "none" else (
            "a container's seccomp profile or kernel.io_uring_disabled may block io_uring; reads go on with preadv"
        )  # fmt: skip
        yield Finding("warn", "engine", f"preadv threads ({linkage})", fix)
    if info.direct == "on":
        yield Finding("ok", "O_DIRECT", f"works in {folder.resolve()}")
    else:
        yield Finding("warn", "O_DIRECT", f"does not work in {folder.resolve()}", "keep models on ext4 or xfs on NVMe")
    for reason in info.reasons:
        yield Finding("warn", "fallback", reason)


def _memory() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= MEMLOCK_BYTES or os.geteuid() == 0:
        limit = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
        yield Finding("ok", "memlock", f"{limit}{' (no limit for root)' if os.geteuid() == 0 else ''}")
    else:
        yield Finding(
            "warn", "memlock", f"{format_bytes(soft)}: buffers cannot be registered with io_uring unless you are root",
            "ulimit -l unlimited, or a line `* - memlock unlimited` in /etc/security/limits.conf",
        )  # fmt: skip
    mode = _selected(THP)
    if mode in ("always", "madvise"):
        yield Finding("ok", "huge pages", f"transparent huge pages: {mode}")
    else:
        yield Finding("warn", "huge pages", f"transparent huge pages: {mode}", f"echo madvise > {THP}")
    yield Finding("ok", "host memory", f"{format_bytes(free_dram())} to use (free now, less headroom)")


def _selected(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").partition("[")[2].partition("]")[0] or "unknown"
    except OSError:
        return "unknown"


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = "torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU"
        yield Finding(
            "warn",
            "GPU",
            f"{built}: models run on the CPU",
            "fine for trying out; with a GPU: pip install torch from PyPI, whose Linux build has CUDA",
        )
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    capability = f"sm_{properties.major}{properties.minor}"
    yield Finding("ok", "GPU", f"{properties.name}, {capability}, {format_bytes(free)} of {format_bytes(total)} free")
    if not (version_of("cupy-cuda13x") or version_of("cupy-cuda12x")):
        yield Finding(
            "warn", "cupy", "not installed: CUDA C++ kernels are off, Triton's are used", "pip install 'mhaffn[cuda]'"
        )


def disk_table(folder: Path) -> Table:
    """Measures the disk under ``folder`` for about ten seconds: GiB/s by engine, block and depth."""
    from mhaffn.reader import measure_disk

    rows = measure_disk(folder)
    best = max(rows, key=lambda row: row.gib_per_s)
    table = Table(title=f"reads in {folder}", title_justify="left")
    for column in ("engine", "block", "depth", "GiB/s", ""):
        table.add_column(column, justify="right")
    for row in rows:
        mark = "best" if row is best else ""
        table.add_row(row.engine, format_bytes(row.block_bytes), str(row.depth), f"{row.gib_per_s:.2f}", mark)
    return table


def measure_machine(
    folder: Path, model: str | None, tokens: Sequence[int] | None, target: Path | None, console: Console
) -> RenderableType:
    """Measures the machine, keeps the profile in ``target`` or where plans look for it, and shows it.

    Compute has the widths of ``model``, else of the model in ``folder``, else usual ones. Each step is told
    to ``console`` before it is taken.
    """
    import torch

    from mhaffn.probe import measure
    from mhaffn.profile import Profile
    from mhaffn.shapes import SHAPES, shape_of

    cuda = torch.cuda.is_available()
    if model is not None:
        config = shape_of(model)
    elif (folder / "config.json").exists():
        config = ModelConfig.from_folder(folder)
    else:
        config = SHAPES["llama3-8b"] if cuda else LLAMA_1B
    target = target or Profile.default_path()
    started_s = time.perf_counter()
    found = measure(
        folder, config, tokens or [2048 if cuda else 128],
        say=lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
    )  # fmt: skip
    found.write(target)
    console.print(
        f"measured in {time.perf_counter() - started_s:.0f} s; kept in {target}, where `mhaffn plan` finds it"
        if target == Profile.default_path()
        else f"kept in {target}: mhaffn plan MODEL --profile {target}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return _profile_table(found)


def _profile_table(profile: Profile) -> Table:
    table = Table(title=profile.describe(), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "tokens", "ms", "GB/s", "TFLOP/s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    table.add_row("SSD → host" if profile.direct else "page cache → host", "", "", f"{profile.ssd / 1e9:.2f}", "")
    if profile.h2d is not None:
        table.add_row("host → device", "", "", f"{profile.h2d / 1e9:.2f}", "")
    for point in profile.compute:
        nbytes, operations = 2 * point.widths.weights(point.kind), point.widths.operations(point.kind, point.tokens)
        table.add_row(
            f"{point.kind.upper()} D {point.widths.hidden_size} F {point.widths.intermediate_size}", str(point.tokens),
            f"{point.seconds * 1e3:.2f}", f"{nbytes / point.seconds / 1e9:.1f}",
            f"{operations / point.seconds / 1e12:.2f}",
        )  # fmt: skip
    return table
