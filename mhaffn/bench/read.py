"""report.json as the document, the figures and comparisons see it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mhaffn.bench.derive import Facts, layers_of, links_ms
from mhaffn.config import ModelConfig
from mhaffn.errors import ConfigError
from mhaffn.files import read_json_object, shown
from mhaffn.samples import Figure, Rounds, Summary, summarise, values
from mhaffn.trace import Phase

FORMAT = 1


NEEDED = {
    "machine": ("cpu", "cores", "gpu", "commit", "date"),
    "settings": ("shape", "tokens", "device", "rounds", "quick", "streamed_layers", "gpu_bytes", "dram_bytes"),
    "derived": (),
    "config": (),
}
"""Objects that every report has, with what they hold at least."""


def _are_rounds(found: object) -> bool:
    """Whether these are samples by round, at least one, all of them times or speeds."""
    if not isinstance(found, list) or not found or not all(isinstance(samples, list) and samples for samples in found):
        return False
    flat = [sample for samples in found for sample in samples]
    return all(type(x) in (int, float) and 0 < x < math.inf for x in flat)


def _are_remarks(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(item, dict) and isinstance(item.get("what"), str) and isinstance(item.get("why"), str)
        for item in found
    )


def _are_waits(found: object) -> bool:
    """Whether these are shares of the time, by measurement and round."""
    return isinstance(found, dict) and all(
        isinstance(shares, list) and all(type(x) in (int, float) and 0 <= x < 1 for x in shares)
        for shares in found.values()
    )


def _refuse(path: Path, what: str, found: object, expected: str) -> None:
    raise ConfigError(f"{path}: {what}: got {shown(found)}, expected {expected}")


def _check(path: Path, raw: Mapping[str, Any]) -> None:
    """Raises :class:`ConfigError` for what the document or a comparison would stumble over."""
    if raw.get("format") != FORMAT:
        _refuse(path, "format", raw.get("format"), f"{FORMAT}, a report.json of `mhaffn bench`")
    for name, keys in NEEDED.items():
        if not isinstance(raw.get(name), dict):
            _refuse(path, name, raw.get(name), "a JSON object")
        if missing := [key for key in keys if key not in raw[name]]:
            _refuse(path, name, raw[name], f"{', '.join(missing)} in it")
    if not isinstance(raw["machine"]["date"], str):
        _refuse(path, "date", raw["machine"]["date"], "a date as text")
    try:
        ModelConfig(**raw["config"])
    except TypeError as error:
        raise ConfigError(f"{path}: config: got {shown(raw['config'])}, expected a model's ({error})") from None
    if not isinstance(raw.get("measured"), dict):
        _refuse(path, "measured", raw.get("measured"), "a JSON object")
    for name, rounds in raw["measured"].items():
        if not _are_rounds(rounds):
            _refuse(path, name, rounds, "rounds of samples above 0")
    if not _are_remarks(raw.get("left_out")):
        _refuse(path, "left_out", raw.get("left_out"), "a list of what was left out, and why")
    if not _are_waits(raw.get("waited", {})):
        _refuse(path, "waited", raw["waited"], "shares of the time below 1")


@dataclass(frozen=True)
class Report:
    """The values of a report.json, typed where they are used often."""

    raw: Mapping[str, Any]

    @staticmethod
    def read(path: Path) -> Report:
        """Raises :class:`ConfigError` for anything but a report of this format."""
        advice = "Give a report.json of `mhaffn bench`."
        try:
            raw = read_json_object(path, ConfigError, advice)
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist. {advice}") from None
        _check(path, raw)
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
