"""The analysis of a machine measured sublayer by sublayer: what overlaps, what waits, what bounds a pass.

Per sublayer, as such measurements are usually read: serial time, the greater of compute and I/O, the wait,
the sum of those maxima ("ideal"), and how many layers ahead a prefetch would have to run. Beside it the
bound of a stream that prefetches across sublayers and layers, which is the greatest of the *sums*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhaffn.config import KINDS, Kind, ModelConfig, Sublayer
from mhaffn.errors import ConfigError
from mhaffn.files import read_json_object
from mhaffn.forecast import PHASES, Forecast, Machine, forecast
from mhaffn.formats import Formats
from mhaffn.simulate import Links
from mhaffn.sizes import Sizes, Workload
from mhaffn.trace import Phase

MS_MIN, MS_MAX, GIB_MAX = 1e-9, 1e9, 1e9
"""Of what was measured anywhere; beyond them ratios and bytes are no longer numbers."""


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one layer's two sublayers, and the machine's memory in bytes."""

    name: str
    config: ModelConfig
    prompt_tokens: int
    compute_ms: Mapping[Phase, Mapping[Kind, float]]
    h2d_ms: Mapping[Kind, float]
    ssd_ms: Mapping[Kind, float]
    gpu: int
    dram: int
    published_intermediate_size: int | None

    @staticmethod
    def read(path: str | Path) -> Measured:
        """Reads a file of measured figures; raises :class:`ConfigError` that says what is missing or wrong."""
        try:
            values = read_json_object(Path(path), ConfigError, "Give a JSON file of measured figures.")
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist. Give a JSON file of measured figures.") from None
        try:
            return _from_dict(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path}: got {error!r}; expected layers, hidden_size, intermediate_size, num_heads, num_kv_heads, "
                f"head_dim, vocab_size, prompt_tokens, gpu_gib, dram_gib and milliseconds by kind in compute_ms "
                f"(prefill, decode), h2d_ms and ssd_ms"
            ) from error


def _from_dict(values: Mapping[str, Any]) -> Measured:
    def by_kind(times: Mapping[str, Any]) -> dict[Kind, float]:
        found = {kind: float(times[kind]) for kind in KINDS}
        if not all(MS_MIN <= ms <= MS_MAX for ms in found.values()):
            raise ValueError(f"milliseconds must be between {MS_MIN:g} and {MS_MAX:g}: {found}")
        return found

    def count(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}, expected a whole number from 1 up")
        return value

    def memory(name: str) -> int:
        gib = float(values[name])
        if not 0 <= gib <= GIB_MAX:
            raise ValueError(f"{name} = {gib}, expected 0 to {GIB_MAX:g}")
        return int(gib * 2**30)

    published = values.get("published_intermediate_size")
    return Measured(
        name=str(values["name"]).encode(errors="replace").decode(),
        config=ModelConfig.from_dict(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "num_hidden_layers": values["layers"],
                "hidden_size": values["hidden_size"],
                "intermediate_size": values["intermediate_size"],
                "num_attention_heads": values["num_heads"],
                "num_key_value_heads": values["num_kv_heads"],
                "head_dim": values["head_dim"],
                "vocab_size": values["vocab_size"],
                "max_position_embeddings": 131072,
            },
            where="measured figures",
        ),
        prompt_tokens=count("prompt_tokens", values["prompt_tokens"]),
        compute_ms={phase: by_kind(values["compute_ms"][phase]) for phase in PHASES},
        h2d_ms=by_kind(values["h2d_ms"]),
        ssd_ms=by_kind(values["ssd_ms"]),
        gpu=memory("gpu_gib"),
        dram=memory("dram_gib"),
        published_intermediate_size=None if published is None else count("published_intermediate_size", published),
    )


