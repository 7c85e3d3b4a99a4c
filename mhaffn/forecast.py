"""What each change would bring on a machine: plans simulated side by side, before anything is bought or packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mhaffn.config import Kind, ModelConfig, order
from mhaffn.plan import Plan, Sizes, Speeds, Workload, make_plan
from mhaffn.simulate import Links, Prediction, Work, predict
from mhaffn.trace import Phase

PHASES: tuple[Phase, Phase] = ("prefill", "decode")
DECODE_PASSES = 128
"""Decode passes that plans count beside the one prefill."""
BITS = {"bf16": 16.0, "int8": 8 + 16 / 128, "int4": 4 + 16 / 128}
"""Bits an element takes; the narrow ones carry one 16-bit scale for 128 elements."""


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
    bits: Mapping[Kind, float]
    passes: Mapping[Phase, Prediction]

    @property
    def available(self) -> bool:
        """Whether mhaffn can run this today: narrow weights are planned."""
        return not self.bits


def forecast(name: str, config: ModelConfig, machine: Machine, bits: Mapping[Kind, float] | None = None) -> Forecast:
    """Plans and simulates ``config`` (bfloat16, matrices at ``bits``) on ``machine``."""
    plan = make_plan(
        config, "bfloat16", gpu=machine.gpu, dram=machine.dram, copies=machine.links.h2d is not None,
        work=machine.work, bits=bits, speeds=machine.speeds,
    )  # fmt: skip
    sizes = Sizes(config, "bfloat16", bits or {})
    passes = {
        phase: predict(
            plan,
            {s: Work(sizes.weights(s), machine.compute_s[phase][s.kind]) for s in order(config.num_layers)},
            machine.links,
        )
        for phase in PHASES
    }
    return Forecast(name, plan, sum(sizes.weights(s) for s in plan.streamed()), bits or {}, passes)


def changes(config: ModelConfig, machine: Machine) -> list[Forecast]:
    """The machine as it is, then each change alone: twice the SSD, more DRAM, narrower weights."""
    faster = replace(machine, links=replace(machine.links, ssd=2 * machine.links.ssd))
    roomier = replace(machine, dram=(machine.dram or 0) + (32 << 30))
    int8, int4 = BITS["int8"], BITS["int4"]
    return [
        forecast("as it is", config, machine),
        forecast("SSD twice as fast", config, faster),
        forecast("32 GiB more DRAM", config, roomier),
        forecast("FFN in int8", config, machine, {"ffn": int8}),
        forecast("FFN in int4", config, machine, {"ffn": int4}),
        forecast("all in int4", config, machine, {"ffn": int4, "mha": int4}),
    ]
