"""Tile tables are data: well-formed, complete, written as they are read."""

from __future__ import annotations

import itertools
import json

import pytest

from mhaffn.kernels import tiles

SIZES = {
    "attention_decode": {
        "element": (2, 4),
        "dim": (64, 128, 256),
        "rows": (16, 64),
        "keys": (1, 1 << 20),
        "programs": (1, 512),
    },
    "attention_decode_cuda": {"dim": (64, 128), "programs": (1, 8, 512), "keys": (1, 1 << 20)},
    "attention_prefill": {"element": (2, 4), "dim": (16, 64, 128, 256)},
    "few_rows": {"element": (2, 4), "rows": (16, 64), "per_processor": (1, 1000)},
    "few_rows_gated": {"element": (2, 4), "rows": (16, 64), "per_processor": (1, 1000)},
    "few_rows_cuda": {"columns": (1, 2), "per_processor": (1, 1000)},
    "few_rows_cuda_gated": {"columns": (1, 2), "per_processor": (1, 1000)},
    "quantized": {"bits": (4, 8), "rows": (16, 128), "per_processor": (1, 1000)},
    "quantized_gated": {"bits": (4, 8), "rows": (16,), "per_processor": (1, 1000)},
    "quantized_sm90": {"bits": (4, 8), "rows": (17, 128, 2048, 8192), "per_processor": (1, 1000)},
    "quantized_cuda": {"bits": (4, 8), "columns": (1, 2), "per_processor": (1, 1000)},
    "quantized_cuda_gated": {"bits": (4, 8), "columns": (1, 2), "per_processor": (1, 1000)},
}


@pytest.mark.parametrize("arch", tiles.SHARED_MEMORY_LIMIT)
def test_every_size_finds_a_tile(arch):
    for kernel, sizes in SIZES.items():
        if kernel.endswith("_sm90") and arch != "sm_90":
            continue
        for values in itertools.product(*sizes.values()):
            assert tiles.tile(kernel, arch, **dict(zip(sizes, values, strict=True)))


def test_a_size_without_a_tile_is_named():
    with pytest.raises(LookupError, match=r"sm_90.json has no tile of gate_up"):
        tiles.tile("gate_up", "sm_90", element=4)


def test_tables_are_written_as_they_are_read(tmp_path, monkeypatch):
    rules = tiles.table("sm_90")
    before = (tiles.CONFIGS / "sm_90.json").read_text()
    monkeypatch.setattr(tiles, "CONFIGS", tmp_path)
    tiles.write("sm_90", rules)
    assert (tmp_path / "sm_90.json").read_text() == before
    assert json.loads(before) == rules


def test_the_tuner_knows_every_rule_of_decode_in_cuda_and_could_find_its_tile():
    tune = pytest.importorskip("mhaffn.kernels.tune")  # needs Triton
    problems = {frozenset(problem.max.items()): problem for problem in tune.decode_cuda_problems()}
    rules = tiles.table("sm_90")["attention_decode_cuda"]
    assert problems.keys() == {frozenset(rule["max"].items()) for rule in rules}
    for rule in rules:
        problem = problems[frozenset(rule["max"].items())]
        assert {name: size for name, size in rule["tile"].items() if name != "DEFAULT"} in problem.candidates
        assert tiles.match(tiles.table("sm_90")[problem.rival[0]], problem.rival[1])
