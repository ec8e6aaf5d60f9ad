"""The committed tables of the scan on Triton: how work is cut, and which of two plans it follows."""

import os
from dataclasses import dataclass, replace

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """How the work is cut, forward and backward.

    Fields of the forward chunk decide results' last bits, so none depends on batch or length.

    Attributes:
        chunk, gradient_chunk: frames of a chunk, forward and backward.
        rows: frames of a chunk that one program of the outputs takes.
        block_p, block_n: columns of headdim and dstate of a tile of the outputs.
        state_p, state_n: of a tile of the states, chunk-parallel.
        sweep_p, sweep_n: of a tile of the states, in sweeps.
        gradient_p, gradient_n: columns of headdim and dstate of a tile of the gradients.
        heads, gradient_heads: at most so many heads of a group share one program's products of B and C.
        resident: programs of the outputs that a multiprocessor has at once.
        warps, state_warps, sweep_warps, gradient_warps, stages, sweep_stages, gradient_stages: of each kernel.
        dx_n: columns of dstate of a tile of the outputs' kernel where it computes dx; 0: ``block_n``.
    """

    chunk: int
    rows: int
    block_p: int
    block_n: int
    state_p: int
    state_n: int
    gradient_chunk: int
    gradient_p: int
    gradient_n: int
    dx_n: int = 0
    heads: int = 16
    resident: int = 2
    gradient_heads: int = 8
    sweep_p: int = 64
    sweep_n: int = 64
    warps: int = 8
    state_warps: int = 4
    sweep_warps: int = 4
    gradient_warps: int = 8
    stages: int = 2
    sweep_stages: int = 3
    gradient_stages: int = 1


# By the type that products are taken in and the GPU's major compute capability; a GPU that is not listed takes the row
# of 8. Numbers of columns are upper bounds, which `choose_tiles` cuts to headdim and dstate. ("bf16", 9) are the
# fastest that benchmarks/tune_gpu_scan.py tried on an H200, except for dx at dstate 128, whose fastest spill with
# Triton 3.9. The others were never timed. Of the tiles tried that spill no registers in what ``shipped()`` lists, they
# are those nearest to ("bf16", 9) for bfloat16, and the largest otherwise.
TILES = {
    ("bf16", 8): Tiles(
        chunk=64, rows=64, block_p=64, block_n=32, state_p=64, state_n=64, sweep_p=32, warps=4,
        gradient_chunk=32, gradient_p=64, gradient_n=64, gradient_heads=16, gradient_warps=4,
    ),
    ("bf16", 9): Tiles(
        chunk=64, rows=64, block_p=64, block_n=64, state_p=64, state_n=128, sweep_n=128, warps=4,
        gradient_chunk=64, gradient_p=64, gradient_n=64, gradient_heads=16, gradient_warps=4,
        stages=3, gradient_stages=3,
    ),
    ("bf16", 10): Tiles(
        chunk=64, rows=32, block_p=64, block_n=32, state_p=64, state_n=64, warps=4, stages=1,
        gradient_chunk=64, gradient_p=32, gradient_n=64, gradient_heads=16, gradient_warps=4,
    ),
    ("tf32", 8): Tiles(
        chunk=64, rows=32, block_p=64, block_n=32, state_p=64, state_n=64,
        gradient_chunk=32, gradient_p=32, gradient_n=16,
    ),
    ("tf32", 9): Tiles(
        chunk=64, rows=64, block_p=64, block_n=32, state_p=64, state_n=64,
        gradient_chunk=64, gradient_p=32, gradient_n=32,
    ),
    ("tf32", 10): Tiles(
        chunk=64, rows=32, block_p=64, block_n=16, state_p=32, state_n=32,
        gradient_chunk=32, gradient_p=32, gradient_n=16,
    ),
    ("tf32x3", 8): Tiles(
        chunk=64, rows=32, block_p=64, block_n=16, state_p=32, state_n=64, sweep_p=32,
        gradient_chunk=16, gradient_p=32, gradient_n=32,
    ),
    ("tf32x3", 9): Tiles(
        chunk=64, rows=64, block_p=64, block_n=16, state_p=64, state_n=64, sweep_p=32,
        gradient_chunk=16, gradient_p=32, gradient_n=32,
    ),
    ("tf32x3", 10): Tiles(
        chunk=64, rows=64, block_p=64, block_n=16, state_p=32, state_n=32, sweep_p=32,
        gradient_chunk=16, gradient_p=32, gradient_n=32,
    ),
    # Without tensor cores more stands in registers.
    ("ieee", 8): Tiles(
        chunk=32, rows=32, block_p=32, block_n=16, state_p=32, state_n=64,
        gradient_chunk=32, gradient_p=32, gradient_n=32, stages=1,
    ),
    ("ieee", 10): Tiles(
        chunk=32, rows=32, block_p=32, block_n=16, state_p=32, state_n=32,
        gradient_chunk=32, gradient_p=32, gradient_n=32, stages=1,
    ),
    ("fp64", 8): Tiles(
        chunk=32, rows=32, block_p=32, block_n=32, state_p=32, state_n=32,
        gradient_chunk=16, gradient_p=16, gradient_n=32, gradient_heads=1, warps=4, stages=1,
    ),
}  # fmt: skip
# What differs where dstate is 65 to 128, and where it is more, which was never timed.
WIDE = {("bf16", 9): {128: {"block_n": 128, "dx_n": 64, "resident": 1}, 256: {"stages": 1}}}
# Bytes of registers that a thread may spill, most of them values that a kernel's loop does not use. On an H200 the
# gradients then take two thirds of the time of the fastest tiles that spill nothing.
MAY_SPILL = {("bf16", 9): 32}


