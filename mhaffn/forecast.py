"""What each change would bring on a machine: plans simulated side by side, before anything is bought or packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mhaffn.config import KINDS, Kind, ModelConfig, Sublayer, order
from mhaffn.formats import Formats
from mhaffn.plan import Plan, Speeds, make_plan
from mhaffn.simulate import Links, Prediction, Work, predict
from mhaffn.sizes import Sizes, Workload
from mhaffn.trace import Phase

Stored = Mapping[Sublayer, tuple[int, ...]]
"""Bytes of each tensor of every sublayer, as a packed store has them."""
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
DECODE_PASSES = 128
"""Decode passes that plans count beside the one prefill."""


@dataclass(frozen=True)
class Machine:
    """Speeds (bytes a second), budgets (bytes), and seconds of compute a sublayer, by phase and kind.

    ``gpu`` None: no sublayer stays on the GPU; ``dram`` None: none in host memory.
    """

    links: Links
    compute_s: Mapping[Phase, Mapping[Kind, float]]
    gpu: int | None = None
    dram: int | None = None
    work: Workload = field(default_factory=Workload)

    @property
    def speeds(self) -> Speeds:
        """What plans for this machine are judged by."""
        return Speeds(self.links, ((1, self.compute_s["prefill"]), (DECODE_PASSES, self.compute_s["decode"])))


@dataclass(frozen=True)
class Forecast:
    """A named situation, its plan, the bytes a pass moves to the device, and the steady pass by phase."""

    name: str
    plan: Plan
    off_device_bytes: int
    passes: Mapping[Phase, Prediction]


def forecast(
    name: str, config: ModelConfig, machine: Machine, formats: Formats | None = None, stored: Stored | None = None
) -> Forecast:
    """Plans and simulates ``config`` (bfloat16, or in ``formats``, or as ``stored``) on ``machine``.

    Compute counts as in bfloat16: where less is read, a decode pass that it binds takes less than this.
    """
    plan = make_plan(
        config, "bfloat16", gpu=machine.gpu, dram=machine.dram, copies=machine.links.h2d is not None,
        work=machine.work, formats=formats, stored=stored, speeds=machine.speeds,
    )  # fmt: skip
    sizes = Sizes(config, "bfloat16", formats or Formats(), stored or {})
    passes = {
        phase: predict(
            plan,
            {s: Work(sizes.weights(s), machine.compute_s[phase][s.kind]) for s in order(config.num_layers)},
            machine.links,
        )
        for phase in PHASES
    }
    return Forecast(name, plan, sum(sizes.weights(s) for s in plan.streamed()), passes)


def changes(
    config: ModelConfig, machine: Machine, formats: Formats | None = None, stored: Stored | None = None
) -> list[Forecast]:
    """The machine as it is, then each change alone: twice the SSD, more DRAM, fewer bits.

    The model is in bfloat16, or as ``stored``. ``formats`` are compared beside the usual ones; of those only such as
    make it smaller.
    """
    faster = replace(machine, links=replace(machine.links, ssd=2 * machine.links.ssd))
    roomier = replace(machine, dram=(machine.dram or 0) + (32 << 30))
    asked = []
    if formats is not None:
        name = ", ".join(f"{kind.upper()} {format}" for kind, format in formats.kinds.items())
        asked = [forecast(name, config, machine, formats)]
    now = _nbytes(Sizes(config, "bfloat16", stored=stored or {}))
    smaller = [(n, f) for n, f in narrower(config) if _nbytes(Sizes(config, "bfloat16", f)) < now]
    return [
        forecast("as it is", config, machine, stored=stored),
        forecast("SSD twice as fast", config, faster, stored=stored),
        forecast("32 GiB more DRAM", config, roomier, stored=stored),
        *(forecast(name, config, machine, found) for name, found in smaller),
        *asked,
    ]


def _nbytes(sizes: Sizes) -> int:
    return sum(sizes.weights(sublayer) for sublayer in order(sizes.config.num_layers))


def narrower(config: ModelConfig) -> list[tuple[str, Formats]]:
    """The widths to compare, FFN alone and all; int4 by the longest usual group that divides the model's widths."""
    columns = [shape[-1] for kind in KINDS for shape in config.sublayer_shapes(kind).values() if len(shape) > 1]
    group = next((group for group in (128, 64, 32) if all(n % group == 0 for n in columns)), None)
    int4 = [] if group is None else [("int4", f"int4:{group}")]
    found = [(f"FFN in {name}", Formats.parse(ffn=format)) for name, format in [("int8", "int8"), *int4]]
    return found + [(f"all in {name}", Formats.parse(format, format)) for name, format in [("int8", "int8"), *int4]]
