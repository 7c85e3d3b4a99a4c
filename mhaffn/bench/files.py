"""What a run leaves in its folder: report.json, report.md and the figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mhaffn.bench import document, figures
from mhaffn.bench.words import Language
from mhaffn.errors import ConfigError


@contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """Makes the folder before long work, not after it, and takes it away again where the work fails.

    Raises :class:`ConfigError`.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".mhaffn-writable"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}. Give another folder with --out.") from error
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):  # what is in it was written for somebody
                folder.rmdir()
        raise


def write(raw: dict[str, Any], folder: Path, language: Language) -> list[Path]:
    """Writes everything; the JSON first, so that no measurement is lost to what is drawn of it."""
    data = folder / "report.json"
    data.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    try:
        names, remarks = figures.draw(raw, folder, language)
    except figures.NoMatplotlibError:
        names, remarks = [], ["no_matplotlib"]
    noted = raw | {"left_out": [*raw["left_out"], *({"what": remark, "why": ""} for remark in remarks)]}
    text = folder / "report.md"
    text.write_text(document.write(noted, language, names), encoding="utf-8")
    return [text, data, *(folder / f"{name}.png" for name in names)]
