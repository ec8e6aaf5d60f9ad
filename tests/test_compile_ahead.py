"""Triton kernels compile for a GPU that is not there; the whole table is `make compile-ahead`."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
compile_ahead = importlib.import_module("compile_ahead")


def test_every_module_with_kernels_lists_its_builds():
    assert "linconv.ops.bidirectional_ssd.triton" in compile_ahead.modules()
    for name in compile_ahead.modules():
        builds = list(importlib.import_module(name).shipped())
        assert builds and all(build.label for build in builds), name


def test_a_kernel_compiles_without_spills():
    module = importlib.import_module("linconv.ops.ssd.triton")
    builds = [b for b in module.shipped() if b.name == "pass_states"][:1]
    ((_, _, _, _, registers, stack, _, problem),) = compile_ahead.rows(builds, 90, progress=None)
    assert 0 < registers <= 255 and stack == 0 and not problem
