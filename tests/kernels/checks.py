"""What the tests of kernels share."""

from __future__ import annotations

import torch


def poison(monkeypatch) -> None:
    """What a kernel does not write of its results stays NaN."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def poisoned(make):
    """``make``, which fills nothing, filling with NaN."""

    def made(*arguments, **options):
        out = make(*arguments, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    return made


def relative_error(got, truth) -> float:
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()