def _products(operand: torch.dtype, precision: str) -> str:
    return {torch.bfloat16: "bf16", torch.float64: "fp64"}.get(operand, precision)


def _of_architecture(table: dict, products: str, capability: int):
    return table.get((products, capability // 10)) or table[products, 8]


def choose_tiles(operand: torch.dtype, precision: str, headdim: int, dstate: int, capability: int) -> Tiles:
    """The committed table: tiles by the type that products are taken in, sizes, and the GPU's compute capability."""
    tiles = _of_architecture(TILES, _products(operand, precision), capability)
    P, N = power_of_two(headdim), power_of_two(dstate)
    tiles = replace(tiles, **WIDE.get((_products(operand, precision), capability // 10), {}).get(N, {}))
    columns = {name: min(P, getattr(tiles, name)) for name in ("block_p", "state_p", "sweep_p", "gradient_p")}
    columns |= {name: min(N, getattr(tiles, name)) for name in ("block_n", "state_n", "sweep_n", "gradient_n")}
    if N > 128:
        columns["gradient_n"] = min(columns["gradient_n"], 32)
    return replace(tiles, **columns)


def rounds_products(operand: torch.dtype, precision: str) -> bool:
    """Whether products are taken of fewer digits than float32 has."""
    return _products(operand, precision) in ("bf16", "tf32")


def may_spill(operand: torch.dtype, precision: str, capability: int) -> int:
    """Bytes of stack that builds with these products may have."""
    return MAY_SPILL.get((_products(operand, precision), capability // 10), 0)


def power_of_two(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


# A program of the outputs with h heads takes a time proportional to h + this. Fitted to an H200's times at 4,096 frames
# it is 1.7 at dstate 64, to within 1 %, and 3.1 at dstate 128.
PROGRAM_IN_HEADS = 2

PLANS = ("chunks", "sweeps")
# The least number of programs per multiprocessor for which sweeps are taken, by major compute capability: measured by
# benchmarks/tune_gpu_scan.py on an H200, assumed for the others. A GPU that is not listed takes the newest row.
PROGRAMS_TO_SWEEP = {8: 0.6, 9: 0.6, 10: 0.6}


def forced_plan() -> str:
    """What the environment says of the plan, "" for nothing."""
    return os.environ.get("LINCONV_SCAN_PLAN", "")


def choose_plan(programs: int, multiprocessors: int, capability: int, precision: str) -> str:
    """ "sweeps", whose states go to memory once, where its programs fill the GPU, else "chunks", which has many more.

    Args:
        programs: those that a sweep would have: sequences x heads x directions x tiles of the state.
        multiprocessors: of the GPU; 0 where there is none.
        capability: its compute capability, such as 90.
        precision: of products. IEEE ones take no tensor cores, and more registers than a sweep leaves.

    Environment variable LINCONV_SCAN_PLAN, "chunks" or "sweeps", overrules it.

    Raises:
        ValueError: LINCONV_SCAN_PLAN is something else.
    """
    forced = forced_plan()
    if forced:
        if forced not in PLANS:
            raise ValueError(
                f"LINCONV_SCAN_PLAN is {forced!r}, wanted one of {', '.join(map(repr, PLANS))}, or nothing"
            )
        return forced
    if not multiprocessors or precision == "ieee":
        return "chunks"
    least = PROGRAMS_TO_SWEEP.get(capability // 10, PROGRAMS_TO_SWEEP[max(PROGRAMS_TO_SWEEP)])
    return "sweeps" if programs >= least * multiprocessors else "chunks"
