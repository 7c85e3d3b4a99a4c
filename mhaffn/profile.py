"""A machine as measured: what its links move and how long sublayers compute, kept as a file.

``mhaffn doctor --measure`` writes it, ``mhaffn plan`` reads it. All speeds are bytes a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhaffn.config import KINDS, Kind, ModelConfig
from mhaffn.errors import ConfigError
from mhaffn.files import default_cache, read_json_object
from mhaffn.forecast import PHASES, Machine
from mhaffn.simulate import Links
from mhaffn.sizes import Workload
from mhaffn.trace import Phase

FORMAT = 1
AGAIN = "Measure again with `mhaffn doctor --measure`."


@dataclass(frozen=True)
class Widths:
    """What a sublayer's compute depends on: D, F, HQ, H and K of the dimension alphabet."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @staticmethod
    def of(config: ModelConfig) -> Widths:
        return Widths(
            config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim
        )

    def weights(self, kind: Kind) -> int:
        """Elements of a sublayer's matrices."""
        if kind == "ffn":
            return 3 * self.hidden_size * self.intermediate_size
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    def read_bytes(self, kind: Kind, positions: int) -> float:
        """Bytes in bfloat16 of the matrices, and of the keys and values of ``positions``, which an MHA looks at."""
        cache = 2 * positions * self.num_kv_heads * self.head_dim if kind == "mha" else 0
        return 2.0 * (self.weights(kind) + cache)

    def operations(self, kind: Kind, tokens: int) -> float:
        """Floating-point operations on ``tokens`` positions: the matrices, and the attention of a causal prompt."""
        attention = 2 * tokens**2 * self.num_heads * self.head_dim if kind == "mha" else 0
        return 2.0 * self.weights(kind) * tokens + attention


@dataclass(frozen=True)
class Compute:
    """Median seconds that one sublayer took on ``tokens`` positions, its weights in device memory (bfloat16).

    An MHA of one position looks at as many as the longest prompt measured has.
    """

    kind: Kind
    widths: Widths
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What was measured on a machine.

    ``h2d`` and ``gpu_bytes`` are None where there is no GPU: the CPU computes from host memory. ``gpu_bytes``
    and ``dram_bytes`` were free, less headroom. ``direct`` says whether the SSD was read past the page cache.
    ``compute`` has, for each kind, one position and at least one longer prompt. ``measured_on`` is what
    :func:`mhaffn.machine.describe` says.
    """

    ssd: float
    h2d: float | None
    gpu_bytes: int | None
    dram_bytes: int
    direct: bool
    compute: tuple[Compute, ...]
    measured_on: Mapping[str, Any]

    @staticmethod
    def default_path() -> Path:
        """``mhaffn/profile.json`` in the user's cache folder."""
        return default_cache() / "profile.json"

    @staticmethod
    def of_this_machine() -> Profile | None:
        """What was measured here; None where nothing was. Raises as :meth:`read` does."""
        path = Profile.default_path()
        return Profile.read(path) if path.exists() else None

    @staticmethod
    def read(path: str | Path) -> Profile:
        """Reads the file :meth:`write` wrote; raises :class:`ConfigError` that says what is wrong with it."""
        try:
            values = read_json_object(Path(path), ConfigError, AGAIN)
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist. {AGAIN}") from None
        try:
            return _from_dict(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is no profile of a machine: got {error!r}. {AGAIN}") from error

    def write(self, path: str | Path) -> None:
        """Writes it as JSON, in one step, making the folder where it is missing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def compute_s(self, config: ModelConfig, kind: Kind, tokens: int, seen: int | None = None) -> float:
        """Seconds of a sublayer of ``config`` on ``tokens`` positions; one alone looks at ``seen`` (None: as measured).

        As measured where all that is as it was measured. Others by the roofline that the measurements span:
        bytes as fast as on the fewest tokens, operations as fast as on the most.
        """
        widths = Widths.of(config)
        points = sorted((point for point in self.compute if point.kind == kind), key=lambda point: point.tokens)
        few, many = points[0], points[-1]
        seen = many.tokens if seen is None else seen
        for point in points:
            if (point.widths, point.tokens) == (widths, tokens) and (tokens > 1 or seen == many.tokens):
                return point.seconds
        memory_s = few.seconds * widths.read_bytes(kind, seen) / few.widths.read_bytes(kind, many.tokens)
        return max(memory_s, many.seconds * widths.operations(kind, tokens) / many.widths.operations(kind, many.tokens))

    def machine(self, config: ModelConfig, gpu: int | None, dram: int | None, work: Workload) -> Machine:
        """The machine as plans of ``config`` see it; a budget of None is the memory that was free, 0 is none."""
        if gpu is None:
            gpu = self.gpu_bytes
        if dram is None:
            dram = self.dram_bytes
        tokens: dict[Phase, int] = {"prefill": work.tokens, "decode": 1}
        compute_s: dict[Phase, Mapping[Kind, float]] = {
            phase: {kind: self.compute_s(config, kind, tokens[phase], work.tokens) for kind in KINDS}
            for phase in PHASES
        }
        return Machine(Links(self.ssd, self.h2d), compute_s, gpu or None, dram or None, work)

    def describe(self) -> str:
        """One line for people."""
        gpu = self.measured_on.get("gpu")
        where = gpu["name"] if isinstance(gpu, Mapping) and "name" in gpu else self.measured_on.get("cpu", "a machine")
        return f"{where}, measured {str(self.measured_on.get('date', '?'))[:10]}"


def _from_dict(values: Mapping[str, Any]) -> Profile:
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')!r}, expected {FORMAT}")
    compute = tuple(
        Compute(
            kind=_one_of(item["kind"]),
            widths=Widths(**{name: _count(width) for name, width in item["widths"].items()}),
            tokens=_count(item["tokens"]),
            seconds=_positive(item["seconds"]),
        )
        for item in values["compute"]
    )
    if {point.kind for point in compute} != set(KINDS):
        raise ValueError("compute without both kinds, mha and ffn")
    return Profile(
        ssd=_positive(values["ssd"]),
        h2d=None if values["h2d"] is None else _positive(values["h2d"]),
        gpu_bytes=None if values["gpu_bytes"] is None else int(_positive(values["gpu_bytes"])),
        dram_bytes=int(_positive(values["dram_bytes"])),
        direct=bool(values["direct"]),
        compute=compute,
        measured_on=dict(values["measured_on"]),
    )


def _one_of(kind: object) -> Kind:
    for known in KINDS:
        if kind == known:
            return known
    raise ValueError(f"kind {kind!r}, expected mha or ffn")


def _count(value: object) -> int:
    if _positive(value) < 1:
        raise ValueError(f"{value!r}, expected a whole number from 1 up")
    return int(_positive(value))


def _positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{value!r}, expected a positive number")
    return value
