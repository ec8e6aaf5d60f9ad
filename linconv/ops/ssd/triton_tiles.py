"""The committed tables of the scan on Triton: how work is cut, and which of two plans it follows."""

import os
from dataclasses import dataclass, replace

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """How the work of the chunk-parallel plan is cut, and that of backward.

    Fields of the forward chunk decide results' last bits, so none depends on batch or length.

    Attributes:
        chunk, gradient_chunk: frames of a chunk, forward and backward.
        rows: frames of a chunk that one program of the outputs takes.
        block_p, block_n: columns of headdim and dstate of a tile of the outputs.
        state_p, state_n: of a tile of the states.
        gradient_p, gradient_n: columns of headdim and dstate of a tile of the gradients.
        heads, gradient_heads: at most so many heads of a group share one program's products of B and C.
        warps, state_warps, gradient_warps, stages, gradient_stages: of each kernel.
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
    heads: int = 4
    gradient_heads: int = 8
    warps: int = 8
    state_warps: int = 4
    gradient_warps: int = 8
    stages: int = 2
    gradient_stages: int = 1


# By what products are taken in and the major compute capability; other GPUs do as the oldest. Columns are as many at
# most. Among the largest tried that spill no registers in what ``shipped()`` lists, with Triton 3.6 and 3.9; no GPU has
# told which are fast.
TILES = {
    ("bf16", 8): Tiles(
        chunk=128, rows=32, block_p=64, block_n=32, state_p=64, state_n=64,
        gradient_chunk=32, gradient_p=32, gradient_n=64,
    ),
    ("bf16", 9): Tiles(
        chunk=128, rows=64, block_p=64, block_n=32, state_p=64, state_n=128,
        gradient_chunk=64, gradient_p=32, gradient_n=64, gradient_stages=2,
    ),
    ("bf16", 10): Tiles(
        chunk=128, rows=32, block_p=64, block_n=32, state_p=64, state_n=64,
        gradient_chunk=32, gradient_p=32, gradient_n=64,
    ),
    ("tf32", 8): Tiles(
        chunk=64, rows=32, block_p=64, block_n=32, state_p=64, state_n=64,
        gradient_chunk=32, gradient_p=32, gradient_n=32,
    ),
    ("tf32", 9): Tiles(
        chunk=64, rows=64, block_p=64, block_n=32, state_p=64, state_n=64,
        gradient_chunk=64, gradient_p=32, gradient_n=32,
    ),
    ("tf32", 10): Tiles(
        chunk=64, rows=32, block_p=64, block_n=16, state_p=32, state_n=32,
        gradient_chunk=32, gradient_p=32, gradient_n=32,
    ),
    ("tf32x3", 8): Tiles(
        chunk=64, rows=32, block_p=64, block_n=16, state_p=32, state_n=64,
        gradient_chunk=16, gradient_p=32, gradient_n=32,
    ),
    ("tf32x3", 9): Tiles(
        chunk=64, rows=64, block_p=64, block_n=16, state_p=64, state_n=64,
        gradient_chunk=16, gradient_p=32, gradient_n=32,
    ),
    ("tf32x3", 10): Tiles(
        chunk=64, rows=32, block_p=64, block_n=16, state_p=32, state_n=32,
        gradient_chunk=16, gradient_p=32, gradient_n=32,
    ),
    # Without tensor cores more stands in registers.
    ("ieee", 8): Tiles(
        chunk=32, rows=32, block_p=32, block_n=16, state_p=32, state_n=64,
        gradient_chunk=32, gradient_p=16, gradient_n=16, stages=1,
    ),
    ("ieee", 10): Tiles(
        chunk=32, rows=32, block_p=32, block_n=16, state_p=32, state_n=32,
        gradient_chunk=32, gradient_p=16, gradient_n=16, stages=1,
    ),
    ("fp64", 8): Tiles(
        chunk=32, rows=32, block_p=32, block_n=32, state_p=32, state_n=32,
        gradient_chunk=16, gradient_p=16, gradient_n=32, heads=1, gradient_heads=1, warps=4, stages=1,
    ),
}  # fmt: skip


def _products(operand: torch.dtype, precision: str) -> str:
    return {torch.bfloat16: "bf16", torch.float64: "fp64"}.get(operand, precision)


def _of_architecture(table: dict, products: str, capability: int):
    return table.get((products, capability // 10)) or table[products, 8]


def choose_tiles(operand: torch.dtype, precision: str, headdim: int, dstate: int, capability: int) -> Tiles:
    """The committed table: tiles by the type that products are taken in, sizes, and the GPU's compute capability."""
    tiles = _of_architecture(TILES, _products(operand, precision), capability)
    P, N = power_of_two(headdim), power_of_two(dstate)
    columns = {name: min(P, getattr(tiles, name)) for name in ("block_p", "state_p", "gradient_p")}
    columns |= {name: min(N, getattr(tiles, name)) for name in ("block_n", "state_n", "gradient_n")}
    if N > 128:
        columns["gradient_n"] = min(columns["gradient_n"], 32)
    return replace(tiles, **columns)


