"""Triton kernels compile for a GPU that is not there; the whole table is `make compile-ahead`."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
compile_ahead = importlib.import_module("compile_ahead")
compile_ahead_cuda = importlib.import_module("compile_ahead_cuda")
source_digest = importlib.import_module("source_digest")


TRITON_TABLES = sorted(compile_ahead.ROOT.glob("docs/kernels/triton_builds_*.md"))


def test_there_is_a_table_of_the_oldest_triton_and_of_a_newer_one():
    assert compile_ahead.table_of("3.6.0") in TRITON_TABLES and len(TRITON_TABLES) > 1


@pytest.mark.parametrize("table", [*TRITON_TABLES, compile_ahead_cuda.TABLE], ids=lambda path: path.stem)
def test_a_committed_table_is_of_these_sources(table):
    """Its script writes it only where nothing spills."""
    script = compile_ahead if table in TRITON_TABLES else compile_ahead_cuda
    assert source_digest.told_by(table) == source_digest.digest(*script.SOURCES), "run `make compile-ahead`"


@pytest.mark.parametrize("table", TRITON_TABLES, ids=lambda path: path.stem)
def test_a_committed_table_has_no_spill(table):
    lines = [line.split("|")[1:-1] for line in table.read_text().splitlines() if line.startswith("| ")]
    builds = [cells for cells in lines if cells[0].strip() != "kernel"]
    assert len(builds) > 1000
    assert [cells for cells in builds if int(cells[5]) != 0] == []


def test_the_committed_table_of_cuda_has_every_source():
    text = compile_ahead_cuda.TABLE.read_text()
    for path in (compile_ahead_cuda.ROOT / "csrc").glob("*/cuda.cu"):
        assert f"## {path.parent.name}\n" in text


def test_every_module_with_kernels_lists_its_builds():
    assert "linconv.ops.bidirectional_ssd.triton" in compile_ahead.modules()
    for name in compile_ahead.modules():
        builds = list(importlib.import_module(name).shipped())
        assert builds and all(build.label for build in builds), name


@pytest.mark.filterwarnings("error")  # of defaults that a later Triton changes
@pytest.mark.parametrize("capability", compile_ahead.ARCHITECTURES)
@pytest.mark.parametrize("name", ["pass_states", "chunk_outputs", "sweep"])
def test_a_kernel_compiles_without_spills(name, capability):
    module = importlib.import_module("linconv.ops.ssd.triton")
    builds = [b for b in module.shipped(capability) if b.name == name][:1]
    ((_, _, _, _, registers, stack, _, problem),) = compile_ahead.rows(builds, capability, progress=None)
    assert 0 < registers <= 255 and stack == 0 and not problem
