"""Host time of Triton operators: from the call to the last launch, worked out at each call and done again.

    python benchmarks/bench_launches.py --out benchmarks/results/cpu/launches.json

No GPU is needed, and none is timed: kernels are compiled for sm_90 and given to a driver that launches nothing, so that
only Python is left, Triton's and ours. First calls are those of a new process, with Triton's cache on disk empty and
then filled. The driver and the operator's registration with torch add to this.
The peer is Triton's own launch of the same kernels, which looks up sizes, types and alignment at each call. Batch 8 of
`--lengths` frames, width 1024, heads of 64, bfloat16; Linformer has r = 256.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from linconv.benchmarking import compare
from linconv.benchmarking.record import run
from linconv.ops import triton_replay
from linconv.ops.bidirectional_ssd import triton as bidirectional_ssd
from linconv.ops.linformer import triton as linformer

BATCH, HEADS, HEADDIM, DSTATE, RANK = 8, 16, 64, 64, 256
INF = float("inf")
FIRST_CALLS = "first-calls"  # this script as its own process, where Triton has compiled nothing yet


class Utilities:
    """What Triton's runtime queries from a GPU before it launches."""

    @staticmethod
    def load_binary(*_):
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    @staticmethod
    def unload_module(*_):
        pass

    @staticmethod
    def get_device_properties(_):
        return dict(max_shared_mem=232_448, multiprocessor_count=132, warpSize=32)


class Launcher:
    launches = 0

    def __init__(self, source, metadata):
        pass

    def __call__(self, *_):
        Launcher.launches += 1


class Driver:
    """A GPU of compute capability 9.0 that runs nothing."""

    utils, launcher_cls = Utilities, Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def cases(length):
    def random(*shape):
        return torch.randn(shape, dtype=torch.bfloat16)

    x, dt = random(BATCH, length, HEADS, HEADDIM), random(2, BATCH, length, HEADS)
    B, C = (random(2, BATCH, length, 1, DSTATE) for _ in range(2))
    A, D, dt_bias = torch.randn(3, HEADS)
    scan = (x, dt, -A.abs(), B, C, D, dt_bias, True, 0.0, INF, "shifted", None, None)
    q = random(BATCH, length, HEADS, HEADDIM).transpose(1, 2)
    proj, k = random(1, length, RANK), torch.randn(BATCH, HEADS, RANK, HEADDIM)
    attention = (q, k, k, 0.125, 0.0, None, None)
    return {
        "bidirectional_ssd": (bidirectional_ssd.bidirectional_ssd, scan),
        "bidirectional_ssd_backward": (bidirectional_ssd.bidirectional_ssd_backward, (x, *scan)),
        "linformer_project": (linformer.linformer_project, (q, proj, True, None)),
        "linformer_project_backward": (linformer.linformer_project_backward, (k, q, proj, True, None)),
        "linformer_attend": (linformer.linformer_attend, attention),
        "linformer_attend_backward": (linformer.linformer_attend_backward, (q, *attention)),
    }


def count_launches(work):
    before = Launcher.launches
    work()
    return Launcher.launches - before


def first_calls(length):
    """Seconds of each operator's first call in this process, as JSON: compiling, or reading the cache, and launches."""
    driver.set_active(Driver())
    found = {}
    for name, (function, arguments) in cases(length).items():
        start = time.perf_counter()
        function.__wrapped__(*arguments)
        found[name] = time.perf_counter() - start
    print(json.dumps(found))


def body(record, lengths):
    driver.set_active(Driver())
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        for state in ("cold", "warm"):
            command = [sys.executable, __file__, FIRST_CALLS, str(lengths[0])]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for name, seconds in json.loads(done.stdout).items():
                record.add(op=name, length=lengths[0], disk_cache=state, first_call_seconds=seconds)
    for length in lengths:
        for name, (function, arguments) in cases(length).items():
            calls = triton_replay.Calls(function.__wrapped__)
            works = {
                "again": lambda calls=calls, arguments=arguments: calls((), arguments),
                "worked out": lambda f=function.__wrapped__, arguments=arguments: f(*arguments),
            }
            for _ in range(3):
                works["again"]()
            launches, others = (count_launches(works[n]) for n in ("again", "worked out"))
            if launches != others:
                raise SystemExit(
                    f"{name}: {launches} launches, {others} where they are worked out; no time is reported"
                )
            taken = {n: latency.median for n, latency in compare(works, min_repeats=300, max_repeats=300).items()}
            record.add(
                op=name, length=length, launches=launches, host_seconds=taken["again"], peer="Triton's launch",
                peer_seconds=taken["worked out"], speedup=taken["worked out"] / taken["again"],
            )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == [FIRST_CALLS]:
        first_calls(int(sys.argv[2]))
        sys.exit()
    run("launches", __doc__.splitlines()[0], [499], body)
