"""Numbers and tables as the document writes them, the same in every language."""

from __future__ import annotations

from collections.abc import Sequence

from mhaffn.samples import Figure


def ms(value: float) -> str:
    """Milliseconds with three significant digits or two decimals, whichever is more."""
    return f"{plain(value)} ms"


def plain(value: float) -> str:
    size = abs(value)
    return f"{value:.2f}" if size >= 1 or value == 0 else f"{value:.3f}" if size >= 0.1 else f"{value:.4f}"


def with_margin(found: Figure, unit: str = " ms", scale: float = 1.0) -> str:
    return f"{plain(found.value * scale)} ± {plain(found.uncertainty * scale)}{unit}"


def share(value: float) -> str:
    return f"{value:.1%}"


def share_with_margin(found: Figure) -> str:
    return f"{found.value:.1%} ± {found.uncertainty:.1%}"


def times(found: Figure) -> str:
    return f"{found.value:.2f}× ± {found.uncertainty:.2f}"


def rate(found: Figure) -> str:
    """GiB a second of bytes a second."""
    return with_margin(found, " GiB/s", 2.0**-30)


def flops(found: Figure) -> str:
    """TFLOP or GFLOP a second."""
    unit, scale = (" TFLOP/s", 1e-12) if found.value >= 1e12 else (" GFLOP/s", 1e-9)
    return with_margin(found, unit, scale)


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.3f} GiB" if nbytes >= 1 << 27 else f"{nbytes / 2**20:.3f} MiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; columns after the first are right-aligned."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return ["", *lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
