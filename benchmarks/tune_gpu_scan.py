"""Times every kernel of the scan on Triton at many tiles: what linconv/ops/ssd/triton_tiles.py is set by.

    python benchmarks/tune_gpu_scan.py --out benchmarks/results/<gpu>/tiles.json [--only outputs gradients]

Each candidate differs from the committed tiles in the fields of one kernel, which is timed by CUPTI. All are compiled
first, in as many processes as there are cores. Candidates whose results differ from the committed ones' by more than
products in bfloat16 explain are told, not timed.
"""

import argparse
import itertools
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from linconv.benchmarking.record import Record
from linconv.ops.bidirectional_ssd.triton import _both_directions
from linconv.ops.ssd.triton import scan_backward, scan_forward

BATCH, LENGTH, HEADDIM = 8, 4096, 64
WIDTHS = ((768, 64), (1024, 128))  # d, dstate
REPEATS = 10


def of(**fields):
    """Every combination of the fields' values."""
    return [dict(zip(fields, values)) for values in itertools.product(*fields.values())]


# Fields of Tiles by what they are candidates for.
CANDIDATES = {
    "outputs": [
        *of(chunk=[64], rows=[64], block_n=[64, 128], heads=[4, 6, 16], warps=[4], stages=[1, 2, 3, 4]),
        *of(chunk=[64], rows=[64], block_n=[64, 128], heads=[16], warps=[8], stages=[1, 2]),
        *of(chunk=[64], rows=[32], block_n=[64], heads=[16], warps=[4], stages=[1, 2, 3]),
        *of(chunk=[128], rows=[64], block_n=[64, 128], heads=[6, 16], warps=[4], stages=[1, 2, 3]),
    ],
    "states": of(chunk=[64, 128], state_n=[64, 128], state_warps=[4, 8]),
    "sweeps": [
        *of(chunk=[64, 128], sweep_n=[64, 128], sweep_warps=[4], sweep_stages=[2, 3, 4]),
        *of(chunk=[64, 128], sweep_p=[32], sweep_n=[64, 128], sweep_warps=[4], sweep_stages=[2, 3, 4]),
        *of(chunk=[128], sweep_n=[128], sweep_warps=[8], sweep_stages=[2, 3]),
    ],
    "gradients": [
        *of(gradient_n=[64], gradient_heads=[8, 16], gradient_warps=[4], gradient_stages=[1, 2, 3, 4]),
        *of(gradient_n=[64, 128], gradient_warps=[8], gradient_stages=[1, 2]),
        *of(gradient_chunk=[32], gradient_n=[64, 128], gradient_warps=[4], gradient_stages=[1, 2]),
    ],
}  # fmt: skip


def arguments(width, dstate, length=LENGTH):
    torch.manual_seed(0)
    heads = width // HEADDIM

    def tensor(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, dt = tensor(BATCH, length, heads, HEADDIM), tensor(2, BATCH, length, heads) - 3
    A, D = -torch.rand(2, heads, device="cuda") - 1, torch.randn(2, heads, device="cuda")
    return x, dt, A, tensor(2, BATCH, length, 1, dstate), tensor(2, BATCH, length, 1, dstate), D


def scan_with(kind, fields, tensors):
    plan = "sweeps" if kind == "sweeps" else "chunks"
    scan = _both_directions(*tensors, None, True, 0.0, float("inf"), "both", None, None)
    scan.plan = plan
    most = {"n": scan.dstate, "p": scan.headdim}
    fields = {name: min(value, most.get(name.rsplit("_")[-1], value)) for name, value in fields.items()}
    if "block_n" in fields:
        fields["dx_n"] = fields["block_n"]
    scan.tiles = replace(scan.tiles, **fields)
    return scan


def works(kind, fields, tensors):
    """What launches the kernels of a kind, by name."""
    x = tensors[0]
    works = {"forward": lambda: scan_forward(scan_with(kind, fields, tensors))[0]}
    works["backward"] = lambda: scan_backward(scan_with(kind, fields, tensors), x)
    if kind == "gradients":
        del works["forward"]
    return works


def compile(width, dstate, kind, fields):
    """Leaves what a candidate launches in Triton's cache on disk; an error's text where it does not run."""
    try:
        tensors = arguments(width, dstate, 512)
        for work in works(kind, fields, tensors).values():
            work()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def usable(compile, candidates: list[tuple], limit: float) -> list[tuple]:
    """The candidates for which ``compile`` says None, all compiled side by side, and none after so many seconds."""
    start, found = time.perf_counter(), []
    processes = min(16, len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    futures = {pool.submit(compile, *candidate): candidate for candidate in candidates}
    try:
        for future in as_completed(futures, timeout=limit):
            if (failed := future.result()) is None:
                found.append(futures[future])
            else:
                print(*futures[future], failed)
    except TimeoutError:
        print("not all was compiled in time")
    running = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in running:
        process.kill()
    print(f"{len(found)} of {len(candidates)} candidates compiled in {time.perf_counter() - start:.0f} s", flush=True)
    return sorted(found, key=candidates.index)


def flat(results):
    return torch.cat([r.flatten().float() for r in (results if isinstance(results, tuple) else (results,))])


def kernel_times(work):
    """Seconds of each kernel that a call launches, by its name."""
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()
    taken = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            taken.setdefault(event.name, []).append(event.device_time_total / 1e6)
    return {name: statistics.median(times) * len(times) / REPEATS for name, times in taken.items()}


KERNELS = {
    "outputs": "chunk_outputs",
    "states": "chunk_states",
    "gradients": "chunk_gradients",
    "sweeps": "sweep_states",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--widths", type=int, nargs="*", default=[w for w, _ in WIDTHS])
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which nothing more is compiled")
    options = parser.parse_args()
    record = Record("tiles", path=options.out)
    widths = [w for w in WIDTHS if w[0] in options.widths]
    candidates = [
        (*width, kind, fields) for kind in options.only for fields in ({}, *CANDIDATES[kind]) for width in widths
    ]
    compiled = usable(compile, candidates, options.limit)
    for width in widths:
        tensors = arguments(*width)
        for kind in options.only:
            committed = {name: flat(work()) for name, work in works(kind, {}, tensors).items()}
            for fields in [c[3] for c in compiled if c[:3] == (*width, kind)]:
                row = {}
                for name, work in works(kind, fields, tensors).items():
                    off = ((flat(work()) - committed[name]).norm() / committed[name].norm()).item()
                    if not off < (0.01 if name == "forward" else 0.05):
                        print(*width, kind, fields, name, f"is off by {off:.2g}")
                        continue
                    times = kernel_times(work)
                    row[f"{name}_seconds"] = sum(times.values())
                    own = [t for n, t in times.items() if n == KERNELS[kind]]
                    row[f"{name}_kernel_seconds"] = sum(own)
                    if not fields:
                        row |= {f"{name} {n}_seconds": t for n, t in times.items()}
                record.add(width=width[0], dstate=width[1], kind=kind, **fields, **row)
        del tensors


if __name__ == "__main__":
    main()