@dataclass(frozen=True)
class Layer:
    """One layer in one phase, in milliseconds; mappings are by sublayer kind.

    ``prefetch_layers`` is I/O over compute: how many of its own computes hide one of its transfers.
    ``bound_ms`` is that of a stream that prefetches across layers.
    """

    phase: Phase
    compute_ms: Mapping[Kind, float]
    io_ms: Mapping[Kind, float]
    h2d_ms: float
    ssd_ms: float

    @property
    def total_compute_ms(self) -> float:
        return sum(self.compute_ms.values())

    @property
    def serial_ms(self) -> float:
        return self.total_compute_ms + sum(self.io_ms.values())

    def compute_share(self, kind: Kind) -> float:
        return self.compute_ms[kind] / self.total_compute_ms

    def sublayer_bound_ms(self, kind: Kind) -> float:
        return max(self.compute_ms[kind], self.io_ms[kind])

    def wait_ms(self, kind: Kind) -> float:
        return max(0.0, self.io_ms[kind] - self.compute_ms[kind])

    @property
    def ideal_ms(self) -> float:
        return sum(self.sublayer_bound_ms(kind) for kind in KINDS)

    @property
    def ideal_speedup(self) -> float:
        return self.serial_ms / self.ideal_ms

    def prefetch_layers(self, kind: Kind) -> int:
        return round(self.io_ms[kind] / self.compute_ms[kind])

    @property
    def bound_ms(self) -> float:
        return max(self.total_compute_ms, self.h2d_ms, self.ssd_ms)

    @property
    def bound_speedup(self) -> float:
        return self.serial_ms / self.bound_ms


def analyse(measured: Measured) -> dict[Phase, Layer]:
    """The derived figures of one layer, by phase."""
    io_ms = {kind: measured.h2d_ms[kind] + measured.ssd_ms[kind] for kind in KINDS}
    h2d_ms, ssd_ms = sum(measured.h2d_ms.values()), sum(measured.ssd_ms.values())
    return {phase: Layer(phase, measured.compute_ms[phase], io_ms, h2d_ms, ssd_ms) for phase in PHASES}


def steps(measured: Measured, phase: Phase) -> dict[str, float]:
    """Milliseconds of what one layer does when one step follows the other."""
    links = {"compute": measured.compute_ms[phase], "host to GPU": measured.h2d_ms, "SSD": measured.ssd_ms}
    return {f"{kind.upper()} {link}": times[kind] for link, times in links.items() for kind in KINDS}


def outlook(measured: Measured) -> list[Forecast]:
    """The whole model on that machine, step by step: streamed, with DRAM, with the GPU, with a narrower FFN.

    Where the measured FFN width is not the published model's, the published width follows, its FFN
    times scaled by the bytes.
    """
    found = _steps(measured.config, measured, 1.0, "")
    published = measured.published_intermediate_size
    if published and published != measured.config.intermediate_size:
        scale = published / measured.config.intermediate_size
        found += _steps(replace(measured.config, intermediate_size=published), measured, scale, f"F {published}: ")
    return found


def _steps(config: ModelConfig, measured: Measured, ffn_scale: float, prefix: str) -> list[Forecast]:
    sizes = Sizes(measured.config, "bfloat16")
    nbytes = sum(sizes.weights(Sublayer(0, kind)) for kind in KINDS)
    scale: dict[Kind, float] = {"mha": 1.0, "ffn": ffn_scale}
    machine = Machine(
        links=Links(
            ssd=nbytes / (sum(measured.ssd_ms.values()) / 1e3), h2d=nbytes / (sum(measured.h2d_ms.values()) / 1e3)
        ),
        compute_s={
            phase: {kind: measured.compute_ms[phase][kind] * scale[kind] / 1e3 for kind in KINDS} for phase in PHASES
        },
        work=Workload(tokens=measured.prompt_tokens, context=2 * measured.prompt_tokens),
    )
    dram = replace(machine, dram=measured.dram or None)
    both = replace(dram, gpu=measured.gpu or None)
    return [
        forecast(f"{prefix}all from SSD", config, machine),
        forecast(f"{prefix}+ {measured.dram / 2**30:.0f} GiB DRAM", config, dram),
        forecast(f"{prefix}+ {measured.gpu / 2**30:.0f} GiB GPU", config, both),
        forecast(f"{prefix}+ FFN in int8", config, both, Formats.parse(ffn="int8")),
        forecast(f"{prefix}+ FFN in int4", config, both, Formats.parse(ffn="int4")),
    ]
