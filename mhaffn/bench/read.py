"""report.json as the document, the figures and comparisons see it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mhaffn.bench.derive import Facts, layers_of, links_ms
from mhaffn.config import ModelConfig
from mhaffn.errors import ConfigError
from mhaffn.files import shown
from mhaffn.samples import Figure, Rounds, Summary, summarise, values
from mhaffn.trace import Phase

FORMAT = 1


def _are_rounds(found: object) -> bool:
    """Whether these are samples by round, at least one, all of them times or speeds."""
    if not isinstance(found, list) or not found or not all(isinstance(samples, list) and samples for samples in found):
        return False
    flat = [sample for samples in found for sample in samples]
    return all(type(x) in (int, float) and 0 < x < math.inf for x in flat)


@dataclass(frozen=True)
class Report:
    """The values of a report.json, typed where they are used often."""

    raw: Mapping[str, Any]

    @staticmethod
    def read(path: Path) -> Report:
        """Raises :class:`ConfigError` for anything but a report of this format."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a report of `mhaffn bench`: {error}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("measured"), dict):
            raise ConfigError(f"{path}: expected a report.json of `mhaffn bench` in format {FORMAT}")
        for name in ("machine", "settings", "derived"):
            if not isinstance(raw.get(name), dict):
                raise ConfigError(f"{path}: got {name} = {shown(raw.get(name))}, expected a JSON object")
        for name, rounds in raw["measured"].items():
            if not _are_rounds(rounds):
                raise ConfigError(f"{path}: {name}: got {shown(rounds)}, expected rounds of samples above 0")
        return Report(raw)

    @property
    def measured(self) -> Mapping[str, Rounds]:
        found: Mapping[str, Rounds] = self.raw["measured"]
        return found

    @property
    def settings(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.raw["settings"]
        return found

    @property
    def machine(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.raw["machine"]
        return found

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig(**self.raw["config"])

    @cached_property
    def facts(self) -> Facts:
        s = self.settings
        return Facts(
            name=s["shape"], config=self.config, tokens=s["tokens"], streamed_layers=s["streamed_layers"],
            gpu=s["gpu_bytes"], dram=s["dram_bytes"], copies=s["device"] == "cuda",
        )  # fmt: skip

    @cached_property
    def values(self) -> dict[str, float]:
        return values(self.measured)

    def has(self, name: str) -> bool:
        return name in self.measured

    def summary(self, name: str) -> Summary:
        return summarise(name, self.measured[name])

    def derived(self, name: str) -> Figure:
        return Figure(**self.raw["derived"][name])

    def has_derived(self, name: str) -> bool:
        return name in self.raw["derived"]

    def links(self, phase: Phase) -> list[tuple[str, float]]:
        """Links by name with milliseconds a layer, the slowest first."""
        found = links_ms(layers_of(self.facts, self.values)[phase])
        return sorted(found.items(), key=lambda item: -item[1])