def power_of_two(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class SweepTiles:
    """How the work of the two-sweep plan is cut; the same holds.

    Attributes:
        chunk: frames of a chunk.
        block_p: columns of headdim of a program, which has all of dstate.
        warps, stages: of the sweep.
    """

    chunk: int
    block_p: int
    warps: int = 8
    stages: int = 1


# (frames of a chunk, columns of headdim) for dstate up to 64, 128 and 256, by what tensor cores take and the major
# compute capability. They leave registers for lengths, diagonals and skips, which builds differ by.
SWEEPS = {
    ("bf16", 8): ((64, 32), (32, 64), (32, 32)),
    ("bf16", 9): ((64, 64), (64, 32), (64, 32)),
    ("bf16", 10): ((32, 64), (32, 64), (64, 32)),
    ("tf32", 8): ((32, 32), (32, 32), (16, 32)),
    ("tf32", 9): ((32, 64), (32, 64), (16, 32)),
    ("tf32", 10): ((32, 64), (32, 64), (16, 32)),
    ("tf32x3", 8): ((32, 32), (16, 32), (16, 16)),
    ("tf32x3", 9): ((32, 64), (16, 32), (16, 32)),
    ("tf32x3", 10): ((64, 32), (64, 32), (16, 32)),
    ("ieee", 8): ((16, 16), (16, 16), (16, 16)),
    ("fp64", 8): ((16, 16), (16, 16), (16, 16)),
}


def choose_sweep_tiles(operand: torch.dtype, precision: str, headdim: int, dstate: int, capability: int) -> SweepTiles:
    """The committed table of the two-sweep plan, as :func:`choose_tiles`. Other GPUs do as the oldest."""
    by_dstate = _of_architecture(SWEEPS, _products(operand, precision), capability)
    chunk, block_p = by_dstate[0 if dstate <= 64 else 1 if dstate <= 128 else 2]
    return SweepTiles(chunk, min(power_of_two(headdim), block_p))


PLANS = ("chunks", "sweeps")
# Programs for each multiprocessor, by major compute capability, from which on two sweeps are taken to keep a GPU busy:
# a guess, which no GPU has been asked yet. Others do as the newest.
PROGRAMS_TO_SWEEP = {8: 2, 9: 2, 10: 2}


def forced_plan() -> str:
    """What the environment says of the plan, "" for nothing."""
    return os.environ.get("LINCONV_SCAN_PLAN", "")


def choose_plan(programs: int, multiprocessors: int, capability: int, precision: str) -> str:
    """ "sweeps", whose states stay in registers, where its programs fill the GPU, else "chunks", which has many more.

    Args:
        programs: those that two sweeps would have: sequences x heads x tiles of headdim (x directions).
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
