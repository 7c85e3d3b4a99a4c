"""Measures what a machine's plans depend on: the SSD through the reader, the link to the GPU, compute by sublayer."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mhaffn import roofs
from mhaffn.budget import free_dram, free_gpu
from mhaffn.config import KINDS, Kind, ModelConfig, format_bytes
from mhaffn.errors import ReadError
from mhaffn.files import trial_file
from mhaffn.image import Weights
from mhaffn.inputs import FilledCache, context_of, hidden_states
from mhaffn.machine import describe
from mhaffn.modules import FFN, MHA
from mhaffn.profile import Compute, Profile, Widths
from mhaffn.reader import Extent, PinnedArena, Reader

FILE_BYTES = 1 << 30
FILE_BYTES_LEAST = 64 << 20
PIECE_BYTES = 16 << 20
PIECES = 4
ROUNDS = 5
ROUND_S = 0.6
COPY_BYTES = 256 << 20
REPEATS = 7
CACHES_BYTES = 256 << 20
"""Weights measured in turn take at least this much, so that no cache holds them: streamed ones are cold too."""

Say = Callable[[str], None]


def measure(folder: Path, config: ModelConfig, tokens: Sequence[int], say: Say) -> Profile:
    """Measures the SSD under ``folder``, the link, and sublayers of ``config``'s widths on 1 and so many ``tokens``.

    The files of a model in ``folder`` are read themselves; elsewhere a temporary file is written first, and
    removed whatever happens. ``say`` is told each step before it is taken.

    Raises :class:`ReadError` where the disk cannot be measured.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    gpu_bytes, dram_bytes = free_gpu(device) if cuda else None, free_dram()
    ssd, direct = _ssd_speed(folder, say)
    if cuda:
        say(f"copying {format_bytes(COPY_BYTES)} from pinned memory to the GPU")
    else:
        say("left out: copies to a GPU; torch finds none, and the CPU computes from host memory")
    h2d = _h2d_speed(device) if cuda else None
    compute = []
    for kind, count in itertools.product(KINDS, sorted({1, *tokens})):
        say(f"computing {kind.upper()} on {count} token{'s' if count > 1 else ''} on the {device.type.upper()}")
        seconds = _compute_s(kind, config, count, max(tokens), device)
        compute.append(Compute(kind, Widths.of(config), count, seconds))
    for few, many in itertools.combinations(compute, 2):
        if few.kind == many.kind and few.seconds > many.seconds:
            say(
                f"{few.kind.upper()} took longer on {few.tokens} than on {many.tokens} tokens, so other programs ran "
                f"beside this one: measure again when the machine is quiet"
            )
    return Profile(ssd, h2d, gpu_bytes, dram_bytes, direct, tuple(compute), describe())


def _ssd_speed(folder: Path, say: Say) -> tuple[float, bool]:
    """Bytes a second, the median of some rounds after a first one, and whether they came past the page cache."""
    with _files(folder, say) as files, PinnedArena(PIECES * (PIECE_BYTES + (1 << 20)), cuda=False) as arena:
        pieces = itertools.cycle(
            Extent(str(file), start, min(PIECE_BYTES, file.stat().st_size - start))
            for file in files
            for start in range(0, file.stat().st_size, PIECE_BYTES)
        )
        with Reader(arena=arena) as reader, arena.lease(arena.nbytes) as slot:
            places = itertools.cycle(range(0, arena.nbytes - PIECE_BYTES - (1 << 20) + 1, PIECE_BYTES + (1 << 20)))
            flight = [reader.submit([next(pieces)], slot, next(places)) for _ in range(PIECES - 1)]
            speeds = []
            for _ in range(1 + ROUNDS):
                started_s, nbytes = time.perf_counter(), 0
                while time.perf_counter() - started_s < ROUND_S:
                    flight.append(reader.submit([next(pieces)], slot, next(places)))
                    done = flight.pop(0)
                    done.wait()
                    nbytes += done.nbytes
                speeds.append(nbytes / (time.perf_counter() - started_s))
            for request in flight:
                request.wait()
            info = reader.info()
    if info.direct != "on":
        say("the disk was not read past the page cache (O_DIRECT does not work there): its speed is that of memory")
    return statistics.median(speeds[1:]), info.direct == "on"


@contextmanager
def _files(folder: Path, say: Say) -> Iterator[list[Path]]:
    if not folder.is_dir():
        raise ReadError(f"{folder} is no folder; give the one that models lie in", path=str(folder))
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.stat().st_size >= PIECE_BYTES]
    total = sum(path.stat().st_size for path in found)
    if total >= min(FILE_BYTES, 4 * FILE_BYTES_LEAST):
        say(f"reading {len(found)} files of {folder}, {format_bytes(total)}")
        yield found
        return
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    size = min(FILE_BYTES, free // 2) // PIECE_BYTES * PIECE_BYTES
    if size < FILE_BYTES_LEAST:
        raise ReadError(
            f"{folder}: {format_bytes(free)} are free there, expected at least {format_bytes(2 * FILE_BYTES_LEAST)} "
            f"for a trial file; free some, or give a folder that holds a model",
            path=str(folder),
        )

    def announced(path: Path) -> None:
        say(f"writing {format_bytes(size)} to {path}, to be read and removed again")

    with trial_file(folder, ".mhaffn-measure-", size, announced) as file:
        say("reading it")
        yield [file]


def _h2d_speed(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device, the median of some copies."""
    with roofs.host_to_device(device, COPY_BYTES) as sampler:
        return statistics.median(roofs.measure(sampler, 0, least=REPEATS))


def _compute_s(kind: Kind, config: ModelConfig, tokens: int, context: int, device: torch.device) -> float:
    """Median seconds of one sublayer in bfloat16; one token looks at ``context`` positions."""
    nbytes = 2 * Widths.of(config).weights(kind)
    shapes = config.sublayer_shapes(kind)
    sets = [  # made before anything is timed
        Weights(**{name: torch.rand(shape, device=device, dtype=torch.bfloat16) / 64 for name, shape in shapes.items()})
        for _ in range(max(1, min(16, CACHES_BYTES // nbytes)))
    ]
    turns = itertools.cycle(sets)

    @contextmanager
    def weights() -> Iterator[Weights]:
        yield next(turns)

    with torch.inference_mode():
        x = hidden_states(config, tokens, device)
        if kind == "ffn":
            ffn = FFN(config, weights)
            return _median_s(lambda: ffn(x), device)
        mha = MHA(config, 0, weights)
        seen = context_of(config, tokens, FilledCache(config, 1, context if tokens == 1 else tokens, device))
        return _median_s(lambda: mha(x, seen), device)


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work`` queued behind itself, so that launches hide as they do in a pass."""
    return statistics.median(roofs.measure(lambda: roofs.seconds_queued(device, work), 0, least=REPEATS))
