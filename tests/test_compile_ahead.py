"""Triton kernels compile for a GPU that is not there; the whole table is `make compile-ahead`."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


PYTHON = '"""What it does."""\n\nx = "# not one"\n\n\ndef f():\n    """Docs\n\n    of f."""\n    return x\n'
CPP = '#include "a.h"\nauto x = "// not one"; const char c = \'"\';\nint y = 1 / 2;\n'


@pytest.mark.parametrize(
    "suffix, code, commented",
    [
        (".py", PYTHON, PYTHON.replace("Docs", "Other").replace("    return x", "    # why\n    return x  # what")),
        (".py", PYTHON, PYTHON.replace('"""What it does."""', "")),
        (".h", CPP, CPP.replace("int", "/* two\n lines */ int").replace("2;", "2;  // why")),
    ],
)
def test_comments_make_no_other_source(tmp_path, suffix, code, commented):
    source = tmp_path / f"source{suffix}"

    def code_of(text):
        source.write_text(text)
        return source_digest.code_of(source).split()

    assert code_of(code) == code_of(commented)
    assert len({*map(tuple, map(code_of, (code, code.replace("not", "never"), code.replace("x", "z"))))}) == 3


@pytest.mark.parametrize("table", TRITON_TABLES, ids=lambda path: path.stem)
def test_a_committed_table_has_no_spill(table):
    lines = [line.split("|")[1:-1] for line in table.read_text().splitlines() if line.startswith("| ")]
    builds = [cells for cells in lines if cells[0].strip() != "kernel"]
    assert len(builds) > 1000
    assert [cells for cells in builds if int(cells[5]) > int(cells[6])] == []
    # Which is for the tiles that were measured, and no others.
    assert {cells[1].split(",")[0].strip() for cells in builds if int(cells[6])} == {"bfloat16"}


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
@pytest.mark.parametrize("name", ["pass_states", "chunk_outputs", "sweep_states"])
def test_a_kernel_compiles_without_spills(name, capability):
    module = importlib.import_module("linconv.ops.ssd.triton")
    builds = [b for b in module.shipped(capability) if b.name == name][:1]
    ((_, _, _, _, registers, stack, at_most, _, problem),) = compile_ahead.rows(builds, capability, progress=None)
    assert 0 < registers <= 255 and stack <= at_most and not problem


def test_an_empty_product_in_the_assembly_is_a_lost_one():
    kept = """
        /*8390*/                   HGMMA.64x32x16.F32.BF16 R56, R44, gdesc[UR8].tnspB, R56 ;
        /*8460*/                   HGMMA.64x32x16.F32.BF16 R56, R48, gdesc[UR4].tnspB, R56, gsb0 ;
        /*57c0*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*5910*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
"""
    lost = "        /*8710*/                   HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;\n"
    assert not compile_ahead.loses_product(kept)
    assert compile_ahead.loses_product(kept + lost)


STORE = "st.global.v4.f32 [%d0], {%f0, %f1, %f2, %f3};"
PRODUCT = f"""
.version 8.4
.target sm_90a
.address_size 64
.visible .entry product(.param .u64 out, .param .u64 tile)
{{
    .reg .f32 %f<4>;
    .reg .b64 %d<2>;
    ld.param.u64 %d0, [out];
    ld.param.u64 %d1, [tile];
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %d1, %d1, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {STORE}
    ret;
}}
"""


@pytest.mark.parametrize("ptx, expected", [(PRODUCT, ""), (PRODUCT.replace(STORE, ""), "loses a matrix product")])
def test_a_lost_product_is_a_problem(ptx, expected, tmp_path):
    """Every ptxas deletes a product whose result nobody needs."""
    from triton import knobs

    source, cubin = tmp_path / "product.ptx", tmp_path / "product.cubin"
    source.write_text(ptx)
    subprocess.run([knobs.nvidia.ptxas.path, "-arch=sm_90a", source, "-o", cubin], check=True)
    kernel = SimpleNamespace(asm=dict(ptx=ptx, cubin=cubin.read_bytes()), metadata=SimpleNamespace(shared=0))
    build = SimpleNamespace(name="product", label="", num_warps=4, num_stages=1, stack=0, compile=lambda _: kernel)
    ((*_, problem),) = compile_ahead.rows([build], 90, progress=None)
    assert problem == expected
